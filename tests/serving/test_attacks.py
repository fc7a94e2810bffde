"""Attacks by one client on the others, at twice the size at which each once hurt, with numbers.

Memory of a process stays under 600 MB. On a quiet machine `/health` is answered within 200 ms and no gap between
another client's tokens grows by more than 50 ms: TRANSFUSE_TEST_BUSY=1 demands that. By default these times, and the
seconds in which an attack is refused, may be ten times as long, because tests share their machine.
"""

from __future__ import annotations

import io
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import httpx2 as httpx
import numpy as np
import PIL.Image
import pytest
from running import LONG, Running, children, data_url, memory, png, says

pytestmark = [pytest.mark.xdist_group("serving")]
CHAT = "/v1/chat/completions"
IMAGES = "/v1/images/generations"
SEND = "import sys, httpx2; print(httpx2.post(sys.argv[1], content=open(sys.argv[2], 'rb'), timeout=280).status_code)"
"""a client in a separate process, whose work does not delay the others here"""
MEMORY = 600_000_000
"""most bytes of any process of the server, but for the model's"""
HEALTH = 0.2
"""most seconds of `/health`, on a machine with nothing else to do"""
GAP = 0.05
"""most seconds by which another's gap between tokens may grow, on such a machine"""
BUSY = float(os.environ.get("TRANSFUSE_TEST_BUSY", "10"))
"""how many times longer all may take here: this machine also runs the attack, and whatever else"""


@pytest.fixture(scope="module")
def attacked(served: Path) -> Iterator[Running]:
    with Running(served, "--slots", "4") as running:
        yield running


class Watch(threading.Thread):
    """Measures `/health` and the memory of the HTTP process and of those that read bodies, until it is left."""

    def __init__(self, server: Running) -> None:
        super().__init__(daemon=True)
        self.server, self.left = server, threading.Event()
        self.seconds: list[float] = []
        self.most = 0

    def run(self) -> None:
        with httpx.Client() as client:
            while True:  # an attack may be over before the first reply
                began = time.monotonic()
                assert client.get(self.server.url + "/health", timeout=60).status_code == 200
                self.seconds.append(time.monotonic() - began)
                worker = self.server.worker
                for process in (self.server.process.pid, *(p for p in self.server.forked if p != worker)):
                    try:
                        self.most = max(self.most, memory(process))
                    except FileNotFoundError:
                        continue
                if self.left.wait(0.02):
                    break

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.left.set()
        self.join()
        assert self.seconds, "no reply of /health"
        print(f"health: median {statistics.median(self.seconds):.3f} s, most {max(self.seconds):.3f} s")
        print(f"memory: at most {self.most / 1e6:.0f} MB")
        assert self.most < MEMORY
        assert statistics.median(self.seconds) < HEALTH
        assert max(self.seconds) < HEALTH * BUSY


def picture(kind: str, side: int) -> bytes:
    """A picture of one colour: small as a file."""
    file = io.BytesIO()
    PIL.Image.new("RGB", (side, side), (9, 9, 9)).save(file, format=kind, lossless=True)
    return file.getvalue()


def chat(*images: bytes) -> dict[str, object]:
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    return {"messages": [{"role": "user", "content": parts[:64]}, {"role": "user", "content": parts[64:]}]}


@pytest.mark.parametrize("count", [15, 40, 120])
def test_many_bombs_in_a_small_body(attacked: Running, count: int) -> None:
    """Copies of one WebP of 4,000 x 4,000: refused by their number, or by their sizes before any is decoded."""
    bomb = picture("WEBP", 4000)
    assert len(bomb) < 1000
    with Watch(attacked) as watch:
        attacked.wait_for(lambda: watch.seconds)
        began = time.monotonic()
        reply = attacked.post(CHAT, chat(*[bomb] * count))
        assert time.monotonic() - began < 1 * BUSY
    assert reply.status_code == 400
    expected = "expected at most 64000000 pixels" if count == 15 else "expected at most 16 images"
    assert expected in reply.json()["error"]["message"]


