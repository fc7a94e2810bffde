"""The work of a distributed test's processes: torchrun starts this file with a case's name and a folder.

Each case trains the preset "tiny" some other way; the first rank leaves `losses.json`, `totals.json` and
`weights.safetensors`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from transfuse.autoencoders.features import MobileNetV2
from transfuse.data.loader import EMPTY
from transfuse.recipes import Recipe, preset
from transfuse.recipes.autoencoders import AUTOENCODERS, AutoencoderRecipe
from transfuse.runs import open_run
from transfuse.sequence import Batch, collate
from transfuse.train import build_trainer
from transfuse.train_autoencoder import build_autoencoder_trainer, open_autoencoder_run
from transfuse.training import Distributed, ParallelConfig, join
from transfuse.training.distributed import arrange, local, stack, whole
from transfuse.training.metrics import Average
from transfuse.training.trainer import StopFlags

STEPS = 4

CASES: dict[str, dict[str, Any]] = {
    "shard": {},
    "accumulate": {"data.accumulate": 4},
    "bfloat16": {"precision": "bfloat16"},
    "replicate": {"parallel.replicate": 2},
    "tensor": {"parallel.tensor": 2},
    "tensor-stop": {"parallel.tensor": 2},
    "experts": {"model.experts": "all"},
    "experts-tensor": {"model.experts": "all", "parallel.tensor": 2},
    "experts-codes": {
        "data.autoencoder": "vq-f4-small",
        "model": {
            "images": "codes",
            "patch_size": 1,
            "image_attention": "causal",
            "codebook_size": 1024,
            "experts": "ffn",
        },
    },
    "full": {"parallel.activation_checkpointing": "full"},
    "selective": {"parallel.activation_checkpointing": "selective"},
    "timestep": {"model.timestep_at": "patch"},
    "muon": {"optimizer.name": "muon"},
    "muon-tensor": {"optimizer.name": "muon", "parallel.tensor": 2},
    "newer": {"model": {"positions": "2d", "timestep": "adaln"}},
    "tied": {"model": {"tie_embeddings": True, "sliding_window": 9, "full_attention_layers": (0,)}},
    "unet": {"model.adapter": "unet", "model.unet_channels": (8, 16, 16, 16)},
    "dropout": {"model.dropout": 0.1},
    "dropout-full": {"model.dropout": 0.1, "parallel.activation_checkpointing": "full"},
    "clean-copy": {"data.context": "clean-copy", "data.pairs.caption_first": 0.3},
    "align": {"objective": {"align_weight": 0.5, "align_layer": 1}},
    "align-uneven": {"objective": {"align_weight": 0.5, "align_layer": 1}},
    "uneven": {},
    "text-steps": {"data.text_share": 0.6, "optimizer": {"warmup": 1, "learning_rate": 1e-4}},
    "poisoned": {"loop.guard.nonfinite": "skip"},
    "poisoned-copies": {"loop.guard.nonfinite": "skip", "parallel.replicate": 2},
    "codes": {
        "data.autoencoder": "vq-f4-small",
        "model": {"images": "codes", "patch_size": 1, "image_attention": "causal", "codebook_size": 1024},
    },
    "text": {"model.images": "none", "data.text_share": 1.0, "data.sources": ("glosses",)},
}


def recipe(name: str) -> Recipe | AutoencoderRecipe:
    if name in AUTOENCODERS:
        coder = AUTOENCODERS[name]()
        objective = replace(coder.objective, adversarial_from=2, revive_after=2)
        loop, optimizer = replace(coder.loop, steps=STEPS, checkpoint_every=0), replace(coder.optimizer, warmup=100)
        return replace(coder, objective=objective, loop=loop, optimizer=optimizer)
    made = replace(preset("tiny"), precision="float32")  # not what this processor is fastest with
    made = replace(made, loop=replace(made.loop, steps=STEPS, log_every=1, checkpoint_every=0))
    made = replace(made, optimizer=replace(made.optimizer, warmup=100))  # small steps, or rounding grows
    for setting, value in CASES[name].items():
        made = changed(made, setting.split("."), value)
    return made


def changed(value: Any, names: list[str], to: Any) -> Any:
    inner = getattr(value, names[0])
    if len(names) > 1:
        to = changed(inner, names[1:], to)
    return replace(value, **{names[0]: replace(inner, **to) if isinstance(to, dict) else to})


class Uneven:
    """Gives the first rank all images of a step and the others none, the second rank nearly all of the text."""

    def __init__(self, load: Any, ranks: Distributed) -> None:
        self.load, self.ranks = load, ranks

    def __call__(self, step: int) -> list[Batch]:
        loader = self.load
        first = step * loader.batch_size
        documents = [loader.document(sample) for sample in range(first, first + loader.batch_size)]
        pictured = [document for document in documents if document.images]
        plain = [document for document in documents if not document.images]
        parts = [pictured, plain, *[[]] * 2][: self.ranks.datas]
        if self.ranks.datas == 1:
            parts = [documents]
        own = parts[self.ranks.data]
        batch = collate(own or [EMPTY], loader.form, padding_image=loader.padding_image)
        return [batch if own else replace(batch, n_padding=batch.positions)]

    def position(self) -> dict[str, int]:
        return {}

    def start_from(self, position: dict[str, int]) -> None: ...


class TextSteps:
    """Gives steps 1 and 2 their documents without images alone, every other one to the next rank."""

    def __init__(self, load: Any, ranks: Distributed) -> None:
        self.load, self.ranks = load, ranks

    def __call__(self, step: int) -> list[Batch]:
        loader = self.load
        if step not in (1, 2):
            return loader(step)  # type: ignore[no-any-return]
        samples = range(step * loader.batch_size, (step + 1) * loader.batch_size)
        plain = [document for document in map(loader.document, samples) if not document.images]
        own = plain[self.ranks.data :: self.ranks.datas]
        return [collate(own, loader.form, padding_image=loader.padding_image)]

    def position(self) -> dict[str, int]:
        return {}

    def start_from(self, position: dict[str, int]) -> None: ...


class Poisoned:
    """In steps 1 and 3 a picture of the step's last samples, so of the last rank's, is not finite."""

    def __init__(self, load: Any, ranks: Distributed) -> None:
        self.load, self.ranks = load, ranks

    def __call__(self, step: int) -> list[Batch]:
        batches = self.load(step)
        if step % 2 and self.ranks.data == self.ranks.datas - 1:
            *others, last = batches[-1].latents
            batches[-1] = replace(batches[-1], latents=(*others, last * float("nan")))
        return batches

    def position(self) -> dict[str, int]:
        return {}

    def start_from(self, position: dict[str, int]) -> None: ...


def ranks_for(name: str) -> Distributed:
    if not dist.is_initialized():
        return Distributed()
    parallel = getattr(recipe(name), "parallel", ParallelConfig())
    return arrange(torch.device("cpu"), parallel.replicate, parallel.tensor)


def run(name: str, steps: int, folder: Path) -> None:
    """Train a case up to a step, from the folder's newest checkpoint if there is one; save. Losses and norms of each
    step, and all weights, are left in the folder."""
    opened, ranks = recipe(name), ranks_for(name)
    if name.startswith("align"):
        opened = changed(opened, ["objective", "align_teacher"], str(folder / "teacher.safetensors"))
        if ranks.first:
            torch.manual_seed(0)
            folder.mkdir(parents=True)
            named = MobileNetV2().state_dict().items()
            save_file({key: x for key, x in named if not key.endswith("tracked")}, folder / "teacher.safetensors")
    begin: Any = open_run if isinstance(opened, Recipe) else open_autoencoder_run
    if ranks.first:
        begin(opened, folder)
    ranks.wait()
    if isinstance(opened, Recipe):
        trainer = build_trainer(open_run(opened, folder), folder, ranks)
    else:
        trainer = build_autoencoder_trainer(open_autoencoder_run(opened, folder), folder, ranks=ranks)
    if name.endswith("uneven"):
        trainer.load = Uneven(trainer.load, ranks)  # type: ignore[assignment]
    if name == "text-steps":
        trainer.load = TextSteps(trainer.load, ranks)  # type: ignore[assignment]
    if name.startswith("poisoned"):
        trainer.load = Poisoned(trainer.load, ranks)  # type: ignore[assignment]
    trainer.restore()
    if name == "tensor-stop":  # as if a signal had come to the last rank alone
        flags = trainer.train_step(Average(), StopFlags(stop=ranks.rank == ranks.count - 1))
        stops = [flags.stop for flags in ranks.gather_all(flags)]
        if ranks.first:
            (folder / "stops.json").write_text(json.dumps(stops))
        return
    lines = []
    while trainer.step < steps:
        average = Average()
        trainer.train_step(average)
        lines.append(average.merged(ranks).means())
    trainer.save()
    if name == "poisoned-copies":
        own = [local(weight.detach()) for weight in trainer.model.parameters()]
        for other in ranks.gather(own):
            assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True)), "copies drift apart"
    weights = stack((key, whole(weight.detach())) for key, weight in trainer.model.named_parameters())
    averages = trainer.averaged()
    if ranks.first:
        counted = {key: total for key, total in trainer.totals.items() if key not in ("seconds", "waited")}
        (folder / "totals.json").write_text(json.dumps(counted))
        (folder / "losses.json").write_text(json.dumps(lines))
        save_file({key: weight.contiguous() for key, weight in weights.items()}, folder / "weights.safetensors")
        save_file({key: weight.contiguous() for key, weight in averages.items()}, folder / "averages.safetensors")
    ranks.wait()


def main(folder: str, *jobs: str) -> None:
    """Jobs: CASE, or CASE:STEPS:FOLDER."""
    torch.set_num_threads(1)
    with join("cpu"):
        for job in jobs:
            name, steps, inside = [*job.split(":"), str(STEPS), job][:3]
            run(name, int(steps), Path(folder) / inside)


if __name__ == "__main__":
    main(*sys.argv[1:])
