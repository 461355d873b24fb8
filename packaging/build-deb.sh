#!/usr/bin/env bash
# Builds the Debian package: target/debian/twistlock-ha_*.deb. Needs cargo-deb (cargo install cargo-deb --locked).
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: packaging/build-deb.sh [cargo-deb options]

  TWISTLOCK_BIN_DIR  folder of a twistlockd, twistcli and defender to pack [default: built for release, to target/release]
TEXT
}

case "${1:-}" in
    -h | --help)
        usage
        exit 0
        ;;
esac

cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${TWISTLOCK_BIN_DIR:-}" ]; then
    cargo build --release --locked --bins
    TWISTLOCK_BIN_DIR=target/release
fi
# Cargo.toml takes everything that is not in the repository from here.
stage=target/package-files
mkdir -p $stage
install -m 0755 "$TWISTLOCK_BIN_DIR/twistlockd" "$TWISTLOCK_BIN_DIR/twistcli" "$TWISTLOCK_BIN_DIR/defender" $stage/
strip --strip-debug $stage/twistlockd $stage/twistcli $stage/defender
"$TWISTLOCK_BIN_DIR/twistcli" man >$stage/twistcli.1
"$TWISTLOCK_BIN_DIR/twistcli" completions bash >$stage/twistcli.bash
"$TWISTLOCK_BIN_DIR/twistcli" completions zsh >$stage/_twistcli
"$TWISTLOCK_BIN_DIR/twistcli" completions fish >$stage/twistcli.fish
cargo deb --no-build --no-strip "$@"
