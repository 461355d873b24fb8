#!/usr/bin/env bash
# Installs a cluster of three on three hosts of its own making: each has its own network, host name, processes, /etc, /usr and
# /var, so that the real paths and the real user are used. Leaves nothing behind, and touches nothing of this host.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: tests/install/run.sh [--systemd] [--keep] [--verbose]

Runs scripts/install.sh and the join script on three hosts in namespaces: install, join, APPLY, remove, join again, refusals,
uninstall. Needs root, ip, unshare, nsenter, curl and overlayfs; says so and exits with 77 where they are missing.

  --systemd   systemd runs on the hosts (needs cgroup 2), so that the unit is used; without it the hosts have no service manager
  --keep      leave the files of the hosts for a look
  --verbose   show what the installed programs print

  TWISTLOCK_DEB      a Debian package to install, upgrade, remove and purge on h3 at the end (with --systemd)
  TWISTLOCK_BIN_DIR  folder of twistlockd, twistcli and defender [default: target/debug]
TEXT
}

# shellcheck source=tests/install/hosts.sh
. "$(dirname "${BASH_SOURCE[0]}")/hosts.sh"
options "$@"
# The switch that joins the hosts, and where the test itself stands.
readonly NETWORK=10.231.77
need setpriv

install_on() {
    local host=$1
    shift
    on "$host" "$root/scripts/install.sh" --program "$bin" --config "$root/twistlock.cfg.example" \
        --set HIGH_AVAILABILITY_ENABLED=true "$@"
}

# ---- The test --------------------------------------------------------------------------------------------------------------

refusals() {
    step "install.sh refuses what cannot be, with an exit code for each"
    expect 64 on h1 "$root/scripts/install.sh" -s --program "$bin"
    says "the component is missing"
    expect 64 on h1 "$root/scripts/install.sh" -sq --program "$bin" console
    says "'-q'"
    expect 66 on h1 "$root/scripts/install.sh" -s console
    says "twistlockd is not in"
    expect 66 on h1 "$root/scripts/install.sh" -s --program /nowhere console
    expect 66 on h1 "$root/scripts/install.sh" -s --program "$bin" --config /nowhere/twistlock.cfg console
    expect 78 install_on h1 -s --set MANAGEMENT_PORT_HTTPS=70000 console
    says "MANAGEMENT_PORT_HTTPS"
    expect 77 install_on h1 console
    says "the terms were not accepted"
    expect 77 on h1 setpriv --reuid 65534 --clear-groups "$root/scripts/install.sh" -s --program "$bin" console
    says "this needs root"
    on h1 test ! -e /usr/local/bin/twistlockd || fail "a refused installation left files"
}

port_in_use() {
    if ! command -v perl >/dev/null; then
        echo "  (no perl: a port in use is not tried)"
        return
    fi
    step "a port in use blocks"
    # shellcheck disable=SC2016 # perl's variables
    on h1 perl -MIO::Socket::INET -e 'my $s = IO::Socket::INET->new(LocalPort => 8083, Listen => 1) or die;
        open(my $f, ">", "listener.pid"); print $f $$; close $f; sleep 60' 2>/dev/null &
    wait_for "a listener on port 8083" on h1 grep -q ':1F93 .* 0A ' /proc/net/tcp
    expect 75 install_on h1 -s console
    says "port 8083 is in use"
    on h1 kill "$(cat "$work/h1/cwd/listener.pid")"
}

first_node() {
    step "h1 is installed as the first node"
    expect 0 install_on h1 -s console
    says "PRIMARY"
    on h1 id twistlock >/dev/null || fail "there is no user twistlock"
    [ "$(on h1 stat -c '%U %a' /var/lib/twistlock)" = "twistlock 700" ] || fail "wrong owner or mode of the data folder"
    [ "$(on h1 stat -c '%U:%G %a' /etc/twistlock/twistlock.cfg)" = "root:twistlock 640" ] || fail "wrong owner or mode of twistlock.cfg"
    [ -z "$(on h1 find /var/lib/twistlock -name '*key*' -type f -perm /077)" ] || fail "others can read a key"
    [ "$(on h1 ps -o user= -C twistlockd | sort -u)" = twistlock ] || fail "twistlockd runs as another user"

    step "installing it again changes nothing, and -j keeps its settings"
    expect 0 install_on h1 -s --set CHECKPOINT_SECONDS=30 console
    expect 0 on h1 "$root/scripts/install.sh" -sj --program "$bin" --config "$root/twistlock.cfg.example" console
    on h1 grep -qx CHECKPOINT_SECONDS=30 /etc/twistlock/twistlock.cfg || fail "-j lost a setting"
    expect 1 on h1 twistcli ha status
}

