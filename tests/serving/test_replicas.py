"""Two servers, and a proxy that keeps a client with one of them: nginx as it is shipped, or a few lines here."""

from __future__ import annotations

import asyncio
import re
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from running import LONG, Running, says

NGINX = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
CONFIG = Path(__file__).parents[2] / "deploy" / "nginx.conf"
CHAT = "/v1/chat/completions"
CLIENTS = [f"127.{number}.0.1" for number in range(1, 9)]
pytestmark = [pytest.mark.xdist_group("serving"), pytest.mark.long]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as line:
        return line.getsockname()[1]


@contextmanager
def nginx(servers: Sequence[Running], folder: Path) -> Iterator[str]:
    """Run nginx with the shipped file, without TLS."""
    port = free_port()
    text = re.sub(r".*(ssl_certificate|server_name).*\n", "", CONFIG.read_text())
    text = text.replace("listen 443 ssl", f"listen 127.0.0.1:{port}")
    for number, server in enumerate(servers):
        text = text.replace(f"127.0.0.1:{8000 + number};", server.url.removeprefix("http://") + ";")
    paths = "".join(f"{name}_temp_path {folder};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    file = folder / "nginx.conf"
    file.write_text(f"daemon off; pid {folder}/pid; events {{}} http {{ access_log off; {paths} {text} }}")
    with subprocess.Popen([str(NGINX), "-c", str(file), "-e", str(folder / "errors")]) as process:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


@contextmanager
def small(servers: Sequence[Running], folder: Path) -> Iterator[str]:
    """Pass connections on by the client's address, and to the other server if the first does not accept any."""
    addresses = [server.url.removeprefix("http://").split(":") for server in servers]
    started, loop = threading.Event(), asyncio.new_event_loop()
    port = free_port()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await reader.read(65_536):
            writer.write(piece)
            await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = int(writer.get_extra_info("peername")[0].split(".")[1]) % 2
        for host, number in (addresses[first], addresses[1 - first]):
            try:
                server = await asyncio.open_connection(host, int(number))
            except OSError:
                continue
            await asyncio.gather(copy(reader, server[1]), copy(server[0], writer), return_exceptions=True)
            return

    async def run() -> None:
        await asyncio.start_server(serve, "127.0.0.1", port)
        started.set()

    thread = threading.Thread(target=lambda: (loop.create_task(run()), loop.run_forever()), daemon=True)
    thread.start()
    started.wait()
    yield f"http://127.0.0.1:{port}"
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


@pytest.mark.parametrize("proxy", [pytest.param(nginx, marks=pytest.mark.skipif(not NGINX, reason="no nginx")), small])
def test_two_servers_are_one(served: Path, tmp_path: Path, proxy: Any) -> None:
    """Conversations stay with a server, replies do not depend on which, streams flow, and one may stop."""
    options = ("--slots", "2", "--drain", "200")
    with Running(served, *options) as left, Running(served, *options) as right:
        servers = [left, right]
        with proxy(servers, tmp_path) as url:

            def ask(client: str, path: str, body: dict[str, Any]) -> httpx.Response:
                transport = httpx.HTTPTransport(local_address=client)
                with httpx.Client(transport=transport, timeout=120) as line:
                    return line.post(url + path, json=body)

            def tokens() -> list[float]:
                return [server.metric("transfuse_text_tokens") for server in servers]

            wait = httpx.HTTPTransport(retries=5)
            httpx.Client(transport=wait).get(url + "/health")
            place, texts = {}, {}
            for client in CLIENTS:
                messages, went = says("a crab"), set()
                for _ in range(3):
                    before = tokens()
                    reply = ask(client, CHAT, {"messages": messages, "modalities": ["text"], "max_tokens": 6})
                    text = reply.json()["choices"][0]["message"]["content"]
                    went |= {
                        number for number, (old, new) in enumerate(zip(before, tokens(), strict=True)) if new > old
                    }
                    messages = [*messages, {"role": "assistant", "content": text}, *says("a moon")]
                (place[client],) = went
                texts[client] = str(messages)
            assert set(place.values()) == {0, 1}
            assert len(set(texts.values())) == 1

            body = {"messages": says("a"), "modalities": ["text"], "max_tokens": 60, "temperature": 1.0, "stream": True}
            with httpx.stream("POST", url + CHAT, json=body, timeout=60) as stream:
                assert len([*stream.iter_raw()]) > 5  # not all at the end

            client = next(client for client in CLIENTS if place[client] == 0)
            with ThreadPoolExecutor(1) as crowd:
                drawn = crowd.submit(ask, client, "/v1/images/generations", {"prompt": "a crab", **LONG, "seed": 1})
                left.wait_for(lambda: left.metric("transfuse_running") == 1)
                left.process.send_signal(signal.SIGTERM)
                if proxy is nginx:  # it asks the other server while the first one finishes
                    left.wait_for(lambda: left.get("/ready").status_code == 503)
                    assert ask(client, CHAT, {"messages": says("a"), "max_tokens": 1}).status_code == 200
                assert drawn.result().status_code == 200
            left.process.wait(60)
            assert ask(client, CHAT, {"messages": says("a"), "max_tokens": 1}).status_code == 200
