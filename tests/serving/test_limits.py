"""Limits, deadlines, clients that leave, workers that die, and a server that stops."""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import openai
import pytest
import uvicorn
from fastapi import Request
from running import LONG, PATIENCE, Running, certificate, data_url, decode, memory, png, processor_seconds, says

from transfuse.cli import run
from transfuse.serving.engine_client import EngineClient, QueueConfig
from transfuse.serving.middleware import AccessConfig, Middleware
from transfuse.serving.server import ServerConfig, bounded_protocol, listen
from transfuse.serving.worker import WorkerConfig

pytestmark = pytest.mark.xdist_group("serving")


# ---- Limits, before anything is read


def test_too_large_is_said_before_it_is_sent(server: Running) -> None:
    assert server.declare("9" * 11).startswith(b"HTTP/1.1 413")

    def endless() -> Iterator[bytes]:
        for _ in range(40):
            yield b"x" * 1_000_000

    try:
        reply = httpx.post(server.url + "/v1/chat/completions", content=endless(), timeout=60)
        assert reply.status_code == 413
    except httpx.WriteError:
        pass  # the server hung up while we were still sending


def test_pages_of_others_are_kept_out(server: Running) -> None:
    refused = server.get("/v1/models", headers={"Host": "evil.example"})
    assert refused.status_code == 403
    assert refused.json()["error"]["message"].count("127.0.0.1") == 1
    assert server.get("/v1/models", headers={"Origin": "http://evil.example"}).status_code == 403
    assert server.get("/v1/models", headers={"Origin": server.url}).status_code == 200


@pytest.mark.parametrize(("slow", "log"), [("body", [408]), ("reader", []), ("left", [])])
def test_slow_clients_do_not_hold_a_request(slow: str, log: list[int]) -> None:
    """A body that stops is a 408; a client that does not read is left; one that leaves while it sends gets nothing."""
    statuses: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await Request(scope, receive).body()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(60 if slow == "body" else 0)
        if slow == "left":
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        await asyncio.sleep(60 if slow == "reader" else 0)
        statuses.extend([message["status"]] if "status" in message else [])

    client = EngineClient(WorkerConfig("none"), QueueConfig())
    middleware = Middleware(app, client, lambda: AccessConfig(hosts=(), patience=0.05))
    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    asyncio.run(asyncio.wait_for(middleware(scope, receive, send), 10))
    assert statuses == log


async def listen_bounded(app: Any, limits: ServerConfig) -> tuple[asyncio.Server, uvicorn.server.ServerState]:
    """Serve an app with bounded connections."""
    kind = bounded_protocol(limits)
    config, state = uvicorn.Config(app, log_config=None, ws="none"), uvicorn.server.ServerState()
    config.load()
    server = await asyncio.get_running_loop().create_server(lambda: kind(config, state, {}), "127.0.0.1", 0)
    return server, state


@pytest.mark.parametrize("secure", [False, True])
def test_one_connection_too_many_is_refused(secure: bool, tmp_path: Path) -> None:
    """It gets 503 where all others have a request in progress, or with TLS is closed before the handshake."""
    cert, key = certificate(tmp_path) if secure else (None, None)
    tls = ssl.create_default_context(cafile=str(cert)) if secure else None

    async def script() -> None:
        begun, release = list[str](), asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            begun.append(scope["scheme"])
            await release.wait()
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})

        server, _ = await listen_bounded(app, ServerConfig(connections=4, cert=cert, key=key))
        address = server.sockets[0].getsockname()
        busy = [
            await asyncio.open_connection(*address, ssl=tls, server_hostname="localhost" if secure else None)
            for _ in range(2)
        ]
        for _, writer in busy:
            writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        while len(begun) < 2:
            await asyncio.sleep(0.01)
        assert begun == ["https" if secure else "http"] * 2
        reader, _ = await asyncio.open_connection(*address)
        head, _, content = (await reader.read()).partition(b"\r\n\r\n")
        if secure:
            assert head == b""
        else:
            assert head.startswith(b"HTTP/1.1 503 Service Unavailable")
            assert b"retry-after: 1" in head.lower()
            assert "too many" in json.loads(content)["error"]["message"]
        release.set()
        for reader, _ in busy:
            assert b" 200 " in await reader.readline()
        server.close()

    asyncio.run(asyncio.wait_for(script(), 60))


