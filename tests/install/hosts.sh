# What the tests of installations share: their options, hosts made of namespaces, and what a step says and expects. It is
# sourced, and needs `usage` and `NETWORK`. Must never touch this host's network, users or files.
# shellcheck shell=bash disable=SC2154,SC2034 # whoever sources this has and uses the variables

PATH=$PATH:/usr/sbin:/sbin
readonly MISSING=77
# How long a condition may take to come about, and one command to end, in seconds.
readonly LIMIT=30 COMMAND_LIMIT=90
work='' cgroups='' holders=() step_name='' output='' began=0
# Their names; the first has the first address of the network.
hosts=() network=''
declare -A pids

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
bin=${TWISTLOCK_BIN_DIR:-$root/target/debug}
keep=false verbose=false kind=plain

# options ARGUMENT...: those of the test.
options() {
    local argument
    for argument in "$@"; do
        case "$argument" in
            --systemd) kind=systemd ;;
            --keep) keep=true ;;
            --verbose) verbose=true ;;
            -h | --help)
                usage
                exit 0
                ;;
            *)
                echo "tests/install/${0##*/}: found \"$argument\", allowed: --systemd, --keep, --verbose, --help" >&2
                exit 64
                ;;
        esac
    done
}

skip() {
    echo "SKIPPED: $*"
    exit $MISSING
}

# need PROGRAM...: and what else it takes to make hosts.
need() {
    local program
    [ "$(id -u)" -eq 0 ] || skip "needs root for namespaces"
    for program in ip unshare nsenter curl "$@"; do
        command -v "$program" >/dev/null || skip "$program is not installed"
    done
    for program in twistlockd twistcli defender; do
        [ -x "$bin/$program" ] || skip "$bin/$program is not there: cargo build --bins, or set TWISTLOCK_BIN_DIR"
    done
    if [ "$kind" = systemd ]; then
        [ -x /lib/systemd/systemd ] || skip "systemd is not installed"
        cgroups=$(awk '$3 == "cgroup2" { print $2; exit }' /proc/mounts)
        [ -w "$cgroups/cgroup.procs" ] || skip "no writable cgroup 2 file system"
    fi
}

# ---- The hosts -------------------------------------------------------------------------------------------------------------

# shellcheck disable=SC2317,SC2329 # called by the trap
clean_up() {
    local code=$? pid host
    trap - EXIT
    set +e
    if [ "$code" -ne 0 ]; then
        printf 'FAILED (exit code %s) in: %s\n%s\n' "$code" "$step_name" "$output" >&2
        for host in "${hosts[@]}"; do
            tail -n 15 "$work/$host/var/upper/log/twistlock/twistlockd.log" >&2 2>/dev/null || true
            if [ "$kind" = systemd ] && [ -n "${pids[$host]:-}" ]; then
                on "$host" journalctl -u twistlockd -n 15 --no-pager >&2 || true
            fi
        done
    fi
    for pid in "${holders[@]}"; do
        # The first process of a namespace of processes: all others there die with it.
        kill -KILL "$pid" 2>/dev/null || true
        wait "$pid" 2>/dev/null || true
    done
    for host in "${hosts[@]}"; do
        drop_cgroup "$cgroups/twistlock-test-$$-$host"
    done
    if [ "$keep" = true ]; then
        echo "files: $work"
    elif [ -n "$work" ]; then
        rm -rf "$work"
    fi
    exit "$code"
}

# drop_cgroup DIR: as soon as the last process in it is gone.
# shellcheck disable=SC2317,SC2329 # called by the trap
drop_cgroup() {
    local tries=100
    while [ -d "$1" ] && [ "$tries" -gt 0 ]; do
        find "$1" -depth -type d -exec rmdir {} + 2>/dev/null && return
        sleep 0.05
        tries=$((tries - 1))
    done
}

# hold NAME COMMAND...: starts the first process of new namespaces; its pid outside goes to pids[NAME].
hold() {
    local name=$1 tries=200 child
    shift
    if [ "$kind" = systemd ] && [ "$name" != switch ]; then
        mkdir "$cgroups/twistlock-test-$$-$name"
        # shellcheck disable=SC2016 # the inner shell's
        set -- bash -c 'echo 0 >"$0/cgroup.procs"; exec "$@"' "$cgroups/twistlock-test-$$-$name" "$@"
    fi
    "$@" &
    holders+=("$!")
    while [ "$tries" -gt 0 ]; do
        # unshare waits; its child is the first process inside.
        child=$(cat "/proc/$!/task/$!/children" 2>/dev/null || true)
        if [ -n "$child" ] && [ -e "$work/$name/ready" ]; then
            pids[$name]=${child%% *}
            return
        fi
        sleep 0.02
        tries=$((tries - 1))
    done
    fail "the namespaces of $name did not come up"
}

