"""`kill -9` at random moments: a whole checkpoint is always found, and the resumed run ends as if undisturbed."""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import open_tiny

from transfuse.recipes import preset
from transfuse.train import build_trainer
from transfuse.training import CheckpointFolder, Trainer
from transfuse.training.checkpoint import step_of

STEPS = 200


def build(folder: Path) -> Trainer:
    recipe = preset("tiny")
    loop = replace(recipe.loop, steps=STEPS, checkpoint_every=1, keep=2)
    recipe = open_tiny(replace(recipe, loop=loop, data=replace(recipe.data, batch_size=2)), folder)
    return build_trainer(recipe, folder)


@pytest.mark.long
def test_twenty_kills(tmp_path: Path) -> None:
    straight = build(tmp_path / "straight")
    straight.config = replace(straight.config, checkpoint_every=0)
    straight.run()

    folder = tmp_path / "killed"
    build(folder)  # the tokenizer is made before the first kill: what is tested is the checkpoints
    store = CheckpointFolder(folder / "checkpoints")
    draw, reached, kills = random.Random(0), 0, 0
    while kills < 20:
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            trainer = build(folder)
            trainer.restore()
            trainer.run()
            os._exit(0)
        time.sleep(draw.uniform(0.05, 0.6))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        kills += os.WIFSIGNALED(status)
        newest, complaints = store.newest()
        assert not complaints, "what is visible under its final name is whole"
        assert reached == 0 or newest is not None
        if newest is not None:
            assert step_of(newest) >= reached, "nothing that was saved is lost"
            reached = step_of(newest)
        if not os.WIFSIGNALED(status):
            break  # it finished between two kills
    assert kills > 5
    resumed = build(folder)
    resumed.restore()
    resumed.run()
    assert resumed.step == STEPS
    for (name, a), (_, b) in zip(straight.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not list((folder / "checkpoints").glob("*.partial"))
