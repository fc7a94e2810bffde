"""Sources and their mixture: functions of the index; shares in tokens; order, cap and drop of captions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import latent, randomised, tiny
from hypothesis import given
from hypothesis import strategies as st

from emoji_scenes import World, WorldConfig, edit
from transfuse.autoencoders import AutoencoderConfig, DeferredEncoder, ImageAutoencoder, Pixels
from transfuse.data import (
    EditConfig,
    Mixture,
    MixtureComponent,
    PairConfig,
    SceneEdits,
    ScenePairs,
    StepLoader,
    Texts,
    interleaved_document,
    pair_document,
)
from transfuse.diffusion import DiffusionConfig, Process
from transfuse.model.costs import train_flops
from transfuse.sequence import (
    Document,
    Image,
    Part,
    Text,
    Tokenizer,
    images_alone,
    layout_document,
    unconditional,
)
from transfuse.training import ObjectiveConfig, TransfusionObjective

COUNT = 2000


def kinds(config: PairConfig) -> dict[str, float]:
    image = Image(torch.zeros(3, 2, 2))
    by_name = {"drawn": 0, "dropped": 0, "captioned": 0}
    for sample in range(COUNT):
        document = pair_document((9, 8), image, config, seed=0, sample=sample)
        assert document.sample == sample
        first = document.parts[0]
        if isinstance(first, Text):
            by_name["drawn"] += 1
            assert document.images[0].max_timestep is None
            assert document.predict
        elif len(document.parts) == 1:
            by_name["dropped"] += 1
            assert document.images[0].max_timestep is None
            assert not document.predict, "a dropped sample learns no token"
        else:
            by_name["captioned"] += 1
            assert document.images[0].max_timestep == config.image_first_max_timestep
            assert document.predict, "captioning samples are never dropped"
    return {name: count / COUNT for name, count in by_name.items()}


def test_latents_do_not_depend_on_the_order_they_are_asked_for(tokenizer) -> None:

    config = AutoencoderConfig(widths=(8, 16), blocks=1, groups=4, latent_channels=4)
    autoencoder = ImageAutoencoder(config).initialise(0)
    world = World(WorldConfig(size=16))

    def latents(order):
        source = ScenePairs(world, tokenizer, autoencoder, PairConfig(), 0)
        by_name = {index: source.image(index).latent for index in order}
        return [by_name[index] for index in sorted(by_name)]

    forwards, backwards = latents([0, 1, 31, 32, 70]), latents([70, 0, 32, 31, 1])
    assert all((a == b).all() for a, b in zip(forwards, backwards, strict=True))
    alone = autoencoder.encode(world.render(world.scene(31))[None])[0]
    torch.testing.assert_close(forwards[2], alone, atol=1e-5, rtol=1e-5)


def test_shares_of_order_and_drop() -> None:
    shares = kinds(PairConfig())
    assert shares["captioned"] == pytest.approx(0.2, abs=0.03)
    assert shares["dropped"] == pytest.approx(0.08, abs=0.02)
    assert kinds(PairConfig(caption_drop=0))["dropped"] == 0
    assert kinds(PairConfig(caption_first=0, caption_drop=1))["captioned"] == 1
    assert kinds(PairConfig(image_first_max_timestep=None))["captioned"] > 0
    shown_clean = PairConfig(caption_first=0, image_first_max_timestep=0)
    clean = pair_document((9, 8), Image(torch.zeros(3, 2, 2)), shown_clean, 0, 1)
    assert [image.target for image in clean.images] == [False], "shown as a sampler shows it"
    with pytest.raises(ValueError, match="image_first_max_timestep: expected at least 0, found -1"):
        PairConfig(image_first_max_timestep=-1)


T, A, B, U = Text((9, 8)), Image(torch.zeros(3, 2, 2)), Image(torch.ones(3, 2, 2)), Text((7,))
EMPTY = Text(())
KEPT = PairConfig(caption_drop=0)
CLEAN = PairConfig(caption_drop=0, image_first_max_timestep=0)


@pytest.mark.parametrize(
    ("parts", "caps"),
    [
        ([T, A], [None]),
        ([A, T], [500]),
        ([T, A, U], [None]),
        ([A, T, B], [500, None]),
        ([A, B, T], [500, 500]),
        ([A, B, T, A], [500, 500, None]),
        ([T, A, U, B, U], [None, None]),
        ([T, A, B], [None, None]),
        ([A], [None]),
        ([A, B], [None, None]),
        ([EMPTY, A, T], [500]),
        ([A, EMPTY], [None]),
    ],
)
def test_only_images_before_all_text_are_capped(parts: list[Part], caps: list[int | None]) -> None:
    """Paper 4.3.4: an image before its caption. With a limit of 0 it is context; a drawn one is learned as ever."""
    document = interleaved_document(parts, KEPT, 0, 5)
    assert [type(part) for part in document.parts] == [type(part) for part in parts]
    assert [image.max_timestep for image in document.images] == caps
    assert all(image.target for image in document.images)
    assert (document.sample, document.predict) == (5, True)
    clean = interleaved_document(parts, CLEAN, 0, 5)
    assert [image.target for image in clean.images] == [cap is None for cap in caps]
    assert not any(image.max_timestep for image in clean.images)


@given(st.lists(st.sampled_from([T, A, U, B, EMPTY]), min_size=1, max_size=9), st.integers(0, 99), st.integers(0, 1000))
def test_documents_lose_the_text_of_drawn_images_alone(parts: list[Part], seed: int, sample: int) -> None:
    """A dropped document is the sampler's null branch: its last image, no text, nothing learned but the noise."""
    whole = interleaved_document(parts, KEPT, seed, sample)
    dropped = interleaved_document(parts, PairConfig(caption_drop=1), seed, sample)
    wanted = False
    for part, shown in zip(parts, whole.parts, strict=True):
        if isinstance(part, Image):
            text_follows = any(isinstance(other, Text) and other.ids for other in parts)
            assert shown.max_timestep == (None if wanted or not text_follows else 500)
        wanted = wanted or (isinstance(part, Text) and bool(part.ids))
    last = max((place for place, part in enumerate(parts) if isinstance(part, Image)), default=0)
    if whole.images and any(isinstance(part, Text) and part.ids for part in parts[:last]):
        assert (dropped.parts, dropped.predict) == (unconditional(whole).parts, False)
        assert dropped.images[0].latent is whole.images[-1].latent
        assert dropped.images[0].max_timestep is None
    else:
        assert len(dropped.parts) == len(whole.parts)
        assert dropped.predict


