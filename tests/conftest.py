"""Small models with random weights, and documents to run them on. No test here needs a trained model."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from transfuse.autoencoders import Pixels
from transfuse.diffusion import DiffusionConfig, Process
from transfuse.evaluate import evaluation_page
from transfuse.export import Exported, GenerationConfig, save_export
from transfuse.inference.model_runner import ModelRunner
from transfuse.model import ModelConfig, Transfusion
from transfuse.recipes import Recipe, preset
from transfuse.report import render
from transfuse.runs import Run, open_run, train_tokenizer
from transfuse.sequence import Batch, Document, Image, SequenceFormat, Text, Tokenizer, collate
from transfuse.training import LoopConfig, ObjectiveConfig, OptimizerConfig, Trainer, TransfusionObjective
from transfuse.training.checkpoint import Groups, read
from transfuse.training.optimizer import GuardConfig

WORDS = ["a crab on a red background", "two balloons", "the moon is above a small boat on blue", "hello, world"] * 4


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Two workers share two cores; more threads each would only get in each other's way."""
    torch.set_num_threads(1)


def randomised(config: ModelConfig, seed: int = 0, compute_dtype: torch.dtype = torch.float32) -> Transfusion:
    """A model in which nothing is zero: the patch decoder starts at zero, which would hide mistakes."""
    model = Transfusion(config, compute_dtype).initialise(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


def evaluation_html(measures: list[Any], measured: list[Any]) -> str:
    """The page of `transfuse evaluate` for a model named "m"."""
    return render(evaluation_page({"model": "m", "model_hash": "a", "version": "b"}, measures, measured))


def tiny(**changes: object) -> ModelConfig:
    settings: dict[str, object] = {
        "text_vocab_size": 320,
        "d_model": 64,
        "n_layers": 2,
        "n_heads": 4,
        "max_seq_len": 256,
        "latent_channels": 3,
        "patch_size": 2,
        "unet_channels": (16, 32),
        "patch_positions": "learned",
    }
    return ModelConfig(**{**settings, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(WORDS, 320)


@pytest.fixture(scope="session")
def grammar(tokenizer: Tokenizer) -> SequenceFormat:
    return tokenizer.sequence_format(patch_size=2)


def exported(tokenizer: Tokenizer, **changes: object) -> Exported:
    model = randomised(tiny(**changes)).eval().requires_grad_(False)
    process = Process(DiffusionConfig(prediction="x0", weighting="v", clip_x0=1.0))
    return Exported(model, process, Pixels(), tokenizer, 8, GenerationConfig())


BYTES = Tokenizer.train([], 260)
"""a token for each byte"""


def of_bytes(data: bytes) -> list[int]:
    """Ids of `BYTES`, whether or not the bytes make characters."""
    alphabet = BYTES.backend.get_vocab()
    visible = {**{byte: chr(byte) for byte in (*range(33, 127), *range(161, 173), *range(174, 256))}}
    hidden = iter(range(256, 512))
    visible |= {byte: chr(next(hidden)) for byte in range(256) if byte not in visible}
    return [alphabet[visible[byte]] for byte in data]


def chained(chain: dict[int, int]) -> Exported:
    """A model that writes, after each token of `chain`, the next one: its blocks add nothing, its head is a table."""
    made = exported(BYTES, text_vocab_size=260, norm_order="pre")
    model, known = made.model, list(chain)
    with torch.no_grad():
        for block in model.transformer.blocks:
            block.out.weight.zero_()
            block.feed_forward.down.weight.zero_()
        model.transformer.norm.weight.fill_(1)
        model.embedding.weight.zero_()
        model.lm_head.weight.zero_()
        for place, token in enumerate(known):
            model.embedding.weight[token, place] = 1
            model.lm_head.weight[chain[token], place] = 1
    return made


def linked(data: bytes, then: int, start: int) -> dict[int, int]:
    ids = [start, *of_bytes(data), then]
    return dict(itertools.pairwise(ids))


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """Folder of an export with random weights; pictures of 8 x 8 pixels, 20 steps."""
    return saved(exported(tokenizer), tmp_path_factory.mktemp("served") / "small" / "export")


def saved(made: Exported, folder: Path) -> Path:
    """Write a model of 8 x 8 pixels to a folder."""
    folder.parent.mkdir(exist_ok=True)
    weights, config = made.model.state_dict(), made.model.config
    return save_export(
        folder, weights, config, made.process.config, made.tokenizer, made.autoencoder, 8, GenerationConfig(), "a model"
    )


RESULT = {"measure": "text", "name": "perplexity", "value": 12.5, "count": 3, "data": "words", "drawing": None}
"""a measured number, as results.json has it"""


def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """Replace the Hub's functions: uploads go to `folder`/uploaded. Returns what each was called with."""
    import huggingface_hub

    done: dict[str, dict[str, Any]] = {}

    def create(repo_id: str, **options: Any) -> Any:
        done["create_repo"] = {"repo_id": repo_id, **options}
        return SimpleNamespace(repo_id=repo_id)

    def upload(folder_path: Path, **options: Any) -> str:
        done["upload_folder"] = options
        shutil.copytree(folder_path, folder / "uploaded")
        return f"https://hub/{options['repo_id']}/commit/1"

    monkeypatch.setattr(huggingface_hub, "create_repo", create)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload)
    return done


@pytest.fixture(scope="session")
def server(served: Path) -> Iterator[Any]:
    """`transfuse serve` with its default options, shared by the tests in tests/serving."""
    from running import Running

    with Running(served) as running:
        yield running


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    """Files with a content each, and the folders they lie in."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def latent(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(3, rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def mixed() -> list[Document]:
    """Documents of every shape: image sizes differ, images adjacent, first, last; text only; nothing but markers."""
    return [
        Document([Text((10, 11, 12)), Image(latent(4, 4, 1))], sample=1),
        Document([Text((13,))], sample=2),
        Document([Image(latent(8, 4, 2), max_timestep=500), Text((14, 15, 16, 17, 18, 19))], sample=3),
        Document([Text((20, 21)), Image(latent(2, 2, 3)), Image(latent(4, 6, 4)), Text((22,))], sample=4),
        Document([], sample=5),
        Document([Image(latent(4, 4, 5))], sample=6, predict=False),
        Document([Text((23,) * 40)], sample=7),
    ]


@dataclass
class Numbered:
    """Two samples a step, a text and a picture, by the step's number; `factors` multiply the pictures of some steps.

    order: which step's data a step gets, where it is not its own. asked: the steps that were asked for.
    """

    grammar: SequenceFormat
    factors: dict[int, float] = field(default_factory=dict)
    order: list[int] | None = None
    asked: list[int] = field(default_factory=list)

    def __call__(self, step: int) -> list[Batch]:
        step = self.order[step] if self.order else step
        self.asked.append(step)
        text = Document([Text(tuple(10 + (step * i) % 50 for i in range(8)))], sample=2 * step)
        picture = Document(
            [Image(latent(4, 4, step) * self.factors.get(step, 1.0))], sample=2 * step + 1, predict=False
        )
        return [collate([text], self.grammar), collate([picture], self.grammar)]

    def position(self) -> dict[str, int]:
        return {}

    def start_from(self, position: dict[str, int]) -> None:
        pass


Make = Callable[..., Trainer]


@pytest.fixture
def make(tmp_path: Path, grammar: SequenceFormat) -> Make:
    """A trainer in a folder, gone on with if it has begun."""

    def build(name: str, load: Numbered | None = None, steps: int = 8, guard: GuardConfig | None = None, **loop: Any):
        goal = TransfusionObjective(ObjectiveConfig(), Process(DiffusionConfig(prediction="x0")), 11)
        settings = {"sample_every": 0, "checkpoint_every": 0, "log_every": 1, "ema_decay": 0.9, **loop}
        config = LoopConfig(steps, guard=guard or GuardConfig(), **settings)
        load, optimizer = load or Numbered(grammar), OptimizerConfig(1e-2, warmup=2)
        trainer = Trainer(randomised(tiny()), goal, load, tmp_path / name, config, optimizer)
        trainer.restore()
        return trainer

    return build


def tensors(trainer: Trainer) -> Groups:
    """Weights, averages and moments, as the newest checkpoint has them."""
    path, complaints = trainer.checkpoints.newest()
    assert path is not None
    assert not complaints
    return read(path).tensors


def assert_equal(ours: Groups, theirs: Groups) -> None:
    for kind, found in ours.items():
        assert found.keys() == theirs[kind].keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, theirs[kind][name]), (kind, name)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Positions of every pass of the engine's network, as they come."""
    found: list[int] = []
    original = ModelRunner.forward

    def count(self, cache, feeds, predict):
        found.append(sum(feed.segment.count for feed in feeds))
        return original(self, cache, feeds, predict)

    monkeypatch.setattr(ModelRunner, "forward", count)
    return found


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives, forward or backward."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        leaves = (leaf for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor))
        self.elements = max([self.elements, *(leaf.numel() for leaf in leaves)])
        return found


@cache
def tiny_tokenizer() -> str:
    """Return the tokenizer.json that every run of the preset "tiny" trains."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        train_tokenizer(preset("tiny")).save(path)
        return path.read_text()


def open_tiny(recipe: Recipe, folder: Path) -> Run:
    """Open a run of the preset "tiny", or of a change of it with the same words, without training the tokenizer."""
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "tokenizer.json").write_text(tiny_tokenizer())
    return open_run(recipe, folder)


class KeepsGradients(torch.optim.SGD):
    """An optimizer that changes no weight and keeps the gradients of its last step by name (`kept`)."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model.parameters(), lr=0.0)
        self.named, self.kept = list(model.named_parameters()), {}

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.kept = {name: p.grad.clone() for name, p in self.named if p.grad is not None}
