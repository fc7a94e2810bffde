"""Measures to trust: right answers score the ceiling, wrong ones nothing, and naive loops agree."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import exported
from torch.nn import functional as F

from emoji_scenes import World, WorldConfig, caption, held_out
from emoji_scenes.accuracy import caption_accuracy, draw_accuracy, held_out_scenes
from emoji_scenes.scene_classifier import SceneClassifier, classifier_identity, train_scene_classifier
from transfuse.errors import UserError
from transfuse.evaluation import agreement_by_chance, bootstrap, perplexity, share
from transfuse.model import dense
from transfuse.sequence import Document, Text, Tokenizer, collate

pytestmark = pytest.mark.xdist_group("evaluation")  # its fixtures are made once

WORLD = WorldConfig(size=32, nouns=4, max_objects=1, max_count=1)
TEXTS = ["a crab on a red background", "hello", "the moon is above a small boat on blue", "two balloons", "Ünïcödé"]


# --- intervals --------------------------------------------------------------------------------------------------------


def test_bootstrap_interval_matches_the_normal_one_for_many_items() -> None:
    values = np.random.default_rng(1).normal(3, 2, 400)
    found = bootstrap(values)
    error = 1.96 * values.std() / math.sqrt(len(values))
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - error, abs=0.05)
    assert found.high == pytest.approx(values.mean() + error, abs=0.05)
    assert bootstrap(values) == found


def test_bootstrap_of_a_ratio_weighs_items_by_their_counts() -> None:
    found = bootstrap([1.0, 30.0], [1, 10])
    assert found.value == pytest.approx(31 / 11)
    assert (found.low, found.high) == (1.0, 3.0)


def test_bootstrap_refuses_nothing_and_uneven_lengths() -> None:
    with pytest.raises(ValueError, match="expected items"):
        bootstrap([])
    with pytest.raises(ValueError, match="as many counts"):
        bootstrap([1.0], [1, 2])


def test_share_claims_no_certainty_where_all_agree() -> None:
    assert (share([True] * 100).low, share([True] * 100).high) == (0.97, 1.0)
    assert (share([False] * 100).low, share([False] * 100).high) == (0.0, 0.03)
    half = share([True, False] * 50)
    assert half.value == 0.5
    assert 0.38 < half.low < 0.42
    assert 0.58 < half.high < 0.62


def test_agreement_by_chance() -> None:
    assert agreement_by_chance(["a", "b", "c", "d"]) == 0.25
    assert agreement_by_chance(["a", "a", "a", "b"]) == pytest.approx(10 / 16)


# --- text -------------------------------------------------------------------------------------------------------------


def test_perplexity_of_a_uniform_model_is_its_vocabulary(tokenizer: Tokenizer) -> None:
    loaded = exported(tokenizer)
    with torch.no_grad():
        loaded.model.lm_head.weight.zero_()
    found = perplexity(loaded, TEXTS, batch=2)
    assert found.perplexity.value == pytest.approx(320, rel=1e-4)
    size = sum(len(text.encode()) for text in TEXTS)
    assert found.bytes == size
    assert found.bits_per_byte.value == pytest.approx(found.tokens * math.log2(320) / size, rel=1e-4)


def test_perplexity_equals_a_naive_loop_whatever_the_batch(tokenizer: Tokenizer) -> None:
    loaded = exported(tokenizer)
    grammar = tokenizer.sequence_format(2)
    nats, count = 0.0, 0
    for text in TEXTS:
        ids = [grammar.bos, *tokenizer.encode(text), grammar.eos]
        batch = collate([Document([Text(tokenizer.encode(text))])], grammar)
        for place in range(len(ids) - 1):
            inputs = (batch.input_ids, batch.position_ids, dense(batch), torch.tensor([place]))
            scores = loaded.model(*inputs).logits
            nats += F.cross_entropy(scores.double(), torch.tensor([ids[place + 1]])).item()
            count += 1
    for batch_size in (1, 3, 8):
        found = perplexity(loaded, TEXTS, batch_size)
        assert found.tokens == count
        assert found.perplexity.value == pytest.approx(math.exp(nats / count), rel=1e-4)
        assert found.perplexity.low < found.perplexity.value < found.perplexity.high


def test_perplexity_refuses_empty_and_too_long_texts(tokenizer: Tokenizer) -> None:
    loaded = exported(tokenizer, max_seq_len=8)
    with pytest.raises(UserError, match="expected at least one"):
        perplexity(loaded, ["a", ""])
    with pytest.raises(UserError, match="at most 8 positions"):
        perplexity(loaded, ["a crab on a red background, and then nothing that the tokenizer knows: xyzzy"])


# --- recogniser -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recogniser() -> SceneClassifier:
    return train_scene_classifier(WORLD, steps=40, batch=48, test_scenes=200)


def test_recogniser_learns_on_both_splits(recogniser: SceneClassifier) -> None:
    assert min(recogniser.accuracy.values()) > 0.6  # chance: 0.25
    assert set(recogniser.accuracy) == {"train", "heldout"}
    assert recogniser.parameters < 500_000


def test_recogniser_takes_any_size(recogniser: SceneClassifier) -> None:
    scenes, _, small = held_out_scenes(WORLD, 60)
    large = np.stack([World(WORLD).render(scene, size=64) for scene in scenes])
    agree = np.mean([one == other for one, other in zip(recogniser(small), recogniser(large), strict=True)])
    assert agree > 0.8


def test_recogniser_is_a_function_of_its_seed_and_saved_whole(tmp_path) -> None:
    first, again, other = (
        train_scene_classifier(WORLD, steps=3, batch=8, seed=seed, test_scenes=8) for seed in (0, 0, 1)
    )
    images = held_out_scenes(WORLD, 16)[2]
    state, same, different = (judge.network.state_dict() for judge in (first, again, other))
    assert all(torch.equal(state[name], same[name]) for name in state)
    assert any(not torch.equal(state[name], different[name]) for name in state)
    first.save(tmp_path / "recogniser.safetensors")
    loaded = SceneClassifier.load(tmp_path / "recogniser.safetensors")
    assert loaded(images) == first(images)
    assert (loaded.accuracy, loaded.identity, loaded.seconds) == (first.accuracy, first.identity, first.seconds)
    assert loaded.identity == classifier_identity(WORLD, 3, 0) != other.identity


def test_recogniser_refuses_another_file(tmp_path) -> None:
    path = tmp_path / "recogniser.safetensors"
    with pytest.raises(UserError, match="expected a saved recogniser"):
        SceneClassifier.load(path)
    path.write_bytes(b"something else")
    with pytest.raises(UserError, match="expected a saved recogniser"):
        SceneClassifier.load(path)


# --- scenes -----------------------------------------------------------------------------------------------------------


class Oracle:
    """Stands in for a pipeline: knows the scene of every prompt and picture, and answers for another one on demand."""

    def __init__(self, count: int, answer) -> None:
        self.scenes, self.prompts, self.pictures = held_out_scenes(WORLD, count)
        self.answer, self.told = answer, 0

    def __call__(self, prompts, generator, output_type):
        assert output_type == "np"
        assert prompts == self.prompts[self.told : self.told + len(prompts)]
        self.told += len(prompts)
        places = range(self.told - len(prompts), self.told)
        return SimpleNamespace(images=[World(WORLD).render(self.answer(self.scenes, place)) for place in places])

    def caption(self, images):
        places = range(self.told, self.told + len(images))
        self.told += len(images)
        return [caption(self.answer(self.scenes, place), index=place + 50) for place in places]


def truth(scenes, place):
    return scenes[place]


def wrong(scenes, place):
    """A scene with another noun on another background."""
    thing, background = scenes[place].things[0].noun, scenes[place].background
    return next(s for s in scenes if s.things[0].noun != thing and s.background != background)


def reading(count: int):
    """A recogniser that can not err: it looks the picture up among all scenes it may be shown."""
    scenes, _, pictures = held_out_scenes(WORLD, count)
    known = {picture.tobytes(): scene.things[0].noun for picture, scene in zip(pictures, scenes, strict=True)}
    return lambda images: [known[image.tobytes()] for image in images]


def test_drawings_of_the_real_scenes_score_the_ceiling(recogniser: SceneClassifier) -> None:
    found = draw_accuracy(Oracle(30, truth), WORLD, 30, recogniser, batch=7)
    assert np.array_equal(found.images, found.real_images)
    assert found.noun.value == found.real_noun.value == np.mean(found.noun_right)
    assert found.background.value == found.real_background.value == 1.0
    sure = draw_accuracy(Oracle(30, truth), WORLD, 30, reading(30), batch=7)
    assert sure.noun.value == sure.both.value == sure.real_noun.value == 1.0


def test_drawings_of_something_else_score_nothing() -> None:
    found = draw_accuracy(Oracle(30, wrong), WORLD, 30, reading(30))
    assert found.noun.value == found.background.value == found.both.value == 0.0
    assert found.real_noun.value == found.real_background.value == 1.0
    assert 0 < found.chance_noun < 0.5
    pairs = list(zip(found.nouns, found.backgrounds, strict=True))
    assert found.chance_both == agreement_by_chance(pairs), "held-out backgrounds follow from nouns: no product of two"
    assert found.chance_both > found.chance_noun * found.chance_background
    assert found.named != found.nouns


def test_captions_are_judged_by_their_words() -> None:
    right = caption_accuracy(Oracle(30, truth), WORLD, 30, batch=7)
    assert right.noun.value == right.background.value == right.both.value == 1.0
    assert right.captions != right.truths  # other words, as true
    mistaken = caption_accuracy(Oracle(30, wrong), WORLD, 30)
    assert mistaken.noun.value == mistaken.background.value == 0.0


@pytest.mark.parametrize(
    "said", ["", "a crab and a balloon and a banana and a cactus on red, blue, green, pink, white"]
)
def test_a_caption_that_says_nothing_or_everything_is_wrong(said: str) -> None:
    oracle = SimpleNamespace(caption=lambda images: [said] * len(images))
    found = caption_accuracy(oracle, WORLD, 8)
    assert found.noun.value == found.background.value == 0.0


def test_only_combinations_that_training_never_shows_are_asked_for() -> None:
    scenes, prompts, _ = held_out_scenes(WORLD, 20)
    others = held_out_scenes(WORLD, 20, seed=1)[0]
    assert all(held_out(scene) for scene in scenes)
    assert scenes != others
    assert all(scene.background in prompt for scene, prompt in zip(scenes, prompts, strict=True))
    with pytest.raises(UserError, match="scenes of one thing"):
        held_out_scenes(WorldConfig(nouns=4, max_objects=2), 3)
