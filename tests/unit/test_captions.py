"""Several captions of one image: stored once, one shown an epoch, each as often as its weight says."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from scipy.stats import chisquare

from transfuse.autoencoders import Pixels
from transfuse.data import CorruptSampleError, DataSet, PairConfig, StoredImages
from transfuse.data.building import build_set, verify_set
from transfuse.data.building.prepare import BuildConfig, Dropped, Prepared, Preparer
from transfuse.data.dataset import CAPTION
from transfuse.data.readers import Columns, Raw, open_source
from transfuse.sequence import Text, Tokenizer, layout_document

CONFIG = BuildConfig(size=16, vocabulary=300, shard_size=3, heldout=0.0)
WORDS = ["a crab", "one red crab on a stone", "crab", "an animal by the sea, seen from above", "it has claws"]
WEIGHTS = [3, 1, 1, 1, 4]


def noise(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tar of 8 images, image i with i % 5 + 1 captions, those of image 4 with weights; and the set built of it."""
    root = tmp_path_factory.mktemp("captions")
    with tarfile.open(root / "images.tar", "w") as file:
        for number in range(8):
            stream = io.BytesIO()
            PIL.Image.fromarray(noise(number)).save(stream, "png")
            record = {"captions": WORDS[: number % 5 + 1], **({"weights": WEIGHTS} if number == 4 else {})}
            for end, data in (("png", stream.getvalue()), ("json", json.dumps(record).encode())):
                header = tarfile.TarInfo(f"{number}.{end}")
                header.size = len(data)
                file.addfile(header, io.BytesIO(data))
    build_set(str(root / "images.tar"), root / "set", CONFIG, workers=0)
    return root


def source(folder: Path, seed: int = 3, **changes: float) -> StoredImages:
    data = DataSet(str(folder / "set"))
    return StoredImages(data, data.tokenizer(), Pixels(), PairConfig(**{"caption_drop": 0.0, **changes}), seed)


def shown(pairs: StoredImages, number: int, epochs: range) -> list[str]:
    """The captions of document `number` in each epoch."""
    captions = []
    for epoch in epochs:
        index = next(i for i in range(epoch * pairs.epoch, (epoch + 1) * pairs.epoch) if pairs.number(i) == number)
        (text,) = (part for part in pairs.document(index, index).parts if isinstance(part, Text))
        captions.append(pairs.tokenizer.decode(list(text.ids)))
    return captions


def test_an_image_is_stored_once_with_its_captions_in_an_ordinary_tar(folder: Path) -> None:
    data = DataSet(str(folder / "set"))
    assert (data.manifest.documents, data.manifest.pictures, data.manifest.captions) == (8, 8, 2 + 3 + 4 + 5 + 2 + 3)
    assert [data.read(n).parts[1:] for n in range(8)] == [tuple(WORDS[: n % 5 + 1]) for n in range(8)]
    assert data.read(4).weights == tuple(WEIGHTS)
    assert data.captions.dtype == CAPTION
    tokens = [[len(data.tokenizer().encode(word)) for word in WORDS[: n % 5 + 1]] for n in range(8)]
    assert data.documents["tokens"].tolist() == [max(counts) for counts in tokens]
    assert (data.manifest.tokens, data.manifest.longest) == (sum(map(sum, tokens)), max(map(max, tokens)))
    assert verify_set(str(folder / "set"), workers=0) == (8, [])
    reader = open_source(str(folder / "set" / "shards"), Columns())
    items = [item for part in reader.parts() for item in reader.read(part)]
    stored = [data.read(n) for n in range(8)]
    assert [(item.parts[1:], item.weights) for item in items] == [(one.parts[1:], one.weights) for one in stored]


def test_a_set_built_of_a_set_keeps_every_caption_and_weight(folder: Path, tmp_path: Path) -> None:
    build_set(str(folder / "set"), tmp_path / "again", CONFIG, workers=0)
    first, second = DataSet(str(folder / "set")), DataSet(str(tmp_path / "again"))
    assert np.array_equal(first.captions, second.captions)
    assert [first.read(n).parts for n in range(8)] == [second.read(n).parts for n in range(8)]