@pytest.mark.parametrize("rate", [0.1, 0.35])
def test_documents_lose_their_text_at_the_rate_of_pairs(rate: float) -> None:
    config = PairConfig(caption_drop=rate)
    for parts, expected in (([T, A, U], rate), ([A, T, B], rate), ([A, T], 0)):
        dropped = [not interleaved_document(parts, config, 3, sample).predict for sample in range(COUNT)]
        assert np.mean(dropped) == pytest.approx(expected, abs=0.03)


def of_kind(source: SceneEdits, config: EditConfig) -> dict[str, int]:
    """Count the documents that show all, the first image alone, or nothing before the target."""
    by_name = {"all": 0, "images": 0, "nothing": 0}
    for sample in range(COUNT):
        parts = source.document(3, sample).parts
        by_name["all" if len(parts) == 3 else "images" if len(parts) == 2 else "nothing"] += 1
    return by_name


def test_an_edit_is_a_clean_picture_an_instruction_and_the_target(tokenizer: Tokenizer) -> None:
    world = World(WorldConfig(size=16, nouns=8))
    source = SceneEdits(world, tokenizer, Pixels(), EditConfig(0, 0), seed=0)
    document = source.document(7, 40)
    change = edit(world.scene(7), world, 7)
    before, words, after = document.parts
    assert isinstance(before, Image)
    assert isinstance(words, Text)
    assert isinstance(after, Image)
    assert (before.target, before.max_timestep) == (False, None), "shown, clean, and not learned"
    assert (after.target, words.predict, document.sample) == (True, False, 40)
    assert tokenizer.decode(words.ids) == change.instruction
    for part, scene in ((before, change.source), (after, change.target)):
        assert torch.equal(part.latent, Pixels().encode(world.render(scene)[None])[0])


def test_dropped_edits_show_what_guidance_shows(tokenizer: Tokenizer) -> None:
    """The middle branch's prefix is that of a document whose instruction was dropped: the sampler opens it likewise."""
    world = World(WorldConfig(size=16, nouns=8))
    result = of_kind(SceneEdits(world, tokenizer, Pixels(), EditConfig(0.2, 0.1), seed=0), EditConfig(0.2, 0.1))
    assert result["images"] / COUNT == pytest.approx(0.2, abs=0.03)
    assert result["nothing"] / COUNT == pytest.approx(0.1, abs=0.03)
    whole = SceneEdits(world, tokenizer, Pixels(), EditConfig(0, 0), 0).document(3, 9)
    middle = SceneEdits(world, tokenizer, Pixels(), EditConfig(1, 0), 0).document(3, 9)
    nothing = SceneEdits(world, tokenizer, Pixels(), EditConfig(0, 1), 0).document(3, 9)
    grammar = tokenizer.sequence_format(8)
    for dropped, expected in ((middle, images_alone(whole)), (nothing, unconditional(whole))):
        assert (
            layout_document(dropped, grammar).input_ids.tolist()
            == layout_document(expected, grammar).input_ids.tolist()
        )
        assert not layout_document(dropped, grammar).loss_mask.any()
    opened = layout_document(Document([whole.images[0]], closed=False), grammar).input_ids.tolist()
    assert layout_document(middle, grammar).input_ids.tolist()[: len(opened) + 1] == [*opened, grammar.boi]
    with pytest.raises(ValueError, match="found text only"):
        images_alone(Document([Text((5,))]))


