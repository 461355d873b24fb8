"""The run of tails.sh: a steady load of writes, and what disturbs it.

Must never let a late answer delay the next write of the plan: each write has a time at which it is due, and its latency counts
from there. Whatever is started is stopped in the end, at Ctrl-C as well.
"""

import argparse
import http.client
import json
import math
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time

import report
import systems

# Nothing happens by itself while writes are measured alone: neither a checkpoint nor, hardly ever, another segment.
CALM = {"CHECKPOINT_MB": 2048, "CHECKPOINT_SECONDS": 3600, "RAFT_LOG_SEGMENT_MB": 64, "SCRUB_SECONDS": 0}
# What the configuration has by default.
USUAL = {"CHECKPOINT_MB": 16, "CHECKPOINT_SECONDS": 60, "RAFT_LOG_SEGMENT_MB": 16, "SCRUB_SECONDS": 86400}
# From the end of a scrub to the next, in seconds.
SOON = 1
# Seconds of load before anything counts, and limits.
WARM_UP, ANSWER_LIMIT, WORK_LIMIT = 2, 10, 300
# A description that fills the database, as long as is allowed, and how many clients write it.
FILLING, FILLERS = "\u20ac" * 1024, 32
# Busy processes for each processor, and for how many seconds.
HOGS_FOR_EACH, BUSY = 16, 10
# Starts a program without the right to real-time priority.
ORDINARY = ["prlimit", "--rtprio=0:0", "--", *(["setpriv", "--bounding-set=-sys_nice", "--"] if os.geteuid() == 0 else [])]
ERRORS = (systems.Failed, OSError, ValueError, LookupError, http.client.HTTPException, subprocess.SubprocessError)


def say(text):
    print(text, file=sys.stderr, flush=True)


