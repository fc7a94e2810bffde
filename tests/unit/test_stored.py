"""Data sets in training: what the index gives, the order for any ranks and workers, packing, shares, damage."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emoji_scenes import glosses
from transfuse.autoencoders import Pixels
from transfuse.data import (
    CorruptLog,
    DataSet,
    Mixture,
    MixtureComponent,
    Packer,
    PairConfig,
    StepLoader,
    StoredImages,
    StoredTexts,
    Texts,
)
from transfuse.data.building import build_set
from transfuse.data.building.prepare import BuildConfig
from transfuse.data.dataset import Split
from transfuse.data.mixture import PATTERNS
from transfuse.data.packing import best_fit
from transfuse.data.readers import Columns
from transfuse.diffusion import DiffusionConfig, Process
from transfuse.errors import UserError
from transfuse.recipes import Recipe, preset
from transfuse.runs import open_sources, resolve
from transfuse.runs.sources import mixture
from transfuse.sequence import Image, Text, Tokenizer, collate, layout_document
from transfuse.training import ObjectiveConfig, TransfusionObjective

pytestmark = pytest.mark.xdist_group("stored")  # its fixtures are made once

COUNT = 150


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three sets of one tokenizer: pairs, text, and stories of several pictures of several sizes."""
    root = tmp_path_factory.mktemp("sets")
    config = BuildConfig(size=16, vocabulary=512, shard_size=40, heldout=0.1, columns=Columns(count=COUNT))
    build_set("world", root / "pairs", config, workers=0)
    shared = replace(config, tokenizer=str(root / "pairs"), columns=Columns(split="line"))
    (root / "words.txt").write_text("\n".join(glosses("heldout")[:COUNT]))
    build_set(str(root / "words.txt"), root / "text", replace(shared, max_tokens=20), workers=0)
    for number, size in enumerate([(16, 16), (64, 32), (20, 50)]):
        picture = np.full((*size, 3), 60 * number, dtype=np.uint8)
        __import__("PIL.Image", fromlist=["Image"]).fromarray(picture).save(root / f"{number}.png")
    lines = [
        {"parts": [{"text": f"story {i}"}, *({"image": f"{(i + j) % 3}.png"} for j in range(i % 4)), {"text": "end"}]}
        for i in range(60)
    ]
    (root / "stories.jsonl").write_text("\n".join(map(json.dumps, lines)))
    stories = replace(shared, fit="bucket", multiple=8, columns=Columns())
    build_set(str(root / "stories.jsonl"), root / "stories", stories, workers=0)
    lines = [{"parts": [part(letter, i) for letter in ORDERS[i % len(ORDERS)]]} for i in range(90)]
    (root / "orders.jsonl").write_text("\n".join(map(json.dumps, lines)))
    build_set(str(root / "orders.jsonl"), root / "orders", replace(stories, heldout=0.0), workers=0)
    return root


ORDERS = ("ti", "it", "tit", "iti", "iit", "titit", "i", "ii", "t")
"""documents by kind, texts and images in order"""


def part(letter: str, number: int) -> dict[str, str]:
    return {"text": f"part of {number}"} if letter == "t" else {"image": f"{number % 3}.png"}


def pictures(path: Path, **changes) -> StoredImages:
    data = DataSet(str(path))
    return StoredImages(data, data.tokenizer(), Pixels(), PairConfig(**changes), seed=3)


def stream(folder: Path) -> Mixture:
    texts = StoredTexts(DataSet(str(folder / "text")), 3)
    parts = [MixtureComponent(pictures(folder / "pairs"), 0.4), MixtureComponent(pictures(folder / "stories"), 0.2)]
    return Mixture(
        [*parts, MixtureComponent(texts, 0.4)], DataSet(str(folder / "pairs")).tokenizer().sequence_format(4)
    )


def loader(folder: Path, rows: int | None = None, **settings) -> StepLoader:
    mixture, grammar = stream(folder), DataSet(str(folder / "pairs")).tokenizer().sequence_format(4)
    packed = None if rows is None else Packer(lambda samples: mixture.lengths(samples, grammar), rows, window=50)
    return StepLoader(mixture.document, grammar, 6, packer=packed, **settings)


