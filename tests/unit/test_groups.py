"""The same image, nearly or exactly, never stands on both sides of the split; nor do the pieces of one text."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageEnhance
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transfuse.data import DataSet
from transfuse.data.building import Writer, build_set
from transfuse.data.building.groups import FINGERPRINT, NEAR, NEAR_COLOUR, Fingerprint, group, held_out
from transfuse.data.building.prepare import BuildConfig
from transfuse.data.readers import Columns
from transfuse.errors import UserError

CONFIG = BuildConfig(size=64, vocabulary=300, shard_size=8, heldout=0.25)


def scene(number: int, side: int = 96) -> PIL.Image.Image:
    """Return a smooth image, as photographs are: six blurred blobs of colour."""
    draw = np.random.default_rng(number)
    rows, columns = np.mgrid[:side, :side] / side
    pixels = np.full((side, side, 3), draw.uniform(0, 255, 3))
    for _ in range(6):
        row, column, width = draw.uniform(0, 1, 3)
        blob = np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / (0.02 + width / 20))[..., None]
        pixels = pixels * (1 - blob) + blob * draw.uniform(0, 255, 3)
    return PIL.Image.fromarray(pixels.astype(np.uint8))


def changed(image: PIL.Image.Image) -> Iterator[PIL.Image.Image]:
    """The image as a strong JPEG, smaller, larger, brighter, and cut by a pixel on each side."""
    stream = io.BytesIO()
    image.save(stream, "jpeg", quality=40)
    yield PIL.Image.open(stream)
    for side in (50, 200):
        yield image.resize((side, side), PIL.Image.Resampling.BICUBIC)
    yield PIL.ImageEnhance.Brightness(image).enhance(1.06)
    yield image.crop((1, 1, image.width - 1, image.height - 1))


def rows_of(marks: list[list[Fingerprint]]) -> np.ndarray:
    rows = [(n, *mark[:3], np.frombuffer(mark.colour, "u1")) for n, images in enumerate(marks) for mark in images]
    return np.array(rows, FINGERPRINT)


def mark(content: int, look: int, colour: int = 0) -> Fingerprint:
    return Fingerprint(content, True, look, bytes([colour] * 12))


def pairs(folder: Path, images: dict[str, PIL.Image.Image]) -> Path:
    folder.mkdir()
    for name, image in images.items():
        image.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"picture {name}")
    return folder


def sides(path: Path) -> tuple[set[str], set[str]]:
    """Names of the documents that are trained on, and that are held out."""
    data = DataSet(str(path))
    splits = [[data.number(split, i) for i in range(data.size(split))] for split in ("train", "heldout")]
    assert sorted(splits[0] + splits[1]) == list(range(len(data)))
    train, held = ({data.read(number).key.rpartition("-")[2] for number in numbers} for numbers in splits)
    return train, held


# --- what is a near duplicate -----------------------------------------------------------------------------------------


def test_an_image_is_recognised_when_it_is_changed_a_little_and_no_other_is() -> None:
    images = [scene(number) for number in range(40)]
    marks = [[Fingerprint.of_image(np.asarray(image))] for image in images]
    marks += [[Fingerprint.of_image(np.asarray(other.convert("RGB")))] for image in images for other in changed(image)]
    labels = group(rows_of(marks), len(marks))
    assert labels[:40].tolist() == list(range(40))
    assert np.mean(labels[40:] == np.repeat(np.arange(40), 5)) > 0.98
    recoloured = [[Fingerprint.of_image(np.asarray(image)[..., ::-1])] for image in images]
    labels = group(rows_of(marks[:40] + recoloured), 80)
    assert np.mean(labels[40:] == np.arange(40, 80)) > 0.9, "the same shapes in other colours are another image"


def test_the_look_of_flat_images_is_no_rounding_error() -> None:
    flat = [np.full((32, 32, 3), value, np.uint8) for value in (0, 90, 255)]
    marks = [[Fingerprint.of_image(pixels)] for pixels in flat]
    assert {one.look for (one,) in marks} == {0}
    assert group(rows_of(marks), 3).tolist() == [0, 1, 2], "their brightness tells them apart"


def oracle(marks: list[list[Fingerprint]]) -> list[int]:
    """Groups by comparing everything with everything."""

    def near(a: Fingerprint, b: Fingerprint) -> bool:
        if a.content == b.content:
            return True
        alike = all(abs(x - y) <= most for x, y, most in zip(a.colour, b.colour, NEAR_COLOUR * 4, strict=True))
        return a.seen and b.seen and (a.look ^ b.look).bit_count() <= NEAR and alike

    labels = list(range(len(marks)))
    while True:
        before = list(labels)
        for i, left in enumerate(marks):
            for j, right in enumerate(marks):
                if any(near(a, b) for a in left for b in right):
                    labels[i] = labels[j] = min(labels[i], labels[j])
        if labels == before:
            return labels


looks = st.sampled_from([0, (1 << 64) - 1, 0xF0F0F0F0F0F0F0F0]).flatmap(
    lambda base: st.sets(st.integers(0, 63), max_size=NEAR + 1).map(lambda bits: base ^ sum(1 << bit for bit in bits))
)
images = st.builds(mark, st.integers(0, 30), looks, st.sampled_from([0, NEAR_COLOUR[1], 2 * NEAR_COLOUR[1], 200]))
texts = st.integers(0, 30).map(Fingerprint)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.one_of(st.lists(images, min_size=1, max_size=3), texts.map(lambda one: [one])), max_size=14))
def test_groups_are_those_of_comparing_everything_with_everything(marks: list[list[Fingerprint]]) -> None:
    known: dict[int, Fingerprint] = {}  # equal content has an equal look
    marks = [[known.setdefault(one.content, one) for one in images] for images in marks]
    assert group(rows_of(marks), len(marks)).tolist() == oracle(marks)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(0, 60), st.randoms())
def test_whole_groups_are_held_out_in_an_order_of_their_own(sizes: list[int], target: int, random) -> None:
    members = [(number, place) for number, size in enumerate(sizes) for place in range(size)]

    def chosen(order: list[tuple[int, int]]) -> set[tuple[int, int]]:
        marks = rows_of([[Fingerprint(1000 + number)] for number, _ in order])
        return {order[n] for n in held_out(group(marks, len(order)), marks, target).tolist()}

    held = chosen(members)
    shuffled = random.sample(members, len(members))
    assert len(held) <= target
    assert all(len({(n, p) in held for p in range(size)}) == 1 for n, size in enumerate(sizes))
    assert {number for number, _ in chosen(shuffled)} == {number for number, _ in held}, "whatever the order"
    rest = [size for n, size in enumerate(sizes) if (n, 0) not in held]
    assert len(held) == target or not rest or min(rest) > target - len(held), "no group that fits is passed over"


# --- in a set ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 images, each with five near duplicates, and the set built of them."""
    root = tmp_path_factory.mktemp("near")
    originals = {f"{number:02d}a": scene(number) for number in range(20)}
    others = {
        f"{name[:2]}{'bcdef'[i]}": image for name in originals for i, image in enumerate(changed(originals[name]))
    }
    pairs(root / "images", {**originals, **others})
    build_set(str(root / "images"), root / "set", CONFIG, workers=0)
    return root


