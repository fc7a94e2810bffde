"""The image and the split that a source's words belong to: never another one, and a line names what is left out."""

from __future__ import annotations

import gzip
import io
import json
import logging
import tarfile
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from conftest import write

from transfuse.data.readers import Columns, Fault, Raw, Reader, open_source
from transfuse.data.remote import Cache
from transfuse.errors import UserError

IMAGES = {f"{name}.png": name.encode() for name in "abc"}


def open_folder(folder: Path, files: dict[str, Any], **columns: Any) -> Reader:
    """Write files, lists of them as lines of JSON and other values as JSON, and open the folder."""
    for name, content in files.items():
        if isinstance(content, list):
            content = "\n".join(map(json.dumps, content))
        write(folder, {name: content if isinstance(content, str | bytes) else json.dumps(content)})
    return open_source(str(folder), Columns(**columns))


def read(reader: Reader) -> tuple[list[Raw], dict[str, str]]:
    """Return documents and faults, as a build gets them."""
    reader.contents()
    items = [item for part in reader.parts() for item in reader.read(part)]
    faults = {item.key: item.reason for item in items if isinstance(item, Fault)}
    return [item for item in items if isinstance(item, Raw)], faults


def pairs(reader: Reader) -> dict[bytes, tuple[Any, ...]]:
    """Return captions by image; there are no faults."""
    documents, faults = read(reader)
    assert not faults
    return {raw.parts[0]: raw.parts[1:] for raw in documents}


def parquet(path: Path, rows: dict[str, list[Any]]) -> None:
    arrow, tables = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    tables.write_table(arrow.table(rows), path)


def tar(path: Path, members: dict[str, str | bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            header = tarfile.TarInfo(name)
            header.size = len(data)
            file.addfile(header, io.BytesIO(data))
    return path


# --- images of dialogues and of documents of several parts ------------------------------------------------------------

QUESTION = ("user", b"a", "Which is larger,", b"b", "of these?")


def turns(question: Any, who: str = "role", what: str = "content") -> list[dict[str, Any]]:
    return [{who: "user", what: question}, {who: "assistant", what: "the second"}]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": turns("<image>Which is larger,<image> of these?"), "images": ["a.png", "b.png"]},
        {"messages": turns("<image>Which is larger,\n<image>\nof these?"), "img": ["a.png", "b.png"]},
        {"conversations": turns("<image> Which is larger, <image> of these?", "from", "value")}
        | {"image": None, "images": ["a.png", "b.png"]},
        {
            "messages": turns(
                [{"type": "image"}, {"type": "text", "text": "Which is larger,"}, {"type": "image"}, "of these?"]
            ),
            "images": ["a.png", "b.png"],
        },
        {
            "messages": turns(
                [
                    {"type": "image", "index": 1, "text": None},
                    {"type": "text", "index": None, "text": "Which is larger,"},
                    {"type": "image", "index": 0, "text": None},
                    {"type": "text", "index": None, "text": "of these?"},
                ]
            ),
            "images": ["b.png", "a.png"],
        },
        {
            "messages": turns([{"image": "a.png"}, "Which is larger,", {"image": "b.png"}, "of these?"]),
            "images": ["a.png", "b.png"],
        },
    ],
)
def test_images_of_a_dialogue_are_where_its_marks_are(tmp_path: Path, record: dict[str, Any]) -> None:
    [raw], faults = read(open_folder(tmp_path, {"d.jsonl": [record], **IMAGES}))
    assert not faults
    assert raw.parts == (*QUESTION[1:], "the second")
    assert raw.roles == (*["user"] * 4, "assistant")


