"""The run of all.sh: what is measured when, and all.json.

Must never let a system have the machine at a time of its own: rounds go through all of them, each time from another one on.
Whatever is started is stopped in the end, and its folder removed, at Ctrl-C as well.
"""

import argparse
import http.client
import json
import os
import pathlib
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import floors
import report
import systems

NAMES = ["twistlockd", "etcd", "postgresql", "redis", "floors", "scripts"]
SCRIPTS = ["commit", "idle", "snapshot", "absent"]
SCRIPT_LIMIT = 1800
ERRORS = (systems.Failed, OSError, ValueError, LookupError, http.client.HTTPException, subprocess.SubprocessError)


def say(text):
    print(text, file=sys.stderr, flush=True)


def numbers(text):
    values = [int(part) for part in text.split(",")]
    if not values or min(values) < 1 or max(values) > 1000:
        raise argparse.ArgumentTypeError("numbers from 1 to 1000 with commas are allowed")
    return values


def count(text):
    if not 0 <= int(text) <= 1000:
        raise argparse.ArgumentTypeError("0 to 1000 is allowed")
    return int(text)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        say(f"scripts/bench/all.sh: {message} (--help shows the options)")
        sys.exit(64)


def options():
    parser = Parser(add_help=False)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", type=lambda text: text.split(","), default=NAMES)
    parser.add_argument("--clients", type=numbers, default=[1, 16, 64])
    parser.add_argument("--rounds", type=count)
    parser.add_argument("--seconds", type=count)
    parser.add_argument("--takeovers", type=count)
    parser.add_argument("--out", default="target/bench")
    parser.add_argument("program", nargs="?")
    chosen = parser.parse_args()
    for name in chosen.only:
        if name not in NAMES:
            parser.error(f"--only: found \"{name}\", allowed: {', '.join(NAMES)}")
    for name, full, quick in [("rounds", 5, 2), ("seconds", 5, 2), ("takeovers", 3, 1)]:
        if getattr(chosen, name) is None:
            setattr(chosen, name, quick if chosen.quick else full)
    if chosen.rounds < 1 or chosen.seconds < 1:
        parser.error("at least one round of one second is needed")
    return chosen


class Run:
    """What was measured so far, and what was not and why."""

    def __init__(self, chosen):
        self.chosen = chosen
        self.skipped, self.failed = {}, {}
        self.writes, self.takeovers, self.scripts = {}, {}, {}
        self.conditions = {}
        self.all = []

    def fail(self, name, error):
        self.failed[name] = str(error) or type(error).__name__
        say(f"{name} failed: {self.failed[name]}")

    def systems(self):
        return [system for system in self.all if system.name not in self.failed]

    def choose(self, place, program):
        """The systems to measure; those that lack something are named."""
        candidates = [systems.Twistlock(place, program), systems.Etcd(place), systems.Postgres(place), systems.Redis(place)]
        candidates = [system for system in candidates if system.name in self.chosen.only]
        if "floors" in self.chosen.only:
            candidates += [floors.Disk(place), floors.Quorum(place), floors.Sqlite(place, "FULL"), floors.Sqlite(place, "NORMAL")]
        for system in candidates:
            missing = system.missing()
            if missing:
                self.skipped[system.name] = "not installed: " + "; ".join(missing)
                say(f"{system.name} is skipped, {self.skipped[system.name]}")
            else:
                self.all.append(system)

    def start(self):
        for step in ["start", "ready"]:
            for system in self.systems():
                try:
                    getattr(system, step)()
                except ERRORS as error:
                    self.fail(system.name, error)

    def measure(self):
        """All rounds. In each, all systems have their turn with each number of clients."""
        for number in range(self.chosen.rounds):
            for clients in self.chosen.clients:
                able = [system for system in self.systems() if clients in (system.clients or [clients])]
                turn = number % max(1, len(able))
                for system in able[turn:] + able[:turn]:
                    self.one(system, clients, number)

    def one(self, system, clients, number):
        used = os.times()
        try:
            sample = system.load(clients, self.chosen.seconds)
        except ERRORS as error:
            self.fail(system.name, error)
            return
        after = os.times()
        sample["generator_cpu"] = (after.children_user + after.children_system - used.children_user - used.children_system) \
            / self.chosen.seconds
        self.writes.setdefault(system.name, {}).setdefault(clients, []).append(sample)
        say(f"round {number + 1} of {self.chosen.rounds}, {clients} clients, {system.name}: {sample['rate']:,.0f}/s, "
            f"p50 {sample['p50']:.2f} ms, p99 {sample['p99']:.2f} ms")

    def harm(self):
        """All takeovers. Those that last half a minute run side by side, and nothing else meanwhile."""
        for number in range(self.chosen.takeovers):
            able = [system for system in self.systems() if hasattr(system, "kill")]
            for system in able:
                if not system.slow:
                    self.takeover(system, number)
            threads = [threading.Thread(target=self.takeover, args=[system, number], daemon=True) for system in able if system.slow]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    def takeover(self, system, number):
        try:
            victim, span = system.takeover()
            if number + 1 < self.chosen.takeovers:
                system.heal(victim)
        except ERRORS as error:
            self.fail(system.name, error)
            return
        self.takeovers.setdefault(system.name, []).append(span)
        say(f"takeover {number + 1} of {self.chosen.takeovers}, {system.name}: {span:,.0f} ms")

    def run_scripts(self, place, program):
        """The other scripts of this folder, one after another, with what they print."""
        environment = {**os.environ, "BENCH_DIR": str(place.folder), "TMPDIR": str(place.folder)}
        for name in SCRIPTS:
            if self.chosen.quick or not shutil.which("cargo"):
                self.skipped[f"{name}.sh"] = "--quick" if self.chosen.quick else "needs cargo"
                continue
            say(f"scripts/bench/{name}.sh runs")
            command = [f"scripts/bench/{name}.sh"] + ([program] if name == "idle" else [])
            try:
                done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SCRIPT_LIMIT,
                                      check=False)
            except ERRORS as error:
                self.fail(f"{name}.sh", error)
                continue
            if done.returncode:
                self.fail(f"{name}.sh", (done.stderr or done.stdout).strip()[-300:])
            else:
                self.scripts[name] = done.stdout.strip()


