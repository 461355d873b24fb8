"""Pools of several sizes beside each other: a commit, a takeover, a switchover. pool.sh calls it with the program.

Must never measure while a member is away: all of them are in their places before each step.
"""

import os
import pathlib
import shutil
import statistics
import sys
import tempfile

import sizes
import systems


def measure(program, members, times, seconds):
    place = systems.Place(pathlib.Path(tempfile.mkdtemp(prefix="pool-", dir=os.environ.get("BENCH_DIR"))))
    try:
        cluster = sizes.Growing(place, program, members)
        cluster.start()
        cluster.ready()
        cluster.settle()
        alone, together = cluster.load(1, seconds), cluster.load(16, seconds)
        cluster.settle()
        takeovers, _ = zip(*[cluster.takeover_and_start() for _ in range(times)])
        switches, _ = zip(*[cluster.switchover() for _ in range(times)])
        return alone, together, takeovers, switches
    finally:
        place.stop()
        shutil.rmtree(place.folder, ignore_errors=True)


def main():
    members = [int(part) for part in os.environ.get("MEMBERS", "3,5,7").split(",")]
    times, seconds = int(os.environ.get("TIMES", "5")), int(os.environ.get("SECONDS_EACH", "5"))
    program = sys.argv[1]
    os.chdir(systems.REPOSITORY)
    print(f"all members on this host, medians of {times}, milliseconds; 'x' is against the first line")
    print("members    COMMIT     x  request      p99  16 clients: a second      p99  takeover     x  switchover     x", flush=True)
    first = None
    for count in members:
        alone, together, takeovers, switches = measure(program, count, times, seconds)
        found = [alone["commit"], statistics.median(takeovers), statistics.median(switches)]
        first = first or found
        commit, takeover, switch = (f"{now:9.2f} {now / then:5.2f}" for now, then in zip(found, first))
        print(f"{count:7} {commit} {alone['p50']:8.2f} {alone['p99']:8.2f} {together['rate']:21,.0f} {together['p99']:8.2f} "
              f"{takeover} {switch:>17}", flush=True)


if __name__ == "__main__":
    main()