def test_images_without_a_mark_come_first_and_tables_have_their_bytes(tmp_path: Path) -> None:
    dialogues = [[{"role": "system", "content": "You see."}, *turns("What is it?")], turns("<image>What is it?")]
    parquet(tmp_path / "d.parquet", {"messages": dialogues, "jpg": [{"bytes": b"a", "path": None}] * 2})
    documents, faults = read(open_source(str(tmp_path), Columns()))
    assert not faults
    assert [raw.parts for raw in documents] == [
        ("You see.", b"a", "What is it?", "the second"),
        (b"a", "What is it?", "the second"),
    ]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": turns("<image>What?")},
        {"messages": turns("<image>What?"), "images": ["a.png", "b.png"]},
        {"messages": turns([{"type": "image"}, "What?"]), "images": []},
        {"messages": turns([{"image": "a.png"}, "What?"]), "image": "b.png"},
        {"messages": turns([{"type": "image", "index": 1}, "What?"]), "images": ["a.png"]},
        {"messages": turns("<image>What?"), "image": "a.png", "images": ["b.png"]},
        {"parts": ["a crab"], "image": "a.png"},
        {"parts": ["a crab", {"image": "a.png"}], "images": ["a.png", "b.png"]},
        {"text_list": ["a crab"], "image_info": [], "filepath": "a.png"},
        {"texts": ["a crab", None], "images": [None, "a.png"], "image": "b.png"},
    ],
)
def test_an_image_without_a_place_is_a_fault(tmp_path: Path, record: dict[str, Any]) -> None:
    sound = {"messages": turns("hello")} if "messages" in record else {"parts": ["hello"]}
    documents, faults = read(open_folder(tmp_path, {"d.jsonl": [sound, record], **IMAGES}))
    assert len(documents) == len(faults) == 1


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "json"])
def test_one_image_is_not_shared_by_names_in_two_folders(tmp_path: Path, kind: str) -> None:
    """Only the images of one folder are there; the others keep no caption of theirs."""
    names = ["hens/7.png", "owls/7.png", "/data/owls/8.png", "owls/8.png", "pictures/9.png", "owls/9.png"]
    rows = [{"image": name, "text": f"of {name}"} for name in names]
    if kind == "parquet":
        parquet(tmp_path / "d.parquet", {"image": names, "text": [row["text"] for row in rows]})
    write(tmp_path, {f"pictures/{number}.png": b"%d" % number for number in (7, 8, 9)})
    files = {} if kind == "parquet" else {"d.jsonl": rows} if kind == "jsonl" else {"d.json": json.dumps(rows)}
    reader = open_folder(tmp_path, files, image_column="image" if kind == "parquet" else "")
    documents, faults = read(reader)
    result = [(raw.parts[0], raw.parts[1]) for raw in documents]
    assert result == [(b"8", "of /data/owls/8.png"), (b"8", "of owls/8.png"), (b"9", "of pictures/9.png")]
    assert len(faults) == 3
    assert all("one image for each path" in reason for reason in faults.values())


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
@pytest.mark.parametrize("shape", ["sidecar", "table", "jsonl"])
def test_accents_are_the_same_in_either_form(tmp_path: Path, forms: tuple[str, str], shape: str) -> None:
    name, other = (unicodedata.normalize(form, "été/žába") for form in forms)
    told: dict[str, Any] = {
        "sidecar": {f"{other}.txt": "a frog", "zoo/1.txt": "a hen"},
        "table": {"list.csv": f"file_name,text\n{other}.png,a frog\nzoo/1.png,a hen\n"},
        "jsonl": {"d.jsonl": [{"image": f"{other}.png", "text": "a frog"}, {"image": "zoo/1.png", "text": "a hen"}]},
    }[shape]
    reader = open_folder(tmp_path, {f"{name}.png": b"x", "zoo/1.png": b"y", **told})
    assert pairs(reader) == {b"x": ("a frog",), b"y": ("a hen",)}


# --- splits -----------------------------------------------------------------------------------------------------------


def taken(folder: Path, files: dict[str, Any], **columns: Any) -> set[str]:
    """Return the words of the documents that are read."""
    documents, _ = read(open_folder(folder, files, **columns))
    return {part for raw in documents for part in raw.parts if isinstance(part, str)}


@pytest.mark.parametrize("splits", [("train", "test"), ("test", "train"), ("Validation", "train2017")])
def test_the_outermost_folder_tells_the_split(tmp_path: Path, splits: tuple[str, str]) -> None:
    """Classes may be called as splits are."""
    files = {f"{split}/{kind}/1.png": f"{split} {kind}" for split in splits for kind in ("train", "dev", "bus")}
    own = next(split for split in splits if split.lower().startswith("train"))
    listed = open_folder(tmp_path, files)
    assert {raw.parts[0].decode() for raw in read(listed)[0]} == {f"{own} {kind}" for kind in ("train", "dev", "bus")}
    inside = {
        f"{split}/{kind}/1.{end}": f"{split} {kind}" for split in splits for kind in splits for end in ("png", "txt")
    }
    path = tar(tmp_path / "tars" / "all.tar", inside)
    assert {raw.parts[1] for raw in read(open_source(str(path), Columns()))[0]} == {f"{own} {kind}" for kind in splits}


