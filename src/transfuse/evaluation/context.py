"""The contract of a metric: what it is given (`EvalContext`), what it declares (`Metric`), what it returns.

A metric is a function `EvalContext -> MetricResult` in a `Metric`; `registry.py` shows how to add one. Model outputs
are made once by `EvalContext.make`, stored (`generate.py`), and shared by all metrics. A data set may bring a `Scorer`;
without one, evaluation works on the images and captions that the user names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import PIL.Image
import torch

from ..config import to_dict
from ..errors import UserError
from ..folders import find_export
from ..inference import Request, TransfusionPipeline
from ..io import sha256
from ..version import __version__
from .confidence import Estimate
from .generate import Outcome, Task, generate, short_hash, weights_digest

if TYPE_CHECKING:
    from .image_quality import ImageFeatures
    from .pairs import Pairs
    from .text import Question

Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class EvalConfig:
    """The settings of an evaluation; `transfuse evaluate --help` explains each. Every file is local.

    Raises UserError for a count below 1.
    """

    count: int = 120
    data: str = ""
    features: str = "recogniser"
    texts: tuple[Path, ...] = ()
    stride: int | None = None
    captions: Path | None = None
    images: Path | None = None
    ids: Path | None = None
    ptb_jar: str = ""
    clip: Path | None = None
    clip_model: str = "ViT-L-14"
    geneval: Path | None = None
    tasks: tuple[str, ...] = ()
    tasks_folder: Path | None = None
    judge_steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("count", "stride", "judge_steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')}: expected at least 1, found {value}")
        if self.data and self.captions is not None:
            raise UserError("--data: expected a data set or --captions, found both")

    @property
    def own_pairs(self) -> bool:
        """True where pairs are the user's, False where they are the scorer's."""
        return bool(self.data) or self.captions is not None


@dataclass(frozen=True)
class Drawing:
    """Sampling settings of drawn images; None: the model's default.

    candidates   images drawn per text prompt; the model keeps the one under which the prompt is most probable
    seed         image n has the seed `seed + n`
    """

    sampler: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    candidates: int = 1
    seed: int = 0

    @staticmethod
    def sweep(text: str, base: Drawing) -> list[Drawing]:
        """Parse "guidance_scale=1,1.5,3" into one `Drawing` per value. Raises ValueError for another name or value."""
        name, equals, values = text.partition("=")
        kinds: dict[str, type] = {"sampler": str, "steps": int, "guidance_scale": float, "candidates": int, "seed": int}
        if name not in kinds or not equals:
            raise ValueError(f"expected one of {', '.join(kinds)} with values, as guidance_scale=1,1.5,3, found {text}")
        return [replace(base, **{name: kinds[name](value)}) for value in values.split(",")]


class Scorer(Protocol):
    """A data set's contribution to evaluation: held-out pairs and texts, and a classifier of its images.

    Its own metrics, such as composition and edits, are listed by `data.bundled.data_set_metrics`.
    """

    def pairs(self, count: int, size: int, split: str = "heldout") -> Pairs:
        """Return the first `count` prompts and images of a split, with images of `size` pixels."""

    def texts(self) -> Sequence[str]:
        """Return the texts held out from training."""

    def questions(self, count: int) -> Sequence[Question]:
        """Return at most `count` multiple-choice questions about held-out texts."""

    def classifier(self, folder: Path, steps: int | None = None) -> ImageFeatures:
        """Return the image classifier as a feature network, trained once per folder."""

    def caption_facts(self) -> Mapping[str, Callable[[str], set[str]]]:
        """Return functions that read the facts in a caption; the key names the share of captions with equal facts."""


@dataclass(frozen=True, eq=False)
class EvalContext:
    """A model to measure, its data, and the folder for outputs.

    model   the name that results carry, normally a hash of the export's files
    folder  holds what the model made (`generated/`) and the scorer's networks
    """

    pipe: TransfusionPipeline
    model: str
    folder: Path
    scorer: Scorer | None = None
    options: EvalConfig = field(default_factory=EvalConfig)
    drawing: Drawing = field(default_factory=Drawing)
    batch: int = 24
    version: str = f"transfuse {__version__}"

    @property
    def device(self) -> torch.device:
        return next(self.pipe.exported.model.parameters()).device

    @cached_property
    def loaded(self) -> str:
        """A hash of the loaded model: weights, dtype, settings, tokenizer, autoencoder, sampling defaults."""
        exported, model = self.pipe.exported, self.pipe.exported.model
        facts = {
            "weights": weights_digest(model.state_dict()) if exported.weights is None else exported.fingerprint,
            "kinds": sorted({f"{type(weight.data).__name__} {weight.dtype}" for weight in model.parameters()}),
            "model": to_dict(model.config),
            "diffusion": to_dict(exported.process.config),
            "generation": to_dict(exported.generation),
            "image_size": exported.image_size,
            "tokenizer": exported.tokenizer.fingerprint,
            "autoencoder": exported.autoencoder.fingerprint,
        }
        return short_hash(facts)

    def needs_scorer(self, metric: str) -> Scorer:
        """Return the scorer. Raises UserError where the data set brings none."""
        if self.scorer is None:
            hint = "(see --data, --captions, --images)"
            raise UserError(f"{metric}: expected a data set with a scorer, found none {hint}")
        return self.scorer

    def make(self, task: Task) -> Outcome:
        """Run a task, or read what this version of the package already made with the same model and settings."""
        settings = {"model": self.model, "loaded": self.loaded, "version": self.version, **task.settings}
        return generate(self.folder / "generated", replace(task, settings=settings), self.batch)

    def request(self, parts: Sequence[str | PIL.Image.Image]) -> Request:
        """Return a request with the sampling options under test."""
        draw = self.drawing
        return self.pipe.request(parts, draw.steps, draw.guidance_scale, draw.sampler, draw.guidance_interval)

    def resolved(self) -> EvalContext:
        """Return a copy with the model's defaults for unset sampling options. Raises UserError for an invalid one."""
        chosen = self.request([])
        latents = self.pipe.exported.model.config.images == "latents"  # codes have no sampler
        drawing = replace(
            self.drawing,
            sampler=chosen.sampler.name if latents else None,
            steps=chosen.sampler.steps if latents else None,
            guidance_scale=chosen.guidance_scale,
            guidance_interval=chosen.guidance_interval,
        )
        return replace(self, drawing=drawing)


