"""Detection of bad steps: losses or gradients that are not finite, and losses that jump.

Every step is judged before the optimizer changes a weight, by the losses and gradient norm of all ranks, so all ranks
reach the same verdict.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class GuardConfig:
    """Actions for bad steps. Raises ValueError, naming the field, for values out of range.

    raise     stop before any weight changes
    skip      leave the step's update out
    rollback  return to the newest checkpoint and continue with the data after the step's
    """

    nonfinite: Literal["raise", "skip", "rollback"] = "raise"
    """action if a loss or the gradient is not finite"""
    spike: Literal["log", "skip", "rollback"] = "log"
    """action if a loss is far above its recent values; log: only count it in the metrics"""
    sigmas: float = 6.0
    """a spike is this many standard deviations above the mean of the last `window` steps"""
    window: int = 128
    """number of recent steps to compare with; with fewer, no step is a spike"""
    most: int = 10
    """most steps left out within `window` steps; one more stops the run"""

    def __post_init__(self) -> None:
        for name, least in (("sigmas", 0), ("window", 2), ("most", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"loop.guard.{name}: expected at least {least}, found {getattr(self, name)}")


@dataclass(frozen=True)
class Verdict:
    """A bad step: its kind, a one-line reason, and the action to take."""

    kind: Literal["nonfinite", "spike"]
    reason: str
    action: Literal["raise", "log", "skip", "rollback"]


class Guard:
    """Judges each step by its mean losses, compared with those of recent steps."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.losses: dict[str, deque[float]] = {}
        self.left_out: list[int] = []

    def judge(self, step: int, losses: dict[str, float], norm: float) -> Verdict | None:
        """Return the verdict on a bad step, None for a good one. `losses` holds only terms with targets.

        The action is "raise" if more steps than the configuration allows were left out.
        """
        wrong = [f"{name} {value}" for name, value in losses.items() if not math.isfinite(value)]
        verdict = None
        if wrong or not math.isfinite(norm):
            reason = f"expected finite numbers, found {', '.join([*wrong, f'gradient norm {norm}'])}"
            verdict = Verdict("nonfinite", reason, self.config.nonfinite)
        else:
            jumps = [jump for name, value in losses.items() if (jump := self._jump(name, value))]
            if jumps:
                verdict = Verdict("spike", jumps[0], self.config.spike)
        if verdict is not None and verdict.action in ("skip", "rollback"):
            recent = [earlier for earlier in self.left_out if step - earlier < self.config.window]
            self.left_out = [*recent, step]
            if len(self.left_out) > self.config.most:
                reason = f"{verdict.reason}; step number {len(self.left_out)} to be left out, more than loop.guard.most"
                verdict = Verdict(verdict.kind, f"{reason} allows", "raise")
        if verdict is None or (verdict.kind == "spike" and verdict.action == "log"):
            for name, value in losses.items():
                self.losses.setdefault(name, deque(maxlen=self.config.window)).append(value)
        return verdict

    def _jump(self, name: str, value: float) -> str:
        """Return the reason if a loss is far above its recent values, else an empty string."""
        last = self.losses.get(name, ())
        if len(last) < self.config.window:
            return ""
        mean = math.fsum(last) / len(last)
        # The floor keeps rounding in (nearly) constant losses from counting as a jump.
        least = max(self.config.sigmas * float(np.std(last)), 1e-6 * abs(mean))
        if value <= mean + least:
            return ""
        return f"{name} {value:.4g} is more than {self.config.sigmas:g} deviations above {mean:.4g}"

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as plain numbers."""
        return {"losses": {name: list(values) for name, values in self.losses.items()}, "left_out": [*self.left_out]}

    def restore(self, state: dict[str, Any]) -> None:
        """Load a checkpoint's state, but keep newer `left_out` steps, so that repeated rollbacks end the run."""
        self.losses = {name: deque(values, maxlen=self.config.window) for name, values in state["losses"].items()}
        self.left_out = self.left_out or list(state["left_out"])
