"""What a run does about steps that went wrong: numbers that are not finite, and losses that jump.

Every step is judged before the optimizer touches a weight, by losses and a gradient norm of all ranks, so that all
judge alike.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class GuardConfig:
    """raise: stop, no weight changed; skip: leave the step's update out; rollback: go back to the newest checkpoint and
    on with the data behind the step's."""

    nonfinite: Literal["raise", "skip", "rollback"] = "raise"
    """where a loss or the gradient is not a finite number"""
    spike: Literal["log", "skip", "rollback"] = "log"
    """where a loss, of text or of images, is far above its own last ones; log: count it among the metrics"""
    sigmas: float = 6.0
    """standard deviations above the mean of the last `window` steps that make a spike"""
    window: int = 128
    """steps that are looked back at; before there are so many, nothing is a spike"""
    most: int = 10
    """steps left out within a window's length of each other; one more stops the run"""

    def __post_init__(self) -> None:
        for name, least in (("sigmas", 0), ("window", 2), ("most", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"loop.guard.{name}: expected at least {least}, found {getattr(self, name)}")


@dataclass(frozen=True)
class Verdict:
    kind: Literal["nonfinite", "spike"]
    reason: str
    action: Literal["raise", "log", "skip", "rollback"]


class Guard:
    """Judges each step by its mean losses, name by name, and remembers the last ones."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.losses: dict[str, deque[float]] = {}
        self.left_out: list[int] = []

    def judge(self, step: int, losses: dict[str, float], norm: float) -> Verdict | None:
        """None where all is well. Losses that had no target in a step are not to be given."""
        wrong = [f"{name} {value}" for name, value in losses.items() if not math.isfinite(value)]
        if wrong or not math.isfinite(norm):
            reason = f"expected finite numbers, found {', '.join([*wrong, f'gradient norm {norm}'])}"
            return Verdict("nonfinite", reason, self._within(step, self.config.nonfinite))
        verdict = None
        for name, value in losses.items():
            last = self.losses.setdefault(name, deque(maxlen=self.config.window))
            mean, deviation = (np.mean(last), np.std(last)) if len(last) == self.config.window else (np.inf, 0)
            if value > mean + self.config.sigmas * deviation:
                reason = f"{name} {value:.4g} is more than {self.config.sigmas:g} deviations above {mean:.4g}"
                verdict = verdict or Verdict("spike", reason, self._within(step, self.config.spike))
        if verdict is None or verdict.action == "log":
            for name, value in losses.items():
                self.losses[name].append(value)
        return verdict

    def _within(self, step: int, action: Any) -> Any:
        """What is asked for, or raise, where too much was left out already."""
        if action not in ("skip", "rollback"):
            return action
        self.left_out = [earlier for earlier in self.left_out if step - earlier < self.config.window]
        self.left_out.append(step)
        return "raise" if len(self.left_out) > self.config.most else action

    def state(self) -> dict[str, list[float]]:
        """For a checkpoint: plain numbers."""
        return {name: list(values) for name, values in self.losses.items()}

    def restore(self, state: dict[str, list[float]]) -> None:
        """What was left out stays remembered: a run that rolls back again and again must end."""
        self.losses = {name: deque(values, maxlen=self.config.window) for name, values in state.items()}
