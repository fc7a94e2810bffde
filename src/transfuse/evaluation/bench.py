"""What measures share: the model, how it draws, what it is asked about, where its work lies; and what a measure is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import PIL.Image
import torch

from emoji_scenes import WorldConfig

from ..config import to_dict
from ..errors import UserError
from ..export import Exported
from ..folders import find_export
from ..inference import Request, TransfusionPipeline
from ..io import sha256
from ..version import __version__
from .detector import Detector, keep_detector
from .generate import Outcome, Task, generate, short_hash
from .recogniser import Recogniser, keep_recogniser, weights_digest
from .result import Drawing, MetricResult


@dataclass(frozen=True)
class EvalConfig:
    """What the user may choose; every file is local, nothing is ever fetched.

    count          pictures drawn, captioned, edited by each measure, and questions asked
    features       network for Fréchet distances: "recogniser", "imagenet-mobilenet", or a file of weights
    texts, stride  files of text; tokens that a window moves by (None: as many as it has, blocked)
    captions, images   a COCO or Karpathy json, and the folder of its pictures; None: the bundled world
    ids            a list of which of them, in order, with or without the prompts; None: by the rule of `pairs`
    ptb_jar        what cuts captions into words: "" our own, a jar with Stanford's, or "pycocoevalcap"
    clip, clip_model   weights for open_clip, and the name of their architecture
    geneval        prompts of the original GenEval (evaluation_metadata.jsonl), to be drawn for its own scorer
    tasks, tasks_folder   of lm-evaluation-harness: names, and a folder with their files
    judge_steps    steps that a recogniser or detector is trained for; None: its own default
    """

    count: int = 120
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


@dataclass(frozen=True, eq=False)
class EvalContext:
    """model: the name that results carry, a hash of the export's files. folder: for what is made, and for judges."""

    pipe: TransfusionPipeline
    model: str
    folder: Path
    world: WorldConfig
    options: EvalConfig = field(default_factory=EvalConfig)
    drawing: Drawing = field(default_factory=Drawing)
    batch: int = 24
    version: str = f"transfuse {__version__}"

    @property
    def device(self) -> torch.device:
        return next(self.pipe.exported.model.parameters()).device

    @cached_property
    def loaded(self) -> str:
        """A hash of the model as it is loaded, whatever its name."""
        return loaded_hash(self.pipe.exported)

    def make(self, task: Task) -> Outcome:
        """Have the model do a task, or read what this version of the package had the same model do."""
        settings = {"model": self.model, "loaded": self.loaded, "version": self.version, **task.settings}
        return generate(self.folder / "generated", replace(task, settings=settings), self.batch)

    def settled(self) -> EvalContext:
        """With the model's own way of drawing where none was asked for. Raises UserError for one it can not do."""
        chosen = self.request([])
        sampler: str | None = chosen.sampler.name
        steps: int | None = chosen.sampler.steps
        if self.pipe.exported.model.config.images != "latents":
            sampler = steps = None  # it draws code by code
        drawing = replace(
            self.drawing,
            sampler=sampler,
            steps=steps,
            guidance_scale=chosen.guidance_scale,
            guidance_interval=chosen.guidance_interval,
        )
        return replace(self, drawing=drawing)

    def request(self, parts: Sequence[str | PIL.Image.Image]) -> Request:
        """To draw, or write, as is to be measured."""
        asked = self.drawing
        return self.pipe.request(parts, asked.steps, asked.guidance_scale, asked.sampler, asked.guidance_interval)

    def recogniser(self) -> Recogniser:
        """The judge of scenes with one thing: trained once for a folder and a world."""
        return keep_recogniser(self.folder / "recogniser.safetensors", self.world, self.options.judge_steps)

    def detector(self) -> Detector:
        """The judge of scenes with any number of things."""
        return keep_detector(self.folder / "detector.safetensors", self.world, self.options.judge_steps)


@dataclass(frozen=True, eq=False)
class Metric:
    """check: raises UserError, before any work, for what is missing. numbers: names of the results that `score` gives,
    known before any work, too. draws: a sweep repeats it with each drawing. compared: what each result's `floor` and
    `ceiling` are, for the page."""

    name: str
    about: str
    check: Callable[[EvalContext], object]
    score: Callable[[EvalContext], MetricResult]
    numbers: Callable[[EvalContext], Sequence[str]]
    draws: bool = False
    compared: str = ""


def model_hash(export: Path) -> str:
    """Sixteen digits of the SHA-256 over every file that decides what an exported model does."""
    digest, export = hashlib.sha256(), find_export(export)
    for path in sorted(path for path in export.rglob("*") if path.suffix in (".json", ".safetensors")):
        digest.update(f"{path.relative_to(export).as_posix()} {sha256(path)}\n".encode())
    return digest.hexdigest()[:16]


def loaded_hash(exported: Exported) -> str:
    """Eight digits of a hash of a loaded model: weights, dtype, settings, tokenizer, autoencoder, ways of drawing."""
    model = exported.model
    kinds = {f"{type(weight.data).__name__} {weight.dtype}" for weight in model.parameters()}
    facts = {
        "weights": weights_digest(model.state_dict()) if exported.weights is None else exported.fingerprint,
        "kinds": sorted(kinds),
        "model": to_dict(model.config),
        "diffusion": to_dict(exported.process.config),
        "generation": to_dict(exported.generation),
        "image_size": exported.image_size,
        "tokenizer": exported.tokenizer.fingerprint,
        "autoencoder": exported.autoencoder.fingerprint,
    }
    return short_hash(facts)
