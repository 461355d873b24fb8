#!/usr/bin/env bash
# A rolling upgrade from the program of an earlier commit to this one, under load, with three real daemons.
set -euo pipefail

if [ $# -ne 1 ] || [ "$1" = -h ] || [ "$1" = --help ]; then
    cat <<'TEXT'
Usage: scripts/upgrade-from.sh COMMIT

Builds twistlockd as it was at COMMIT, starts three nodes with it, and replaces it by the program of this working tree on one
node after the other, while 16 clients write. Both serve and follow each other on the way. The build is kept in target/earlier.
TEXT
    [ $# -eq 1 ] && exit 0
    exit 64
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."

commit=$(git rev-parse --verify --quiet "$1^{commit}") || {
    echo "scripts/upgrade-from.sh: there is no commit \"$1\"" >&2
    exit 64
}
earlier=$PWD/target/earlier
rm -rf "$earlier/source"
mkdir -p "$earlier/source"
git archive "$commit" | tar -x -C "$earlier/source"
echo "building twistlockd as of $(git log -1 --format='%h (%s)' "$commit")"
(cd "$earlier/source" && cargo build --quiet --locked --bin twistlockd --target-dir "$earlier/target")
OLD_PROGRAM=$earlier/target/debug/twistlockd cargo test --locked --test e2e timed_an_upgrade_from -- --nocapture
