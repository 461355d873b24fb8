#!/usr/bin/env bash
# All that is measured, and other systems beside it, in one run. all.py decides what runs when, systems.py knows each system.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: [BENCH_DIR=folder] [PATRONI=program] scripts/bench/all.sh [OPTIONS] [TWISTLOCKD]

Measures writes a second, p50 and p99 with 1, 16 and 64 clients, and the takeover after kill -9 of the primary: of a dev
cluster of twistlockd; of etcd (three members), of PostgreSQL (three members under Patroni, synchronous replication to one of
two) and of Redis (three members with Sentinel, appendfsync always, WAIT 1); and of the floors below them: fdatasync, that of
three bare processes, and local SQLite. All are on one disk, take turns round by round, and have ordinary priority: twistlockd
does without its real-time threads. Then runs the other scripts of this folder. Prints a table, and writes all.json and
all.html (a page with plots that needs nothing else).

  --quick           under three minutes: two short rounds, one takeover each, none of the other scripts
  --only NAME,...   of twistlockd, etcd, postgresql, redis, floors, scripts
  --clients N,...   numbers of clients [1,16,64]
  --rounds N        rounds, of which the median counts [5]
  --seconds N       length of a round [5]
  --takeovers N     takeovers of each system, 0 for none [3]
  --out FOLDER      where all.json and all.html go [target/bench]
  --help            this text

Builds the release program unless one is given. Nothing else is installed: a system whose programs are missing is skipped, with
how to install it. BENCH_DIR chooses the disk; a tmpfs would flatter all. Needs Linux, Python 3.11 and, for most systems, wrk.
Exit code: 0, 1 if something failed that was there, 64 for wrong options, 69 without Python.
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
    echo "scripts/bench/all.sh: python3 is not installed (apt-get install python3)" >&2
    exit 69
fi
exec python3 -B scripts/bench/all.py "$@"
