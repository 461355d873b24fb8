"""Each system that all.sh measures: how it is started, written to, harmed and found again.

Owns all processes of a run, and never ends one that it did not start. Knows nothing about rounds, tables and pages.
"""

import base64
import concurrent.futures
import ctypes
import glob
import http.client
import json
import multiprocessing
import os
import pathlib
import pwd
import re
import resource
import select
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
import urllib.request

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent.parent
ADDRESSES = ["127.0.0.1", "127.0.0.2", "127.0.0.3"]
# What `twistlockd dev` adds to its ports, and the ports of the others. None is in the range that the kernel hands out.
PORT_OFFSET = 3800
HEALTH_PORT = 8085 + PORT_OFFSET
ETCD_PORT, STORE_PORT, POSTGRES_PORT, PATRONI_PORT, REDIS_PORT, SENTINEL_PORT = range(3970, 3982, 2)
# Limits in seconds: until a system is ready, until it is whole again after a kill, and for a takeover.
READY_LIMIT, HEAL_LIMIT, TAKEOVER_LIMIT = 90, 120, 120
# Of prctl(2) and capabilities(7).
PR_SET_CHILD_SUBREAPER, PR_CAPBSET_DROP, CAP_SYS_NICE = 36, 24, 23


class Failed(Exception):
    """Something that was there did not do what it should."""


def wait_until(what, condition, limit):
    """Polls until the condition is true. Errors count as not yet."""
    end, last = time.monotonic() + limit, None
    while time.monotonic() < end:
        try:
            if condition():
                return
        except (Failed, OSError, ValueError, LookupError, http.client.HTTPException, subprocess.SubprocessError) as error:
            last = error
        time.sleep(0.1)
    raise Failed(f"not within {limit} s: {what}" + (f" ({last})" if last else ""))


def summary(times, seconds, failed=0):
    """One round: writes a second, and latencies in milliseconds."""
    if not times:
        raise Failed(f"no write succeeded, {failed} failed")
    times.sort()
    at = lambda part: times[int((len(times) - 1) * part)] * 1e3
    return {"rate": len(times) / seconds, "p50": at(0.5), "p99": at(0.99), "failed": failed}


class Place:
    """The folder of a run and all processes in it. What outlives its parent becomes our child, so that we can end it, too."""

    def __init__(self, folder):
        self.folder = folder
        self.running = []
        self.over = False
        self.prctl = ctypes.CDLL(None).prctl
        self.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def ordinary(self):
        """From now on all have ordinary priority. Otherwise twistlockd's real-time threads would go before everybody else's on a
        machine that is busy with other things."""
        self.prctl(PR_CAPBSET_DROP, CAP_SYS_NICE, 0, 0, 0)
        resource.setrlimit(resource.RLIMIT_RTPRIO, (0, 0))

    def start(self, name, command, user=None):
        """A process in a group of its own: Ctrl-C does not reach it, and we stop all in order. It stays in our session: the
        kernel shares the processors out among sessions, and no system may have more of them than another."""
        if self.over:
            raise Failed("the run is over")
        more = {}
        if user:
            more = {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}
        with open(self.log(name), "ab") as log:
            process = subprocess.Popen(
                [str(part) for part in command], stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0,
                cwd=self.folder, env={**os.environ, "HOME": str(self.folder)}, **more)
        self.running.append(process)
        return process

    def log(self, name):
        return self.folder / f"{name}.log"

    def kill(self, pids):
        """SIGKILL, and waits for the end of those that are our children: a zombie would pass for a running process."""
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        for pid in pids:
            try:
                os.waitpid(pid, 0)
            except ChildProcessError:
                pass

    def stop(self):
        """Asks all to stop, and kills what has not after 15 s. Nothing can be started any more."""
        self.over = True
        for process in self.running:
            if process.poll() is None:
                process.terminate()
        end = time.monotonic() + 15
        for process in self.running:
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                pass
        self.running.clear()
        for _ in range(50):
            left = descendants(os.getpid())
            if not left:
                break
            self.kill(left)
            time.sleep(0.1)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass


