#!/usr/bin/env bash
# Installs, upgrades or uninstalls Twistlock HA on this host. Changes nothing before all checks have passed, never deletes a
# database, and never reads twistlock.cfg as a shell program.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: install.sh [-s] [-y] [-j] [-f] [-z] [--program DIR] [--config FILE] [--set KEY=VALUE]... console
       install.sh -u [-s] [console]

Installs the node of this host, or upgrades it. The flags can be combined: -syj.

  -s               accept the terms, and answer every question with yes
  -y               pass over the checks of this host that would block the installation
  -j               keep the settings of the installed twistlock.cfg; keys that it lacks come from the new one
  -f               drop the existing database: the data folder is set aside, never deleted
  -u               uninstall; data, backups and twistlock.cfg stay
  -z               show every command
  -h, --help       this text
  --program DIR    folder of twistlockd and twistcli [default: the folder of this script]
  --config FILE    the new twistlock.cfg [default: twistlock.cfg, else twistlock.cfg.example, beside this script]
  --set KEY=VALUE  set a key of twistlock.cfg

  TWISTLOCK_PREFIX=DIR  put everything below DIR and run as the current user, without systemd (for tests)

A first node:      sudo ./install.sh -s --set HIGH_AVAILABILITY_ENABLED=true console
The other two:     run on them the line that "twistcli ha join-script" prints on the first
An upgrade:        sudo ./install.sh -sj console

All output goes to twistlock-install.log in the current folder, too.
Exit code: 0 done, 64 wrong command line, 66 a file is missing, 69 the node did not start, 73 cannot write,
75 blocked by a check of this host, 77 not allowed or refused, 78 error in twistlock.cfg.
TEXT
}

# Exit codes of sysexits.
readonly EX_USAGE=64 EX_NOINPUT=66 EX_UNAVAILABLE=69 EX_CANTCREAT=73 EX_TEMPFAIL=75 EX_NOPERM=77 EX_CONFIG=78
# What a host should have.
readonly MIN_CPU=2 MIN_MEMORY_KB=950000 MIN_DISK_KB=10000000
# How long a node may take to start and to stop, in seconds.
readonly START_LIMIT=60 STOP_LIMIT=20
# How often systemd may start a node in vain before this script stops watching.
readonly START_TRIES=3
readonly RUN_USER=twistlock
# The user whose id the original gave to its Console.
readonly RUN_UID=2674

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly here
readonly prefix=${TWISTLOCK_PREFIX:-}
readonly bin_dir=$prefix/usr/local/bin
readonly etc_dir=$prefix/etc/twistlock
readonly config=$etc_dir/twistlock.cfg
readonly unit_dir=$prefix/etc/systemd/system
readonly unit=twistlockd.service
readonly drop_in=$unit_dir/$unit.d/10-install.conf
readonly pid_file=$prefix/run/twistlock/twistlockd.pid
readonly log_file=$prefix/var/log/twistlock/twistlockd.log
readonly man_page=$prefix/usr/local/share/man/man1/twistcli.1
readonly completion=$prefix/usr/share/bash-completion/completions/twistcli
readonly rotation=$prefix/etc/logrotate.d/twistlock

accept=false pass_over=false keep=false drop=false uninstall=false debug=false
program_dir='' new_config='' settings=() scratch='' log=/dev/null

say() {
    printf '%s\n' "$*" | tee -a "$log" || true
}

complain() {
    printf '%s\n' "$*" | tee -a "$log" >&2 || true
}

# die CODE SENTENCE...
die() {
    local code=$1 line
    shift
    complain "install.sh: $1"
    shift
    for line in "$@"; do
        complain "  $line"
    done
    exit "$code"
}