@pytest.mark.parametrize(
    "names",
    [
        ("train-00003-of-00007.txt", "test-00000.txt"),
        ("wiki.train.txt", "wiki.valid.txt"),
        ("novels_train.md", "novels_dev.md"),
        ("train_1.txt.gz", "eval_1.txt.gz"),
        ("train-0.ndjson", "val-0.ndjson"),
        ("lists/captions_train.txt", "lists/captions_test.txt"),
        ("part.train.en.csv", "part.test.en.csv"),
    ],
)
def test_names_of_several_files_tell_their_splits(tmp_path: Path, names: tuple[str, str]) -> None:
    def content(words: str) -> bytes:
        if names[0].endswith("ndjson"):
            return json.dumps({"text": words}).encode()
        if "captions" in names[0] or "csv" in names[0]:
            return f"image,caption\n{'a' if words == 'one' else 'b'}.png,{words}\n".encode()
        return gzip.compress(words.encode()) if names[0].endswith("gz") else words.encode()

    images = IMAGES if "captions" in names[0] or "csv" in names[0] else {}
    files = {names[0]: content("one"), names[1]: content("two"), **images}
    assert taken(tmp_path, files) == {"one"}
    assert taken(tmp_path, files, source_split="all") == {"one", "two"}


@pytest.mark.parametrize("name", ["testament.txt", "train spotting.txt", "the_test_of_time.txt", "dev-notes.md"])
def test_words_within_the_names_of_texts_are_no_splits(tmp_path: Path, name: str) -> None:
    assert taken(tmp_path, {name: "one", "train-1.txt": "two"}) == {"one", "two"}


@pytest.mark.parametrize("shape", ["jsonl", "tar", "tar at a URL", "jsonl at a URL"])
def test_a_split_that_comes_late_is_seen(tmp_path: Path, shape: str) -> None:
    rows: list[dict[str, Any]] = [{"text": f"number {number}"} for number in range(132)]
    rows[130] |= {" Split ": "training"}
    rows[131] |= {" Split ": "val"}
    path = tmp_path / "in" / ("d.tar" if "tar" in shape else "d.jsonl")
    if "tar" in shape:
        names = {f"{number:03d}": row for number, row in enumerate(rows)}
        members = {f"{name}.png": name for name in names} | {f"{name}.json": json.dumps(names[name]) for name in names}
        tar(path, {name: members[name] for name in sorted(members)})
    else:
        write(path.parent, {path.name: "\n".join(map(json.dumps, rows))})
    source = f"file://{path}" if "URL" in shape else str(path)

    def words(**columns: Any) -> set[str]:
        documents, _ = read(open_source(source, Columns(**columns), cache=Cache(tmp_path / "cache")))
        return {raw.parts[-1] for raw in documents}

    every = {row["text"] for row in rows}
    assert words() == every - {"number 131"}
    assert words(source_split="validation") == every - {"number 130"}
    assert words(source_split="all") == every


@pytest.mark.parametrize("shape", ["sidecar", "captions"])
def test_a_split_in_json_next_to_other_captions(tmp_path: Path, shape: str) -> None:
    splits = {"a": "train", "b": "test", "c": "train"}
    if shape == "sidecar":
        files = {f"{name}.txt": f"words of {name}" for name in splits}
        files |= {f"{name}.json": {"split": split} for name, split in splits.items()}
    else:
        files = {"meta_cap.json": {f"{n}.png": {"caption": f"words of {n}", "split": s} for n, s in splits.items()}}
    assert set(pairs(open_folder(tmp_path, {**IMAGES, **files}))) == {b"a", b"c"}
    assert set(pairs(open_folder(tmp_path, {}, source_split="test"))) == {b"b"}