def test_the_index_gives_every_length(folder: Path) -> None:
    grammar = DataSet(str(folder / "pairs")).tokenizer().sequence_format(4)
    for source in (
        pictures(folder / "pairs"),
        pictures(folder / "stories"),
        pictures(folder / "orders", caption_drop=0.5),
        StoredTexts(DataSet(str(folder / "text")), 0),
    ):
        indices = np.arange(2 * source.epoch + 7)
        result = source.lengths(indices, indices + 5, grammar)
        for index in indices.tolist():
            assert result[index] == len(layout_document(source.document(index, index + 5), grammar)), (
                source.name,
                index,
            )
    mixture = stream(folder)
    assert mixture.lengths(range(300), grammar).tolist() == [
        len(layout_document(mixture.document(sample), grammar)) for sample in range(300)
    ]


def test_each_document_once_an_epoch_and_none_that_is_held_out(folder: Path) -> None:
    data = DataSet(str(folder / "pairs"))
    source = pictures(folder / "pairs")
    heldout = {data.number("heldout", i) for i in range(data.size("heldout"))}
    assert len(heldout) == data.manifest.heldout == round(0.1 * len(data))
    orders = [[source.number(epoch * source.epoch + i) for i in range(source.epoch)] for epoch in range(3)]
    for order in orders:
        assert sorted([*order, *heldout]) == list(range(len(data)))
    assert orders[0] != orders[1] != orders[2]
    other = StoredImages(data, data.tokenizer(), Pixels(), PairConfig(), seed=4, split="heldout")
    assert {other.number(i) for i in range(other.epoch)} == heldout, "whatever the seed"
    assert source.numbers(np.arange(2 * source.epoch)).tolist() == orders[0] + orders[1]


def test_pictures_and_words_come_back(folder: Path) -> None:
    """A pair that is drawn, captioned or unconditional is the scene and its caption, to the bit."""
    from emoji_scenes import World, WorldConfig, caption

    world, source = World(WorldConfig(size=16)), pictures(folder / "pairs", caption_first=1.0, caption_drop=0.0)
    for index in range(20):
        document = source.document(index, index)
        number = int(source.data.read(source.number(index)).key.rpartition("-")[2])
        text, image = document.parts
        assert isinstance(text, Text)
        assert source.tokenizer.decode(text.ids) == caption(world.scene(number), number)
        assert torch.equal(image.latent, Pixels().encode(world.render(world.scene(number))[None])[0])


def test_stories_keep_their_order_and_their_images_see_all_noise(folder: Path) -> None:
    """Text stands before all of their images; what follows an image does not cap it."""
    source = pictures(folder / "stories", caption_drop=0.0)
    for index in range(source.epoch):
        parts = source.document(index, index).parts
        assert isinstance(parts[0], Text)
        assert isinstance(parts[-1], Text)
        assert [part.max_timestep for part in parts if not isinstance(part, Text)] == [None] * (len(parts) - 2)


def test_stored_documents_are_capped_and_dropped_by_their_order(folder: Path) -> None:
    """Images that text asks for have no cap, and their captions are dropped at the rate of pairs."""
    source = pictures(folder / "orders", caption_drop=0.2)
    total, dropped = dict.fromkeys(ORDERS, 0), dict.fromkeys(ORDERS, 0)
    for index in range(20 * source.epoch):
        document = source.document(index, index)
        kind = "".join("t" if isinstance(part, str) else "i" for part in source.data.read(source.number(index)).parts)
        total[kind] += 1
        caps = [image.max_timestep for image in document.images]
        if document.predict:
            before = len(kind) - len(kind.lstrip("i")) if "t" in kind else 0
            assert ["i" if isinstance(part, Image) else "t" for part in document.parts] == list(kind)
            assert caps == [500] * before + [None] * (kind.count("i") - before)
        else:
            assert (len(document.parts), caps) == (1, [None])
            dropped[kind] += 1
    for kind, count in dropped.items():
        assert total[kind] >= 20
        drawn = kind in ("ti", "tit", "iti", "titit")
        assert count / total[kind] == pytest.approx(0.2 if drawn else 0, abs=0.08), kind


def test_timesteps_of_stories_reach_the_last(folder: Path) -> None:
    """An image sees the levels that drawing begins with, whatever follows it."""
    source = pictures(folder / "stories")
    grammar = source.tokenizer.sequence_format(4)
    batch = collate([source.document(index, index) for index in range(1000)], grammar)
    timesteps = TransfusionObjective(ObjectiveConfig(), Process(DiffusionConfig()), 0).sample_noise(batch).timesteps
    assert timesteps is not None
    assert len(timesteps) > 1000
    assert float((timesteps > 500).float().mean()) == pytest.approx(0.5, abs=0.05)
    assert int(timesteps.max()) > 990


