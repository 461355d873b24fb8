#!/usr/bin/env bash
# Follows docs/pool.md, by its own commands and nothing else, on five hosts and a load balancer of its own making; then kills two of
# five under load. What the page shows is compared with what comes. Leaves nothing behind, and touches nothing of this host.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: tests/install/pool.sh [--systemd] [--keep] [--verbose]

Takes each command of docs/pool.md from there and runs it on hosts in namespaces (see tests/install/run.sh), with real HAProxy and
packaging/lb/haproxy.cfg in front. Prints the time that all of it takes. Needs root, ip, unshare, nsenter, curl, openssl, jq,
haproxy and overlayfs; says so and exits with 77 where they are missing.

  --systemd  systemd runs on the hosts (needs cgroup 2): members that are killed start again, and those that were removed are set
             aside as the page says; without it the test starts them
  --keep     leave the files of the hosts for a look
  --verbose  show what the commands print

  UPDATE_EXPECT=1    write what the commands print into docs/pool.md
  TWISTLOCK_BIN_DIR  folder of twistlockd, twistcli and defender [default: target/debug]
TEXT
}

# shellcheck source=tests/install/hosts.sh
. "$(dirname "${BASH_SOURCE[0]}")/hosts.sh"
options "$@"
# The network of the page, which is nobody's.
readonly NETWORK=192.0.2 PAGE=$root/docs/pool.md
readonly MEMBERS=(host1 host2 host3 host4 host5)
# Clients that write through the load balancer, and the pause of each between two writes, in seconds.
readonly WRITERS=3 PACE=0.05
need openssl jq haproxy pgrep

# ---- The page --------------------------------------------------------------------------------------------------------------

# block TEXT: the block of the page that has this text, with its number in the page before it.
block() {
    awk -v text="$1" '
        /^ *```/ { if (inside) { if (index(block, text)) { printf "%d\n%s", number, block; exit } } else { number++; block = "" }
                   inside = !inside; match($0, /^ */); indent = RLENGTH; next }
        inside { block = block substr($0, indent + 1) "\n" }' "$PAGE"
}

# command TEXT: what to type, from the block with this text, with what the reader has to fill in.
command_of() {
    local found
    found=$(block "$1" | tail -n +2)
    [ -n "$found" ] || fail "docs/pool.md has no block with \"$1\""
    found=${found//target\/release/$bin}
    printf '%s\n' "${found//\"password\":\"...\"/\"password\":\"$password\"}"
}

# What is different each time.
shape() {
    sed -E 's/([0-9A-F]{2}:)+([0-9A-F]{2}|\.{3})/FINGERPRINT/g
        s/[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2} UTC/MOMENT/g
        s/[0-9]{2} [A-Z][a-z]{2} [0-9]{2} [0-9]{2}:[0-9]{2} UTC/MOMENT/g
        s/version [0-9.]+/version VERSION/g
        s/[0-9]+\.[0-9] s\)/TIME)/g'
}

# shown TEXT: what came last is, from the first line of the block with this text on, what the page shows there.
shown() {
    local found number first came
    found=$(block "$1")
    [ -n "$found" ] || fail "docs/pool.md shows no block with \"$1\""
    number=$(head -n 1 <<<"$found") found=$(tail -n +2 <<<"$found")
    first=$(shape <<<"$found" | head -n 1)
    first=$(shape <<<"$output" | grep -nxF -m 1 -e "$first" | cut -d : -f 1) || true
    came=$(tail -n "+${first:-1}" <<<"$output")
    if [ "$(shape <<<"$came")" = "$(shape <<<"$found")" ]; then
        return
    fi
    if [ "${UPDATE_EXPECT:-}" = 1 ]; then
        came=$came awk -v number="$number" '
            /^ *```/ { if (!inside) at++; inside = !inside; print; if (inside && at == number) print ENVIRON["came"]; next }
            !(inside && at == number)' "$PAGE" >"$work/page"
        cat "$work/page" >"$PAGE"
        return
    fi
    diff <(shape <<<"$found") <(shape <<<"$came") || true
    fail "docs/pool.md shows something else in its block $number (UPDATE_EXPECT=1 writes it)"
}

# ---- Where its reader sits -------------------------------------------------------------------------------------------------

# at_desk COMMAND: as the reader types it, on a host of his own from which he reaches the others by ssh.
at_desk() {
    # shellcheck disable=SC2016 # the inner shell's
    nsenter --target "${pids[switch]}" --net unshare --mount bash -c '
        mount --make-rprivate /
        mount --bind "$1" /etc/hosts
        cd "$2"
        exec timeout "$3" env -i PATH="$2/bin:$4:$PATH" HOME="$2" LANG=C.UTF-8 TWISTLOCK_PASSWORD="$5" bash -eu -c "$6"' \
        bash "$work/hosts" "$work/desk" $COMMAND_LIMIT "$bin" "$password" "$1"
}

