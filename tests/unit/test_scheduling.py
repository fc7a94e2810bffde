"""Fairness between clients, suspended sequences, and what ends or shapes a text: stop strings, penalties, logprobs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from conftest import BYTES, chained, exported, latent, linked
from engines import coded, packed
from hypothesis import given
from hypothesis import strategies as st

from transfuse.diffusion import SamplerConfig
from transfuse.errors import UserError
from transfuse.export import Exported
from transfuse.inference import Done, Engine, Event, ImageEnd, Request, TextDelta, TransfusionPipeline
from transfuse.inference.scheduling import FairQueue
from transfuse.inference.sequence_state import StopStrings
from transfuse.rng import generator_for
from transfuse.sequence import Document, Image, Text, Tokenizer

WORDS = Document([Text((10, 11, 12))], closed=False)
SEEN = Document([Image(latent(8, 8, 3), target=False)], closed=False)
DRAW = Request(WORDS, draw="force", max_tokens=0, size=(8, 8), sampler=SamplerConfig("ddim", 30))
CAPTION = Request(SEEN, draw="never", max_tokens=6)


def outcome(events: Sequence[Event], number: int) -> list[object]:
    """Tokens, latents and the end of one request."""
    values: list[object] = []
    for event in events:
        if event.request_id == number:
            match event:
                case TextDelta(token=token):
                    values.append(token)
                case ImageEnd(latent=drawn):
                    values.append(drawn.tolist())
                case Done():
                    values.append(replace(event, request_id=0))
    return values


# ---- who runs


@pytest.mark.parametrize("slots", [1, 2, 8])
def test_a_caption_behind_twenty_drawings_starts_within_two_steps(tokenizer: Tokenizer, slots: int) -> None:
    engine = Engine(exported(tokenizer), slots)
    for seed in range(20):
        engine.submit(replace(DRAW, seed=seed), "greedy")
    for _ in range(7):
        engine.step()
    caption = engine.submit(CAPTION, "other")
    assert engine.schedule() == [caption]
    events = [event for _ in range(20) for event in engine.step()]
    assert next(event.request_id for event in events if isinstance(event, Done)) == caption


def test_a_suspended_request_gives_what_it_gives_alone(tokenizer: Tokenizer) -> None:
    """Whatever it was doing: reading, writing, drawing in the middle of its branches, or between two images."""
    for model in (exported(tokenizer), coded(tokenizer)):
        long = replace(DRAW, max_tokens=4, max_images=2, guidance_scale=2.0, sampler=SamplerConfig("ddim", 6))
        long = replace(long, temperature=1.0, code_temperature=1.0)
        requests = [(replace(long, seed=1), "a"), (replace(long, seed=2), "a"), (replace(long, seed=3), "a")]
        short = [replace(DRAW, draw="never", max_tokens=count, seed=count, temperature=1.0) for count in range(1, 9)]
        engine, events = Engine(model, 1), list[Event]()
        numbers = {engine.submit(request, client): request for request, client in requests}
        suspended = False
        for number, request in enumerate(short):
            events += [event for _ in range(2 + number) for event in engine.step()]
            numbers[engine.submit(request, f"client {number}")] = request
            suspended |= engine.schedule() != [] and len(numbers) > 1
        while engine.busy:
            events += engine.step()
        assert suspended
        for number, request in numbers.items():
            alone = outcome(list(Engine(model, 1).run([request])), 0)
            assert outcome(events, number) == alone, request


def test_a_suspended_request_can_be_cancelled(tokenizer: Tokenizer) -> None:
    engine = Engine(exported(tokenizer), 1)
    drawing = engine.submit(DRAW, "a")
    engine.step()
    caption = engine.submit(CAPTION, "b")
    engine.step()
    engine.cancel(drawing)
    while engine.busy:
        assert {event.request_id for event in engine.step()} <= {caption}
    assert len(engine.slots) == 1


def served(jobs: Sequence[tuple[str, str, int]], slots: int = 1) -> list[tuple[str, str]]:
    """The flow that has each slot in each unit of time: a machine that does one position a slot and tick."""
    queue: FairQueue[list[object]] = FairQueue()
    for client, kind, cost in jobs:
        queue.push([client, kind, cost], cost, client, kind)
    running: list[list[object]] = []
    ticks = []
    while any(flow.active for flow in queue.flows.values()):
        while (turn := queue.start(len(running) < slots)) is not None:
            running = [job for job in running if job is not turn[1]] + [turn[0]]
        for job in list(running):
            ticks.append((str(job[0]), str(job[1])))
            job[2] -= 1  # type: ignore[operator]
            if not job[2]:
                running.remove(job)
                queue.remove(job)
    return ticks


def test_clients_get_equal_shares_by_cost_not_by_requests() -> None:
    jobs = [("many", "draw", 10)] * 40 + [("few", "draw", 100)] * 4
    half = Counter(client for client, _ in served(jobs)[:400])
    assert abs(half["many"] - half["few"]) <= 100, half


def test_kinds_share_what_their_client_gets() -> None:
    jobs = [("a", "draw", 20)] * 20 + [("a", "write", 2)] * 200 + [("b", "draw", 20)] * 40
    first = Counter(served(jobs)[:400])
    assert 80 <= first["a", "draw"] <= 130
    assert 80 <= first["a", "write"] <= 130
    assert 160 <= first["b", "draw"] <= 240


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["draw", "write"]), st.integers(1, 9)), max_size=30))
def test_all_work_is_done_whatever_comes(jobs: list[tuple[str, str, int]]) -> None:
    assert Counter(served(jobs, 3)) == Counter({
        (client, kind): sum(cost for who, what, cost in jobs if (who, what) == (client, kind))
        for client, kind, _ in jobs
    })  # fmt: skip


def test_one_flow_is_first_come_first_served(tokenizer: Tokenizer) -> None:
    engine = Engine(exported(tokenizer), 2)
    numbers = [engine.submit(replace(DRAW, seed=seed, sampler=SamplerConfig("ddim", 2))) for seed in range(5)]
    ends = [event.request_id for _ in range(30) for event in engine.step() if isinstance(event, Done)]
    assert ends == numbers


def test_a_cancelled_queue_costs_its_client_nothing() -> None:
    queue: FairQueue[str] = FairQueue()
    jobs = [f"cancelled {number}" for number in range(9)]
    for job in jobs:
        queue.push(job, 100, "a")
    assert queue.start(True) == (jobs[0], None)
    for job in jobs[1:]:
        queue.remove(job)
    queue.push("theirs", 150, "b")
    queue.push("next", 40, "a")
    queue.remove(jobs[0])
    assert queue.start(True) == ("next", None)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("busy", [True, False])
def test_what_a_client_did_not_take_from_others_is_not_held_against_it(
    tokenizer: Tokenizer, left: bool, busy: bool
) -> None:
    """A long job, left after a step or complete before others came, does not make the next one wait for theirs."""
    engine, ended = Engine(exported(tokenizer), 2), list[int]()

    def submit(client: str, steps: int) -> int:
        return engine.submit(replace(DRAW, sampler=SamplerConfig("ddim", steps)), client)

    def step() -> None:
        ended.extend(event.request_id for event in engine.step() if isinstance(event, Done))

    if busy:  # by a third client, which never stops
        submit("third", 900)
    first = submit("a", 100)
    step()
    if left:
        engine.cancel(first)
    while not left and first not in ended:
        step()
    others = [submit("b", 5) for _ in range(20)]
    short = submit("a", 2)
    while short not in ended:
        step()
    assert len(set(ended) & set(others)) <= 2


def test_a_flow_is_charged_for_what_was_computed() -> None:
    """Also where its next request waits already, and where a text ends before its limit."""
    done: Counter[str] = Counter()
    queue: FairQueue[str] = FairQueue(done.__getitem__)
    queue.push("third", 10_000, "c")
    queue.push("long", 100_000, "a")
    queue.push("next", 1_000, "a")
    assert {queue.start(True), queue.start(True)} == {("third", None), ("long", None)}
    assert queue.start(True) == ("next", None)
    queue.push("theirs", 5_000, "b")
    done["long"] = 10
    queue.remove("long")
    assert queue.start(False) == ("theirs", "third"), "the costliest of those that run makes way"
    queue.push("last", 100, "a")
    assert queue.start(False) == ("last", "theirs")


def test_visitors_are_forgotten() -> None:
    """While a long job runs, and when none is left."""
    done: Counter[str] = Counter()
    queue: FairQueue[str] = FairQueue(done.__getitem__)
    queue.push("long", 1_000_000, "resident")
    queue.start(True)
    for number in range(500):
        visit = f"visit {number}"
        queue.push(visit, 10, f"visitor {number}")
        assert queue.start(True) == (visit, None)
        done["long"] += 10
        done[visit] = 10
        queue.remove(visit)
        assert len(queue.flows) <= 4
    queue.remove("long")
    assert not queue.flows


# ---- what a text may say


def written(model: Exported, **settings: object) -> list[TextDelta | Done]:
    request = replace(TransfusionPipeline(model).request(["?"]), draw="never", **settings)  # type: ignore[arg-type]
    return [event for event in Engine(model).run([request]) if isinstance(event, TextDelta | Done)]


@pytest.mark.parametrize(
    ("stop", "text", "tokens"),
    [
        (("cd",), "ab", 4),
        (("e", "bcd"), "a", 4),
        (("g",), "abcdef\u00e9", 8),
        (("\u00e9",), "abcdef", 8),
        (("f\u00e9g",), "abcdef\u00e9", 8),
        (("abcdef\u00e9h",), "abcdef\u00e9", 8),
        (("ab",), "", 2),
        ((), "abcdef\u00e9", 8),
    ],
)
def test_stop_strings_across_tokens(stop: tuple[str, ...], text: str, tokens: int) -> None:
    """Each byte is a token; the first string that is complete counts, and the last character has two."""
    start = BYTES.encode("?")[0]
    model = chained(linked("abcdef\u00e9".encode(), BYTES.eos, start))
    *deltas, done = written(model, stop=stop)
    assert "".join(delta.text for delta in deltas) == text
    assert done.reason == "stop"
    assert done.text_tokens == tokens
    if not stop:
        assert len(deltas) == done.text_tokens


@given(st.lists(st.text("ab", max_size=3), max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stop_strings_find_the_first(pieces: list[str], stops: list[str]) -> None:
    strings, released = StopStrings(stops), ""
    for number, piece in enumerate(pieces):
        released += "".join(text for _, text in strings.add([(number, piece)]))
        if strings.matched:
            break
    whole = "".join(pieces)
    ends = [(whole.find(stop) + len(stop), whole.find(stop)) for stop in stops if stop in whole]
    expected = whole[: min(ends)[1]] if ends else whole
    assert released + "".join(text for _, text in strings.flush()) == expected
    assert strings.matched == bool(ends)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_penalties_are_openais_formula(tokenizer: Tokenizer, temperature: float) -> None:
    """Against an oracle that recomputes each choice from the unpenalised log probabilities of all tokens."""
    model, seed = exported(tokenizer), 3
    settings = {"presence_penalty": 1.5, "frequency_penalty": 0.75, "max_tokens": 24, "temperature": temperature}
    vocab = model.model.config.vocab_size
    deltas = [e for e in written(model, seed=seed, logprobs=vocab, **settings) if isinstance(e, TextDelta)]
    prompt, counts = len(tokenizer.encode("?")) + 1, Counter[int]()
    for step, delta in enumerate(deltas):
        logits = torch.full((vocab,), -torch.inf)
        for token, logprob in delta.top_logprobs:
            logits[token] = logprob - 1.5 * (counts[token] > 0) - 0.75 * counts[token]
        if temperature == 0:
            assert delta.token == int(logits.argmax())
        else:
            probabilities, order = logits.softmax(-1).sort(descending=True)
            generator = generator_for(seed, "token", prompt + step)
            assert delta.token == int(order[torch.multinomial(probabilities, 1, generator=generator)])
        assert delta.logprob == dict(delta.top_logprobs)[delta.token]
        counts[delta.token] += 1
    plain = [
        e.token for e in written(model, seed=seed, max_tokens=24, temperature=temperature) if isinstance(e, TextDelta)
    ]
    assert plain != [delta.token for delta in deltas]


def test_penalties_and_logprobs_do_not_depend_on_the_batch(tokenizer: Tokenizer) -> None:
    model = packed(exported(tokenizer))
    pipe = TransfusionPipeline(model)
    settings = {"presence_penalty": 1.0, "frequency_penalty": 0.5, "logprobs": 3, "temperature": 1.0, "max_tokens": 9}
    requests = [
        replace(pipe.request(["a crab", "on blue"][: 1 + seed % 2]), draw="never", seed=seed, **settings)
        for seed in range(5)
    ]
    together = list(Engine(model).run(requests))
    for row, request in enumerate(requests):
        alone = list(Engine(model).run([request]))
        assert [replace(event, request_id=0) for event in together if event.request_id == row] == alone
    assert pipe.generate("a crab", draw="never", **settings).text == "".join(
        event.text for event in together if event.request_id == 0 and isinstance(event, TextDelta)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"presence_penalty": 2.5}, "presence_penalty: expected -2 to 2, found 2.5"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty: expected -2 to 2, found nan"),
        ({"stop": ("",)}, "stop: expected strings that are not empty"),
        ({"stop": "abc"}, "stop: expected strings that are not empty"),
        ({"logprobs": -1}, "logprobs: expected at least 0, found -1"),
    ],
)
def test_wrong_settings_are_named(tokenizer: Tokenizer, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Engine(exported(tokenizer)).submit(replace(CAPTION, **changes))  # type: ignore[arg-type]
