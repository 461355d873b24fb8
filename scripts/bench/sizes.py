"""What grows with the database: a cluster that is filled step by step, and measured after each. sizes.sh calls it with the program.

Must never measure while something is left over from the step before: all members are in their places, and checkpoints are done.
"""

import os
import pathlib
import re
import shutil
import statistics
import sys
import tempfile
import time

import systems

# Of each row that fills the database: the most that a tag may have.
DESCRIPTION = 1024
FILL_LIMIT, START_LIMIT = 3600, 600
# Seconds before a member that has ended is started again, and after which a checkpoint has been made.
RESTART, REST = 3, 12
FETCHED = re.compile(r"the whole database has been fetched.*")


class Growing(systems.Twistlock):
    """A dev cluster whose members are started again by it, and that may have another number of them."""

    def __init__(self, place, program, members):
        super().__init__(place, program)
        self.members = members
        systems.ADDRESSES += [f"127.0.0.{number}" for number in range(len(systems.ADDRESSES) + 1, members + 1)]

    def start(self):
        members = [] if self.members == 3 else ["--members", self.members]
        self.process = self.place.start(self.name, [
            self.program, "dev", "--quiet", "--restart-after", RESTART, "--port-offset", systems.PORT_OFFSET,
            "--dir", self.cluster_folder, *members])

    def database(self, index):
        return pathlib.Path(self.cluster()["nodes"][index]["data"]) / "database"

    def size(self):
        return (self.database(self.primary()) / "console.db").stat().st_size

    def fill(self, size):
        """Writes until the database file has this size, and waits for the checkpoint behind it."""
        end = time.monotonic() + FILL_LIMIT
        while self.size() < size:
            if time.monotonic() > end:
                raise systems.Failed(f"the database does not grow to {size} bytes")
            self.login()
            environment = {"OURS": "1", "AUTHORIZATION": self.session, "DESCRIPTION": str(DESCRIPTION)}
            # Not far beyond it.
            clients = 64 if self.size() + (64 << 20) < size else 1
            systems.wrk(self.url(self.primary()), clients, 1, environment)
        time.sleep(REST)
        self.settle()

    def settle(self):
        self.heal(None)
        self.login()

    def started(self, index, before):
        """Seconds from the start of the process of a member, another one than `before`, to its place in the cluster."""
        def pid():
            return self.cluster()["nodes"][index]["pid"]

        systems.wait_until("the member is started again", lambda: pid() not in (before, None), START_LIMIT)
        stat = pathlib.Path(f"/proc/{pid()}/stat").read_text().rpartition(")")[2].split()
        began = int(stat[19]) / os.sysconf("SC_CLK_TCK")
        end = time.monotonic() + START_LIMIT
        while self.role(index) is None:
            if time.monotonic() > end:
                raise systems.Failed("the member does not come back")
            time.sleep(0.01)
        return time.clock_gettime(time.CLOCK_BOOTTIME) - began

    def takeover_and_start(self):
        """Milliseconds of a takeover, and of the start of the member that was killed."""
        pids = [node["pid"] for node in self.cluster()["nodes"]]
        victim, span = self.takeover()
        start = self.started(victim, pids[victim])
        self.settle()
        return span, start * 1e3

    def switchover(self):
        """Milliseconds from the order to the end of a write at another member, and until the one before is SECONDARY."""
        old = self.primary()
        others = [index for index in range(self.members) if index != old]
        begin = time.monotonic()
        self.http.ask(f"{self.url(old)}/api/v1/high-availability/switchover", {}, {"Authorization": self.session}, 10)
        number, done = 0, None
        while done is None:
            for index in others:
                number += 1
                try:
                    self.write(index, f"switch-{time.time_ns()}-{number}")
                    done = time.monotonic()
                    break
                except OSError:
                    pass
            if time.monotonic() > begin + systems.TAKEOVER_LIMIT:
                raise systems.Failed("nobody has taken over")
        systems.wait_until("the former primary follows", lambda: self.role(old) == "secondary", START_LIMIT)
        followed = time.monotonic()
        self.settle()
        return (done - begin) * 1e3, (followed - begin) * 1e3

    def snapshot(self):
        """Milliseconds in which a member that has lost its database fetches it, by its own log; none if it needed no other."""
        index = (self.primary() + 1) % self.members
        before = self.cluster()["nodes"][index]["pid"]
        log = self.cluster_folder / f"node{index + 1}" / "log"
        self.kill(index)
        for file in self.database(index).iterdir():
            file.unlink()
        back = self.started(index, before) * 1e3
        self.settle()
        found = FETCHED.findall(log.read_text(errors="replace"))
        ms = re.search(r"\bms=\"?(\d+)", found[-1]) if found else None
        return (float(ms[1]) if ms else None), back

    def start_all(self):
        """Milliseconds from the start of the dev cluster to its first write."""
        self.process.terminate()
        self.process.wait(60)
        self.place.log(self.name).unlink()
        begin = time.monotonic()
        self.start()
        self.ready()
        self.write(self.primary(), f"start-{time.time_ns()}")
        span = (time.monotonic() - begin) * 1e3
        self.settle()
        return span


def measure(cluster, size, times):
    cluster.fill(size << 20)
    commits = cluster.load(1, 5)
    time.sleep(REST)
    takeovers, starts = zip(*[cluster.takeover_and_start() for _ in range(times)])
    switches, follows = zip(*[cluster.switchover() for _ in range(times)])
    fetched, back = cluster.snapshot()
    whole = cluster.start_all()
    median = statistics.median
    snapshot = f"{fetched:8,.0f}" if fetched is not None else "       -"
    print(f"{cluster.size() >> 20:6} {commits['commit']:9.3f} {commits['p50']:8.2f} {commits['p99']:8.2f} {median(takeovers):9,.0f} "
          f"{median(starts):8,.0f} {median(switches):11,.0f} {median(follows):8,.0f} {snapshot} {back:8,.0f} {whole:8,.0f}",
          flush=True)


def main():
    sizes = [int(part) for part in os.environ.get("SIZES_MIB", "10,1024,5120").split(",")]
    members, times = int(os.environ.get("MEMBERS", "3")), int(os.environ.get("TIMES", "3"))
    os.chdir(systems.REPOSITORY)
    place = systems.Place(pathlib.Path(tempfile.mkdtemp(prefix="sizes-", dir=os.environ.get("BENCH_DIR"))))
    try:
        cluster = Growing(place, sys.argv[1], members)
        cluster.start()
        cluster.ready()
        print(f"{members} members, medians of {times}, milliseconds; 'follows' is when the former primary is a SECONDARY, 'back' when "
              "a member is that has lost its database")
        print("   MiB    COMMIT request      p99  takeover    start  switchover  follows snapshot     back start all")
        for size in sizes:
            measure(cluster, size, times)
    finally:
        place.stop()
        shutil.rmtree(place.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
