"""The grammar: layout, mask against a brute-force oracle, packing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transfuse.errors import UserError
from transfuse.sequence import (
    Document,
    Image,
    SequenceFormat,
    Text,
    Tokenizer,
    collate,
    concatenate,
    layout_document,
    unconditional,
    visible,
)

G = SequenceFormat(bos=0, eos=1, boi=2, eoi=3, patch_size=2)


def image(rows: int, columns: int, **options: object) -> Image:
    return Image(torch.zeros(3, rows, columns), **options)  # type: ignore[arg-type]


texts = st.builds(Text, st.lists(st.integers(4, 50), max_size=6).map(tuple), st.booleans())
images = st.builds(image, st.sampled_from([2, 4, 6]), st.sampled_from([2, 4]))
documents = st.builds(
    Document,
    st.lists(st.one_of(texts, images), max_size=5),
    st.integers(0, 1000),
    st.booleans(),
    st.booleans(),
)


def test_the_docstring_example() -> None:
    layout = layout_document(Document([Text((10, 11)), image(4, 4)]), G)
    assert layout.input_ids.tolist() == [0, 10, 11, 2, 0, 0, 0, 0, 3, 1]
    assert layout.position_ids.tolist() == list(range(10))
    assert layout.image.tolist() == [-1, -1, -1, -1, 0, 0, 0, 0, -1, -1]
    assert np.flatnonzero(layout.loss_mask).tolist() == [0, 1, 2, 8]
    start, end = visible(layout)
    assert start.tolist() == [0] * 10
    assert end.tolist() == [1, 2, 3, 4, 8, 8, 8, 8, 9, 10]


@given(st.lists(documents, min_size=1, max_size=4), st.sampled_from(["bidirectional", "causal"]))
def test_mask_equals_the_rule(docs: list[Document], attention: str) -> None:
    """The oracle: the sentence in the contract, one pair of positions at a time."""
    layout = concatenate([layout_document(document, G) for document in docs])
    start, end = visible(layout, attention)  # type: ignore[arg-type]
    for query in range(len(layout)):
        assert start[query] < end[query], "no row without a visible key"
        for key in range(len(layout)):
            same_image = layout.image[query] >= 0 and layout.image[query] == layout.image[key]
            expected = layout.document[query] == layout.document[key] and (
                key <= query or (same_image and attention == "bidirectional")
            )
            assert (start[query] <= key < end[query]) == expected, (query, key)


@given(documents)
def test_what_is_predicted(document: Document) -> None:
    layout = layout_document(document, G)
    predict = set(np.flatnonzero(layout.loss_mask).tolist())
    for position in range(len(layout)):
        if layout.image[position] >= 0 or layout.input_ids[position] == G.boi:
            assert position not in predict, "from BOI and from patches nothing is predicted"
    targets = [int(layout.input_ids[p + 1]) for p in sorted(predict)]
    assert G.eoi not in targets
    assert all(layout.image[p + 1] < 0 for p in predict), "a patch is never a token target"
    if document.predict:
        learned = [i for part in document.parts if isinstance(part, Text) and part.predict for i in part.ids]
        markers = [G.boi] * len(document.images) + [G.eos] * document.closed
        # EOI can stand before a learned token, never be one: everything else that is learned is a target once.
        assert sorted(targets) == sorted(learned + markers)
    else:
        assert not targets


@given(st.lists(documents, min_size=1, max_size=5))
@settings(max_examples=50)
def test_packing_renumbers_and_restarts(docs: list[Document]) -> None:
    layouts = [layout_document(document, G) for document in docs]
    packed, place, number = concatenate(layouts), 0, 0
    for which, layout in enumerate(layouts):
        part = slice(place, place + len(layout))
        assert (packed.input_ids[part] == layout.input_ids).all()
        assert (packed.position_ids[part] == np.arange(len(layout))).all()
        assert (packed.document[part] == which).all()
        assert (packed.loss_mask[part] == layout.loss_mask).all()
        for span, packed_span in zip(layout.spans, packed.spans[number:], strict=False):
            assert packed_span.start == span.start + place
            assert (packed.image[packed_span.start : packed_span.end] == number).all()
            number += 1
        place += len(layout)
    assert len(packed.spans) == number


def test_batch_targets_and_keys(mixed: list[Document]) -> None:
    batch = collate(mixed, G)
    assert sum(batch.documents) == batch.positions
    assert batch.noise_ids == ((1, 0), (3, 0), (4, 0), (4, 1), (6, 0))
    assert batch.max_timestep.tolist() == [0, 500, 0, 0, 0]
    assert len(batch.patches) == sum(a.shape[1] * a.shape[2] // 4 for a in batch.latents)
    assert (batch.targets == batch.input_ids[batch.loss_positions + 1]).all()


def test_unconditional_keeps_the_last_image_and_learns_no_token() -> None:
    last = image(2, 2)
    document = unconditional(Document([Text((5,)), image(4, 4), Text((6,)), last], sample=9))
    assert document.parts == [last]
    assert document.sample == 9
    layout = layout_document(document, G)
    assert layout.input_ids.tolist() == [0, 2, 0, 3, 1]
    assert not layout.loss_mask.any()
    with pytest.raises(ValueError, match="expected a document with an image"):
        unconditional(Document([Text((5,))]))


def test_latent_must_divide_into_patches() -> None:
    with pytest.raises(ValueError, match="multiples of the patch size 2, found 3x4"):
        layout_document(Document([image(3, 4)]), G)


def test_tokenizer_round_trip_and_markers(tokenizer: Tokenizer, tmp_path) -> None:
    for text in ("a crab on a red background", "naïve — 日本 🦀", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.encode("a crab") == tokenizer.encode("a crab")
    assert (loaded.bos, loaded.eos, loaded.boi, loaded.eoi) == (
        tokenizer.bos,
        tokenizer.eos,
        tokenizer.boi,
        tokenizer.eoi,
    )
    for one in (tokenizer, loaded):
        injected = one.encode("draw <|boi|> now <|eos|>")
        assert not {one.bos, one.eos, one.boi, one.eoi} & set(injected), "a typed marker is plain text"


def test_tokenizer_errors(tmp_path) -> None:
    with pytest.raises(UserError, match="found no file"):
        Tokenizer.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match=r"expected a tokenizer\.json"):
        Tokenizer.load(tmp_path / "bad.json")
    with pytest.raises(UserError, match="at least 260"):
        Tokenizer.train(["a"], 100)


def test_filling_up_changes_nothing_but_the_length(mixed: list[Document]) -> None:
    plain, filled = collate(mixed, G), collate(mixed, G, multiple=64)
    assert filled.positions % 64 == 0
    assert filled.positions - filled.n_padding == plain.positions
    assert torch.equal(filled.loss_positions, plain.loss_positions)
    assert torch.equal(filled.targets, plain.targets)
    assert (filled.kv_start[plain.positions :] >= plain.positions).all()
    assert (filled.kv_end[: plain.positions] <= plain.positions).all()
    assert collate(mixed, G, multiple=plain.positions).n_padding == 0