# on_host HOST COMMAND: as the reader types it there, in a folder that has scripts/.
on_host() {
    on "$1" bash -euo pipefail -c "PATH='$work/desk/sudo':\$PATH; $2"
}

make_desk() {
    local host
    mkdir -p "$work/desk/bin" "$work/desk/sudo"
    printf '#!/bin/bash\nexec "$@"\n' >"$work/desk/sudo/sudo"
    # What ssh does: the rest is a command for the shell there.
    cat >"$work/desk/bin/ssh" <<TEXT
#!/bin/bash
pid=\$(sed -n "s/^\$1 //p" "$work/desk/pids")
[ -n "\$pid" ] || { echo "there is no host \$1" >&2; exit 255; }
shift
exec nsenter --target "\$pid" --mount --uts --net --pid --wd=/root \\
    env -i PATH="$work/desk/sudo:$PATH" HOME=/root LANG=C.UTF-8 bash -c "\$*"
TEXT
    for host in "${hosts[@]}"; do
        echo "$host ${pids[$host]}" >>"$work/desk/pids"
        ln -s "$root/scripts" "$work/$host/cwd/scripts"
    done
    chmod +x "$work/desk/sudo/sudo" "$work/desk/bin/ssh"
}

# ---- The test --------------------------------------------------------------------------------------------------------------

secret() {
    step "a secret for all five"
    expect 0 at_desk "$(command_of 'openssl rand')"
    expect 0 on host5 test -s /etc/twistlock/pool.secret
}

five_that_wait() {
    local host failed=false installers=()
    step "five hosts are installed, and wait"
    for host in "${MEMBERS[@]}"; do
        on_host "$host" "$(command_of 'CLUSTERED_DB_ENABLED=true')" >"$work/$host/installed" 2>&1 &
        installers+=("$!")
    done
    for host in "${MEMBERS[@]}"; do
        wait "${installers[0]}" || failed=true
        installers=("${installers[@]:1}")
    done
    output=$(cat "$work/host1/installed")
    [ "$failed" = false ] || fail "an installation failed: $(cat "$work"/host?/installed)"
    [ "$verbose" = false ] || printf '%s\n' "$output"
    shown 'WAITING: host1'
    [ "$(on host2 stat -c '%U %a' /etc/twistlock/pool.secret)" = "twistlock 400" ] || fail "others can read the secret"
}

seed() {
    step "host1 is signed up"
    expect 0 at_desk "$(command_of 'api/v1/signup')"
    # It is not healthy alone, and says so.
    wait_for "host1 is PRIMARY" at_desk "$(command_of 'sudo twistcli clustered-db status') | grep -x '1. Address: 192.0.2.1, State: PRIMARY'"
    expect 0 at_desk "$(command_of 'certs ca')"
}

add() {
    local start
    step "one command adds the four others"
    start=$(now_ms)
    expect 0 at_desk "$(command_of 'clustered-db add --address')"
    shown '192.0.2.2 (host2, node 2) is added'
    echo "            four members more, all with a vote: $(($(now_ms) - start)) ms"
}

# HAProxy on a host of its own, with the shipped file, in which are the addresses of the members and two more lines in each part.
balancer() {
    local number
    step "a load balancer, and its address"
    # shellcheck disable=SC2016 # the inner shell's
    on lb bash -c 'mkdir -p /etc/haproxy && cat >/etc/haproxy/twistlock-ca.pem' <"$work/desk/ca.pem"
    sed -E "s/192\.0\.2\.1([123]):/$NETWORK.\1:/" "$root/packaging/lb/haproxy.cfg" >"$work/lb/haproxy.cfg"
    for number in 3 4; do
        sed -i "/server node$number /{p;s/node$number $NETWORK\.$number:/node$((number + 1)) $NETWORK.$((number + 1)):/}" \
            "$work/lb/haproxy.cfg"
    done
    expect 0 on lb haproxy -c -f "$work/lb/haproxy.cfg"
    expect 0 on lb haproxy -D -f "$work/lb/haproxy.cfg"
    expect 0 at_desk "$(command_of 'clustered-db configure')"
    shown 'Load balancer address: lb.example.com'
    wait_for "the certificates have the name" at_desk "$(command_of 'clustered-db status --address https://lb')"
    shown 'Clustered DB status'
}

