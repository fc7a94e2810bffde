"""Access, the fields of requests, and options of operators, without a model."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from fastapi import Request
from fastapi.testclient import TestClient
from running import data_url, png, says

from transfuse.cli import run
from transfuse.errors import UserError
from transfuse.log import logger, set_format
from transfuse.serving.app import build
from transfuse.serving.engine_client import EngineClient, QueueConfig
from transfuse.serving.intake import parse, read
from transfuse.serving.middleware import AccessConfig, Key, Middleware, address_of, read_keys
from transfuse.serving.protocol import ChatRequest, ImagesRequest, validate
from transfuse.serving.server import ServerConfig, read_certificate
from transfuse.serving.worker import WorkerConfig

MODEL = {"name": "small", "steps": 20, "image_size": 8, "images": "latents", "context": 256, "max_characters": 2560}
CHAT = {"messages": says("a")}


def message(content: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": content}]}


class Idle:
    """A worker's process that describes a model, and then does nothing."""

    exitcode = 0

    def __init__(self) -> None:
        self.pipe: Connection | None = None

    def __call__(self, config: WorkerConfig) -> tuple[Idle, Connection]:
        ours, self.pipe = Pipe()
        self.pipe.send(MODEL)
        return self, ours

    def join(self, seconds: float) -> None:
        pass

    def is_alive(self) -> bool:
        return self.pipe is not None

    def kill(self) -> None:
        assert self.pipe is not None
        self.pipe.close()


@contextmanager
def served(aliases: tuple[str, ...] = (), **access: Any) -> Iterator[TestClient]:
    client = EngineClient(WorkerConfig("none"), QueueConfig(), Idle())
    with TestClient(build(client, lambda: AccessConfig(**access), aliases), base_url="http://localhost") as http:
        while http.get("/ready", headers={"Host": "localhost"}).status_code != 200:
            pass
        yield http


def test_host_names_are_those_of_rfc_9110() -> None:
    right = ("localhost", "LOCALHOST", "localhost:8000", "127.0.0.1:1", "[::1]", "[::1]:80", "localhost.", "LocalHost:")
    evil = ("evil.example", "localhost.evil.example", "127.0.0.2", "[::2]")
    broken = ("localhost@evil.example", "127.0.0.1:80@evil.example", "localhost/a", "localhost:80:80", "[::1", "a b")
    with served() as http:
        for hosts, status in ((right, 200), (evil, 403), (broken, 400)):
            for host in hosts:
                assert http.get("/v1/models", headers={"Host": host}).status_code == status, host
    with served(hosts=()) as http:
        assert http.get("/v1/models", headers={"Host": "any.example"}).status_code == 200
        assert http.get("/v1/models", headers={"Host": "a@b"}).status_code == 400


def test_keys_are_bearer_tokens() -> None:
    keys = (Key("anna", "first"), Key("bert", "s\u00e9cret"))
    with served(keys=keys) as http:
        for value, status in {
            "Bearer first": 200, "bearer first": 200, "BEARER   first ": 200, "Bearer s\u00e9cret".encode(): 200,
            "first": 401, "Basic first": 401, "Bearer": 401, "Bearer first second": 401, "Bearerfirst": 401, "": 401,
        }.items():  # fmt: skip
            assert http.get("/v1/models", headers={"Authorization": value}).status_code == status, value
        for path in ("/metrics", "/openapi.json", "/v1/models", "/nothing"):
            assert http.get(path).status_code == 401
            assert http.get(path).headers["WWW-Authenticate"] == "Bearer"
        for path in ("/", "/health", "/ready"):
            assert http.get(path).status_code == 200


def test_files_of_keys(tmp_path: Path) -> None:
    lines, table = tmp_path / "keys", tmp_path / "keys.toml"
    lines.write_text("# ours\nanna:a:b\n\nbert: x\n")
    assert read_keys(lines, "c,name:d") == (
        Key("key 1", "c"), Key("name", "d"), Key("anna", "a:b"), Key("bert", "x")
    )  # fmt: skip
    table.write_text('[anna]\nkey = "a"\nrequests = 3\n')
    assert read_keys(table) == (Key("anna", "a", requests=3),)
    for text, message in (
        ("anna", "line 1: expected name:key"),
        ("a:x\nb:x", "different key"),
        ("a:x\na:y", "different name"),
    ):
        lines.write_text(text)
        with pytest.raises(UserError, match=message):
            read_keys(lines)
    table.write_text('[anna]\nkey = "a"\nrate = 3\n')
    with pytest.raises(UserError, match='unknown setting "rate"'):
        read_keys(table)
    with pytest.raises(UserError, match="no readable file"):
        read_keys(tmp_path / "none")


