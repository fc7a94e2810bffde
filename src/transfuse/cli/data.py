"""`transfuse data build`, `inspect` and `verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from ..data.building import build_set, verify_set
from ..data.building.prepare import BuildConfig
from ..data.remote import Cache
from ..errors import UserError
from ..inspect_data import inspect_sources
from ..log import logger
from ..recipes import ImageContext
from .options import Flat, Json, Positional, print_json, print_result

SHOWN_PROBLEMS = 100  # problems of a data set that are named one by one


def build(
    source: Positional[str],
    out: Positional[Path],
    *,
    config: Annotated[BuildConfig, Flat],
    workers: int = 2,
    max_errors: float = 0.01,
    cache_gigabytes: float = Cache().gigabytes,
    json: Json = False,
) -> int:
    """Make a data set: WebDataset tars with an index of every document, or token files of text.

    $ transfuse data build pictures/ photos-64 --size 64
    $ transfuse data build photos-64 latents --size 64 --autoencoder kl-f4-small

    The same command resumes a build that was stopped; the set is the same to the byte. Then:

    $ transfuse train demo --data.sources photos-64

    Args:
        source: a folder of images with captions (a .txt next to each, a table, COCO's, Flickr's or kohya's lists,
            folders of classes), WebDataset tars, parquet, arrow, .jsonl of documents with words and images, plain text,
            "world" (with --count), or a data set, to be stored otherwise (--size, --autoencoder). Files may be remote:
            "https://host/{00000..00041}.tar", s3://bucket/x
        out: a new folder, or the one of a build that was stopped
        workers: processes that prepare documents; 0: this one
        max_errors: share of faulty documents let pass; ten always are
        cache_gigabytes: of files of a URL that are kept here at most
    """
    if workers < 0 or not 0 <= max_errors <= 1:
        raise UserError("data build: expected --workers of at least 0 and --max-errors from 0 to 1, found others")
    summary = build_set(source, out, config, workers, max_errors, Cache(gigabytes=cache_gigabytes))
    if json:
        print_json({"out": str(out), **summary})
    else:
        logger.info(f"{out}: {_summary(summary)}; look at it with: transfuse data inspect {out}")
    return 0


def _summary(counts: dict[str, Any]) -> str:
    left_out = [f"{count} {reason}" for reason, count in counts["dropped"].items()]
    left_out += [f"{counts['faulty']} faulty (see quarantine.jsonl)"] if counts["faulty"] else []
    total = f"{counts['documents']} documents, {counts['pictures']} pictures, {counts['tokens']} tokens of text"
    changed = [f"{count} {name}" for name, count in counts["changed"].items()]
    files = [f"{count} {name}" for name, count in counts["files"].items()]
    parts = [("left out", left_out), ("changed", changed), ("files", files)]
    return "; ".join([total, *(f"{name}: {', '.join(items)}" for name, items in parts if items)])


def inspect(
    sources: Positional[tuple[str, ...]],
    *,
    out: Path = Path("inspection"),
    preset: str = "pixels-32",
    row_length: int = 4096,
    context: ImageContext | None = None,
    json: Json = False,
) -> int:
    """Look at data sets, and what a run would make of them: counts, lengths, images with captions, the mixture.

    $ transfuse data inspect photos-64 glosses --out report

    Args:
        sources: data sets, "world", "glosses"; with settings after commas, as data.sources of transfuse train
        out: folder for index.html and report.json
        preset: whose text share, patches and autoencoder are taken for the mixture
        row_length: positions of the packed rows that are tried
        context: data.context of transfuse train, which decides what images cost; by default the preset's
    """
    report = inspect_sources(sources, out, preset, row_length, context=context)
    return print_result(json, {"report": str(out / "index.html"), **report}, out / "index.html")


def verify(set: Positional[str], *, workers: int = 2, json: Json = False) -> int:
    """Compare every hash of a data set, decode every image, count every token.

    $ transfuse data verify photos-64

    Args:
        set: folder or URL of a data set
        workers: processes
    """
    documents, problems = verify_set(set, workers)
    shown = problems[:SHOWN_PROBLEMS]
    if json:
        print_json({"documents": documents, "count": len(problems), "problems": shown})
    for problem in shown:
        logger.info(problem)
    if problems:
        raise UserError(f"{set}: {len(problems)} problems; {documents} documents are whole")
    if not json:
        logger.info(f"{set}: {documents} documents, all whole")
    return 0
