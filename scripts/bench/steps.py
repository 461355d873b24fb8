"""The run of steps.sh. Must never mix spans of two rounds: a span of the log that was not all under load does not count."""

import collections
import os
import pathlib
import re
import shutil
import signal
import statistics
import sys
import tempfile

import systems

LINE = re.compile(r"step (\S+): count (\d+) p50_us (\S+) p99_us (\S+) max_us (\S+) percent (\S+)")
SPAN = 5  # seconds, UPKEEP of src/telemetry.rs
ON_SECONDARIES = ("loop.receive", "loop.append", "sync.wake", "sync.disk", "sync.report", "own.answer")


def spans(text):
    """The spans of a log: the figures of each step by its name. A step that comes again begins another one."""
    found, names = [], []
    for name, *figures in LINE.findall(text):
        if not found or name in found[-1]:
            found.append({})
        if name not in names:
            names.append(name)
        found[-1][name] = [float(figure) for figure in figures]
    return found, names


class Logs:
    """What the daemons write from now on."""

    def __init__(self, twistlock):
        self.paths = [twistlock.cluster_folder / f"node{number}" / "log" for number in (1, 2, 3)]
        self.begin = [path.stat().st_size for path in self.paths]

    def read(self, index):
        with open(self.paths[index], encoding="utf-8", errors="replace") as file:
            file.seek(self.begin[index])
            return file.read()


def set_level(twistlock, level):
    for number, node in enumerate(twistlock.cluster()["nodes"], 1):
        path = twistlock.cluster_folder / f"node{number}" / "twistlock.cfg"
        path.write_text(re.sub(r"^LOG_LEVEL=.*$", f"LOG_LEVEL={level}", path.read_text(), flags=re.M))
        os.kill(node["pid"], signal.SIGHUP)


def measure(twistlock, clients, seconds):
    """The figures of each step, by where it was taken and its name; and the rates with and without measuring."""
    rates = [twistlock.load(clients, max(2, seconds // 4))["rate"]]
    set_level(twistlock, "trace")
    logs, primary = Logs(twistlock), twistlock.primary()
    sample = twistlock.load(clients, seconds)
    windows = collections.defaultdict(list)
    for index in range(3):
        found, names = spans(logs.read(index))
        # The first and the last one were not under load all the time.
        for span in found[1:-1]:
            for name in names:
                if name in span and (index == primary or name in ON_SECONDARIES):
                    windows["PRIMARY" if index == primary else "SECONDARY", name].append(span[name])
    set_level(twistlock, "info")
    rates.append(twistlock.load(clients, max(2, seconds // 4))["rate"])
    steps = {key: [statistics.median(column) for column in zip(*rows)] for key, rows in windows.items()}
    return steps, sample["rate"], rates


def table(results):
    """Markdown: a row for each step, four columns for each number of clients."""
    print("| step | " + " | ".join(f"{clients} client{'s' * (clients > 1)}: a second | p50 us | p99 us | %"
                                   for clients in results) + " |")
    print("|---|" + "---:|" * 4 * len(results))
    for role in ("PRIMARY", "SECONDARY"):
        for key in keys_in_order(results, role):
            cells = []
            for steps, _, _ in results.values():
                count, p50, p99, _, percent = steps.get(key, [0] * 5)
                cells += [f"{count / SPAN:,.0f}", f"{p50:,.0f}", f"{p99:,.0f}", f"{percent:.0f}"] if count else [""] * 4
            print(f"| {key[1]}{', SECONDARY' * (role == 'SECONDARY')} | " + " | ".join(cells) + " |")


def keys_in_order(results, role):
    """The steps of a role as they come in the log."""
    names = []
    for steps, _, _ in results.values():
        names += [key for key in steps if key[0] == role and key not in names]
    return names


def main():
    seconds = int(os.environ.get("SECONDS_EACH", "32"))
    folder = pathlib.Path(tempfile.mkdtemp(prefix="twistlock-steps-", dir=os.environ.get("BENCH_DIR")))
    place = systems.Place(folder)
    try:
        twistlock = systems.Twistlock(place, pathlib.Path(sys.argv[1]).resolve())
        twistlock.start()
        twistlock.ready()
        results = {}
        for clients in map(int, os.environ.get("CLIENTS", "1,64").split(",")):
            results[clients] = measure(twistlock, clients, seconds)
        table(results)
        for clients, (_, rate, rates) in results.items():
            before, after = rates
            print(f"{clients} clients: {rate:,.0f} writes/s while steps are measured, "
                  f"{before:,.0f} before and {after:,.0f} after")
    finally:
        place.stop()
        shutil.rmtree(folder)


main()
