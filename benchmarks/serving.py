"""A server under load: text-then-image requests that arrive at random (open loop, Poisson), at several rates.

    python benchmarks/serving.py MODEL [--rates 0.5,1,2,4] [--seconds 60] [--out FILE] [--plot FILE.png]
    python benchmarks/serving.py MODEL --quick                               # a try of half a minute, no measurement
    python benchmarks/serving.py --url http://host:8000 [--key KEY]          # a server that runs

Open loop: a request is sent when its time has come, however many others have not ended, as users do. Each writes and
then draws for the same prompt, streamed. Percentiles are in milliseconds:

    first token         from sending to the first text
    token               between two texts
    first preview       from sending to the first preview of the image
    denoising step      between two previews, divided by their steps
    end                 from sending the first to the last byte of the second

Per rate also: requests sent, refused (429, 503) and failed, and what the server made, texts and images a second. Run it
on a quiet machine, from another one if the server uses all of its processor.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx

Samples = dict[str, list[float]]
MEASURES = ("first token", "token", "first preview", "denoising step", "end")


def bodies(number: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a request that writes, and one that draws for the same prompt."""
    common = {"messages": [{"role": "user", "content": f"crab {number}:"}], "seed": number, "stream": True}
    yield {**common, "modalities": ["text"], "max_tokens": options.tokens, "temperature": 1.0}
    progress = {"include_progress": True, "preview_every": options.preview_every}
    yield {**common, "modalities": ["image"], "max_tokens": 0, "stream_options": progress}


async def send(client: httpx.AsyncClient, number: int, options: argparse.Namespace, samples: Samples) -> str:
    """Write and then draw, and add the times; return how it ended: done, refused or failed."""
    began = time.perf_counter()
    for content in bodies(number, options):
        sent = time.perf_counter()
        try:
            async with client.stream("POST", "/v1/chat/completions", json=content) as reply:
                if reply.status_code != 200:
                    return "refused" if reply.status_code in (429, 503) else "failed"
                if not await read(reply, samples, sent):
                    return "failed"
        except httpx.HTTPError:
            return "failed"
    samples["end"].append(time.perf_counter() - began)
    return "done"


async def read(reply: httpx.Response, samples: Samples, began: float) -> bool:
    """Add the times of a stream that was asked for at `began`; return False if it ends with an error."""
    last, taken = began, 0  # when the last part came, and the denoising steps that were taken by then
    begun: set[str] = set()
    async for line in reply.aiter_lines():
        if line.startswith("event: error"):
            return False
        if not line.startswith("data: {"):
            continue
        chunk, now = json.loads(line[6:]), time.perf_counter()
        delta = chunk["choices"][0]["delta"] if chunk.get("choices") else {}
        progress = chunk.get("progress", {})
        if delta.get("content"):
            samples["token" if "text" in begun else "first token"].append(now - last)
            samples["tokens"].append(1)
            begun.add("text")
        elif progress:
            if taken:
                samples["denoising step"].append((now - last) / (progress["step"] - taken))
            taken = progress["step"]
            if "preview" in progress and "preview" not in begun:
                samples["first preview"].append(now - began)
                begun.add("preview")
        elif delta.get("images"):
            samples["images"].append(1)
        else:
            continue
        last = now
    return True


async def load(url: str, rate: float, options: argparse.Namespace) -> dict[str, Any]:
    """Send requests at a mean rate a second, for some seconds, and wait for the last; return what was measured."""
    samples: Samples = defaultdict(list)
    draw, headers = random.Random(rate), {"Authorization": f"Bearer {options.key}"} if options.key else {}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, headers=headers, limits=limits) as client:
        began, due = time.perf_counter(), 0.0
        tasks: list[asyncio.Task[str]] = []
        while (due := due + draw.expovariate(rate)) < options.seconds:
            await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
            tasks.append(asyncio.create_task(send(client, len(tasks), options, samples)))
        ends = [await task for task in tasks]
        seconds = time.perf_counter() - began
    result: dict[str, Any] = {"rate": rate, "sent": len(ends), "seconds": seconds}
    result |= {end: ends.count(end) for end in ("done", "refused", "failed")}
    result |= {f"{kind} a second": sum(samples[kind]) / seconds for kind in ("tokens", "images")}
    return result | {kind: percentiles(samples[kind]) for kind in MEASURES}


def percentiles(seconds: list[float]) -> dict[str, float] | None:
    """Return p50, p90 and p99 in milliseconds; None without samples."""
    if len(seconds) < 2:
        return {"p50": 1000 * seconds[0]} if seconds else None
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {f"p{share}": 1000 * cuts[share - 1] for share in (50, 90, 99)}


@contextmanager
def serving(model: Path | None, extra: list[str]) -> Iterator[str]:
    """Serve a model in a separate process, and give its address once it is ready."""
    command = [sys.executable, "-m", "transfuse", "serve", "--port", "0", *extra]
    command += [] if model is None else ["--model", str(model)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            url = next(line.split("serve: ")[1].split()[0] for line in server.stderr if "serve: http" in line)
            while httpx.get(url + "ready").status_code != 200:
                time.sleep(0.2)
            yield url.rstrip("/")
        finally:
            server.terminate()


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Draw each measure by rate: p50 as a line, up to p99 as an area; and what was made a second."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(12, 6.5), layout="constrained")
    rates = [result["rate"] for result in results]
    for axis, kind in zip(axes.flat, MEASURES, strict=False):
        known = [(rate, result[kind]) for rate, result in zip(rates, results, strict=True) if result[kind]]
        if known:
            xs, low = [rate for rate, _ in known], [each["p50"] for _, each in known]
            axis.plot(xs, low, marker="o", label="p50")
            axis.fill_between(xs, low, [each.get("p99", each["p50"]) for _, each in known], alpha=0.2, label="to p99")
        axis.set(title=kind, xlabel="requests a second", ylabel="ms", ylim=(0, None))
    axes.flat[0].legend()
    for kind in ("tokens", "images"):
        values = [result[f"{kind} a second"] for result in results]
        axes.flat[5].plot(rates, values, marker="o", label=kind)
    axes.flat[5].set(title="made a second", xlabel="requests a second", yscale="symlog")
    axes.flat[5].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--url")
    parser.add_argument("--key")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rates", default="0.5,1,2,4")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--preview-every", type=int, default=5)
    parser.add_argument("--serve", default="", help="options of transfuse serve, in one string")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.rates, options.seconds, options.tokens = "1,2", 6.0, 8

    def measure(url: str) -> list[dict[str, Any]]:
        results = []
        for rate in map(float, options.rates.split(",")):
            results.append(asyncio.run(load(url, rate, options)))
            print(json.dumps(results[-1]), flush=True)
        return results

    if options.url:
        results = measure(options.url.rstrip("/"))
    else:
        with serving(options.model, options.serve.split()) as url:
            results = measure(url)
    if options.out:
        settings = {name: str(value) for name, value in vars(options).items() if name != "key"}
        written = {"settings": settings, "machine": platform.processor() or platform.machine(), "results": results}
        options.out.write_text(json.dumps(written, indent=1) + "\n")
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
