"""`data.context clean-copy`: an image that is learned and read stands clean in its place, and noised at the end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import exported, latent, open_tiny, randomised, tensors, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from transfuse.autoencoders import Pixels
from transfuse.data import DataSet, EditConfig, PairConfig, SceneEdits, ScenePairs, StoredImages
from transfuse.data.building import build_set
from transfuse.data.building.prepare import BuildConfig
from transfuse.data.bundled import World, WorldConfig
from transfuse.data.sources import mean_length
from transfuse.diffusion import DiffusionConfig, Process, Sampler, SamplerConfig
from transfuse.errors import UserError
from transfuse.inference import Engine, ImageEnd, Request
from transfuse.inspect_data import Limits, inspect_sources
from transfuse.model import Grouped, ModelConfig, dense
from transfuse.model.costs import forward_flops, train_flops
from transfuse.plan import plan
from transfuse.recipes import Recipe, preset
from transfuse.rng import generator_for
from transfuse.runs import resolve, unseen_noise
from transfuse.sequence import (
    Batch,
    Document,
    Image,
    SequenceFormat,
    Text,
    Tokenizer,
    collate,
    concatenate,
    gaps,
    layout_document,
    unconditional,
    visible,
)
from transfuse.train import build_trainer, train
from transfuse.training import ObjectiveConfig, TransfusionObjective
from transfuse.training.metrics import Average

FORMAT = SequenceFormat(bos=0, eos=1, boi=2, eoi=3, patch_size=2, clean_copy=True)
PLAIN = replace(FORMAT, clean_copy=False)
SIDES = st.sampled_from([2, 4, 6])
PARTS = st.one_of(
    st.builds(Text, st.lists(st.integers(4, 50), max_size=6).map(tuple), st.booleans()),
    st.builds(lambda rows, columns, target: Image(latent(rows, columns), target), SIDES, SIDES, st.booleans()),
)
DOCUMENTS = st.lists(st.builds(Document, st.lists(PARTS, max_size=5), st.integers(0, 99), st.booleans()), max_size=4)


def story(number: int = 0, *, target: bool = True) -> Document:
    """Text, an image that is read, text, an image that is read by an image, and one that nothing follows."""
    images = [Image(latent(4, 4, number), target), Image(latent(2, 6, number + 1), target), Image(latent(4, 2, 7))]
    return Document([Text((10, 11)), images[0], Text((12 + number,)), images[1], images[2]], sample=number)


DOCUMENTS_OF_EVERY_KIND = [
    story(3),
    Document([Text((9,) * 30), Image(latent(4, 4, 1))], sample=4),
    Document([Image(latent(4, 4, 2)), Text((20, 21, 22))], sample=5),
    Document([Text((30,))], sample=6),
    Document([Image(latent(4, 6, 3), target=False), Text((31,)), Image(latent(4, 6, 4)), Text(())], sample=7),
]


def test_the_docstring_example() -> None:
    layout = layout_document(Document([Text((10, 11)), Image(latent(4, 4)), Text((12, 13))]), FORMAT)
    assert layout.input_ids.tolist() == [0, 10, 11, 2, 0, 0, 0, 0, 3, 12, 13, 1, 0, 0, 0, 0]
    assert layout.position_ids.tolist() == [*range(12), 4, 5, 6, 7]
    assert layout.image.tolist() == [-1] * 4 + [0] * 4 + [-1] * 4 + [1] * 4
    assert np.flatnonzero(layout.loss_mask).tolist() == [0, 1, 2, 8, 9, 10]
    (start, end), (first, last) = visible(layout), gaps(layout)
    assert start.tolist() == [0] * 16
    assert end.tolist() == [1, 2, 3, 4, 8, 8, 8, 8, 9, 10, 11, 12, 16, 16, 16, 16]
    assert (first[12:].tolist(), last[12:].tolist()) == ([4] * 4, [12] * 4)
    assert (first[:12] == last[:12]).all()
    clean, noised = layout.spans
    assert (clean.image.target, noised.image.target, noised.copy_of) == (False, True, 0)


@settings(deadline=None, max_examples=60)
@given(DOCUMENTS.filter(bool), st.sampled_from(["bidirectional", "causal"]))
def test_mask_equals_the_rule(documents: list[Document], attention: str) -> None:
    """The oracle, one pair at a time: a copy sees what comes before its original, and itself; nothing else sees it."""
    layout = concatenate([layout_document(document, FORMAT) for document in documents])
    (start, end), (first, last) = visible(layout, attention), gaps(layout)  # type: ignore[arg-type]
    copies = {number: span for number, span in enumerate(layout.spans) if span.copy_of is not None}
    for query in range(len(layout)):
        for key in range(len(layout)):
            image, same = layout.image[query], layout.image[query] == layout.image[key]
            if image in copies and same:
                expected = key <= query or attention == "bidirectional"
            elif image in copies:
                expected = key < layout.spans[copies[image].copy_of].start
            else:
                expected = layout.image[key] not in copies
                expected &= key <= query or (image >= 0 and same and attention == "bidirectional")
            expected &= layout.document[query] == layout.document[key]
            seen = start[query] <= key < end[query] and not first[query] <= key < last[query]
            assert seen == expected, (query, key)


@settings(deadline=None, max_examples=60)
@given(DOCUMENTS.filter(bool))
def test_only_images_that_are_learned_and_read_cost_a_copy(documents: list[Document]) -> None:
    """Without its copies a layout is what it is without `clean_copy`, but that the originals are no targets."""
    for document in documents:
        layout, plain = layout_document(document, FORMAT), layout_document(document, PLAIN)
        copies = [span for span in layout.spans if span.copy_of is not None]
        read = [
            part
            for place, part in enumerate(document.parts)
            if isinstance(part, Image)
            and part.target
            and any(isinstance(after, Image) or after.ids for after in document.parts[place + 1 :])
        ]
        assert [span.image for span in copies] == read
        assert len(layout) == len(plain) + sum(span.end - span.start for span in copies)
        for name in ("input_ids", "position_ids", "image", "loss_mask"):
            assert np.array_equal(getattr(layout, name)[: len(plain)], getattr(plain, name))
        assert sum(span.image.target for span in layout.spans) == sum(span.image.target for span in plain.spans)
    batch, plain_batch = collate(documents, FORMAT), collate(documents, PLAIN)
    assert torch.equal(batch.targets, plain_batch.targets)
    assert batch.image_targets == plain_batch.image_targets
    assert batch.quantities["copied_positions"] == batch.positions - plain_batch.positions
    assert set(batch.noise_ids) == set(plain_batch.noise_ids), "an image's noise does not depend on the layout"


def run(model, batch: Batch, timesteps: Tensor, attend=None):
    """Return logits, predictions, and gradients of a scalar that depends on all of them."""
    attend = attend or Grouped(batch, model.compute_dtype, config=model.config)
    output = model(
        batch.input_ids, batch.position_ids, attend, batch.loss_positions, batch.patches, batch.latents, timesteps
    )
    model.zero_grad()
    (output.logits.float().logsumexp(-1).sum() + sum((p.sin() * (p + 1)).sum() for p in output.predictions)).backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def times(batch: Batch) -> Tensor:
    """Return a timestep for each image, 0 for those that are not learned."""
    noisy = [17 * (sample + image) + 1 for sample, image in batch.noise_ids]
    return torch.tensor(noisy) * batch.denoise


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a.detach(), b.detach(), atol=1e-5 * max(1.0, float(b.detach().abs().max())), rtol=0)


VARIANTS = [
    {},
    {"adapter": "unet"},
    {"image_attention": "causal", "n_kv_heads": 2},
    {"positions": "2d", "experts": "all"},
    {"sliding_window": 7},
]


def formats(config: ModelConfig) -> tuple[SequenceFormat, SequenceFormat]:
    """Return a network's format with copies and without."""
    return replace(FORMAT, positions=config.positions), replace(PLAIN, positions=config.positions)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_grouped_equals_dense_and_packed_equals_unpacked(variant) -> None:
    config = tiny(**variant)
    model, documents, (fmt, _) = randomised(config), DOCUMENTS_OF_EVERY_KIND, formats(config)
    batch = collate(documents, fmt, config.image_attention, multiple=32)
    assert batch.copies == ((3, 0), (4, 1), (7, 6))
    expected, expected_gradients = run(model, batch, times(batch), dense(batch, config))
    together, gradients = run(model, batch, times(batch))
    summed: dict[str, Tensor] = {}
    logits, predictions = [], []
    for document in documents:
        one = collate([document], fmt, config.image_attention)
        output, of_one = run(model, one, times(one))
        logits.append(output.logits)
        predictions.extend(output.predictions)
        for name, gradient in of_one.items():
            summed[name] = summed.get(name, 0) + gradient
    for other, others in ((expected.logits, expected.predictions), (torch.cat(logits), predictions)):
        close(together.logits, other)
        for a, b in zip(together.predictions, others, strict=True):
            close(a, b)
    for name, gradient in gradients.items():
        close(gradient, expected_gradients[name])
        close(gradient, summed[name])


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_copy_at_timestep_0_equals_its_original_and_no_copy(variant) -> None:
    config = tiny(**variant)
    model, document = randomised(config), replace(story(), predict=True)
    batch, plain = (collate([document], fmt, config.image_attention) for fmt in formats(config))
    found, _ = run(model, batch, torch.zeros(len(batch.latents), dtype=torch.int64))
    expected, _ = run(model, plain, torch.zeros(len(plain.latents), dtype=torch.int64))
    close(found.logits, expected.logits)
    for number, prediction in enumerate(expected.predictions):
        close(found.predictions[number], prediction)
    for copy, original in batch.copies:
        close(found.predictions[copy], expected.predictions[original])