def descendants(root):
    """Processes below that one, but no zombies."""
    children = {}
    for path in glob.glob("/proc/[0-9]*/stat"):
        try:
            text = pathlib.Path(path).read_text()
        except OSError:
            continue
        # The name in parentheses may hold blanks: the fields after it are the state and the parent.
        state, parent = text.rpartition(")")[2].split()[:2]
        if state != "Z":
            children.setdefault(int(parent), []).append(int(path.split("/")[2]))
    found, left = [], [root]
    while left:
        below = children.get(left.pop(), [])
        found += below
        left += below
    return found


class Http:
    """Requests to one kind of server; never by a proxy."""

    def __init__(self, authority=None):
        context = ssl.create_default_context(cafile=authority) if authority else None
        handlers = [urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)]
        self.opener = urllib.request.build_opener(*handlers)

    def ask(self, url, body=None, headers=None, timeout=2.0):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, {"Content-Type": "application/json", **(headers or {})})
        with self.opener.open(request, timeout=timeout) as answer:
            return answer.read().decode()


def wrk(url, clients, seconds, environment):
    """One round of writes over HTTP."""
    command = ["wrk", "--connections", clients, "--threads", min(clients, 2), "--duration", f"{seconds}s", "--timeout", "10s",
               "--script", pathlib.Path(__file__).with_name("load.lua"), url]
    run = subprocess.run([str(part) for part in command], env={**os.environ, **environment}, capture_output=True, text=True,
                         timeout=seconds + 60, check=False)
    found = re.search(r"^RESULT (\S+) (\S+) (\S+) (\S+) (\S+)$", run.stdout, re.M)
    if not found:
        raise Failed(f"wrk: {(run.stderr or run.stdout).strip()[-200:]}")
    requests, span, p50, p99, failed = map(float, found.groups())
    if requests <= failed:
        raise Failed(f"no write succeeded, {failed:.0f} failed")
    return {"rate": (requests - failed) / (span / 1e6), "p50": p50, "p99": p99, "failed": int(failed)}


class System:
    """What all have in common. Members count from 0."""

    name = about = ""
    needs = []  # program, how it is installed
    clients = None  # the only numbers of clients, if not any
    pause = 0.005  # seconds between two tries of a client during a takeover
    members = 3
    slow = False  # a takeover lasts so long that others may be measured beside it

    def __init__(self, place):
        self.place = place

    def missing(self):
        """What is not installed, and how to install it."""
        return [f"{program}: {how}" for program, how in self.needs if not shutil.which(program)]

    def takeover(self):
        """Who was killed, and the milliseconds from kill -9 of the primary to the end of a write that began later and that
        another member has acknowledged. One client for each of the others tries again and again."""
        victim = self.primary()
        begin, ended, done = time.monotonic(), [], threading.Event()
        self.kill(victim)

        def client(index):
            for number in range(1_000_000):
                if done.is_set() or time.monotonic() > begin + TAKEOVER_LIMIT:
                    return
                try:
                    if self.write(index, f"takeover-{time.time_ns()}-{index}-{number}"):
                        ended.append(time.monotonic())
                        done.set()
                except (OSError, ValueError, http.client.HTTPException, subprocess.SubprocessError):
                    pass
                done.wait(self.pause)

        threads = [threading.Thread(target=client, args=[index], daemon=True) for index in range(self.members) if index != victim]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if not ended:
            raise Failed(f"nobody took over within {TAKEOVER_LIMIT} s")
        return victim, (min(ended) - begin) * 1e3


