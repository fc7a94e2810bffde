"""The server as its clients see it: OpenAI's own, careless ones, hostile ones, those that leave."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx2 as httpx
import numpy as np
import openai
import PIL.Image
import pytest
from conftest import BYTES, chained, linked
from hostile import IMAGES
from running import Running, memory

import transfuse
from transfuse.cli import run
from transfuse.export import GenerationConfig, save_export
from transfuse.images import read_settings
from transfuse.inference import TransfusionPipeline

pytestmark = pytest.mark.xdist_group("serving")

LONG = {"num_inference_steps": 1000, "guidance_scale": 3.0}
"""seconds, of the small model"""


@pytest.fixture(scope="session")
def pipe(served: Path) -> TransfusionPipeline:
    return transfuse.load(str(served))


@pytest.fixture(scope="session")
def server(served: Path) -> Iterator[Running]:
    with Running(served) as running:
        yield running


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def png(side: int = 8, seed: int = 0) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def pixels(encoded: str) -> np.ndarray:
    return np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(encoded))))


def says(text: str) -> list[dict[str, object]]:
    return [{"role": "user", "content": text}]


# ---- OpenAI's client, unmodified


def test_openai_lists_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("small").id == "small"
    with pytest.raises(openai.NotFoundError, match="model: expected 'small'"):
        client.models.retrieve("gpt-5")


def test_openai_writes_what_the_pipeline_writes(client: openai.OpenAI, pipe: TransfusionPipeline) -> None:
    expected = pipe.generate("a crab", draw="never", max_tokens=12).text
    asked = {"model": "small", "messages": says("a crab"), "max_tokens": 12, "modalities": ["text"]}
    reply = client.chat.completions.create(**asked)
    assert reply.choices[0].message.content == expected
    assert reply.choices[0].finish_reason in ("stop", "length")
    assert reply.usage.completion_tokens <= 12
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
    assert chunks[-1].usage == reply.usage
    assert chunks[-2].choices[0].finish_reason == reply.choices[0].finish_reason


def test_openai_draws_what_the_pipeline_draws(client: openai.OpenAI, pipe: TransfusionPipeline, tmp_path: Path) -> None:
    expected = pipe("a crab", generator=7, num_images_per_prompt=2).images
    reply = client.images.generate(model="small", prompt="a crab", n=2, extra_body={"seed": 7})
    for number, (data, ours) in enumerate(zip(reply.data, expected, strict=True)):
        assert np.array_equal(pixels(data.b64_json), np.asarray(ours))
        path = tmp_path / f"{number}.png"
        path.write_bytes(base64.b64decode(data.b64_json))
        assert read_settings(path)["seed"] == 7 + number
    events = list(
        client.images.generate(model="small", prompt="a crab", stream=True, partial_images=3, extra_body={"seed": 7})
    )
    kinds = [event.type.rsplit(".", 1)[1] for event in events]
    # A preview that waits when the next one comes makes way for it: on a machine with other work fewer arrive.
    assert kinds in [["partial_image"] * previews + ["completed"] for previews in (1, 2, 3)]
    assert np.array_equal(pixels(events[-1].b64_json), np.asarray(expected[0]))
    assert pixels(events[0].b64_json).shape == (8, 8, 3)


def test_a_picture_of_the_server_is_drawn_again(server: Running, served: Path, tmp_path: Path) -> None:
    """By `generate --again`, to the same bytes: generations, an edit by words and one by a mask, and a chat."""
    (tmp_path / "shown.png").write_bytes(png())
    mask = np.zeros((8, 8), np.uint8)
    mask[:, :4] = 255
    PIL.Image.fromarray(mask).save(tmp_path / "mask.png")
    parts = [{"type": "image_url", "image_url": {"url": data_url(png())}}, {"type": "text", "text": "a crab"}]
    chat = {"messages": [{"role": "user", "content": parts}], "modalities": ["image"], "seed": 2, "temperature": 0.5}
    form = {"prompt": "red", "seed": 3, "num_inference_steps": 4}
    files = [("image", ("a.png", png()))]
    masked = [*files, ("mask", ("m.png", (tmp_path / "mask.png").read_bytes()))]
    asked = {"prompt": "a crab", "n": 2, "seed": 7, "sampler": "ddim", "size": "8x4"}
    drawn = server.post("/v1/images/generations", asked).json()["data"]
    found = [(one["b64_json"], ()) for one in drawn]
    for given, options in ((files, ()), (masked, ("--mask", "mask.png"))):
        (edited,) = server.post("/v1/images/edits", data=form, files=given).json()["data"]
        found.append((edited["b64_json"], ("--images", "shown.png", *options)))
    (image,) = server.post("/v1/chat/completions", chat).json()["choices"][0]["message"]["images"]
    found.append((image["image_url"]["url"].partition(",")[2], ("--images", "shown.png")))
    for number, (content, options) in enumerate(found):
        file = tmp_path / f"{number}.png"
        file.write_bytes(base64.b64decode(content))
        command = ["generate", "--again", str(file), "--model", str(served), "--out", str(tmp_path / "again")]
        with contextlib.chdir(tmp_path):
            assert run([*command, *options]) == 0
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    assert read_settings(tmp_path / "1.png")["size"] == [4, 8]


def test_a_cut_character_is_not_lost(tmp_path: Path) -> None:
    """Words that end within a character, before a picture and at the end, whole and streamed."""
    start = BYTES.encode("?")[0]
    one = chained(linked(b"ab\xc3", BYTES.boi, start) | linked(b"cd\xe2\x82", BYTES.eos, BYTES.eoi))
    weights, config = one.model.state_dict(), one.model.config
    defaults = GenerationConfig(guidance_scale=1.0)
    save_export(tmp_path / "export", weights, config, one.process.config, BYTES, one.autoencoder, 8, defaults, "")
    body = {"messages": says("?"), "content_format": "parts"}
    with Running(tmp_path / "export") as running:
        parts = running.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
        assert [part.get("text") for part in parts] == ["ab\ufffd", None, "cd\ufffd"]
        lines = running.post("/v1/chat/completions", {**body, "stream": True}).text.split("\n\n")
        deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in lines if line.startswith("data: {")]
        told = ["[]" if "images" in delta else delta.get("content", "") for delta in deltas]
        assert "".join(told) == "ab\ufffd[]cd\ufffd"


def test_openai_edits_as_the_pipeline_does(client: openai.OpenAI, pipe: TransfusionPipeline) -> None:
    content = png()
    picture = PIL.Image.open(io.BytesIO(content))
    reply = client.images.edit(model="small", image=("a.png", content), prompt="make it red", extra_body={"seed": 3})
    assert np.array_equal(pixels(reply.data[0].b64_json), np.asarray(pipe.edit(picture, "make it red", generator=3)))
    half = np.zeros((8, 8, 4), np.uint8)
    half[:, :4, 3] = 255  # OpenAI's masks are drawn where they are transparent
    file = io.BytesIO()
    PIL.Image.fromarray(half).save(file, format="PNG")
    asked = {"seed": 3, "strength": 0.7}
    masked = client.images.edit(
        model="small", image=("a.png", content), mask=("m.png", file.getvalue()), prompt="a crab", extra_body=asked
    )
    found = pixels(masked.data[0].b64_json)
    assert np.array_equal(found[:, :4], np.asarray(picture)[:, :4])
    assert not np.array_equal(found[:, 4:], np.asarray(picture)[:, 4:])


def test_every_mask_means_what_it_means_to_the_pipeline(client: openai.OpenAI, pipe: TransfusionPipeline) -> None:
    """White or transparent, whatever its colours, turned by EXIF: the same bytes as from Python."""
    content, exif = png(seed=4), PIL.Image.Exif()
    exif[274] = 3
    where, colours = np.zeros((8, 8), np.uint8), np.asarray(PIL.Image.open(io.BytesIO(png(seed=5))))
    where[1:3, 2:7] = 255
    for mask in (where, np.dstack([colours, 255 - where]), np.dstack([colours * 0, 255 - where])):
        file = io.BytesIO()
        PIL.Image.fromarray(mask).save(file, format="PNG", exif=exif)
        reply = client.images.edit(
            model="small", image=("a.png", content), mask=("m.png", file.getvalue()), prompt="x", extra_body={"seed": 3}
        )
        ours = pipe("x", image=content, mask_image=file.getvalue(), generator=3).images[0]
        found = pixels(reply.data[0].b64_json)
        assert np.array_equal(found, np.asarray(ours))
        kept = where[::-1, ::-1] == 0
        assert np.array_equal(found[kept], pixels(base64.b64encode(content).decode())[kept])
    file = io.BytesIO()
    PIL.Image.fromarray(where * 0).save(file, format="PNG")
    with pytest.raises(openai.BadRequestError, match="mask: expected a transparent area to redraw"):
        client.images.edit(model="small", image=("a.png", content), mask=("m.png", file.getvalue()), prompt="x")
    with pytest.raises(openai.BadRequestError, match="mask: expected 8x8 pixels, as the image, found 9x9"):
        client.images.edit(model="small", image=("a.png", content), mask=("m.png", png(9)), prompt="x")


def test_openai_chats_in_words_and_pictures(client: openai.OpenAI) -> None:
    content = [{"type": "image_url", "image_url": {"url": data_url(png())}}, {"type": "text", "text": "a crab"}]
    asked = {"model": "small", "messages": [{"role": "user", "content": content}], "max_tokens": 6}
    forced = {"modalities": ["image"], "seed": 1}
    reply = client.chat.completions.create(**asked, extra_body=forced)
    images = reply.choices[0].message.images
    assert len(images) == 1
    parts = client.chat.completions.create(**asked, extra_body={**forced, "content_format": "parts"})
    assert parts.choices[0].message.content[0]["type"] == "image_url"
    back = [*asked["messages"], reply.choices[0].message.model_dump(), *says("and then")]
    assert client.chat.completions.create(**{**asked, "messages": back}).choices[0].message.content is not None


def test_progress_is_told_where_asked_for(server: Running) -> None:
    body = {"messages": says("a crab"), "modalities": ["image"], "max_tokens": 0, "stream": True}
    options = {"include_progress": True, "preview_every": 10}
    for given, expected in ((None, []), (options, [10, 20])):
        lines = server.post("/v1/chat/completions", {**body, "stream_options": given}).text.split("\n\n")
        assert lines[-2] == "data: [DONE]"
        chunks = [json.loads(line[6:]) for line in lines[:-2]]
        assert [chunk["progress"]["step"] for chunk in chunks if "progress" in chunk] == expected
        previews = [chunk["progress"]["preview"] for chunk in chunks if "preview" in chunk.get("progress", {})]
        assert all(pixels(preview.partition(",")[2]).shape == (8, 8, 3) for preview in previews)


# ---- The same bytes, whoever else is there


def test_alone_in_a_crowd_and_beside_those_who_leave(server: Running) -> None:
    asked = [{"prompt": f"a crab {number}", "seed": number, "num_inference_steps": 12} for number in range(8)]

    def drawn(body: dict[str, object]) -> str:
        return server.post("/v1/images/generations", body).json()["data"][0]["b64_json"]

    alone = [drawn(body) for body in asked]
    with ThreadPoolExecutor(16) as crowd:
        leaving = [crowd.submit(leave, server, {"prompt": "x", **LONG}, 0.05 * number) for number in range(6)]
        assert list(crowd.map(drawn, asked)) == alone
        for future in leaving:
            future.result()


def leave(server: Running, body: dict[str, object], after: float, path: str = "/v1/images/generations") -> None:
    """Ask for something, and hang up."""
    host, port = server.url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    with socket.create_connection((host, int(port))) as line:
        head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        line.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        time.sleep(after)


# ---- Mistakes, each named


MISTAKES = [
    ("/v1/chat/completions", {}, "messages: field required"),
    ("/v1/chat/completions", {"messages": []}, "messages: list should have at least 1 item"),
    ("/v1/chat/completions", {"messages": says("")}, "messages: expected some text or a picture"),
    ("/v1/chat/completions", {"messages": says("a"), "temprature": 1}, "temprature: extra inputs are not permitted"),
    ("/v1/chat/completions", {"messages": says("a"), "temperature": 3}, "temperature: input should be less than"),
    ("/v1/chat/completions", {"messages": says("a" * 20_000)}, "prompt: expected at most 256 positions"),
    ("/v1/chat/completions", {"messages": says("\ud800")}, "messages.0.content"),
    ("/v1/chat/completions", {"messages": says("a"), "model": "x"}, "model: expected 'small'"),
    ("/v1/chat/completions", {"messages": says("a"), "size": "7x7", "modalities": ["image"]}, "image size"),
    ("/v1/images/generations", {"prompt": ""}, "prompt: string should have at least 1 character"),
    ("/v1/images/generations", {"prompt": "a", "n": 11}, "n: input should be less than or equal to 10, found '11'"),
    (
        "/v1/images/generations",
        {"prompt": "a", "response_format": "url"},
        "response_format: input should be 'b64_json'",
    ),
    ("/v1/images/generations", {"prompt": "a", "seed": -1}, "seed: input should be greater than or equal to 0"),
    ("/v1/images/generations", {"prompt": "a", "guidance_interval": [0.9, 0.1]}, "guidance_interval: expected shares"),
    ("/v1/images/generations", {"prompt": "a", "size": "64x64"}, "expected at most 256 positions"),
    ("/v1/images/generations", {"prompt": "a", "size": "520x8"}, "expected at most 128 pixels a side"),
]


@pytest.mark.parametrize(("path", "body", "message"), MISTAKES, ids=lambda value: str(value)[:40])
def test_mistakes_are_named(server: Running, path: str, body: dict[str, object], message: str) -> None:
    content = json.dumps(body).encode()
    reply = server.post(path, content=content, headers={"Content-Type": "application/json"})
    found = reply.json()["error"]
    assert message in found["message"]
    assert "\n" not in found["message"]
    assert reply.status_code == (404 if "model" in body else 400)
    assert found["type"] == "invalid_request_error"


@pytest.mark.parametrize("name", IMAGES)
def test_hostile_pictures(server: Running, name: str) -> None:
    """Each is refused with its reason, in both ways in."""
    content = IMAGES[name]()
    url = content if isinstance(content, str) else data_url(content)
    body = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}
    replies = [server.post("/v1/chat/completions", body)]
    if isinstance(content, bytes):
        files = {"image": ("a.png", content)}
        replies.append(server.post("/v1/images/edits", files=files, data={"prompt": "a crab"}))
    for reply in replies:
        assert reply.status_code == 400, reply.text
        message = reply.json()["error"]["message"]
        assert "image" in message
        assert "expected" in message
        assert "Traceback" not in message
    assert len(IMAGES) >= 50


def test_other_paths_and_methods(server: Running) -> None:
    for reply, status in ((server.get("/nothing"), 404), (server.get("/v1/chat/completions"), 405)):
        assert reply.status_code == status
        assert reply.json()["error"]["type"] == "invalid_request_error"
    for body in (b"", b"{", b"[1]", b"\xff\xfe"):
        reply = server.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
        assert reply.status_code == 400
        assert reply.json()["error"]["message"]


# ---- Limits, before anything is read


def declared(server: Running, length: str) -> bytes:
    """The first of the answer to a head that declares a body, before any of it is sent."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as line:
        head = f"POST /v1/images/edits HTTP/1.1\r\nHost: {host}\r\nContent-Length: {length}\r\n\r\n"
        line.sendall(head.encode())
        return line.recv(1000)