def test_text_and_later_images_see_the_clean_image_alone() -> None:
    """Gradients of each output with respect to each image's latent, copies and originals apart."""
    model, batch = randomised(tiny()), collate([story()], FORMAT)
    latents = [image.clone().requires_grad_() for image in batch.latents]
    attend = Grouped(batch, torch.float32)
    output = model(
        batch.input_ids, batch.position_ids, attend, batch.loss_positions, batch.patches, latents, times(batch)
    )
    first, second, last, copy_of_first, copy_of_second = range(5)
    assert batch.copies == ((copy_of_first, first), (copy_of_second, second))

    def reached(out: Tensor) -> set[int]:
        gradients = torch.autograd.grad(out.square().sum(), latents, retain_graph=True, allow_unused=True)
        return {number for number, of in enumerate(gradients) if of is not None and of.abs().max() > 0}

    # BOS, 10, 11, BOI; then from the first image's EOI: 12, BOI, BOI of the last image, EOS.
    assert reached(output.logits[:3]) == set()
    assert reached(output.logits[3:4]) == {first}
    assert reached(output.logits[5:6]) == {first, second}
    assert reached(output.predictions[copy_of_first]) == {copy_of_first}
    assert reached(output.predictions[copy_of_second]) == {copy_of_second, first}
    assert reached(output.predictions[last]) == {last, first, second}