# What is installed is what is told: the settings decide, in whatever way they are written.
written_by_hand() {
    step "a mark at the beginning, blanks, quotes and comments in twistlock.cfg mean the same to all"
    expect 0 install_on h1 -sj --set DATA_FOLDER=/srv/by-hand console
    # shellcheck disable=SC2016 # the inner shell's
    on h1 bash -c 'printf "\xef\xbb\xbf  DATA_FOLDER=\"/srv\"/by-hand   # big disk\r\nHIGH_AVAILABILITY_ENABLED=true # on\n" >"$0"' \
        /etc/twistlock/twistlock.cfg
    expect 0 on h1 "$root/scripts/install.sh" -sj --program "$bin" --config "$root/twistlock.cfg.example" console
    on h1 test ! -e "/srv/by-hand   # big disk" || fail "a folder with the name of a comment"
    on h1 test -e /srv/by-hand/lock || fail "the data folder is another one"
    expect 0 install_on h1 -sj --set DATA_FOLDER=/var/lib/twistlock console
}

# Another folder, a privileged port, and back: what systemd may let the node do follows the settings.
other_settings() {
    step "another data folder and ports below 1024 work; -f sets the database aside"
    expect 0 install_on h1 -sj --set DATA_FOLDER=/srv/twistlock --set MANAGEMENT_PORT_HTTPS=443 console
    [ "$(on h1 stat -c '%U %a' /srv/twistlock)" = "twistlock 700" ] || fail "wrong owner or mode of the other data folder"
    wait_for "port 443" on h1 grep -q ':01BB .* 0A ' /proc/net/tcp6
    [ "$(on h1 ps -o user= -C twistlockd | sort -u)" = twistlock ] || fail "twistlockd runs as another user"
    local id
    id=$(on h1 grep -o '"cluster": *"[^"]*"' /srv/twistlock/identity.json)
    expect 0 install_on h1 -sjf console
    says "set aside, not deleted: /srv/twistlock.dropped-"
    # shellcheck disable=SC2016 # the inner shell's
    on h1 bash -c 'grep -qF "$1" /srv/twistlock.dropped-*/identity.json' bash "$id" || fail "the dropped data are not there"
    step "a mount point is emptied and not renamed; a folder of others stays as it is"
    on h1 mkdir -m 0775 /srv/mounted /srv/shared
    on h1 mount -t tmpfs mounted /srv/mounted
    on h1 touch /srv/shared/of-others
    expect 0 install_on h1 -sj --set DATA_FOLDER=/srv/mounted --set DATA_RECOVERY_VOLUME=/srv/shared console
    says "cannot write to /srv/shared"
    [ "$(on h1 stat -c '%U %a' /srv/shared /srv/shared/of-others | sort -u)" = $'root 644\nroot 775' ] || fail "a folder of others was taken over"
    [ "$(on h1 stat -c '%U %a' /srv/mounted)" = "twistlock 700" ] || fail "wrong owner or mode of the mounted data folder"
    expect 0 install_on h1 -sjf console
    says "set aside, not deleted: /srv/mounted/mounted.dropped-"
    expect 0 install_on h1 -s console
    [ "$(on h1 stat -c '%U %a' /var/lib/twistlock)" = "twistlock 700" ] || fail "the first data folder is gone"
    if [ "$kind" = systemd ]; then
        on h1 test ! -e /etc/systemd/system/twistlockd.service.d/10-install.conf || fail "a drop-in without a reason"
    fi
}