@pytest.mark.parametrize("secure", [False, True])
def test_connections_are_bounded(secure: bool, tmp_path: Path) -> None:
    """Silent ones are closed, one too many takes an idle one's place, and so are those that take no response.

    With TLS silent ones do not even begin the handshake.
    """
    big = 8_000_000
    cert, key = certificate(tmp_path) if secure else (None, None)
    tls = ssl.create_default_context(cafile=str(cert)) if secure else None

    async def app(scope: Any, receive: Any, send: Any) -> None:
        length = big if scope["path"] == "/big" else 2
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % length)]})
        await send({"type": "http.response.body", "body": b"x" * length})

    async def script() -> None:
        server, state = await listen_bounded(app, ServerConfig(idle=0.5, connections=6, cert=cert, key=key))
        address = server.sockets[0].getsockname()

        async def connect(path: str = "") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            own, name = (tls, "localhost") if secure and path else (None, None)
            reader, writer = await asyncio.open_connection(*address, limit=1_000_000, ssl=own, server_hostname=name)
            if path or not secure:
                writer.write(f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode() if path else b"GET /")
            return reader, writer

        silent = [await connect() for _ in range(3)]  # half of all connections may be of one address
        await asyncio.sleep(0.1)
        asks, _ = await connect("/small")
        assert b" 200 " in await asks.readline()
        assert await silent[0][0].read() == b""
        assert len(state.connections) == 3
        assert [await reader.read() for reader, _ in silent[1:]] == [b"", b""]
        unread = [await connect("/big") for _ in range(2)]
        await asyncio.sleep(2)
        assert not state.connections
        slow, _ = await connect("/big")
        received = 0
        while received < big:  # for longer than a connection may be idle
            received += len(await slow.read(1_000_000))
            await asyncio.sleep(0.2)
        assert received > big
        del unread
        server.close()

    asyncio.run(asyncio.wait_for(script(), 60))


def test_deadline(server: Running) -> None:
    reply = server.post("/v1/images/generations", {"prompt": "a", **LONG, "timeout": 0.3})
    assert reply.status_code == 504
    assert "deadline" in reply.json()["error"]["message"]
    lines = server.post("/v1/images/generations", {"prompt": "a", **LONG, "timeout": 0.3, "stream": True}).text
    assert "deadline" in json.loads(lines.split("data: ")[-1])["error"]["message"]
    server.wait_for(server.idle)


@pytest.mark.parametrize("body", [{}, {"stream": True}, {"stream": True, "partial_images": 3}], ids=str)
@pytest.mark.parametrize("after", [0.0, 0.1, 0.5])
def test_those_who_leave_are_forgotten(server: Running, body: dict[str, object], after: float) -> None:
    """In every phase: before it is read, while it waits, while it draws; whether it streams or not."""
    before = server.metric("transfuse_network_evaluations")
    server.leave({"prompt": "a crab", "n": 2, **LONG, **body}, after)
    server.wait_for(server.idle, 10)
    assert server.metric("transfuse_network_evaluations") == before  # none of them came to its end


def test_health_ready_metrics(server: Running) -> None:
    assert server.get("/health").json() == {"status": "ok"}
    assert server.get("/ready").json() == {"status": "ready"}
    server.post("/v1/images/generations", {"prompt": "a"})
    assert server.metric("transfuse_images") >= 1
    assert server.metric("transfuse_requests") > 1
    assert "x-request-id" in server.get("/health").headers


# ---- Signals