@pytest.mark.parametrize("count", [None, 5])
def test_edits_by_number(tokenizer: Tokenizer, count: int | None) -> None:
    """A latent does not depend on what was asked for before; lengths are the documents'; a count comes again."""
    world, grammar = World(WorldConfig(size=16, nouns=8)), tokenizer.sequence_format(8)
    config = EditConfig(0.3, 0.3, count)
    forwards, backwards = (SceneEdits(world, tokenizer, Pixels(), config, 0) for _ in range(2))
    numbers = list(range(40))
    ahead = [forwards.document(n, n + 100) for n in numbers]
    for n in reversed(numbers):
        again = backwards.document(n, n + 100)
        assert all(torch.equal(a.latent, b.latent) for a, b in zip(ahead[n].images, again.images, strict=True))
    expected = [len(layout_document(document, grammar)) for document in ahead]
    assert forwards.lengths(np.array(numbers), np.array(numbers) + 100, grammar).tolist() == expected
    same = torch.equal(forwards.document(2, 0).images[-1].latent, forwards.document(7, 0).images[-1].latent)
    assert same is (count == 5)


def components(sources, shares) -> list[MixtureComponent]:
    return [MixtureComponent(source, share) for source, share in zip(sources, shares, strict=True)]


@pytest.fixture(scope="module")
def sources(tokenizer: Tokenizer):
    world = World(WorldConfig(size=16, nouns=4, max_objects=1))
    texts = [f"word {i}: " + "meaning " * (i % 7) for i in range(50)]
    return [ScenePairs(world, tokenizer, Pixels(), PairConfig(), 0), Texts(texts, tokenizer, 0)]


@pytest.mark.parametrize("share", [0.0, 0.15, 0.5])
def test_mixture_is_in_tokens_and_even(sources, tokenizer: Tokenizer, share: float) -> None:
    grammar = tokenizer.sequence_format(8)
    mixture = Mixture(components(sources, [1 - share, share]), grammar)
    tokens = {True: 0, False: 0}
    for sample in range(COUNT):
        document = mixture.document(sample)
        assert document.sample == sample
        tokens[bool(document.images)] += len(layout_document(document, grammar))
    assert tokens[False] / sum(tokens.values()) == pytest.approx(share, abs=0.03)
    pattern = mixture.phases[0].pattern
    assert all(abs(pattern[:n].mean() - pattern.mean()) < 2 / n for n in (50, 200, 1000))