# --- order ------------------------------------------------------------------------------------------------------------


def order(loaders: list[StepLoader], steps: range) -> list[list[tuple[int, tuple[int, ...]]]]:
    """Sample numbers and ids of each step, all ranks together."""
    values = []
    for step in steps:
        batches = [batch for item in loaders for batch in item(step)]
        values.append(
            [
                (sample, tuple(ids.tolist()))
                for batch in batches
                for sample, ids in zip(batch.samples, batch.input_ids.split(batch.documents), strict=False)
                if sample >= 0
            ]
        )
    return values


@pytest.mark.parametrize("rows", [None, pytest.param(128, marks=pytest.mark.long)])
def test_the_order_is_the_same_for_any_ranks_and_workers(folder: Path, rows: int | None) -> None:
    expected = order([loader(folder, rows)], range(12))
    if rows is None:
        assert [sample for step in expected for sample, _ in step] == list(range(72))
    # Rows are planned from windows of thousands of samples, by each rank: fewer of them here.
    for ranks, workers in [(3, 0), (8, 0), (1, 1), (1, 3)] if rows is None else [(3, 0), (1, 1)]:
        values = [loader(folder, rows, workers=workers, rank=rank, ranks=ranks) for rank in range(ranks)]
        assert order(values, range(12)) == expected, (ranks, workers)


@pytest.mark.parametrize("rows", [None, pytest.param(128, marks=pytest.mark.long)])
def test_stopped_and_gone_on_with_another_number_of_ranks(folder: Path, rows: int | None) -> None:
    """Stops at random steps: no sample is lost, none comes twice, each is where it would have been."""
    expected = order([loader(folder, rows)], range(30))
    draws = random.Random(0)
    stops = sorted(draws.sample(range(1, 30), 8 if rows else 4))
    result: list[list[tuple[int, tuple[int, ...]]]] = []
    position: dict[str, int] = {}
    for start, stop in zip([0, *stops], [*stops, 30], strict=True):
        ranks = draws.choice([1, 2, 3, 8])
        loaders = [loader(folder, rows, rank=rank, ranks=ranks) for rank in range(ranks)]
        for item in loaders:
            item.start_from(json.loads(json.dumps(position)))
        result += order(loaders, range(start, stop))
        position = loaders[0].position()
        assert len(position) == (0 if rows is None else 2), "a few integers are the whole state"
    assert result == expected


def test_split_into_micro_batches_and_ranks_nothing_moves(folder: Path) -> None:
    whole = order([loader(folder)], range(5))
    assert order([loader(folder, accumulate=3)], range(5)) == whole
    assert order([loader(folder, accumulate=2, rank=rank, ranks=4) for rank in range(4)], range(5)) == whole


# --- rows -------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 64), max_size=80))
def test_packing_keeps_every_sample_and_fits(lengths: list[int]) -> None:
    rows = best_fit(lengths, 64)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    sums = [sum(lengths[index] for index in row) for row in rows]
    assert all(total <= 64 for total in sums)
    assert len(rows) <= 1.7 * max(1, sum(lengths) / 64) + 1, "best fit, longest first, stays within 11/9 of the best"
    assert sum(total <= 32 for total in sums) <= 1, "two rows half empty would have been one"


def test_rows_have_every_sample_once_and_one_size(folder: Path) -> None:
    load = loader(folder, 128)
    steps = order([load], range(30))
    samples = [sample for step in steps for sample, _ in step]
    assert len(set(samples)) == len(samples)
    complete = max(samples) // 50 * 50 - 50
    assert set(range(complete)) <= set(samples), "windows come one after the other, each whole"
    batches = [batch for step in range(30) for batch in load(step)]
    assert {batch.positions for batch in batches} == {6 * 128}, "one shape, so nothing is compiled twice"