read_arguments() {
    local component='' letters
    while [ $# -gt 0 ]; do
        case "$1" in
            --help)
                usage
                exit 0
                ;;
            --program | --config | --set)
                [ $# -ge 2 ] || die $EX_USAGE "$1 needs a value" "See: install.sh --help"
                case "$1" in
                    --program) program_dir=$2 ;;
                    --config) new_config=$2 ;;
                    *)
                        [[ $2 =~ ^[A-Z][A-Z0-9_]*=[^[:cntrl:]\"\\\$\`]*$ ]] ||
                            die $EX_USAGE "found --set \"$2\", allowed: KEY=VALUE, without \\ \" \$ and \` in the value"
                        settings+=("$2")
                        ;;
                esac
                shift
                ;;
            -[!-]*)
                letters=${1#-}
                while [ -n "$letters" ]; do
                    read_flag "${letters:0:1}"
                    letters=${letters:1}
                done
                ;;
            console)
                [ $# -eq 1 ] || die $EX_USAGE "the component comes last; after it: \"$2\"" "See: install.sh --help"
                component=$1
                ;;
            *) die $EX_USAGE "found \"$1\", allowed: flags, then the component \"console\"" "See: install.sh --help" ;;
        esac
        shift
    done
    if [ -z "$component" ] && [ "$uninstall" = false ]; then
        die $EX_USAGE "the component is missing" "Try: install.sh console (install.sh --help tells the flags)"
    fi
    if [ "$uninstall" = true ] && [ "$drop" = true ]; then
        die $EX_USAGE "-u leaves the data where it is, so it cannot go with -f"
    fi
}

read_flag() {
    case "$1" in
        s) accept=true ;;
        y) pass_over=true ;;
        j) keep=true ;;
        f) drop=true ;;
        u) uninstall=true ;;
        z) debug=true ;;
        h)
            usage
            exit 0
            ;;
        *) die $EX_USAGE "found -$1, allowed: -s -y -j -f -u -z -h" "See: install.sh --help" ;;
    esac
}

open_log() {
    local argument said=''
    # People send this file when they ask for help: what a setting is set to may be a secret.
    for argument in "$@"; do
        case "$argument" in
            [A-Z]*=*) argument=${argument%%=*}=... ;;
        esac
        said+=" $argument"
    done
    if (umask 077 && : >>twistlock-install.log) 2>/dev/null; then
        log=$PWD/twistlock-install.log
        printf -- '\n---- %s: install.sh%s\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$said" >>"$log"
    else
        complain "warning: twistlock-install.log cannot be written in $PWD: going on without"
    fi
    if [ "$debug" = true ]; then
        PS4='+ line ${LINENO}: '
        set -x
    fi
}

# confirm QUESTION: true if the answer is yes.
confirm() {
    local answer=''
    if [ "$accept" = true ]; then
        return 0
    fi
    if ! [ -t 0 ]; then
        complain "$1 Nobody is there to answer; -s answers yes."
        return 1
    fi
    read -r -p "$1 [y/N] " answer
    [[ $answer =~ ^[Yy]([Ee][Ss])?$ ]]
}

accept_terms() {
    if [ "$accept" = true ]; then
        return
    fi
    say "Twistlock HA comes under the Apache License 2.0, without warranty of any kind. It is an independent"
    say "implementation, not affiliated with the original vendor. The whole text: LICENSE, beside this script or in"
    say "the source, and https://www.apache.org/licenses/LICENSE-2.0"
    confirm "Do you accept the terms?" || die $EX_NOPERM "the terms were not accepted: nothing was changed"
}

# ---- twistlock.cfg ---------------------------------------------------------------------------------------------------------

# raw KEY FILE: what the last line that sets KEY has right of its "=".
raw() {
    sed -n "s/^[[:space:]]*$1=//p" "$2" | tail -n 1 | tr -d '\r'
}

# value KEY DEFAULT: what KEY means in the new configuration.
value() {
    local text
    text=$(raw "$1" "$scratch/twistlock.cfg")
    if ! grep -q "^[[:space:]]*$1=" "$scratch/twistlock.cfg"; then
        text=$2
    fi
    plain "$text"
}