def test_each_caption_is_shown_as_often_as_its_weight_says(folder: Path) -> None:
    pairs = source(folder)
    for number, weights in ((3, [1, 1, 1, 1]), (4, WEIGHTS)):
        counts = Counter(shown(pairs, number, range(600)))
        expected = np.array(weights) / sum(weights) * 600
        assert chisquare([counts[word] for word in WORDS[: len(weights)]], expected).pvalue > 1e-3
    # One image's choice says nothing about another's, nor one epoch's about the next.
    first, other = shown(pairs, 3, range(400)), shown(pairs, 2, range(400))
    for left, right, choices in ((first, other, 3), (first[1:], first[:-1], 4)):
        together = Counter(zip(left, right, strict=True))
        cells = [together[a, b] for a in WORDS[:4] for b in WORDS[:choices]]
        assert chisquare(cells).pvalue > 1e-3


def test_the_choice_is_a_function_of_seed_document_and_epoch(folder: Path) -> None:
    one, other = source(folder), source(folder, seed=4)
    backwards = [shown(one, 3, range(epoch, epoch + 1))[0] for epoch in reversed(range(40))]
    assert backwards[::-1] == shown(source(folder), 3, range(40)), "whatever was read before"
    assert shown(one, 3, range(40)) != shown(other, 3, range(40))
    index = next(i for i in range(one.epoch) if one.number(i) == 3)
    texts = {tuple(p.ids for p in one.document(index, sample).parts if isinstance(p, Text)) for sample in range(9)}
    assert len(texts) == 1, "whatever the sample's number in a mixture"


def test_the_index_gives_the_length_of_the_caption_that_is_shown(folder: Path) -> None:
    for pairs in (source(folder), source(folder, caption_drop=0.5)):
        form = pairs.tokenizer.sequence_format(4)
        indices = np.arange(250 * pairs.epoch)
        lengths = pairs.lengths(indices, indices, form)
        for index in range(40):
            assert lengths[index] == len(layout_document(pairs.document(index, index), form))
        assert lengths.mean() == pytest.approx(pairs.mean_length(form), rel=0.02)


def test_captions_of_the_wrong_length_are_left_out_and_counted(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(WORDS * 5, 300)
    prepare = Preparer(replace(CONFIG, min_caption=5, max_tokens=12), tokenizer, text_only=False)
    (kept,) = prepare(Raw("a", (noise(0), "crab", "a crab", "", "it has claws"), True, (1, 2, 3, 4)))
    assert isinstance(kept, Prepared)
    assert kept.parts[1:] == ("a crab", "it has claws")
    assert kept.weights == (2, 4)
    assert kept.changed == ("caption left out: caption length",) * 2
    (single,) = prepare(Raw("a", (noise(0), "crab", "a crab"), True, (1, 2)))
    assert isinstance(single, Prepared)
    assert (single.parts[1:], single.weights, single.captions) == (("a crab",), (), ())
    assert prepare(Raw("a", (noise(0), "crab", ""), True)) == [Dropped("a", "caption length", "4 characters")]


@pytest.mark.parametrize("weights", [(1,), (1, 0), (1, float("nan")), (1, float("inf")), (1, 2, 3)])
def test_weights_go_with_the_captions(weights: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected .*weight"):
        Raw("a", (noise(0), "one", "two"), True, weights)


def test_captions_that_are_not_those_of_the_index_are_found(folder: Path) -> None:
    data = DataSet(str(folder / "set"))
    data.captions = data.captions.copy()
    data.captions["tokens"][data.captions["document"] == 4] += 1
    data.captions["weight"][data.captions["document"] == 3] = [1, 2, 1, 1]
    for number in (3, 4):
        with pytest.raises(CorruptSampleError, match="its captions are not those of the index"):
            data.check(number, data.tokenizer())