@contextmanager
def tokens(server: Running) -> Iterator[list[float]]:
    """The times at which a client gets the pieces of a long text, which it reads in a thread while the block runs."""
    times: list[float] = []
    left = threading.Event()

    def listen() -> None:
        body = {"messages": says("a"), "modalities": ["text"], "max_tokens": 200, "temperature": 1.0, "stream": True}
        while not left.is_set():
            with httpx.stream("POST", server.url + CHAT, json=body, timeout=60) as reply:
                times.append(float("nan"))  # no gap between two texts
                for _ in reply.iter_raw():
                    times.append(time.monotonic())

    thread = threading.Thread(target=listen)
    thread.start()
    server.wait_for(lambda: len(times) > 200)
    yield times
    left.set()
    thread.join()


def longest_gap(times: list[float], start: float) -> float:
    """Return the most seconds between two neighbours, of those that end after `start`."""
    return max((after - before for before, after in pairwise(times) if after >= start and after > before), default=0.0)


@pytest.mark.parametrize("attack", ["50 MB of text", "legal pictures"])
def test_a_large_request_does_not_stop_others(attacked: Running, attack: str, tmp_path: Path) -> None:
    """Texts of 25 MB, and four legal pictures of 16 million pixels, twice at once: others go on getting tokens."""
    if attack == "legal pictures":
        noise = io.BytesIO()
        PIL.Image.fromarray(np.zeros((4000, 4000, 3), np.uint8)).save(noise, format="PNG")
        body = json.dumps(chat(*[noise.getvalue()] * 4)).encode()
    else:
        body = json.dumps({"messages": says("a crab " * 14_000) * 255}).encode()
    file = tmp_path / "body"
    file.write_bytes(body)
    command = [sys.executable, "-c", SEND, attacked.url + CHAT, str(file)]
    with tokens(attacked) as times, Watch(attacked):
        before = longest_gap(list(times), 0.0)
        start = time.monotonic()
        attackers = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
        statuses = [int(attacker.communicate(timeout=300)[0]) for attacker in attackers]
        during = longest_gap(list(times), start)
    print(f"gaps: {before:.3f} s before, {during:.3f} s during")
    assert statuses == ([400, 400] if "text" in attack else [200, 200]), statuses
    assert during < before + GAP * BUSY


