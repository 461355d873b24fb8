#!/usr/bin/env bash
# Sizes of the raft log and of the -wal file while one member is away and a lot is written, and the time until it is back.
set -euo pipefail

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    echo "usage: [ABSENT_MIB=2048] [ABSENT_LIMIT_MIB=1024] [TMPDIR=folder] scripts/bench/absent.sh"
    echo "Freezes a SECONDARY of a three-node cluster while ABSENT_MIB of transactions go through the raft log, which is kept"
    echo "up to ABSENT_LIMIT_MIB; then lets the member come back under load, by a snapshot. Prints the largest sizes seen."
    exit 0
fi
cd "$(dirname "$0")/../.."
export ABSENT_MIB=${ABSENT_MIB:-2048} ABSENT_LIMIT_MIB=${ABSENT_LIMIT_MIB:-1024}
output=$(mktemp)
trap 'rm -f "$output"' EXIT
if ! cargo test --release --quiet --test e2e snapshot::timed_the_raft_log_and_the_wal -- --nocapture >"$output" 2>&1; then
    tail -n 50 "$output" >&2
    exit 1
fi
grep "^absent: " "$output"
grep "writes acknowledged" "$output"