def test_too_large_is_said_before_it_is_sent(server: Running) -> None:
    assert declared(server, "9" * 11).startswith(b"HTTP/1.1 413")

    def endless() -> Iterator[bytes]:
        for _ in range(40):
            yield b"x" * 1_000_000

    try:
        reply = httpx.post(server.url + "/v1/chat/completions", content=endless(), timeout=60)
        assert reply.status_code == 413
    except httpx.WriteError:
        pass  # the server hung up while we were still sending


def test_pages_of_others_are_kept_out(server: Running) -> None:
    assert server.get("/v1/models", headers={"Host": "evil.example"}).status_code == 403
    assert server.get("/v1/models", headers={"Origin": "http://evil.example"}).status_code == 403
    assert server.get("/v1/models", headers={"Origin": server.url}).status_code == 200


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
    leave(server, {"prompt": "a crab", "n": 2, **LONG, **body}, after)
    server.wait_for(server.idle, 10)
    assert server.metric("transfuse_network_evaluations") == before  # none of them came to its end


def test_health_ready_metrics(server: Running) -> None:
    assert server.get("/health").json() == {"status": "ok"}
    assert server.get("/ready").json() == {"status": "ready"}
    server.post("/v1/images/generations", {"prompt": "a"})
    assert server.metric("transfuse_images") >= 1
    assert server.metric("transfuse_requests") > 1
    assert "x-request-id" in server.get("/health").headers


