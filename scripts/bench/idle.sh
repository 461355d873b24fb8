#!/usr/bin/env bash
# Idle cost of each node of a dev cluster: processor time and memory over SECONDS (default 60), port guard included.
set -euo pipefail

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    echo "usage: [SECONDS_IDLE=60] scripts/bench/idle.sh [TWISTLOCKD]"
    echo "Prints CPU % of one core and RSS per node. Builds the release program unless one is given."
    exit 0
fi
cd "$(dirname "$0")/../.."
seconds=${SECONDS_IDLE:-60}
program=${1:-target/release/twistlockd}
if [[ $# == 0 ]]; then
    cargo build --release --quiet --bin twistlockd
fi

folder=$(mktemp -d)
"$program" dev --quiet --port-offset 3800 --dir "$folder" >"$folder/out" &
dev=$!
stop() {
    kill "$dev" 2>/dev/null || true
    wait "$dev" || true
    rm -rf "$folder"
}
trap stop EXIT
until grep -q "Ctrl-C stops" "$folder/out"; do
    kill -0 "$dev"
    sleep 0.2
done

# Clock ticks that a process and its children (the port guard) have used so far.
ticks() {
    local sum=0 pid stat fields
    for pid in "$1" $(pgrep -P "$1"); do
        stat=$(<"/proc/$pid/stat")
        # The name in parentheses may hold blanks: count the fields after it. utime and stime are the 12th and 13th there.
        read -ra fields <<<"${stat##*) }"
        sum=$((sum + fields[11] + fields[12]))
    done
    echo "$sum"
}
# Resident memory in KiB. The guard is the same program: what both have of its file is in memory once.
resident() {
    local sum pid
    sum=$(awk '/^VmRSS:/ {print $2}' "/proc/$1/status")
    for pid in $(pgrep -P "$1"); do
        sum=$((sum + $(awk '/^Rss(Anon|Shmem):/ {sum += $2} END {print sum}' "/proc/$pid/status")))
    done
    echo "$sum"
}

# The three daemons are the children of dev.
mapfile -t nodes < <(pgrep -P "$dev")
# Longer than a login keeps its memory (src/console/password.rs).
sleep 12
before=()
for pid in "${nodes[@]}"; do
    before+=("$(ticks "$pid")")
done
sleep "$seconds"
hertz=$(getconf CLK_TCK)
for index in "${!nodes[@]}"; do
    pid=${nodes[$index]}
    used=$(($(ticks "$pid") - before[index]))
    awk -v used="$used" -v hertz="$hertz" -v seconds="$seconds" -v rss="$(resident "$pid")" -v node="$((index + 1))" \
        'BEGIN { printf "node%d: %.2f %% of a core, %.1f MB resident\n", node, 100 * used / hertz / seconds, rss / 1024 }'
done
