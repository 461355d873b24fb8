#!/usr/bin/env bash
# Installs, upgrades or uninstalls Twistlock HA on this host: finds the program and starts "twistlockd host install", which
# does everything else. Must never read twistlock.cfg or change anything itself.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: install.sh [-s] [-y] [-j] [-f] [-z] [--program DIR] [--config FILE] [--set KEY=VALUE]... [--dry-run] console
       install.sh -u [-s]

A first node:      sudo ./install.sh -s --set HIGH_AVAILABILITY_ENABLED=true console
The other two:     run on them the line that "twistcli ha join-script" prints on the first
An upgrade:        sudo ./install.sh -sj console

twistlockd, twistcli and defender are looked for in --program DIR, else beside this script, else where they are installed.
What each flag does: twistlockd host install --help
TEXT
}

# die CODE SENTENCE...: the codes are those of sysexits.
die() {
    printf 'install.sh: %s\n' "$2" >&2
    [ $# -le 2 ] || printf '  %s\n' "${@:3}" >&2
    exit "$1"
}

main() {
    local here argument named='' before='' uninstall=false folder
    here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    for argument in "$@"; do
        case "$before" in
            --program) named=$argument ;;
            --config | --set) ;;
            *)
                case "$argument" in
                    --program=*) named=${argument#*=} ;;
                    --help | -h) usage && exit ;;
                    -u* | -[!-]*u*) uninstall=true ;;
                esac
                ;;
        esac
        before=$argument
    done
    if [ -n "$named" ]; then
        [ -d "$named" ] || die 66 "--program: there is no folder $named"
        [ -x "$named/twistlockd" ] || die 66 "twistlockd is not in $named"
        exec "$named/twistlockd" host install --beside "$here" "$@"
    fi
    for folder in "$here" "${TWISTLOCK_PREFIX:-}/usr/local/bin" /usr/bin; do
        if [ -x "$folder/twistlockd" ]; then
            exec "$folder/twistlockd" host install --program "$folder" --beside "$here" "$@"
        fi
    done
    if [ "$uninstall" = true ]; then
        echo "Twistlock HA is not installed here: nothing to do"
        exit 0
    fi
    die 66 "twistlockd is not in $here" "Put it beside this script, or name its folder: install.sh --program DIR console"
}

# The last line: a script that was cut off on its way here does nothing.
main "$@"
