"""The comparison that a user makes: the demo's data and minutes for transfusion-pytorch, judged as our demo is.

    python benchmarks/outcome.py --seconds 480 --optimizers adamw muon --learning-rates 1e-3 3e-3 --out FILE
    transfuse demo --run runs/demo                       # our side, on the same machine in the same sitting

The peer gets the demo's width, depth and heads, its documents in the same order, the same warm-up, decay and averaged
weights, AdamW as in its README or the demo's Muon for the matrices of its attention and feed-forward layers, and its
own defaults for all else. Each setting is added to FILE as it ends, one that is in FILE is not run again, and the best
by Fréchet distance is named there. Its samples are drawn with guidance 3 (its default) by its midpoint rule, and both
judges of the demo name the things.
"""

from __future__ import annotations

import os

os.environ.setdefault("TQDM_DISABLE", "1")  # the peer draws a progress bar for every call

import argparse
import json
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn

from emoji_scenes.accuracy import caption_accuracy, draw_accuracy
from emoji_scenes.scene_classifier import SceneClassifier, keep_scene_classifier
from transfuse.devices import processor_name
from transfuse.evaluation.image_quality import frechet
from transfuse.recipes import Recipe, preset
from transfuse.runs import Run, resolve
from transfuse.runs.monitor import grid
from transfuse.sequence import Document, Image, Text
from transfuse.train import build_loader
from transfuse.training import EMA, OptimizerConfig, build_optimizer
from transfuse.training.optimizer import Muon

MIDPOINTS = 12
"""sampler steps of two evaluations each, as many evaluations as our demo's 25 steps make"""
CAPTION_LENGTH = 48
"""tokens of the longest caption that is written"""


class PeerPipeline:
    """The peer behind the two calls that the demo's judges make of a pipeline."""

    def __init__(self, model: Any, run: Run) -> None:
        self.model, self.run = model, run
        self.patch = run.recipe.model.patch_size
        side = run.sources.image_size // run.autoencoder.factor // self.patch
        self.shape = (side, side)

    def sample(self, document: Document) -> list[Any]:
        """Return a document as the peer takes it: token ids, and patches `[row, column, number]`."""
        parts: list[Any] = []
        for part in document.parts:
            if isinstance(part, Text):
                parts.append(torch.tensor(part.ids))
            elif isinstance(part, Image):
                parts.append(self.patches(part.latent))
        return parts

    def patches(self, latent: Tensor) -> Tensor:
        return nn.functional.unfold(latent[None].float(), self.patch, stride=self.patch)[0].T.reshape(*self.shape, -1)

    def latent(self, patches: Tensor) -> Tensor:
        side = self.patch * self.shape[0]
        return nn.functional.fold(patches.flatten(0, 1).T[None].float(), (side, side), self.patch, stride=self.patch)[0]

    @torch.inference_mode()
    def __call__(self, prompts: list[str], generator: int, **_: Any) -> SimpleNamespace:
        """Draw one image for each prompt; uint8 `[row, column, 3]`."""
        torch.manual_seed(generator)
        drawn = self.model.sample_many(
            [torch.tensor(self.run.tokenizer.encode(prompt)) for prompt in prompts],
            max_length=1,
            force_modality_at_start=(0, self.shape),
            fixed_modality_shape=self.shape,
            modality_steps=MIDPOINTS + 1,
        )
        latents = [next(part[1] for part in sample if isinstance(part, tuple)) for sample in drawn]
        return SimpleNamespace(images=list(self.run.autoencoder.decode(torch.stack([self.latent(x) for x in latents]))))

    @torch.inference_mode()
    def caption(self, pictures: list[PIL.Image.Image]) -> list[str]:
        """Describe each image greedily."""
        encoded = self.run.autoencoder.encode(np.stack([np.asarray(picture) for picture in pictures]))
        captions = []
        for latent in encoded:
            sample = self.model.sample_one(
                [(0, self.patches(latent))], max_length=CAPTION_LENGTH, text_temperature=0.0, cache_kv=True
            )
            words = [part for part in sample if not isinstance(part, tuple)][-1]
            known = [token for token in words.flatten().tolist() if token < self.run.tokenizer.vocab_size]
            captions.append(self.run.tokenizer.decode(known))
        return captions


def build(recipe: Recipe, strategy: str, clean: bool, numbers: int, shape: tuple[int, int], ids: int) -> nn.Module:
    """Return the peer with the demo's width, depth, heads and lambda; patches know their places, as in its README."""
    from loguru import logger
    from transfusion_pytorch import Transfusion as Peer

    logger.remove()
    torch.manual_seed(recipe.seed)
    model = recipe.model
    return Peer(
        num_text_tokens=ids,
        dim_latent=numbers,
        modality_default_shape=shape,
        modality_num_dim=2,
        add_pos_emb=True,
        flow_loss_weight=recipe.objective.image_weight,
        model_output_clean=clean,
        modality_processing=strategy,
        transformer={
            "dim": model.d_model,
            "depth": model.n_layers,
            "heads": model.n_heads,
            "dim_head": model.d_model // model.n_heads,
        },
    )