class Connection:
    """One kept connection to the Console. Costs little: it shares the processors with what it measures."""

    def __init__(self, target):
        self.address, self.port, self.session, authority = target
        self.context = ssl.create_default_context(cafile=authority)
        self.socket = None

    def connect(self):
        plain = socket.create_connection((self.address, self.port), ANSWER_LIMIT)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = self.context.wrap_socket(plain, server_hostname=self.address)

    def write(self, name, description):
        """True if the tag was acknowledged."""
        body = json.dumps({"name": name, "color": "#336699", "description": description})
        try:
            if self.socket is None:
                self.connect()
            self.socket.sendall(
                f"POST /api/v1/tags HTTP/1.1\r\nHost: {self.address}\r\nAuthorization: {self.session}\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
            return self.answer()
        except OSError:
            self.socket = None
            return False

    def answer(self):
        text = b""
        while b"\r\n\r\n" not in text:
            text += self.part()
        head, _, body = text.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: (\d+)", head)
        left = int(length[1]) - len(body) if length else 0
        while left > 0:
            left -= len(self.part())
        return head[9:10] == b"2"

    def part(self):
        part = self.socket.recv(16384)
        if not part:
            raise ConnectionError("closed")
        return part


def write_on_time(target, plan, number, end, pipe):
    """A process: sends each write when it is due, or as soon as the one before is answered."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(2))
    except OSError:
        pass
    begin, step, clients = plan
    connection, samples, free = Connection(target), [], 0.0
    due = begin + step * number / clients
    while due < end.value:
        time.sleep(max(0.0, due - time.monotonic()))
        awake = time.monotonic()
        good = connection.write(f"tail-{number}-{time.time_ns()}", "one of many")
        done = time.monotonic()
        samples.append((due, done - due, awake - max(due, free), good))
        free, due = done, due + step
    pipe.send(samples)


def write_at_once(target, number, end, pipe):
    """A process: fills the database."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection, written = Connection(target), 0
    while not end.value and connection.write(f"fill-{number}-{time.time_ns()}", FILLING):
        written += 1
    pipe.send(written)


class Processes:
    """Processes that write until they are told to stop, and what they found."""

    def __init__(self, work, arguments, end):
        self.end, self.ends, self.all = end, [], []
        for one in arguments:
            ours, theirs = multiprocessing.Pipe(duplex=False)
            process = multiprocessing.Process(target=work, args=(*one, end, theirs), daemon=True)
            process.start()
            theirs.close()
            self.ends.append(ours)
            self.all.append(process)

    def results(self):
        return [end.recv() for end in self.ends]


class Cluster(systems.Twistlock):
    """A dev cluster whose configuration can be changed."""

    def __init__(self, place, program, folder):
        super().__init__(place, program)
        self.cluster_folder = folder
        self.process = None

    def configure(self, values):
        for index in range(3):
            path = self.cluster_folder / f"node{index + 1}" / "twistlock.cfg"
            text = path.read_text()
            for key, value in values.items():
                text = re.sub(rf"^{key}=.*$", f"{key}={value}", text, flags=re.M)
            path.write_text(text)

    def run(self, urgent=True):
        """Starts it, and waits until each member is in its place."""
        self.place.log(self.name).unlink(missing_ok=True)
        self.process = self.place.start(self.name, [
            *([] if urgent else ORDINARY), self.program, "dev", "--quiet", "--restart-after", 1, "--port-offset",
            systems.PORT_OFFSET, "--dir", self.cluster_folder])
        self.ready()
        self.heal(None)

    def halt(self):
        if self.process and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(60)

    def target(self):
        index = self.primary()
        return systems.ADDRESSES[index], 8083 + systems.PORT_OFFSET, self.session, self.cluster()["ca"]

    def metric(self, index, name):
        text = self.http.ask(f"http://{systems.ADDRESSES[index]}:{systems.HEALTH_PORT}/metrics")
        return float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.M)[1])

    def api(self, path, body=None):
        url = f"{self.url(self.primary())}/api/v1/{path}"
        return json.loads(self.http.ask(url, body, {"Authorization": self.session}, WORK_LIMIT))

    def data(self, index):
        return self.cluster_folder / f"node{index + 1}" / "data"

    def rests(self):
        """True if no member makes a segment of its raft log, as after a start with another size of them."""
        looks = []
        for _ in range(5):
            looks.append(any(self.cluster_folder.glob("node*/data/raft-log/unfinished")))
            time.sleep(0.1)
        return not any(looks)

    def size(self):
        """Bytes of the database file."""
        return (self.data(0) / "database" / "console.db").stat().st_size

    def fill(self, size):
        if self.cluster_folder.exists() and self.size() >= size:
            return
        self.run()
        end = multiprocessing.RawValue("b", 0)
        writers = Processes(write_at_once, [(self.target(), number) for number in range(FILLERS)], end)
        while self.size() < size and any(process.is_alive() for process in writers.all):
            time.sleep(0.2)
        end.value = 1
        say(f"{sum(writers.results()):,} rows fill {self.size() / 2**20:,.0f} MiB")
        self.halt()


# Each of these disturbs once, and says how often something happened.


def wait(cluster):
    """What the nodes do by themselves: a second of it, and how many checkpoints the PRIMARY made."""
    record = cluster.data(cluster.primary()) / "database" / "console.checkpoint"
    seen, count = record.stat().st_mtime_ns, 0
    for _ in range(50):
        time.sleep(0.02)
        now = record.stat().st_mtime_ns
        seen, count = now, count + (now != seen)
    return count


def snapshot(cluster):
    """A SECONDARY loses its database, and gets that of the PRIMARY."""
    primary = cluster.primary()
    index, sent = (primary + 1) % 3, 'twistlock_snapshot_bytes_total{direction="sent"}'
    before = cluster.metric(primary, sent)
    cluster.kill(index)
    # Not deleted before all is over: a disk may be busy for a while with space that becomes free, which is not what is measured.
    database = cluster.data(index) / "database" / "console.db"
    database.rename(cluster.cluster_folder / f"lost-{time.monotonic_ns()}")
    systems.wait_until("the database is sent", lambda: cluster.metric(primary, sent) > before, WORK_LIMIT)
    cluster.heal(index)
    return 1