# --- weights of captions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["d.jsonl", "metadata.jsonl", "parquet", "sidecar", "captions.json", "tar"])
def test_weights_of_captions_are_kept_in_every_shape(tmp_path: Path, shape: str) -> None:
    told = {"caption": ["one", "two"], "weights": [3, 0.5]}
    rows = [{"image": f"{name}.png", **told} for name in "abc"]
    if shape == "parquet":
        parquet(tmp_path / "d.parquet", {"image": [*IMAGES.values()], **{name: [told[name]] * 3 for name in told}})
    elif shape == "tar":
        members = IMAGES | {f"{name}.json": json.dumps(told) for name in "abc"}
        tar(tmp_path / "d.tar", {name: members[name] for name in sorted(members)})
    files: dict[str, Any] = {
        "sidecar": {f"{name}.json": told for name in "abc"},
        "captions.json": {shape: {f"{name}.png": told for name in "abc"}},
    }.get(shape, {shape: rows} if shape.endswith("jsonl") else {})
    documents, faults = read(open_folder(tmp_path, files | ({} if shape in ("parquet", "tar") else IMAGES)))
    assert not faults
    assert [(raw.parts[1:], raw.weights) for raw in documents] == [(("one", "two"), (3, 0.5))] * 3


@pytest.mark.parametrize("weights", [[1], ["much", "little"], 2, [1, 0]])
def test_weights_that_do_not_fit_are_faults(tmp_path: Path, weights: Any) -> None:
    told = {"text": ["one", "two"], "weights": weights}
    for name in ("d.jsonl", "metadata.jsonl"):
        documents, faults = read(open_folder(tmp_path / name, {name: [{"image": "a.png", **told}], "a.png": b"a"}))
        assert not documents
        assert "weight" in faults["d.jsonl:1" if name == "d.jsonl" else "a.png"]


def test_rows_of_one_image_with_and_without_weights(tmp_path: Path) -> None:
    rows = [{"file_name": "a.png", "text": ["one", "two"], "weights": [2, 3]}, {"file_name": "a.png", "text": "three"}]
    [raw], _ = read(open_folder(tmp_path, {"metadata.jsonl": rows, "a.png": b"a"}))
    assert (raw.parts[1:], raw.weights) == (("one", "two", "three"), (2, 3, 1))


# --- files that are no list of captions, next to images that have captions --------------------------------------------

STRAY: dict[str, dict[str, Any]] = {
    "a log": {"train/events.jsonl": [{"text": "a line of a.png", "loss": 2}]},
    "an empty file": {"captions.jsonl": b""},
    "a packed log": {"run.jsonl.gz": gzip.compress(b'{"epoch": 3}')},
    "sizes in JSON": {"train/shapes.json": {"a.png": [640, 480], "b.png": [64, 48]}},
    "sizes in a table": {"train/shapes.csv": "image,height\na.png,3\nb.png,4\n"},
    "texts": {"texts.json": b'[{"text": "a story"}, {"text": "another"}]'},
    "a broken table": {"metadata.jsonl": b"{"},
    "hashes in a tar": {},
}


@pytest.mark.parametrize("stray", STRAY)
@pytest.mark.parametrize("splits", [("train", "train"), ("train", "val")])
def test_other_files_do_not_take_over_captioned_images(
    tmp_path: Path, stray: str, splits: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    names = [f"{split}/{name}" for split, name in zip(splits, "ab", strict=True)]
    captioned = {
        f"{name}.{end}": data for name in names for end, data in (("png", name.encode()), ("txt", f"at {name}"))
    }
    if stray == "hashes in a tar":
        tar(tmp_path / "hashes.tar", {"a.sha256": "0", "b.sha256": "1"})
    with caplog.at_level(logging.INFO, "transfuse"):
        result = pairs(open_folder(tmp_path, captioned | STRAY[stray]))
    assert result == {name.encode(): (f"at {name}",) for name in names if name.startswith("train/")}
    assert "left aside, without a caption of an image" in caplog.text


def test_a_list_of_captions_still_comes_before_files_next_to_images(tmp_path: Path) -> None:
    files = {**IMAGES, **{f"{name}.txt": "next to it" for name in "abc"}}
    listed = {"list.jsonl": [{"image": f"{name}.png", "text": f"listed {name}"} for name in "abc"]}
    stray = {"log.jsonl": [{"text": "a line"}]}
    result = pairs(open_folder(tmp_path, files | listed | stray))
    assert result == {data: (f"listed {data.decode()}",) for data in IMAGES.values()}
    forced, _ = read(open_folder(tmp_path / "forced", {**files, **stray}, reader="records"))
    assert [raw.parts for raw in forced] == [("a line",)]


# --- members of tars --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "expected", "lost"),
    [
        (["take.3.jpg", "take.3.txt", "take.4.txt"], {"take.3.jpg": "take.3.txt"}, 1),
        (["take.3.jpg", "take.4.txt"], {}, 2),
        (["take.left.webp", "take.left.caption", "take.right.caption"], {"take.left.webp": "take.left.caption"}, 1),
        (["take.3.jpg", "take.3.txt", "take.4.txt", "take.json"], {"take.3.jpg": "take.3.txt"}, 2),
        (["take.jpg", "take.0.txt"], {"take.jpg": "take.0.txt"}, 0),
        (["take.image.jpg", "take.words.txt"], {"take.image.jpg": "take.words.txt"}, 0),
        (["take.3.jpg", "take.txt"], {"take.3.jpg": "take.txt"}, 0),
    ],
)
def test_captions_of_a_lost_image_are_not_those_of_another(
    tmp_path: Path, members: list[str], expected: dict[str, str], lost: int
) -> None:
    path = tar(tmp_path / "d.tar", {name: "{}" if name.endswith("json") else name for name in members})
    documents, faults = read(open_source(str(path), Columns()))
    assert {raw.parts[0].decode(): raw.parts[1] for raw in documents} == expected
    assert len(faults) == lost


