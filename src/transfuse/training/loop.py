"""The loop: one step, again and again, saved so that it can be stopped at any moment and go on as if it had not.

The same loop trains anything that brings an objective (`objective.Objective`), in one process or many (`ranks`). What a
step sees is a function of its number; so weights, moments, EMA and a few numbers are the whole state.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..io import append_jsonl
from ..log import logger, progress
from .checkpoint import Checkpoint, CheckpointFolder
from .clock import Clock
from .ema import EMA
from .guard import Guard, GuardConfig, Verdict
from .hardware import memory_used, peak_of
from .metrics import Average, MetricsLog
from .objective import Objective, StepBatch
from .optimizer import OptimizerConfig, build_optimizer, learning_rate
from .parallel import clip_gradients, local, sum_over_copies, sum_over_ranks, whole
from .profiling import profiled
from .ranks import Ranks
from .signals import StopRequest
from .tensor_parallel import stack, stacked_name
from .trackers import TrackerName, Trackers


class DivergedError(UserError):
    """A loss or the gradient is not a finite number; raised before the optimizer has touched a weight."""


@dataclass(frozen=True)
class LoopConfig:
    steps: int = 250_000
    ema_decay: float = 0.9999
    log_every: int = 10
    sample_every: int = 1000
    """steps between grids of samples; 0: none"""
    measure_every: int = 0
    """steps between measures of the averaged weights; 0: none"""
    measures: tuple[str, ...] = ("captioning",)
    """what is measured then: names that `transfuse evaluate` knows; the numbers go to metrics.jsonl"""
    measure_count: int = 32
    """pictures, captions, questions of each: few, so the numbers are rough"""
    best: str = ""
    """MEASURE/NUMBER, one that is measured: what is best by it is exported to the run's best/; none if not given"""
    checkpoint_every: int = 1000
    keep: int = 2
    """how many of the newest checkpoints stay"""
    keep_every: int = 0
    """checkpoints of steps that divide by this stay, too; 0: none"""
    max_seconds: float | None = None
    """stop training after this much time in all, resumed parts included; None: never"""
    session_seconds: float | None = None
    """save and stop after this much time, to go on later with the same command; None: never"""
    guard: GuardConfig = field(default_factory=GuardConfig)
    profile: int = 0
    """trace so many steps, soon after the start, into the run's profile folder"""
    trackers: tuple[TrackerName, ...] = ()
    """where the lines of metrics.jsonl and the grids of samples go, too (each an extra of its name)"""

    def __post_init__(self) -> None:
        least = {"steps": 1, "log_every": 1, "keep": 1, "measure_count": 1}
        every = ("keep_every", "checkpoint_every", "sample_every", "measure_every", "profile")
        for name in (*least, *every):
            if getattr(self, name) < least.get(name, 0):
                raise ValueError(f"loop.{name}: expected at least {least.get(name, 0)}, found {getattr(self, name)}")
        for name in ("max_seconds", "session_seconds"):
            if (value := getattr(self, name)) is not None and not value >= 0:
                raise ValueError(f"loop.{name}: expected at least 0, found {value}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"loop.ema_decay: expected a share from 0 to below 1, found {self.ema_decay}")
        if self.best and not self.measure_every:
            raise ValueError(f"loop.measure_every: expected above 0 where loop.best is {self.best!r}, found 0")


class Loader(Protocol):
    """The micro-batches of a step, a pure function of its number; and a few numbers that make going on at one quick."""

    def __call__(self, step: int) -> Sequence[StepBatch]: ...

    def position(self) -> dict[str, int]: ...

    def start_from(self, position: dict[str, int]) -> None: ...


class Asked(NamedTuple):
    """Why a rank wants no further step; all ranks agree on what any of them asks for."""

    stop: bool = False
    time_over: bool = False
    session_over: bool = False
    save_failed: bool = False


class Trainer:
    """Trains `model` on `load(step)`: the micro-batches of a step, a pure function of its number.

    ranks    the processes of the run; `load` gives this one's part
    flops    operations a batch costs, for the achieved rate; whole numbers, so that no sum of them is rounded
    betas    Adam's, of child modules of the model by name; the gradient of each of them is clipped by its own norm
    sample   called by the first rank with (averaged weights, path) to draw a grid of samples
    measure  called by the first rank with averaged weights, every `measure_every` steps; numbers by name
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        load: Loader,
        folder: Path,
        loop: LoopConfig,
        optimizer: OptimizerConfig,
        flops: Callable[[Any], int] = lambda batch: 0,
        sample: Callable[[dict[str, Tensor], Path], None] | None = None,
        ranks: Ranks | None = None,
        betas: Mapping[str, tuple[float, float]] | None = None,
    ) -> None:
        self.model, self.objective, self.load, self.folder = model, objective, load, folder
        self.config, self.optimizer_config = loop, optimizer
        self.flops, self.sample, self.ranks = flops, sample, ranks or Ranks()
        self.measure: Callable[[dict[str, Tensor]], dict[str, float]] | None = None
        self.device = next(model.parameters()).device
        self.optimizer, self.apart = build_optimizer(model, optimizer, betas), tuple(betas or ())
        self.ema = EMA(model, loop.ema_decay)
        self.checkpoints = CheckpointFolder(folder / "checkpoints", loop.keep, loop.keep_every, self.ranks)
        self.trackers = Trackers(loop.trackers if self.ranks.first else (), folder)
        self.guard, self.clock = Guard(loop.guard), Clock(self.device)
        self.step, self.data_offset = 0, 0
        self.totals: dict[str, float] = {"flops": 0, "seconds": 0.0, "waited": 0.0}
        self.losses: dict[str, float] = {}
        self.average = Average()
        """of the steps since the last line of metrics.jsonl; after a restart the first rank's has all ranks' """
        self._counted: dict[str, float] = {}
        self._saved: int | None = None
        """step of the newest checkpoint"""

    def restore(self) -> bool:
        """Go on from the newest whole checkpoint, if there is one."""
        path, complaints = self.checkpoints.newest()
        for complaint in complaints:
            logger.info(complaint)
        if path is None:
            return False
        found = self.checkpoints.open(path)
        names = {stacked_name(name) for name in found.state_dict_metadata}
        progress = self.checkpoints.load(path, found, self._state(names))
        self.step, self.totals = progress["step"], {"waited": 0.0, **progress["totals"]}
        self.data_offset, self._counted = progress.get("data_offset", 0), {}
        self._saved = self.step
        self.average = Average.of(progress.get("average", {})) if self.ranks.first else Average()
        self.guard.restore(progress.get("guard", {}))
        self.load.start_from(progress.get("data", {}))
        return True

    def save(self) -> Path:
        """Write a checkpoint, and wait until it is there."""
        path = self._begin_save()
        self.checkpoints.wait()
        return path

    def averaged(self) -> dict[str, Tensor]:
        """The averaged weights, whole, by name; of a sharded network copies, on the first rank, and nothing on the
        others, which must call it as well."""
        weights = {}
        for name, weight in self.ema.weights.items():
            full = whole(weight)
            if self.ranks.first:
                weights[name] = full if full is weight else full.cpu()
        return stack(weights.items())

    def run(self) -> Literal["finished", "stopped"]:
        """Train to the last step, or until asked to stop; saved either way."""
        with StopRequest() as stop:  # until all is saved: a scheduler may send more than one signal
            try:
                asked = self._run(stop)
                self.checkpoints.wait()
                if self._saved != self.step:
                    self.save()
            except (UserError, SystemExit):
                self.checkpoints.settle()
                raise
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):  # torch says so, wherever the run happens to be
                    raise
                self.checkpoints.settle()
                raise UserError(
                    f"data.workers: {error} Perhaps of too little memory; the same command goes on"
                ) from None
            self.ranks.wait()
        if asked.time_over and self.step < self.config.steps:
            logger.info(f"train: {self.config.max_seconds:.0f} s are over at step {self.step} of {self.config.steps}")
        stopped = (asked.stop or asked.session_over) and not asked.time_over and self.step < self.config.steps
        return "stopped" if stopped else "finished"

    def _run(self, stop: StopRequest) -> Asked:
        log, window, began = self._open_log(), time.monotonic(), time.monotonic()
        before, asked = dict(self.totals), Asked(time_over=self._time_over())
        warmup, steps = self.optimizer_config.warmup, self.config.steps
        if self.step < steps <= warmup:
            last = learning_rate(self.optimizer_config, steps - 1, steps)
            logger.info(
                f"warning: optimizer.warmup: expected fewer steps than the run has ({steps}), found {warmup}; "
                f"the learning rate ends at {last:.2g} and never decays"
            )
        with (
            progress("train", self.config.steps, self.step) as bar,
            profiled(self.folder / "profile", self.config.profile, self.ranks.rank) as profile,
            self.trackers,
        ):
            while self.step < self.config.steps and not any(asked):
                reached = self.step
                asked = self.train_step(self.average, self._ask(stop.requested, began))
                profile()
                bar.advance(self.step - bar.done, " ".join(f"{name} {loss:.3f}" for name, loss in self.losses.items()))
                if self.step <= reached:  # rolled back
                    log, window, before = self._open_log(), time.monotonic(), dict(self.totals)
                    continue
                if self.step % self.config.log_every == 0 or self.step == self.config.steps or asked.time_over:
                    self.merge()
                    means = self.average.merged(self.ranks).means()
                    line = self._line(means, before, time.monotonic() - window)
                    log.write(line)
                    self.trackers.log(line)
                    self.average, window, before = Average(), time.monotonic(), dict(self.totals)
                self._measure(log)
                self._save_and_sample()
        return asked

    def train_step(self, average: Average, asks: Asked | None = None) -> Asked:
        """One optimizer step. Losses are divided by counts over all its micro-batches and ranks, so splitting changes
        nothing. Takes what this rank asks for, gives what any does."""
        asks, began = asks or Asked(), time.monotonic()
        data_step = self.step + self.data_offset
        loaded = self.load(data_step)
        self.totals["waited"] += time.monotonic() - began
        batches = [batch.to(self.device) for batch in loaded]
        own = [sum(term) for term in zip(*(self.objective.counts(batch) for batch in batches), strict=True)]
        agreed = self.ranks.sum(torch.tensor([*own, *asks], dtype=torch.float64).to(self.device))
        summed, norm, details = self._backward(batches, agreed[: len(own)])
        # The one place where the host waits for the device.
        both = self.ranks.sum(summed.clone()).double(), summed.double()
        found = torch.cat([agreed, *both, norm.double()[None]]).cpu()
        pieces = found.split([len(own), len(asks), len(own), len(own), 1])
        counts, flags, losses, own_losses, (length,) = (piece.tolist() for piece in pieces)
        named = zip(self.objective.names, losses, counts, strict=True)
        self.losses = {name: loss / count for name, loss, count in named if count}
        verdict = self.guard.judge(data_step, self.losses, length)
        if verdict is not None:
            self._note(verdict, data_step, batches)
        if verdict is not None and verdict.action == "rollback":
            self._roll_back(data_step)
            return Asked(*map(bool, flags))
        if verdict is None or verdict.action == "log":
            rate = learning_rate(self.optimizer_config, self.step, self.config.steps)
            self._update(rate, batches)
            average.include(details)
            for name, total, count in zip(self.objective.names, own_losses, own, strict=True):
                average.add(name, total, count)
            average.add("gradient_norm", length, 1)
            average.add("learning_rate", rate, 1)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        for batch in loaded:  # as it came: to ask the device would be to wait for it
            for name, quantity in {**batch.quantities, "flops": self.flops(batch)}.items():
                self._counted[name] = self._counted.get(name, 0) + quantity
        self.totals["seconds"] += time.monotonic() - began
        return Asked(*map(bool, flags))

    def _backward(self, batches: Sequence[Any], counts: Tensor) -> tuple[Tensor, Tensor, Average]:
        """Gradients of all micro-batches, clipped. Returns this rank's summed losses `[term]`, the global norm, and
        this rank's details."""
        weights = torch.tensor(self.objective.weights, dtype=torch.float64, device=self.device)
        scale = (weights / counts.clamp(min=1)).float()
        summed, details = torch.zeros(len(counts), device=self.device), Average()
        with self.clock.part("forward_backward"):
            self.objective.before_step(self.model, batches)
            for number, batch in enumerate(batches):
                sum_over_copies(self.model, number == len(batches) - 1)
                sums = self.objective.sums(self.model, batch)
                (sums.losses.float() * scale).sum().backward()
                summed += sums.losses.detach()
                for name, (total, count) in sums.details.items():
                    details.add(name, total, count)
            sum_over_ranks(self.model, self.ranks)
            norm = self._clip()
        return summed, norm, details

    def _clip(self) -> Tensor:
        """Clip the gradients of each child module of `apart`, and of all the rest, by its norm. Returns that of all."""
        parts: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            child = name.split(".")[0]
            parts.setdefault(child if child in self.apart else "", []).append(parameter)
        norms = [clip_gradients(part, self.optimizer_config.clip, self.ranks) for part in parts.values()]
        return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))

    def _update(self, rate: float, batches: Sequence[Any]) -> None:
        """Weights, and their averages, by the gradients."""
        with self.clock.part("optimizer"):
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            self.objective.after_step(self.model, self.step + 1, batches)
            self.ema.update(self.model, self.step)

    def _ask(self, stop: bool, began: float) -> Asked:
        session = self.config.session_seconds
        session_over = session is not None and time.monotonic() - began > session
        return Asked(stop, self._time_over(), session_over, self.checkpoints.failed)

    def _time_over(self) -> bool:
        return self.config.max_seconds is not None and self.totals["seconds"] > self.config.max_seconds

    def _measure(self, log: MetricsLog) -> None:
        """Before the checkpoint of that step, so that a run that goes on behind it has the line."""
        measure, every = self.measure, self.config.measure_every
        if measure is None or not every or self.step % every:
            return
        self.merge()
        weights = self.averaged()
        found = self.ranks.once(lambda: measure(weights))
        line = {"step": self.step, **(found or {})}
        log.write(line)
        self.trackers.log(line)

    def _save_and_sample(self) -> None:
        if self.config.checkpoint_every and self.step % self.config.checkpoint_every == 0:
            self._begin_save()
        if self.sample and self.config.sample_every and self.step % self.config.sample_every == 0:
            weights = self.averaged()
            self.ranks.once(lambda: self._draw(weights, self.folder / "samples" / f"step-{self.step:08d}.png"))

    def _draw(self, weights: dict[str, Tensor], path: Path) -> None:
        assert self.sample is not None
        try:
            self.sample(weights, path)
            self.trackers.picture(self.step, path)
        except OSError as error:
            raise UserError(f"{path}: not written ({error.strerror or error}); checkpoints are intact") from None

    def _begin_save(self) -> Path:
        self.merge()
        progress = {
            "totals": self.totals,
            "data": self.load.position(),
            "data_offset": self.data_offset,
            "guard": self.guard.state(),
            "average": vars(self.average.merged(self.ranks)),
        }
        self._saved = self.step
        with self.clock.part("checkpoint", on_host=True):
            return self.checkpoints.begin(Checkpoint(self.step, self._state(), progress))

    def _state(self, found: set[str] | None = None) -> dict[str, dict[str, Tensor]]:
        """All tensors of the run; room is made for moments that are `found` in a checkpoint."""
        weights = {name: tensor.detach() for name, tensor in self.model.state_dict().items()}
        return {
            "model": weights,
            "ema": self.ema.weights,
            "optimizer": _moments(self.model, self.optimizer, found or set()),
        }

    def merge(self) -> None:
        """Bring `totals` up to date: add what all ranks counted since the last time. The clock is the first one's."""
        for counted in self.ranks.gather(self._counted):
            for name, quantity in counted.items():
                self.totals[name] = self.totals.get(name, 0) + quantity
        self._counted = {}
        self.totals |= self.ranks.share({name: self.totals[name] for name in ("seconds", "waited")})

    def _open_log(self) -> MetricsLog:
        self.trackers.open(self.step)
        return MetricsLog(self.folder / "metrics.jsonl", self.step, self.ranks)

    def _line(self, means: dict[str, float], before: dict[str, float], seconds: float) -> dict[str, Any]:
        """What is logged of the last `seconds`. Shares are of this rank; what they leave went to samples and lines."""
        rates = {
            f"{name}_per_second": (value - before.get(name, 0)) / seconds
            for name, value in self.totals.items()
            if name not in ("seconds", "waited", "spikes", "left_out") and not name.startswith("positions of ")
        }
        shares = {
            "waited_share": (self.totals["waited"] - before["waited"]) / seconds,
            **{f"{name}_share": spent / seconds for name, spent in self.clock.read().items()},
        }
        line = {"step": self.step, **means, **self.totals, **rates, **shares}
        if (memory := memory_used(self.device)) is not None:
            line["memory_gigabytes"] = max(self.ranks.gather(memory)) / 2**30
        if (peak := peak_of(self.device)) is not None and rates.get("flops_per_second"):
            line["mfu"] = rates["flops_per_second"] / (peak * self.ranks.count)
        return line

    def _note(self, verdict: Verdict, data_step: int, batches: Sequence[StepBatch]) -> None:
        """Say what went wrong with a step, keep it in `bad_steps.jsonl`; raise where nothing is to be done about it."""
        name = "spikes" if verdict.action == "log" else "left_out"
        self.totals[name] = self.totals.get(name, 0) + 1
        samples: list[int] = []
        if verdict.kind == "nonfinite":
            samples = sorted({s for batch in batches for s in self.objective.offenders(self.model, batch)})
            samples = sorted({sample for found in self.ranks.gather(samples) for sample in found})
        line = {"step": self.step, "data_step": data_step, **vars(verdict), "samples": samples}
        self.ranks.once(lambda: append_jsonl(self.folder / "bad_steps.jsonl", [line]))
        where = f"samples {samples}; " if samples else ""
        if verdict.action == "raise":
            raise DivergedError(f"step {self.step}: {verdict.reason}; {where}no weight was changed")
        logger.info(f"step {self.step}: {verdict.reason}; {where}{verdict.action}")

    def _roll_back(self, data_step: int) -> None:
        """To the newest checkpoint, and on from there with the data behind `data_step`."""
        self.optimizer.zero_grad(set_to_none=True)
        self.checkpoints.wait()
        spent = {name: self.totals[name] for name in ("seconds", "waited", "left_out")}
        if not self.restore():
            raise DivergedError(f"step {self.step}: expected a checkpoint to go back to, found none")
        self.totals |= spent
        self.data_offset = data_step + 1 - self.step


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer, room: set[str]) -> dict[str, Tensor]:
    """The optimizer's state by parameter name: plain tensors, so that no pickle is needed. What `room` names and is
    not there yet is made, laid out in memory as its parameter is: the fused optimizer pairs elements by their place."""
    moments = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if key not in state and stacked_name(f"optimizer/{key}.{name}") in room:
                counter = torch.zeros((), device=local(parameter).device if parameter.is_cuda else "cpu")
                state[key] = counter if key == "step" else torch.zeros_like(parameter, requires_grad=False)
            if key in state:
                moments[f"{key}.{name}"] = state[key]
        if not state:
            del optimizer.state[parameter]
    return moments
