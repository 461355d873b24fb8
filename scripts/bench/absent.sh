#!/usr/bin/env bash
# How long raft log and -wal become while a member is down and the others are written to, and how long its return takes.
set -euo pipefail

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    echo "usage: [WRITTEN_MIB=2048] [RAFT_LOG_LIMIT_MB=1024] [TMPDIR=folder] scripts/bench/absent.sh"
    echo "Writes so much through the Console of a three-node cluster while one member is frozen, then lets that member come back"
    echo "under load, which it does by a snapshot. Prints the longest raft log and -wal seen, and the time of the return."
    exit 0
fi
cd "$(dirname "$0")/../.."
export SNAPSHOT_MIB=${WRITTEN_MIB:-2048} RAFT_LOG_LIMIT_MB=${RAFT_LOG_LIMIT_MB:-1024}
output=$(mktemp)
trap 'rm -f "$output"' EXIT
if ! cargo test --release --quiet --test e2e snapshot::a_member_beyond -- --nocapture >"$output" 2>&1; then
    tail -n 50 "$output" >&2
    exit 1
fi
grep -E "^(files|snapshot): " "$output"
