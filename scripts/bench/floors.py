"""The floors of all.sh: what no system can undercut that waits for the same disk, by one client that waits for each write."""

import json
import os
import select
import socket
import sqlite3
import sys
import time

import systems

FLOOR_PORT = 3984
# What a floor writes: about one page, as a small transaction does.
RECORD = bytes(4096)


class Floor(systems.System):
    """What all floors have in common: `prepare` returns the function that makes one write."""

    clients = [1]

    def version(self):
        return ""

    def start(self):
        self.step = self.prepare()

    def ready(self):
        self.step()

    def load(self, clients, seconds):
        times, end = [], time.perf_counter() + seconds
        begin = now = time.perf_counter()
        while now < end:
            self.step()
            times.append(time.perf_counter() - now)
            now = time.perf_counter()
        return systems.summary(times, now - begin)


def bare_file(path):
    """Writes a record to a file that has its size already, and waits for the disk."""
    file, blocks = os.open(path, os.O_RDWR | os.O_CREAT, 0o600), 4096
    os.write(file, RECORD * blocks)
    os.fsync(file)
    number = 0

    def step():
        nonlocal number
        number = (number + 1) % blocks
        os.pwrite(file, RECORD, number * len(RECORD))
        os.fdatasync(file)

    return step


class Disk(Floor):
    name = "fdatasync"
    about = "4 KiB into a file that has its size already, then fdatasync."

    def prepare(self):
        return bare_file(self.place.folder / "floor")


class Quorum(Floor):
    name = "quorum"
    about = "Three bare processes: 4 KiB to two others by TCP; fdatasync here and an answer from one of them after its own."

    def prepare(self):
        for address in systems.ADDRESSES[1:]:
            self.place.start(f"follower{address}", [sys.executable, "-B", __file__, "follow", address, self.place.folder / address])
        links = []

        def connect():
            while len(links) < 2:
                link = socket.create_connection((systems.ADDRESSES[1 + len(links)], FLOOR_PORT), 2)
                link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                links.append(link)
            return True

        systems.wait_until("the followers listen", connect, systems.READY_LIMIT)
        write, behind = bare_file(self.place.folder / "quorum"), [0, 0]

        def step():
            for index, link in enumerate(links):
                link.sendall(RECORD)
                behind[index] += 1
            write()
            while min(behind) > 0:
                for link in select.select(links, [], [], 10)[0]:
                    answers = link.recv(512)
                    if not answers:
                        raise systems.Failed("a follower has ended")
                    behind[links.index(link)] -= len(answers)

        return step


def follow(address, path):
    """A follower of the floor: writes what it gets, waits for the disk, answers."""
    step = bare_file(path)
    with socket.create_server((address, FLOOR_PORT)) as server:
        link = server.accept()[0]
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while True:
        left = len(RECORD)
        while left:
            part = link.recv(left)
            if not part:
                return
            left -= len(part)
        step()
        link.sendall(b".")


class Sqlite(Floor):
    """The same tables and rows as a tag of twistlockd."""

    def __init__(self, place, synchronous):
        super().__init__(place)
        self.synchronous = synchronous
        self.name = f"sqlite {synchronous}"
        self.about = f"A tag and its row of the audit log in one transaction of local SQLite (WAL, synchronous={synchronous})."
        self.commits = []

    def version(self):
        return f"SQLite {sqlite3.sqlite_version}"

    def prepare(self):
        database = sqlite3.connect(self.place.folder / f"{self.synchronous}.db", isolation_level=None)
        database.execute("PRAGMA journal_mode=WAL")
        database.execute(f"PRAGMA synchronous={self.synchronous}")
        for schema in ["0001_first.sql", "0002_api.sql"]:
            database.executescript((systems.REPOSITORY / "src/console/migrations" / schema).read_text())
        number = 0

        def step():
            nonlocal number
            number += 1
            name = f"bench-{number:08}"
            values = {"name": name, "color": "#336699", "description": "one of many"}
            difference = json.dumps({key: {"old": None, "new": value} for key, value in values.items()})
            database.execute("BEGIN IMMEDIATE")
            database.execute("INSERT INTO tags VALUES (?, ?, ?)", list(values.values()))
            database.execute("INSERT INTO audits (time, user, source, action, what, ok, difference) VALUES "
                             "(unixepoch(), 'admin', '127.0.0.1', 'create', ?, 1, ?)", [f"tag '{name}'", difference])
            begin = time.perf_counter()
            database.execute("COMMIT")
            self.commits.append(time.perf_counter() - begin)

        return step

    def load(self, clients, seconds):
        self.commits.clear()
        sample = super().load(clients, seconds)
        sample["commit"] = sum(self.commits) / len(self.commits) * 1e3
        return sample


if __name__ == "__main__" and sys.argv[1:2] == ["follow"]:
    follow(*sys.argv[2:])