def test_near_duplicates_never_stand_on_both_sides(folder: Path) -> None:
    train, held = ({name[:2] for name in side} for side in sides(folder / "set"))
    assert not train & held
    data = DataSet(str(folder / "set"))
    assert 24 <= data.manifest.heldout <= 30, "a quarter of 120, as whole groups of six give it"
    assert (data.manifest.version, data.manifest.split) == (3, "content")
    firsts = {int(row["document"]): int(row["first"]) for row in data.groups}
    keys = [data.read(number).key.partition("-")[2] for number in range(len(data))]
    assert len(firsts) >= 118
    assert all(keys[number][:2] == keys[first][:2] for number, first in firsts.items())


def test_a_set_that_grows_keeps_most_of_what_is_held_out(folder: Path, tmp_path: Path) -> None:
    images = {f"{number:02d}": scene(number) for number in range(40)}
    for name, count in (("few", 36), ("more", 40)):
        pairs(tmp_path / name, dict(list(images.items())[:count]))
        build_set(str(tmp_path / name), tmp_path / f"{name}-set", CONFIG, workers=0)
    _, few = sides(tmp_path / "few-set")
    _, more = sides(tmp_path / "more-set")
    assert len(few) == 9
    assert len(few - more) <= 2


def test_a_build_that_is_killed_holds_out_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = Writer.add

    def stops(self: Writer, outcomes: list) -> None:
        written(self, outcomes)
        if self.seen % 31 == 0:
            raise KeyboardInterrupt

    for _ in range(3):
        monkeypatch.setattr(Writer, "add", stops)
        with pytest.raises(KeyboardInterrupt):
            build_set(str(folder / "images"), tmp_path / "out", CONFIG, workers=0)
    monkeypatch.undo()
    build_set(str(folder / "images"), tmp_path / "out", CONFIG, workers=0)
    for path in (folder / "set").rglob("*"):
        assert path.is_dir() or path.read_bytes() == (tmp_path / "out" / path.relative_to(folder / "set")).read_bytes()


