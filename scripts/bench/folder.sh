#!/usr/bin/env bash
# SQLite in a folder that is served and replicated, beside SQLite in an ordinary folder: same disk, same run, in turns.
set -euo pipefail

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    echo "usage: [COUNT=commits] [ROUNDS=rounds] [BENCH_DIR=folder] scripts/bench/folder.sh"
    echo "Prints the medians of one-row commits in all journal modes, of point reads and of a transaction of 20 MB, and their"
    echo "ratios. A commit waits for three syncs on the same disk. Needs root and /dev/fuse. BENCH_DIR chooses the disk."
    exit 0
fi
cd "$(dirname "$0")/../.."
exec cargo bench --quiet --bench folder