def backup(cluster):
    """The PRIMARY makes a backup of its own database."""
    begun = cluster.api("backups?wait=false", "tails")
    ended = lambda: (cluster.api("settings/backup").get("last") or {}).get("number") == begun["number"]
    systems.wait_until("the backup is made", ended, WORK_LIMIT)
    return 1


def everything(cluster):
    """A backup and a snapshot, and what the nodes do by themselves."""
    other = threading.Thread(target=backup, args=[cluster], daemon=True)
    other.start()
    snapshot(cluster)
    other.join()
    return 1


def hogs(cluster):
    """Processes that do nothing, as fast as they can."""
    busy = [cluster.place.start("hogs", ["sh", "-c", "while :; do :; done"]) for _ in range(HOGS_FOR_EACH * os.cpu_count())]
    time.sleep(BUSY)
    for one in busy:
        one.kill()
        one.wait()
    return len(busy)


# Name: configuration, what disturbs, and whether the threads that keep the lease have real-time priority.
KINDS = {
    "alone": ({}, wait, True),
    "checkpoint": ({"CHECKPOINT_MB": USUAL["CHECKPOINT_MB"]}, wait, True),
    "rotation": ({"RAFT_LOG_SEGMENT_MB": USUAL["RAFT_LOG_SEGMENT_MB"]}, wait, True),
    "snapshot": ({}, snapshot, True),
    "backup": ({}, backup, True),
    "scrub": ({"SCRUB_SECONDS": SOON}, wait, True),
    "all": (USUAL | {"SCRUB_SECONDS": SOON}, everything, True),
    "hogs": ({}, hogs, True),
    "hogs-ordinary": ({}, hogs, False),
}
USUALLY = [name for name in KINDS if not name.startswith("hogs")]


def so_far(cluster):
    """What was counted by now: segments of the PRIMARY's raft log, changes of its role, and scrubs of all members."""
    index = cluster.primary()
    segments = max(int(path.name.split("-")[1], 16) for path in (cluster.data(index) / "raft-log").glob("segment-*"))
    logs = [cluster.cluster_folder / f"node{number}" / "log" for number in (1, 2, 3)]
    scrubs = sum(path.read_text().count("the scrub of the database file found nothing wrong") for path in logs)
    return {"segments": segments, "role changes": int(cluster.metric(index, "twistlock_epoch")), "scrubs": scrubs}


def measure(cluster, name, clients, rate, seconds):
    """One line of the table."""
    values, disturb, urgent = KINDS[name]
    end = multiprocessing.RawValue("d", math.inf)
    cluster.configure(CALM | values)
    cluster.run(urgent)
    try:
        plan = (time.monotonic() + 0.5, clients / rate, clients)
        load = Processes(write_on_time, [(cluster.target(), plan, number) for number in range(clients)], end)
        time.sleep(WARM_UP + 0.5)
        systems.wait_until("all segments are made", cluster.rests, WORK_LIMIT)
        before, begin, times = so_far(cluster), time.monotonic(), 0
        while time.monotonic() < begin + seconds:
            times += disturb(cluster)
        end.value = time.monotonic()
        samples = [sample for one in load.results() for sample in one if sample[0] >= begin]
        after = so_far(cluster)
        happened = {"checkpoints" if disturb is wait else name: times} | {key: after[key] - before[key] for key in after}
        return figures(samples, end.value - begin) | {"happened": happened}
    finally:
        end.value = 0
        cluster.halt()
        for path in [*cluster.cluster_folder.glob("node*/backup/tails-*"), *cluster.cluster_folder.glob("lost-*")]:
            path.unlink()