def test_a_limit_of_nothing_shows_pictures_clean(folder: Path) -> None:
    """Those before all text, in documents of many parts as in pairs; the others are learned."""
    source = pictures(folder / "orders", image_first_max_timestep=0, caption_drop=0.0)
    for index in range(source.epoch):
        parts = source.document(index, index).parts
        first = next((place for place, part in enumerate(parts) if isinstance(part, Text)), 0)
        values = [part.target for part in parts if not isinstance(part, Text)]
        assert values == [place > first or first == 0 for place, part in enumerate(parts) if not isinstance(part, Text)]
        assert not any(part.max_timestep for part in parts if not isinstance(part, Text))
    shown = [image for index in range(source.epoch) for image in source.document(index, index).images]
    assert {image.target for image in shown} == {True, False}
    pairs = pictures(folder / "pairs", image_first_max_timestep=0, caption_first=0.0)
    assert not pairs.document(0, 0).images[0].target
    with pytest.raises(ValueError, match="max_timestep: expected at least 1, found 0"):
        replace(shown[0], max_timestep=0)


@pytest.mark.parametrize("window", [7, 50, 8192])
def test_rows_of_a_stream_that_ends(window: int) -> None:
    """Windows of any size hold every sample; an error comes only after the last."""
    mixture = Mixture([MixtureComponent(Numbers("a", 30), 1, 3)], None)
    assert mixture.end == 90
    grammar = Tokenizer.train(["a"], 300).sequence_format(4)
    rows = Packer(lambda samples: mixture.lengths(samples, grammar), 4, window=window, end=mixture.end)
    result, number = list[int](), 0
    while len(result) < 90:
        result += rows.row(number)
        number += 1
    assert sorted(result) == list(range(90))
    with pytest.raises(UserError, match="all used up after 90 samples"):
        rows.row(number)


def test_98_percent_of_rows_are_used() -> None:
    """Rows of 4,096 under pictures of 256 patches with captions, and definitions, 1 : 1 in positions."""
    draws = np.random.default_rng(0)
    words = draws.choice([len(line.split()) for line in glosses("train")], 40_000)
    lengths = words + np.where(draws.random(40_000) < 0.07, 260, 2)
    rows = Packer(lambda samples: lengths[np.asarray(samples)], 4096)
    used = [sum(lengths[sample] for sample in rows.row(number)) for number in range(250)]
    assert np.mean(used) / 4096 >= 0.98


def test_a_sample_longer_than_a_row(folder: Path) -> None:
    with pytest.raises(
        UserError, match=r"data\.row_length: expected at least \d+, the positions of sample \d+, found 16"
    ):
        loader(folder, 16)(0)
    with pytest.raises(UserError, match=r"^data\.row_length: .* found 16$"):
        loader(folder, 16, workers=1)(0)  # from another process, one line all the same


# --- shares -----------------------------------------------------------------------------------------------------------


class Numbers:
    """A source of single tokens."""

    def __init__(self, name: str, epoch: int | None) -> None:
        self.name, self.epoch = name, epoch

    def document(self, index: int, sample: int):
        from transfuse.sequence import Document

        return Document([Text((index,))], sample=sample)

    def lengths(self, indices, samples, grammar):
        return np.ones(len(indices), dtype=np.int64)


def drawn(mixture: Mixture, samples: range) -> list[tuple[str, int]]:
    documents = [mixture.document(sample) for sample in samples]
    return [(document.source, document.parts[0].ids[0]) for document in documents]


@settings(max_examples=6, deadline=None)
@given(st.floats(0.05, 0.95), st.integers(3, 700), st.floats(0.3, 3.0), st.integers(0, 3000))
def test_epochs_end_and_final_shares_begin(share: float, size: int, epochs: float, final_from: int) -> None:
    """A source is used to its limit, not one document more, in order; and afterwards the other takes its place."""
    limited = MixtureComponent(Numbers("a", size), share, epochs, anneal_weight=0.5)
    mixture = Mixture([limited, MixtureComponent(Numbers("b", None), 1 - share, anneal_weight=0.5)], None, final_from)
    result = drawn(mixture, range(4 * PATTERNS[0]))
    indices = {name: [index for n, index in result if n == name] for name in "ab"}
    assert indices["a"] == list(range(len(indices["a"])))
    assert indices["b"] == list(range(len(indices["b"])))
    limit = max(1, round(epochs * size))
    assert len(indices["a"]) <= limit
    used_up = [place for place, (name, index) in enumerate(result) if name == "a" and index == limit - 1]
    end = used_up[0] if used_up else len(result)
    before = [name for name, _ in result[: min(final_from, end)]]
    assert abs(before.count("a") - share * len(before)) <= 2
    after = [name for name, _ in result[final_from:end]]
    if len(after) > 1:
        assert abs(after.count("a") - 0.5 * len(after)) <= 2


