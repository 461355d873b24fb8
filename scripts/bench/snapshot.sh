#!/usr/bin/env bash
# Time in which a member gets the whole database, from the first byte to the last fsync, beside a copy on the same disk; and
# what it is sent when it lacks only a hundredth.
set -euo pipefail

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    echo "usage: [SNAPSHOT_MIB=256] [TMPDIR=folder] scripts/bench/snapshot.sh"
    echo "Fills the database of a three-node cluster through the Console while one member is frozen, lets that member come"
    echo "back under load, and prints both times and their ratio. TMPDIR chooses the disk; a tmpfs would flatter both."
    echo "Builds the release programs first, which takes minutes, and fills some 20 MiB a second."
    echo "Then the member misses a hundredth of the database, and prints how much it is sent and how long that takes."
    exit 0
fi
cd "$(dirname "$0")/../.."
export SNAPSHOT_MIB=${SNAPSHOT_MIB:-256}
output=$(mktemp)
trap 'rm -f "$output"' EXIT
if ! cargo test --release --quiet --test e2e snapshot::timed_a_member_beyond -- --nocapture >"$output" 2>&1; then
    tail -n 50 "$output" >&2
    exit 1
fi
grep -E "^(snapshot|difference): " "$output"