def figures(samples, seconds):
    if not samples:
        raise systems.Failed("nothing was written")
    times, late = sorted(sample[1] * 1e3 for sample in samples), sorted(sample[2] * 1e3 for sample in samples)
    at = lambda values, part: values[int((len(values) - 1) * part)]
    return {"writes": len(times), "seconds": round(seconds, 1), "failed": sum(not sample[3] for sample in samples),
            "p50": at(times, 0.5), "p99": at(times, 0.99), "p999": at(times, 0.999), "max": times[-1],
            "late_p999": at(late, 0.999)}


HEADINGS = ["connections", "", "writes", "p50 ms", "p99 ms", "p99.9 ms", "longest ms", "failed", "p99.9 : p99 alone",
            "what happened"]


def rows(found):
    for clients, lines in found["writes"].items():
        alone = lines.get("alone", {}).get("p99")
        for name, line in lines.items():
            ratio = f"{line['p999'] / alone:.1f}" if alone else "-"
            what = [f"{word} {count}" for word, count in line["happened"].items() if count]
            yield [clients, name, f"{line['writes']:,}", *(report.digits(line[key]) for key in ["p50", "p99", "p999", "max"]),
                   str(line["failed"]), ratio, ", ".join(what)]


class Parser(argparse.ArgumentParser):
    def error(self, message):
        say(f"scripts/bench/tails.sh: {message} (--help shows the options)")
        sys.exit(64)


def numbers(text):
    values = [int(part) for part in text.split(",")]
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError("numbers from 1 on with commas are allowed")
    return values


def options():
    parser = Parser(add_help=False)
    parser.add_argument("--only", type=lambda text: text.split(","), default=USUALLY)
    parser.add_argument("--clients", type=numbers, default=[1, 16])
    parser.add_argument("--rates", type=numbers, default=[300, 600])
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--keep", type=pathlib.Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("program", nargs="?")
    chosen = parser.parse_args()
    for name in chosen.only:
        if name not in KINDS:
            parser.error(f"--only: found \"{name}\", allowed: {', '.join(KINDS)}")
    if len(chosen.rates) != len(chosen.clients):
        parser.error("--rates: one for each number of --clients is needed")
    return chosen


def interrupted(number, _):
    raise SystemExit(128 + number)


def run(chosen, cluster):
    """All lines of the table, in the order in which they are measured."""
    found = {"seconds": chosen.seconds, "mib": chosen.mib, "writes": {}, "failed": {}}
    cluster.fill(chosen.mib << 20)
    for clients, rate in zip(chosen.clients, chosen.rates):
        for name in chosen.only:
            try:
                line = measure(cluster, name, clients, rate, chosen.seconds)
            except ERRORS as error:
                found["failed"][f"{clients} {name}"] = str(error) or type(error).__name__
                say(f"{clients} {name} failed: {error}")
                continue
            found["writes"].setdefault(str(clients), {})[name] = line
            say(f"{clients} connections, {name}: p99 {line['p99']:.2f} ms, p99.9 {line['p999']:.2f} ms, longest "
                f"{line['max']:.2f} ms; the clients themselves were late by {line['late_p999']:.2f} ms (p99.9)")
    return found


def main():
    chosen = options()
    for number in [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]:
        signal.signal(number, interrupted)
    os.chdir(systems.REPOSITORY)
    program = chosen.program or "target/release/twistlockd"
    if not chosen.program:
        say("cargo build --release")
        subprocess.run(["cargo", "build", "--release", "--quiet", "--bin", "twistlockd"], check=True)
    place = systems.Place(pathlib.Path(tempfile.mkdtemp(prefix="tails-", dir=os.environ.get("BENCH_DIR"))))
    cluster = Cluster(place, str(pathlib.Path(program).resolve()), (chosen.keep or place.folder / "cluster").absolute())
    try:
        found = run(chosen, cluster)
    finally:
        for number in [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]:
            signal.signal(number, signal.SIG_IGN)
        place.stop()
        shutil.rmtree(place.folder, ignore_errors=True)
    if chosen.json:
        print(json.dumps(found, indent=1))
    else:
        print("\n".join(report.table(HEADINGS, rows(found))))
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