def test_every_document_of_a_source_comes_once_per_epoch(sources, tokenizer: Tokenizer) -> None:
    mixture = Mixture(components(sources, [0.5, 0.5]), tokenizer.sequence_format(8))
    seen = []
    for sample in range(3000):
        document = mixture.document(sample)
        if not document.images:
            seen.append(document.parts[0].ids)
    for epoch in range(len(seen) // 50):
        assert len(set(seen[epoch * 50 : epoch * 50 + 50])) == 50
    assert seen[:50] != seen[50:100], "each epoch has its own order"


def test_batches_are_functions_of_the_step(sources, tokenizer: Tokenizer) -> None:
    grammar = tokenizer.sequence_format(8)
    mixture = Mixture(components(sources, [0.5, 0.5]), grammar)
    forwards, backwards = (StepLoader(mixture.document, grammar, 6, 2) for _ in range(2))
    ahead = [forwards(step) for step in range(4)]
    for step in reversed(range(4)):
        for a, b in zip(ahead[step], backwards(step), strict=True):
            assert torch.equal(a.input_ids, b.input_ids)
            assert a.noise_ids == b.noise_ids
            assert all(torch.equal(x, y) for x, y in zip(a.latents, b.latents, strict=True))
    assert [s for batches in ahead for batch in batches for s in batch.samples] == list(range(24))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_a_step_counts_the_same_however_it_is_split(accumulate, ranks, sharded, grammar, mixed) -> None:
    """Positions, targets, images and operations, of whole samples and of samples that are left out."""
    config, left_out = tiny(), {3, 5, 7}

    def document(sample: int) -> Document | None:
        return None if sample in left_out else replace(mixed[sample % len(mixed)], sample=sample, source="mixed")

    def counted(accumulate: int, ranks: int, idle: torch.Tensor | None) -> dict[str, int]:
        totals: dict[str, int] = {}
        for rank in range(ranks):
            for batch in StepLoader(document, grammar, 8, accumulate, rank=rank, ranks=ranks, padding_image=idle)(0):
                for name, count in {**batch.quantities, "flops": train_flops(config, batch)}.items():
                    totals[name] = totals.get(name, 0) + count
        return totals

    expected = counted(1, 1, None)
    assert expected["positions"] == sum(
        len(layout_document(d, grammar)) for d in map(document, range(8)) if d is not None
    )
    assert counted(accumulate, ranks, latent(8, 8) if sharded else None) == expected


def test_pixels_round_trip() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 12, 3), dtype=np.uint8)
    latents = Pixels().encode(images)
    assert latents.shape == (3, 3, 8, 12)
    assert latents.abs().max() <= 1
    assert (Pixels().decode(latents) == images).all()
    assert (Pixels().decode(latents * 9) <= 255).all()
    with pytest.raises(ValueError, match="expected uint8"):
        Pixels().encode(images.astype(np.float32))


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match=r"data\.edits\.all_drop: expected at most 1 together .* found 1\.5"):
        EditConfig(0.5, 1.0)
    with pytest.raises(ValueError, match=r"data\.pairs\.caption_drop: expected a share from 0 to 1, found 2"):
        PairConfig(caption_drop=2)
    with pytest.raises(ValueError, match="batch_size: expected a multiple of accumulate"):
        StepLoader(lambda i: Document([]), None, 5, 2)  # type: ignore[arg-type]
    assert Image(torch.zeros(3, 2, 2)).target


@pytest.mark.parametrize(
    ("workers", "clean_copy"),
    [(0, False), (0, True), *(pytest.param(2, each, marks=pytest.mark.long) for each in (False, True))],
)
def test_encoded_later_and_drawn_ahead_is_the_same_step(tokenizer, workers: int, clean_copy: bool) -> None:
    """Pictures that come as pixels, with timesteps and noise from the loader, cost what encoded ones do."""
    config = AutoencoderConfig(widths=(8, 16), blocks=1, groups=4, latent_channels=3)
    autoencoder = ImageAutoencoder(config).initialise(0)
    goal = TransfusionObjective(ObjectiveConfig(), Process(DiffusionConfig()), 0, autoencoder)
    model, world = randomised(tiny()), World(WorldConfig(size=16))
    values = []
    for encoder in (autoencoder, DeferredEncoder(autoencoder)):
        later = isinstance(encoder, DeferredEncoder)
        sources = [
            ScenePairs(world, tokenizer, encoder, PairConfig(), 0),
            SceneEdits(world, tokenizer, encoder, EditConfig(), 0),
        ]
        stream = Mixture([MixtureComponent(source, 1.0) for source in sources], None)
        grammar = replace(tokenizer.sequence_format(patch_size=2), clean_copy=clean_copy)
        settings = {"workers": workers, "finish": goal.sample_noise} if later else {}
        (batch,) = StepLoader(stream.document, grammar, 12, **settings)(1)
        assert len(batch.pixels) == later * (len(batch.latents) - len(batch.copies))
        assert bool(len(batch.noise)) == later
        assert bool(batch.copies) == clean_copy
        assert all(latent.is_meta == later for latent in batch.latents)
        assert batch.to("cpu").quantities == batch.quantities
        sums = goal.loss(model, batch.to("cpu"))
        sums.losses.sum().backward()
        values.append((sums.losses.detach(), model.embedding.weight.grad.clone()))
        model.zero_grad()
    for ahead, later in zip(*values, strict=True):
        torch.testing.assert_close(later, ahead, atol=1e-5, rtol=1e-5)


def test_pixels_without_an_encoder_are_refused(tokenizer) -> None:
    config = AutoencoderConfig(widths=(8, 16), blocks=1, groups=4, latent_channels=3)
    later = DeferredEncoder(ImageAutoencoder(config).initialise(0))
    source = ScenePairs(World(WorldConfig(size=16)), tokenizer, later, PairConfig(), 0)
    (batch,) = StepLoader(lambda i: source.document(i, i), tokenizer.sequence_format(patch_size=2), 2)(0)
    goal = TransfusionObjective(ObjectiveConfig(), Process(DiffusionConfig()), 0)
    with pytest.raises(ValueError, match="autoencoder: expected one, because images arrive as pixels"):
        goal.loss(randomised(tiny()), batch)