# on HOST COMMAND...: runs a command there, as root and in an empty folder.
on() {
    local host=$1
    shift
    nsenter --target "${pids[$host]}" --mount --uts --net --pid --wd="$work/$host/cwd" \
        timeout $COMMAND_LIMIT env -i PATH="$PATH" HOME=/root LANG=C.UTF-8 "$@"
}

# make_hosts NETWORK NAME...: hosts with the addresses NETWORK.1 and so on. Leaves a folder, `work`, which goes at the end.
make_hosts() {
    local number host program
    network=$1
    shift
    hosts=("$@")
    trap clean_up EXIT
    trap 'exit 130' INT TERM
    work=$(mktemp -d)
    chmod 755 "$work"
    # Many copies are made of them; what a debugger needs is most of a program that was not built for release.
    if command -v strip >/dev/null; then
        mkdir "$work/bin"
        for program in twistlockd twistcli defender; do
            strip --strip-debug -o "$work/bin/$program" "$bin/$program"
        done
        bin=$work/bin
    fi
    printf '127.0.0.1 localhost\n' >"$work/hosts"
    for number in "${!hosts[@]}"; do
        printf '%s.%s %s\n' "$network" $((number + 1)) "${hosts[$number]}" >>"$work/hosts"
    done
    # The switch has a network of its own, so that no rule and no address of this host is in the way.
    mkdir "$work/switch"
    # shellcheck disable=SC2016 # the inner shell's
    hold switch unshare --net --pid --kill-child --fork bash -c ': >"$0"; sleep infinity & wait' "$work/switch/ready"
    nsenter --target "${pids[switch]}" --net ip link add switch type bridge
    nsenter --target "${pids[switch]}" --net ip address add "$network.254/24" dev switch
    nsenter --target "${pids[switch]}" --net ip link set switch up
    for number in "${!hosts[@]}"; do
        host=${hosts[$number]} number=$((number + 1))
        mkdir -p "$work/$host"/{etc,usr,var}/{upper,work} "$work/$host/cwd"
        hold "$host" unshare --mount --uts --ipc --net --pid --cgroup --fork --kill-child --mount-proc \
            bash "$root/tests/install/host.sh" "$work/$host" "$host" "$work/hosts" "$kind"
        ip link add "veth$number" netns "${pids[switch]}" type veth peer name eth0 netns "${pids[$host]}"
        nsenter --target "${pids[switch]}" --net ip link set "veth$number" master switch up
        on "$host" ip link set lo up
        on "$host" ip address add "$network.$number/24" dev eth0
        on "$host" ip link set eth0 up
    done
    if [ "$kind" = systemd ]; then
        for host in "${hosts[@]}"; do
            wait_for "systemd on $host" on "$host" systemctl is-active basic.target
        done
    fi
}

# ---- What a step says ------------------------------------------------------------------------------------------------------

now_ms() {
    local seconds
    read -r seconds _ </proc/uptime
    echo $((${seconds%.*} * 1000 + 10#${seconds#*.} * 10))
}

step() {
    local ms=$(($(now_ms) - began))
    step_name=$*
    printf '  %3d.%02d s  %s\n' $((ms / 1000)) $((ms % 1000 / 10)) "$*"
}

fail() {
    echo "not as it should be: $*" >&2
    exit 1
}

# expect CODE COMMAND...: runs it, keeps its output, and insists on its exit code.
expect() {
    local wanted=$1 code=0
    shift
    output=$("$@" 2>&1) || code=$?
    [ "$verbose" = false ] || printf '%s\n' "$output"
    [ "$code" -eq "$wanted" ] || fail "exit code $code instead of $wanted of: $*"
}

# says TEXT: the output that was kept last has it.
says() {
    [[ $output == *"$1"* ]] || fail "no \"$1\" in the output"
}

# wait_for SENTENCE COMMAND...: until the command succeeds.
wait_for() {
    local what=$1 end
    shift
    end=$(($(now_ms) + LIMIT * 1000))
    until output=$("$@" 2>&1); do
        [ "$(now_ms)" -lt "$end" ] || fail "$what: not within $LIMIT s"
        sleep 0.05
    done
}