# ---- Servers of their own


def test_full_queue_keys_and_draining(served: Path) -> None:
    options = ("--slots", "1", "--max-requests", "2")
    with Running(served, *options, TRANSFUSE_API_KEYS="one,two") as server, ThreadPoolExecutor(4) as crowd:
        key = {"Authorization": "Bearer two"}
        for wrong in ({}, {"Authorization": "Bearer three"}, {"Authorization": "Basic two"}):
            assert server.post("/v1/images/generations", {"prompt": "a"}, headers=wrong).status_code == 401
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="two")
        assert client.models.list().data
        asked = {"prompt": "a crab", "num_inference_steps": 400}
        running = [crowd.submit(server.post, "/v1/images/generations", asked, headers=key) for _ in range(2)]
        server.wait_for(lambda: server.metric("transfuse_running") and server.metric("transfuse_waiting"))
        full = server.post("/v1/images/generations", {"prompt": "a"}, headers=key)
        assert full.status_code == 429
        assert int(full.headers["Retry-After"]) >= 1
        assert "at most 2 requests" in full.json()["error"]["message"]
        server.process.send_signal(signal.SIGTERM)
        server.wait_for(lambda: server.get("/ready").status_code == 503)
        late = server.post("/v1/images/generations", {"prompt": "a"}, headers=key)
        assert late.status_code == 503
        assert [future.result().status_code for future in running] == [200, 200]
        assert server.process.wait(30) in (0, -signal.SIGTERM)