class Twistlock(System):
    """A dev cluster. It starts what was killed again by itself."""

    name = "twistlockd"
    about = ("POST of a tag with its row of the audit log, over HTTPS with a session; a majority of three has it on disk. "
             "Load by wrk.")
    needs = [("wrk", "apt-get install wrk")]
    pause = 0.002

    def __init__(self, place, program):
        super().__init__(place)
        self.program = program
        self.cluster_folder = place.folder / "cluster"

    def version(self):
        return subprocess.run([self.program, "--version"], capture_output=True, text=True, check=True).stdout.split("\n")[0]

    def start(self):
        self.place.start(self.name, [self.program, "dev", "--quiet", "--restart-after", 1, "--port-offset", PORT_OFFSET,
                                     "--dir", self.cluster_folder])

    def ready(self):
        wait_until("twistlockd is ready", lambda: "Ctrl-C stops" in self.place.log(self.name).read_text(), READY_LIMIT)
        self.http = Http(self.cluster()["ca"])
        self.login()

    def cluster(self):
        return json.loads((self.cluster_folder / "cluster.json").read_text())

    def role(self, index):
        """The part of a member, by its health port."""
        for role in ["primary", "secondary"]:
            try:
                self.http.ask(f"http://{ADDRESSES[index]}:{HEALTH_PORT}/{role}")
                return role
            except OSError:
                pass
        return None

    def primary(self):
        return [self.role(index) for index in range(self.members)].index("primary")

    def url(self, index):
        return self.cluster()["nodes"][index]["console_url"]

    def login(self):
        cluster = self.cluster()
        who = {"username": cluster["user"], "password": cluster["password"]}
        answer = self.http.ask(f"{self.url(self.primary())}/api/v1/authenticate", who, timeout=10)
        self.session = f"Bearer {json.loads(answer)['token']}"

    def commits(self, index):
        """Seconds of all COMMITs so far, and their number."""
        text = self.http.ask(f"http://{ADDRESSES[index]}:{HEALTH_PORT}/metrics")
        return [float(re.search(rf"^twistlock_console_commit_seconds_{part} (\S+)$", text, re.M)[1]) for part in ["sum", "count"]]

    def load(self, clients, seconds):
        self.login()
        index = self.primary()
        before = self.commits(index)
        sample = wrk(self.url(index), clients, seconds, {"OURS": "1", "AUTHORIZATION": self.session})
        after = self.commits(index)
        # The COMMIT alone, without HTTPS; beside that of SQLite.
        sample["commit"] = (after[0] - before[0]) / max(1, after[1] - before[1]) * 1e3
        return sample

    def kill(self, index):
        self.place.kill([self.cluster()["nodes"][index]["pid"]])

    def write(self, index, name):
        tag = {"name": name, "color": "#336699", "description": "one of many"}
        self.http.ask(f"https://{ADDRESSES[index]}:{8083 + PORT_OFFSET}/api/v1/tags", tag, {"Authorization": self.session}, 1)
        return True

    def heal(self, index):
        wait_until("all members of twistlockd are in their places", lambda: all(map(self.role, range(self.members))), HEAL_LIMIT)


class Etcd(System):
    """Members of etcd with nothing but defaults."""

    name = "etcd"
    about = "/v3/kv/put over plain HTTP at the leader; a majority of three has it on disk. Load by wrk."
    needs = [("wrk", "apt-get install wrk"), ("etcd", "apt-get install etcd-server")]

    def __init__(self, place, name="etcd", port=ETCD_PORT, members=3):
        super().__init__(place)
        self.name, self.port, self.members = name, port, members
        self.processes = {}

    def version(self):
        return subprocess.run(["etcd", "--version"], capture_output=True, text=True, check=True).stdout.split("\n")[0]

    def url(self, index, more=0):
        return f"http://{ADDRESSES[index]}:{self.port + more}"

    def start(self):
        for index in range(self.members):
            self.start_member(index)

    def start_member(self, index):
        name = f"{self.name}{index}"
        members = ",".join(f"{self.name}{other}={self.url(other, 1)}" for other in range(self.members))
        self.processes[index] = self.place.start(name, [
            "etcd", "--name", name, "--data-dir", self.place.folder / name, "--log-level", "error",
            "--listen-peer-urls", self.url(index, 1), "--initial-advertise-peer-urls", self.url(index, 1),
            "--listen-client-urls", self.url(index), "--advertise-client-urls", self.url(index), "--initial-cluster", members])

    def ready(self):
        self.http = Http()
        wait_until(f"{self.name} is ready", lambda: all(self.write(index, "a") for index in range(self.members)), READY_LIMIT)

    def primary(self):
        """The leader: it answers without asking another member."""
        for index in range(self.members):
            try:
                status = json.loads(self.http.ask(f"{self.url(index)}/v3/maintenance/status", {}))
            except OSError:
                continue
            if status["leader"] == status["header"]["member_id"]:
                return index
        raise Failed("etcd has no leader")

    def load(self, clients, seconds):
        return wrk(self.url(self.primary()), clients, seconds, {"OURS": "0"})

    def kill(self, index):
        self.place.kill([self.processes[index].pid])

    def write(self, index, name):
        put = {"key": base64.b64encode(name.encode()).decode(), "value": "Yg=="}
        self.http.ask(f"{self.url(index)}/v3/kv/put", put, timeout=1)
        return True

    def heal(self, index):
        self.start_member(index)
        self.ready()


