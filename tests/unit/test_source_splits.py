"""The table and the split that an image belongs to, by lists of names and by fields, and the reasons for the rest."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from test_source_pairing import open_folder, pairs, read

from transfuse.data.building import build_set
from transfuse.data.building.prepare import BuildConfig
from transfuse.data.readers import Reader
from transfuse.errors import UserError

BIRDS = ("crow", "duck", "gull", "hawk", "kite", "wren")


def left_out(reader: Reader) -> dict[str, str]:
    """Return why files of a folder are left out, as a build lists it."""
    assert reader.listing is not None
    contents = reader.contents()
    return reader.listing.left_out({*contents, *reader.names})


def keys(reader: Reader) -> set[str]:
    documents, faults = read(reader)
    assert not faults
    return {str(raw.parts[1]) for raw in documents}


def table(kind: str, rows: dict[str, str]) -> Any:
    """Return a table of names and captions: .csv with a head, .tsv without, .jsonl, or .json by names."""
    if kind.endswith(".csv"):
        return "file_name,text\n" + "".join(f"{name},{text}\n" for name, text in rows.items())
    if kind.endswith(".tsv"):
        return "".join(f"{name}\t{text}\n" for name, text in rows.items())
    if kind.endswith(".jsonl"):
        return [{"file_name": name, "text": text} for name, text in rows.items()]
    return {name: {"caption": text} for name, text in rows.items()}


KINDS = ("metadata.csv", "list.csv", "metadata.jsonl", "records.jsonl", "list.tsv", "meta_cap.json")


# --- a caption is of an image that its own table can mean -------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inside", ["", "pictures/"])
def test_tables_of_two_folders_tell_of_their_own_images(tmp_path: Path, kind: str, inside: str) -> None:
    """The second folder has lost its images; none of its captions goes to those of the first."""
    files: dict[str, Any] = {f"north/{inside}{name}.png": name.encode() for name in "ab"}
    files[f"north/{kind}"] = table(kind, {f"{inside}a.png": "north a", f"{inside}b.png": "north b"})
    files[f"south/{kind}"] = table(kind, {f"{inside}a.png": "south a", f"{inside}c.png": "south c"})
    documents, faults = read(open_folder(tmp_path, files))
    assert {raw.parts for raw in documents} == {(b"a", "north a"), (b"b", "north b")}
    assert len(faults) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_tables_apart_from_the_images_tell_of_them(tmp_path: Path, kind: str) -> None:
    files: dict[str, Any] = {f"photos/{name}.png": name.encode() for name in "ab"}
    files[f"words/{kind}"] = table(kind, {"a.png": "first a", "b.png": "first b"})
    files[f"more/{kind}"] = table(kind, {"a.png": "second a"})
    documents, faults = read(open_folder(tmp_path, files))
    assert not faults
    assert {text for raw in documents for text in raw.parts[1:]} == {"first a", "first b", "second a"}


def test_a_table_next_to_others_may_have_lost_all_its_images(tmp_path: Path) -> None:
    files = {"a.png": b"a", "good.csv": "file_name,text\na.png,here\n", "stray.csv": "file_name,text\nz.png,gone\n"}
    documents, faults = read(open_folder(tmp_path, files))
    assert [raw.parts for raw in documents] == [(b"a", "here")]
    assert [*faults] == ["z.png"]


def test_images_that_no_table_names_have_the_captions_next_to_them(tmp_path: Path) -> None:
    files = {f"{name}.png": name.encode() for name in "abc"} | {"a.txt": "of a", "b.txt": "of b"}
    files |= {"extra.csv": "file_name,text\nc.png,of c\n"}
    assert pairs(open_folder(tmp_path, files)) == {b"a": ("of a",), b"b": ("of b",), b"c": ("of c",)}


@pytest.mark.parametrize("old", ["/home/somebody/pets", "E:\\pets", "/mnt"])
@pytest.mark.parametrize("new", ["", "animals/all/"])
def test_absolute_paths_of_folders_that_have_moved(tmp_path: Path, old: str, new: str) -> None:
    mark = "\\" if "\\" in old else "/"
    places = [f"{folder}/{name}.png" for folder in ("cats", "dogs") for name in "abc"]
    files: dict[str, Any] = {f"{new}{place}": place.encode() for place in places[:-1]}
    files["list.csv"] = table("list.csv", {mark.join([old, *place.split("/")]): place for place in places})
    documents, faults = read(open_folder(tmp_path, files))
    assert {raw.parts for raw in documents} == {(place.encode(), place) for place in places[:-1]}
    assert len(faults) == 1, "the image that is missing"


def test_names_without_endings_are_of_the_tables_folder(tmp_path: Path) -> None:
    files: dict[str, Any] = {f"{folder}/{name}.png": (folder + name).encode() for folder in "xy" for name in "12"}
    files |= {f"{folder}/meta_cap.json": {name: {"caption": folder + name} for name in "12"} for folder in "xy"}
    assert pairs(open_folder(tmp_path, files)) == {
        (folder + name).encode(): (folder + name,) for folder in "xy" for name in "12"
    }


@pytest.mark.parametrize("kind", ["list.csv", "metadata.csv", "metadata.jsonl", "records.jsonl", "list.tsv"])
def test_lines_that_end_in_carriage_returns(tmp_path: Path, kind: str) -> None:
    rows = table(kind, {f"{name}.png": f"of {name}" for name in "abc"})
    text = "\n".join(map(json.dumps, rows)) if isinstance(rows, list) else rows
    files = {f"{name}.png": name.encode() for name in "abc"} | {kind: text.replace("\n", "\r")}
    assert pairs(open_folder(tmp_path, files)) == {name.encode(): (f"of {name}",) for name in "abc"}


def test_text_whose_lines_end_in_carriage_returns(tmp_path: Path) -> None:
    documents, faults = read(open_folder(tmp_path, {"prose.txt": "one\rtwo\r\rthree\r"}, split="line"))
    assert not faults
    assert [(raw.key, raw.parts) for raw in documents] == [
        ("prose.txt:1", ("one",)),
        ("prose.txt:2", ("two",)),
        ("prose.txt:4", ("three",)),
    ]


@pytest.mark.parametrize("blank", ["\u200b", "\u2060\u200e", "\ufe0f\u00ad", "\u3000\u2800"])
@pytest.mark.parametrize("kind", ["list.csv", "records.jsonl", "next to it"])
def test_captions_of_which_nothing_is_seen_are_none(tmp_path: Path, blank: str, kind: str) -> None:
    captions = {"a.png": blank, "b.png": f"seen{blank}"}
    files: dict[str, Any] = {f"{name}.png": name.encode() for name in "ab"}
    files |= {"a.txt": blank, "b.txt": f"seen{blank}"} if kind == "next to it" else {kind: table(kind, captions)}
    documents, faults = read(open_folder(tmp_path, files))
    assert [raw.parts[0] for raw in documents] == [b"b"]
    assert len(faults) == 1
    assert "caption" in next(iter(faults.values()))


def test_boxes_next_to_images_are_no_captions(tmp_path: Path) -> None:
    files: dict[str, Any] = {f"{name}.png": name.encode() for name in "abc"}
    files |= {"a.txt": "0 0.5 0.25 0.1 0.2\n3 0.1 0.1 0.02 1\n", "b.txt": "7", "c.txt": "a 0.5 by 0.25 field"}
    documents, faults = read(open_folder(tmp_path, files))
    assert [raw.parts[1] for raw in documents] == ["7", "a 0.5 by 0.25 field"]
    assert "numbers" in faults["a.png"]


@pytest.mark.parametrize("kind", ["deep/photos/{}.png deep/captions/{}.txt", "{}.png txt/{}.caption"])
def test_captions_may_be_in_a_folder_that_mirrors_the_images_one(tmp_path: Path, kind: str) -> None:
    image, text = kind.split()
    places = ("red/1", "red/2", "green/1")
    files = {image.format(place): place.encode() for place in places} | {text.format(place): place for place in places}
    assert pairs(open_folder(tmp_path, files)) == {place.encode(): (place,) for place in places}


@pytest.mark.parametrize(("folder", "text"), [("others", "of others"), ("labels", "0 0.1 0.2 0.3 0.4\n")])
def test_other_folders_with_texts_are_of_no_image(tmp_path: Path, folder: str, text: str) -> None:
    documents, faults = read(
        open_folder(tmp_path, {"photos/1.png": b"1", "photos/2.png": b"2", f"{folder}/1.txt": text})
    )
    assert not documents
    assert len(faults) == 2


# --- lists of names are splits ----------------------------------------------------------------------------------------


def birds(kind: str) -> dict[str, Any]:
    """Return images with captions in a shape."""
    files: dict[str, Any] = {f"photos/{name}.jpg": name.encode() for name in BIRDS}
    if kind == "next to it":
        return files | {f"photos/{name}.txt": name for name in BIRDS}
    return files | {kind: table(kind, {f"photos/{name}.jpg": name for name in BIRDS})}


@pytest.mark.parametrize("kind", ["list.csv", "records.jsonl", "next to it", "photos.json"])
@pytest.mark.parametrize("form", ["{}", "{}.jpg", "photos/{}.jpg", "/old/photos/{}.jpg", "{}.jpg 1"])
@pytest.mark.parametrize("lists", ["{}.txt", "splits/{}.lst", "bird_{}_ids.txt", "Birds.{}Images.txt"])
def test_lists_of_names_are_splits(tmp_path: Path, kind: str, form: str, lists: str) -> None:
    parts = {"train": BIRDS[:3], "val": BIRDS[3:4], "test": BIRDS[4:5]}
    named = {lists.format(split): "\n".join(map(form.format, names)) for split, names in parts.items()}
    train, test = (open_folder(tmp_path, birds(kind) | named, source_split=split) for split in ("", "test"))
    assert keys(train) == {*BIRDS[:3]}
    assert keys(test) == {BIRDS[4]}
    assert keys(open_folder(tmp_path, {}, source_split="all")) == {*BIRDS}
    reasons = left_out(train)
    assert reasons[f"photos/{BIRDS[3]}.jpg"] == "of the split validation"
    assert reasons[f"photos/{BIRDS[5]}.jpg"] == "in no list of the names of a split"
    assert {reasons[name] for name in named} == {
        f"list of the images of the split {split}" for split in ("train", "validation", "test")
    }


def test_one_file_of_json_may_have_all_lists(tmp_path: Path) -> None:
    lists = {"train": BIRDS[:3], "Val": [f"{BIRDS[3]}.jpg"], "test": BIRDS[4:]}
    reader = open_folder(tmp_path, birds("list.csv") | {"split/birds.json": lists})
    assert keys(reader) == {*BIRDS[:3]}
    reasons = left_out(reader)
    assert reasons["split/birds.json"] == "lists of the images of the splits train, validation, test"
    assert reasons[f"photos/{BIRDS[3]}.jpg"] == "of the split validation"


@pytest.mark.parametrize("kind", ["next to it", "metadata.jsonl"])
@pytest.mark.parametrize(
    "form", ["{split}.csv", "{split}.json", "numbers/{split}.txt", "labels/{split}.txt", "split.csv", "zhou_split.json"]
)
def test_lists_with_more_than_names(tmp_path: Path, kind: str, form: str) -> None:
    parts = {"train": BIRDS[:3], "test": BIRDS[3:]}
    if kind != "next to it" and form.startswith("labels"):
        pytest.skip("a word after a name may be its caption")
    files = birds(kind)
    for split, names in parts.items():
        match form:
            case "{split}.csv":
                files[f"{split}.csv"] = "image,label\n" + "".join(f"photos/{name}.jpg,bird\n" for name in names)
            case "{split}.json":
                files[f"{split}.json"] = json.dumps([f"photos/{name}.jpg" for name in names])
            case "numbers/{split}.txt":
                files[f"lists/{split}.txt"] = "".join(f"{name} 1 2 3\n" for name in names)
            case "labels/{split}.txt":
                files[f"{split}.txt"] = "".join(f"{name}.jpg bird\n" for name in names)
    if form == "split.csv":
        rows = "".join(f"{name}.jpg,{split}\n" for split, names in parts.items() for name in names)
        files["split.csv"] = f"image,split\n{rows}"
    if form == "zhou_split.json":
        lists = {split: [[f"photos/{name}.jpg", 3, "bird"] for name in names] for split, names in parts.items()}
        files["zhou_split.json"] = lists
    assert keys(open_folder(tmp_path, files)) == {*BIRDS[:3]}
    assert keys(open_folder(tmp_path, {}, source_split="test")) == {*BIRDS[3:]}


def test_celebas_partition_has_all_splits(tmp_path: Path) -> None:
    lines = "".join(f"{name}.jpg {number}\n" for name, number in zip(BIRDS, "000122", strict=True))
    files = birds("next to it") | {"list_eval_partition.txt": lines}
    reader = open_folder(tmp_path, files)
    assert keys(reader) == {*BIRDS[:3]}
    assert left_out(reader)[f"photos/{BIRDS[3]}.jpg"] == "of the split validation"


def test_a_word_after_a_name_is_a_caption_where_there_is_no_other(tmp_path: Path) -> None:
    photos = {name: text for name, text in birds("list.csv").items() if name != "list.csv"}
    reader = open_folder(tmp_path, photos | {"train.txt": "".join(f"photos/{name}.jpg\t{name}\n" for name in BIRDS)})
    assert keys(reader) == {*BIRDS}


def test_images_in_no_list_are_of_training_where_it_has_none(tmp_path: Path) -> None:
    reader = open_folder(tmp_path, birds("list.csv") | {"testing_list.txt": "duck.jpg\nwren.jpg\n"})
    assert keys(reader) == {*BIRDS} - {"duck", "wren"}


def test_an_image_in_two_lists_is_held_back_from_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lists = {"trainval.txt": "crow\nduck\ngull", "train.txt": "crow\nduck", "val.txt": "gull", "test.txt": "duck\nhawk"}
    with caplog.at_level(logging.INFO):
        assert keys(open_folder(tmp_path, birds("list.csv") | lists)) == {"crow"}
    assert "1 images are in lists of several splits" in caplog.text


def test_a_list_of_all_images_is_no_split(tmp_path: Path) -> None:
    files = birds("next to it") | {"list_eval_partition.txt": "".join(f"{name}.jpg 2\n" for name in BIRDS)}
    reader = open_folder(tmp_path, files)
    assert keys(reader) == {*BIRDS}
    assert "split" not in left_out(reader)["list_eval_partition.txt"]


def test_a_column_of_names_without_endings_may_be_named(tmp_path: Path) -> None:
    files = {"in/1.png": b"1", "in/2.png": b"2", "list.csv": "id,text\n1,one\n2,two\n"}
    assert pairs(open_folder(tmp_path, files, image_column="id")) == {b"1": ("one",), b"2": ("two",)}


def test_words_in_a_file_called_train_are_no_list(tmp_path: Path) -> None:
    files = birds("next to it") | {"train.txt": "The crow\nand the duck\nwere trained.\n"}
    reader = open_folder(tmp_path, files)
    assert keys(reader) == {*BIRDS}
    assert left_out(reader) == {"train.txt": "text of no image"}


def test_flickr8k_as_it_is_distributed(tmp_path: Path) -> None:
    names = [f"{number}_{number:06x}.jpg" for number in range(20, 26)]
    files: dict[str, Any] = {f"Flicker8k_Dataset/{name}": name.encode() for name in names}
    text = "Flickr8k_text/"
    files |= {
        f"{text}Flickr8k.token.txt": "".join(f"{name}#{n}\tTwo dogs ran {n} .\n" for name in names for n in range(2)),
        f"{text}Flickr8k.lemma.token.txt": "".join(f"{name}#0\tTwo dog run .\n" for name in names),
        f"{text}CrowdFlowerAnnotations.txt": "".join(f"{name}\t{names[0]}#1\t0.3333\t1\t2\n" for name in names),
        f"{text}ExpertAnnotations.txt": "".join(f"{name}\t{names[1]}#1\t1\t1\t2\n" for name in names),
        f"{text}Flickr_8k.trainImages.txt": "\n".join(names[:4]),
        f"{text}Flickr_8k.devImages.txt": names[4],
        f"{text}Flickr_8k.testImages.txt": names[5],
        f"{text}readme.txt": "Please cite the authors.",
    }
    reader = open_folder(tmp_path, files)
    captions = ("Two dogs ran 0 .", "Two dogs ran 1 .")
    assert pairs(reader) == {name.encode(): captions for name in names[:4]}
    reasons = left_out(reader)
    assert reasons[f"{text}CrowdFlowerAnnotations.txt"] == "list of images without captions"
    assert reasons[f"{text}ExpertAnnotations.txt"] == "list of images without captions"
    assert "in another form" in reasons[f"{text}Flickr8k.lemma.token.txt"]
    assert reasons[f"Flicker8k_Dataset/{names[5]}"] == "of the split test"


def test_tables_without_captions_stand_aside(tmp_path: Path) -> None:
    files = {"a.png": b"a", "words.csv": "file_name,text\na.png,seen\n", "sizes.csv": "file_name,width\na.png,64\n"}
    reader = open_folder(tmp_path, files)
    assert pairs(reader) == {b"a": ("seen",)}
    assert left_out(reader) == {"sizes.csv": "table of images without captions: file_name, width"}


# --- fields of splits -------------------------------------------------------------------------------------------------


def field(kind: str, name: str, values: list[Any]) -> dict[str, Any]:
    """Return images and a table that has a field with these values."""
    files: dict[str, Any] = {f"{bird}.png": bird.encode() for bird in BIRDS}
    if kind == "csv":
        rows = "".join(f"{bird}.png,{bird},{value}\n" for bird, value in zip(BIRDS, values, strict=True))
        return files | {"list.csv": f"file_name,text,{name}\n{rows}"}
    if kind == "jsonl":
        pairs_of = zip(BIRDS, values, strict=True)
        records = [{"image": f"{bird}.png", "text": bird, name: value} for bird, value in pairs_of]
        return files | {"records.jsonl": records}
    files |= {f"{bird}.txt": bird for bird in BIRDS}
    return files | {f"{bird}.json": {name: value} for bird, value in zip(BIRDS, values, strict=True)}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "next to it"])
@pytest.mark.parametrize(
    ("name", "values", "taken"),
    [
        ("subset", ["train"] * 4 + ["dev", "eval"], 4),
        ("Partition", ["trainval"] * 3 + ["testA", "testA", "testB"], 3),
        ("split", ["testA", "trainval", "testB", "trainval", "val", "train"], 1),
    ],
)
def test_fields_and_values_of_splits(tmp_path: Path, kind: str, name: str, values: list[Any], taken: int) -> None:
    reader = open_folder(tmp_path, field(kind, name, values))
    assert len(keys(reader)) == taken
    expected = {bird: value.lower() for bird, value in zip(BIRDS, values, strict=True)}
    usual = {"dev": "validation", "val": "validation", "eval": "test"}
    reasons = {file: why for file, why in left_out(reader).items() if file.endswith(".png")}
    assert len(reasons) == len(BIRDS) - taken
    for file, why in reasons.items():
        value = expected[file.removesuffix(".png")]
        assert why == f"of the split {usual.get(value, value)}"


@pytest.mark.parametrize("kind", ["csv", "jsonl", "next to it"])
@pytest.mark.parametrize("values", [[0, 0, 0, 0, 1, 2], ["a", "a", "b", "b", "c", "c"]])
def test_values_that_are_no_usual_splits_are_told(
    tmp_path: Path, kind: str, values: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    files = field(kind, "split", values)
    with caplog.at_level(logging.INFO):
        assert len(keys(open_folder(tmp_path, files))) == len(BIRDS)
    assert f"{values.count(values[0])} of {values[0]}" in caplog.text
    assert "no usual name" in caplog.text
    last = open_folder(tmp_path, files, source_split=str(values[-1]))
    assert len(keys(last)) == values.count(values[-1])


@pytest.mark.parametrize("kind", ["list.csv", "records.jsonl", "photos.json"])
def test_images_that_the_table_of_another_split_names(tmp_path: Path, kind: str) -> None:
    stem, ending = kind.split(".")
    files = {name: content for name, content in birds(kind).items() if name != kind}
    for split, names in (("train", BIRDS[:4]), ("test", BIRDS[4:5])):
        files[f"{split}_{stem}.{ending}"] = table(kind, {f"photos/{name}.jpg": name for name in names})
    reader = open_folder(tmp_path, files)
    documents, faults = read(reader)
    assert {raw.parts[1] for raw in documents} == {*BIRDS[:4]}
    assert [*faults] == ([] if kind == "records.jsonl" else ["photos/wren.jpg"])
    assert left_out(reader)[f"photos/{BIRDS[4]}.jpg"] == "of the split test"


# --- what a build says ------------------------------------------------------------------------------------------------


def test_the_commonest_reason_is_told_where_nothing_is_left(tmp_path: Path) -> None:
    files = {f"{number}.png": b"no image" for number in range(30)} | {f"{number}.txt": "a" for number in range(28)}
    open_folder(tmp_path / "in", files)
    with pytest.raises(UserError, match=r"28 for one reason, such as 0\.png: .*expected") as error:
        build_set(str(tmp_path / "in"), tmp_path / "out", BuildConfig(size=8), workers=0, max_errors=1)
    assert "\n" not in str(error.value)


def test_a_second_build_in_a_folder_is_refused(tmp_path: Path) -> None:
    """Reading the first image starts a second build of the same set."""
    stream = io.BytesIO()
    PIL.Image.new("RGB", (8, 8), "red").save(stream, "png")
    open_folder(tmp_path / "in", {"a.png": stream.getvalue(), "a.txt": "red"})
    refused: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if not refused:
                refused.append("")
                with pytest.raises(UserError) as error:
                    build_set(str(tmp_path / "in"), tmp_path / "out", BuildConfig(size=8), workers=0)
                refused.append(str(error.value))

    listener = Listener()
    logging.getLogger("transfuse").addHandler(listener)
    try:
        counts = build_set(str(tmp_path / "in"), tmp_path / "out", BuildConfig(size=8), workers=0)
    finally:
        logging.getLogger("transfuse").removeHandler(listener)
    assert counts["documents"] == 1
    assert "found another build at it" in refused[1]
    assert not (tmp_path / "out" / ".lock").exists()
