#!/usr/bin/env bash
# Writes a second with many clients at once: a three-node dev cluster beside three nodes of etcd, same disk, same run, in turns, one
# load generator. Ours: POST of a tag with its row of the audit log, over HTTPS with a session. etcd: /v3/kv/put over plain HTTP.
set -euo pipefail

usage() {
    echo "usage: [CONNECTIONS='1 16 64'] [ROUNDS=3] [ROUND_SECONDS=5] [BENCH_DIR=folder] scripts/bench/writers.sh [TWISTLOCKD]"
    echo "Prints requests a second and latencies, the median of the rounds. Builds the release program unless one is given. Needs wrk,"
    echo "jq and curl; without etcd it measures twistlockd alone. BENCH_DIR chooses the disk."
}
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    usage
    exit 0
fi
cd "$(dirname "$0")/../.."
for needed in wrk jq curl; do
    if ! command -v "$needed" >/dev/null; then
        echo "scripts/bench/writers.sh: $needed is not installed (apt-get install $needed)" >&2
        exit 69
    fi
done
program=${1:-target/release/twistlockd}
if [[ $# == 0 ]]; then
    cargo build --release --quiet --bin twistlockd
fi
read -ra connections <<<"${CONNECTIONS:-1 16 64}"
rounds=${ROUNDS:-3} seconds=${ROUND_SECONDS:-5}

folder=$(mktemp -d -p "${BENCH_DIR:-${TMPDIR:-/tmp}}")
running=()
stop() {
    kill "${running[@]}" 2>/dev/null || true
    wait "${running[@]}" 2>/dev/null || true
    rm -rf "$folder"
}
trap stop EXIT

# Each request has a name of its own; whatever is not a success is counted.
cat >"$folder/load.lua" <<'LUA'
local ours, session = os.getenv("OURS") == "1", os.getenv("AUTHORIZATION")
local threads, number, prefix = 0, 0, ""
function setup(thread)
    thread:set("id", threads)
    threads = threads + 1
end
function init()
    prefix = string.format("%d-%d-", os.time(), id)
end
local letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
local function base64(text)
    return ((text:gsub(".", function(x)
        local bits, byte = "", x:byte()
        for i = 8, 1, -1 do bits = bits .. (byte % 2 ^ i - byte % 2 ^ (i - 1) > 0 and "1" or "0") end
        return bits
    end) .. "0000"):gsub("%d%d%d?%d?%d?%d?", function(x)
        if #x < 6 then return "" end
        local c = 0
        for i = 1, 6 do c = c + (x:sub(i, i) == "1" and 2 ^ (6 - i) or 0) end
        return letters:sub(c + 1, c + 1)
    end) .. ({ "", "==", "=" })[#text % 3 + 1])
end
function request()
    number = number + 1
    local name = prefix .. number
    if ours then
        local body = '{"name":"' .. name .. '","color":"#336699","description":"one of many"}'
        return wrk.format("POST", "/api/v1/tags", { ["Authorization"] = session, ["Content-Type"] = "application/json" }, body)
    end
    local body = '{"key":"' .. base64(name) .. '","value":"' .. base64("#336699 one of many") .. '"}'
    return wrk.format("POST", "/v3/kv/put", { ["Content-Type"] = "application/json" }, body)
end
function done(summary, latency)
    local failed = summary.errors.status + summary.errors.connect + summary.errors.read + summary.errors.timeout
    io.write(string.format("RESULT %.0f %.3f %.3f %d\n", summary.requests / (summary.duration / 1e6),
        latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, failed))
end
LUA

"$program" dev --quiet --port-offset 3800 --dir "$folder/cluster" >"$folder/out" &
running+=($!)
until grep -q "Ctrl-C stops" "$folder/out"; do
    kill -0 "${running[0]}"
    sleep 0.2
done
file=$folder/cluster/cluster.json
ask() {
    curl --silent --max-time 5 --cacert "$(jq -r .ca "$file")" "$@"
}
for url in $(jq -r '.nodes[].console_url' "$file"); do
    if ask --fail "$url/api/v1/_ping" >/dev/null; then
        primary=$url
    fi
done
login=$(jq '{username: .user, password}' "$file")
AUTHORIZATION="Bearer $(ask --fail --json "$login" "$primary/api/v1/authenticate" | jq -r .token)"
export AUTHORIZATION

peers=
if command -v etcd >/dev/null; then
    for node in 1 2 3; do
        peers+=${peers:+,}e$node=http://127.0.0.$node:3980
    done
    for node in 1 2 3; do
        etcd --name "e$node" --data-dir "$folder/etcd$node" --log-level error \
            --listen-peer-urls "http://127.0.0.$node:3980" --initial-advertise-peer-urls "http://127.0.0.$node:3980" \
            --listen-client-urls "http://127.0.0.$node:3979" --advertise-client-urls "http://127.0.0.$node:3979" \
            --initial-cluster "$peers" >"$folder/etcd$node.log" 2>&1 &
        running+=($!)
    done
    put='{"key":"YQ==","value":"Yg=="}'
    until curl --silent --fail --max-time 2 -d "$put" http://127.0.0.1:3979/v3/kv/put >/dev/null; do
        sleep 0.2
    done
    # The leader answers without asking another one.
    for node in 1 2 3; do
        status=$(curl --silent -d '{}' "http://127.0.0.$node:3979/v3/maintenance/status")
        if [[ $(jq -r .leader <<<"$status") == $(jq -r .header.member_id <<<"$status") ]]; then
            leader=http://127.0.0.$node:3979
        fi
    done
else
    echo "etcd is not installed: skipped"
fi

# measure NAME CONNECTIONS URL: adds a line to the results of that name.
measure() {
    local ours=0 threads=1
    [[ $1 == twistlockd* ]] && ours=1
    [[ $2 -ge 2 ]] && threads=2
    OURS=$ours wrk --connections "$2" --threads "$threads" --duration "${seconds}s" --latency --script "$folder/load.lua" "$3" |
        sed -n 's/^RESULT //p' >>"$folder/$1-$2"
}
for count in "${connections[@]}"; do
    for ((round = 0; round < rounds; round++)); do
        measure twistlockd "$count" "$primary"
        if [[ -n $peers ]]; then
            measure etcd "$count" "$leader"
        fi
    done
done

median() {
    cut -d ' ' -f "$2" "$1" | sort -n | sed -n "$((rounds / 2 + 1))p"
}
printf '%-12s %12s %14s %10s %10s %8s\n' "" connections "requests/s" "p50 ms" "p99 ms" failed
for count in "${connections[@]}"; do
    for name in twistlockd etcd; do
        results=$folder/$name-$count
        if [[ -e $results ]]; then
            failed=$(awk '{ sum += $4 } END { print sum }' "$results")
            printf '%-12s %12s %14s %10s %10s %8s\n' "$name" "$count" "$(median "$results" 1)" "$(median "$results" 2)" \
                "$(median "$results" 3)" "$failed"
        fi
    done
done