def test_too_costly(served: Path) -> None:
    with Running(served, "--max-cost", "10000") as server:
        assert server.post("/v1/images/generations", {"prompt": "a"}).status_code == 200
        reply = server.post("/v1/images/generations", {"prompt": "a", **LONG})
        assert reply.status_code == 429
        assert "positions" in reply.json()["error"]["message"]
        server.wait_for(server.idle)


def test_the_worker_dies(served: Path) -> None:
    """Those it computed for are told; those that waited are computed by the next one, to the same bytes."""
    with Running(served, "--slots", "2") as server, ThreadPoolExecutor(8) as crowd:
        quick = {"prompt": "a crab", "seed": 5}
        expected = server.post("/v1/images/generations", quick).json()["data"][0]["b64_json"]
        running = [crowd.submit(server.post, "/v1/images/generations", {"prompt": "a", **LONG}) for _ in range(2)]
        server.wait_for(lambda: server.metric("transfuse_running") == 2)
        waiting = [crowd.submit(server.post, "/v1/images/generations", quick) for _ in range(4)]
        server.wait_for(lambda: server.metric("transfuse_waiting") == 4)
        os.kill(server.worker, signal.SIGKILL)
        for future in running:
            assert future.result().status_code == 503
            assert "the worker ended" in future.result().json()["error"]["message"]
        server.wait_for(lambda: server.get("/ready").status_code == 200)
        assert [future.result().json()["data"][0]["b64_json"] for future in waiting] == [expected] * 4
        assert server.metric("transfuse_worker_restarts") == 1