def test_silent_connections_leave_room(attacked: Running) -> None:
    """Twice as many as once kept everybody out: the oldest idle ones make way, even for the same address."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    host, port = attacked.url.removeprefix("http://").split(":")
    silent = [socket.create_connection((host, int(port)), timeout=30) for _ in range(1040)]
    with Watch(attacked):
        assert attacked.get("/ready").status_code == 200
        assert attacked.post(IMAGES, {"prompt": "a", "num_inference_steps": 1}).status_code == 200
    assert len(list(Path(f"/proc/{attacked.process.pid}/fd").iterdir())) < 400
    for line in silent:
        line.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_client_that_goes_on_asking_keeps_its_connection(attacked: Running) -> None:
    """Not the oldest connection makes way, but the one that has been idle for longest."""
    host, port = attacked.url.removeprefix("http://").split(":")
    with httpx.Client() as client:
        silent = []
        for _ in range(30):
            silent += [socket.create_connection((host, int(port)), timeout=30) for _ in range(20)]
            reply = client.get(attacked.url + "/health")
            assert reply.status_code == 200
        streams = {id(reply.extensions["network_stream"])}
        assert len(streams) == 1
        for line in silent:
            line.close()


def test_bodies_in_tiny_chunks(attacked: Running) -> None:
    """Forty thousand chunks of one byte: parsed to their end, they would hold the loop for half a second each read."""
    chunks = b"1\r\n \r\n" * 40_000

    def send(_: int) -> bytes:
        with attacked.connect(f"{CHAT} HTTP/1.1\r\nTransfer-Encoding: chunked") as line:
            with suppress(OSError):
                line.sendall(chunks)
            return line.recv(1000)

    with Watch(attacked), ThreadPoolExecutor(8) as crowd:
        replies = list(crowd.map(send, range(8)))
    assert all(b"expected chunks of 64 bytes and more" in reply for reply in replies if reply)
    assert any(replies)
    body = json.dumps({"messages": says("a"), "max_tokens": 1}).encode()
    pieces = iter([body[:10], *(body[at : at + 1] for at in range(10, len(body)))])
    assert httpx.post(attacked.url + CHAT, content=pieces, timeout=60).status_code == 200


def test_bodies_that_are_withheld(attacked: Running) -> None:
    """Forty connections that send 30 MB and never the last byte: most are refused, and the memory comes back."""
    attacked.post(CHAT, chat(png()))
    before, lines = memory(attacked.process.pid), []

    def withhold(_: int) -> None:
        line = attacked.connect(f"{CHAT} HTTP/1.1\r\nContent-Length: 30000001")
        lines.append(line)
        try:
            for _ in range(30):
                line.sendall(b" " * 1_000_000)
        except OSError:
            pass

    with Watch(attacked):
        with ThreadPoolExecutor(8) as crowd:
            list(crowd.map(withhold, range(40)))
        assert attacked.post(CHAT, {"messages": says("a"), "max_tokens": 1}).status_code in (200, 429)
        for line in lines:
            line.close()
        attacked.wait_for(attacked.idle)
    attacked.wait_for(lambda: memory(attacked.process.pid) < before + 60_000_000, 20)
    assert attacked.post(CHAT, {"messages": says("a"), "max_tokens": 1}).status_code == 200


def test_nothing_outlives_a_server_that_is_killed(served: Path) -> None:
    with Running(served, "--slots", "1") as running:
        assert running.post(CHAT, {**chat(png()), "max_tokens": 1}).status_code == 200
        started = [*children(running.process.pid), *running.forked]
        assert len(started) >= 4  # fork server, its tracker, the worker, a process that reads bodies
        running.process.kill()
        running.process.wait()
        end = time.monotonic() + 20
        while any(Path(f"/proc/{number}").exists() for number in started) and time.monotonic() < end:
            time.sleep(0.05)
        assert not [number for number in started if Path(f"/proc/{number}").exists()]


def test_a_deadline_begins_with_the_first_byte(served: Path) -> None:
    body = json.dumps({"messages": says("a"), "max_tokens": 1}).encode()
    head = f"{CHAT} HTTP/1.1\r\nContent-Length: {len(body)}"
    with Running(served, "--slots", "1", "--deadline", "2") as running, running.connect(head, body[:1]) as line:
        began = time.monotonic()
        assert b" 408 " in line.recv(1000)
        assert time.monotonic() - began < 2 + BUSY


def test_a_caption_after_forty_drawings(served: Path) -> None:
    """A second key's caption is written while the first key's drawings hold every slot."""
    options = ("--slots", "2", "--client-share", "0.9")
    with (
        Running(served, *options, key="a", TRANSFUSE_API_KEYS="many:a,other:b") as running,
        ThreadPoolExecutor(40) as crowd,
    ):
        drawings = [crowd.submit(running.post, IMAGES, {"prompt": "a", **LONG, "timeout": 60}) for _ in range(40)]
        running.wait_for(lambda: running.metric("transfuse_waiting") >= 30)
        began = time.monotonic()
        body = {"messages": says("a"), "modalities": ["text"], "max_tokens": 4}
        reply = running.post(CHAT, body, headers={"Authorization": "bearer b"})
        seconds = time.monotonic() - began
        assert reply.status_code == 200
        assert not any(future.done() and future.result().status_code == 200 for future in drawings)
        print(f"a caption after 40 drawings: {seconds:.3f} s")
        running.process.kill()
        for future in drawings:
            future.exception()


def test_not_http_is_refused_in_openais_shape(attacked: Running) -> None:
    host, port = attacked.url.removeprefix("http://").split(":")
    for garbage in (
        b"GARBAGE\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 20_000,
    ):
        with socket.create_connection((host, int(port)), timeout=10) as line:
            line.sendall(garbage)
            head, _, content = line.recv(4000).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 Bad Request")
        assert json.loads(content)["error"]["type"] == "invalid_request_error"