def test_a_set_built_of_a_set_keeps_the_sides(folder: Path, tmp_path: Path) -> None:
    """Also where some documents are left out, or images are stored otherwise."""
    config = replace(CONFIG, size=32, format="jpeg", max_caption=10, heldout=None)
    build_set(str(folder / "set"), tmp_path / "again", replace(config, min_caption=11, max_caption=None), workers=0)
    assert sides(tmp_path / "again") == sides(folder / "set")
    other = shutil.copytree(folder / "set", tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps({**manifest, "version": 2}))
    with pytest.raises(UserError, match=r"version: expected 3, found 2; build the set again; name another folder"):
        build_set(str(folder / "images"), other, CONFIG, workers=0)


def test_pieces_of_one_text_stand_on_one_side(tmp_path: Path) -> None:
    texts = [f"text {number} " + " ".join(f"word{number}x{i}" for i in range(number % 7 * 9)) for number in range(60)]
    (tmp_path / "words.txt").write_text("\n".join(texts))
    config = replace(CONFIG, max_tokens=16, columns=Columns(split="line"))
    build_set(str(tmp_path / "words.txt"), tmp_path / "out", config, workers=0)
    data = DataSet(str(tmp_path / "out"))
    tokenizer, held = data.tokenizer(), set(data.heldout.tolist())
    text, owners = -1, []
    for number in range(len(data)):
        text += tokenizer.decode(data.read_ids(number).tolist()).startswith(f"text {text + 1}")
        owners.append(text)
    assert text == 59
    assert len(held) == round(0.25 * len(data))
    assert len(data) > 2 * 60
    assert not {owners[n] for n in held} & {owners[n] for n in range(len(data)) if n not in held}


def test_nothing_is_held_out_where_all_is_one_image(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pairs(tmp_path / "in", {f"{i}": image for i, image in enumerate(changed(scene(1)))})
    build_set(str(tmp_path / "in"), tmp_path / "out", CONFIG, workers=0)
    assert DataSet(str(tmp_path / "out")).manifest.heldout == 0
    assert "0 documents held out instead of 1" in caplog.text


def test_a_hundred_thousand_are_grouped_in_seconds() -> None:
    draw = np.random.default_rng(0)
    rows = np.zeros(100_000, FINGERPRINT)
    rows["document"], rows["seen"] = np.arange(len(rows)), True
    rows["content"], rows["look"] = draw.integers(0, 1 << 63, (2, len(rows)), dtype=np.uint64)
    rows["look"][50_000:] = rows["look"][:50_000] ^ (np.uint64(1) << draw.integers(0, 64, 50_000).astype(np.uint64))
    labels = group(rows, len(rows))
    assert (labels[50_000:] == labels[:50_000]).all()
    assert (labels[:50_000] == np.arange(50_000)).mean() > 0.999