def test_a_list_of_keys_without_any_lets_nobody_in(tmp_path: Path) -> None:
    """Only where no list is given is a server open."""
    assert read_keys(None) == read_keys(None, "") == ()
    lines, table = tmp_path / "keys", tmp_path / "keys.toml"
    for text in ("", "\n\n", "# anna:a\n"):
        for file in (lines, table):
            file.write_text(text)
            with pytest.raises(UserError, match="expected at least one key, found none"):
                read_keys(file)
    for environment in (",", " , ", "# none"):
        with pytest.raises(UserError, match=r"^TRANSFUSE_API_KEYS: expected at least one key"):
            read_keys(None, environment)
    assert read_keys(lines, "a") == (Key("key 1", "a"),)


def test_a_body_of_a_byte_now_and_then_is_a_slow_one() -> None:
    """Each piece comes in time, and all of them too slowly; another of many bytes may take as long."""

    def send(piece: bytes, count: int) -> tuple[int | None, float]:
        statuses: list[int] = []
        sent = 0

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await Request(scope, receive).body()
            await send({"type": "http.response.start", "status": 200, "headers": []})

        async def receive() -> dict[str, Any]:
            nonlocal sent
            await asyncio.sleep(0.1)
            sent += 1
            return {"type": "http.request", "body": piece, "more_body": sent < count}

        async def answer(message: dict[str, Any]) -> None:
            statuses.extend([message["status"]] if "status" in message else [])

        client = EngineClient(WorkerConfig("none"), QueueConfig())
        middleware = Middleware(app, client, lambda: AccessConfig(hosts=(), patience=0.5))
        scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
        began = time.monotonic()
        asyncio.run(asyncio.wait_for(middleware(scope, receive, answer), 30))
        return statuses[0] if statuses else None, time.monotonic() - began

    status, seconds = send(b"a", 100)
    assert status == 408
    assert seconds < 5
    assert send(b"a" * 10_000, 15)[0] == 200


def test_an_ipv6_network_is_one_client() -> None:
    assert address_of("2001:db8::1") == address_of("2001:db8::ffff:1") != address_of("2001:db8:0:1::1")
    assert address_of("10.0.0.1") != address_of("10.0.0.2")


