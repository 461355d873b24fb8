#!/usr/bin/env bash
# Runs a cluster of real daemons under random faults, and says what it survived. See tests/chaos/main.rs.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: scripts/chaos.sh [--minutes N | --seconds N] [--seed S] [--faults LIST] [--json] [--help]

Founds a cluster of three daemons on this machine, in a network and on small disks that only it sees, and harms it again and
again while clients write and read. Ends with a table of faults, outages and recoveries, and with exit code 0 if no promise was broken.
Needs root, a C compiler, iproute2 and nftables.

  --minutes N    how long; 3 unless given
  --seconds N    the same in seconds
  --seed S       which faults in which order: the number that an earlier run printed
  --faults LIST  names of faults or the beginnings of some, with commas: kill,partition. all: every one; -NAME: not that one
  --json         print the result as JSON, and all else to stderr
  --help         this text
TEXT
}

wrong() {
    echo "scripts/chaos.sh: $1" >&2
    exit 64
}

number() {
    [[ "$2" =~ ^[0-9]{1,9}$ ]] || wrong "$1: found \"$2\", a number is needed"
}

seconds=180 seed='' faults='' json=false
while [ $# -gt 0 ]; do
    case "$1" in
        --minutes | --seconds | --seed | --faults)
            [ $# -ge 2 ] || wrong "$1 needs a value"
            [ "$1" = --faults ] || number "$1" "$2"
            case "$1" in
                --minutes) seconds=$(($2 * 60)) ;;
                --seconds) seconds=$2 ;;
                --seed) seed=$2 ;;
                --faults) faults=$2 ;;
            esac
            shift 2
            ;;
        --json)
            json=true
            shift
            ;;
        -h | --help)
            usage
            exit 0
            ;;
        *) wrong "found \"$1\", allowed: --minutes, --seconds, --seed, --faults, --json, --help" ;;
    esac
done
[ "$(id -u)" -eq 0 ] || wrong "it makes networks and mounts: run it as root"
export PATH="$PATH:/usr/sbin:/sbin"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cargo test --locked --test chaos --no-run >&2

folder=$(mktemp -d /tmp/chaos.XXXXXX)
child=
# Ends the test and all that it started, by the id of their session. What it froze thaws by itself when it is gone, and mounts
# go with the last process that sees them.
clean_up() {
    if [ -n "$child" ]; then
        kill -TERM -- "-$child" 2>/dev/null || true
        for _ in 1 2 3 4 5 6 7 8 9 10; do
            kill -0 -- "-$child" 2>/dev/null || break
            sleep 0.3
        done
        kill -KILL -- "-$child" 2>/dev/null || true
        wait "$child" 2>/dev/null || true
    fi
    if compgen -G "$folder/chaos-*" >/dev/null; then
        echo "logs are kept in $folder" >&2
        rm -rf "$folder"/tw*
    else
        rm -rf "$folder"
    fi
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

export RUST_BACKTRACE=0 TMPDIR=$folder CHAOS_SECONDS=$seconds CHAOS_SEED=$seed CHAOS_FAULTS=$faults CHAOS_JSON=
[ "$json" = false ] || CHAOS_JSON=$folder/result
# In the background, so that a signal is not held back until it ends.
show() {
    # What `twistlockd dev` says about the cluster that it founds is no news here.
    grep --line-buffered -v '^  dev:'
}
setsid cargo test --locked --quiet --test chaos -- --exact chaos --nocapture > >(if "$json"; then show >&2; else show; fi) &
child=$!
code=0
wait "$child" || code=$?
child=
if [ "$json" = true ] && [ -s "$CHAOS_JSON" ]; then
    cat "$CHAOS_JSON"
fi
[ "$code" -eq 0 ] || exit 1