class Long(Numbers):
    """Documents of `length` positions."""

    def __init__(self, name: str, length: int) -> None:
        super().__init__(name, None)
        self.length = length

    def lengths(self, indices, samples, grammar):
        return np.full(len(indices), self.length)


@pytest.mark.parametrize(
    ("share", "text", "picture"), [(0.01, 502, 30), (0.02, 502, 30), (0.98, 12, 1040), (0.5, 12, 66)]
)
def test_small_shares_are_right(share: float, text: int, picture: int, grammar) -> None:
    """Shares of positions are right to a fiftieth: one document in a thousand is not rounded to none, or to two."""
    mixture = Mixture(
        [MixtureComponent(Long("text", text), share), MixtureComponent(Long("pictures", picture), 1 - share)], grammar
    )
    counts = mixture.phases[0].per_pattern * [text, picture]
    for result, expected in zip(counts / counts.sum(), (share, 1 - share), strict=True):
        assert result == pytest.approx(expected, rel=0.025)


@pytest.fixture(scope="module")
def heavy(folder: Path, tmp_path_factory) -> Path:
    """Text and pairs, a few of which hold most of the words; and stories whose drawn images lose long texts."""
    root = tmp_path_factory.mktemp("heavy")
    draws = np.random.default_rng(1)
    lines = [f"{i} " + "word " * int(count) for i, count in enumerate(draws.pareto(0.9, 3000).clip(0, 400))]
    (root / "words.txt").write_text("\n".join(lines))
    config = BuildConfig(size=8, tokenizer=str(folder / "pairs"), heldout=0.1, columns=Columns(split="line"))
    build_set(str(root / "words.txt"), root / "text", config, workers=0)
    __import__("PIL.Image", fromlist=["Image"]).new("RGB", (8, 8)).save(root / "a.png")
    pairs = [{"image": "a.png", "text": line} for line in lines[:900]]
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    stories = [{"parts": [{"text": line}, {"image": "a.png"}, {"text": f"{i}"}]} for i, line in enumerate(lines[:900])]
    (root / "stories.jsonl").write_text("\n".join(map(json.dumps, stories)))
    for name in ("pairs", "stories"):
        build_set(str(root / f"{name}.jsonl"), root / name, replace(config, columns=Columns()), workers=0)
    return root


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_shares_of_heavy_tailed_documents_are_right(heavy: Path, folder: Path, share: float) -> None:
    """Over a pass of the text, in the stream; and for pictures with such captions, by what passes of them hold."""
    text = StoredTexts(DataSet(str(heavy / "text")), 3)
    grammar = DataSet(str(heavy / "text")).tokenizer().sequence_format(4)
    mixture = Mixture([MixtureComponent(pictures(folder / "pairs"), 1 - share), MixtureComponent(text, share)], grammar)
    (phase,) = mixture.phases
    count = phase.reaches(1, text.epoch)
    lengths = mixture.lengths(range(int(count)), grammar)
    from_text = np.array([phase.place(sample)[0] == 1 for sample in range(int(count))])
    assert from_text.sum() == text.epoch
    assert lengths[from_text].sum() / lengths.sum() == pytest.approx(share, abs=0.005)
    for name in ("pairs", "stories"):
        source = pictures(heavy / name)
        (phase,) = Mixture([MixtureComponent(source, 1 - share), MixtureComponent(text, share)], grammar).phases
        samples = np.arange(20 * source.epoch)
        held = phase.per_pattern * [source.lengths(samples, samples, grammar).mean(), text.mean_length(grammar)]
        assert held[1] / held.sum() == pytest.approx(share, abs=0.005)


