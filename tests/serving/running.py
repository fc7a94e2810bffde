"""A server in its own process, as a user starts it, and what its clients send."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx2 as httpx
import numpy as np
import PIL.Image
import pytest

T = TypeVar("T")
ADDRESS = re.compile(r"serve: (https?://\S+?)/ ")
LONG = {"num_inference_steps": 1000, "guidance_scale": 3.0}
"""settings of an image that takes the small model seconds"""
PATIENCE = 120.0
"""seconds for a server to start, on a machine with other work"""


class Running:
    """`transfuse serve` with these options, once it is ready; `key` goes with each request."""

    def __init__(self, model: Path, *options: str, key: str = "", **environment: str) -> None:
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        command = [sys.executable, "-m", "transfuse", "serve", "--model", str(model), "--port", "0", *options]
        settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=settings)
        self.log: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.url = self.wait_for(lambda: "".join(ADDRESS.findall("".join(self.log))))
            self.wait_for(lambda: self.get("/ready").status_code == 200)
        except BaseException:
            self.process.kill()
            raise

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.log.extend(iter(self.process.stderr.readline, ""))

    def wait_for(self, condition: Callable[[], T], seconds: float = PATIENCE) -> T:
        """Return what a condition gives, once that is true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := condition():
                return value
            assert self.process.poll() is None, "".join(self.log)
            time.sleep(0.02)
        raise AssertionError(f"not within {seconds} s; the server's log: {''.join(self.log)}")

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60, **{"headers": self.headers, "verify": False, **options})

    def post(self, path: str, body: object = None, **options: Any) -> httpx.Response:
        options = {"headers": self.headers, "verify": False, **options}
        return httpx.post(self.url + path, json=body, timeout=120, **options)

    def metric(self, name: str) -> float:
        """Return the sum of a metric over its labels."""
        lines = self.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if re.match(rf"{name}(_total)?[ {{]", line))

    def idle(self) -> bool:
        return not self.metric("transfuse_running") and not self.metric("transfuse_waiting")

    @property
    def worker(self) -> int:
        """Process number of the worker: of those that the fork server has started, the largest."""
        return max(self.forked, key=memory)

    @property
    def forked(self) -> list[int]:
        """Process numbers of the worker and of those that read bodies."""
        return [forked for child in children(self.process.pid) for forked in children(child)]

    def connect(self, head: str, content: bytes = b"") -> socket.socket:
        """Send the head of a POST request, without its last empty line, and some content; return the connection."""
        host, port = self.url.removeprefix("http://").split(":")
        line = socket.create_connection((host, int(port)), timeout=10)
        line.sendall(f"POST {head}\r\nHost: {host}\r\n\r\n".encode() + content)
        return line

    def leave(self, body: dict[str, object], after: float, path: str = "/v1/images/generations") -> None:
        """Ask for something, and close the connection after some seconds."""
        content = json.dumps(body).encode()
        head = f"{path} HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
        with self.connect(head, content):
            time.sleep(after)

    def declare(self, length: str) -> bytes:
        """Return the first of the response to a head that declares a body, before any of it is sent."""
        with self.connect(f"/v1/images/edits HTTP/1.1\r\nContent-Length: {length}") as line:
            return line.recv(1000)

    def stop(self, number: int = signal.SIGTERM, seconds: float = 30.0) -> int:
        self.process.send_signal(number)
        return self.process.wait(seconds)

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def children(process: int) -> list[int]:
    """Return the numbers of the children of a process, whichever of its threads started them."""
    lists = [task / "children" for task in Path(f"/proc/{process}/task").iterdir()]
    return [int(number) for each in lists for number in each.read_text().split()]


def memory(process: int) -> int:
    """Return the bytes that a process holds."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def processor_seconds(process: int) -> float:
    """Return the seconds that a process has computed."""
    times = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, times)) / os.sysconf("SC_CLK_TCK")


def certificate(folder: Path) -> tuple[Path, Path]:
    """Return the files of a new certificate that is signed by its own key, and of the key."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on this machine")
    names = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2"]
    files = ["-out", str(names[0]), "-keyout", str(names[1])]
    subprocess.run([*command, *files], check=True, capture_output=True)
    return names


def encode(pixels: np.ndarray, **options: Any) -> bytes:
    """Return pixels as a PNG file."""
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, format="PNG", **options)
    return file.getvalue()


def png(side: int = 8, seed: int = 0) -> bytes:
    """Return a PNG file of noise."""
    return encode(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def decode(image: str | bytes) -> np.ndarray:
    """Return the pixels of a file, or of a file in base64."""
    return np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(image) if isinstance(image, str) else image)))


def says(text: str) -> list[dict[str, object]]:
    """Return a user's message."""
    return [{"role": "user", "content": text}]
