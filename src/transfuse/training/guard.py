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


Action = Literal["raise", "log", "skip", "rollback"]


@dataclass(frozen=True)
class Verdict:
    kind: Literal["nonfinite", "spike"]
    reason: str
    action: Action


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
            return self._verdict(step, "nonfinite", reason, self.config.nonfinite)
        reason = next(filter(None, (self._jump(name, value) for name, value in losses.items())), "")
        verdict = self._verdict(step, "spike", reason, self.config.spike) if reason else None
        if verdict is None or verdict.action == "log":
            for name, value in losses.items():
                self.losses.setdefault(name, deque(maxlen=self.config.window)).append(value)
        return verdict

    def _jump(self, name: str, value: float) -> str:
        """What is to be said of a loss far above its last ones."""
        last = self.losses.get(name, ())
        if len(last) < self.config.window:
            return ""
        mean = math.fsum(last) / len(last)
        # Losses that hardly differ, or not at all, deviate by no more than is rounded: no jump is made of that.
        least = max(self.config.sigmas * float(np.std(last)), 1e-6 * abs(mean))
        if value <= mean + least:
            return ""
        return f"{name} {value:.4g} is more than {self.config.sigmas:g} deviations above {mean:.4g}"

    def _verdict(self, step: int, kind: Literal["nonfinite", "spike"], reason: str, action: Action) -> Verdict:
        """What is asked for, or raise, where too much was left out already."""
        if action in ("skip", "rollback"):
            self.left_out = [*(earlier for earlier in self.left_out if step - earlier < self.config.window), step]
            if len(self.left_out) > self.config.most:
                reason += f"; step number {len(self.left_out)} to be left out, more than loop.guard.most lets pass"
                action = "raise"
        return Verdict(kind, reason, action)

    def state(self) -> dict[str, Any]:
        """For a checkpoint: plain numbers."""
        return {"losses": {name: list(values) for name, values in self.losses.items()}, "left_out": [*self.left_out]}

    def restore(self, state: dict[str, Any]) -> None:
        """What was left out since stays remembered: a run that rolls back again and again must end."""
        losses = state.get("losses", {})
        self.losses = {name: deque(values, maxlen=self.config.window) for name, values in losses.items()}
        self.left_out = self.left_out or list(state.get("left_out", []))