def spread(values):
    """The median and what it lies between."""
    ordered = sorted(values)
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return {"median": middle, "min": ordered[0], "max": ordered[-1], "all": values}


def result(run):
    """Everything as it goes into all.json."""
    found = {"conditions": run.conditions, "skipped": run.skipped, "failed": run.failed, "scripts": run.scripts, "systems": {}}
    for system in run.all:
        writes = {}
        for clients, samples in run.writes.get(system.name, {}).items():
            keys = [key for key in samples[0] if key != "failed"]
            writes[str(clients)] = {key: spread([sample[key] for sample in samples]) for key in keys}
            writes[str(clients)]["failed"] = sum(sample["failed"] for sample in samples)
        spans = run.takeovers.get(system.name)
        found["systems"][system.name] = {
            "about": system.about, "version": versions(system), "writes": writes, "takeover_ms": spread(spans) if spans else None}
    return found


def versions(system):
    try:
        return system.version()
    except ERRORS:
        return "unknown"


def conditions(chosen, folder):
    """What one must know to judge the figures."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        models = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    disk = subprocess.run(["df", "--output=fstype", folder], capture_output=True, text=True, check=True).stdout.split()[-1]
    return {"date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "rounds": chosen.rounds, "seconds": chosen.seconds,
            "processors": os.cpu_count(), "processor": models[0] if models else platform.machine(), "kernel": platform.release(),
            "disk": disk, "load_before": os.getloadavg()[0]}


def program(chosen):
    if chosen.program:
        return str(pathlib.Path(chosen.program).resolve())
    if not {report.OURS, "scripts"} & set(chosen.only):
        return ""
    say("cargo build --release")
    subprocess.run(["cargo", "build", "--release", "--quiet", "--bin", "twistlockd"], check=True)
    return str(pathlib.Path("target/release/twistlockd").resolve())


def interrupted(number, _):
    raise SystemExit(128 + number)


def main():
    chosen = options()
    for number in [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]:
        signal.signal(number, interrupted)
    os.chdir(systems.REPOSITORY)
    ours = program(chosen)
    run, begin = Run(chosen), time.monotonic()
    place = systems.Place(pathlib.Path(tempfile.mkdtemp(prefix="bench-", dir=os.environ.get("BENCH_DIR"))))
    place.ordinary()
    # PostgreSQL runs as another user.
    place.folder.chmod(0o711)
    try:
        run.conditions = conditions(chosen, place.folder)
        run.choose(place, ours)
        run.start()
        run.measure()
        run.harm()
        place.stop()
        if "scripts" in chosen.only:
            run.run_scripts(place, ours)
    finally:
        for number in [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]:
            signal.signal(number, signal.SIG_IGN)
        place.stop()
        shutil.rmtree(place.folder, ignore_errors=True)
    run.conditions |= {"load_after": os.getloadavg()[0], "took": round(time.monotonic() - begin)}
    found = result(run)
    out = pathlib.Path(chosen.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "all.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "all.html").write_text(report.page(found))
    report.print_report(found)
    print(f"\n{out}/all.json and {out}/all.html have the rest. It took {run.conditions['took']} s.")
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
