#!/usr/bin/env bash
# Many Defenders on one PRIMARY: memory, events, acknowledgements, what others notice, and the way back after kill -9.
set -euo pipefail

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    cat <<'TEXT'
usage: scripts/bench/defenders.sh [--defenders N] [--rate N] [--seconds N] [--json] [--dir DIR] [--port-offset N]
       scripts/bench/defenders.sh --handshakes N [--json]
       scripts/bench/defenders.sh --million [--defenders N] [--events N] [--takeovers N] [--json]

Starts three members on loopback addresses and 10000 Defenders in one process, each with an address, a certificate and a TLS
session of its own. They send 2000 events a second; others write tags meanwhile; then the PRIMARY is killed. In the end the
database is asked for every event. The Defenders may need more open files than the limit permits: raise it (ulimit -Hn).
With --handshakes, it only measures what a TLS handshake costs at either end, in full and resumed.
With --million, 200 Defenders send a million events through 30 takeovers.
--dir chooses the disk. Builds the release program.
TEXT
    exit 0
fi
cd "$(dirname "$0")/../.."
exec cargo bench --locked --quiet --bench defenders -- "$@"
