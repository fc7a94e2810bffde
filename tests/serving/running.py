"""A server in a process of its own, as a user starts it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2 as httpx

REPOSITORY = Path(__file__).parents[2]


class Running:
    """`transfuse serve` with these options, once it is ready."""

    def __init__(self, model: Path, *options: str, **environment: str) -> None:
        command = [sys.executable, "-m", "transfuse", "serve", "--model", str(model), "--port", "0", *options]
        settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=settings)
        self.log: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.url = self.wait_for(lambda: next((found[0] for line in self.log if (found := _URL.findall(line))), ""))
            self.wait_for(lambda: self.get("/ready").status_code == 200)
        except BaseException:
            self.process.kill()
            raise

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.log.extend(iter(self.process.stderr.readline, ""))

    def wait_for(self, condition, seconds: float = 60.0):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if found := condition():
                return found
            assert self.process.poll() is None, "".join(self.log)
            time.sleep(0.02)
        raise AssertionError(f"not within {seconds} s; the server said: {''.join(self.log)}")

    def get(self, path: str, **options) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60, **options)

    def post(self, path: str, body: object = None, **options) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=120, **options)

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = self.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if re.match(rf"{name}(_total)?[ {{]", line))

    def idle(self) -> bool:
        return not self.metric("transfuse_running") and not self.metric("transfuse_waiting")

    @property
    def worker(self) -> int:
        """Process number of the worker: the child that has torch in it."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return max(map(int, children), key=lambda child: memory(child))

    def stop(self, number: int = signal.SIGTERM, seconds: float = 30.0) -> int:
        self.process.send_signal(number)
        return self.process.wait(seconds)

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


_URL = re.compile(r"serve: (http://\S+?)/ ")


def memory(process: int) -> int:
    """Bytes that a process holds."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
