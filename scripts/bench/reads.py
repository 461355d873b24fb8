"""GETs of a Console beside a bare server that sends the same bytes, in turns. reads.sh calls it with both programs.

Must never write while it measures: a COMMIT makes sessions and pages be read again.
"""

import json
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import urllib.request

import systems

TAGS = 100
# What is asked for, and what that shows.
PATHS = {
    "/api/v1/_ping": "no session, no database",
    "/api/v1/version": "a session, no database",
    "/api/v1/tags?limit=1": "a session and a list of one row",
    "/api/v1/tags?limit=50": "a session and a list of 50 rows",
}
CONNECTIONS = [1, 16, 64]
BARE_PORT = 3986
# The server adds them itself.
OWN_HEADERS = {"date", "content-length", "connection"}


def load(url, session, connections, seconds):
    """Requests a second, and half of their latencies in milliseconds."""
    command = ["wrk", "--connections", connections, "--threads", min(connections, 2), "--duration", f"{seconds}s", "--latency",
               "--header", f"Authorization: {session}", url]
    run = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True, timeout=seconds + 60)
    if "Non-2xx" in run.stdout or "Socket errors" in run.stdout:
        raise systems.Failed(f"{url}: {run.stdout}")
    rate = float(re.search(r"Requests/sec: +(\S+)", run.stdout)[1])
    half = re.search(r"50% +([\d.]+)(us|ms|s)", run.stdout)
    return rate, float(half[1]) * {"us": 1e-3, "ms": 1, "s": 1e3}[half[2]]


def answers(cluster, base):
    """What the Console says, as the bare server takes it."""
    found = {}
    for path in PATHS:
        request = urllib.request.Request(base + path, headers={"Authorization": cluster.session})
        with cluster.http.opener.open(request, timeout=10) as answer:
            headers = [pair for pair in answer.getheaders() if pair[0].lower() not in OWN_HEADERS]
            found[path] = [headers, answer.read().decode()]
    return found


def start_bare(place, program, found):
    """The bare server, with the same answers. Returns where it listens."""
    (place.folder / "answers.json").write_text(json.dumps(found))
    address = f"{systems.ADDRESSES[0]}:{BARE_PORT}"
    place.start("bare", ["sh", "-c", 'exec "$0" "$1" <"$2"', program, address, place.folder / "answers.json"])
    systems.wait_until("the bare server listens", lambda: "ready" in place.log("bare").read_text(), systems.READY_LIMIT)
    return f"https://{address}"


def measure(cluster, bases, rounds, seconds):
    print(f"{rounds} rounds of {seconds} s in turns, requests a second in the median, half of them within ms")
    for path, about in PATHS.items():
        for connections in CONNECTIONS:
            samples = {name: [] for name in bases}
            for number in range(rounds):
                names = list(bases)[:: 1 if number % 2 == 0 else -1]
                for name in names:
                    samples[name].append(load(bases[name] + path, cluster.session, connections, seconds))
            rates, halves = ({name: statistics.median(sample[part] for sample in samples[name]) for name in bases}
                             for part in range(2))
            print(f"  {path.removeprefix('/api/v1/'):<14} {connections:3} connections: Console {rates['console']:8,.0f} "
                  f"{halves['console']:7.3f} ms, bare {rates['bare']:8,.0f} {halves['bare']:7.3f} ms, "
                  f"ratio {rates['console'] / rates['bare']:.2f}  ({about})", flush=True)


def main():
    program, bare = sys.argv[1:]
    rounds, seconds = int(os.environ.get("ROUNDS", "5")), int(os.environ.get("SECONDS_EACH", "4"))
    os.chdir(systems.REPOSITORY)
    place = systems.Place(pathlib.Path(tempfile.mkdtemp(prefix="reads-", dir=os.environ.get("BENCH_DIR"))))
    try:
        cluster = systems.Twistlock(place, program)
        cluster.start()
        cluster.ready()
        primary = cluster.primary()
        for number in range(TAGS):
            cluster.write(primary, f"read-{number:06}")
        base = cluster.url(primary)
        bases = {"console": base, "bare": start_bare(place, bare, answers(cluster, base))}
        measure(cluster, bases, rounds, seconds)
    finally:
        place.stop()
        shutil.rmtree(place.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
