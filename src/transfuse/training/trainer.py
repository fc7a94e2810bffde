"""The training loop: one step after another, saved so that a run stopped at any moment resumes exactly.

It trains anything with an objective (`loss.Objective`), in one process or many (`distributed`). The data of a step is a
function of its number, so weights, optimizer moments, EMA and a few numbers are the whole state.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..errors import UserError
from ..io import append_jsonl
from ..log import logger, progress
from ..model.transfusion import of_images
from .checkpoint import Checkpoint, CheckpointFolder, Groups
from .distributed import Distributed, local, stack, stacked_name, stop_on_signal, sum_gradients, whole
from .hardware import profiled
from .loss import Objective, StepBatch
from .metrics import Average, Meter, MetricsLog, TrackerName
from .optimizer import EMA, Guard, GuardConfig, OptimizerConfig, Verdict, build_optimizer, clip_gradients, learning_rate

Sample = Callable[[dict[str, Tensor], Path], None]
"""(averaged weights, path) -> None: draws a sample grid"""
Measure = Callable[[dict[str, Tensor]], dict[str, float]]
"""averaged weights -> results by name, `SINCE_BEST` among them if there is a best one"""
SINCE_BEST = "steps_since_best"


class DivergedError(UserError):
    """Raised if a loss or the gradient is not finite, before the optimizer changes a weight."""


@dataclass(frozen=True)
class LoopConfig:
    """Length of a run, and how often it logs, samples, measures and saves. Raises ValueError, naming the field."""

    steps: int = 250_000
    ema_decay: float = 0.9999
    log_every: int = 10
    sample_every: int = 1000
    """steps between sample grids; 0: none"""
    measure_every: int = 0
    """steps between evaluations of the averaged weights; 0: none"""
    measures: tuple[str, ...] = ("captioning",)
    """metrics to evaluate, by their names in `transfuse evaluate`; results go to metrics.jsonl"""
    measure_count: int = 32
    """images, captions or questions per metric; few, so results are rough"""
    best: str = ""
    """METRIC/NUMBER, one of those evaluated: the best weights by it are exported to best/; empty: none"""
    measure_data: str = ""
    """data set whose held-out pairs are evaluated, in place of the bundled world"""
    patience: int = 0
    """evaluations without a better `best` after which the run ends; its export is then the best weights; 0: no end"""
    checkpoint_every: int = 1000
    keep: int = 2
    """number of newest checkpoints to keep"""
    keep_every: int = 0
    """also keep checkpoints of steps divisible by this; 0: none"""
    max_seconds: float | None = None
    """finish after this much training time, summed over resumed sessions; None: no limit"""
    session_seconds: float | None = None
    """save and stop after this much time, to be resumed with the same command; None: no limit"""
    guard: GuardConfig = field(default_factory=GuardConfig)
    profile: int = 0
    """steps to trace into the run's profile folder, soon after the start; 0: none"""
    trackers: tuple[TrackerName, ...] = ()
    """services that also receive metrics and sample grids (each an extra of that name)"""

    def __post_init__(self) -> None:
        positive = "log_every", "keep", "measure_count"
        counts = "steps", "keep_every", "checkpoint_every", "sample_every", "measure_every", "patience", "profile"
        for name in (*positive, *counts, "max_seconds", "session_seconds"):
            value, least = getattr(self, name), 1 if name in positive else 0
            if value is not None and not value >= least:
                raise ValueError(f"loop.{name}: expected at least {least}, found {value}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"loop.ema_decay: expected a number from 0 to below 1, found {self.ema_decay}")
        if self.best and not self.measure_every:
            raise ValueError(f"loop.measure_every: expected above 0 where loop.best is {self.best!r}, found 0")
        if self.patience and not self.best:
            raise ValueError(
                f"loop.best: expected the number that loop.patience ({self.patience}) is about, found none"
            )


class Loader(Protocol):
    """`loader(step)` returns a step's micro-batches, a pure function of its number.

    `position()` returns a few numbers for the checkpoint; `start_from(position)` uses them to resume quickly.
    """

    def __call__(self, step: int) -> Sequence[StepBatch]: ...

    def position(self) -> dict[str, int]: ...

    def start_from(self, position: dict[str, int]) -> None: ...


class StopFlags(NamedTuple):
    """Reasons of a rank to stop after this step; a flag set on any rank is set on all."""

    stop: bool = False
    time_over: bool = False
    session_over: bool = False
    save_failed: bool = False
    no_better: bool = False


class Trainer:
    """Trains `model` on the micro-batches of `load(step)`.

    ranks    the processes of the run; `load` returns this one's part
    flops    operations of a batch, as an integer so that sums are exact
    betas    Adam's betas by name of a child module; the gradients of each such module are clipped by their norm
    rate_of  factor of the learning rate by name of a parameter
    plain    weights by the model's names -> by those of the network that is exported
    meter    time, memory and peak of the device
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
        ranks: Distributed | None = None,
        betas: Mapping[str, tuple[float, float]] | None = None,
        meter: Meter | None = None,
        rate_of: Callable[[str], float] = lambda name: 1.0,
        plain: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda weights: weights,
    ) -> None:
        self.model, self.objective, self.load, self.folder = model, objective, load, folder
        self.config, self.optimizer_config = loop, optimizer
        self.flops, self.ranks, self.plain = flops, ranks or Distributed(), plain
        self.device = next(model.parameters()).device
        # Counts are exact up to 2^53; Apple's GPUs have no float64, and float32 is exact up to 2^24.
        self.wide = torch.float32 if self.device.type == "mps" else torch.float64
        self.optimizer, self.clipped_modules = build_optimizer(model, optimizer, betas, rate_of), tuple(betas or ())
        self.ema = EMA(model, loop.ema_decay)
        self.checkpoints = CheckpointFolder(
            folder / "checkpoints", loop.keep, loop.keep_every, self.ranks, folder / "config.json"
        )
        self.metrics = MetricsLog(folder, loop.trackers, self.ranks)
        self.guard, self.meter = Guard(loop.guard), meter or Meter(self.device)
        self.step, self.data_offset, self.since_best = 0, 0, 0.0
        self.totals: dict[str, float] = {"flops": 0, "seconds": 0.0, "waited": 0.0}
        self.losses: dict[str, float] = {}
        # Means since the last line of metrics.jsonl; after a restart rank 0 holds those of all ranks.
        self.average = Average()
        self._counted: dict[str, float] = {}
        self._saved_step: int | None = None

    def run(self, sample: Sample | None = None, measure: Measure | None = None) -> Literal["finished", "stopped"]:
        """Train to the last step or until a stop is requested, then save.

        sample    rank 0 calls it to draw a sample grid, every `sample_every` steps
        measure   rank 0 calls it to evaluate, every `measure_every` steps
        """
        with stop_on_signal() as stop:  # also while saving, because a scheduler may send more than one signal
            try:
                flags = self._train(stop, sample, measure)
                self.checkpoints.wait()
                if self._saved_step != self.step:
                    self.save()
            except (UserError, SystemExit):
                self.checkpoints.settle()
                raise
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):  # torch raises this in whatever code runs at the time
                    raise
                self.checkpoints.settle()
                raise UserError(
                    f"data.workers: {error} Perhaps memory ran out; the same command resumes the run"
                ) from None
            self.ranks.wait()
        if flags.time_over and self.step < self.config.steps:
            logger.info(f"train: {self.config.max_seconds:.0f} s are over at step {self.step} of {self.config.steps}")
        if flags.no_better and self.step < self.config.steps:
            logger.info(f"train: no better {self.config.best} in {self.since_best:.0f} steps: ends at step {self.step}")
        over = flags.time_over or flags.no_better or self.step >= self.config.steps
        return "stopped" if (flags.stop or flags.session_over) and not over else "finished"

    def _train(self, stop: Callable[[], bool], sample: Sample | None, measure: Measure | None) -> StopFlags:
        """Train until the last step or the first stop flag, with logs, samples, evaluations and checkpoints."""
        loop, began = self.config, time.monotonic()
        window, before = began, dict(self.totals)
        longest = math.inf if loop.max_seconds is None else loop.max_seconds
        session = math.inf if loop.session_seconds is None else loop.session_seconds
        patience = loop.patience * loop.measure_every
        flags = StopFlags(time_over=self.totals["seconds"] > longest, no_better=0 < patience <= self.since_best)
        if self.step < loop.steps <= self.optimizer_config.warmup:
            logger.info(
                f"warning: optimizer.warmup: expected fewer steps than the run has ({loop.steps}), found "
                f"{self.optimizer_config.warmup}; the learning rate ends at "
                f"{learning_rate(self.optimizer_config, loop.steps - 1, loop.steps):.2g} and never decays"
            )
        self.metrics.open(self.step)
        with (
            progress("train", loop.steps, self.step) as bar,
            profiled(self.folder / "profile", loop.profile, self.ranks.rank) as profile,
            self.metrics,
        ):
            while self.step < loop.steps and not any(flags):
                reached = self.step
                time_over, session_over = self.totals["seconds"] > longest, time.monotonic() - began > session
                own_flags = StopFlags(stop(), time_over, session_over, self.checkpoints.failed)
                flags = self.train_step(self.average, own_flags)
                profile()
                bar.advance(self.step - bar.done, " ".join(f"{name} {loss:.3f}" for name, loss in self.losses.items()))
                if self.step <= reached:  # rolled back
                    self.metrics.open(self.step)
                    window, before = time.monotonic(), dict(self.totals)
                    continue
                if self.step % loop.log_every == 0 or self.step == loop.steps or flags.time_over:
                    self.metrics.write(self._line(before, time.monotonic() - window))
                    self.average, window, before = Average(), time.monotonic(), dict(self.totals)
                # Before the step's checkpoint, so that a run resumed from it has the result.
                if measure is not None and loop.measure_every and self.step % loop.measure_every == 0:
                    self.merge()
                    results = self.ranks.broadcast(self.ranks.on_rank0(partial(measure, self.averaged())) or {})
                    self.since_best = results.get(SINCE_BEST, 0.0)
                    self.metrics.write({"step": self.step, **results})
                    flags = flags._replace(no_better=0 < patience <= self.since_best)
                if loop.checkpoint_every and self.step % loop.checkpoint_every == 0:
                    self.begin_save()
                if sample is not None and loop.sample_every and self.step % loop.sample_every == 0:
                    self._sample(sample)
        return flags

    def train_step(self, average: Average, own_flags: StopFlags | None = None) -> StopFlags:
        """Run one optimizer step, add its losses to `average`, and return the stop flags of all ranks.

        Losses are divided by counts over all micro-batches and ranks, so splitting a step changes nothing.
        """
        own_flags, began = own_flags or StopFlags(), time.monotonic()
        data_step = self.step + self.data_offset
        loaded = self.load(data_step)
        self.totals["waited"] += time.monotonic() - began
        batches = [batch.to(self.device) for batch in loaded]
        own = [sum(term) for term in zip(*(self.objective.counts(batch) for batch in batches), strict=True)]
        # Over all ranks, so that those of a tensor group agree to stop, too; each counts the same documents.
        numbers = [*own, *own_flags, any(self.objective.has_images(batch) for batch in batches)]
        agreed = self.ranks.sum_all(torch.tensor(numbers, dtype=self.wide, device=self.device))
        agreed /= self.ranks.count // self.ranks.datas
        summed, norm, details = self._backward(batches, agreed[: len(own)])
        both = self.ranks.sum(summed.clone()).to(self.wide), summed.to(self.wide)
        # This copy is the only place where the host waits for the device.
        packed = torch.cat([agreed, *both, norm.to(self.wide)[None]]).cpu()
        pieces = packed.split([len(own), len(own_flags), 1, len(own), len(own), 1])
        counts, flags, (images,), losses, own_losses, (length,) = (piece.tolist() for piece in pieces)
        named = zip(self.objective.names, losses, counts, strict=True)
        self.losses = {name: loss / count for name, loss, count in named if count}
        verdict = self.guard.judge(data_step, self.losses, length)
        if verdict is not None:
            self._note(verdict, data_step, batches)
        if verdict is not None and verdict.action == "rollback":
            self._rollback(data_step)
            return StopFlags(*map(bool, flags))
        if verdict is None or verdict.action == "log":
            rate = learning_rate(self.optimizer_config, self.step, self.config.steps)
            with self.meter.part("optimizer"):
                for group in self.optimizer.param_groups:
                    group["lr"] = rate * group.get("rate", 1.0)
                if not images:
                    self._drop_image_gradients()
                self.optimizer.step()
                self.objective.after_step(self.model, self.step + 1, batches)
                self.ema.update(self.model, self.step)
            average.include(details)
            for name, total, count in zip(self.objective.names, own_losses, own, strict=True):
                average.add(name, total, count)
            average.add("gradient_norm", length, 1)
            average.add("learning_rate", rate, 1)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        for batch in loaded:  # the CPU copies: reading from the device would wait for it
            for name, quantity in {**batch.quantities, "flops": self.flops(batch)}.items():
                self._counted[name] = self._counted.get(name, 0) + quantity
        self.totals["seconds"] += time.monotonic() - began
        return StopFlags(*map(bool, flags))

    def _backward(self, batches: Sequence[Any], counts: Tensor) -> tuple[Tensor, Tensor, Average]:
        """Compute clipped gradients of all micro-batches.

        Return this rank's summed losses `[term]`, the global gradient norm, and this rank's details.
        """
        weights = torch.tensor(self.objective.weights, dtype=self.wide, device=self.device)
        scale = (weights / counts.clamp(min=1)).float()
        summed, details = torch.zeros(len(counts), device=self.device), Average()
        with self.meter.part("forward_backward"):
            self.objective.before_step(self.model, batches)
            for number, batch in enumerate(batches):
                if isinstance(self.model, FSDPModule):  # copies are summed in the last micro-batch only
                    self.model.set_requires_all_reduce(number == len(batches) - 1)
                sums = self.objective.loss(self.model, batch)
                (sums.losses.float() * scale).sum().backward()
                summed += sums.losses.detach()
                for name, (total, count) in sums.details.items():
                    details.add(name, total, count)
            sum_gradients(self.model, self.ranks)
            # Each of `clipped_modules`, and the rest, is clipped by a norm of its gradients alone.
            parts: dict[str, list[nn.Parameter]] = {}
            for name, parameter in self.model.named_parameters():
                child = name.split(".")[0]
                parts.setdefault(child if child in self.clipped_modules else "", []).append(parameter)
            norms = [clip_gradients(part, self.optimizer_config.clip, self.ranks) for part in parts.values()]
        return summed, norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms)), details

    def _drop_image_gradients(self) -> None:
        """Drop the gradients of images' weights in a step of text alone, so that no momentum or decay moves them.

        One process has none. Several have zeros, from the image that `collate` adds to a batch without any.
        """
        for name, parameter in self.model.named_parameters():
            if of_images(name):
                parameter.grad = None

    def _note(self, verdict: Verdict, data_step: int, batches: Sequence[StepBatch]) -> None:
        """Log a bad step, append it to `bad_steps.jsonl`, and raise DivergedError if the verdict is "raise"."""
        name = "spikes" if verdict.action == "log" else "left_out"
        self.totals[name] = self.totals.get(name, 0) + 1
        samples: list[int] = []
        if verdict.kind == "nonfinite":
            samples = [s for batch in batches for s in self.objective.nonfinite_samples(self.model, batch)]
            samples = sorted({sample for others in self.ranks.gather(samples) for sample in others})
        line = {"step": self.step, "data_step": data_step, **vars(verdict), "samples": samples}
        self.ranks.on_rank0(lambda: append_jsonl(self.folder / "bad_steps.jsonl", [line]))
        where = f"samples {samples}; " if samples else ""
        if verdict.action == "raise":
            raise DivergedError(f"step {self.step}: {verdict.reason}; {where}no weight was changed")
        logger.info(f"step {self.step}: {verdict.reason}; {where}{verdict.action}")

    def _rollback(self, data_step: int) -> None:
        """Restore the newest checkpoint and continue with the data after `data_step`."""
        self.optimizer.zero_grad(set_to_none=True)
        self.checkpoints.wait()
        spent = {name: self.totals[name] for name in ("seconds", "waited", "left_out")}
        if not self.restore():
            raise DivergedError(f"step {self.step}: expected a checkpoint to go back to, found none")
        self.totals |= spent
        self.data_offset = data_step + 1 - self.step

    def _line(self, before: dict[str, float], seconds: float) -> dict[str, Any]:
        """Return a line of metrics.jsonl for the last `seconds`: means, totals, rates, shares of this rank's time."""
        self.merge()
        rates = {
            f"{name}_per_second": (value - before.get(name, 0)) / seconds
            for name, value in self.totals.items()
            if name not in ("seconds", "waited", "spikes", "left_out") and not name.startswith("positions of ")
        }
        shares = {
            "waited_share": (self.totals["waited"] - before["waited"]) / seconds,
            **{f"{name}_share": spent / seconds for name, spent in self.meter.read().items()},
        }
        line = {"step": self.step, **self.average.merged(self.ranks).means(), **self.totals, **rates, **shares}
        if (memory := self.meter.memory()) is not None:
            line["memory_gigabytes"] = max(self.ranks.gather(memory)) / 2**30
        if (peak := self.meter.peak_flops()) is not None and rates.get("flops_per_second"):
            line["mfu"] = rates["flops_per_second"] / (peak * self.ranks.count)
        return line

    def _sample(self, sample: Sample) -> None:
        """Draw a sample grid. Raises UserError if it cannot be written."""
        weights, path = self.averaged(), self.folder / "samples" / f"step-{self.step:08d}.png"

        def draw() -> None:
            try:
                sample(weights, path)
                self.metrics.image(self.step, path)
            except OSError as error:
                raise UserError(f"{path}: not written ({error.strerror or error}); checkpoints are intact") from None

        self.ranks.on_rank0(draw)

    def merge(self) -> None:
        """Add the counts of all ranks since the last call to `totals`; times are rank 0's."""
        for counted in self.ranks.gather(self._counted):
            for name, quantity in counted.items():
                self.totals[name] = self.totals.get(name, 0) + quantity
        self._counted = {}
        self.totals |= self.ranks.broadcast({name: self.totals[name] for name in ("seconds", "waited")})

    def averaged(self) -> dict[str, Tensor]:
        """Return the averaged weights by name, unsharded: on rank 0 only, but every rank must call this.

        Frozen weights have no average and are returned as they are.
        """
        weights = {}
        for name, parameter in self.model.named_parameters():
            weight = self.ema.weights.get(name, parameter.detach())
            full = whole(weight)
            if self.ranks.first:
                weights[name] = full if full is weight else full.cpu()
        return self.plain(stack(weights.items())) if self.ranks.first else {}

    def restore(self) -> bool:
        """Load the newest complete checkpoint. Return False if there is none."""
        path, complaints = self.checkpoints.newest()
        for complaint in complaints:
            logger.info(complaint)
        if path is None:
            return False
        progress = self.checkpoints.load(path, lambda saved: self._state({stacked_name(name) for name in saved}))
        self.step, self.totals, self.data_offset = progress["step"], progress["totals"], progress["data_offset"]
        self.since_best = progress.get("since_best", 0.0)
        self._saved_step, self._counted = self.step, {}
        self.average = Average(**progress["average"]) if self.ranks.first else Average()
        self.guard.restore(progress["guard"])
        self.load.start_from(progress["data"])
        return True

    def save(self) -> Path:
        """Write a checkpoint and wait until it is complete."""
        path = self.begin_save()
        self.checkpoints.wait()
        return path

    def begin_save(self) -> Path:
        """Copy the run's state and start writing it in a thread."""
        self.merge()
        progress = {
            "totals": self.totals,
            "data": self.load.position(),
            "data_offset": self.data_offset,
            "since_best": self.since_best,
            "guard": self.guard.state(),
            "average": vars(self.average.merged(self.ranks)),
        }
        self._saved_step = self.step
        with self.meter.part("checkpoint", on_host=True):
            return self.checkpoints.begin(Checkpoint(self.step, self._state(), progress))

    def _state(self, allocate: set[str] = frozenset()) -> Groups:  # type: ignore[assignment]
        """Return all tensors of the run: weights, averages, and the optimizer's moments by parameter name.

        Missing moments named in `allocate` are created with their parameter's memory layout, as the fused optimizer
        needs.
        """
        # First: it shards what FSDP has gathered, whose parameters the optimizer does not know.
        weights = {name: tensor.detach() for name, tensor in self.model.state_dict().items()}
        moments = {}
        for name, parameter in self.model.named_parameters():
            state = self.optimizer.state[parameter]
            for key in ("step", "exp_avg", "exp_avg_sq", "momentum_buffer"):
                if key not in state and stacked_name(f"optimizer/{key}.{name}") in allocate:
                    counter = torch.zeros((), device=local(parameter).device if parameter.is_cuda else "cpu")
                    state[key] = counter if key == "step" else torch.zeros_like(parameter, requires_grad=False)
                if key in state:
                    moments[f"{key}.{name}"] = state[key]
            if not state:
                del self.optimizer.state[parameter]
        return {"model": weights, "ema": self.ema.weights, "optimizer": moments}
