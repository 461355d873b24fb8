#!/usr/bin/env bash
# Reads: through our VFS beside plain SQLite, and GETs of a dev cluster beside a bare server that has the same answers in memory.
set -euo pipefail

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    echo "usage: [TURNS=300] [ROUNDS=5] [SECONDS_EACH=4] [BENCH_DIR=folder] scripts/bench/reads.sh [TWISTLOCKD]"
    echo "Prints the medians of a row and of a list in TURNS turns, which should be hundreds: one takes 2 ms."
    echo "Then prints requests a second with 1, 16 and 64 connections, each with its ratio."
    echo "Builds the release program unless one is given. Needs wrk and Python 3.11."
    exit 0
fi
cd "$(dirname "$0")/../.."
program=${1:-target/release/twistlockd}
if [[ $# == 0 ]]; then
    cargo build --locked --release --quiet --bin twistlockd
fi
cargo bench --locked --quiet --bench reads
# Where cargo has put it.
bare=$(cargo bench --locked --quiet --bench bare --no-run --message-format=json |
    sed -n 's/.*"name":"bare".*"executable":"\([^"]*\)".*/\1/p' | tail -n 1)
exec python3 -B scripts/bench/reads.py "$(realpath "$program")" "$bare"