# api METHOD PATH [BODY]: asks the Console of h1 as an administrator does, with its real certificate.
api() {
    local body=()
    [ $# -lt 3 ] || body=(-H 'content-type: application/json' -d "$3")
    nsenter --target "${pids[switch]}" --net curl -fsS --max-time 10 --cacert "$work/ca.pem" -u "admin:$password" \
        -X "$1" "${body[@]}" "https://$NETWORK.$primary:8083/api/v1$2"
}

# tag NAME: an acknowledged write.
tag() {
    expect 0 api POST /tags "{\"name\":\"$1\",\"color\":\"#2e7d32\",\"description\":\"\"}"
}

on_all() {
    local name=$1 host
    shift
    for host in "$@"; do
        # A secondary runs no SQLite: pages are copied into its database file, where the text can be seen.
        wait_for "\"$name\" on $host" on "$host" grep -rqa "$name" /var/lib/twistlock/database
    done
}

join() {
    local host=$1 line
    expect 0 on "h$primary" twistcli ha join-script
    line=$(grep -m 1 '^ *curl ' <<<"$output") || fail "join-script printed no line"
    # We are root there, and sudo may be missing.
    expect 0 on "$host" bash -c "${line/sudo bash/bash}"
    says "REQUEST_JOIN"
}

healthy() {
    on "h$primary" twistcli ha status
}

apply() {
    local start
    start=$(now_ms)
    expect 0 on "h$primary" twistcli ha apply --yes --wait 30s
    wait_for "three members, all up" healthy
    echo "            from APPLY to SECONDARY: $(($(now_ms) - start)) ms"
}

cluster() {
    step "an administrator signs up and writes"
    on h1 cat /var/lib/twistlock/certificates/ca.pem >"$work/ca.pem"
    expect 0 api POST /signup "{\"username\":\"admin\",\"password\":\"$password\"}"
    tag before-the-others

    step "h2 and h3 run the line of the join script"
    join h2
    expect 75 on h1 twistcli ha apply --yes --no-wait
    join h3

    step "APPLY admits both"
    apply
    tag written-to-three
    on_all before-the-others h2 h3
    on_all written-to-three h2 h3

    step "a new PRIMARY over a member's data is refused, -f or not"
    expect 77 install_on h1 -s console
    says "recover --force-new-cluster"
    expect 77 install_on h1 -sf console
    expect 77 install_on h1 -s --set DATA_FOLDER=/srv/new console
    says "/var/lib/twistlock (named by the default) belongs to a cluster of 3 members"
    expect 0 healthy

    step "a dead join line says why"
    local line
    expect 0 on h1 twistcli ha join-script
    line=$(grep -m 1 '^ *curl ' <<<"$output")
    expect 0 on h1 twistcli ha revoke
    expect 77 on h2 bash -c "${line/sudo bash/bash}"
    says "the join token is not good (any more)"
}

replace() {
    step "h3 is removed, and joins again"
    expect 0 on h1 twistcli ha remove h3 --yes
    join h3
    apply
    tag after-the-return
    on_all after-the-return h2 h3
    [ -n "$(on h3 find /var/lib -maxdepth 1 -name 'twistlock.removed-*')" ] || fail "the data of the removed node was not set aside"
}

# The number of the host that is PRIMARY; the ids of members are another matter: h3 has got a new one.
find_primary() {
    for primary in 1 2 3; do
        # There is none on a host where nothing is installed (any more).
        output=$(on "h$primary" twistcli ha status --json) || true
        if grep -q '"role" *: *"PRIMARY"' <<<"$output"; then
            return
        fi
    done
    fail "no host is PRIMARY"
}

upgrade() {
    step "an upgrade of the PRIMARY moves the role first"
    expect 0 on h1 "$root/scripts/install.sh" -sj --program "$bin" --config "$root/twistlock.cfg.example" console
    says "the role moves to another member first"
    wait_for "three members, all up" healthy
    find_primary
    [ "$primary" != 1 ] || fail "h1 is still PRIMARY"
    tag after-the-upgrade
    on_all after-the-upgrade h1
}

# The row of the only Defender has this in it.
defender_is() {
    on "h$primary" twistcli defender list | grep -q "$1"
}

told() {
    on "h$primary" twistcli defender events | grep -q "$1"
}

defender() {
    local line
    step "h3 becomes a Defender, and tells what changes"
    expect 0 on "h$primary" twistcli defender install-script --for 1h
    line=$(grep -m 1 '^curl ' <<<"$output") || fail "install-script printed no line"
    expect 0 on h3 bash -c "${line/sudo bash/bash}"
    wait_for "the Defender is connected" defender_is "h3 .*connected"
    expect 0 api POST /defenders/policy '{"paths":[{"path":"/srv","recursive":true}]}'
    wait_for "the Defender knows what there is" told baseline
    on h3 touch /srv/watched
    wait_for "the event is there" told "created /srv/watched"
    if [ "$kind" = systemd ]; then
        expect 0 on h3 systemctl is-active defender.service
        on h3 systemctl kill --signal=KILL defender.service
    fi
    expect 0 on h3 bash -c "${line/sudo bash/bash}"
    says "is installed"
    on h3 touch /srv/again
    wait_for "the next event is there" told "created /srv/again"
    [ "$(on "h$primary" twistcli defender events | grep -c "created /srv/watched")" = 1 ] || fail "an event is there twice"
    expect 0 on h3 defender uninstall --purge
    on h3 test ! -e /var/lib/twistlock-defender || fail "its folder is still there"
    wait_for "it is away" defender_is "h3 .*away"
}

uninstall() {
    step "uninstalling h3 leaves its data"
    expect 0 on h3 "$root/scripts/install.sh" -su
    says "Left in place: the data in /var/lib/twistlock"
    on h3 test ! -e /usr/local/bin/twistlockd || fail "the program is still there"
    on h3 test -f /var/lib/twistlock/identity.json || fail "the data are gone"
    [ -z "$(on h3 pgrep -x twistlockd)" ] || fail "twistlockd still runs"
    expect 0 on h3 "$root/scripts/install.sh" -su
}

# The package takes over where install.sh left the data, and lets go of them only when told so.
package() {
    local deb=${TWISTLOCK_DEB:-} before
    if [ "$kind" != systemd ] || [ -z "$deb" ]; then
        return
    fi
    step "h3 goes on with the Debian package"
    expect 0 on h3 dpkg -i "$deb"
    expect 0 on h3 systemctl enable --now twistlockd
    # h3 may have been PRIMARY before it was uninstalled.
    find_primary
    wait_for "three members, all up" healthy
    on h3 readlink "/proc/$(on h3 systemctl show -p MainPID --value twistlockd)/exe" | grep -qx /usr/bin/twistlockd ||
        fail "the package's program does not run"
    expect 77 install_on h3 -s console
    says "installed as a Debian package"

    step "its upgrade moves the role first"
    expect 0 on "h$primary" twistcli ha switchover --to h3
    wait_for "three members, all up" healthy
    find_primary
    [ "$primary" = 3 ] || fail "h3 is not PRIMARY after the switchover"
    before=$(on h3 systemctl show -p MainPID --value twistlockd)
    expect 0 on h3 dpkg -i "$deb"
    says "the role moves to another member first"
    find_primary
    wait_for "another process" on h3 bash -c "[ \"\$(systemctl show -p MainPID --value twistlockd)\" != $before ]"
    wait_for "three members, all up" healthy

    step "its removal leaves the data, and so does a purge that was not told otherwise"
    expect 0 on h3 dpkg -r twistlock-ha
    expect 3 on h3 systemctl is-active twistlockd
    expect 0 on h3 dpkg -P twistlock-ha
    says "the data in /var/lib/twistlock stay"
    on h3 test -f /var/lib/twistlock/identity.json || fail "the data are gone"
    expect 0 on h3 dpkg -i "$deb"
    expect 0 on h3 env TWISTLOCK_PURGE_DATA=yes TWISTLOCK_PURGE_BACKUPS=yes dpkg -P twistlock-ha
    on h3 test ! -e /var/lib/twistlock || fail "a confirmed purge left the data"
}

main() {
    began=$(now_ms) primary=1
    password="Test1-$(od -An -N12 -tx1 /dev/urandom | tr -d ' \n')"
    step "three hosts are made"
    make_hosts $NETWORK h1 h2 h3
    refusals
    port_in_use
    first_node
    written_by_hand
    other_settings
    cluster
    replace
    upgrade
    defender
    uninstall
    package
    step "all as it should be"
}

main
