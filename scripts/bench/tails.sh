#!/usr/bin/env bash
# Latency of writes while a checkpoint, a rotation of the raft log, a snapshot, a backup and a scrub run, and on a busy host.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: [BENCH_DIR=folder] scripts/bench/tails.sh [OPTIONS] [TWISTLOCKD]

Writes to a three-node dev cluster at a constant rate, first alone, then beside each disturbance in turn, then beside all of
them. A write's time counts from when it was due, so that a stall is not hidden by the writes that it kept from being sent.
Prints p50, p99, p99.9 and the longest, and the ratio of each p99.9 to the p99 of the writes alone.

  --only NAME,...   of alone, checkpoint, rotation, snapshot, backup, scrub, all, hogs, hogs-ordinary
                    [all but the last two, which keep all processors busy with and without real-time priority]
  --clients N,...   numbers of connections [1,16]
  --rates N,...     writes a second of each of these numbers of connections [300,600]
  --seconds N       shortest time that each is measured for [20]
  --mib N           size of the database [1024]
  --keep FOLDER     fill the cluster in this folder, or go on with the one that an earlier run left there
  --json            JSON instead of the table
  --help            this text

The clients have real-time priority where that is permitted, because they stand for other hosts. Builds the release program
unless one is given. BENCH_DIR chooses the disk; a tmpfs would flatter the results. Needs Linux and Python 3.11.
Exit code: 0, 1 if something failed, 64 for wrong options, 69 without Python.
TEXT
}

for argument in "$@"; do
    if [[ $argument == -h || $argument == --help ]]; then
        usage
        exit 0
    fi
done
cd "$(dirname "$0")/../.."
if ! command -v python3 >/dev/null; then
    echo "scripts/bench/tails.sh: python3 is not installed (apt-get install python3)" >&2
    exit 69
fi
exec python3 -B scripts/bench/tails.py "$@"
