"""Every shape in which people have images: built from a small real example, decoded, and compared with its source."""

from __future__ import annotations

import io
import json
import logging
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from conftest import write

from transfuse.autoencoders import Pixels
from transfuse.data import PairConfig, StoredDialogues, has_dialogues
from transfuse.data.building import build_set
from transfuse.data.building.prepare import BuildConfig
from transfuse.data.dataset import DataSet
from transfuse.data.readers import FORMATS, Columns, Fault, Raw, open_source
from transfuse.errors import UserError
from transfuse.sequence import Text

CAPTIONS = [["a red ball", "the ball, seen again"], ["a blue box"], ["a green tree", "one tree", "a tree"]]
Expected = list[tuple[int, list[str]]]
"""number of the image, and its captions"""


def pixels(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def png(number: int) -> bytes:
    stream = io.BytesIO()
    PIL.Image.fromarray(pixels(number)).save(stream, "png")
    return stream.getvalue()


def images(folder: Path, pattern: str = "{}.png") -> Path:
    return write(folder, {pattern.format(number): png(number) for number in range(3)})


def lines(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def coco(folder: Path) -> None:
    """COCO as it is shipped: captions, boxes, and a folder of images for each split."""
    images(folder, "train2017/{:012d}.png")
    write(folder, {"val2017/000000000009.png": png(9)})
    listed = [{"id": 10 + n, "file_name": f"{n:012d}.png", "coco_url": "http://x/y.png"} for n in range(3)]
    told = [{"id": 7 * n, "image_id": 10 + n, "caption": text} for n in range(3) for text in CAPTIONS[n]]
    boxes = [{"id": 1, "image_id": 10, "bbox": [0, 0, 1, 1], "category_id": 3}]
    other = {"images": [{"id": 9, "file_name": "000000000009.png"}], "annotations": [{"image_id": 9, "caption": "x"}]}
    contents = {"captions_train2017": {"info": {}, "images": listed, "annotations": told}}
    contents |= {"instances_train2017": {"images": listed, "annotations": boxes}, "captions_val2017": other}
    write(folder, {f"annotations/{name}.json": json.dumps(value) for name, value in contents.items()})


def karpathy(folder: Path) -> None:
    images(folder, "val2014/{}.png")
    write(folder, {"val2014/9.png": png(9)})
    splits = ["train", "restval", "train", "test"]
    told = [*CAPTIONS, ["of the test"]]
    listed = [
        {"filepath": "val2014", "filename": f"{n}.png", "split": split, "sentences": [{"raw": t} for t in texts]}
        for n, split, texts in zip((0, 1, 2, 9), splits, told, strict=True)
    ]
    write(folder, {"dataset_coco.json": json.dumps({"images": listed, "dataset": "coco"})})


def flickr8k(folder: Path) -> None:
    """As Kaggle has it: images in a folder, captions.txt beside it, commas without quotes."""
    images(folder, "Images/{}.png")
    rows = [f"{n}.png,{text}" for n in range(3) for text in CAPTIONS[n]]
    write(folder, {"captions.txt": "\n".join(["image,caption", *rows]) + "\n"})


def flickr8k_token(folder: Path) -> None:
    images(folder, "Flicker8k_Dataset/{}.png")
    rows = [f"{n}.png#{i}\t{text}" for n in range(3) for i, text in enumerate(CAPTIONS[n])]
    write(folder, {"Flickr8k.token.txt": "\n".join(rows), "readme.txt": "Please cite us."})


def flickr30k(folder: Path) -> None:
    images(folder, "flickr30k_images/{}.png")
    rows = [f"{n}.png| {i}| {text}" for n in range(3) for i, text in enumerate(CAPTIONS[n])]
    write(folder, {"results.csv": "\n".join(["image_name| comment_number| comment", *rows])})


def tsv(folder: Path) -> None:
    images(folder)
    rows = [f"{7 * n}\t{n}.png\t{text}" for n in range(3) for text in CAPTIONS[n]]
    write(folder, {"all.tsv": "\n".join(["id\tfilename\tcaption", *rows])})


def metadata(folder: Path) -> None:
    """In each subfolder its own, of either kind."""
    for number, name in enumerate(("one", "two", "two/three")):
        write(folder / name, {f"{number}.png": png(number)})
    write(folder, {"one/metadata.jsonl": lines({"file_name": "0.png", "text": CAPTIONS[0]})})
    write(folder, {"two/metadata.csv": "file_name,caption\n1.png,a blue box\n"})
    write(folder, {"two/three/metadata.jsonl": lines({"file_name": "2.png", "captions": CAPTIONS[2]})})


def kohya(folder: Path) -> None:
    images(folder, "img/{}.png")
    write(
        folder,
        {f"img/{n}.{end}": text for n in range(3) for end, text in zip(("txt", "caption"), CAPTIONS[n], strict=False)},
    )
    write(folder, {"img/2.png.txt": CAPTIONS[2][2]})


def meta_cap(folder: Path) -> None:
    images(folder, "img/{}.png")
    told = [{"caption": CAPTIONS[0]}, {"tags": CAPTIONS[1][0]}, {"caption": CAPTIONS[2], "train_resolution": [16, 16]}]
    write(folder, {"meta_cap.json": json.dumps({f"/data/img/{n}": value for n, value in enumerate(told)})})


def sidecars(folder: Path) -> None:
    images(folder)
    write(folder, {f"{n}.json": json.dumps({"caption": CAPTIONS[n], "width": 16}) for n in range(3)})


def captions_jsonl(folder: Path) -> None:
    images(folder, "images/{}.png")
    write(folder, {"captions.jsonl": lines(*({"filename": f"{n}.png", "caption": CAPTIONS[n]} for n in range(3)))})


def hub(folder: Path) -> None:
    """Parquet of the Hugging Face hub, of two splits."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder.mkdir(parents=True)
    for split, numbers in (("train", range(3)), ("test", [9])):
        told = [CAPTIONS[n] if n < 3 else ["of the test"] for n in numbers]
        column = [{"bytes": png(n), "path": f"{n}.png"} for n in numbers]
        table = arrow.table({"image": column, "caption": told, "width": [16 for _ in numbers]})
        parquet.write_table(table, folder / f"{split}-00000-of-00001.parquet", row_group_size=2)


def numbered_columns(folder: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder.mkdir(parents=True)
    columns = {f"caption_{i}": [(texts + [None] * 3)[i] for texts in CAPTIONS] for i in range(3)}
    parquet.write_table(arrow.table({"jpg": [png(n) for n in range(3)], **columns}), folder / "a.parquet")


def saved_to_disk(folder: Path) -> None:
    """What `datasets.DatasetDict.save_to_disk` writes: streams of arrow, a folder a split."""
    arrow = pytest.importorskip("pyarrow")
    write(folder, {"dataset_dict.json": '{"splits": ["train", "validation"]}'})
    for split, numbers in (("train", [[0, 1], [2]]), ("validation", [[9]])):
        write(folder / split, {"state.json": "{}", "dataset_info.json": "{}"})
        told = [*CAPTIONS, *[["of validation"]] * 7]
        tables = [
            arrow.table({"image": [{"bytes": png(n), "path": None} for n in part], "text": [told[n] for n in part]})
            for part in numbers
        ]
        with arrow.ipc.new_stream(str(folder / split / "data-00000-of-00001.arrow"), tables[0].schema) as out:
            for table in tables:
                out.write_table(table)


def img2dataset(folder: Path) -> None:
    folder.mkdir(parents=True)
    with tarfile.open(folder / "00000.tar", "w") as file:
        for n in range(3):
            record = json.dumps({"key": f"{n:09d}", "caption": "not this", "url": "https://x/y.jpg"})
            for end, data in (("png", png(n)), ("txt", CAPTIONS[n][0].encode()), ("json", record.encode())):
                header = tarfile.TarInfo(f"{n:09d}.{end}")
                header.size = len(data)
                file.addfile(header, io.BytesIO(data))
    write(folder, {"00000_stats.json": "{}"})


EVERY: Expected = list(enumerate(CAPTIONS))
FIRST: Expected = [(number, texts[:1]) for number, texts in EVERY]
SHAPES: dict[str, tuple[Callable[[Path], None], str, Expected, int]] = {
    "COCO": (coco, "coco", EVERY, 3),
    "Karpathy's COCO": (karpathy, "coco", EVERY, 1),
    "Flickr8k": (flickr8k, "table", EVERY, 0),
    "Flickr8k's token file": (flickr8k_token, "table", EVERY, 1),
    "Flickr30k": (flickr30k, "table", EVERY, 0),
    "a TSV": (tsv, "table", EVERY, 0),
    "metadata at any level": (metadata, "metadata", EVERY, 0),
    "kohya's captions": (kohya, "images", EVERY, 0),
    "kohya's meta_cap.json": (meta_cap, "captions-json", EVERY, 0),
    "a .json each": (sidecars, "images", EVERY, 0),
    "captions.jsonl": (captions_jsonl, "records", EVERY, 0),
    "the hub's parquet": (hub, "parquet", EVERY, 1),
    "columns of a caption each": (numbered_columns, "parquet", EVERY, 0),
    "save_to_disk": (saved_to_disk, "arrow", EVERY, 6),
    "img2dataset's tars": (img2dataset, "tar", FIRST, 1),
}
"""maker, reader, documents, and the files that are left out: of other splits, and not of images"""


@pytest.mark.parametrize("shape", list(SHAPES))
def test_a_shape_is_built_as_its_source_has_it(shape: str, tmp_path: Path) -> None:
    """By content alone, and the same with the reader's name; every file is read or in the list, with totals."""
    make, name, expected, left_out = SHAPES[shape]
    make(tmp_path / "source")
    config = BuildConfig(size=16, vocabulary=300, heldout=0.0)
    counts = build_set(str(tmp_path / "source"), tmp_path / "set", config, workers=0)
    data = DataSet(str(tmp_path / "set"))
    assert len(data) == len(expected)
    assert counts["faulty"] == 0
    for number, (image, captions) in enumerate(expected):
        stored = data.read(number)
        np.testing.assert_array_equal(data.decode(number, stored, stored.parts[0]), pixels(image))
        assert list(stored.parts[1:]) == captions
        assert stored.pair
    found = [path for path in (tmp_path / "source").rglob("*") if path.is_file()]
    listed = (tmp_path / "set" / "left_out.jsonl").read_text().splitlines()
    assert counts["files"] == {"found": len(found), "read": len(found) - left_out, "left out": left_out}
    assert len(listed) == left_out
    forced = open_source(str(tmp_path / "source"), Columns(reader=name))
    assert type(forced) is type(open_source(str(tmp_path / "source"), Columns()))


def read(source: Path, **columns: Any) -> list[tuple[Any, ...]]:
    reader = open_source(str(source), Columns(**columns))
    items = [item for part in reader.parts() for item in reader.read(part)]
    assert not [item for item in items if isinstance(item, Fault)]
    return [item.parts for item in items if isinstance(item, Raw)]


def test_a_split_is_chosen_and_never_merged_silently(tmp_path: Path) -> None:
    hub(tmp_path / "a")
    assert [parts[1:] for parts in read(tmp_path / "a", source_split="test")] == [("of the test",)]
    assert len(read(tmp_path / "a", source_split="all")) == 4
    with pytest.raises(UserError, match='expected a split "val", found test, train'):
        read(tmp_path / "a", source_split="val")
    write(tmp_path / "b", {"test/0.jsonl": lines({"text": "a"}), "dev/0.jsonl": lines({"text": "b"})})
    with pytest.raises(UserError, match=r"expected a split to take \(--source-split NAME, or all\), found test, valid"):
        read(tmp_path / "b")
    assert read(tmp_path / "b", source_split="validation") == [("b",)]
    with pytest.raises(UserError, match=r'0\.jsonl: expected a split "train", found no splits|found test, valid'):
        read(tmp_path / "b", source_split="train")
    karpathy(tmp_path / "c")
    with pytest.raises(UserError, match=r'coco\.json: expected a split "late" .* found test, train'):
        read(tmp_path / "c", source_split="late")
    assert [parts[1:] for parts in read(tmp_path / "c", source_split="test")] == [("of the test",)]


def by_split(folder: Path, kind: str, splits: list[str | None]) -> Path:
    """One file with a field "split": a document each, the number of which is its text."""
    rows = [{"text": f"number {n}", "split": split} for n, split in enumerate(splits)]
    if kind == "jsonl":
        return write(folder, {"all.jsonl": lines(*rows)})
    if kind == "json":
        return write(folder, {"all.json": json.dumps(rows)})
    if kind == "csv":
        images = {f"{n}.png": png(n) for n in range(len(rows))}
        told = "".join(f"{n}.png,{row['split'] or ''},{row['text']}\n" for n, row in enumerate(rows))
        return write(folder, {**images, "all.csv": f"file_name,split,text\n{told}"})
    folder.mkdir(parents=True)
    return write_table(folder, kind, pytest.importorskip("pyarrow").Table.from_pylist(rows), 2)


def write_table(folder: Path, kind: str, table: Any, group: int) -> Path:
    """Write a table as a parquet file with row groups of `group` rows, or as an Arrow stream of `save_to_disk`."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    if kind == "parquet":
        parquet.write_table(table, folder / "all.parquet", row_group_size=group)
    else:
        write(folder, {"state.json": "{}"})
        with arrow.ipc.new_stream(str(folder / "data.arrow"), table.schema) as out:
            out.write_table(table)
    return folder


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "arrow"])
def test_a_field_of_splits_is_never_merged_silently(
    tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    def numbers(folder: Path, **columns: Any) -> list[int]:
        return [int(str(parts[-1]).split()[-1]) for parts in read(folder, **columns)]

    source = by_split(tmp_path / "a", kind, ["train", "Val", "train", "extra", None, "test", "val"])
    assert numbers(source) == [0, 2, 4]
    line = capfd.readouterr().err
    assert "taking the split train, not 1 of extra, 1 of test, 2 of validation (--source-split takes another" in line
    assert numbers(source, source_split="validation") == numbers(source, source_split="dev") == [1, 4, 6]
    assert numbers(source, source_split="extra") == [3, 4]
    assert numbers(source, source_split="all") == [*range(7)]
    with pytest.raises(UserError, match=r'expected a split "late" .* found extra, test, train, validation'):
        numbers(source, source_split="late")
    with pytest.raises(UserError, match=r'expected a split "train".* found test, validation'):
        numbers(by_split(tmp_path / "b", kind, ["test", "val"]))
    assert numbers(by_split(tmp_path / "c", kind, ["test", "test"])) == [0, 1]
    years = by_split(tmp_path / "y", kind, ["train2014", "VAL_2014", " test", "Train "])
    assert numbers(years) == numbers(years, source_split="train2014") == [0, 3]
    assert numbers(by_split(tmp_path / "d", kind, ["left", "right"])) == [0, 1], "a field of something else"
    with pytest.raises(UserError, match="expected a split"):
        numbers(by_split(tmp_path / "e", kind, [None, None]), source_split="test")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("name", ["Split", "SPLIT", " split"])
def test_a_field_of_splits_in_any_case(tmp_path: Path, kind: str, name: str) -> None:
    rows = [{"text": f"number {n}", name: split} for n, split in enumerate(("test", "train", "val"))]
    if kind == "jsonl":
        write(tmp_path, {"all.jsonl": lines(*rows)})
    elif kind == "csv":
        told = "".join(f"{n}.png, {row[name]} ,{row['text']}\n" for n, row in enumerate(rows))
        write(tmp_path, {f"{n}.png": png(n) for n in range(3)} | {"all.csv": f"file_name,{name},text\n{told}"})
    else:
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "all.parquet")
    assert [parts[-1] for parts in read(tmp_path)] == ["number 1"]
    assert [parts[-1] for parts in read(tmp_path, source_split="validation")] == ["number 2"]


@pytest.mark.parametrize("kind", ["sidecars", "tar", "folders of a tar"])
def test_splits_next_to_images(tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    """By the field of a .json, or the folder in an archive."""
    told = ["train", "Val", "train2017"]
    files: dict[str, bytes] = {}
    for n, split in enumerate(told):
        name = f"{split}/{n}" if kind == "folders of a tar" else str(n)
        record = {"caption": f"n {n}"} | ({"split": split} if kind != "folders of a tar" else {})
        files |= {f"{name}.png": png(n), f"{name}.json": json.dumps(record).encode()}
    if kind == "sidecars":
        write(tmp_path, dict(files))
    else:
        with tarfile.open(tmp_path / "a.tar", "w") as file:
            for name, data in files.items():
                header = tarfile.TarInfo(name)
                header.size = len(data)
                file.addfile(header, io.BytesIO(data))
    assert [parts[1] for parts in read(tmp_path)] == ["n 0", "n 2"]
    assert "taking the split train, not 1 of validation" in capfd.readouterr().err
    assert [parts[1] for parts in read(tmp_path, source_split="val")] == ["n 1"]
    assert len(read(tmp_path, source_split="all")) == 3


def test_splits_that_are_classes_of_the_schema(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    classes = {"split": ["train", "test"], "label": ["dog", "cat"]}
    features = {name: {"names": names, "_type": "ClassLabel"} for name, names in classes.items()}
    table = arrow.table({"image": [png(n) for n in range(3)], "split": [1, 0, 0], "label": [0, 0, 1]})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path) == [(png(1), "dog"), (png(2), "cat")]
    assert read(tmp_path, source_split="test") == [(png(0), "dog")]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("paths", [True, False])
def test_images_that_a_table_of_the_hub_names_are_of_the_source(tmp_path: Path, kind: str, paths: bool) -> None:
    """They are among the files that are read, and a changed one is noticed."""
    arrow = pytest.importorskip("pyarrow")
    source = images(tmp_path, "images/{}.png")
    names = [f"images/{n}.png" for n in range(2)]
    kind_of = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())]) if paths else arrow.string()
    column = arrow.array([{"bytes": None, "path": name} if paths else name for name in names], kind_of)
    write_table(source, kind, arrow.table({"image": column, "text": ["a", "b"]}), 1)
    reader = open_source(str(source), Columns(image_column="" if paths else "image"))
    contents = reader.contents()
    assert reader.listing is not None
    left_out = reader.listing.left_out({*contents, *reader.names})
    assert [name for name in left_out if name.endswith("png")] == ["images/2.png"]
    write(source, {"images/1.png": png(9)})
    assert {name for name, content in reader.contents().items() if contents[name] != content} == {"images/1.png"}


def test_captions_in_files_with_endings_in_capitals(tmp_path: Path) -> None:
    images(tmp_path, "{}.PNG")
    write(tmp_path, {"0.TXT": "zero", "1.Caption": "one", "2.JSON": json.dumps({"caption": "two"})})
    assert read(tmp_path) == [(png(n), words) for n, words in enumerate(("zero", "one", "two"))]


def test_a_class_whose_folder_is_no_unicode(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "transfuse")  # a report with the folder's name cannot be sent between processes
    write(tmp_path / "source", {f"dog/{n}.png": png(n) for n in range(2)})
    folder = os.fsdecode(b"caf\xe9")
    write(tmp_path / "source", {f"{folder}/2.png": png(2)})
    counts = build_set(str(tmp_path / "source"), tmp_path / "set", BuildConfig(size=16, vocabulary=300), workers=0)
    assert (counts["documents"], counts["faulty"]) == (2, 1)


def test_images_next_to_a_set_of_text_are_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    images(tmp_path / "source")
    write(tmp_path / "source", {"notes.jsonl": lines({"text": "a note"})})
    build_set(str(tmp_path / "source"), tmp_path / "set", BuildConfig(size=16, vocabulary=300), workers=0)
    assert "3 images are named by no document (left_out.jsonl)" in capfd.readouterr().err


def test_splits_of_files_and_of_a_field_agree(tmp_path: Path) -> None:
    rows = {name: lines(*({"text": f"{name} {split}", "split": split} for split in ("train", "test"))) for name in "ab"}
    write(tmp_path, {"train-0.jsonl": rows["a"], "test-0.jsonl": rows["b"]})
    assert read(tmp_path) == [("a train",)]
    assert read(tmp_path, source_split="test") == [("b test",)]


@pytest.mark.parametrize("name", ["list.csv", "list.jsonl"])
@pytest.mark.parametrize("folders", [True, False])
def test_rows_of_images_in_folders_of_splits(tmp_path: Path, name: str, folders: bool) -> None:
    """One table for all splits: an image's folder tells its row's, whether the row has the folder or not."""
    write(tmp_path, {"train/0.png": png(0), "test/1.png": png(1), "2.png": png(2)})
    places = ["train/0.png", "test/1.png", "2.png"]
    rows = [{"file_name": place if folders else place[-5:], "text": f"n {n}"} for n, place in enumerate(places)]
    told = "file_name,text\n" + "".join(",".join(row.values()) + "\n" for row in rows)
    write(tmp_path, {name: told if name.endswith("csv") else lines(*rows)})
    assert read(tmp_path) == [(png(0), "n 0"), (png(2), "n 2")]
    assert read(tmp_path, source_split="test") == [(png(1), "n 1"), (png(2), "n 2")]
    assert len(read(tmp_path, source_split="all")) == 3
    reader = open_source(str(tmp_path), Columns())
    assert reader.listing is not None
    assert reader.listing.left_out({*reader.contents(), *reader.names}) == {"test/1.png": "of the split test"}


def test_an_image_called_train_is_of_no_split(tmp_path: Path) -> None:
    write(tmp_path, {f"{name}.png": png(n) for n, name in enumerate(("test", "train"))})
    write(tmp_path, {"test.txt": "a test", "train.txt": "a train"})
    assert read(tmp_path) == [(png(0), "a test"), (png(1), "a train")]
    names = ("a_val", "dev", "test")
    for ending in ("json", "png.txt", "caption"):
        folder = write(tmp_path / ending, {f"{name}.png": png(n) for n, name in enumerate(names)})
        for name in names:
            write(folder, {f"{name}.{ending}": json.dumps({"caption": name}) if ending == "json" else name})
        assert read(folder) == [(png(n), name) for n, name in enumerate(names)], ending
    write(tmp_path / "words", {"test.txt": "a test", "train.txt": "a train"})
    assert read(tmp_path / "words") == [("a train",)]
    with pytest.raises(UserError, match="expected a split"):
        read(write(tmp_path / "images", {"a.png": png(0), "a.txt": "a"}), source_split="test")


def test_an_animation_is_counted(tmp_path: Path) -> None:
    """The first frame is read, and the summary says so."""
    frames = [PIL.Image.fromarray(pixels(number)) for number in range(3)]
    for name, some in (("moving", frames), ("still", frames[:1])):
        frames[0].save(tmp_path / f"{name}.gif", save_all=True, append_images=some[1:])
        write(tmp_path, {f"{name}.txt": f"a {name} image"})
    frames[0].save(tmp_path / "pages.tif", save_all=True, append_images=frames[1:])
    write(tmp_path, {"pages.txt": "several pages"})
    config = BuildConfig(size=16, vocabulary=300, heldout=0.0)
    counts = build_set(str(tmp_path), tmp_path.with_name("animated"), config, workers=0)
    assert counts["changed"]["first of several frames"] == 2
    data = DataSet(str(tmp_path.with_name("animated")))
    stored = data.read(1)
    assert stored.parts[1] == "several pages"
    np.testing.assert_array_equal(data.decode(1, stored, stored.parts[0]), pixels(0))


def test_an_animation_that_is_cut_short_anywhere(tmp_path: Path) -> None:
    """Its first frame is read, or it is a fault with a name."""
    frames = [PIL.Image.fromarray(pixels(number)) for number in range(3)]
    stream = io.BytesIO()
    frames[0].save(stream, "gif", save_all=True, append_images=frames[1:])
    data = stream.getvalue()
    for cut in range(40, len(data), 40):
        write(tmp_path / "source", {f"{cut:05d}.gif": data[:cut], f"{cut:05d}.txt": f"cut at {cut}"})
    config = BuildConfig(size=16, vocabulary=300, heldout=0.0, duplicates="keep")
    counts = build_set(str(tmp_path / "source"), tmp_path / "set", config, workers=0, max_errors=1)
    assert counts["documents"] + counts["faulty"] == len(range(40, len(data), 40))
    assert min(counts["documents"], counts["faulty"], counts["changed"]["first of several frames"]) > 0


def test_folders_of_classes(tmp_path: Path) -> None:
    write(tmp_path, {f"{n % 2}0_red_{'ball' if n % 2 else 'box'}/{n}.png": png(n) for n in range(3)})
    template = "a photo of a {class}"
    boxes, ball = [(png(n), "a photo of a red box") for n in (0, 2)], (png(1), "a photo of a red ball")
    assert read(tmp_path, caption=template) == [*boxes, ball]
    assert [parts[1] for parts in read(tmp_path)] == ["red box", "red box", "red ball"]
    write(tmp_path, {"00_red_box/0.txt": "a caption"})  # where one image has a caption, all are to have one
    with pytest.raises(AssertionError):
        read(tmp_path)
    write(tmp_path / "years", {f"{year}/a.png": png(year) for year in (2019, 2020)})
    with pytest.raises(AssertionError):
        read(tmp_path / "years")
    with pytest.raises(ValueError, match=r"caption: expected words with one \{class\} in them"):
        Columns(caption="a photo")


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_classes_have_the_names_of_the_schema(tmp_path: Path, kind: str) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    features = {"image": {"_type": "Image"}, "label": {"names": ["tabby_cat", "dog"], "_type": "ClassLabel"}}
    table = arrow.table({"image": [{"bytes": png(n), "path": None} for n in range(3)], "label": [1, 0, 1]})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    if kind == "parquet":
        parquet.write_table(table, tmp_path / "a.parquet")
    else:
        write(tmp_path, {"state.json": "{}"})
        with arrow.ipc.new_stream(str(tmp_path / "data.arrow"), table.schema) as out:
            out.write_table(table)
    words = ["a dog", "a tabby cat", "a dog"]
    assert read(tmp_path, caption="a {class}") == [(png(n), text) for n, text in enumerate(words)]
    assert read(tmp_path)[1] == (png(1), "tabby cat")


TURNS = [["human", "<image>\nWhat is it?"], ["gpt", "A ball."], ["human", "Red?"], ["gpt", "Yes."]]


def turns(*spoken: list[str]) -> list[dict[str, str]]:
    return [{"from": who, "value": words} for who, words in spoken]


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_llavas_conversations_are_dialogues(tmp_path: Path, kind: str) -> None:
    """Who says what is kept: an image is in its turn, and only the assistant's words are learned."""
    records = [
        {"id": "a", "image": "train/1.png", "conversations": turns(*TURNS)},
        {"id": "b", "image": None, "conversations": turns(["system", "Be brief."], *TURNS[2:])},
        {"id": "c", "image": "train/2.png", "conversations": turns(["human", "Look."], ["gpt", "I do."])},
        {"id": "d", "image": "train/0.png", "conversations": turns(["human", "<image> <image>"], ["gpt", "No."])},
        {"id": "e", "image": None, "conversations": turns(["human", "Alone."])},
    ]
    source, out = tmp_path / "source", tmp_path / "set"
    images(source / "coco", "train/{}.png")
    if kind == "json":
        write(source, {"llava.json": json.dumps(records)})
    else:
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        held = [
            {**row, "image": row["image"] and {"bytes": png(int(row["image"][6])), "path": None}} for row in records
        ]
        parquet.write_table(arrow.Table.from_pylist(held), source / "llava.parquet")
    counts = build_set(str(source), out, BuildConfig(size=16, vocabulary=300, heldout=0.0), 0)
    assert (counts["documents"], counts["faulty"]) == (3, 2)
    data = DataSet(str(out))
    assert has_dialogues(data)
    stored = [data.read(number) for number in range(3)]
    spoken = [
        tuple(zip(one.roles, (p if isinstance(p, str) else "image" for p in one.parts), strict=True)) for one in stored
    ]
    user, assistant = "user", "assistant"
    assert spoken[0] == (
        *((user, "image"), (user, "What is it?"), (assistant, "A ball.")),
        *((user, "Red?"), (assistant, "Yes.")),
    )
    assert spoken[1] == (("system", "Be brief."), (user, "Red?"), (assistant, "Yes."))
    assert spoken[2] == ((user, "image"), (user, "Look."), (assistant, "I do."))
    np.testing.assert_array_equal(data.decode(2, stored[2], stored[2].parts[0]), pixels(2))
    source = StoredDialogues(data, data.tokenizer(), Pixels(), PairConfig(), seed=0)
    for index in range(3):
        document = source.document(index, 0)
        learned = [
            data.tokenizer().decode(part.ids) for part in document.parts if isinstance(part, Text) and part.predict
        ]
        assert learned in (["A ball.", "Yes."], ["Yes."], ["I do."])
        assert not any(image.target for image in document.images)


def test_conversations_may_be_taken_as_text_alone(tmp_path: Path) -> None:
    write(tmp_path, {"a.json": json.dumps([{"conversations": turns(*TURNS[2:])}])})
    assert read(tmp_path, reader="text") == [("Red?", "Yes.")]
    assert open_source(str(tmp_path), Columns(reader="text")).text_only


def test_documents_of_several_parts(tmp_path: Path) -> None:
    """MMC4's matched sentences, OBELICS' lists in parquet."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    info = [{"image_name": f"{n}.png", "matched_text_index": 1, "raw_url": "https://x/y.png"} for n in (0, 2)]
    images(tmp_path / "mmc4", "images/{}.png")
    write(tmp_path / "mmc4", {"docs_shard_0_v2.jsonl": lines({"text_list": ["one", "two"], "image_info": info})})
    assert read(tmp_path / "mmc4") == [("one", png(0), png(2), "two")]

    (tmp_path / "obelics").mkdir()
    bytes_of = [{"bytes": png(2), "path": None}, None, {"bytes": png(0), "path": None}]
    table = arrow.table({"images": [bytes_of], "texts": [[None, "between", None]], "metadata": ["[]"]})
    parquet.write_table(table, tmp_path / "obelics" / "a.parquet")
    assert read(tmp_path / "obelics") == [(png(2), "between", png(0))]


URL = "https://host.org/{}.jpg?size=1"
NO_IMAGES: dict[str, dict[str, Any] | str] = {
    "laion.parquet": {"URL": [URL, URL], "TEXT": ["a", "b"], "similarity": [0.3, 0.4]},
    "urls.parquet": {"url": ["https://host.org/a", "https://host.org/b"], "caption": ["a", "b"]},
    "named.parquet": {"text": ["a", "b"], "image_id": [1, 2]},
    "paths.parquet": {"text": ["a", "b"], "where": ["x/1.png", "x/2.png"]},
    "obelics.parquet": {"images": [[URL, None]], "texts": [[None, "a"]]},
    "urls.jsonl": lines({"url": URL, "caption": "a"}),
    "image_url.jsonl": lines({"image_url": "https://host.org/1", "text": "a"}),
    "image.jsonl": lines({"image": URL, "text": "a"}),
    "obelics.jsonl": lines({"images": [URL, None], "texts": [None, "a"]}),
    "mine.jsonl": lines({"img_path": "a.png", "text": "a"}),
    "urls.csv": f"url,caption\n{URL},a cat\n{URL},a dog\n",
    "cc3m.tsv": "a cat\thttps://host.org/1.jpg\na dog\thttps://host.org/2.jpg\n",
    "captions.txt": "image,caption\n1.jpg,a cat\n2.jpg,a dog\n",
    "metadata.jsonl": lines({"file_name": "gone.jpg", "text": "a"}),
    "captions_val2014.json": json.dumps(
        {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 1, "caption": "a"}]}
    ),
}


@pytest.mark.parametrize("name", list(NO_IMAGES))
@pytest.mark.parametrize("whole", [True, False])
def test_names_of_images_that_cannot_be_had_are_refused(tmp_path: Path, name: str, whole: bool) -> None:
    """Never taken for text alone without a word; the line says what to do."""
    content = NO_IMAGES[name]
    if isinstance(content, str):
        write(tmp_path, {name: content})
    else:
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.table(content), tmp_path / name)
    with pytest.raises(UserError, match=r"download them|--image-column|put them|in place of") as caught:
        read(tmp_path if whole else tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "columns",
    [
        {"text": ["a", "b"], "url": ["https://host.org/page", "https://host.org/2"], "date": ["1", "2"]},
        {"text": ["a", "b"], "path": ["src/a.py", "src/b.py"]},
    ],
)
def test_text_with_the_addresses_of_its_pages_stays_text(tmp_path: Path, columns: dict[str, list[str]]) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table(columns), tmp_path / "a.parquet")
    assert read(tmp_path) == [("a",), ("b",)]
    (tmp_path / "a.parquet").unlink()
    write(
        tmp_path,
        {"a.jsonl": lines(*(dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)))},
    )
    assert read(tmp_path) == [("a",), ("b",)]


def test_text_of_save_to_disk(tmp_path: Path) -> None:
    """Streams are read once: looking at the first rows takes none away."""
    arrow = pytest.importorskip("pyarrow")
    write(tmp_path, {"state.json": "{}"})
    tables = [arrow.table({"text": [f"{part} {n}" for n in range(3)]}) for part in range(2)]
    with arrow.ipc.new_stream(str(tmp_path / "data.arrow"), tables[0].schema) as out:
        for table in tables:
            out.write_table(table)
    assert read(tmp_path) == [(f"{part} {n}",) for part in range(2) for n in range(3)]


def test_tables_of_save_to_disk_are_those_that_it_lists(tmp_path: Path) -> None:
    """A cache that `datasets.map` left in the folder is no data; a table that is gone is noticed."""
    arrow = pytest.importorskip("pyarrow")
    names = [f"data-0000{n}-of-00002.arrow" for n in range(2)]
    for folder in ("train", "test"):
        state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "f", "_split": folder}
        write(tmp_path / folder, {"state.json": json.dumps(state), "trainer_state.json": "{}"})
        for name in (*names, "cache-0a1b2c.arrow"):
            table = arrow.table({"text": [f"{folder} {name[:10]}"]})
            with arrow.ipc.new_stream(str(tmp_path / folder / name), table.schema) as out:
                out.write_table(table)
    assert read(tmp_path) == [("train data-00000",), ("train data-00001",)]
    assert read(tmp_path / "test") == [("test data-00000",), ("test data-00001",)]
    reader = open_source(str(tmp_path / "test"), Columns())
    assert reader.listing is not None
    left_out = reader.listing.left_out({*reader.contents(), *reader.names})
    assert left_out["cache-0a1b2c.arrow"] == "not read by this reader (.arrow)"
    (tmp_path / "train" / names[1]).unlink()
    with pytest.raises(
        UserError, match=r"state\.json: expected the tables it lists, found no data-00001-of-00002\.arrow"
    ):
        read(tmp_path)
    assert len(read(tmp_path, source_split="test")) == 2


def test_text_alone_may_be_asked_for(tmp_path: Path) -> None:
    write(tmp_path, {"captions.txt": "image,caption\n1.jpg,a cat\n"})
    assert read(tmp_path, reader="text") == [("image,caption\n1.jpg,a cat",)]
    write(tmp_path / "b", {"a.jsonl": lines({"url": URL, "caption": "a"})})
    assert read(tmp_path / "b", reader="text") == read(tmp_path / "b" / "a.jsonl", reader="text") == [("a",)]
    write(tmp_path / "c", {"a.jsonl": lines({"images": ["gone.png"], "text": "a"})})
    assert read(tmp_path / "c", reader="text") == [("a",)]
    assert open_source(str(tmp_path / "c"), Columns(reader="text")).text_only
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"URL": [URL], "TEXT": ["a"]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", reader="text") == [("a",)]


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ({"a.zip": "x", "b.zip": "x", "c.pdf": "x"}, r"2 \.zip, 1 \.pdf; nearest: unpack"),
        ({"a.zip": "x", "b.rar": "x", "README.md": "Our data.", "licence.txt": "free"}, "nearest: unpack"),
        ({"a.svg": "<svg/>", ".hidden.png": "x"}, r"1 \.svg, 1 left aside; nearest: images: write them as PNG"),
        ({"a.json": '{"x": 1}'}, r"1 \.json; nearest: coco"),
        ({"a.csv": "x,y\n1,2\n"}, r"1 \.csv; nearest: table: name its columns with --image-column"),
        ({"a.mp4": "x"}, r"nearest: images: extract frames"),
    ],
)
def test_a_folder_that_no_reader_fits_says_what_is_in_it(tmp_path: Path, files: dict[str, str], what: str) -> None:
    with pytest.raises(UserError, match=what):
        read(write(tmp_path, dict(files)))


def test_a_stray_file_does_not_choose_the_reader(tmp_path: Path) -> None:
    """A log in jsonl or a table of something else next to images and their captions is left out."""
    images(tmp_path)
    write(tmp_path, {f"{n}.txt": CAPTIONS[n][0] for n in range(3)})
    write(tmp_path, {"log.jsonl": lines({"step": 1, "loss": 0.5}), "scores.csv": "run,score\na,1\n"})
    write(tmp_path, {"boxes.json": json.dumps([{"id": n, "category_id": 3, "area": 0.5} for n in range(4)])})
    assert read(tmp_path) == [(png(n), CAPTIONS[n][0]) for n in range(3)]
    reader = open_source(str(tmp_path), Columns())
    assert reader.listing is not None
    left_out = reader.listing.left_out({*reader.contents(), *reader.names})
    assert list(left_out) == ["boxes.json", "log.jsonl", "scores.csv"]
    write(tmp_path, {"more.json": json.dumps([{"parts": [{"text": "a list of documents"}]}])})
    assert read(tmp_path) == [(png(n), CAPTIONS[n][0]) for n in range(3)], "nor does a list of texts"
    assert read(tmp_path, reader="records") == [("a list of documents",)]


def test_an_image_that_two_files_may_be(tmp_path: Path) -> None:
    write(tmp_path, {"a/0.png": png(0), "b/0.png": png(1), "list.csv": "file_name,text\n0.png,which\na/0.png,this\n"})
    reader = open_source(str(tmp_path), Columns())
    items = [item for part in reader.parts() for item in reader.read(part)]
    assert [item.parts for item in items if isinstance(item, Raw)] == [(png(0), "this")]
    faults = {item.key: item.reason for item in items if isinstance(item, Fault)}
    assert faults["0.png"] == "expected one file of this name, found a/0.png, b/0.png"
    assert "b/0.png" in faults


def told(source: Path, **columns: Any) -> tuple[list[tuple[Any, ...]], dict[str, str]]:
    """Return the documents of a source, and its faults by name."""
    reader = open_source(str(source), Columns(**columns))
    items = [item for part in reader.parts() for item in reader.read(part)]
    faults = {item.key: item.reason for item in items if isinstance(item, Fault)}
    assert len(faults) == sum(isinstance(item, Fault) for item in items), "each is named once"
    return [item.parts for item in items if isinstance(item, Raw)], faults


@pytest.mark.parametrize("kind", ["csv", "jsonl", "metadata.jsonl"])
def test_the_caption_of_a_missing_image_goes_to_no_other_of_its_name(tmp_path: Path, kind: str) -> None:
    """Of three folders one lacks an image that another has; the table says which is meant."""
    places = ["red/a.png", "red/b.png", "deep/blue/b.png", "green/c.png"]
    write(tmp_path, {place: png(n) for n, place in enumerate(places)})
    rows = [{"file_name": place, "text": place} for place in ("blue/a.png", "red/a.png", "blue/b.png", "red/b.png")]
    rows += [
        {"file_name": str(tmp_path / "red" / "c.png"), "text": "gone"},
        {"file_name": "green/c.png", "text": "sea"},
    ]
    if kind == "csv":
        content = "file_name,text\n" + "".join(",".join(row.values()) + "\n" for row in rows)
    else:
        content = lines(*rows)
    write(tmp_path, {kind if "." in kind else f"list.{kind}": content})
    documents, faults = told(tmp_path)
    expected = [(png(0), "red/a.png"), (png(2), "blue/b.png"), (png(1), "red/b.png"), (png(3), "sea")]
    assert documents == expected
    assert len(faults) == 2
    assert all("No such file" in reason or "found none" in reason for reason in faults.values())


def test_folders_that_have_moved_as_a_whole_are_found(tmp_path: Path) -> None:
    """Neither a folder more, nor less, nor one of another name makes an image missing."""
    for case, (place, named) in enumerate(
        [
            ("{}.png", "images/{}.png"),
            ("part/{}.png", "images/{}.png"),
            ("more/part/{}.png", "/home/me/More/part/{}.png"),
            ("part/{}.png", "C:\\photos\\PART\\{}.png"),
        ]
    ):
        source = images(tmp_path / str(case), place)
        write(source, {"list.csv": "file_name,text\n" + "".join(f"{named.format(n)},n {n}\n" for n in range(3))})
        if case in (0, 2):
            write(source, {"thumbs/small.png": png(9)})
        documents, faults = told(source)
        assert documents == [(png(n), f"n {n}") for n in range(3)], named
        assert list(faults) == (["thumbs/small.png"] if case in (0, 2) else [])


def test_a_row_of_another_folder_than_the_images_own_row_is_of_a_missing_image(tmp_path: Path) -> None:
    """There is one folder of images only, so the names of folders alone do not tell."""
    images(tmp_path, "birds/{}.png")
    rows = ["fish/1.png,a carp", "birds/1.png,a wren", "birds/1.png,a small wren", "fish/2.png,found elsewhere"]
    write(tmp_path, {"list.csv": "\n".join(["file_name,text", *rows])})
    documents, faults = told(tmp_path)
    assert documents == [(png(1), "a wren", "a small wren"), (png(2), "found elsewhere")]
    assert set(faults) == {"fish/1.png", "birds/0.png"}


def test_tables_in_folders_of_images_name_those(tmp_path: Path) -> None:
    for number, name in enumerate(("one", "two")):
        write(tmp_path / name, {f"{name}.png": png(number), "metadata.csv": f"file_name,text\n{name}.png,{name}\n"})
    write(tmp_path, {"one/metadata.csv": "file_name,text\none.png,one\ntwo.png,not here\n"})
    documents, faults = told(tmp_path)
    assert documents == [(png(0), "one"), (png(1), "two")]
    assert list(faults) == ["one/two.png"]
    write(tmp_path / "apart", {"lists/all.csv": "file_name,text\na.png,eh\nb.png,bee\n", "x/a.png": png(3)})
    write(tmp_path / "apart", {"y/b.png": png(4)})
    assert told(tmp_path / "apart") == ([(png(3), "eh"), (png(4), "bee")], {})


def test_a_row_without_a_caption_is_a_fault_whatever_others_its_image_has(tmp_path: Path) -> None:
    """As in a list in which a mark is missing: the image is kept with its other captions, and counted as lost once."""
    images(tmp_path / "a")
    rows = ["0.png| 0| one", "0.png| 1 two", "0.png| 2| three", "1.png| 0 four", "1.png| 1 five", "2.png| 0| six"]
    write(tmp_path / "a", {"list.csv": "\n".join(["image_name| comment_number| comment", *rows])})
    documents, faults = told(tmp_path / "a")
    assert documents == [(png(0), "one", "three"), (png(2), "six")]
    none = "expected a caption, found none"
    assert faults == {"0.png": none, "1.png": f"{none} (and 1 more of its rows)"}


@pytest.mark.parametrize("place", ["deep/folder", "lists"])
def test_a_faulty_row_is_counted_once(tmp_path: Path, place: str) -> None:
    """Also where its image is in another folder than the table, or the table calls it otherwise."""
    images(tmp_path, f"{place}/{{}}.png")
    records = [
        {"file_name": "0", "text": "eh"},
        {"file_name": f"/home/me/{place}/1.png", "text": ["bee", 3]},
        {"file_name": "2.png", "text": 5},
        {"file_name": "2.png", "text": ""},
    ]
    write(tmp_path, {"lists/metadata.jsonl": lines(*records)})
    documents, faults = told(tmp_path)
    assert documents == [(png(0), "eh")]
    assert list(faults) == [f"{place}/1.png", f"{place}/2.png"]
    assert all(reason.startswith("expected words in text, found") for reason in faults.values())


def test_a_faulty_row_of_an_image_of_another_split_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path, {"train/0.png": png(0), "test/1.png": png(1), "test/2.png": png(2)})
    write(tmp_path, {"list.csv": "file_name,text\ntrain/0.png,eh\ntest/1.png,\n2.png,sea\n"})
    assert told(tmp_path) == ([(png(0), "eh")], {})


def test_captions_of_coco_may_be_in_several_files(tmp_path: Path) -> None:
    """Each lists all images: one without captions in a file is no fault."""
    images(tmp_path)
    listed = [{"id": n, "file_name": f"{n}.png"} for n in range(3)]
    for name, numbers in (("one", (0, 1)), ("two", (1, 2))):
        written = [{"image_id": n, "caption": f"{name} {n}"} for n in numbers]
        write(tmp_path, {f"captions_{name}.json": json.dumps({"images": listed, "annotations": written})})
    expected = [(png(0), "one 0"), (png(1), "one 1", "two 1"), (png(2), "two 2")]
    assert told(tmp_path) == (expected, {})


def test_the_readers_names_are_the_options(tmp_path: Path) -> None:
    names = [form.name for form in FORMATS]
    assert len(set(names)) == len(names)
    with pytest.raises(UserError, match=f"--reader: expected one of {', '.join(names)}, found cocoa"):
        open_source(str(tmp_path), Columns(reader="cocoa"))
    with pytest.raises(UserError, match=r"expected COCO's or Karpathy's captions in \.json, and images, found a"):
        open_source(str(images(tmp_path)), Columns(reader="coco"))
