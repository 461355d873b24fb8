"""Requests and bytes a second through the daemon's proxy, beside a direct connection to the same service. See proxy.sh."""

import json
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

ROUNDS = int(os.environ.get("ROUNDS", "5"))
SECONDS = int(os.environ.get("SECONDS_EACH", "3"))
MEGABYTES = int(os.environ.get("MEGABYTES", "1024"))
OFFSET = int(os.environ.get("OFFSET", "9000"))
OUTSIDE = 8087 + OFFSET
INSIDE = 8088 + OFFSET
UPLOADS = 8089 + OFFSET
UPLOADS_INSIDE = 8090 + OFFSET
NGINX = """daemon off; master_process off; pid {folder}/pid; error_log stderr;
events {{ worker_connections 4096; }}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/p;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s; keepalive_requests 1000000000;
  server {{
    listen 127.0.0.1:{port};
    location /small {{ return 200 "0123456789abcdef0123456789abcdef"; }}
    location /file {{ root {folder}; sendfile on; }}
  }}
}}
"""


def wait_until_answers(address, limit=60):
    end = time.monotonic() + limit
    while time.monotonic() < end:
        try:
            socket.create_connection(address, 1).close()
            return
        except OSError:
            time.sleep(0.05)
    sys.exit(f"nothing listens at {address}")


def requests(address, connections, kept):
    command = ["wrk", "-t1", f"-c{connections}", f"-d{SECONDS}s", f"http://{address[0]}:{address[1]}/small"]
    if not kept:
        command[1:1] = ["-H", "Connection: close"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(re.search(r"Requests/sec:\s+([\d.]+)", out).group(1))


def download(address):
    url = f"http://{address[0]}:{address[1]}/file/big"
    command = ["curl", "-sS", "-f", "-o", "/dev/null", "-w", "%{speed_download}", url]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 1e6


def take_uploads(listener):
    """Reads each connection to its end, and says how many bytes have come."""
    buffer = bytearray(1 << 20)
    while True:
        connection, _ = listener.accept()
        count = 0
        while length := connection.recv_into(buffer):
            count += length
        connection.sendall(str(count).encode())
        connection.close()


def upload(address):
    piece = bytes(1 << 20)
    begin = time.monotonic()
    with socket.create_connection(address) as connection:
        for _ in range(MEGABYTES):
            connection.sendall(piece)
        connection.shutdown(socket.SHUT_WR)
        counted = int(connection.makefile().read())
    if counted != MEGABYTES << 20:
        sys.exit(f"{counted} bytes have come, and {MEGABYTES << 20} were sent")
    return counted / (time.monotonic() - begin) / 1e6


def primary(cluster):
    for node in cluster["nodes"]:
        try:
            socket.create_connection((node["address"], OUTSIDE), 1).close()
            return (node["address"], OUTSIDE)
        except OSError:
            continue
    return None


def main():
    folder = pathlib.Path(tempfile.mkdtemp(prefix="tw-proxy", dir=os.environ.get("BENCH_DIR")))
    (folder / "file").mkdir()
    big = folder / "file" / "big"
    with open(big, "wb") as file:
        file.truncate(MEGABYTES << 20)
    (folder / "nginx.conf").write_text(NGINX.format(folder=folder, port=INSIDE))
    command = [sys.argv[1], "dev", "--quiet", "--dir", str(folder / "dev"), "--port-offset", str(OFFSET), "--service"]
    command += [f"nginx -c {folder}/nginx.conf -p {folder}", "--service-ports"]
    command += [f"{OUTSIDE}:{INSIDE},{UPLOADS}:{UPLOADS_INSIDE}"]
    sink = multiprocessing.Process(target=take_uploads, args=(socket.create_server(("127.0.0.1", UPLOADS_INSIDE)),), daemon=True)
    sink.start()
    dev = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        direct = ("127.0.0.1", INSIDE)
        wait_until_answers(direct)
        cluster = json.loads((folder / "dev" / "cluster.json").read_text())
        through = None
        for _ in range(200):
            through = primary(cluster)
            if through:
                break
            time.sleep(0.05)
        if not through:
            sys.exit("no node has the service's port open")
        rows = [(f"requests/s, {n} connections, kept", lambda a, n=n: requests(a, n, True)) for n in (1, 16, 64)]
        rows += [("requests/s, 16 at once, each new", lambda a: requests(a, 16, False))]
        rows += [("MB/s, one download", download)]
        rows += [("MB/s, one upload", lambda a: upload((a[0], UPLOADS_INSIDE if a == direct else UPLOADS)))]
        print(f"{'':36}{'direct':>10}{'proxy':>10}{'ratio':>8}")
        for name, measure in rows:
            sides = {direct: [], through: []}
            for turn in range(ROUNDS):
                # In turns, so that a busy moment of the machine hits both.
                for side in (direct, through) if turn % 2 == 0 else (through, direct):
                    sides[side].append(measure(side))
            a, b = (statistics.median(sides[side]) for side in (direct, through))
            print(f"{name:36}{a:10.0f}{b:10.0f}{b / a:8.2f}")
    finally:
        dev.send_signal(signal.SIGTERM)
        dev.wait()
        sink.terminate()
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