class Postgres(System):
    """Members of PostgreSQL under Patroni, which has an etcd of one member to itself as its store."""

    name = "postgresql"
    about = ("INSERT of one row, prepared, over plain TCP; one of two synchronous standbys has it on disk (Patroni, "
             "synchronous_mode: quorum). Load by pgbench.")
    pause = 0.05
    slow = True

    def __init__(self, place):
        super().__init__(place)
        homes = sorted(glob.glob("/usr/lib/postgresql/*/bin/postgres"), key=lambda path: float(path.split("/")[4]))
        self.bin = pathlib.Path(homes[-1] if homes else shutil.which("postgres") or "/nonexistent").parent
        self.patroni = os.environ.get("PATRONI") or shutil.which("patroni") or str(REPOSITORY / "target/patroni/bin/patroni")
        self.needs = [
            (str(self.bin / "postgres"), "apt-get install postgresql"), ("etcd", "apt-get install etcd-server"),
            (self.patroni, "/usr/bin/python3 -m venv target/patroni && target/patroni/bin/pip install "
                           "'patroni[psycopg2-binary,etcd3]'")]
        # It refuses to run as root.
        self.user = "postgres" if os.geteuid() == 0 else None
        self.home = place.folder / "postgresql"
        self.store = Etcd(place, "store", STORE_PORT, 1)
        self.processes = {}

    def version(self):
        programs = [self.bin / "postgres", self.patroni]
        return ", ".join(subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.strip()
                         for program in programs)

    def start(self):
        self.home.mkdir()
        (self.home / "insert.sql").write_text(
            "INSERT INTO tags (name, color, description) VALUES (gen_random_uuid(), '#336699', 'one of many');\n")
        if self.user:
            shutil.chown(self.home, self.user)
        self.store.start()
        self.store.ready()
        for index in range(3):
            self.start_member(index)

    def start_member(self, index):
        address, name = ADDRESSES[index], f"postgresql{index}"
        roles = {"superuser": "postgres", "replication": "replicator", "rewind": "rewinder"}
        trust = ["host all all 127.0.0.0/8 trust", "host replication all 127.0.0.0/8 trust"]
        # JSON is YAML, too.
        (self.home / f"{name}.yml").write_text(json.dumps({
            "scope": "bench", "name": name,
            "restapi": {"listen": f"{address}:{PATRONI_PORT}", "connect_address": f"{address}:{PATRONI_PORT}"},
            "etcd3": {"hosts": [f"{ADDRESSES[0]}:{STORE_PORT}"]},
            "bootstrap": {"dcs": {"synchronous_mode": "quorum", "postgresql": {"use_pg_rewind": True}},
                          "initdb": [{"encoding": "UTF8"}, {"locale": "C"}, "data-checksums"]},
            "postgresql": {
                "listen": f"{address}:{POSTGRES_PORT}", "connect_address": f"{address}:{POSTGRES_PORT}",
                "data_dir": str(self.home / name), "bin_dir": str(self.bin), "pgpass": str(self.home / f"{name}.pass"),
                "authentication": {role: {"username": user, "password": "bench"} for role, user in roles.items()},
                "parameters": {"unix_socket_directories": ""}, "pg_hba": trust,
                "remove_data_directory_on_rewind_failure": True, "remove_data_directory_on_diverged_timelines": True}}))
        self.processes[index] = self.place.start(name, [self.patroni, self.home / f"{name}.yml"], self.user)

    def sql(self, index, text, timeout=5):
        command = [self.bin / "psql", "--no-psqlrc", "-qAt", "-h", ADDRESSES[index], "-p", str(POSTGRES_PORT), "-U", "postgres",
                   "-c", text, "postgres"]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=True).stdout

    def primary(self):
        for index in range(3):
            try:
                if self.sql(index, "SELECT pg_is_in_recovery()").strip() == "f":
                    return index
            except subprocess.SubprocessError:
                pass
        raise Failed("PostgreSQL has no primary")

    def whole(self):
        """Both standbys replicate, and each may be the one that a COMMIT waits for."""
        count = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'quorum' AND state = 'streaming'"
        return self.sql(self.primary(), count).strip() == "2"

    def ready(self):
        wait_until("PostgreSQL has a primary and two standbys that replicate", self.whole, READY_LIMIT)
        self.sql(self.primary(), "CREATE TABLE tags (name text PRIMARY KEY, color text NOT NULL, description text NOT NULL)")

    def load(self, clients, seconds):
        logs = self.place.folder / f"pgbench{time.time_ns()}"
        command = [self.bin / "pgbench", "--no-vacuum", "--protocol=prepared", f"--client={clients}", f"--jobs={min(clients, 2)}",
                   f"--time={seconds}", "--log", f"--log-prefix={logs}", f"--file={self.home / 'insert.sql'}",
                   "--host", ADDRESSES[self.primary()], f"--port={POSTGRES_PORT}", "--username=postgres", "postgres"]
        run = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60, check=False)
        # The third column of each line is the latency in microseconds.
        times = []
        for path in glob.glob(f"{logs}.*"):
            with open(path, encoding="ascii") as file:
                times += [int(line.split()[2]) / 1e6 for line in file]
            os.unlink(path)
        if run.returncode != 0:
            raise Failed(f"pgbench: {run.stderr.strip()[-200:]}")
        return summary(times, seconds)

    def kill(self, index):
        """Everything that runs on that host: Patroni, the server and its children."""
        server = int((self.home / f"postgresql{index}" / "postmaster.pid").read_text().split()[0])
        self.place.kill([server, *descendants(server), self.processes[index].pid, *descendants(self.processes[index].pid)])

    def write(self, index, name):
        self.sql(index, f"INSERT INTO tags VALUES ('{name}', '#336699', 'one of many')")
        return True

    def heal(self, index):
        self.start_member(index)
        wait_until("both standbys replicate again", self.whole, HEAL_LIMIT)


