#!/usr/bin/env bash
# Where the time of a request and of a COMMIT goes: the steps that the daemons measure themselves (src/telemetry/steps.rs).
set -euo pipefail

for argument in "$@"; do
    if [[ $argument == -h || $argument == --help ]]; then
        cat <<'TEXT'
usage: [SECONDS_EACH=32] [CLIENTS=1,64] [BENCH_DIR=folder] scripts/bench/steps.sh [TWISTLOCKD]

Starts a dev cluster with LOG_LEVEL=trace, lets wrk create tags with each number of clients, and prints a table of
the steps: how often a second, the median and p99 in microseconds, and the share of the time. Steps may run at the
same time as others, and contain others. Each figure is the median of those of several spans of 5 s. Also says what
measuring costs: the rate with LOG_LEVEL=info before and after. Builds the release program unless one is given.
Needs python3 and wrk.
TEXT
        exit 0
    fi
done
cd "$(dirname "$0")/../.."
if [[ $# == 0 ]]; then
    cargo build --release --quiet --bin twistlockd
fi
exec python3 -B scripts/bench/steps.py "${1:-target/release/twistlockd}"