def test_hidden_folders_of_tars_are_left_out(tmp_path: Path) -> None:
    names = ["./.cache/1.jpg", "./.cache/1.txt", "a/.git/x/2.jpg", "a/.git/x/2.txt", "./b/3.jpg", "./b/3.txt", ".4.jpg"]
    reader = open_source(str(tar(tmp_path / "d.tar", dict.fromkeys(names, "x"))), Columns())
    items = [item for part in reader.parts() for item in reader.read(part)]
    assert [item.key for item in items if isinstance(item, Raw)] == ["d.tar/b/3"]
    assert sum(not isinstance(item, Raw) for item in items) == 5


# --- tables -----------------------------------------------------------------------------------------------------------


def test_images_of_coco_without_a_file_name_are_faults(tmp_path: Path) -> None:
    images = [{"id": 1, "file_name": None}, {"id": 2, "file_name": 2.5}, {"id": 3, "file_name": "a.png"}]
    captions = [{"image_id": number, "caption": f"words {number}"} for number in (1, 2, 3)]
    coco = {"images": images, "annotations": captions}
    documents, faults = read(open_folder(tmp_path / "coco", {"captions.json": coco, "a.png": b"a"}))
    assert [raw.parts for raw in documents] == [(b"a", "words 3")]
    assert faults == dict.fromkeys(("image_id 1", "image_id 2"), "expected a file name, found none")
    sentences = [{"raw": "words"}]
    listed = [
        {"filename": name, "filepath": "in", "sentences": sentences, "split": "train"} for name in (None, 7, "a.png")
    ]
    rest = [{"filename": None, "sentences": sentences, "split": "test"}]
    documents, faults = read(open_folder(tmp_path / "k", {"k.json": {"images": [*listed, *rest]}, "in/a.png": b"a"}))
    assert [raw.parts for raw in documents] == [(b"a", "words")]
    assert list(faults) == ["image 1", "image 2"]


def test_one_wrong_value_of_a_list_of_captions_is_one_fault(tmp_path: Path) -> None:
    listed = {"a.png": 12, "b.png": "a bus", "c.png": {"tags": ["red"]}}
    documents, faults = read(open_folder(tmp_path, {"meta_cap.json": listed, **IMAGES}))
    assert [raw.parts for raw in documents] == [(b"b", "a bus"), (b"c", "red")]
    assert list(faults) == ["a.png"]


@pytest.mark.parametrize("other", ["", "  ", "more/", "0"])
def test_a_table_is_known_by_most_of_its_names(tmp_path: Path, other: str) -> None:
    rows = [f"{name}.png,words of {name}" for name in "abc"]
    rows.insert(1, f"{other},nothing")
    documents, faults = read(open_folder(tmp_path, {"list.csv": "\n".join(["picture,caption", *rows]), **IMAGES}))
    assert [raw.parts for raw in documents] == [(name.encode(), f"words of {name}") for name in "abc"]
    assert len(faults) == 1