# write NUMBER: a tag after the other through the load balancer; a file has those that were acknowledged. Runs at the desk.
# shellcheck disable=SC2154,SC2317,SC2329 # called there, with these variables
write() {
    local at=0
    while [ ! -e stop ]; do
        at=$((at + 1))
        if curl -fsS --max-time 5 --cacert ca.pem -H "authorization: Bearer $token" -H 'content-type: application/json' \
            -d "{\"name\":\"w$1-$at\",\"color\":\"#2e7d32\"}" "$api/tags" >/dev/null 2>&1; then
            echo "w$1-$at" >>"acknowledged.$1"
        fi
        sleep "$pace"
    done
}

# tags: the names of all that the pool has. Runs at the desk.
# shellcheck disable=SC2317,SC2329 # called there
tags() {
    local offset=0 names=more
    while [ -n "$names" ]; do
        names=$(curl -fsS --max-time 10 --cacert ca.pem -H "authorization: Bearer $token" \
            "$api/tags?limit=1000&offset=$offset" | jq -r '.[].name')
        printf '%s\n' "$names"
        offset=$((offset + 1000))
    done
}

acknowledged() {
    cat "$work"/desk/acknowledged.* 2>/dev/null | wc -l
}

# more_than COUNT: so many writes were acknowledged.
more_than() {
    [ "$(acknowledged)" -gt "$1" ]
}

# up COUNT: so many members are PRIMARY or SECONDARY, as the load balancer's address shows it.
up() {
    local count
    count=$(at_desk "$(command_of 'clustered-db status --address https://lb')" | grep -cE 'State: (PRIMARY|SECONDARY)$')
    [ "$count" -eq "$1" ]
}

two_of_five_are_killed() {
    local before start there prelude number writers=()
    step "the PRIMARY and another member are killed at the same moment, under load"
    there="api=https://lb.example.com:8083/api/v1"
    token=$(at_desk "$there
        curl -fsS --cacert ca.pem -H 'content-type: application/json' \"\$api/authenticate\" \
            -d '{\"username\":\"admin\",\"password\":\"$password\"}' | jq -r .token")
    prelude="$there token=$token pace=$PACE
        $(declare -f write tags)"
    for number in $(seq $WRITERS); do
        at_desk "$prelude
            write $number" &
        writers+=("$!")
    done
    wait_for "writes through the load balancer" more_than 30
    # Each client may have one that was answered before, and is written down after.
    before=$(acknowledged) start=$(now_ms)
    expect 0 at_desk "$(command_of 'pkill -9')"
    wait_for "writes after the kill" more_than $((before + WRITERS))
    echo "            from the kill to writes at the next PRIMARY: $(($(now_ms) - start)) ms"
    wait_for "more writes" more_than $((before + 30))
    : >"$work/desk/stop"
    for number in "${writers[@]}"; do
        wait "$number"
    done
    at_desk "$prelude
        tags" | sort >"$work/there"
    sort "$work"/desk/acknowledged.* >"$work/wanted"
    [ -z "$(comm -13 "$work/there" "$work/wanted")" ] ||
        fail "acknowledged, and lost: $(comm -13 "$work/there" "$work/wanted" | head -n 5)"
    echo "            $(wc -l <"$work/wanted") writes were acknowledged, all of them are there"
}

both_come_back() {
    local number
    step "both come back"
    if [ "$kind" = plain ]; then
        wait_for "two are down" up 3
        for number in 1 2; do
            expect 0 on_host "host$number" "scripts/install.sh -sj --program $bin console"
        done
    fi
    wait_for "five members, all up" up 5
}

remove_and_add_again() {
    step "host5 is removed, and added again when its data are set aside"
    expect 0 at_desk "$(command_of 'clustered-db remove')"
    shown '192.0.2.5 is removed'
    if [ "$kind" = plain ]; then
        return
    fi
    expect 75 at_desk "twistcli clustered-db add --member-address 192.0.2.5 --address https://lb.example.com:8083 -u admin --tlscacert ca.pem"
    says "no host waits there"
    expect 0 on_host host5 "$(command_of 'systemctl stop twistlockd')"
    wait_for "it waits" on host5 twistcli clustered-db fingerprint
    expect 0 at_desk "twistcli clustered-db add --member-address 192.0.2.5 --address https://lb.example.com:8083 -u admin --tlscacert ca.pem"
    wait_for "five members, all up" up 5
}

main() {
    local pool
    began=$(now_ms)
    password="Test1-$(od -An -N12 -tx1 /dev/urandom | tr -d ' \n')"
    step "five hosts and a load balancer are made"
    make_hosts $NETWORK "${MEMBERS[@]}" lb
    sed -i 's/ lb$/ lb lb.example.com/' "$work/hosts"
    make_desk
    pool=$(now_ms)
    secret
    five_that_wait
    seed
    add
    balancer
    echo "            from nothing to a pool of five behind a load balancer: $(($(now_ms) - pool)) ms"
    two_of_five_are_killed
    both_come_back
    remove_and_add_again
    step "all as docs/pool.md says"
}

main
