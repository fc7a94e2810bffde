"""Sources and their mixture: functions of the index; shares in tokens; order, cap and drop of captions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from transfuse.autoencoders import Pixels
from transfuse.data import Ingredient, Mixture, PairConfig, ScenePairs, StepLoader, Texts, pair_document
from transfuse.data.world import World, WorldConfig
from transfuse.sequence import Document, Image, Text, Tokenizer, lay_out

COUNT = 2000


def kinds(config: PairConfig) -> dict[str, float]:
    latent = torch.zeros(3, 2, 2)
    found = {"drawn": 0, "dropped": 0, "captioned": 0}
    for sample in range(COUNT):
        document = pair_document((9, 8), latent, config, seed=0, sample=sample)
        assert document.sample == sample
        first = document.parts[0]
        if isinstance(first, Text):
            found["drawn"] += 1
            assert document.images[0].max_timestep is None
            assert document.predict
        elif len(document.parts) == 1:
            found["dropped"] += 1
            assert document.images[0].max_timestep is None
            assert not document.predict, "a dropped sample learns no token"
        else:
            found["captioned"] += 1
            assert document.images[0].max_timestep == config.image_first_max_timestep
            assert document.predict, "captioning samples are never dropped"
    return {name: count / COUNT for name, count in found.items()}


def test_latents_do_not_depend_on_the_order_they_are_asked_for(tokenizer) -> None:
    from transfuse.autoencoders import AutoencoderConfig, ImageAutoencoder

    config = AutoencoderConfig(widths=(8, 16), blocks=1, groups=4, latent_channels=4)
    autoencoder = ImageAutoencoder(config).initialise(0)
    world = World(WorldConfig(size=16))

    def latents(order):
        source = ScenePairs(world, tokenizer, autoencoder, PairConfig(), 0)
        found = {index: source._latent(index) for index in order}
        return [found[index] for index in sorted(found)]

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


def ingredients(sources, shares) -> list[Ingredient]:
    return [Ingredient(source, share) for source, share in zip(sources, shares, strict=True)]


@pytest.fixture(scope="module")
def sources(tokenizer: Tokenizer):
    world = World(WorldConfig(size=16, nouns=4, max_objects=1))
    texts = [f"word {i}: " + "meaning " * (i % 7) for i in range(50)]
    return [ScenePairs(world, tokenizer, Pixels(), PairConfig(), 0), Texts(texts, tokenizer, 0)]


@pytest.mark.parametrize("share", [0.0, 0.15, 0.5])
def test_mixture_is_in_tokens_and_even(sources, tokenizer: Tokenizer, share: float) -> None:
    grammar = tokenizer.grammar(8)
    mixture = Mixture(ingredients(sources, [1 - share, share]), grammar)
    tokens = {True: 0, False: 0}
    for sample in range(COUNT):
        document = mixture.document(sample)
        assert document.sample == sample
        tokens[bool(document.images)] += len(lay_out(document, grammar))
    assert tokens[False] / sum(tokens.values()) == pytest.approx(share, abs=0.03)
    pattern = mixture.phases[0].pattern
    assert all(abs(pattern[:n].mean() - pattern.mean()) < 2 / n for n in (50, 200, 1000))


def test_every_document_of_a_source_comes_once_per_epoch(sources, tokenizer: Tokenizer) -> None:
    mixture = Mixture(ingredients(sources, [0.5, 0.5]), tokenizer.grammar(8))
    seen = []
    for sample in range(3000):
        document = mixture.document(sample)
        if not document.images:
            seen.append(document.parts[0].ids)
    for epoch in range(len(seen) // 50):
        assert len(set(seen[epoch * 50 : epoch * 50 + 50])) == 50
    assert seen[:50] != seen[50:100], "each epoch has its own order"


def test_batches_are_functions_of_the_step(sources, tokenizer: Tokenizer) -> None:
    grammar = tokenizer.grammar(8)
    mixture = Mixture(ingredients(sources, [0.5, 0.5]), grammar)
    forwards, backwards = (StepLoader(mixture.document, grammar, 6, 2) for _ in range(2))
    ahead = [forwards(step) for step in range(4)]
    for step in reversed(range(4)):
        for a, b in zip(ahead[step], backwards(step), strict=True):
            assert torch.equal(a.tokens, b.tokens)
            assert a.keys == b.keys
            assert all(torch.equal(x, y) for x, y in zip(a.latents, b.latents, strict=True))
    assert [s for batches in ahead for batch in batches for s in batch.samples] == list(range(24))


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
    with pytest.raises(ValueError, match=r"data\.pairs\.caption_drop: expected a share from 0 to 1, found 2"):
        PairConfig(caption_drop=2)
    with pytest.raises(ValueError, match="batch_size: expected a multiple of accumulate"):
        StepLoader(lambda i: Document([]), None, 5, 2)  # type: ignore[arg-type]
    assert Image(torch.zeros(3, 2, 2)).target