def test_the_mean_length_of_a_source_is_that_of_a_pass(heavy: Path, folder: Path, tokenizer: Tokenizer) -> None:
    grammar = DataSet(str(heavy / "text")).tokenizer().sequence_format(4)
    texts = Texts([f"word {'long ' * (200 if i % 50 == 0 else 1)}" for i in range(1000)], tokenizer, 0)
    for source in (StoredTexts(DataSet(str(heavy / "text")), 0), texts):
        lengths = source.lengths(np.arange(source.epoch), np.arange(source.epoch), grammar)
        assert source.mean_length(grammar) == pytest.approx(lengths.mean(), rel=1e-12)
    for path in (heavy / "pairs", heavy / "stories", folder / "orders", folder / "stories"):
        images = pictures(path, caption_drop=0.3)
        indices = np.arange(60 * images.epoch)
        result = images.lengths(indices, indices, grammar).mean()
        assert images.mean_length(grammar) == pytest.approx(result, rel=0.015)


@pytest.mark.parametrize("epochs", [1.0, 2.5])
def test_steps_that_sets_suffice_for_are_counted_from_all_their_lengths(heavy: Path, epochs: float) -> None:
    """Packed into rows: nine tenths of what the epochs hold are allowed, eleven tenths are refused."""
    base = recipe_of(heavy, f"text,epochs={epochs}", max_seq_len=600, images="none")
    data = DataSet(str(heavy / "text"))
    source, tokenizer = StoredTexts(data, base.seed), data.tokenizer()
    grammar = base.model.sequence_format(tokenizer)
    total = epochs * source.epoch * source.mean_length(grammar)
    opened = open_sources(base.data)
    for parts, fits in ((0.9, True), (1.1, False)):
        recipe = replace(
            base,
            data=replace(base.data, row_length=512, batch_size=1),
            loop=replace(base.loop, steps=round(parts * total / 512)),
        )
        if fits:
            mixture(recipe, opened, tokenizer, grammar, None)
        else:
            with pytest.raises(UserError, match=r"expected enough for loop\.steps"):
                mixture(recipe, opened, tokenizer, grammar, None)


def test_a_share_too_small_to_keep_is_refused(grammar) -> None:
    with pytest.raises(UserError, match=r"at least one of 100,000 samples, found one that is 1e-06"):
        Mixture([MixtureComponent(Numbers("a", None), 1e-6), MixtureComponent(Numbers("b", None), 1)], None)


@pytest.mark.parametrize("epochs", [None, 1.0, 2.5])
def test_a_model_without_pictures_reads_the_same_texts(epochs: float | None) -> None:
    """Also where the pictures would be used up."""
    texts = MixtureComponent(Numbers("text", None), 0.5)
    whole = Mixture([MixtureComponent(Numbers("pictures", 100), 0.5, epochs), texts], None)
    alone = Mixture([MixtureComponent(None, 0.5, epochs, epoch=100), texts], None)
    for sample in range(1000):
        item, other = whole.document(sample), alone.document(sample)
        assert other is None if item.source == "pictures" else other == item
    with pytest.raises(UserError, match="pictures: expected no epochs, for it never ends"):
        Mixture([MixtureComponent(None, 0.5, 1.0), texts], None)


def test_used_up() -> None:
    mixture = Mixture([MixtureComponent(Numbers("a", 10), 1, 2), MixtureComponent(Numbers("b", 5), 1, 3)], None)
    assert mixture.end == 35
    assert sorted(drawn(mixture, range(35))) == sorted([("a", i) for i in range(20)] + [("b", i) for i in range(15)])
    with pytest.raises(
        UserError, match=r"data\.sources: expected one that does not end, found all used up after 35 samples"
    ):
        mixture.document(35)
    with pytest.raises(UserError, match="never ends"):
        Mixture([MixtureComponent(Numbers("world", None), 1, 2)], None)


# --- what a recipe asks of its sets -----------------------------------------------------------------------------------


def recipe_of(folder: Path, *names: str, **model) -> Recipe:
    base = preset("tiny")
    data = replace(base.data, sources=tuple(str(folder / name) for name in names), row_length=None)
    return replace(base, data=data, model=replace(base.model, patch_size=4, **model))


def test_documents_longer_than_a_sequence_may_be_are_refused(folder: Path) -> None:
    """Pictures count: the words of these stories are few."""
    resolve(recipe_of(folder, "stories", "text", max_seq_len=600))
    with pytest.raises(UserError, match=r"stories: expected documents of at most 40 positions.*found one of \d\d"):
        resolve(recipe_of(folder, "stories", "text", max_seq_len=40))


