#!/usr/bin/env bash
# Commit latency of a single writer: three-node dev cluster beside local SQLite, same disk, same run, in turns.
set -euo pipefail

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    echo "usage: [COUNT=commits] [BENCH_DIR=folder] scripts/bench/commit.sh"
    echo "Prints the medians and their ratio. BENCH_DIR chooses the disk; a tmpfs would flatter both."
    exit 0
fi
cd "$(dirname "$0")/../.."
exec cargo bench --quiet --bench commit