def peer_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return AdamW over the peer, or Muon over the matrices of attention and feed-forward layers, AdamW elsewhere."""
    if config.name == "adamw":
        return build_optimizer(model, config)
    matrices = {name: p for name, p in model.named_parameters() if ".fn." in name and p.ndim == 2}
    # Queries and keys, and gate and up, are stacked; each half is a matrix, as in our own network.
    rows = {
        p: (len(p) // 2,) * 2 if name.endswith(("to_qk.0.weight", "net.0.weight")) else (len(p),)
        for name, p in matrices.items()
    }
    others = nn.ParameterList(p for p in model.parameters() if p not in rows)
    adamw = build_optimizer(others, replace(config, name="adamw"))
    group = {"params": list(rows), "lr": config.learning_rate, "weight_decay": config.weight_decay}
    return Muon([group], adamw, rows, config.muon, torch.float32)


def train(
    run: Run, strategy: str, clean: bool, name: Literal["adamw", "muon"], rate: float, seconds: float
) -> tuple[PeerPipeline, dict[str, Any]]:
    """Train the peer for some seconds, reading included; the rate decays with the time that is spent."""
    recipe = run.recipe
    optimizer_config = replace(recipe.optimizer, name=name, learning_rate=rate, final_learning_rate=rate / 100)
    pipe = PeerPipeline(nn.Identity(), run)
    numbers = recipe.model.latent_channels * recipe.model.patch_size**2
    model = build(recipe, strategy, clean, numbers, pipe.shape, run.tokenizer.vocab_size)
    average, optimizer = EMA(model, recipe.loop.ema_decay), peer_optimizer(model, optimizer_config)
    batch = recipe.data.batch_size
    began, step, losses = time.monotonic(), 0, []
    with TemporaryDirectory() as scratch:
        loader = build_loader(run, Path(scratch))
        while (spent := time.monotonic() - began) < seconds:
            documents = [loader.document(step * batch + n) for n in range(batch)]
            warm = min(1.0, (step + 1) / optimizer_config.warmup)
            factor = warm * (0.505 + 0.495 * np.cos(np.pi * spent / seconds))
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            loss = model([pipe.sample(document) for document in documents if document is not None])
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), optimizer_config.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average.update(model, step)
            step += 1
            losses.append(float(loss.detach()))
    model.load_state_dict(average.weights, strict=False)
    pipe.model = model.eval()
    parameters = sum(weight.numel() for weight in model.parameters())
    facts = {"steps": step, "images": step * batch, "seconds": round(time.monotonic() - began, 1)}
    return pipe, {**facts, "parameters": parameters, "last_loss": sum(losses[-20:]) / len(losses[-20:])}


def judged(pipe: PeerPipeline, judge: SceneClassifier, count: int) -> tuple[dict[str, Any], np.ndarray]:
    """Return the demo's measures of the peer, and its drawings."""
    world: Any = pipe.run.recipe.data.world
    drawings = draw_accuracy(pipe, world, count, judge)  # type: ignore[arg-type]
    captions = caption_accuracy(pipe, world, count)  # type: ignore[arg-type]
    distance = frechet(judge.features(drawings.images), judge.features(drawings.real_images))
    measures = {
        "noun_strict": drawings.noun_strict,
        "noun": drawings.noun,
        "background": drawings.background,
        "frechet": distance,
        "caption_noun": captions.noun,
    }
    return {name: [each.value, each.low, each.high] for name, each in measures.items()}, drawings.images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=480.0, help="of training, for each setting")
    parser.add_argument("--optimizers", nargs="+", choices=["adamw", "muon"], default=["adamw", "muon"])
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-3, 3e-3])
    parser.add_argument("--strategies", nargs="+", default=["grouped"], help="auto times itself anew for every shape")
    parser.add_argument("--targets", nargs="+", choices=["flow", "clean"], default=["flow", "clean"])
    parser.add_argument("--count", type=int, default=120, help="held-out prompts, and images to describe")
    parser.add_argument("--judge", type=Path, default=Path("runs/demo/recogniser.safetensors"))
    parser.add_argument("--out", type=Path, help="write JSON there, and the drawings next to it")
    options = parser.parse_args()
    run = resolve(preset("demo"))
    assert run.recipe.data.world is not None
    judge = keep_scene_classifier(options.judge, run.recipe.data.world)
    report: dict[str, Any] = {
        "peer": "transfusion-pytorch 0.20",
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "seconds": options.seconds,
        "results": [],
    }
    if options.out and options.out.is_file():
        before = json.loads(options.out.read_text())
        if any(before[key] != report[key] for key in ("processor", "threads", "seconds")):
            parser.error(f"{options.out}: expected results of this machine and --seconds, found others")
        report = before
    results = report["results"]
    settings = product(options.strategies, options.targets, options.optimizers, options.learning_rates)
    for setting in settings:
        named = dict(zip(("strategy", "target", "optimizer", "learning_rate"), setting, strict=True))
        if any(named.items() <= result.items() for result in results):
            continue
        strategy, target, name, rate = setting
        pipe, facts = train(run, strategy, target == "clean", name, rate, options.seconds)
        measured, images = judged(pipe, judge, options.count)
        results.append({**named, **facts, **measured})
        print(json.dumps(results[-1]), flush=True)
        report["best"] = min(results, key=lambda result: result["frechet"][0])
        if options.out:
            grid(list(images[:36]), 6, 3).save(options.out.with_name(f"{options.out.stem}-{len(results)}.png"))
            options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
