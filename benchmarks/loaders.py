"""Data sets in training, beside other loaders: documents a second, memory, start-up of a large index; also builds.

    pip install 'webdataset>=1.0,<2' 'datasets>=4,<6' 'grain>=0.2.18,<0.3'                         # each is optional
    python benchmarks/loaders.py --folder /tmp/loaders [--rounds 5] [--count 20000] [--only A] [--json FILE]
    python benchmarks/loaders.py --folder /tmp/loaders --quick --rounds 1                          # does it run?

The sets are built in --folder, or taken from there. Each reading is made in a process of its own, forked from this one,
which computes nothing; the order is rotated from round to round; medians are given with their ranges, ratios are taken
within a round. The last line of the output is JSON. Measure on a quiet machine.

*Equal work* in A: all read the same tars, out of the page cache, shuffle, decode PNG with `decode_image`, tokenise with
the set's tokenizer, scale as `Pixels` does, on one thread a process, and hand over 32 documents at a time. Latents of a
batch are one tensor, the fastest way out of torch's workers (32 tensors would be 32 shared files). What differs: ours,
Arrow and Grain shuffle the whole set, the streams a buffer of 1,000; ours, and Grain, which reads through our DataSet,
check the hash of each document. Building a pipeline and starting its workers is in "first batch", importing is not,
but for Grain's workers, which are spawned. Of the ways tried for each peer the fastest is here: for Hugging Face the
work in `collate_fn`, not `map`; for Grain no threads, and two threads as a row of its own.
"""

from __future__ import annotations

import os
import shutil

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # datasets would ask the hub for a module that it brings itself

import argparse
import gc
import io
import json
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch.utils.data import DataLoader

from transfuse.autoencoders import Pixels
from transfuse.data import DataSet, Packer, PairConfig, StepLoader, StoredImages
from transfuse.data.building import build_set
from transfuse.data.building.prepare import BuildConfig
from transfuse.data.dataset import DOCUMENT, IMAGE
from transfuse.data.members import to_tar
from transfuse.data.readers import Columns
from transfuse.devices import keep_freed_memory
from transfuse.images import decode_image
from transfuse.log import logger
from transfuse.recipes import Recipe, preset
from transfuse.runs import open_run, resolve
from transfuse.sequence import Image, Text, Tokenizer
from transfuse.train import build_loader, build_trainer
from transfuse.training.metrics import read_metrics

BATCH, BUFFER, RANKS = 32, 1000, 8
PREFETCH = 4  # batches that each of torch's workers is ahead, as StepLoader's are
AT_WORK: dict[int, dict[str, Any]] = {0: {"num_workers": 0}, 2: {"num_workers": 2, "prefetch_factor": PREFETCH}}
# warm: batches before the clock starts; by then all workers are up, and the buffers of streams are full
FULL = dict(warm=80, batches=300, plan=1_000_000, read=50_000, index=10_000_000, steps=60, rank_steps=40, build=100_000)  # noqa: C408
QUICK = dict(warm=10, batches=20, plan=20_000, read=1000, index=100_000, steps=18, rank_steps=5, build=1000)  # noqa: C408

Reading = dict[str, float]
Jobs = dict[str, tuple[Callable[..., Reading], tuple[Any, ...]] | None]  # None: not installed
Pair = tuple[torch.Tensor, tuple[int, ...]]


