#!/usr/bin/env bash
# Commits, takeovers and switchovers of 3, 5 and 7 members beside each other, on the disk and in memory.
set -euo pipefail

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    echo "usage: [MEMBERS=3,5,7] [TIMES=5] [SECONDS_EACH=5] [BENCH_DIR=folder] scripts/bench/pool.sh [TWISTLOCKD]"
    echo "Runs dev clusters of these sizes one after the other: in BENCH_DIR if it is given, else on the disk of the temporary folder"
    echo "and then on /dev/shm. Needs wrk and Python 3.11. Builds the release program unless one is given."
    exit 0
fi
cd "$(dirname "$0")/../.."
program=${1:-target/release/twistlockd}
if [[ $# == 0 ]]; then
    cargo build --locked --release --quiet --bin twistlockd
fi
for folder in ${BENCH_DIR:-"${TMPDIR:-/var/tmp}" /dev/shm}; do
    echo "in $folder ($(stat --file-system --format %T "$folder")):"
    BENCH_DIR=$folder python3 -B scripts/bench/pool.py "$(realpath "$program")"
done