def test_operations_are_those_of_visible_pairs() -> None:
    config, batch = tiny(), collate(DOCUMENTS_OF_EVERY_KIND, FORMAT, multiple=64)
    real = batch.positions - batch.n_padding
    key = torch.arange(batch.positions)
    mask = (batch.kv_start[:, None] <= key) & (key < batch.kv_end[:, None])
    mask &= (key < batch.gaps[0, :, None]) | (batch.gaps[1, :, None] <= key)
    sizes = [tuple(image.shape[1:]) for image in batch.latents]
    expected = forward_flops(config, real, int(mask[:real].sum()), len(batch.loss_positions), sizes)
    assert train_flops(config, batch) == 3 * expected


def test_trained_visibility_is_the_engines(tokenizer: Tokenizer) -> None:
    """An image drawn with the cache, step by step, is what the noised copy is trained to predict, whatever follows it;
    and the next image is drawn after the clean one."""
    engine = Engine(exported(tokenizer))
    model, grammar = engine.exported.model, replace(engine.grammar, clean_copy=True)
    config = SamplerConfig("ddim", 3)
    asked = Request(
        Document([Text((10, 11, 12))], closed=False),
        draw="force", max_tokens=0, max_images=1, size=(8, 8), sampler=config, guidance_scale=1.0, seed=5,
    )  # fmt: skip

    def denoise(before: list, clean: Tensor, after: list, number: int) -> Tensor:
        """Return the image drawn with the noised copy's predictions in whole training sequences."""
        sampler = Sampler(engine.exported.process, config)
        state = sampler.prepare((3, 8, 8), generator_for(5, "image", number))
        document = Document([*before, Image(clean), *after])
        while not state.done:
            batch = collate([document], grammar)
            copy = len(batch.latents) - 1
            assert batch.copies[-1][0] == copy
            noisy = [*list(batch.latents)[:copy], state.x]
            moment = torch.tensor([0] * copy + [state.t])
            output = model(
                batch.input_ids, batch.position_ids, dense(batch), batch.loss_positions, batch.patches, noisy, moment
            )
            state = sampler.step(state, output.predictions[copy])
        return sampler.finish(state)

    (drawn,) = [event.latent for event in engine.run([asked]) if isinstance(event, ImageEnd)]
    words: list = [Text((10, 11, 12))]
    for seed in (0, 1):  # neither the clean original nor the text after it is seen
        torch.testing.assert_close(
            drawn, denoise(words, latent(8, 8, seed), [Text((40 + seed,))], 0), atol=1e-4, rtol=1e-4
        )
    known = replace(asked, document=Document([*words, Image(drawn), Text((32,))], closed=False))
    (second,) = [event.latent for event in engine.run([known]) if isinstance(event, ImageEnd)]
    before = [*words, Image(drawn, target=False), Text((32,))]
    torch.testing.assert_close(second, denoise(before, latent(8, 8), [Text((41,))], 0), atol=1e-4, rtol=1e-4)


