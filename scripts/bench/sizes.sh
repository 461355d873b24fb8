#!/usr/bin/env bash
# What grows with the database: commits, takeover, start, switchover and snapshot at several sizes.
set -euo pipefail

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    echo "usage: [SIZES_MIB=10,1024,5120] [MEMBERS=3] [TIMES=3] [BENCH_DIR=folder] scripts/bench/sizes.sh [TWISTLOCKD]"
    echo "Fills the database of a dev cluster through the Console up to each size, and prints a line of medians for each. Needs about"
    echo "four times the largest size for each member, wrk and Python 3.11. Builds the release program unless one is given."
    exit 0
fi
cd "$(dirname "$0")/../.."
program=${1:-target/release/twistlockd}
if [[ $# == 0 ]]; then
    cargo build --locked --release --quiet --bin twistlockd
fi
exec python3 -B scripts/bench/sizes.py "$(realpath "$program")"
