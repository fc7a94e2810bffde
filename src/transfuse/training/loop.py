"""The loop: one step, again and again, saved so that it can be stopped at any moment and go on as if it had not.

The same loop trains anything that brings an objective (`objective.Objective`). What a step sees is a function of its
number; so weights, moments, EMA and the step number are the whole state.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from ..console import progress, say
from ..errors import UserError
from .checkpoint import Checkpoint, CheckpointFolder
from .ema import EMA
from .metrics import Average, MetricsLog
from .objective import Objective, StepBatch
from .optimizer import OptimizerConfig, build_optimizer, learning_rate
from .signals import StopRequest


class DivergedError(UserError):
    """A loss or the gradient is not a finite number; raised before the optimizer has touched a weight."""


@dataclass(frozen=True)
class LoopConfig:
    steps: int = 250_000
    ema_decay: float = 0.9999
    log_every: int = 10
    sample_every: int = 1000
    """steps between grids of samples; 0: none"""
    checkpoint_every: int = 1000
    keep: int = 2
    """how many of the newest checkpoints stay"""
    max_seconds: float | None = None
    """stop training after this much time in all, resumed parts included; None: never"""


class Loader(Protocol):
    """The micro-batches of a step, a pure function of its number; and a few numbers that make going on at one quick."""

    def __call__(self, step: int) -> Sequence[StepBatch]: ...

    def position(self) -> dict[str, int]: ...

    def start_from(self, position: dict[str, int]) -> None: ...


class Trainer:
    """Trains `model` on `load(step)`: the micro-batches of a step, a pure function of its number.

    flops    operations a batch costs, for the achieved rate
    sample   called with (model, path) under the averaged weights to draw a grid of samples
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        load: Loader,
        folder: Path,
        loop: LoopConfig,
        optimizer: OptimizerConfig,
        flops: Callable[[Any], float] = lambda batch: 0.0,
        sample: Callable[[nn.Module, Path], None] | None = None,
    ) -> None:
        self.model, self.objective, self.load, self.folder = model, objective, load, folder
        self.config, self.optimizer_config = loop, optimizer
        self.flops, self.sample = flops, sample
        self.device = next(model.parameters()).device
        self.optimizer = build_optimizer(model, optimizer)
        self.ema = EMA(model, loop.ema_decay)
        self.checkpoints = CheckpointFolder(folder / "checkpoints", loop.keep)
        self.step = 0
        self.totals: dict[str, float] = {"flops": 0.0, "seconds": 0.0, "waited": 0.0}

    def restore(self) -> bool:
        """Go on from the newest whole checkpoint, if there is one."""
        checkpoint, complaints = self.checkpoints.load()
        for complaint in complaints:
            say(complaint)
        if checkpoint is None:
            return False
        try:
            self.model.load_state_dict(checkpoint.tensors["model"])
            for name, weight in self.ema.weights.items():
                weight.copy_(checkpoint.tensors["ema"][name])
        except (KeyError, RuntimeError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise UserError(
                f"{self.checkpoints.folder}: the checkpoint has another shape than the model ({reason})"
            ) from None
        _load_moments(self.model, self.optimizer, checkpoint.tensors["optimizer"])
        self.step, self.totals = checkpoint.step, {"waited": 0.0, **checkpoint.progress["totals"]}
        self.load.start_from(checkpoint.progress.get("data", {}))
        return True

    def save(self) -> Path:
        tensors = {
            "model": {name: tensor.detach() for name, tensor in self.model.state_dict().items()},
            "ema": self.ema.weights,
            "optimizer": _moments(self.model, self.optimizer),
        }
        progress = {"totals": self.totals, "data": self.load.position()}
        return self.checkpoints.save(Checkpoint(self.step, tensors, progress))

    def run(self) -> Literal["finished", "stopped"]:
        """Train to the last step, or until asked to stop; saved either way."""
        log = MetricsLog(self.folder / "metrics.jsonl", self.step)
        average, window = Average(), time.monotonic()
        before = dict(self.totals)
        out_of_time = False
        with StopRequest() as stop, progress("train", self.config.steps, self.step) as bar:
            while self.step < self.config.steps and not stop.requested and not out_of_time:
                began = time.monotonic()
                self.train_step(average)
                self.totals["seconds"] += time.monotonic() - began
                out_of_time = self.config.max_seconds is not None and self.totals["seconds"] > self.config.max_seconds
                means = average.means()
                bar.advance(
                    note=" ".join(f"{name} {means[name]:.3f}" for name in self.objective.names if name in means)
                )
                if self.step % self.config.log_every == 0 or self.step == self.config.steps:
                    log.write(self._line(means, before, time.monotonic() - window))
                    average, window, before = Average(), time.monotonic(), dict(self.totals)
                if self.config.checkpoint_every and self.step % self.config.checkpoint_every == 0:
                    self.save()
                if self.sample and self.config.sample_every and self.step % self.config.sample_every == 0:
                    with self.ema.applied(self.model):
                        self.sample(self.model, self.folder / "samples" / f"step-{self.step:08d}.png")
        if not self.checkpoints.complete() or self.checkpoints.complete()[-1].name != f"step-{self.step:08d}":
            self.save()
        if out_of_time and self.step < self.config.steps:
            say(f"train: {self.config.max_seconds:.0f} s are over at step {self.step} of {self.config.steps}")
        return "stopped" if stop.requested and self.step < self.config.steps else "finished"

    def train_step(self, average: Average) -> None:
        """One optimizer step. Losses are divided by counts over all its micro-batches, so splitting changes nothing."""
        began = time.monotonic()
        loaded = self.load(self.step)
        self.totals["waited"] += time.monotonic() - began
        batches = [batch.to(self.device) for batch in loaded]
        counts = [sum(term) for term in zip(*(self.objective.counts(batch) for batch in batches), strict=True)]
        scale = torch.tensor(
            [weight / max(1, count) for weight, count in zip(self.objective.weights, counts, strict=True)],
            device=self.device,
        )
        summed = torch.zeros(len(counts), device=self.device)
        for batch in batches:
            sums = self.objective.sums(self.model, batch)
            (sums.losses.float() * scale).sum().backward()
            summed += sums.losses.detach()
            for name, (total, count) in sums.details.items():
                average.add(name, total, count)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.optimizer_config.clip)
        if not bool(torch.isfinite(summed.sum() + norm)):
            self._diverged(batches, summed, norm)
        rate = learning_rate(self.optimizer_config, self.step, self.config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.objective.after_step(self.model, self.step + 1, batches)
        self.ema.update(self.model, self.step)
        self.step += 1
        for name, total, count in zip(self.objective.names, summed.tolist(), counts, strict=True):
            average.add(name, total, count)
        average.add("gradient_norm", float(norm), 1)
        average.add("learning_rate", rate, 1)
        for batch in batches:
            for name, quantity in {**batch.quantities, "flops": self.flops(batch)}.items():
                self.totals[name] = self.totals.get(name, 0) + quantity

    def _line(self, means: dict[str, float], before: dict[str, float], seconds: float) -> dict[str, Any]:
        rates = {
            f"{name}_per_second": (value - before.get(name, 0)) / seconds
            for name, value in self.totals.items()
            if name not in ("seconds", "waited") and not name.startswith("positions of ")
        }
        waited = (self.totals["waited"] - before["waited"]) / max(1e-9, self.totals["seconds"] - before["seconds"])
        return {"step": self.step, **means, **self.totals, **rates, "waited_share": waited}

    def _diverged(self, batches: Sequence[StepBatch], summed: Tensor, norm: Tensor) -> None:
        offenders = sorted({sample for batch in batches for sample in self.objective.offenders(self.model, batch)})
        where = (
            f"samples {offenders}" if offenders else f"samples of the step: {[s for b in batches for s in b.samples]}"
        )
        losses = ", ".join(f"{name} {value}" for name, value in zip(self.objective.names, summed.tolist(), strict=True))
        raise DivergedError(
            f"step {self.step}: expected finite numbers, found summed losses {losses}, gradient norm {float(norm)}; "
            f"{where}; no weight was changed"
        )


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by parameter name: plain tensors, so that no pickle is needed."""
    return {
        f"{key}.{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _load_moments(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        kind, name = key.split(".", 1)
        # Laid out in memory as the parameter is: the fused optimizer pairs elements by their place in memory.
        parameter = parameters[name]
        optimizer.state[parameter][kind] = value if kind == "step" else torch.empty_like(parameter).copy_(value)