# --- sources ----------------------------------------------------------------------------------------------------------


def test_bundled_sources_know_their_lengths(tokenizer: Tokenizer) -> None:
    world, form = World(WorldConfig(size=16, nouns=8)), tokenizer.sequence_format(8)
    copied, numbers = replace(form, clean_copy=True), np.arange(60)
    pairs = ScenePairs(world, tokenizer, Pixels(), PairConfig(caption_first=0.5), 0)
    edits = SceneEdits(world, tokenizer, Pixels(), EditConfig(), 0)
    for source in (pairs, edits):
        found = source.lengths(numbers, numbers, copied)
        assert found.tolist() == [len(layout_document(source.document(i, i), copied)) for i in range(60)]
    cost = pairs.lengths(numbers, numbers, copied) - pairs.lengths(numbers, numbers, form)
    assert sorted(set(cost.tolist())) == [0, 4]
    assert np.array_equal(edits.lengths(numbers, numbers, copied), edits.lengths(numbers, numbers, form))


@pytest.fixture(scope="module")
def orders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets of pairs, and of documents whose texts and images stand in every order."""
    root = tmp_path_factory.mktemp("orders")
    for number in range(3):
        PIL.Image.new("RGB", (8 + 8 * number, 8), (80 * number, 0, 9)).save(root / f"{number}.png")
    kinds = ("ti", "it", "tit", "iti", "iit", "titit", "i", "ii", "t")

    def part(letter: str, i: int) -> dict[str, str]:
        return {"text": f"part of {i}"} if letter == "t" else {"image": f"{i % 3}.png"}

    lines = [{"parts": [part(letter, i + n) for n, letter in enumerate(kinds[i % len(kinds)])]} for i in range(54)]
    pairs = [{"image": f"{i % 3}.png", "text": f"thing {i}"} for i in range(40)]
    config = BuildConfig(size=8, vocabulary=300, heldout=0.0, fit="bucket", multiple=4, duplicates="keep")
    for name, content in (("mixed", lines), ("pairs", pairs)):
        (root / f"{name}.jsonl").write_text("\n".join(json.dumps(line) for line in content))
        build_set(str(root / f"{name}.jsonl"), root / name, config, workers=0)
        config = replace(config, tokenizer=str(root / "mixed"))
    return root


def stored(folder: Path, **changes) -> StoredImages:
    data = DataSet(str(folder))
    return StoredImages(data, data.tokenizer(), Pixels(), PairConfig(**changes), seed=3)


@pytest.mark.parametrize("name", ["mixed", "pairs"])
def test_the_index_gives_every_length(orders: Path, name: str) -> None:
    source = stored(orders / name, caption_drop=0.5, caption_first=0.5)
    form = source.tokenizer.sequence_format(4)
    copied, numbers = replace(form, clean_copy=True), np.arange(2 * source.epoch)
    found = source.lengths(numbers, numbers + 5, copied)
    assert found.tolist() == [len(layout_document(source.document(i, i + 5), copied)) for i in numbers.tolist()]
    assert found.sum() > source.lengths(numbers, numbers + 5, form).sum()
    many = np.arange(400 * source.epoch)
    assert mean_length(source, copied) == pytest.approx(source.lengths(many, many, copied).mean(), rel=0.01)


def test_inspection_counts_copies(orders: Path, tmp_path: Path) -> None:
    sources, limits = (str(orders / "pairs"),), Limits(samples=40)
    capped = inspect_sources(sources, tmp_path / "a", "tiny", 256, limits)
    copied = inspect_sources(sources, tmp_path / "b", "tiny", 256, limits, "clean-copy")
    assert capped["mixture"]["share_of_copies"] == 0
    share, mean = copied["mixture"]["share_of_copies"], copied["mixture"]["mean_positions"]
    assert mean * (1 - share) == pytest.approx(capped["mixture"]["mean_positions"])
    assert "Noised copies" in (tmp_path / "b" / "index.html").read_text()
    of_set = copied["sets"][sources[0]]["positions_per_document"]["mean"]
    assert of_set > capped["sets"][sources[0]]["positions_per_document"]["mean"]


# --- runs -------------------------------------------------------------------------------------------------------------


def recipe(steps: int = 4, **data: object) -> Recipe:
    base = replace(preset("tiny"), precision="float32", device="cpu")
    data = {"context": "clean-copy", "pairs": PairConfig(caption_first=0.3), **data}
    return replace(
        base,
        data=replace(base.data, **data),  # type: ignore[arg-type]
        loop=replace(base.loop, steps=steps, log_every=1, sample_every=0, checkpoint_every=0),
        optimizer=replace(base.optimizer, warmup=2),
    )


def test_a_resumed_run_equals_a_straight_one_and_counts_its_copies(tmp_path: Path) -> None:
    trainers = []
    for name, stops in (("straight", [4]), ("resumed", [2, 4])):
        for stop in stops:
            trainer = build_trainer(open_tiny(recipe(row_length=256, batch_size=4), tmp_path / name), tmp_path / name)
            trainer.restore()
            while trainer.step < stop:
                trainer.train_step(Average())
            trainer.save()
        trainers.append(trainer)
    straight, resumed = (tensors(trainer) for trainer in trainers)
    for kind, values in straight.items():
        for key, value in values.items():
            assert torch.equal(value, resumed[kind][key]), (kind, key)
    assert trainers[0].totals["copied_positions"] == trainers[1].totals["copied_positions"] > 0
    assert trainers[0].totals["positions"] > trainers[0].totals["copied_positions"]


def test_limits_do_not_hold_and_a_capped_run_is_as_before(tmp_path: Path) -> None:
    """Every image is learned at every timestep; the default has no copies and no gaps."""
    first = PairConfig(caption_first=0.0, image_first_max_timestep=0)
    for context, warned in (("clean-copy", False), ("capped", True)):
        made = recipe(pairs=first, context=context)
        trainer = build_trainer(open_tiny(made, tmp_path / context), tmp_path / context)
        (batch,) = trainer.load(0)
        assert (unseen_noise(made, trainer.load.document) is not None) == warned
        assert (batch.gaps is None) == (not batch.copies) == warned
        assert int(batch.timesteps.max()) > 500 or warned
    assert recipe().data.context != preset("tiny").data.context == "capped"


def test_the_loss_of_a_copy_does_not_depend_on_the_text_after_it() -> None:
    goal = TransfusionObjective(ObjectiveConfig(), Process(DiffusionConfig()), 1)
    model, image = randomised(tiny()), Image(latent(4, 4, 1))

    def losses(*parts: Text | Image, fmt: SequenceFormat = FORMAT) -> Tensor:
        return goal.loss(model, collate([Document([Text((5, 6)), *parts], sample=3)], fmt)).losses.detach()

    alone, capped = losses(image)[1], losses(image, Text((7, 8)), fmt=PLAIN)[1]
    torch.testing.assert_close(losses(image, Text((7, 8)))[1], alone)
    torch.testing.assert_close(capped, alone)  # same noise, same prefix
    text = losses(image, Text((7, 8)))[0]
    clean = losses(replace(image, target=False), Text((7, 8)), fmt=PLAIN)[0]
    torch.testing.assert_close(text, clean)
    assert not torch.allclose(text, losses(image, Text((7, 8)), fmt=PLAIN)[0], atol=1e-4), "it saw the noise"


def test_guidance_and_chameleons_have_no_copies(tmp_path: Path) -> None:
    assert len(layout_document(unconditional(story()), FORMAT)) == len(layout_document(unconditional(story()), PLAIN))
    with pytest.raises(ValueError, match="clean_copy: expected False where images are codes"):
        SequenceFormat(0, 1, 2, 3, 1, first_code=10, clean_copy=True)
    chameleon = preset("chameleon-32")
    with pytest.raises(UserError, match=r'data\.context: expected "capped" with model.images "codes"'):
        resolve(replace(chameleon, data=replace(chameleon.data, context="clean-copy")))


def test_a_plan_counts_copies() -> None:
    capped, copied = (plan(recipe(context=context)) for context in ("capped", "clean-copy"))
    patches = (preset("tiny").data.world.size // preset("tiny").model.patch_size) ** 2
    more = copied["positions_per_step"] - capped["positions_per_step"]
    assert 0 < more <= patches * preset("tiny").data.batch_size


def test_it_trains_from_the_command_line_to_an_export(tmp_path: Path) -> None:
    trained = train(recipe(steps=2), tmp_path / "run")
    assert trained.outcome == "finished"
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert '"copied_positions"' in lines