def apart(work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` returns, in a process of its own: no thread, memory or import of one reading is left to the next."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(work, *arguments).result()


def alternate(jobs: Jobs, rounds: int) -> dict[str, Any]:
    """Every job once a round; of each number that they read, the median, the range and the rounds."""
    there = {name: job for name, job in jobs.items() if job}
    readings: dict[str, list[Reading]] = {name: [] for name in there}
    for number in range(rounds):
        first = number * len(there) // rounds
        for name in [*there, *there][first : first + len(there)]:
            work, arguments = there[name]
            readings[name].append(apart(work, *arguments))
            logger.info(f"round {number + 1}: {name}: {readings[name][-1]}")
    for name, found in readings.items():
        base = readings.get(PLAIN + name[name.rfind(",") :], [])
        for reading, plain in zip(found, base, strict=False):
            reading["over ours in torch's"] = reading["documents/s"] / plain["documents/s"]
    rows = {name: {what: spread([one[what] for one in found]) for what in found[0]} for name, found in readings.items()}
    return {name: rows.get(name, "not installed") for name in jobs}


def spread(values: Sequence[float]) -> dict[str, Any]:
    return {"median": float(np.median(values)), "low": min(values), "high": max(values), "rounds": list(values)}


def show(title: str, rows: Mapping[str, Any]) -> None:
    print(f"\n{title}")
    for name, row in rows.items():
        numbers = [] if isinstance(row, str) else row.items()
        cells = [f"{what} {one['median']:.4g} ({one['low']:.4g} to {one['high']:.4g})" for what, one in numbers]
        print(f"{name:52} {'   '.join(cells) or row}")


def built(folder: Path, size: int, count: int) -> Path:
    """The set of so many scenes. The few of a trial are in more shards, for peers share them out among workers."""
    out, ids = folder / f"world-{size}-{count}", 2048 if size == 32 else 4096  # the demo's, the default
    config = BuildConfig(size=size, vocabulary=ids, shard_size=min(2048, count // 4), columns=Columns(count=count))
    apart(build_set, "world", out, config)
    return out


@cache
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder / "tokenizer.json")


def opened(folder: Path) -> StoredImages:
    data = DataSet(str(folder))
    return StoredImages(data, data.tokenizer(), Pixels(), PairConfig(caption_drop=0.0), seed=0)  # all have words


def prepared(folder: Path, picture: Any, words: Any) -> Pair:
    """A peer's work on a document, perhaps in another process, where the tokenizer is opened then."""
    pixels = decode_image(io.BytesIO(picture), "picture")
    return Pixels().encode(pixels[None])[0], tokenizer(folder).encode(words)


def batch_of(pairs: Sequence[Pair]) -> SimpleNamespace:
    """32 documents. A namespace, because nobody's own collation looks into one."""
    return SimpleNamespace(latents=torch.stack([latent for latent, _ in pairs]), ids=[ids for _, ids in pairs])


def step_loader(folder: Path, workers: int) -> Iterator[Any]:
    source = opened(folder)
    document = lambda sample: source.document(sample, sample)  # noqa: E731
    loader = StepLoader(document, source.tokenizer.sequence_format(patch_size=8), BATCH, workers=workers)
    return (loader(step)[0] for step in range(1 << 40))


def plain(folder: Path, workers: int) -> Iterator[Any]:
    """Our documents in torch's own loader: in order, for they are shuffled already."""
    source = opened(folder)

    def collate(indices: Sequence[int]) -> SimpleNamespace:
        parts = [{type(part): part for part in source.document(index, index).parts} for index in indices]
        return batch_of([(found[Image].latent, found[Text].ids) for found in parts])  # type: ignore[union-attr]

    return iter(DataLoader(range(source.epoch), BATCH, collate_fn=collate, **AT_WORK[workers]))  # type: ignore[arg-type]


def webdataset(folder: Path, workers: int) -> Iterator[Any]:
    import webdataset as wds

    urls = sorted(map(str, folder.glob("shards/*.tar")))
    data = wds.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(BUFFER)
    data = data.map(lambda found: prepared(folder, found["png"], found["txt"].decode()))
    data = data.batched(BATCH, collation_fn=batch_of, partial=False)
    return iter(wds.WebLoader(data, batch_size=None, **AT_WORK[workers]))


def hugging_face(folder: Path, workers: int, streaming: bool) -> Iterator[Any]:
    """Pictures stay bytes in it. Not streaming, it copies the tars to an Arrow file, once."""
    import datasets

    datasets.disable_progress_bars()
    files, cache = sorted(map(str, folder.glob("shards/*.tar"))), str(folder / "arrow")
    data = datasets.load_dataset("webdataset", data_files=files, split="train", streaming=streaming, cache_dir=cache)
    data = data.cast_column("png", datasets.Image(decode=False)).select_columns(["png", "txt"])
    data = data.shuffle(0, buffer_size=BUFFER) if streaming else data
    collate = lambda found: batch_of([prepared(folder, one["png"]["bytes"], one["txt"]) for one in found])  # noqa: E731
    return iter(DataLoader(data, BATCH, shuffle=not streaming, collate_fn=collate, **AT_WORK[workers]))


def grains(folder: Path, workers: int, threads: int = 0) -> Iterator[Any]:
    import grain

    def together(pairs: Sequence[Pair]) -> dict[str, Any]:  # it hands arrays on in shared memory, the rest pickled
        batch = batch_of(pairs)
        return {"latents": batch.latents.numpy(), "rest": SimpleNamespace(ids=batch.ids)}

    documents = DataSet(str(folder))
    data = grain.MapDataset.range(len(documents)).seed(0).shuffle()
    data = data.map(lambda number: prepared(folder, *documents.read(number).parts)).batch(BATCH, batch_fn=together)
    data = data.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=PREFETCH * threads))
    if workers:
        data = data.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2 * PREFETCH))
    with closing(iter(data)) as batches:
        for batch in batches:
            yield SimpleNamespace(latents=torch.from_numpy(batch["latents"]), ids=batch["rest"].ids)


PLAIN, ARROW = "ours, StoredImages in torch's DataLoader", "Hugging Face datasets, Arrow copy"
CONTENDERS: dict[str, tuple[str, Callable[..., Iterator[Any]]]] = {
    "ours, StepLoader, collated for the model": ("transfuse", step_loader),
    PLAIN: ("transfuse", plain),
    "webdataset": ("webdataset", webdataset),
    "Hugging Face datasets, streaming": ("datasets", partial(hugging_face, streaming=True)),
    ARROW: ("datasets", partial(hugging_face, streaming=False)),
    "Grain over our DataSet": ("grain", grains),
    "Grain over our DataSet, two threads": ("grain", partial(grains, threads=2)),
}


def checked(batch: Any) -> None:
    ours = not isinstance(batch, SimpleNamespace)
    latents, words = (batch.latents, batch.samples) if ours else (batch.latents, batch.ids)
    if latents.dtype != torch.float32 or latents.shape != (BATCH, 3, 64, 64) or len(words) != BATCH:
        raise SystemExit(f"batch: expected {BATCH} documents, found {latents.dtype} {latents.shape} {len(words)}")


def draw(name: str, workers: int, folder: Path, warm: int, batches: int) -> Reading:
    for path in filter(Path.is_file, folder.rglob("*")):  # into the page cache
        path.read_bytes()
    torch.set_num_threads(1)
    package, contender = CONTENDERS[name]
    __import__(package)
    began = time.perf_counter()
    found = contender(folder, workers)
    checked(next(found))
    first = time.perf_counter() - began
    for _ in range(warm):
        checked(next(found))
    began = time.perf_counter()
    for _ in range(batches):
        batch = next(found)
    rate = batches * BATCH / (time.perf_counter() - began)
    checked(batch)
    del found, batch
    gc.collect()  # ends workers
    return {"documents/s": rate, "first batch s": first}


def throughput(arguments: argparse.Namespace, scale: Mapping[str, int]) -> Jobs:
    """Documents a second, and seconds until the first batch, with 0 and 2 worker processes"""
    folder = built(arguments.folder, 64, arguments.count)
    epoch = arguments.count * 95 // 100 // BATCH  # everybody stays within one
    warm, batches = min(scale["warm"], epoch // 6), min(scale["batches"], epoch // 2)
    if find_spec("datasets"):
        logger.info(f"with the copy to Arrow, if there was none: {apart(draw, ARROW, 0, folder, 0, 1)}")
    return {
        f"{name}, {workers} workers": (draw, (name, workers, folder, warm, batches)) if find_spec(package) else None
        for name, (package, _) in CONTENDERS.items()
        for workers in ((0,) if "threads" in name else (0, 2))
    }


def resident() -> tuple[float, float]:
    """MB of this process in memory: all, with the pages of files it has mapped; and its own."""
    found = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(found["VmRSS"].split()[0]) * 1024 / 1e6, int(found["RssAnon"].split()[0]) * 1024 / 1e6


def grow(folder: Path, planned: int, read: int) -> Reading:
    source = opened(folder)
    grammar, stages = source.tokenizer.sequence_format(patch_size=8), []
    for plans, reads in ((16_384, 2000), (planned, 0), (0, read)):  # at first all is loaded, and working memory taken
        for first in range(0, plans, 8192):
            indices = np.arange(first, min(first + 8192, plans))
            source.lengths(indices, indices, grammar)
        for index in range(reads):
            source.document(index, index)
        gc.collect()
        stages.append(resident())
    (before, own), (then, _), (after, own_after) = stages
    return {"before": before, "planning": then - before, "reading": after - then, "both, no files": own_after - own}


def memory(arguments: argparse.Namespace, scale: Mapping[str, int]) -> Jobs:
    """MB of a process, and what it grows by in planning a million documents, then reading 50,000"""
    return {"ours": (grow, (built(arguments.folder, 64, arguments.count), scale["plan"], scale["read"]))}


def write_index(out: Path, count: int, pattern: Path) -> None:
    """A set of so many documents without a document: an index, and shards in name only. Kept, as sets are."""
    out.mkdir(exist_ok=True)
    documents = np.zeros(count, DOCUMENT)
    documents["tokens"] = np.random.default_rng(0).integers(5, 60, count)
    documents["first_picture"], documents["pair"] = np.arange(count), True
    np.save(out / "documents.npy", documents)
    np.save(out / "pictures.npy", np.full(count, np.array((64, 64), IMAGE)))
    (out / "tokenizer.json").write_bytes((pattern / "tokenizer.json").read_bytes())
    names = [f"shards/shard-{number:05d}.tar" for number in range(-(-count // 2048))]
    shards = [{"file": name, "bytes": 2048 * 4096, "sha256": "0" * 64} for name in names]
    values = json.loads((pattern / "manifest.json").read_text())
    values |= {"documents": count, "pictures": count, "heldout": count // 100, "shard_size": 2048, "shards": shards}
    (out / "manifest.json").write_text(json.dumps(values))


def start_up(folder: Path, cached: bool) -> Reading:
    for path in folder.iterdir():
        with path.open("rb") as file:  # out of the page cache
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if cached:
                file.read()
    before, times = resident()[1], [time.perf_counter()]
    source = opened(folder)
    grammar = source.tokenizer.sequence_format(patch_size=8)
    times.append(time.perf_counter())
    source.lengths(np.arange(1000), np.arange(1000), grammar)
    rows = Packer(lambda samples: source.lengths(np.asarray(samples), np.asarray(samples), grammar), length=1024)
    rows.row(0)
    times.append(time.perf_counter())
    opening, planning = np.diff(times).tolist()
    return {"s": opening + planning, "opening": opening, "planning": planning, "MB grown": resident()[1] - before}


def start_of_index(arguments: argparse.Namespace, scale: Mapping[str, int]) -> Jobs:
    """Seconds until a set of ten million documents is open, and 1,000 lengths and the first row are known"""
    folder, pattern = arguments.folder / f"index-{scale['index']}", built(arguments.folder, 64, arguments.count)
    if not (folder / "manifest.json").exists():
        apart(write_index, folder, scale["index"], pattern)
    return {"in the page cache": (start_up, (folder, True)), "from the disk": (start_up, (folder, False))}


def demo(folder: Path, workers: int, steps: int) -> Recipe:
    recipe = preset("pixels-32")
    loop = replace(recipe.loop, steps=steps, log_every=steps // 6, sample_every=0, checkpoint_every=0)
    return replace(recipe, data=replace(recipe.data, sources=(str(folder), "glosses"), workers=workers), loop=loop)


def train(folder: Path, workers: int, steps: int) -> Reading:
    """Without the first sixth of the steps, in which workers start and kernels are prepared."""
    keep_freed_memory()  # as the command line does
    with tempfile.TemporaryDirectory(dir=folder.parent) as run:
        trainer = build_trainer(open_run(demo(folder, workers, steps), Path(run)), Path(run))
        trainer.run()
        first, *_, last = read_metrics(Path(run, "metrics.jsonl"))
    seconds = last["seconds"] - first["seconds"]
    return {"share": (last["waited"] - first["waited"]) / seconds, "s a step": seconds / (last["step"] - first["step"])}


def train_ranks(folder: Path, seconds: float, steps: int) -> Reading:
    """Eight ranks, each a process with a loader of one worker, that meet before every step and sleep in its place.

    share: time waited, the mean over ranks; of the slowest: that of the slowest of each step.
    """
    warm, context = steps // 4, multiprocessing.get_context("fork")
    meet, found = context.Barrier(RANKS), context.SimpleQueue()
    ranks = [
        context.Process(target=one_rank, args=(rank, folder, seconds, steps + warm, meet, found))
        for rank in range(RANKS)
    ]
    for rank in ranks:
        rank.start()
    waits = np.array([found.get() for _ in ranks])[:, warm:]
    for rank in ranks:
        rank.join()
    slept, slowest = waits.shape[1] * seconds, float(waits.max(0).sum())
    mean = float(waits.sum(1).mean())
    return {"share": mean / (mean + slept), "of the slowest": slowest / (slowest + slept)}


def one_rank(rank: int, folder: Path, seconds: float, steps: int, meet: Any, found: Any) -> None:
    torch.set_num_threads(1)
    recipe = demo(folder, workers=1, steps=steps)
    run = resolve(replace(recipe, data=replace(recipe.data, batch_size=256)))
    waits = []
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        load = build_loader(run, Path(scratch), rank, RANKS)
        for step in range(steps):
            meet.wait()
            began = time.perf_counter()
            load(step)
            waits.append(time.perf_counter() - began)
            time.sleep(seconds)
    found.put(waits)


def wait(arguments: argparse.Namespace, scale: Mapping[str, int]) -> Jobs:
    """Share of training that waits for data"""
    folder = built(arguments.folder, 32, arguments.count)
    jobs: Jobs = {f"demo, {workers} workers": (train, (folder, workers, scale["steps"])) for workers in (0, 1)}
    ranks = train_ranks, (folder, arguments.step_seconds, scale["rank_steps"])
    return jobs | {f"{RANKS} ranks of 1 worker, 256 documents in {arguments.step_seconds:g} s": ranks}


def source(folder: Path, kind: str, count: int) -> Path:
    """Images of 32 pixels with captions, in tars of 10,000 documents or loose in folders of 1,000; kept like sets."""
    out = folder / f"{kind}-{count}"
    if out.exists():
        return out
    draw, partial = np.random.default_rng(0), out.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a call that was stopped
    partial.mkdir()
    for number in range(count):
        small = PIL.Image.fromarray(draw.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        stream = io.BytesIO()
        small.resize((32, 32), PIL.Image.Resampling.BICUBIC).save(stream, "png", compress_level=1)
        members = [(f"{number:06d}.png", stream.getvalue()), (f"{number:06d}.txt", f"image {number}".encode())]
        if kind == "tars":
            with (partial / f"{number // 10_000:03d}.tar").open("ab") as file:
                file.write(to_tar(members))
        else:
            below = partial / f"{number // 1000:03d}"
            below.mkdir(exist_ok=True)
            for name, content in members:
                (below / name).write_bytes(content)
    partial.rename(out)
    return out


def build(folder: Path, kind: str, count: int, tokenizer: Path) -> Reading:
    """A build in this process. The machine may be busy, so that seconds of processor time count."""
    path, memory, done = source(folder, kind, count), [], threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            memory.append(resident()[1])

    with tempfile.TemporaryDirectory(dir=folder) as out:
        watcher = threading.Thread(target=watch)
        began, at_first = time.perf_counter(), sum(os.times()[:2])
        watcher.start()
        build_set(str(path), Path(out, "set"), BuildConfig(size=32, tokenizer=str(tokenizer)), workers=0)
        spent, seconds = sum(os.times()[:2]) - at_first, time.perf_counter() - began
        done.set()
        watcher.join()
    fifth = memory[len(memory) // 5]
    return {
        "documents/s": count / seconds,
        "a second of CPU": count / spent,
        "MB": fifth,
        "MB grown": max(memory) - fifth,
    }


def builds(arguments: argparse.Namespace, scale: Mapping[str, int]) -> Jobs:
    """Documents a second of a build in one process, and MB that it grows by after its first fifth"""
    tokens = built(arguments.folder, 64, arguments.count)
    kinds = ("tars", "loose")
    return {f"from {kind}": (build, (arguments.folder, kind, scale["build"], tokens)) for kind in kinds}


MEASURES = {"A": throughput, "B": memory, "C": start_of_index, "D": wait, "E": builds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the sets; they are reused")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, help="documents of a set (20,000; 2,000 with --quick)")
    parser.add_argument("--only", default="ABCDE", help="some of ABCDE")
    parser.add_argument("--step-seconds", type=float, default=0.35, help="a step of the eight ranks")
    parser.add_argument("--quick", action="store_true", help="tiny: to see that it runs")
    parser.add_argument("--json", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    arguments.count = arguments.count or (2000 if arguments.quick else 20_000)
    if set(arguments.only) - set(MEASURES) or arguments.rounds < 1 or arguments.count < 1000:
        parser.error("expected --only some of ABCDE, --rounds of at least 1, --count of at least 1000")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    names = {"torch", "numpy", "pillow", "tokenizers", *(name for name, _ in CONTENDERS.values() if find_spec(name))}
    report: dict[str, Any] = {name: getattr(arguments, name) for name in ("rounds", "count", "quick")}
    report |= {"versions": {name: version(name) for name in sorted(names)}, "load": os.getloadavg()}
    for letter in sorted(set(arguments.only)):
        report[letter] = alternate(MEASURES[letter](arguments, QUICK if arguments.quick else FULL), arguments.rounds)
        show(f"{letter}: {MEASURES[letter].__doc__}", report[letter])
    if arguments.json:
        arguments.json.write_text(json.dumps(report) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