@dataclass(frozen=True)
class Result:
    """One number and everything needed to compute it again.

    low, high        95 % interval over items; None where undefined, as for a single item
    count            items measured: images, captions, documents
    implementation   code, version, networks with the hash of their weights, settings of the metric
    data             the items: name, number and a hash of their ids
    floor, ceiling   scores of chance and of a reference by the same metric (`Metric.compared`); a model may pass the
                     reference; None where undefined
    measure, model, drawing   set by the registry; drawing is None where no image was drawn
    """

    name: str
    value: float
    low: float | None
    high: float | None
    count: int
    better: Better
    implementation: str
    data: str
    floor: float | None = None
    ceiling: float | None = None
    measure: str = ""
    model: str = ""
    drawing: Drawing | None = None

    @classmethod
    def of(cls, name: str, value: Estimate, better: Better, implementation: str, data: str, **more: Any) -> Result:
        alone = value.count == 1 and value.low == value.high  # every resample of a single item is that item
        low, high = (None, None) if alone else (value.low, value.high)
        return cls(name, value.value, low, high, value.count, better, implementation, data, **more)

    def to_json(self) -> dict[str, Any]:
        return to_dict(self)


@dataclass(frozen=True, eq=False)
class Example:
    """An example for the report: images `[row, column, 3]` with a caption each, text, and what was right or wrong.

    marks   (expectation, whether it was met, what was there instead or "")
    group   the title of the examples shown together: which they are, and how they were chosen
    """

    text: str
    pictures: Sequence[tuple[np.ndarray, str]] = ()
    marks: Sequence[tuple[str, bool, str]] = ()
    group: str = ""


@dataclass(eq=False)
class MetricResult:
    """The numbers of one metric, with examples. `tables` holds rows under a header, by title.

    measure, drawing   the metric's name and sampling options, set by the registry
    """

    results: list[Result]
    examples: list[Example] = field(default_factory=list)
    tables: dict[str, list[list[Any]]] = field(default_factory=dict)
    measure: str = ""
    drawing: Drawing | None = None

    def __iter__(self) -> Iterator[Result]:
        return iter(self.results)


@dataclass(frozen=True, eq=False)
class Metric:
    """A metric by name.

    check     raises UserError, before any work, for missing files or options
    score     computes the results
    numbers   returns the names of the results, before any work
    draws     whether a sweep repeats it for each `Drawing`
    compared  explains `floor` and `ceiling` in the report
    """

    name: str
    about: str
    check: Callable[[EvalContext], object]
    score: Callable[[EvalContext], MetricResult]
    numbers: Callable[[EvalContext], Sequence[str]]
    draws: bool = False
    compared: str = ""


def first_of(count: int, shown: int, what: str) -> str:
    """Return the title of the first `shown` of `count` items, in order."""
    return f"All {count:,} {what}, in order" if count <= shown else f"The first {shown} of {count:,} {what}, in order"


def extremes(scores: Sequence[float] | np.ndarray, shown: int, what: str, score: str) -> list[tuple[int, str]]:
    """Return the `shown` items with the highest scores and as many with the lowest, each with its group's title."""
    order = np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable").tolist()
    if len(order) <= 2 * shown:
        return [(number, f"All {len(order):,} {what}, the highest {score} first") for number in order]
    high, low = (f"The {shown} with the {end} {score} of {len(order):,} {what}" for end in ("highest", "lowest"))
    return [*((number, high) for number in order[:shown]), *((number, low) for number in order[: -shown - 1 : -1])]


def model_hash(export: Path) -> str:
    """Return sixteen digits of the SHA-256 over every file that decides what an exported model does."""
    digest, export = hashlib.sha256(), find_export(export)
    for path in sorted(path for path in export.rglob("*") if path.suffix in (".json", ".safetensors")):
        digest.update(f"{path.relative_to(export).as_posix()} {sha256(path)}\n".encode())
    return digest.hexdigest()[:16]
