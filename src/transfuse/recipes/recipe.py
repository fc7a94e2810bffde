"""A `Recipe` is a run as data: frozen dataclasses, saved with the run as `config.json`.

Nothing is opened here. `transfuse.runs.resolve(recipe)` opens what a recipe names.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch

from ..config import nearest
from ..data import EditConfig, PairConfig
from ..data.bundled import WorldConfig
from ..devices import Device, Precision
from ..diffusion import DiffusionConfig
from ..errors import UserError
from ..export import GenerationConfig
from ..model import ModelConfig
from ..sequence import SequenceFormat, Tokenizer
from ..training import DistilConfig, LoopConfig, ObjectiveConfig, OptimizerConfig, ParallelConfig
from ..training.finetune import Freeze, LoRAConfig

ImageContext = Literal["capped", "clean-copy"]

VERSION = 2  # of the layout of `config.json`

OF_THE_WORLD = ("world", "edits", "dialogues")  # bundled sources whose images are `data.world.size` pixels
BUNDLED = {**dict.fromkeys(OF_THE_WORLD, "pictures"), "glosses": "text"}  # kinds of the bundled sources
SOURCE_SETTINGS = ("weight", "epochs", "final")


def check_split(batch_size: int, accumulate: int) -> None:
    """Raise ValueError unless a batch splits into `accumulate` equal parts."""
    for name, value in (("batch_size", batch_size), ("accumulate", accumulate)):
        if value < 1:
            raise ValueError(f"data.{name}: expected at least 1, found {value}")
    if batch_size % accumulate:
        raise ValueError(f"data.batch_size: expected a multiple of data.accumulate ({accumulate}), found {batch_size}")


@dataclass(frozen=True)
class SourceSpec:
    """An entry of `data.sources`, such as "photos,weight=2,epochs=4,final=10"."""

    name: str
    """a bundled source, or the folder or URL of a data set"""
    weight: float = 1.0
    """weight relative to the other sources of its kind (pictures, or text)"""
    epochs: float | None = None
    """most passes over it; None: no limit"""
    final: float | None = None
    """weight in the last stretch of the run; None: unchanged"""

    @classmethod
    def parse(cls, text: str) -> SourceSpec:
        """Read "NAME,weight=W,epochs=E,final=F". Raises UserError."""
        name, *settings = text.split(",")
        name = name.rstrip("/") or name
        values: dict[str, float] = {}
        for setting in settings:
            key, equals, value = setting.partition("=")
            if key not in SOURCE_SETTINGS or not equals:
                raise UserError(f'data.sources: {name}: unknown setting "{setting}"{nearest(key, SOURCE_SETTINGS)}')
            try:
                values[key] = float(value)
            except ValueError:
                values[key] = -1.0
            if not 0 <= values[key] < float("inf") or (key == "epochs" and not values[key]):
                raise UserError(f"data.sources: {name}: {key}: expected a number, not negative, found {value}")
        if not name:
            raise UserError(f'data.sources: expected a name or a folder first, found "{text}"')
        return cls(name, **values)


@dataclass(frozen=True)
class DataConfig:
    """The sources of a run, their shares, and the size of a batch."""

    sources: tuple[str, ...] = ("world", "glosses")
    """ "world" (captioned scenes), "edits" (instructions to change scenes), "dialogues" (conversations about scenes),
    "glosses" (definitions), data sets (folders
    or URLs that transfuse data build made); each may have settings after commas: photos,weight=2,epochs=4,final=10"""
    source_fingerprints: tuple[str, ...] = ()
    """fingerprints of the data sets, filled in when a run begins; resuming requires the same"""
    final_stretch: float = 0.01
    """last part of the run, in which the sources' `final` weights count"""
    max_errors: float = 0.001
    """share of a data set's documents that may turn out damaged before training stops; ten always may"""
    cache_gigabytes: float = 20.0
    """disk space for files fetched from remote data sets"""
    world: WorldConfig = field(default_factory=WorldConfig)
    autoencoder: str = "pixels"
    """ "pixels", the name of a bundled autoencoder, or a folder with one (ours or diffusers')"""
    autoencoder_weights: str = ""
    """fingerprint of the autoencoder, filled in when a run begins; resuming requires the same"""
    text_share: float = 0.5
    """share that comes from sources of text alone (the paper's 1 : 1)"""
    share_of: Literal["positions", "documents"] = "positions"
    """positions, as in the paper: the more a picture takes, the fewer there are; documents: sample i is the same
    document for every model, whatever its images are made of"""
    pairs: PairConfig = field(default_factory=PairConfig)
    context: ImageContext = "capped"
    """how an image that is learned is seen by what follows it. capped: with its noise, which `data.pairs` limits where
    it comes before all text (the paper); clean-copy: clean, while a noised copy, seen by itself alone, is learned
    without any limit, at the cost of that copy's positions (BAGEL, arXiv 2505.14683)"""
    edits: EditConfig = field(default_factory=EditConfig)
    row_length: int | None = None
    """positions of a packed row; None: a batch counts documents"""
    batch_size: int = 512
    """documents per step, or rows"""
    accumulate: int = 1
    """micro-batches a step is split into; the result is the same, but for what dropout takes"""
    workers: int = 0
    """processes that prepare coming steps; 0: in the training process"""

    @property
    def specs(self) -> tuple[SourceSpec, ...]:
        """The sources, parsed. Raises UserError for a source given twice, or none."""
        specs = tuple(SourceSpec.parse(text) for text in self.sources)
        names = [spec.name for spec in specs]
        if not names or len(set(names)) < len(names):
            raise UserError(f"data.sources: expected each source once, found {', '.join(names) or 'none'}")
        return specs

    @property
    def of_the_world(self) -> bool:
        """True if any source shows the bundled world's scenes."""
        return any(SourceSpec.parse(text).name in OF_THE_WORLD for text in self.sources)

    def __post_init__(self) -> None:
        if not 0 <= self.text_share <= 1:
            raise ValueError(f"data.text_share: expected a share from 0 to 1, found {self.text_share}")
        for name in ("final_stretch", "max_errors"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.{name}: expected a share from 0 to 1, found {getattr(self, name)}")
        if self.workers < 0:
            raise ValueError(f"data.workers: expected at least 0, found {self.workers}")
        if self.row_length is not None and self.row_length < 2:
            raise ValueError(f"data.row_length: expected at least 2, found {self.row_length}")
        check_split(self.batch_size, self.accumulate)


@dataclass(frozen=True)
class InitConfig:
    """The beginning of a run from the model in `start`."""

    allow_changes: tuple[str, ...] = ()
    """changes of that model that are accepted, by the names that the refusals give: fields of its config.json that are
    dropped, kinds of weights that are missing or left over, "vocabulary" for a tokenizer with far fewer tokens; of an
    export "network": the recipe's network takes its vocabulary and the weights that fit; "max_seq_len": its network,
    with the recipe's longer sequences (`--model.max-seq-len` next to `--start` allows this by itself)"""
    image_tower: Literal["copy", "new"] = "copy"
    """with model.experts, the image tower of a model that has none: a copy of its text tower, or new random weights"""


@dataclass(frozen=True)
class Recipe:
    """Everything that defines a training run. Presets are functions that return one."""

    preset: str = ""
    version: int = VERSION
    seed: int = 0
    precision: Precision = "auto"
    """dtype of the residual stream; auto: bfloat16 where the processor multiplies it natively, else float32"""
    device: Device = "auto"
    start: str = ""
    """an export, taken whole; or a language model's folder in Hugging Face's layout: its transformer and tokenizer"""
    init: InitConfig = field(default_factory=InitConfig)
    freeze: Freeze = "none"
    """weights of `start` that are not trained. text: all that text positions use, so that its text stays the same, bit
    for bit; needs model.experts (LMFusion, arXiv 2412.15188)"""
    text_rate: float = 1.0
    """the learning rate of those weights is multiplied by this (LMFusion tried 0.1)"""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    distil: DistilConfig = field(default_factory=DistilConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)

    renamed: ClassVar[dict[str, str]] = dict.fromkeys(("start_strict", "no_start_strict"), "init.allow_changes")

    @staticmethod
    def upgraded(values: dict[str, Any]) -> dict[str, Any]:
        """Return the values of a file in which `start_strict` was yes or no."""
        rest = {name: value for name, value in values.items() if name != "start_strict"}
        changes = {} if values.get("start_strict", True) else {"init": {"allow_changes": ["network"]}}
        return {**changes, **rest}

    def __post_init__(self) -> None:
        if not 0 <= self.text_rate < float("inf"):
            raise ValueError(f"text_rate: expected at least 0, found {self.text_rate}")

    def sequence_format(self, tokenizer: Tokenizer) -> SequenceFormat:
        """Return how this run lays documents out in training."""
        return replace(self.model.sequence_format(tokenizer), clean_copy=self.data.context == "clean-copy")

    @property
    def compute(self) -> torch.dtype:
        """The dtype of the residual stream, once `precision` is no longer "auto"."""
        return torch.float32 if self.precision == "float32" else torch.bfloat16