def test_what_a_worker_dies_of_is_not_read_again_and_again() -> None:
    """Of those that no worker has accepted, the first is tried once more, and then told; the others wait on."""
    from transfuse.serving.backend import Backend, QueueConfig, Ticket
    from transfuse.serving.messages import Failed, Job
    from transfuse.serving.metrics import Metrics
    from transfuse.serving.worker import WorkerConfig

    async def deaths() -> None:
        backend = Backend(WorkerConfig("none"), QueueConfig(), Metrics())
        backend._spawn = lambda: None  # type: ignore[method-assign]
        backend.process = SimpleNamespace(exitcode=-9)  # type: ignore[assignment]
        states = {"running": (9, 1.0), "waiting": (9, None), "poison": (0, None), "behind": (0, None)}
        tickets = {
            name: Ticket(number, Job(("a",)), 0.0, cost=cost, started=started)
            for number, (name, (cost, started)) in enumerate(states.items())
        }
        backend.tickets = {ticket.number: ticket for ticket in tickets.values()}
        for gone in (["running"], ["running", "poison"]):
            backend._died()
            assert [name for name, ticket in tickets.items() if ticket.number not in backend.tickets] == gone
        assert all(isinstance(tickets[name].heard[-1], Failed) for name in gone)

    asyncio.run(deaths())


