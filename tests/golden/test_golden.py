"""Runs learn today what they learned when the golden losses were written; `renew.py` says when to write them again.

Other instructions of a processor (SSE instead of AVX2), and noise of 1e-6 on every gradient, move a loss of step 50 by
2e-7. Lambda larger by 0.2 % moves the first gradient's norm by 2e-3; a rate larger by 0.1 %, twice the optimizer's eps
or a weight decay of 0.06 instead of 0.05 move a late loss by 2e-5 to 2e-3.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from renew import PATH, STEPS, losses, recipe

from transfuse.recipes import Recipe

EARLY, LATE = 2e-6, 1e-5
"""relative differences let pass in the first ten steps, and after"""


def differences(made: Recipe, name: str, steps: int) -> list[str]:
    golden = json.loads(PATH.read_text())[name]
    measured = losses(made, steps)
    assert measured.keys() == golden.keys()
    return [
        f"step {step}: {kind} {value}, not {golden[kind][step]}"
        for kind, values in measured.items()
        for step, value in enumerate(values)
        if value != pytest.approx(golden[kind][step], rel=EARLY if step < 10 else LATE, abs=0)
    ]


@pytest.mark.parametrize("name", STEPS)
def test_runs_learn_what_they_learned(name: str) -> None:
    assert differences(recipe(name), name, STEPS[name]) == []


def test_a_changed_constant_is_noticed() -> None:
    made = recipe("transfusion")
    heavier = replace(made, objective=replace(made.objective, image_weight=made.objective.image_weight * 1.002))
    assert any("gradient_norm" in line for line in differences(heavier, "transfusion", 1))
    decayed = replace(made, optimizer=replace(made.optimizer, learning_rate=made.optimizer.learning_rate * 1.001))
    assert differences(decayed, "transfusion", 10)