def test_pages_of_other_sites() -> None:
    site = {"Origin": "https://chat.example"}
    preflight = {**site, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    with served(origins=("https://chat.example",), keys=(Key("a", "x"),)) as http:
        reply = http.options("/v1/chat/completions", headers=preflight)
        assert reply.status_code == 200
        assert reply.headers["access-control-allow-origin"] == "https://chat.example"
        refused = http.post("/v1/chat/completions", json=CHAT, headers=site)
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://chat.example")
        assert http.get("/health", headers={"Origin": "https://evil.example"}).status_code == 403
    with served() as http:
        assert http.get("/health", headers=site).status_code == 403
        assert http.get("/health", headers={"Origin": "http://LOCALHOST"}).status_code == 200


def test_a_root_path_and_an_alias() -> None:
    with served(("gpt-4o", "openai/gpt-4o"), root_path="/transfuse") as http:
        for prefix in ("", "/transfuse"):
            assert "<title>Transfuse</title>" in http.get(prefix or "/").text
            names = [model["id"] for model in http.get(f"{prefix}/v1/models").json()["data"]]
            assert names == ["small", "gpt-4o", "openai/gpt-4o"]
            for name in names:
                assert http.get(f"{prefix}/v1/models/{name}").json()["id"] == name
        assert http.post("/v1/chat/completions", json={**CHAT, "model": "gpt-5"}).status_code == 404


def test_head_is_answered() -> None:
    with served() as http:
        for path in ("/", "/health", "/metrics", "/v1/models"):
            assert http.head(path).status_code == 200
        assert http.head("/v1/chat/completions").status_code == 405


def test_a_line_of_the_log_names_what_happened(capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(logger.handlers[0].format(record))

    set_format("json")
    keep = Keep()
    logger.addHandler(keep)
    try:
        with served(keys=(Key("anna", "x"),)) as http:
            reply = http.post("/v1/chat/completions", content=b"{secret", headers={"Authorization": "Bearer x"})
    finally:
        logger.removeHandler(keep)
        logger.handlers[0].setFormatter(None)
    line = next(json.loads(line) for line in lines if "chat" in line)
    assert line["request_id"] == reply.headers["x-request-id"]
    assert (line["level"], line["key"], line["method"], line["status"]) == ("info", "anna", "POST", 400)
    assert line["route"] == "/v1/chat/completions"
    assert {"time", "tokens", "images", "ms"} <= line.keys()
    assert "secret" not in json.dumps(line)


def test_values_that_say_nothing_pass() -> None:
    silent = {
        "stop": None, "presence_penalty": 0, "frequency_penalty": 0.0, "tools": [], "tool_choice": "auto", "n": 1,
        "logprobs": False, "top_logprobs": None, "logit_bias": {}, "response_format": {"type": "text"}, "store": False,
        "service_tier": "auto", "metadata": {"a": "b"}, "user": "u", "parallel_tool_calls": True, "functions": None,
        "seed": None, "stream": None, "stream_options": None, "reasoning_effort": "none", "audio": None,
        "prediction": None, "max_tokens": None, "temperature": None, "modalities": ["text"], "unheard_of": None,
        "top_k": -1, "min_p": 0.0, "repetition_penalty": 1, "best_of": 1, "echo": False,
        "prompt_cache_retention": "24h",
    }  # fmt: skip
    body = validate(ChatRequest, {**CHAT, **silent})
    settings = body.job(["a"]).settings
    neutral = {"presence_penalty": 0, "frequency_penalty": 0}
    assert settings == {"seed": settings["seed"], "draw": "never", "max_images": 1, "reuse": False, **neutral}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tools": [{}]}, "tools: expected none, which this server does not support, found a list"),
        ({"logit_bias": {"5": 1}}, "logit_bias: expected none"),
        ({"response_format": {"type": "json_object"}}, "response_format: expected none"),
        ({"tool_choice": "required"}, "tool_choice: expected none"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls: expected none"),
        ({"top_k": 40}, "top_k: expected none"),
        ({"repetition_penalty": 1.1}, "repetition_penalty: expected none"),
        ({"seed": "5"}, "seed: expected an integer, found '5'"),
        ({"seed": True}, "seed: expected an integer, found True"),
        ({"seed": 2**63}, "seed: expected less than 9223372036854775808, found 9223372036854775808"),
        ({"stream": "yes"}, "stream: expected a boolean, found 'yes'"),
        ({"stop": ["a", 5]}, "stop.1: expected a string, found 5"),
        ({"stop": [""]}, "stop.0: expected at least 1 character, found 0"),
        ({"stop": list("abcde")}, "stop: expected at most 4 items, found 5"),
        ({"size": "8X8"}, "size: expected auto, or columns and rows such as 64x64, found '8X8'"),
        ({"guidance_interval": [0.5]}, "guidance_interval: expected at least 2 items, found 1"),
        ({"temperature": float("nan")}, "temperature: expected a finite number, found nan"),
        ({"top_logprobs": 21}, "top_logprobs: expected less than or equal to 20, found 21"),
        (message([{"type": "text", "text": 5}]), "messages.0.content.0.text: expected a string, found 5"),
        (
            message([{"type": "image_url", "image_url": "a"}]),
            "messages.0.content.0.image_url: expected an object, found 'a'",
        ),
        (
            message([{"type": "video"}]),
            "messages.0.content.0.type: expected 'text' or 'image_url', found 'video'",
        ),
        (
            message([{"type": "text", "text": "a"}, {"text": "a"}]),
            "messages.0.content.1.type: expected 'text' or 'image_url', found none",
        ),
        (message([5]), "messages.0.content.0: expected an object, found 5"),
        (message(5), "messages.0.content: expected text or a list, found 5"),
        ({"stop": 5}, "stop: expected text or a list, found 5"),
        (
            {"messages": [*says("a"), {"role": "tool"}]},
            "messages.1.role: expected 'system', 'developer', 'user' or 'assistant', found 'tool'",
        ),
        ({"messages": ["a"]}, "messages.0: expected an object, found 'a'"),
        ({"messages": None}, "messages: expected a value, found none"),
        ({"stream_options": {"include": 1}}, "stream_options.include: unknown field"),
        ({"top_logprobs": 3}, "top_logprobs: expected logprobs to be true with it, found None"),
        ({"top_logprobs": 3, "logprobs": False}, "top_logprobs: expected logprobs to be true with it, found False"),
        ({"a\nb": 1}, r"'a\nb': unknown field"),
        ({"stream_options": {"a\r\nb: c": 1}}, r"stream_options.'a\r\nb: c': unknown field"),
        ({"a" * 100_000: 1}, f"'{'a' * 59}: unknown field"),
    ],
    ids=str,
)  # fmt: skip
def test_mistakes_name_the_field_in_one_plain_line(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as wrong:
        validate(ChatRequest, {**CHAT, **values})
    line = str(wrong.value)
    assert line.startswith(message)
    assert "\n" not in line
    assert len(line) < 300
    for inside in ("function-", "Input", "Value error", "pydantic", "tagged-union", "ImageURL"):
        assert inside not in line


def test_settings_of_images_that_change_nothing_pass() -> None:
    """A PNG loses nothing however it is compressed."""
    for given in ({"output_compression": 100}, {"output_format": "png", "background": "opaque", "quality": "high"}):
        validate(ImagesRequest, {"prompt": "a", **given})
    with pytest.raises(UserError, match=r"^output_compression: expected 100, found 50$"):
        validate(ImagesRequest, {"prompt": "a", "output_compression": 50})
    validate(ChatRequest, {**CHAT, "top_logprobs": 0})
    validate(ChatRequest, {**CHAT, "logprobs": True, "top_logprobs": 3})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "body: expected JSON, found a mistake at line 1 column 1"),
        (b'{"a": 1,\n "b": }', "body: expected JSON, found a mistake at line 2 column 7"),
        (b"[1]", "body: expected a JSON object, found list"),
        (b"\xff\xfe", "body: expected JSON"),
        (b'{"prompt": "\xff"}', "body: expected JSON in UTF-8"),
        (b"[" * 100_000, "body: expected JSON in UTF-8, found something else (nested too deeply)"),
        (b"[" + b"[]," * 1_000_000, "body: expected at most 1000000 values, found more"),
        (b'{"n": ' + b"9" * 10_000 + b"}", "body: expected JSON in UTF-8"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_broken_json_has_its_place(body: bytes, message: str) -> None:
    for content_type in ("", "application/json", "application/x-www-form-urlencoded"):
        with pytest.raises(UserError) as wrong:
            parse("images", content_type, body)
        assert str(wrong.value).startswith(message)
        assert "\n" not in str(wrong.value)


def test_any_content_type_is_json_but_a_forms() -> None:
    body = json.dumps({"prompt": "a"}).encode()
    for content_type in ("", "text/plain", "application/x-www-form-urlencoded"):
        assert isinstance(parse("images", content_type, body), ImagesRequest)
    with pytest.raises(UserError, match="body: expected JSON, found multipart/form-data"):
        parse("images", "multipart/form-data; boundary=a", body)
    with pytest.raises(UserError, match="body: expected multipart/form-data, found no content type"):
        parse("edits", "", body)


def test_texts_and_pictures_that_no_model_could_read_are_refused_before_any_work() -> None:
    long = json.dumps({"messages": says("a" * 2000) * 2}).encode()
    error = read("chat", "", [long[:1000], long[1000:]], MODEL)
    assert str(error).startswith("messages: prompt: expected at most 256 positions, so at most 2560 characters")
    parts = [{"type": "image_url", "image_url": {"url": data_url(png())}}] * 17
    many = json.dumps({"messages": [{"role": "user", "content": parts}]}).encode()
    assert "expected at most 16 images in a request, found 17" in str(read("chat", "", [many], MODEL))
    single = json.dumps({"messages": [{"role": "user", "content": parts[:1]}]}).encode()
    assert "the model knows no images" in str(read("chat", "", [single], {**MODEL, "images": "none"}))
    accepted = read("chat", "", [single], MODEL)
    assert not isinstance(accepted, UserError)
    assert [part.shape for part in accepted[1][0].parts if not isinstance(part, str)] == [(8, 8, 3)]


def test_options_that_cannot_be_met(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "serve.toml"
    config.write_text("slts = 4\n")
    for words, message in (
        (["--config", str(config)], 'unknown setting "slts"; did you mean "slots"?'),
        (["--tls-key", "a.pem"], "--tls-cert: expected a certificate with --tls-key"),
        (["--client-share", "0"], "--client-share: expected above 0"),
    ):
        assert run(["serve", *words]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    config.write_text("slots = 0\n")
    assert run(["serve", "--config", str(config)]) == 2
    assert "--slots: expected above 0, found 0" in capsys.readouterr().err
    (tmp_path / "cert.pem").write_text("none")
    with pytest.raises(UserError, match="expected a certificate and its key in PEM"):
        read_certificate(ServerConfig(cert=tmp_path / "cert.pem"))