def test_a_server_without_a_model_ends(served: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((served / "config.json").read_bytes())
    command = [sys.executable, "-m", "transfuse", "serve", "--port", "0", "--model"]
    found = subprocess.run([*command, str(broken)], capture_output=True, text=True, timeout=60)
    assert found.returncode == 1
    assert "tokenizer.json" in found.stderr or "expected" in found.stderr
    assert "Traceback" not in found.stderr
    found = subprocess.run([*command, str(tmp_path / "none")], capture_output=True, text=True, timeout=60)
    assert found.returncode == 2
    assert found.stderr.count("\n") == 1


def test_the_http_process_needs_no_torch() -> None:
    asked = "import transfuse.cli.serving as serving; assert serving.is_export(serving.default_model())"
    code = f"import sys, transfuse.serving.server; {asked}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- Long ones


class Crowd:
    """Requests of every kind: good ones, bad ones, those that leave, those that read slowly."""

    WRITE = {"messages": says("a crab"), "modalities": ["text"]}  # noqa: RUF012

    def __init__(self, server: Running) -> None:
        self.server, self.failures = server, []
        self.pictures = [self.draw(seed) for seed in range(4)]
        self.text = server.post("/v1/chat/completions", self.WRITE).json()["choices"]

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
        found = self.server.post("/v1/chat/completions", self.WRITE)
        return "" if found.json()["choices"] == self.text else f"another text: {found.text}"

    def streamed(self, draw: random.Random) -> str:
        seed = draw.randrange(4)
        body = {"prompt": "a crab", "seed": seed, "stream": True, "partial_images": 3}
        last = self.server.post("/v1/images/generations", body).text.split("data: ")[-1]
        return "" if json.loads(last)["b64_json"] == self.pictures[seed] else "another picture"

    def edited(self, draw: random.Random) -> str:
        files = {"image": ("a.png", png(draw.choice([8, 30])))}
        reply = self.server.post("/v1/images/edits", files=files, data={"prompt": "red", "strength": "0.5"})
        return "" if reply.status_code == 200 else reply.text

    def mistaken(self, draw: random.Random) -> str:
        status = self.server.post("/v1/chat/completions", draw.choice(MISTAKES[:4])[1]).status_code
        return "" if status == 400 else f"{status}"

    def huge(self, draw: random.Random) -> str:
        found = declared(self.server, "9" * 11)
        return "" if found.startswith(b"HTTP/1.1 413") else found.decode()

    def leaving(self, draw: random.Random) -> None:
        leave(self.server, {"prompt": "a", **LONG, "stream": draw.random() < 0.5}, draw.random() * 0.3)

    def slow(self, draw: random.Random) -> None:
        body = {"messages": says("a crab"), "stream": True, "stream_options": {"include_progress": True}}
        with httpx.stream("POST", self.server.url + "/v1/chat/completions", json=body, timeout=60) as reply:
            for _ in reply.iter_raw(64):
                time.sleep(0.002)


KINDS = ("drawn", "written", "streamed", "edited", "mistaken", "huge", "leaving", "slow")


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_soak(served: Path, count: int) -> None:
    """Eight at a time. Every good one is answered right, no answer is an error but those asked for, and memory does
    not grow."""
    with Running(served) as server:
        crowd = Crowd(server)
        held: list[tuple[int, int]] = []
        with ThreadPoolExecutor(8) as threads:
            for start in range(0, count, count // 4):
                list(threads.map(crowd, range(start, start + count // 4)))
                server.wait_for(server.idle)
                held.append((memory(server.process.pid), memory(server.worker)))
        assert not crowd.failures
        assert server.metric("transfuse_worker_restarts") == 0
        assert server.metric("transfuse_cancelled") > 0
        if count >= 1000:
            for first, last in zip(held[0], held[-1], strict=True):
                assert last < 1.05 * first, held


def test_small_pieces_are_sent_at_once() -> None:
    """Else the first words of a stream wait 40 ms for an acknowledgement."""
    from transfuse.serving.server import listen

    async def accepted() -> int:
        with listen("127.0.0.1", 0) as listening:
            found = asyncio.get_running_loop().create_future()
            server = await asyncio.start_server(
                lambda reader, writer: found.set_result(writer.get_extra_info("socket")), sock=listening
            )
            _, writer = await asyncio.open_connection(*listening.getsockname())
            option = (await found).getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            writer.close()
            server.close()
            return option

    assert asyncio.run(accepted())
