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

    SOURCE: a folder of pictures with captions (.txt beside each, metadata.jsonl or a .csv table), WebDataset tars,
    parquet, .jsonl of documents with words and pictures, plain text, "world" (with --count), or a data set, to be
    stored otherwise (--size, --autoencoder). Files may lie elsewhere: "https://host/{00000..00041}.tar", s3://bucket/x.
    A build that was stopped goes on with the same command; the set is the same to the byte.
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
    asked: Any = parse(kind, arguments, "data build", usual)
    if asked.workers < 0 or not 0 <= asked.max_errors <= 1:
        raise UserError("data build: expected --workers of at least 0 and --max-errors from 0 to 1, found others")
    cache = Cache(gigabytes=asked.cache_gigabytes)
    found = build_set(asked.source, asked.out, asked.config, asked.workers, asked.max_errors, cache)
    if asked.json:
        print_json({"out": str(asked.out), **found})
    else:
        logger.info(f"{asked.out}: {_summary(found)}; look at it with: transfuse data inspect {asked.out}")
    return 0


def _summary(found: dict[str, Any]) -> str:
    left_out = [f"{count} {reason}" for reason, count in found["dropped"].items()]
    left_out += [f"{found['faulty']} faulty (see quarantine.jsonl)"] if found["faulty"] else []
    said = f"{found['documents']} documents, {found['pictures']} pictures, {found['tokens']} tokens of text"
    return f"{said}; left out: {', '.join(left_out)}" if left_out else said


@dataclass(frozen=True)
class Inspect:
    """Look at data sets, and what a run would make of them: counts, lengths, pictures with captions, the mixture.

    transfuse data inspect photos-64 glosses --out report
    """

    sources: tyro.conf.Positional[tuple[str, ...]]
    """data sets, "world", "glosses"; with settings behind commas, as data.sources of transfuse train"""
    out: Path = Path("inspection")
    """folder for index.html and report.json"""
    preset: str = "demo"
    """whose text share, patches and autoencoder are taken for the mixture"""
    row_length: int = 4096
    """positions of the packed rows that are tried"""
    json: bool = False
    """end with one line of JSON"""


def inspect(arguments: Sequence[str]) -> int:
    asked = parse(Inspect, arguments, "data inspect")
    from ..inspect_data import inspect_sources

    report = inspect_sources(asked.sources, asked.out, asked.preset, asked.row_length)
    if asked.json:
        print_json({"report": str(asked.out / "index.html"), **report})
    else:
        print(asked.out / "index.html")
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
    asked = parse(Verify, arguments, "data verify")
    from ..data.verify import verify_set

    found = verify_set(asked.set, asked.workers)
    if asked.json:
        print_json({"documents": found.documents, "count": found.count, "problems": found.problems})
    for problem in found.problems:
        logger.info(problem)
    if found.count:
        raise UserError(f"{asked.set}: {found.count} problems; {found.documents} documents are whole")
    if not asked.json:
        logger.info(f"{asked.set}: {found.documents} documents, all whole")
    return 0


ACTIONS: dict[str, Callable[[Sequence[str]], int]] = {"build": build, "inspect": inspect, "verify": verify}
