"""A server's waiting times, as clients see them: to the first text, the first preview, the end; p50 and p95.

    python benchmarks/serving.py MODEL [--requests 96] [--out FILE]

One client, then eight at a time, half of them drawing (guided, the model's own steps, three previews), half writing 32
tokens, all streamed over loopback; beside them the same drawings without HTTP, by the pipeline, in this process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx2 as httpx


def ask(client: httpx.Client, url: str, number: int) -> dict[str, float]:
    """Seconds to what a request hears first, and to its end."""
    draws = number % 2 == 0
    if draws:
        path = "/v1/images/generations"
        body = {"prompt": f"a crab {number}", "seed": number, "stream": True, "partial_images": 3}
    else:
        path = "/v1/chat/completions"
        messages = [{"role": "user", "content": f"crab {number}:"}]
        body = {"messages": messages, "modalities": ["text"], "max_tokens": 32, "temperature": 1.0, "stream": True}
    began, found = time.perf_counter(), {}
    with client.stream("POST", url + path, json=body) as reply:
        assert reply.status_code == 200, reply.status_code
        for line in reply.iter_lines():
            if line.startswith("data: ") and not found:
                found["first preview" if draws else "first text"] = time.perf_counter() - began
    found["picture" if draws else "text"] = time.perf_counter() - began
    return found


def summary(found: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Milliseconds: p50 and p95 of each kind."""
    kinds = sorted({kind for one in found for kind in one})
    values = {kind: sorted(1000 * one[kind] for one in found if kind in one) for kind in kinds}
    return {
        kind: {"p50": statistics.median(those), "p95": those[int(0.95 * (len(those) - 1))]}
        for kind, those in values.items()
    }


def pipeline(model: Path, count: int) -> float:
    """Milliseconds of a drawing without HTTP, the median."""
    import transfuse

    pipe = transfuse.load(str(model))
    pipe("a crab")
    seconds = []
    for number in range(count):
        began = time.perf_counter()
        pipe(f"a crab {number}", generator=number)
        seconds.append(time.perf_counter() - began)
    return 1000 * statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    command = [sys.executable, "-m", "transfuse", "serve", "--model", str(asked.model), "--port", "0"]
    found: dict[str, object] = {}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            url = next(line.split()[1].rstrip("/") for line in server.stderr if line.startswith("serve: http"))
            while httpx.get(url + "/ready").status_code != 200:
                time.sleep(0.1)
            for clients in (1, 8):
                began = time.perf_counter()
                # One client for all: making one costs tens of milliseconds, which are not the server's.
                with httpx.Client(timeout=300) as client, ThreadPoolExecutor(clients) as crowd:
                    work = partial(ask, client, url)
                    work(0)
                    times = list(crowd.map(work, range(asked.requests)))
                rate = asked.requests / (time.perf_counter() - began)
                found[f"{clients} at a time"] = {"requests a second": rate, **summary(times)}
        finally:
            server.terminate()
    found["pipeline, a drawing"] = pipeline(asked.model, 10)
    print(json.dumps(found, indent=1))
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