@pytest.mark.parametrize(("mark", "end"), [(";", "\r\n"), (",", "\n"), ("\t", "\n"), ("|", "\n")])
def test_excels_first_line_names_the_delimiter(tmp_path: Path, mark: str, end: str) -> None:
    rows = [mark.join(row) for row in (("image", "text"), ("a.png", "red, green"), ("b.png", "blue; grey"))]
    rows = [row if mark != "," else row.replace("red, ", "red ") for row in rows]
    rows = [row if mark != ";" else row.replace("blue; ", "blue ") for row in rows]
    result = pairs(
        open_folder(tmp_path, {"list.csv": end.join([f"sep={mark}", *rows, ""]), "a.png": b"a", "b.png": b"b"})
    )
    assert result == {b"a": (rows[1].split(mark)[1],), b"b": (rows[2].split(mark)[1],)}


def test_a_caption_column_counts_in_json_next_to_images(tmp_path: Path) -> None:
    told = {f"{name}.json": {"caption": "plain", "long": f"all of {name}"} for name in "abc"}
    assert pairs(open_folder(tmp_path, {**IMAGES, **told}, caption_column="long"))[b"b"] == ("all of b",)
    with_texts = {**told, **{f"{name}.txt": "short" for name in "abc"}}
    assert pairs(open_folder(tmp_path, with_texts, caption_column="long"))[b"c"] == ("all of c",)
    assert pairs(open_folder(tmp_path, {}))[b"c"] == ("short",)
    _, faults = read(open_folder(tmp_path, {}, caption_column="wrong"))
    assert set(faults.values()) == {"expected a caption, found none"}


def test_a_long_name_at_a_url_is_kept_under_a_shorter_one(tmp_path: Path) -> None:
    for name in (f"{'x' * 230}.txt", f"{'ž' * 110}.txt"):
        write(tmp_path, {name: "words"})
        reader = open_source(f"file://{tmp_path / name}", Columns(), cache=Cache(tmp_path / "cache"))
        assert [raw.parts for raw in read(reader)[0]] == [("words",)]


def test_a_split_that_is_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found no splits"):
        open_folder(tmp_path, {"d.jsonl": [{"text": "one"}, {"text": "two"}]}, source_split="night")


# --- names next to tables, and folders of splits ----------------------------------------------------------------------


@pytest.mark.parametrize("table", ["metadata.jsonl", "captions.csv"])
def test_a_lost_image_of_a_folder_is_no_image_of_the_root(tmp_path: Path, table: str) -> None:
    def rows(**captions: str) -> Any:
        if table.endswith("csv"):
            return "".join(
                f"{name}.png,{text}\n" for name, text in {"file_name": "caption", **captions}.items()
            ).replace("file_name.png", "file_name")
        return [{"file_name": f"{name}.png", "text": text} for name, text in captions.items()]

    files = {"a.png": b"a", "in/b.png": b"b", "in/c.png": b"c", table: rows(a="of the root")}
    documents, faults = read(open_folder(tmp_path, files | {f"in/{table}": rows(a="lost", b="second", c="third")}))
    assert {raw.parts[0]: raw.parts[1:] for raw in documents} == {
        b"a": ("of the root",),
        b"b": ("second",),
        b"c": ("third",),
    }
    assert [*faults] == ["in/a.png"]


def test_a_number_sign_is_part_of_a_name_that_exists(tmp_path: Path) -> None:
    rows = "file_name,caption\na,plain\na#1,with a sign\nb.png#0,one\nb.png#1,another\nb.png#2,third\n"
    files = {"a.png": b"a", "a#1.png": b"a1", "b.png": b"b", "captions.csv": rows}
    assert pairs(open_folder(tmp_path, files)) == {
        b"a": ("plain",),
        b"a1": ("with a sign",),
        b"b": ("one", "another", "third"),
    }


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train_images", "test_images"),
        ("imgs-training", "imgs-val"),
        ("split=train", "split=test"),
        ("Training Set/cats", "Test Set/cats"),
    ],
)
def test_folders_are_of_a_split_with_words_that_say_nothing(tmp_path: Path, train: str, test: str) -> None:
    files = {f"{train}/a.png": b"a", f"{train}/a.txt": "one", f"{test}/b.png": b"b", f"{test}/b.txt": "two"}
    assert pairs(open_folder(tmp_path, files)) == {b"a": ("one",)}
    assert len(pairs(open_folder(tmp_path, files, source_split="all"))) == 2


def test_other_words_make_a_folder_of_no_split(tmp_path: Path) -> None:
    files = {
        f"{folder}/{folder[0]}.{kind}": kind for folder in ("bullet_train", "test_tube") for kind in ("png", "txt")
    }
    assert len(read(open_folder(tmp_path, files))[0]) == 2
