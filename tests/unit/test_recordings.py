"""Recorded passes: what is played back is what would have been computed, and what comes again is recorded once.

A CUDA graph needs CUDA (`test_cuda.py`). Here a recording does the work of the pass it was made from once more: on that
pass's own tensors, and with every size and offset that it had, which is what a graph keeps.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from engines import ARMS, POSITIONS, alone, exactly, finish, plain, some_request
from torch import Tensor

import transfuse
from transfuse.diffusion import SamplerConfig
from transfuse.inference import Engine, ImageEnd, TransfusionPipeline
from transfuse.inference.cuda_graphs import KEPT, GraphCache, Work
from transfuse.inference.model_runner import ModelRunner
from transfuse.model.transfusion import Output
from transfuse.sequence import Tokenizer


class Recorder:
    """Keeps the work, and does it again into the same memory; counts both."""

    def __init__(self) -> None:
        self.recorded = self.played = 0

    def __call__(self, work: Work) -> tuple[object, Output]:
        self.recorded += 1
        output = work()
        output = Output(output.logits.clone(), [one.clone() for one in output.predictions])

        def replay() -> None:
            self.played += 1
            again = work()
            output.logits.copy_(again.logits)
            for ours, theirs in zip(output.predictions, again.predictions, strict=True):
                ours.copy_(theirs)

        for one in (output.logits, *output.predictions):
            one.fill_(float("nan"))  # a recording is not a pass
        return replay, output


def recording(one: object) -> tuple[ModelRunner, Recorder]:
    network, recorder = ModelRunner(one), Recorder()  # type: ignore[arg-type]
    network.record = recorder  # type: ignore[assignment]
    return network, recorder


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("schedule", range(3))
def test_any_schedule_gives_what_each_request_gives_alone(tokenizer: Tokenizer, arm: str, schedule: int) -> None:
    """Ten requests join at random ticks and share three slots, so that shapes come again with other content."""
    one, draws = ARMS[arm](tokenizer), random.Random(f"{arm} {schedule}")
    network, recorder = recording(one)
    engine = Engine(network, slots=3, positions=POSITIONS)
    coded, requests, told = arm.endswith("codes"), {}, {}
    while len(requests) < 10 or engine.busy:
        if len(requests) < 10 and draws.random() < 0.4:
            asked = some_request(draws, coded)
            number = engine.submit(asked)
            requests[number], told[number] = asked, []
        for event in engine.step():
            told[event.request_id].append(exactly(event))
    assert recorder.played > recorder.recorded > 0
    for number, asked in requests.items():
        assert told[number] == alone(one, asked), asked


@pytest.mark.parametrize(("arm", "steps"), [("linear", 9), ("unet", 9)])
def test_a_drawing_is_recorded_once(tokenizer: Tokenizer, arm: str, steps: int) -> None:
    network, recorder = recording(ARMS[arm](tokenizer))
    engine = Engine(network, slots=1, positions=POSITIONS)
    for seed in range(3):
        engine.submit(plain(sampler=SamplerConfig("ddim", steps), guidance_scale=3.0, seed=seed))
        finish(engine)
    # Of the first drawing, the first step is computed; of prompt and BOI, those of the second prompt are recorded.
    assert recorder.recorded == 1 + 2
    assert recorder.played == 3 * steps - 1 + 2 * 2


def test_runs_of_as_many_rows_play_back_what_was_recorded_before(tokenizer: Tokenizer) -> None:
    one = ARMS["linear"](tokenizer)
    network, recorder = recording(one)
    engine, recorded = Engine(network), []
    for seed in range(4):
        asked = [plain(seed=seed + row) for row in range(2)]
        drawn = [event.latent for event in engine.run(asked) if isinstance(event, ImageEnd)]
        recorded.append(recorder.recorded)
        expected = [event.latent for event in Engine(one).run(asked) if isinstance(event, ImageEnd)]
        assert len(drawn) == 2
        assert all(map(torch.equal, drawn, expected))
    assert recorded[1] == recorded[3]
    abandoned = engine.run([plain(seed=0), plain(seed=1)])
    next(abandoned)
    assert len(list(engine.run([plain(seed=0), plain(seed=1)]))) == 1 + len(list(abandoned))


def test_writing_is_recorded_once_for_a_block_of_keys(tokenizer: Tokenizer) -> None:
    network, recorder = recording(ARMS["linear"](tokenizer))
    with torch.no_grad():
        network.logit_mask[tokenizer.eos] = -torch.inf
    engine = Engine(network, slots=1, positions=POSITIONS)
    engine.submit(plain(draw="never", max_tokens=150))
    finish(engine)
    assert recorder.recorded == 3, "keys to 64, to 128, to 192"


def test_no_more_is_kept_than_said() -> None:
    kept, recorder = GraphCache(), Recorder()
    for size in [*range(KEPT + 1)] * 2:
        kept.run(recorder, "pass", [torch.zeros(size)], lambda: Output(torch.zeros(1), []))  # type: ignore[arg-type]
    assert not recorder.recorded, "each had been forgotten when it came again"
    assert len(kept._seen) == KEPT


def test_what_was_given_stays() -> None:
    """The next one played back leaves an earlier output alone."""
    kept, recorder, x = GraphCache(), Recorder(), torch.zeros(2)

    def played(value: float) -> Tensor:
        given = x.clone() if value < 2 else torch.full((2,), value)
        return kept.run(recorder, "pass", [given], lambda: Output(given * 10, [given + 1])).logits  # type: ignore[arg-type]

    played(0.0)
    first, second, third = played(1.0), played(2.0), played(3.0)
    assert [first.tolist(), second.tolist(), third.tolist()] == [[0, 0], [20, 20], [30, 30]]


def test_without_cuda_nothing_is_recorded_or_kept(served: Path) -> None:
    pipe = transfuse.load(str(served), graphs=True)
    pipe("a crab", num_inference_steps=2)
    assert pipe.engine.runner.record is None
    assert pipe.engine._last is None


def test_warming_up_leaves_no_cache_behind(tokenizer: Tokenizer) -> None:
    pipe, recorder = TransfusionPipeline(ARMS["linear"](tokenizer)), Recorder()
    pipe.engine.runner.record = recorder  # type: ignore[assignment]
    pipe.warm_up(rows=2)
    assert recorder.played
    assert pipe.engine._last is None
