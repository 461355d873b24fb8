#!/usr/bin/env bash
# The service beside the Console: nginx through the daemon's proxy on the PRIMARY of a dev cluster, beside a direct connection to it.
set -euo pipefail

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    echo "usage: [ROUNDS=5] [SECONDS_EACH=3] [MEGABYTES=1024] [OFFSET=9000] [BENCH_DIR=folder] scripts/bench/proxy.sh [TWISTLOCKD]"
    echo "Prints the medians of requests a second with 1, 16 and 64 connections, kept and new, and of MB a second of one download and"
    echo "one upload: direct, through the proxy, and their ratio. The two go in turns."
    echo "Builds the release program unless one is given. Needs nginx, wrk, curl and Python 3.11."
    exit 0
fi
cd "$(dirname "$0")/../.."
program=${1:-target/release/twistlockd}
if [[ $# == 0 ]]; then
    cargo build --locked --release --quiet --bin twistlockd
fi
exec python3 -B scripts/bench/proxy.py "$(realpath "$program")"