def bulk(*words):
    """A command of Redis as bytes."""
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)


def redis_clients(address, clients, seconds):
    """A process of the load for Redis: each client sends SET and WAIT in one packet, and reads both answers before the next.
    No tool has that: WAIT cannot be used in a script, and redis-benchmark repeats a single command."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    poll, sockets, begun, answers = select.epoll(), {}, {}, {}
    number, times, failed = 0, [], 0

    def ask(client):
        nonlocal number
        number += 1
        name = b"%d-%d-%d" % (os.getpid(), end_ns, number)
        answers[client], begun[client] = b"", time.perf_counter()
        sockets[client].send(bulk(b"SET", name, b"#336699 one of many") + bulk(b"WAIT", b"1", b"5000"))

    end_ns = time.time_ns() + int(seconds * 1e9)
    for _ in range(clients):
        connection = socket.create_connection((address, REDIS_PORT), 5)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sockets[connection.fileno()] = connection
        poll.register(connection, select.EPOLLIN)
    end = time.perf_counter() + seconds
    for client in sockets:
        ask(client)
    waiting = set(sockets)
    while waiting and time.perf_counter() < end + 10:
        for client, _ in poll.poll(1):
            text = sockets[client].recv(512)
            answers[client] += text
            if text and answers[client].count(b"\r\n") < 2:
                continue
            now = time.perf_counter()
            if answers[client].startswith(b"+OK\r\n:") and not answers[client].startswith(b"+OK\r\n:0"):
                times.append(now - begun[client])
            else:
                failed += 1
            if now < end and text:
                ask(client)
            else:
                waiting.discard(client)
                poll.unregister(client)
    return times, failed + len(waiting)


class Redis(System):
    """Members of Redis that Sentinel watches."""

    name = "redis"
    about = ("SET and WAIT 1 in one packet, over plain TCP, appendfsync always; one of two replicas has it, too. Load by "
             "two processes of Python.")
    needs = [("redis-server", "apt-get install redis-server"), ("redis-cli", "apt-get install redis-tools")]
    pause = 0.02
    slow = True

    def __init__(self, place):
        super().__init__(place)
        self.processes = {}

    def version(self):
        return subprocess.run(["redis-server", "--version"], capture_output=True, text=True, check=True).stdout[:22].strip()

    def start(self):
        for index, address in enumerate(ADDRESSES):
            folder = self.place.folder / f"redis{index}"
            folder.mkdir()
            # On loopback a member does not call from its own address.
            (folder / "redis.conf").write_text(
                f'bind {address}\nport {REDIS_PORT}\ndir {folder}\nreplica-announce-ip {address}\nsave ""\n'
                "appendonly yes\nappendfsync always\n" + (f"replicaof {ADDRESSES[0]} {REDIS_PORT}\n" if index else ""))
            (folder / "sentinel.conf").write_text(
                f"bind {address}\nport {SENTINEL_PORT}\ndir {folder}\nsentinel announce-ip {address}\n"
                f"sentinel monitor bench {ADDRESSES[0]} {REDIS_PORT} 2\n")
            self.start_member(index)
        for index in range(3):
            configuration = self.place.folder / f"redis{index}" / "sentinel.conf"
            self.place.start(f"sentinel{index}", ["redis-server", configuration, "--sentinel"])

    def start_member(self, index):
        name = f"redis{index}"
        self.processes[index] = self.place.start(name, ["redis-server", self.place.folder / name / "redis.conf"])

    def ask(self, index, *command, port=REDIS_PORT, timeout=2.0):
        """The lines of an answer."""
        run = ["redis-cli", "-h", ADDRESSES[index], "-p", str(port), *command]
        return subprocess.run(run, capture_output=True, text=True, timeout=timeout, check=True).stdout.split("\n")

    def primary(self):
        for index in range(3):
            try:
                if self.ask(index, "ROLE")[0] == "master":
                    return index
            except subprocess.SubprocessError:
                pass
        raise Failed("Redis has no master")

    def whole(self):
        """One master with both replicas, and three sentinels that know it, one another and the replicas."""
        roles = [self.ask(index, "ROLE") for index in range(3)]
        if sorted(role[0] for role in roles) != ["master", "slave", "slave"]:
            return False
        if any(role[0] == "slave" and "connected" not in role for role in roles):
            return False
        master = ADDRESSES[[role[0] for role in roles].index("master")]
        for index in range(3):
            answer = self.ask(index, "SENTINEL", "MASTER", "bench", port=SENTINEL_PORT)
            known = dict(zip(answer[::2], answer[1::2]))
            if [known[key] for key in ["ip", "flags", "num-slaves", "num-other-sentinels"]] != [master, "master", "2", "2"]:
                return False
        return True

    def ready(self):
        wait_until("Redis and its sentinels are ready", self.whole, READY_LIMIT)

    def load(self, clients, seconds):
        address, parts = ADDRESSES[self.primary()], min(clients, 2)
        context = multiprocessing.get_context("fork")
        with concurrent.futures.ProcessPoolExecutor(parts, context) as pool:
            runs = [pool.submit(redis_clients, address, clients // parts, seconds) for _ in range(parts)]
            done = [run.result(seconds + 60) for run in runs]
        return summary([span for spans, _ in done for span in spans], seconds, sum(failed for _, failed in done))

    def kill(self, index):
        self.place.kill([self.processes[index].pid])

    def write(self, index, name):
        with socket.create_connection((ADDRESSES[index], REDIS_PORT), 1) as connection:
            connection.settimeout(2)
            connection.sendall(bulk(b"SET", name.encode(), b"x"))
            if connection.recv(512) != b"+OK\r\n":
                return False
            connection.sendall(bulk(b"WAIT", b"1", b"1000"))
            return connection.recv(512) in (b":1\r\n", b":2\r\n")

    def heal(self, index):
        self.start_member(index)
        wait_until("Redis and its sentinels are whole again", self.whole, HEAL_LIMIT)
