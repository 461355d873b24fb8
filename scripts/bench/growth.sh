#!/usr/bin/env bash
# How long a page of each list takes when the tables are long: by offset and by cursor, at the top and at the end.
set -euo pipefail

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    echo "usage: [GROWTH_AUDITS=1000000] [GROWTH_EVENTS=100000] [TMPDIR=folder] scripts/bench/growth.sh"
    echo "Fills the tables of a Console without a cluster, asks its router for pages of 50 rows, and prints milliseconds for each filter:"
    echo "'offset 0' is counted, as every page by an offset; 'cursor' is the first page without a count. TMPDIR chooses the disk."
    exit 0
fi
cd "$(dirname "$0")/../.."
export GROWTH_AUDITS=${GROWTH_AUDITS:-1000000} GROWTH_EVENTS=${GROWTH_EVENTS:-100000}
output=$(mktemp)
trap 'rm -f "$output"' EXIT
if ! cargo test --locked --release --quiet --lib console::growth::timed -- --nocapture >"$output" 2>&1; then
    tail -n 50 "$output" >&2
    exit 1
fi
sed -n 's/^growth: //p' "$output"