def test_pictures_with_more_patches_than_have_positions_are_refused(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr("transfuse.model.config.MAX_GRID", 3)
    resolve(recipe_of(folder, "stories", "text", patch_positions="none"))
    with pytest.raises(UserError, match=r"stories: expected pictures of at most 12 pixels a side .*found one of \d\d"):
        resolve(recipe_of(folder, "stories", "text", patch_positions="learned"))


def test_a_damaged_document_that_is_held_out_does_not_stop_a_run(folder: Path, tmp_path: Path) -> None:
    """Captions to draw, and the card of an export, come from the others."""
    shutil.copytree(folder / "pairs", tmp_path / "pairs")
    recipe = recipe_of(tmp_path, "pairs")
    sources = open_sources(recipe.data)
    whole = sources.held_out_prompts(4)
    flip(tmp_path / "pairs", 0, "heldout")
    assert sources.held_out_prompts(3) == whole[1:]


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> Path:
    """A copy of the sets in which the first document that training meets of the pairs has one byte flipped."""

    for name in ("pairs", "text", "stories"):
        shutil.copytree(folder / name, tmp_path / name)
    flip(tmp_path / "pairs", 0)
    return tmp_path


def flip(path: Path, index: int, split: Split = "train") -> None:
    """Flip a byte of document `index` of a part."""
    data = DataSet(str(path))
    number = data.number(split, index)
    row = data.documents[number]
    shard = path / data.shard(number)
    content = bytearray(shard.read_bytes())
    content[int(row["offset"]) + 512 + 40] ^= 1  # in the image, after its header
    shard.write_bytes(content)


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_is_left_out_named_and_counted_once(damaged: Path, tmp_path: Path, folder: Path, workers: int) -> None:
    log = CorruptLog(tmp_path, {str(damaged / "pairs"): COUNT}, 0.0)
    load = loader(damaged, workers=workers, on_corrupt=log.add)
    result, whole = order([load], range(300)), order([loader(folder)], range(300))
    missing = [set(b) - set(a) for a, b in zip(result, whole, strict=True)]
    assert {len(several) for several in missing} == {0, 1}, "nothing else moved"
    assert sum(map(len, missing)) >= 2, "met in every epoch"
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [set(line) for line in lines] == [{"source", "shard", "key", "reason"}], "and named once"
    assert lines[0]["source"] == str(damaged / "pairs")
    again = CorruptLog(tmp_path, {}, 0.0)
    assert len(again.known) == 1, "a restart remembers"


def test_ranks_stay_in_step_beside_damage(damaged: Path) -> None:
    alone = order([loader(damaged)], range(30))
    assert order([loader(damaged, rank=rank, ranks=3) for rank in range(3)], range(30)) == alone
    packed = order([loader(damaged, 128)], range(30))
    assert order([loader(damaged, 128, rank=rank, ranks=3) for rank in range(3)], range(30)) == packed


def test_too_much_damage_stops(damaged: Path, tmp_path: Path) -> None:
    for index in range(1, 30):
        flip(damaged / "pairs", index)
    log = CorruptLog(tmp_path, {str(damaged / "pairs"): COUNT}, 0.01)
    load = loader(damaged, on_corrupt=log.add)
    with pytest.raises(UserError, match=r"pairs: 11 damaged documents, more than data\.max_errors 0\.01 lets pass"):
        order([load], range(200))


def test_a_shard_that_is_gone(damaged: Path) -> None:
    """A missing shard does not count as damaged documents, or a run would go without all of them."""
    (damaged / "pairs" / "shards" / "shard-00001.tar").unlink()
    faults: list = []
    with pytest.raises(UserError, match=r"shard-00001\.tar: expected a whole data set, found no such file"):
        order([loader(damaged, on_corrupt=faults.extend)], range(60))


def test_a_pickled_set_and_tokenizer_are_themselves(folder: Path) -> None:
    """Processes that are not forked receive such copies; the end of one does not close the original's files."""
    import pickle

    data = DataSet(str(folder / "pairs"))
    first = data.read(0)
    copy = pickle.loads(pickle.dumps(data))
    manifest = (folder / "pairs" / "manifest.json").stat().st_size
    assert len(pickle.dumps(data)) < manifest + 1000, "the index is mapped again, not sent"
    assert copy.read(0) == first
    del copy
    assert data.read(0) == first
    tokenizer = pickle.loads(pickle.dumps(data.tokenizer()))
    assert tokenizer.eos not in tokenizer.encode("a crab<|eos|>"), "typed, a marker is plain text"