# plain TEXT: without quotes and trailing blanks; ${VAR-default} and ${VAR:-default} are looked up. Nothing is run.
plain() {
    local text=$1 name quoted="'\\''"
    text=${text%"${text##*[![:space:]]}"}
    if [[ $text =~ ^\'(.*)\'$ ]]; then
        # Nothing in it is looked up, and a single quote is written so.
        printf '%s\n' "${BASH_REMATCH[1]//"$quoted"/"'"}"
        return
    fi
    if [[ $text =~ ^\"(.*)\"$ ]]; then
        text=${BASH_REMATCH[1]}
    fi
    if [[ $text =~ ^\$\{([A-Za-z_][A-Za-z0-9_]*)(:?)-(.*)\}$ ]]; then
        name=${BASH_REMATCH[1]}
        if [ -n "${!name:-}" ] || { [ -z "${BASH_REMATCH[2]}" ] && [ -n "${!name+set}" ]; }; then
            text=${!name}
        else
            text=${BASH_REMATCH[3]}
        fi
    fi
    printf '%s\n' "$text"
}

# put KEY TEXT: sets the line of KEY in the new configuration, or adds one.
put() {
    local file=$scratch/twistlock.cfg line done=false
    while IFS= read -r line || [ -n "$line" ]; do
        if [[ $line =~ ^[[:space:]]*"$1"= ]]; then
            # A second line of the same key would win over this one.
            [ "$done" = true ] || printf '%s=%s\n' "$1" "$2"
            done=true
        else
            printf '%s\n' "$line"
        fi
    done <"$file" >"$file.next"
    [ "$done" = true ] || printf '%s=%s\n' "$1" "$2" >>"$file.next"
    mv "$file.next" "$file"
}

# Puts the new configuration together in the scratch folder, and has the new program check it.
make_config() {
    local source=$new_config candidate key text setting report
    if [ -z "$source" ]; then
        for candidate in "$here/twistlock.cfg" "$here/twistlock.cfg.example" "$here/../twistlock.cfg.example"; do
            if [ -f "$candidate" ]; then
                source=$candidate
                break
            fi
        done
    fi
    if [ -z "$source" ] && [ "$keep" = true ] && [ -f "$config" ]; then
        source=$config
    fi
    if [ -z "$source" ] || ! [ -r "$source" ]; then
        die $EX_NOINPUT "there is no ${source:-twistlock.cfg beside this script}" "Name one: install.sh --config FILE console"
    fi
    cp "$source" "$scratch/twistlock.cfg"
    if [ "$keep" = true ] && [ -f "$config" ]; then
        while IFS= read -r key; do
            put "$key" "$(raw "$key" "$config")"
        done < <(sed -n 's/^[[:space:]]*\([A-Z][A-Z0-9_]*\)=.*/\1/p' "$config" | sort -u)
        say "Settings: those of $config are kept; what it lacks comes from $source"
    else
        say "Settings: $source"
    fi
    for setting in "${settings[@]}"; do
        text=${setting#*=}
        [[ $text =~ ^[A-Za-z0-9_./:@%+,-]*$ ]] || text="\"$text\""
        put "${setting%%=*}" "$text"
    done
    if [ -n "$prefix" ]; then
        for key in DATA_FOLDER DATA_RECOVERY_VOLUME; do
            text=$(value "$key" "$([ $key = DATA_FOLDER ] && echo /var/lib/twistlock || echo /var/lib/twistlock-backup)")
            [[ $text == "$prefix"/* ]] || put "$key" "$prefix$text"
        done
    fi
    if ! report=$("$program_dir/twistlockd" check-config "$scratch/twistlock.cfg" 2>&1); then
        die $EX_CONFIG "the settings have errors: nothing was changed" "${report//"$scratch/twistlock.cfg"/"$source"}"
    fi
    printf '%s\n' "$report" >>"$log"
}

# The settings this script itself goes by.
read_settings() {
    data=$(value DATA_FOLDER /var/lib/twistlock)
    backups=$(value DATA_RECOVERY_VOLUME /var/lib/twistlock-backup)
    state=$(value HIGH_AVAILABILITY_STATE PRIMARY)
    https=$(value MANAGEMENT_PORT_HTTPS 8083)
    ports=()
    local port
    for port in "$(value MANAGEMENT_PORT_HTTP '')" "$https" "$(value COMMUNICATION_PORT 8084)" \
        "$(value HIGH_AVAILABILITY_PORT 8086)"; do
        [ -z "$port" ] || ports+=("$port")
    done
    as_root=$(value RUN_CONSOLE_AS_ROOT false)
    run_user=$RUN_USER
    if [ -n "$prefix" ]; then
        run_user=$(id -un)
    elif [ "$as_root" = true ]; then
        run_user=root
    fi
    use_systemd=false
    if [ -z "$prefix" ] && [ -d /run/systemd/system ] && [ "$(value SYSTEMD_ENABLED true)" = true ]; then
        use_systemd=true
    fi
}

# ---- Checks of this host ---------------------------------------------------------------------------------------------------

find_program() {
    [ -n "$program_dir" ] || program_dir=$here
    [ -d "$program_dir" ] || die $EX_NOINPUT "--program: there is no folder $program_dir"
    program_dir=$(cd "$program_dir" && pwd)
    local name version
    for name in twistlockd twistcli; do
        [ -f "$program_dir/$name" ] || die $EX_NOINPUT "$name is not in $program_dir" \
            "Put it beside this script, or name its folder: install.sh --program DIR console"
        version=$("$program_dir/$name" --version 2>>"$log") ||
            die $EX_UNAVAILABLE "$program_dir/$name does not run on this host ($(uname -sm))"
        say "Program: $version"
    done
    for unit_source in "$here/$unit" "$here/../packaging/$unit" ''; do
        [ -f "$unit_source" ] && break
    done
    if [ -z "$prefix" ] && [ -d /run/systemd/system ] && [ -z "$unit_source" ]; then
        die $EX_NOINPUT "$unit is not beside this script"
    fi
}

warn() {
    complain "warning  $*"
}

block() {
    complain "BLOCK    $*"
    blocks=$((blocks + 1))
}

check_host() {
    local cpus memory folder free names
    blocks=0
    cpus=$(nproc)
    [ "$cpus" -ge $MIN_CPU ] || block "$cpus CPU found, $MIN_CPU are needed"
    memory=$(awk '$1 == "MemTotal:" { print $2 }' /proc/meminfo)
    [ "$memory" -ge $MIN_MEMORY_KB ] || block "$((memory / 1000)) MB of memory found, 1 GB is needed"
    folder=$data
    while ! [ -d "$folder" ]; do
        folder=$(dirname "$folder")
    done
    free=$(df -Pk "$folder" | awk 'END { print $4 }')
    [ "$free" -ge $MIN_DISK_KB ] || block "$((free / 1000)) MB are free for $data, 10 GB are needed"
    case "$(stat -f -c %T "$folder")" in
        tmpfs | ramfs) warn "$data is in memory: it does not survive a restart of the host" ;;
        nfs* | cifs | smb* | fuse*) warn "$data is on a network or user-space file system: use a local one" ;;
    esac
    if [ "$use_systemd" = true ] && [[ "$data/ $backups/" =~ (^| )/(home|root|tmp|var/tmp|run/user)/ ]]; then
        block "DATA_FOLDER=$data or DATA_RECOVERY_VOLUME=$backups is in a folder that the systemd unit hides from the node"
    fi
    check_ports
    check_clock
    if ! names=$(getent ahosts "$(hostname)"); then
        warn "the host name $(hostname) does not resolve: the other members cannot reach this host by it"
    elif ! grep -qv '^\(127\.\|::1\)' <<<"$names"; then
        warn "the host name $(hostname) resolves to this host alone ($(awk 'NR == 1 { print $1 }' <<<"$names")):" \
            "the other members cannot reach it by that"
    fi
    if [ "$blocks" -gt 0 ] && [ "$pass_over" = false ]; then
        die $EX_TEMPFAIL "$blocks check(s) of this host block the installation: nothing was changed" \
            "Mend what is said above, or pass over it: -y"
    fi
}

# The kernel's tables of TCP sockets: state 0A listens; the port is the end of the local address, in hexadecimal.
listening() {
    awk -v port="$(printf ':%04X' "$1")" \
        '$4 == "0A" && substr($2, length($2) - 4) == port { found = 1 } END { exit !found }' /proc/net/tcp /proc/net/tcp6 2>/dev/null
}

check_ports() {
    local port
    # The running node of this host holds them itself, and will give them back.
    if node_runs; then
        return
    fi
    for port in "${ports[@]}"; do
        if listening "$port"; then
            block "port $port is in use by another program (see: ss -ltnp 'sport = :$port')"
        fi
    done
}

check_clock() {
    local synchronized=''
    if command -v timedatectl >/dev/null; then
        synchronized=$(timedatectl show -p NTPSynchronized --value 2>/dev/null || true)
    fi
    if [ -z "$synchronized" ] && command -v chronyc >/dev/null && chronyc -n tracking >/dev/null 2>&1; then
        synchronized=yes
    fi
    case "$synchronized" in
        yes) ;;
        no) warn "the clock of this host is not synchronized: members whose clocks differ by over 1 s cannot join" ;;
        *) warn "it cannot be told whether the clock of this host is synchronized: members need clocks that agree within 1 s" ;;
    esac
}

# The members that the data folder knows of, or 0.
members() {
    local file
    # Each member has exactly one rank, and nothing else has one.
    for file in "$data/membership.json" "$data/identity.json"; do
        if [ -f "$file" ]; then
            grep -o '"rank"[[:space:]]*:' "$file" | wc -l
            return
        fi
    done
    echo 0
}

# A fresh start of a PRIMARY where a cluster exists would make a second cluster, and leave the others without this member.
check_membership() {
    local count
    count=$(members)
    if [ "$count" -le 1 ] || [ "$state" != PRIMARY ]; then
        return
    fi
    if [ "$keep" = false ] || [ "$drop" = true ]; then
        die $EX_NOPERM "$data belongs to a cluster of $count members, and HIGH_AVAILABILITY_STATE=PRIMARY would begin a new one" \
            "To upgrade or repair this node as the member it is:  install.sh -j console" \
            "To make it PRIMARY, on the node that is:             twistcli ha switchover --to $(hostname)" \
            "To replace it: twistcli ha remove $(hostname), then the line that \"twistcli ha join-script\" prints" \
            "If the other members are lost for good:              twistlockd recover --force-new-cluster" \
            "Nothing was changed."
    fi
}

# ---- The node --------------------------------------------------------------------------------------------------------------

# The process that this script or the join script started without systemd, or that has the data folder, if it still runs.
pid_of_node() {
    local file pid program
    for file in "$pid_file" "$data/lock"; do
        pid=''
        if [ -r "$file" ]; then
            read -r pid <"$file" || true
        fi
        [[ $pid =~ ^[0-9]+$ ]] || continue
        program=$(readlink "/proc/$pid/exe" 2>/dev/null) || continue
        # A replaced program is still "twistlockd (deleted)".
        [[ ${program##*/} == twistlockd* ]] || continue
        # A process id comes back: one in an old lock file may be that of another node.
        if [ "$file" = "$pid_file" ] || readlink "/proc/$pid"/fd/* 2>/dev/null | grep -qxF "$data/lock"; then
            echo "$pid"
            return
        fi
    done
    return 1
}

unit_is_there() {
    [ -z "$prefix" ] && [ -d /run/systemd/system ] && systemctl cat $unit >/dev/null 2>&1
}

node_runs() {
    { unit_is_there && systemctl is-active --quiet $unit; } || pid_of_node >/dev/null
}

# lives PID: false once it has let go of its files, even where nobody has collected it yet. Its program is gone earlier.
lives() {
    grep -q '^State:[[:space:]]*[^ZX[:space:]]' "/proc/$1/status" 2>/dev/null
}

wait_until_gone() {
    local pid=$1 tries=$((STOP_LIMIT * 10))
    while lives "$pid" && [ "$tries" -gt 0 ]; do
        sleep 0.1
        tries=$((tries - 1))
    done
    [ "$tries" -gt 0 ]
}

stop_node() {
    local pid
    # Active or not: between two attempts to start it, a unit is neither active nor stopped, and the next attempt would come
    # while its data moves.
    if unit_is_there; then
        [[ $(systemctl is-active $unit) == inactive ]] || say "Stopping the node"
        systemctl stop $unit || die $EX_TEMPFAIL "$unit does not stop: see systemctl status $unit"
        systemctl reset-failed $unit 2>/dev/null || true
    fi
    if pid=$(pid_of_node); then
        say "Stopping the node (pid $pid)"
        kill -TERM "$pid"
        if ! wait_until_gone "$pid"; then
            complain "warning  it did not end within $STOP_LIMIT s, and is killed"
            kill -KILL "$pid"
            wait_until_gone "$pid" || die $EX_UNAVAILABLE "the node (pid $pid) does not end"
        fi
    fi
    rm -f "$pid_file"
}

installed_cli() {
    "$bin_dir/twistcli" "$@" --config "$config"
}

# Moves the PRIMARY role to a member that stays up, while everything still runs. The stop alone would hand it over, too,
# but only a switchover looks first whether another member can take it.
leave_role() {
    local status
    if ! [ -x "$bin_dir/twistcli" ] || ! [ -f "$config" ] || [ "$(members)" -le 1 ] || ! node_runs; then
        return
    fi
    status=$(installed_cli ha status --json 2>/dev/null) || true
    if ! grep -q '"role"[[:space:]]*:[[:space:]]*"PRIMARY"' <<<"$status"; then
        return
    fi
    say "This node is PRIMARY: the role moves to another member first"
    installed_cli ha switchover >>"$log" 2>&1 || warn "no switchover (see the log); the role is handed over while the node stops"
}

# True when it is of no use to wait any longer.
node_gave_up() {
    if [ "$use_systemd" = false ]; then
        # It may still be on its way through setsid and setpriv: any program will do.
        if lives "$started"; then
            return 1
        fi
        return 0
    fi
    systemctl is-failed --quiet $unit || [ "$(systemctl show -p NRestarts --value $unit)" -ge $START_TRIES ]
}

wait_until_ready() {
    local tries=$((START_LIMIT * 5)) code=0 report=''
    while [ "$tries" -gt 0 ]; do
        code=0
        report=$("$bin_dir/twistcli" ha status --config "$config" 2>&1) || code=$?
        # 0 healthy, 1 degraded: a node of its own is degraded until the others have joined.
        if [ "$code" -le 1 ]; then
            say "$report"
            return
        fi
        if node_gave_up; then
            break
        fi
        sleep 0.2
        tries=$((tries - 1))
    done
    complain "$report"
    if [ "$use_systemd" = true ]; then
        journalctl -u $unit -n 20 --no-pager 2>/dev/null | tee -a "$log" >&2 || true
    else
        tail -n 20 "$log_file" 2>/dev/null | tee -a "$log" >&2 || true
    fi
    die $EX_UNAVAILABLE "the node is installed, but it did not get ready" "Its last lines are above; then run this script again."
}

start_node() {
    say "Starting the node"
    if [ "$use_systemd" = true ]; then
        systemctl daemon-reload
        systemctl enable --quiet $unit
        # The unit counts as started only when the node is ready: this script watches that itself, and can say more.
        systemctl restart --no-block $unit
        return
    fi
    local command=("$bin_dir/twistlockd" run --config "$config")
    if [ "$run_user" != "$(id -un)" ]; then
        local capabilities=()
        if low_port; then
            capabilities=(--inh-caps +net_bind_service --ambient-caps +net_bind_service)
        fi
        command=(setpriv --reuid "$run_user" --regid "$run_user" --init-groups "${capabilities[@]}" "${command[@]}")
    fi
    setsid "${command[@]}" </dev/null >>"$log_file" 2>&1 &
    started=$!
    echo "$started" >"$pid_file"
    say "No systemd here: the node runs as pid $started, its log is $log_file"
    say "To start it at boot is up to this host's service manager: ${command[*]}"
}

low_port() {
    local port
    for port in "${ports[@]}"; do
        [ "$port" -ge 1024 ] || return 0
    done
    return 1
}

# ---- Files -----------------------------------------------------------------------------------------------------------------

# place MODE SOURCE TARGET: the target is the old file or the new one, at every instant.
place() {
    install -m "$1" "$2" "$3.new"
    mv -f "$3.new" "$3"
}

make_user() {
    if [ -n "$prefix" ] || id -u $RUN_USER >/dev/null 2>&1; then
        return
    fi
    local id=(--system)
    if ! getent passwd $RUN_UID >/dev/null && ! getent group $RUN_UID >/dev/null; then
        id+=(--uid "$RUN_UID")
    fi
    say "Making the system user $RUN_USER"
    useradd "${id[@]}" --user-group --home-dir /var/lib/twistlock --no-create-home --shell /usr/sbin/nologin \
        --comment "Twistlock HA" $RUN_USER >>"$log" 2>&1 || die $EX_CANTCREAT "the user $RUN_USER cannot be made (see the log)"
}

# own_contents TEST...: what is in the data folder, but for what a file system has from its beginning, and what was set aside.
own_contents() {
    find -H "$data" -mindepth 1 -maxdepth 1 ! -name lost+found ! -name '*.removed-*' ! -name '*.dropped-*' "$@"
}

# is_nodes: true if the data folder is a node's alone.
is_nodes() {
    [ -e "$data/lock" ] || [ -z "$(own_contents -print -quit)" ]
}

# can_write DIR: whether the node's user can.
can_write() {
    local as=()
    # Where it cannot be tried, the node itself will say it.
    command -v setpriv >/dev/null || return 0
    [ "$run_user" = "$(id -un)" ] || as=(setpriv --reuid "$run_user" --regid "$run_user" --init-groups)
    "${as[@]}" test -w "$1" -a -x "$1"
}

make_folders() {
    local folder
    mkdir -p "$bin_dir" "$etc_dir" "$(dirname "$man_page")" "$(dirname "$completion")"
    for folder in "$data" "$backups"; do
        if ! [ -d "$folder" ]; then
            mkdir -p "$(dirname "$folder")"
            install -d -m 0700 "$folder"
            [ -n "$prefix" ] || chown "$run_user:" "$folder"
        fi
    done
    # A folder that was there may be others' too, and stays as it is; but not what belongs to a node, or is nothing at all.
    if is_nodes; then
        chmod 0700 "$data"
        # Files of a node that has run as another user until now.
        if [ "$(stat -L -c %U "$data")" != "$run_user" ]; then
            chown "$run_user:" "$data"
            own_contents -exec chown -hR "$run_user:" {} +
        fi
    fi
    can_write "$data" || die $EX_NOPERM "the user $run_user cannot write to $data, which has files that are not a node's" \
        "Set DATA_FOLDER to a folder of the node alone, and run this script again."
    can_write "$backups" || warn "the user $run_user cannot write to $backups, which was there before:" \
        "give it the right, or no backup is made"
    if [ "$use_systemd" = false ]; then
        install -d -m 0755 "$(dirname "$pid_file")"
        install -d -m 0750 "$(dirname "$log_file")"
    fi
}

write_drop_in() {
    local text=''
    [ "$as_root" = true ] && text+=$'User=root\nGroup=root\n'
    if low_port; then
        text+=$'CapabilityBoundingSet=CAP_NET_BIND_SERVICE\nAmbientCapabilities=CAP_NET_BIND_SERVICE\n'
    fi
    [ "$data" = /var/lib/twistlock ] || text+="ReadWritePaths=\"$data\""$'\n'
    [ "$backups" = /var/lib/twistlock-backup ] || text+="ReadWritePaths=\"$backups\""$'\n'
    rm -f "$drop_in"
    if [ -n "$text" ]; then
        mkdir -p "$(dirname "$drop_in")"
        printf '# Written by install.sh from %s.\n[Service]\n%s' "$config" "$text" >"$drop_in"
    fi
}

write_rotation() {
    if [ "$use_systemd" = true ] || ! [ -d "$(dirname "$rotation")" ]; then
        return
    fi
    # The node keeps its log open, and nothing it lacks is worth a restart: the file is copied, then emptied.
    printf '%s {\n    weekly\n    rotate 8\n    compress\n    missingok\n    notifempty\n    copytruncate\n}\n' "$log_file" >"$rotation"
}

install_files() {
    local group=root
    make_user
    make_folders
    place 0755 "$program_dir/twistlockd" "$bin_dir/twistlockd"
    place 0755 "$program_dir/twistcli" "$bin_dir/twistcli"
    if [ -f "$config" ] && ! cmp -s "$config" "$scratch/twistlock.cfg"; then
        cp -p "$config" "$config.before-$(date -u +%Y%m%dT%H%M%SZ)"
    fi
    place 0640 "$scratch/twistlock.cfg" "$config"
    if [ -z "$prefix" ]; then
        getent group $RUN_USER >/dev/null && group=$RUN_USER
        chown "root:$group" "$config"
    fi
    "$program_dir/twistcli" man >"$scratch/twistcli.1" && place 0644 "$scratch/twistcli.1" "$man_page"
    "$program_dir/twistcli" completions bash >"$scratch/twistcli.bash" && place 0644 "$scratch/twistcli.bash" "$completion"
    if [ "$use_systemd" = true ]; then
        place 0644 "$unit_source" "$unit_dir/$unit"
        write_drop_in
    fi
    write_rotation
    say "Installed $bin_dir/twistlockd, $bin_dir/twistcli and $config"
}

# is_mounted DIR: a file system of its own begins there, or it is the name of a folder elsewhere: it cannot be renamed.
is_mounted() {
    [ -L "$1" ] || [ "$(stat -c %m -- "$1")" = "$(readlink -f -- "$1")" ]
}

# move_contents DIR: from the data folder to this folder in it. The identity goes first: without it, nothing starts from the rest.
move_contents() {
    local path name
    mkdir -m 0700 "$1" || return
    for path in "$data/identity.json" "$data"/* "$data"/.[!.]*; do
        name=${path##*/}
        case "$name" in
            lost+found | "${data##*/}".removed-* | "${data##*/}".dropped-*) continue ;;
        esac
        if [ -e "$path" ] || [ -L "$path" ]; then
            mv -T "$path" "$1/$name" || return
        fi
    done
}

set_data_aside() {
    local aside
    if [ "$drop" = false ] || ! [ -d "$data" ]; then
        return
    fi
    aside=$data.dropped-$(date -u +%Y%m%dT%H%M%SZ)
    if is_mounted "$data"; then
        # No node looks into a folder that it does not know by name.
        aside=$data/${aside##*/}
        move_contents "$aside" || die $EX_CANTCREAT "what is in $data cannot be moved to $aside"
    else
        mv -T "$data" "$aside" || die $EX_CANTCREAT "$data cannot be renamed to $aside"
    fi
    say "The existing database is out of use. It was set aside, not deleted: $aside"
}

# A package's files would win or lose against ours by the order of a search path: one of the two only.
check_package() {
    if [ -z "$prefix" ] && [ -e /usr/bin/twistlockd ] && command -v dpkg >/dev/null && dpkg -S /usr/bin/twistlockd >/dev/null 2>&1; then
        die $EX_NOPERM "twistlockd is installed as a Debian package on this host: nothing was changed" \
            "Upgrade it: apt install ./twistlock-ha_*.deb    Uninstall it: apt remove twistlock-ha"
    fi
}

# ---- What can be asked for -------------------------------------------------------------------------------------------------

run_uninstall() {
    check_package
    data=$prefix/var/lib/twistlock backups=$prefix/var/lib/twistlock-backup ports=()
    if [ -f "$config" ]; then
        cp "$config" "$scratch/twistlock.cfg"
        read_settings
    fi
    if ! [ -e "$bin_dir/twistlockd" ] && ! unit_is_there && ! [ -f "$config" ]; then
        say "Twistlock HA is not installed here: nothing to do"
        return
    fi
    if [ "$(members)" -gt 1 ]; then
        warn "this host is one of $(members) members, and the others go on counting it:" \
            "on the PRIMARY, run: twistcli ha remove $(hostname)"
    fi
    confirm "Uninstall the node of this host?" || die $EX_NOPERM "not confirmed: nothing was changed"
    leave_role
    stop_node
    if [ -f "$unit_dir/$unit" ] && [ -d /run/systemd/system ] && [ -z "$prefix" ]; then
        systemctl disable --quiet $unit || true
    fi
    rm -f "$unit_dir/$unit" "$drop_in" "$bin_dir/twistlockd" "$bin_dir/twistcli" "$man_page" "$completion" "$rotation"
    rmdir "$unit_dir/$unit.d" "$(dirname "$pid_file")" 2>/dev/null || true
    if [ -z "$prefix" ] && [ -d /run/systemd/system ]; then
        systemctl daemon-reload
    fi
    say "Uninstalled. Left in place: the data in $data, the backups in $backups, the settings in $config"
}

run_install() {
    local had_identity=false
    check_package
    find_program
    make_config
    read_settings
    if [ -e "$data/identity.json" ] && [ "$drop" = false ]; then
        had_identity=true
    fi
    check_membership
    check_host
    accept_terms
    if [ "$drop" = true ] && [ -d "$data" ]; then
        confirm "Drop the database in $data? It is set aside, and this node begins empty." ||
            die $EX_NOPERM "not confirmed: nothing was changed"
    fi
    leave_role
    stop_node
    set_data_aside
    install_files
    if [ "$state" = SECONDARY ] && [ "$had_identity" = false ] && ! [ -e "$data/join.json" ]; then
        say "This host is to be a SECONDARY, and has not joined yet. On the PRIMARY, run: twistcli ha join-script"
        say "and run the line that it prints here. The node is installed, and not started."
        return
    fi
    start_node
    wait_until_ready
    say "Done.${https:+ Console: https://$(hostname):$https on the PRIMARY}"
    local health
    health=$(value HEALTH_PORT 8085)
    [ -z "$health" ] || say "Status page of this host, also without a PRIMARY: http://$(hostname):$health/status"
}

main() {
    # Folders on the way must be open to others; what is private says so itself.
    umask 022
    read_arguments "$@"
    if [ -z "$prefix" ] && [ "$(id -u)" -ne 0 ]; then
        die $EX_NOPERM "this needs root" "Try: sudo $0 $*"
    fi
    if [ -n "$prefix" ] && [[ $prefix != /* ]]; then
        die $EX_USAGE "TWISTLOCK_PREFIX must be an absolute path"
    fi
    open_log "$@"
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    if [ "$uninstall" = true ]; then
        run_uninstall
    else
        run_install
    fi
}

# The last line: a script that was cut off on its way here does nothing.
main "$@"
