"""Times SQLite in two folders, in turns: python3 folder.py NATIVE SERVED. `scripts/bench/folder.sh` serves the second one."""

import os
import sqlite3
import sys
import time

COUNT = int(os.environ.get("COUNT", "300"))
ROUNDS = int(os.environ.get("ROUNDS", "5"))
MODES = ["WAL", "DELETE", "TRUNCATE", "PERSIST"]


def connect(folder, mode):
    db = sqlite3.connect(os.path.join(folder, mode + ".db"), isolation_level=None)
    assert db.execute("PRAGMA journal_mode=" + mode).fetchone()[0] == mode.lower()
    db.execute("PRAGMA synchronous=FULL")
    db.execute("CREATE TABLE IF NOT EXISTS t(id INTEGER PRIMARY KEY, data)")
    return db


def timed(work):
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1000


def part(samples, share):
    return sorted(samples)[min(len(samples) - 1, int(len(samples) * share))]


def line(name, native, served):
    p50 = part(native, 0.5), part(served, 0.5)
    p99 = part(native, 0.99), part(served, 0.99)
    print(f"{name:20} {p50[0]:9.4f} {p50[1]:9.4f} {p50[1] / p50[0]:6.2f} x {p99[0]:9.3f} {p99[1]:9.3f}", flush=True)


def commits(mode):
    both = [connect(folder, mode) for folder in sys.argv[1:3]]
    taken = [[], []]
    reads = [[], []]
    for _ in range(ROUNDS):
        for db, times in zip(both, taken):
            for _ in range(COUNT):
                times.append(timed(lambda: db.execute("INSERT INTO t(data) VALUES (zeroblob(200))")))
        for db, times in zip(both, reads):
            for number in range(COUNT):
                times.append(timed(lambda: db.execute("SELECT data FROM t WHERE id = ?", (number + 1,)).fetchone()))
    line(mode + " commit", *taken)
    line(mode + " point read", *reads)
    large = [[], []]
    for _ in range(ROUNDS):
        for db, times in zip(both, large):
            db.execute("CREATE TABLE large(data)")

            def fill():
                db.execute("BEGIN")
                db.executemany("INSERT INTO large VALUES (zeroblob(3900))", [()] * 5000)
                db.execute("COMMIT")

            times.append(timed(fill))
            db.execute("DROP TABLE large")
    line(mode + " 20 MB", *large)
    for db in both:
        assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        db.close()


print(f"SQLite {sqlite3.sqlite_version}, {ROUNDS} rounds of {COUNT}, in ms; synchronous=FULL on both sides")
print(f"{'':20} {'native':>9} {'served':>9} {'ratio':>8} {'p99':>9} {'p99':>9}")
for each in MODES:
    commits(each)