def ended_processor_seconds() -> float:
    """Return the seconds that all processes computed which this one has started and which have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_https_and_signals(served: Path, tmp_path: Path) -> None:
    """SIGHUP reads the keys again, or keeps those that it has; SIGTERM ends an idle server at once."""
    cert, key = certificate(tmp_path)
    keys = tmp_path / "keys"
    keys.write_text("anna:old\n")
    with Running(served, "--tls-cert", str(cert), "--tls-key", str(key), "--keys", str(keys), key="old") as running:
        assert running.url.startswith("https://")
        assert running.post(IMAGES, {"prompt": "a", "num_inference_steps": 1}).status_code == 200

        def accepts(name: str) -> bool:
            return running.get("/metrics", headers={"Authorization": f"Bearer {name}"}).status_code == 200

        keys.write_text("anna:new\n")
        running.process.send_signal(signal.SIGHUP)
        running.wait_for(lambda: accepts("new"))
        assert not accepts("old")
        keys.write_text("# nobody\n")
        running.process.send_signal(signal.SIGHUP)
        running.wait_for(lambda: "all stays as it was" in "".join(running.log))
        assert accepts("new")
        assert running.get("/v1/models", headers={}).status_code == 401
        host, port = running.url.removeprefix("https://").split(":")
        context = ssl.create_default_context(cafile=str(cert))
        with (
            socket.create_connection((host, int(port))),
            socket.create_connection((host, int(port))) as plain,
            context.wrap_socket(plain, server_hostname="localhost"),
        ):
            ended, used = ended_processor_seconds(), processor_seconds(running.process.pid)
            assert running.stop() in (0, -signal.SIGTERM)
            assert ended_processor_seconds() - ended - used < 1, "not even the interpreter takes long to end"
        assert "graceful shutdown exceeded" not in "".join(running.log), "silent connections are not waited for"


# ---- A server with little room


@pytest.fixture(scope="module")
def limited(served: Path) -> Iterator[Running]:
    """A server with keys and little room; the last test of it stops it."""
    options = ("--slots", "2", "--max-requests", "6", "--max-cost", "80000", "--drain", "200")
    options += ("--client-share", "1")
    with Running(served, *options, key="second", TRANSFUSE_API_KEYS="first,second") as running:
        yield running


KEY = {"Authorization": "Bearer second"}
IMAGES, CHAT = "/v1/images/generations", "/v1/chat/completions"


def test_keys(limited: Running) -> None:
    for wrong in ({}, {"Authorization": "Bearer third"}, {"Authorization": "Basic second"}):
        assert limited.post(IMAGES, {"prompt": "a"}, headers=wrong).status_code == 401
    assert openai.OpenAI(base_url=limited.url + "/v1", api_key="second").models.list().data


def test_a_request_is_refused_for_its_cost(limited: Running) -> None:
    """One that is too dear even alone is a mistake, which waiting does not mend."""
    reply = limited.post(IMAGES, {"prompt": "a", "n": 3, **LONG}, headers=KEY)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "n"
    assert "at most 80000 positions" in reply.json()["error"]["message"]
    assert "Retry-After" not in reply.headers
    assert limited.post(IMAGES, {"prompt": "a", "n": 7}, headers=KEY).status_code == 400
    limited.wait_for(limited.idle)
    assert limited.post(IMAGES, {"prompt": "a", "n": 3}, headers=KEY).status_code == 200


def test_the_worker_dies(limited: Running) -> None:
    """Requests that ran fail; the next worker computes those that waited, to the same bytes."""
    with ThreadPoolExecutor(8) as crowd:
        quick = {"prompt": "a crab", "seed": 5}
        expected = limited.post(IMAGES, quick, headers=KEY).json()["data"][0]["b64_json"]
        running = [crowd.submit(limited.post, IMAGES, {"prompt": "a", **LONG}, headers=KEY) for _ in range(2)]
        limited.wait_for(lambda: limited.metric("transfuse_running") == 2)
        waiting = [crowd.submit(limited.post, IMAGES, quick, headers=KEY) for _ in range(4)]
        limited.wait_for(lambda: limited.metric("transfuse_waiting") == 4)
        os.kill(limited.worker, signal.SIGKILL)
        for future in running:
            assert future.result().status_code == 502  # a proxy asks another server after 503
            assert "the worker ended" in future.result().json()["error"]["message"]
        limited.wait_for(lambda: limited.get("/ready").status_code == 200)
        assert [future.result().json()["data"][0]["b64_json"] for future in waiting] == [expected] * 4
        assert limited.metric("transfuse_worker_restarts") == 1


def test_a_full_queue_and_draining(limited: Running) -> None:
    """A server that gets SIGTERM finishes what runs or waits, and accepts nothing new."""
    with ThreadPoolExecutor(2) as crowd:
        body = {"prompt": "a crab", "num_inference_steps": 100}
        running = [crowd.submit(limited.post, IMAGES, {**body, "n": n}, headers=KEY) for n in (1, 5)]
        limited.wait_for(lambda: limited.metric("transfuse_running") + limited.metric("transfuse_waiting") == 6)
        full = limited.post(IMAGES, {"prompt": "a"}, headers=KEY)
        assert full.status_code == 429
        assert int(full.headers["Retry-After"]) >= 1
        assert "at most 6 requests" in full.json()["error"]["message"]
        limited.process.send_signal(signal.SIGTERM)
        limited.wait_for(lambda: limited.get("/ready").status_code == 503)
        assert limited.post(IMAGES, {"prompt": "a"}, headers=KEY).status_code == 503
        assert [future.result().status_code for future in running] == [200, 200]
        assert limited.process.wait(PATIENCE) in (0, -signal.SIGTERM)


def test_a_server_whose_model_cannot_be_loaded_ends(served: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((served / "config.json").read_bytes())
    command = [sys.executable, "-m", "transfuse", "serve", "--port", "0", "--model"]
    ended = subprocess.run([*command, str(broken)], capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == 1
    assert "tokenizer.json" in ended.stderr or "expected" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_folder_without_a_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--model", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_http_process_needs_no_torch() -> None:
    model = "import transfuse.cli.serving as serving; assert serving.is_export(serving.default_model())"
    code = f"import sys, transfuse.serving.server; {model}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- Many clients

MISTAKES = ({}, {"messages": []}, {"messages": says("")}, {"messages": says("a"), "temprature": 1})


class Crowd:
    """Requests of every kind: good ones, bad ones, those that leave (a tenth), those that read slowly, conversations.

    Each answer is compared with the one to the same request alone. One in a conversation may reuse what is in the
    cache, which changes results by 1e-5 at most: the levels of an image by 1 at most, where one is between two.
    """

    WRITE = {"messages": says("a crab"), "modalities": ["text"]}  # noqa: RUF012
    CHAT = {"messages": says("a crab"), "seed": 3, "stream": True, "stream_options": {"include_progress": True}}  # noqa: RUF012
    SIDES = (8, 30)

    def __init__(self, server: Running) -> None:
        self.server, self.failures = server, []
        self.pictures = [self.draw(seed) for seed in range(4)]
        self.text = server.post("/v1/chat/completions", self.WRITE).json()["choices"]
        self.edits = {side: self.edit(side) for side in self.SIDES}
        self.reply = self.read()
        self.conversations = [self.converse(seed) for seed in range(4)]

    def draw(self, seed: int) -> str:
        reply = self.server.post("/v1/images/generations", {"prompt": "a crab", "seed": seed})
        return reply.json()["data"][0]["b64_json"]

    def __call__(self, number: int) -> None:
        draw = random.Random(number)
        kind = draw.choice([*KINDS, "drawn", "written"])
        try:
            wrong = getattr(self, kind)(draw)
        except Exception as error:
            wrong = repr(error)
        if wrong:
            self.failures.append(f"{number} {kind}: {wrong}")

    def drawn(self, draw: random.Random) -> str:
        seed = draw.randrange(4)
        return "" if self.draw(seed) == self.pictures[seed] else "another picture"

    def written(self, draw: random.Random) -> str:
        reply = self.server.post("/v1/chat/completions", self.WRITE)
        return "" if reply.json()["choices"] == self.text else f"another text: {reply.text}"

    def streamed(self, draw: random.Random) -> str:
        seed = draw.randrange(4)
        body = {"prompt": "a crab", "seed": seed, "stream": True, "partial_images": 3}
        last = self.server.post("/v1/images/generations", body).text.split("data: ")[-1]
        return "" if json.loads(last)["b64_json"] == self.pictures[seed] else "another picture"

    def edited(self, draw: random.Random) -> str:
        side = draw.choice(self.SIDES)
        return "" if self.edit(side) == self.edits[side] else "another picture"

    def mistaken(self, draw: random.Random) -> str:
        status = self.server.post("/v1/chat/completions", draw.choice(MISTAKES)).status_code
        return "" if status == 400 else f"{status}"

    def huge(self, draw: random.Random) -> str:
        reply = self.server.declare("9" * 11)
        return "" if reply.startswith(b"HTTP/1.1 413") else reply.decode()

    def leaving(self, draw: random.Random) -> None:
        self.server.leave({"prompt": "a", **LONG, "stream": draw.random() < 0.5}, draw.random() * 0.3)

    def slow(self, draw: random.Random) -> str:
        return "" if self.read(0.002) == self.reply else "another reply"

    def conversed(self, draw: random.Random) -> str:
        seed = draw.randrange(4)
        for number, (reply, alone) in enumerate(zip(self.converse(seed), self.conversations[seed], strict=True)):
            if reply["content"] != alone["content"] or len(reply["images"]) != len(alone["images"]):
                return f"another reply {number}: {reply}"
            for image, same in zip(reply["images"], alone["images"], strict=True):
                if np.abs(np.subtract(image, same, dtype=int)).max() > 1:
                    return f"another image in reply {number}"
        return ""

    def converse(self, seed: int) -> list[dict[str, Any]]:
        """Return the words and the images of the replies to four turns, each sent with all that came before it."""
        messages: list[dict[str, Any]] = []
        replies = []
        for number, text in enumerate(("what is it", "a moon", "and now", "on blue")):
            shown = [{"type": "image_url", "image_url": {"url": data_url(png(8, seed))}}] if number in (0, 2) else []
            messages.append({"role": "user", "content": [*shown, {"type": "text", "text": text}]})
            body = {"messages": messages, "modalities": ["image" if number % 2 else "text"], "seed": seed}
            reply = self.server.post(CHAT, {**body, "max_tokens": 5, "num_inference_steps": 6}).json()
            messages.append(message := reply["choices"][0]["message"])
            images = [decode(image["image_url"]["url"].partition(",")[2]) for image in message.get("images", [])]
            replies.append({"content": message["content"], "images": images})
        return replies

    def edit(self, side: int) -> str:
        form = {"prompt": "red", "strength": "0.5", "seed": "5"}
        reply = self.server.post("/v1/images/edits", files={"image": ("a.png", png(side))}, data=form)
        return reply.json()["data"][0]["b64_json"]

    def read(self, pause: float = 0.0) -> list[dict[str, Any]]:
        """Return what a stream adds, read in small pieces with a pause after each."""
        content = b""
        with httpx.stream("POST", self.server.url + "/v1/chat/completions", json=self.CHAT, timeout=120) as reply:
            for piece in reply.iter_raw(64):
                content += piece
                time.sleep(pause)
        chunks = [json.loads(line[6:]) for line in content.decode().split("\n\n") if line.startswith("data: {")]
        return [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"][0]["delta"]]


KINDS = ("drawn", "written", "streamed", "edited", "mistaken", "huge", "leaving", "slow", "conversed")


@pytest.mark.parametrize("count", [40, pytest.param(5000, marks=pytest.mark.long)])
def test_a_crowd_is_served_right(server: Running, count: int) -> None:
    """Eight clients at a time: every valid request gets the right answer, every mistake its error, memory stays."""
    crowd = Crowd(server)
    held: list[tuple[int, int]] = []
    with ThreadPoolExecutor(8) as threads:
        for start in range(0, count, count // 4):
            list(threads.map(crowd, range(start, start + count // 4)))
            server.wait_for(server.idle)
            held.append((memory(server.process.pid), memory(server.worker)))
            print(f"{start + count // 4} requests: {[round(part / 1e6, 1) for part in held[-1]]} MB")
    assert not crowd.failures
    assert server.metric("transfuse_worker_restarts") == 0
    assert server.metric("transfuse_cancelled") > 0
    if count >= 5000:
        for first, last in zip(held[0], held[-1], strict=True):
            assert last < 1.05 * first, held


def test_small_pieces_are_sent_at_once() -> None:
    """Else the first words of a stream wait 40 ms for an acknowledgement."""

    async def no_delay() -> int:
        with listen("127.0.0.1", 0) as listening:
            accepted = asyncio.get_running_loop().create_future()
            server = await asyncio.start_server(
                lambda reader, writer: accepted.set_result(writer.get_extra_info("socket")), sock=listening
            )
            _, writer = await asyncio.open_connection(*listening.getsockname())
            option = (await accepted).getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            writer.close()
            server.close()
            return option

    assert asyncio.run(no_delay())
