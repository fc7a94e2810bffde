"""`transfuse data build | inspect | verify`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from ..errors import UserError
from ..log import logger
from .parsing import act, parse, print_json


def data(arguments: Sequence[str]) -> int:
    """Make a data set of captioned pictures or text, look at one, check one.

    transfuse data build pictures/ photos-64 --size 64
    transfuse data build photos-64 latents --size 64 --autoencoder kl-f4-small
    transfuse data inspect photos-64
    transfuse data verify photos-64

    Then: transfuse train demo --data.sources photos-64
    """
    return act("data", arguments, ACTIONS, data.__doc__)


def build(arguments: Sequence[str]) -> int:
    """Make a data set: WebDataset tars with an index of every document, or token files of text.

    transfuse data build pictures/ photos-64 --size 64

    SOURCE: a folder of pictures with captions (a .txt next to each, metadata.jsonl or a .csv table), WebDataset tars,
    parquet, .jsonl of documents with words and pictures, plain text, "world" (with --count), or a data set, to be
    stored otherwise (--size, --autoencoder). Files may be remote: "https://host/{00000..00041}.tar", s3://bucket/x.
    The same command resumes a build that was stopped; the set is the same to the byte.
    """
    from ..data.build import build_set
    from ..data.prepare import BuildConfig
    from ..data.remote import Cache

    # Built here, so that the command line starts without importing torch.
    fields: list[tuple[str, Any]] = [
        ("source", Annotated[str, tyro.conf.Positional]),
        ("out", Annotated[Path, tyro.conf.Positional]),
        ("config", Annotated[BuildConfig, tyro.conf.arg(name="")]),
        ("workers", Annotated[int, tyro.conf.arg(help="processes that prepare documents; 0: this one")]),
        ("max_errors", Annotated[float, tyro.conf.arg(help="share of faulty documents let pass; ten always are")]),
        ("cache_gigabytes", Annotated[float, tyro.conf.arg(help="of files of a URL that are kept here at most")]),
        ("json", Annotated[bool, tyro.conf.arg(help="end with one line of JSON")]),
    ]
    kind = make_dataclass("Build", fields, frozen=True, namespace={"__doc__": build.__doc__})
    usual = kind(tyro.MISSING, tyro.MISSING, BuildConfig(), 2, 0.01, Cache().gigabytes, False)
    options: Any = parse(kind, arguments, "data build", usual)
    if options.workers < 0 or not 0 <= options.max_errors <= 1:
        raise UserError("data build: expected --workers of at least 0 and --max-errors from 0 to 1, found others")
    cache = Cache(gigabytes=options.cache_gigabytes)
    summary = build_set(options.source, options.out, options.config, options.workers, options.max_errors, cache)
    if options.json:
        print_json({"out": str(options.out), **summary})
    else:
        logger.info(f"{options.out}: {_summary(summary)}; look at it with: transfuse data inspect {options.out}")
    return 0


def _summary(counts: dict[str, Any]) -> str:
    left_out = [f"{count} {reason}" for reason, count in counts["dropped"].items()]
    left_out += [f"{counts['faulty']} faulty (see quarantine.jsonl)"] if counts["faulty"] else []
    total = f"{counts['documents']} documents, {counts['pictures']} pictures, {counts['tokens']} tokens of text"
    return f"{total}; left out: {', '.join(left_out)}" if left_out else total


@dataclass(frozen=True)
class Inspect:
    """Look at data sets, and what a run would make of them: counts, lengths, pictures with captions, the mixture.

    transfuse data inspect photos-64 glosses --out report
    """

    sources: tyro.conf.Positional[tuple[str, ...]]
    """data sets, "world", "glosses"; with settings after commas, as data.sources of transfuse train"""
    out: Path = Path("inspection")
    """folder for index.html and report.json"""
    preset: str = "demo"
    """whose text share, patches and autoencoder are taken for the mixture"""
    row_length: int = 4096
    """positions of the packed rows that are tried"""
    json: bool = False
    """end with one line of JSON"""


def inspect(arguments: Sequence[str]) -> int:
    options = parse(Inspect, arguments, "data inspect")
    from ..inspect_data import inspect_sources

    report = inspect_sources(options.sources, options.out, options.preset, options.row_length)
    if options.json:
        print_json({"report": str(options.out / "index.html"), **report})
    else:
        print(options.out / "index.html")
    return 0


@dataclass(frozen=True)
class Verify:
    """Compare every hash of a data set, decode every picture, count every token.

    transfuse data verify photos-64
    """

    set: tyro.conf.Positional[str]
    workers: int = 2
    """processes"""
    json: bool = False
    """end with one line of JSON"""


def verify(arguments: Sequence[str]) -> int:
    options = parse(Verify, arguments, "data verify")
    from ..data.verify import verify_set

    report = verify_set(options.set, options.workers)
    if options.json:
        print_json({"documents": report.documents, "count": report.count, "problems": report.problems})
    for problem in report.problems:
        logger.info(problem)
    if report.count:
        raise UserError(f"{options.set}: {report.count} problems; {report.documents} documents are whole")
    if not options.json:
        logger.info(f"{options.set}: {report.documents} documents, all whole")
    return 0


ACTIONS: dict[str, Callable[[Sequence[str]], int]] = {"build": build, "inspect": inspect, "verify": verify}
