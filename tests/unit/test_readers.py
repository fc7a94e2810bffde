"""Every kind of source read as it was written; and whatever is wrong in one is a fault with a name, never a silence."""

from __future__ import annotations

import base64
import csv
import gzip
import io
import itertools
import json
import os
import pickle
import re
import tarfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from conftest import write
from hypothesis import given, settings
from hypothesis import strategies as st

from emoji_scenes import World, WorldConfig, caption
from transfuse.cli import run
from transfuse.data.building import build_set
from transfuse.data.building.prepare import BuildConfig, Dropped, Outcome, Preparer
from transfuse.data.readers import LOST_REST, Columns, Fault, Item, LeftOut, Raw, Reader, TextReader, open_source
from transfuse.data.readers.listing import Listing
from transfuse.data.readers.records import JsonReader
from transfuse.data.readers.tars import scan
from transfuse.data.remote import File
from transfuse.errors import UserError
from transfuse.sequence import Tokenizer


def picture(number: int, side: int = 4) -> bytes:
    """Return a PNG that depends on its number."""
    stream = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


def tar(path: Path, members: Iterable[tuple[str, bytes | str]], kind: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as file:
        for name, content in members:
            data = content.encode() if isinstance(content, str) else content
            header = tarfile.TarInfo(name)
            header.size = len(data)
            file.addfile(header, io.BytesIO(data))
    return path


def read(source: Path | Reader, **columns: Any) -> list[Item]:
    """All of a source, reader and parts sent through a pickle, as they are to worker processes."""
    reader = source if not isinstance(source, Path) else open_source(str(source), Columns(**columns))
    sent: Reader = pickle.loads(pickle.dumps(reader))
    values = [item for part in reader.parts() for item in sent.read(pickle.loads(pickle.dumps(part)))]
    for item in values:
        if isinstance(item, Fault):
            assert item.key.strip(), "a fault has a name"
            assert item.reason.strip(), "and a reason"
    return values


def listed(path: Path) -> tuple[Listing, list[File]]:
    """A file that is the whole source."""
    file = File.of(path.parent, path)
    return Listing(str(path), path.parent, (file,)), [file]


def outcomes(source: Path, tokenizer: Tokenizer, **columns: Any) -> list[Outcome]:
    reader = open_source(str(source), Columns(**columns))
    prepare = Preparer(BuildConfig(size=4), tokenizer, reader.text_only)
    return [outcome for item in read(reader) for outcome in prepare(item)]


def documents(result: list[Item]) -> list[tuple[Any, ...]]:
    assert not [item for item in result if isinstance(item, Fault)]
    return [item.parts for item in result if isinstance(item, Raw)]


def faults(result: list[Item]) -> dict[str, str]:
    assert not [item for item in result if isinstance(item, Fault) and "\n" in item.reason], "reasons are of one line"
    return {item.key: item.reason for item in result if isinstance(item, Fault)}


def refused(source: Path | str, what: str, **columns: Any) -> None:
    with pytest.raises(UserError, match=what) as caught:
        read(open_source(str(source), Columns(**columns)))
    assert "\n" not in str(caught.value)
    assert "expected" in str(caught.value)
    assert "found" in str(caught.value)


# --- a folder of pictures, each with its .txt -------------------------------------------------------------------------


def test_folder_in_order_with_captions_and_hidden_ones_left_out(tmp_path: Path) -> None:
    names = ["a/z.png", "a/sub/c.PNG", "b.v2.png", "b.png"]
    files: dict[str, bytes | str] = {name: picture(i) for i, name in enumerate(names)}
    files |= {"a/z.txt": "\ufeffzed \n", "a/sub/c.txt": "  sea\r\n", "b.v2.txt": "été\n", "b.txt": "two\nlines\n"}
    files |= {
        ".hidden.png": picture(9),
        ".thumbs/x.png": picture(9),
        "a/.DS_Store": b"\0",
        "stray.txt": "of no picture",
    }
    items = read(write(tmp_path, files))
    assert [(item.key, item.parts[1]) for item in items if isinstance(item, Raw)] == [
        ("a/sub/c.PNG", "sea"),
        ("a/z.png", "zed"),
        ("b.png", "two\nlines"),
        ("b.v2.png", "été"),
    ]
    assert documents(items)[1][0] == files["a/z.png"]
    assert all(isinstance(item, Raw) and item.pair for item in items)
    assert documents(read(tmp_path, first_line=True))[2][1] == "two"


def test_more_pictures_than_a_part_holds(tmp_path: Path) -> None:
    for i in range(150):
        write(tmp_path, {f"{i:03d}.png": b"%d" % i, f"{i:03d}.txt": f"number {i}"})
    reader = open_source(str(tmp_path), Columns())
    assert len(list(reader.parts())) == 3
    assert sum(part.weight for part in reader.parts()) == reader.total == 150
    assert documents(read(reader)) == [(b"%d" % i, f"number {i}") for i in range(150)]


def test_first_line_of_a_file_from_windows(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": picture(0), "a.txt": "\ufeffone \r\ntwo\r\n"})
    assert documents(read(tmp_path, first_line=True)) == [(picture(0), "one")]


def test_lines_of_a_caption_from_windows(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": picture(0), "a.txt": "one\r\ntwo\r\n"})
    assert documents(read(tmp_path)) == [(picture(0), "one\ntwo")]


def test_faults_of_a_folder(tmp_path: Path) -> None:
    names = ["bare", "blank", "empty", "latin", "whole"]
    write(tmp_path, {f"{name}.png": picture(i) for i, name in enumerate(names)})
    write(tmp_path, {"blank.txt": " \n\r\n", "empty.txt": "", "latin.txt": b"caf\x81", "whole.txt": "a crab"})
    write(tmp_path, {"gone.txt": "a picture that went"})
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    items = read(tmp_path)
    assert [item.key for item in items if isinstance(item, Raw)] == ["whole.png"]
    told = faults(items)
    assert list(told) == ["bare.png", "blank.png", "empty.png", "gone.png", "latin.png"]
    assert "bare.txt" in told["bare.png"]
    assert told["blank.png"] == told["empty.png"] == "expected a caption, found none"
    assert "No such file" in told["gone.png"]
    assert re.search(r"latin\.txt: expected UTF-8 .* byte 3", told["latin.png"])


def test_pictures_that_are_none(tmp_path: Path, tokenizer: Tokenizer) -> None:
    contents = {"cut": picture(1, 40)[:500], "other": b"dear diary", "whole": picture(2), "zero": b""}
    for name, content in contents.items():
        write(tmp_path, {f"{name}.png": content, f"{name}.txt": "words"})
    results = outcomes(tmp_path, tokenizer)
    told = {item.key: item.detail for item in results if isinstance(item, Dropped) and item.faulty}
    assert list(told) == ["cut.png", "other.png", "zero.png"]
    assert "damaged" in told["cut.png"]
    assert "something else" in told["other.png"]
    assert "empty file" in told["zero.png"]
    assert len(results) == 4


# --- tables of pictures -----------------------------------------------------------------------------------------------


def test_csv_with_quoted_newlines_in_its_own_order(tmp_path: Path) -> None:
    write(tmp_path, {name: picture(i) for i, name in enumerate(["a.png", "b.png", "sub/c.png"])})
    text = '\ufefffile_name,text\r\nsub/c.png,"a sea, \n""blue"""\r\na.png, été \r\nb.png,two\r\n'
    write(tmp_path, {"metadata.csv": text})
    expected = [(picture(2), 'a sea, \n"blue"'), (picture(0), "été"), (picture(1), "two")]
    assert documents(read(tmp_path)) == expected
    assert documents(read(tmp_path / "metadata.csv")) == expected


def test_metadata_jsonl_goes_before_other_files(tmp_path: Path) -> None:
    write(tmp_path, {name: picture(i) for i, name in enumerate(["a.png", "sub/b.png", ".hidden.png"])})
    rows = [{"file_name": "sub/b.png", "text": " bee "}, {"file_name": "a.png", "text": "eh", "more": [1]}]
    lines = "\r\n".join(json.dumps(row) for row in rows)
    write(tmp_path, {"metadata.jsonl": f"\ufeff{lines}\r\n\r\n", "a.txt": "not this", "metadata.csv": "nor,this\n"})
    assert documents(read(tmp_path)) == [(picture(1), "bee"), (picture(0), "eh")]
    assert documents(read(tmp_path / "metadata.jsonl")) == [(picture(1), "bee"), (picture(0), "eh")]


def test_columns_by_name(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": picture(0), "b.png": picture(1)})
    write(tmp_path, {"list.csv": "text,alt,path,other\nno,yes,a.png,b.png\n"})
    assert documents(read(tmp_path / "list.csv")) == [(picture(0), "no")]
    items = read(tmp_path / "list.csv", image_column="other", caption_column="alt")
    assert documents(items) == [(picture(1), "yes")]
    refused(tmp_path / "list.csv", 'caption column: expected "words", found text, alt', caption_column="words")
    refused(tmp_path / "list.csv", 'image column: expected "file"', image_column="file")


def test_faults_of_a_table(tmp_path: Path) -> None:
    write(tmp_path, {name: picture(0) for name in ("a.png", "blank.png", "unnamed.png", "sub/unnamed.png")})
    write(tmp_path, {"metadata.csv": "file_name,text\na.png,eh\ngone.png,gone\nblank.png,  \nshort.png\n"})
    items = read(tmp_path)
    assert [item.key for item in items] == [
        *("a.png", "gone.png", "blank.png", "short.png"),
        *("sub/unnamed.png", "unnamed.png"),
    ]
    assert len(faults(items)) == 5
    assert "No such file" in faults(items)["gone.png"]
    assert len(faults(read(tmp_path / "metadata.csv"))) == 3, "named by itself, the table alone is the source"


def test_a_row_without_a_file_name(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": picture(0), "list.csv": "file_name,text\n,words\na.png,eh\n"})
    items = read(tmp_path / "list.csv")
    assert list(faults(items)) == ["row 1"]
    assert [item.parts for item in items if isinstance(item, Raw)] == [(picture(0), "eh")]


def test_a_row_with_more_fields_than_the_header(tmp_path: Path) -> None:
    """A comma that no quotes protect: of the last column it is known to be the caption's, of another half is lost."""
    write(tmp_path, {"a.png": picture(0), "list.csv": "file_name,text\na.png,a cat, on a mat\n"})
    assert documents(read(tmp_path / "list.csv")) == [(picture(0), "a cat, on a mat")]
    write(tmp_path, {"list.csv": "file_name,text,id\na.png,a cat, on a mat,3\n"})
    assert list(faults(read(tmp_path / "list.csv"))) == ["a.png"]


@pytest.mark.parametrize("words", [["one", 2], {"en": "one"}, 5, True])
def test_a_caption_that_is_no_text(tmp_path: Path, words: object) -> None:
    write(tmp_path, {"a.png": picture(0), "metadata.jsonl": json.dumps({"file_name": "a.png", "text": words})})
    assert list(faults(read(tmp_path))) == ["a.png"]


@pytest.mark.parametrize("mark", ["\u2028", "\u0085"])
def test_a_caption_with_an_unusual_line_mark(tmp_path: Path, mark: str) -> None:
    row = json.dumps({"file_name": "a.png", "text": f"one{mark}two"}, ensure_ascii=False)
    write(tmp_path, {"a.png": picture(0), "metadata.jsonl": row})
    assert documents(read(tmp_path)) == [(picture(0), f"one{mark}two")]


def test_a_damaged_line_of_a_table_is_named(tmp_path: Path) -> None:
    good = json.dumps({"file_name": "a.png", "text": "eh"})
    write(tmp_path, {"a.png": picture(0), "metadata.jsonl": f"{good}\n{good[:-3]}\n{good}\n"})
    refused(tmp_path, r"metadata\.jsonl.*(line |:)2\b")


def test_absolute_paths_in_a_table(tmp_path: Path) -> None:
    write(tmp_path, {"pictures/a.png": picture(0), "lists/here.png": picture(1)})
    rows = [[tmp_path / "pictures/a.png", "eh"], ["../pictures/a.png", "bee"], [tmp_path / "lists/here.png", "sea"]]
    with (tmp_path / "lists/list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file_name", "text"], *rows])
    items = read(tmp_path / "lists/list.csv")
    assert documents(items) == [(picture(0), "eh", "bee"), (picture(1), "sea")], "rows of one file are its captions"


def test_the_ending_of_a_table_in_capitals(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": picture(0), "LIST.CSV": "file_name,text\na.png,eh\n"})
    assert documents(read(tmp_path / "LIST.CSV")) == [(picture(0), "eh")]


# --- tars -------------------------------------------------------------------------------------------------------------

PAIRS = [
    (f"{key}.{kind}", content) for i, key in enumerate("abc") for kind, content in (("png", picture(i)), ("txt", key))
]


def test_tars_as_img2dataset_writes_them(tmp_path: Path) -> None:
    def sample(number: int) -> list[tuple[str, bytes | str]]:
        key = f"{number:09d}"
        record = {"key": key, "caption": f"number {number}", "status": "success", "width": 4}
        return [(f"{key}.png", picture(number)), (f"{key}.json", json.dumps(record)), (f"{key}.txt", f"n {number}")]

    tar(tmp_path / "00001.tar", [member for i in range(3, 5) for member in sample(i)])
    tar(tmp_path / "00000.tar", [member for i in range(3) for member in sample(i)])
    write(tmp_path, {"00000_stats.json": "{}", ".00002.tar": b"hidden"})
    items = read(tmp_path)
    assert documents(items) == [(picture(i), f"n {i}") for i in range(5)]
    assert [items[0].key, items[3].key] == ["00000.tar/000000000", "00001.tar/000000003"]
    assert documents(read(tmp_path / "00001.tar")) == [(picture(3), "n 3"), (picture(4), "n 4")]


def test_the_parts_of_a_tar_weigh_what_they_take(tmp_path: Path) -> None:
    """Small members, too: the tokenizer is trained on evenly spread parts, and the bar knows when it ends."""
    members: list[tuple[str, bytes | str]] = []
    for i in range(200):
        members += [(f"{i:03d}.png", picture(i)), (f"{i:03d}.txt", "x")]
    reader = open_source(str(tar(tmp_path / "a.tar", members)), Columns())
    weights = [part.weight for part in reader.parts()]
    assert len(weights) == 4
    assert 0.9 * reader.total < sum(weights) <= reader.total
    assert reader.unit == "bytes"


def test_captions_in_the_json_alone(tmp_path: Path) -> None:
    record = json.dumps({"caption": " été ", "alt": "other", "text": None})
    path = tar(tmp_path / "a.tar", [("x.jpg", picture(0)), ("x.json", "\ufeff" + record)])
    assert documents(read(path)) == [(picture(0), "été")]
    assert documents(read(path, caption_column="alt")) == [(picture(0), "other")]
    assert list(faults(read(path, caption_column="none"))) == ["a.tar/x"]


def test_lines_and_marks_of_captions_in_tars(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", [("x.jpg", picture(0)), ("x.txt", "\ufeffone\r\ntwo \r\n")])
    assert documents(read(path, first_line=True)) == [(picture(0), "one")]


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names_folders_and_what_is_no_document(tmp_path: Path, kind: int) -> None:
    folder = f"./{'deep/' * 20}{'x' * 90}"
    names = [f"{folder}/ünlike", f"{folder}/{'y' * 40}"] if kind != tarfile.USTAR_FORMAT else ["./sub/ünlike", "y"]
    with tarfile.open(tmp_path / "a.tar", "w", format=kind) as file:
        inner = tarfile.TarInfo("deep")
        inner.type = tarfile.DIRTYPE
        file.addfile(inner)
        hidden = ["._x.png", "sub/.DS_Store"]
        for name, content in [
            *((name, b"junk") for name in hidden),
            *((f"{name}.{end}", data) for name in names for end, data in (("webp", picture(1)), ("txt", b"words"))),
        ]:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            file.addfile(header, io.BytesIO(content))
    assert documents(read(tmp_path / "a.tar")) == [(picture(1), "words")] * 2


def test_files_of_a_tar_that_no_document_uses_are_counted(tmp_path: Path) -> None:
    parts = json.dumps({"parts": [{"text": "one"}, {"image": 1}]})
    members: list[tuple[str, bytes | str]] = [("._a.png", b"junk"), ("sub/.DS_Store", b"junk")]
    members += [("a.png", picture(0)), ("a.txt", "words"), ("a.json", '{"caption": "other"}'), ("a.npy", b"\x93")]
    members += [("b.png", picture(1)), ("b.json", '{"caption": "words"}')]
    members += [("c.0.png", picture(2)), ("c.1.png", picture(3)), ("c.json", parts), ("c.cls", "7")]
    items = read(tar(tmp_path / "t.tar", members))
    hidden = [(item.key, item.reason) for item in items if isinstance(item, LeftOut)]
    assert hidden == [(f"t.tar/{name}", "hidden file of a tar") for name in ("._a.png", "sub/.DS_Store")]
    unused = {item.key[-1]: item.changed for item in items if isinstance(item, Raw)}
    assert unused["a"] == (".json file of a tar not used", ".npy file of a tar not used")
    assert unused["b"] == ()
    assert unused["c"] == (".png file of a tar not used", ".cls file of a tar not used")
    counts = build_set(str(tmp_path / "t.tar"), tmp_path / "set", BuildConfig(size=4, vocabulary=300), workers=0)
    assert counts["dropped"] == {"hidden file of a tar": 2}
    assert counts["changed"] == {f".{end} file of a tar not used": 1 for end in ("cls", "json", "npy", "png")}
    assert counts["seen"] == counts["documents"] + 2


def test_documents_of_several_parts_in_a_tar(tmp_path: Path) -> None:
    parts = [{"text": "first"}, {"image": 1}, {"text": "then"}, {"image": 0}, {"image": 1}]
    members = [("x.0.png", picture(0)), ("x.1.png", picture(1)), ("x.json", json.dumps({"parts": parts}))]
    items = read(tar(tmp_path / "a.tar", members))
    assert documents(items) == [("first", picture(1), "then", picture(0), picture(1))]
    assert isinstance(items[0], Raw)
    assert not items[0].pair


FAULTY_MEMBERS: dict[str, list[tuple[str, bytes | str]]] = {
    "no caption": [("x.png", picture(0))],
    "empty caption": [("x.png", picture(0)), ("x.txt", "")],
    "blank caption": [("x.png", picture(0)), ("x.txt", " \r\n")],
    "caption of another encoding": [("x.png", picture(0)), ("x.txt", b"caf\x81")],
    "no picture": [("x.txt", "words")],
    "two pictures": [("x.png", picture(0)), ("x.jpg", picture(1)), ("x.txt", "words")],
    "two of one kind": [("x.png", picture(0)), ("x.png", picture(1)), ("x.txt", "words")],
    "damaged json": [("x.png", picture(0)), ("x.json", '{"caption": "wor')],
    "json that is no record": [("x.png", picture(0)), ("x.json", '["words"]')],
    "caption that is no text": [("x.png", picture(0)), ("x.json", '{"caption": 5}')],
    "parts without their picture": [("x.0.png", picture(0)), ("x.json", '{"parts": [{"image": 1}]}')],
    "parts of another kind": [("x.0.png", picture(0)), ("x.json", '{"parts": [{"video": 0}]}')],
    "parts with a picture by name": [("x.0.png", picture(0)), ("x.json", '{"parts": [{"image": "x.png"}]}')],
    "a picture without a number": [("x.png", picture(0)), ("x.json", '{"parts": [{"image": 0}]}')],
    "words and a picture in one part": [("x.0.png", picture(0)), ("x.json", '{"parts": [{"text": "eh", "image": 0}]}')],
    "one weight for all": [("x.png", picture(0)), ("x.json", '{"captions": ["eh", "bee"], "weights": 2}')],
    "weights that are words": [("x.png", picture(0)), ("x.json", '{"captions": ["eh"], "weights": ["much"]}')],
    "weights by name": [("x.png", picture(0)), ("x.json", '{"caption": "eh", "weights": {"eh": 1}}')],
}


@pytest.mark.parametrize("what", list(FAULTY_MEMBERS))
def test_faults_of_members(tmp_path: Path, what: str) -> None:
    """The document, and no other, is a fault."""
    items = read(tar(tmp_path / "t.tar", [*PAIRS[:2], *FAULTY_MEMBERS[what], *PAIRS[2:]]))
    assert [item.key for item in items] == ["t.tar/a", "t.tar/x", "t.tar/b", "t.tar/c"]
    assert list(faults(items)) == ["t.tar/x"]


@pytest.mark.parametrize("what", list(FAULTY_MEMBERS))
def test_reasons_of_members(tmp_path: Path, what: str) -> None:
    (reason,) = faults(read(tar(tmp_path / "t.tar", FAULTY_MEMBERS[what]))).values()
    assert re.match(r"(\w+: )?expected .*found ", reason)


@pytest.mark.parametrize("parts", [[], [{"text": 5}], [{"text": None}], [{"text": ["a"]}]])
def test_parts_that_are_none_in_a_tar(tmp_path: Path, parts: list[object]) -> None:
    members: list[tuple[str, bytes | str]] = [("x.json", json.dumps({"parts": parts}))]
    assert list(faults(read(tar(tmp_path / "t.tar", members)))) == ["t.tar/x"]


def test_names_with_dots(tmp_path: Path) -> None:
    """Each of several images up to the first dot is a document; one image is one, whatever dots its name has."""
    members = [
        (f"clip.{i:04d}.{end}", data) for i in range(9) for end, data in (("png", picture(i)), ("txt", f"n {i}"))
    ]
    members += [("photo.v2.png", picture(20)), ("photo.v2.txt", "second"), ("shot.left.png", picture(21))]
    members += [("shot.png", picture(22)), ("shot.json", json.dumps({"caption": "both"}))]
    items = read(tar(tmp_path / "t.tar", members))
    kept = [(item.key, item.parts) for item in items if isinstance(item, Raw)]
    assert kept == [
        *((f"t.tar/clip.{i:04d}", (picture(i), f"n {i}")) for i in range(9)),
        ("t.tar/photo", (picture(20), "second")),
        ("t.tar/shot", (picture(22), "both")),
    ]
    assert list(faults(items)) == ["t.tar/shot.left"]


@pytest.mark.parametrize("record", [None, {"caption": "of all"}])
def test_numbered_images_that_are_lost_count_each(tmp_path: Path, record: dict[str, str] | None) -> None:
    members: list[tuple[str, bytes | str]] = [(f"clip.{i:04d}.png", picture(i)) for i in range(9)]
    members += [] if record is None else [("clip.json", json.dumps(record))]
    items = read(tar(tmp_path / "t.tar", members))
    assert sum(item.lost for item in items if isinstance(item, Fault)) == 9


def test_interleaved_keys(tmp_path: Path) -> None:
    members = [("a.png", picture(0)), ("b.png", picture(1)), ("a.txt", "a"), ("b.txt", "b"), *PAIRS[4:]]
    items = read(tar(tmp_path / "t.tar", members))
    assert [item.key for item in items if isinstance(item, Raw)] == ["t.tar/c"]
    assert set(faults(items)) == {"t.tar/a", "t.tar/b"}
    assert any("side by side" in item.reason for item in items if isinstance(item, Fault))


def test_a_name_that_comes_again_further_on(tmp_path: Path) -> None:
    items = read(tar(tmp_path / "t.tar", [*PAIRS, *PAIRS[:2]]))
    assert len(items) == 4
    assert "side by side" in faults(items)["t.tar/a"]


def test_links_are_no_silence(tmp_path: Path) -> None:
    with tarfile.open(tar(tmp_path / "t.tar", PAIRS), "a") as file:
        for end in ("png", "txt"):
            header = tarfile.TarInfo(f"d.{end}")
            header.type, header.linkname = tarfile.LNKTYPE, f"a.{end}"
            file.addfile(header)
    assert list(faults(read(tmp_path / "t.tar"))) == ["t.tar/d"]


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_cut_short_at_any_byte(tmp_path: Path, kind: int) -> None:
    """The documents read are a beginning of those written; a loss is a fault, unless nothing shows it."""
    long = "y" * 120
    parts = json.dumps({"parts": [{"image": 0}, {"text": "then"}, {"image": 1}]})
    members = [*PAIRS[:2], ("s.0.png", picture(4)), ("s.1.png", picture(5, 12)), ("s.json", parts)]
    members += [(f"{long}.png", picture(6, 16)), (f"{long}.txt", "z" * 700), *PAIRS[4:]]
    whole = documents(read(tar(tmp_path / "t.tar", members, kind)))
    assert len(whole) == 4
    with tarfile.open(tmp_path / "t.tar") as file:
        end = {"a.txt", "s.json", f"{long}.txt", "c.txt"}
        ends = [m.offset_data + -(-m.size // 512) * 512 for m in file.getmembers() if m.name in end]
    near = {place + more for place in range(0, ends[-1] + 1024, 512) for more in (-1, 0, 1)}
    for cut in sorted({0, *near, *range(5, ends[-1] + 1024, 41)} - {-1}, reverse=True):
        os.truncate(tmp_path / "t.tar", cut)
        items = read(tmp_path / "t.tar")
        kept = [item.parts for item in items if isinstance(item, Raw)]
        lost = faults(items)
        assert kept == whole[: len(kept)], cut
        if cut >= ends[-1]:
            assert (len(kept), lost) == (4, {}), cut
        elif cut in ends:
            assert len(kept) == ends.index(cut) + 1, cut
        else:
            assert lost, cut
            assert len(kept) >= sum(place <= cut for place in ends) - 1, "no more than the last before the cut"


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_flipped_byte_in_a_header(tmp_path: Path, kind: int) -> None:
    """No image gets the caption of another; a loss is reported."""
    long = "y" * 120
    members = [*PAIRS[:2], (f"{long}.png", picture(6)), (f"{long}.txt", "long"), *PAIRS[4:]]
    path = tar(tmp_path / "t.tar", members, kind)
    whole = documents(read(path))
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as file:
        pieces = [range(m.offset, m.offset_data) for m in file.getmembers()]  # long names are before the header
    for place in list(itertools.chain(*pieces))[::11]:
        before = data[place]
        data[place] ^= (1, 0x20, 0x80)[place % 3]
        path.write_bytes(data)
        data[place] = before
        items = read(path)
        kept = [item.parts for item in items if isinstance(item, Raw)]
        assert all(parts in whole for parts in kept), place
        assert kept == whole or len(kept) < len(items), place


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_header_wiped_to_zeros(tmp_path: Path, after: int) -> None:
    """A file fetched in pieces may have such a hole; and two tars may be joined."""
    path = tar(tmp_path / "t.tar", PAIRS)
    with tarfile.open(path) as file:
        start = file.getmembers()[2 * after].offset
    data = path.read_bytes()
    path.write_bytes(data[:start] + bytes(512) + data[start + 512 :])
    items = read(path)
    assert [item.parts for item in items if isinstance(item, Raw)] == [(picture(i), "abc"[i]) for i in range(after)]
    assert faults(items)


def test_a_name_with_a_line_end(tmp_path: Path) -> None:
    path = tar(tmp_path / "t.tar", [("x.png", picture(0)), ("x.a\nb.png", picture(1)), ("x.txt", "words")])
    assert list(faults(read(path))) == ["t.tar/x.a b"]


def test_two_tars_one_after_the_other(tmp_path: Path) -> None:
    first, second = tar(tmp_path / "1", PAIRS[:2]), tar(tmp_path / "2", PAIRS[2:])
    (tmp_path / "t.tar").write_bytes(first.read_bytes() + second.read_bytes())
    items = read(tmp_path / "t.tar")
    assert len([item for item in items if isinstance(item, Raw)]) == 3 or faults(items)


def test_a_size_below_zero_does_not_go_round_for_ever(tmp_path: Path) -> None:
    headers = [tarfile.TarInfo(name) for name in ("a.png", "b.png", "c.png")]
    headers[2].size = -1024  # to the second
    pieces = [header.tobuf(tarfile.GNU_FORMAT) for header in headers]
    (tmp_path / "t.tar").write_bytes(b"".join(pieces) + bytes(1024))
    result = list(itertools.islice(scan(tmp_path / "t.tar"), 10))
    assert len(result) < 10
    assert isinstance(result[-1], Fault)


@pytest.mark.parametrize("content", [b"", b"no tar at all", gzip.compress(b"0" * 2000, mtime=0), bytes(512)])
def test_what_is_no_tar(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.tar").write_bytes(content)
    (told,) = faults(read(tmp_path / "t.tar")).values() or [""]
    assert told.startswith("expected a tar") or content == bytes(512)


# --- parquet ----------------------------------------------------------------------------------------------------------


def parquet(path: Path, columns: dict[str, list[Any]], **options: Any) -> Path:
    arrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(arrow.table(columns), path, **options)
    return path


def test_parquet_as_the_hub_exports_it(tmp_path: Path) -> None:
    for name, numbers in (("b-00001.parquet", [3, 4]), ("a-00000.parquet", [0, 1, 2])):
        images = [{"bytes": picture(i), "path": f"{i}.png"} for i in numbers]
        parquet(
            tmp_path / name, {"image": images, "text": [f" n {i} " for i in numbers], "x": numbers}, row_group_size=2
        )
    items = read(tmp_path)
    assert documents(items) == [(picture(i), f"n {i}") for i in range(5)]
    assert [item.key for item in items][1:4] == ["a-00000.parquet/0/1", "a-00000.parquet/1/0", "b-00001.parquet/0/0"]
    reader = open_source(str(tmp_path), Columns())
    assert not reader.text_only
    assert sum(part.weight for part in reader.parts()) == reader.total


def test_parquet_with_plain_bytes_and_columns_by_name(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", {"jpg": [picture(0)], "alt": ["été"], "text": ["no"]})
    assert documents(read(path, image_column="jpg", caption_column="alt")) == [(picture(0), "été")]
    refused(path, 'image column: expected "png"', image_column="png")
    refused(path, 'caption column: expected "words"', caption_column="words")


def test_parquet_of_text_alone(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", {"text": ["one", "two\n\nlines "], "url": ["x", "y"]})
    assert open_source(str(path), Columns()).text_only
    assert documents(read(path)) == [("one",), ("two\n\nlines ",)]


def test_parquet_of_text_in_lists_in_columns_and_of_classes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Text alone, too, is what the columns say, and not how Python writes it; one string stays as it is."""
    path = parquet(tmp_path / "lists.parquet", {"captions": [["One. ", "Two."], ["Three."]]})
    assert documents(read(path)) == [("One.", "Two."), ("Three.",)]
    ids = [outcome.parts[0] for outcome in outcomes(path, tokenizer) if not isinstance(outcome, Dropped)]
    words = [tokenizer.decode(np.frombuffer(part, "<u2").tolist()) for part in ids if isinstance(part, bytes)]
    assert words == ["One.\nTwo.", "Three."]
    path = parquet(tmp_path / "columns.parquet", {"caption_0": ["a", "c"], "caption_1": ["b", None]})
    assert documents(read(path)) == [("a", "b"), ("c",)]
    code = ['["a" + b, "c"]', ' ["a", "b"]\n', '["a", "b"]']
    path = parquet(tmp_path / "code.parquet", {"text": [*code, None, " \n"]})
    items = read(path)
    assert [item.parts for item in items if isinstance(item, Raw)] == [(text,) for text in code]
    assert list(faults(items)) == ["code.parquet/0/3", "code.parquet/0/4"]
    arrow, module = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    features = {"kind": {"names": ["tree_frog", "newt"], "_type": "ClassLabel"}}
    table = arrow.table({"kind": [1, 0]})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    module.write_table(table, tmp_path / "kinds.parquet")
    assert documents(read(tmp_path / "kinds.parquet")) == [("newt",), ("tree frog",)]


def test_parquet_of_text_with_a_column_of_paths(tmp_path: Path) -> None:
    """Sets of source code have such a column: no bytes, no images."""
    path = parquet(tmp_path / "a.parquet", {"text": ["one"], "path": ["src/one.py"]})
    assert open_source(str(path), Columns()).text_only
    assert documents(read(path)) == [("one",)]


def test_faults_of_parquet(tmp_path: Path) -> None:
    images = [{"bytes": picture(0), "path": None}, {"bytes": None, "path": "x.png"}, None, *[{"bytes": picture(0)}] * 3]
    columns = {"image": images, "text": ["eh", "bee", "sea", None, "", " \n"]}
    told = faults(read(parquet(tmp_path / "a.parquet", columns)))
    assert list(told) == [f"a.parquet/0/{i}" for i in range(1, 6)]
    assert "bytes of an image" in told["a.parquet/0/1"]
    assert "caption" in told["a.parquet/0/4"]
    told = faults(read(parquet(tmp_path / "b.parquet", {"image": [picture(0)], "text": [5]})))
    assert told["b.parquet/0/0"] == "expected words in text, found 5"


def test_damaged_parquet(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", {"text": ["one " * 50, "two"]}, row_group_size=1, compression="zstd")
    data = path.read_bytes()
    path.write_bytes(data[:4] + bytes(20) + data[24:])
    items = read(path)
    assert list(faults(items)) == ["a.parquet/0"]
    assert [item.parts for item in items if isinstance(item, Raw)] == [("two",)]
    for cut in (0, 3, 50, len(data) - 1):
        path.write_bytes(data[:cut])
        refused(path, "expected a parquet file")


def test_a_damaged_column_of_splits(tmp_path: Path) -> None:
    columns = {"split": ["train", "test"] * 2, "text": [f"{n} " * 40 for n in range(4)]}
    path = parquet(tmp_path / "a.parquet", columns, row_group_size=2, use_dictionary=False, compression="none")
    data = path.read_bytes()
    path.write_bytes(data[:4] + b"\xff" * 20 + data[24:])
    items = read(path)
    assert list(faults(items)) == ["a.parquet/0"]
    assert [item.parts for item in items if isinstance(item, Raw)] == [("2 " * 40,)]


def test_saved_arrow_cut_short(tmp_path: Path) -> None:
    """Batches before the damage are read; the rest is a fault that counts as many documents."""
    arrow = pytest.importorskip("pyarrow")
    table = arrow.table({"text": [f"number {n}" for n in range(6)]})
    write(tmp_path, {"state.json": "{}"})
    with arrow.ipc.new_stream(str(tmp_path / "data.arrow"), table.schema) as out:
        out.write_table(table, max_chunksize=2)
    whole = (tmp_path / "data.arrow").read_bytes()
    kept = set()
    for cut in range(len(whole) - 1, 300, -40):
        (tmp_path / "data.arrow").write_bytes(whole[:cut])
        try:
            items = read(tmp_path)
        except UserError:  # not even its head is left
            break
        texts = [item.parts for item in items if isinstance(item, Raw)]
        assert texts == [(f"number {n}",) for n in range(len(texts))]
        assert len(texts) == 6 or [item.lost for item in items if isinstance(item, Fault)] == [LOST_REST]
        kept.add(len(texts))
    assert kept == {0, 2, 4, 6}
    for place in range(len(whole)):  # a damaged byte, too, must not end the process
        (tmp_path / "data.arrow").write_bytes(whole[:place] + bytes([whole[place] ^ 0x91]) + whole[place + 1 :])
        with suppress(UserError):
            read(tmp_path)


def test_parquet_files_that_do_not_agree(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", {"image": [picture(0)], "text": ["eh"]})
    parquet(tmp_path / "b.parquet", {"image": [picture(1)], "caption": ["bee"]})
    try:
        items = read(tmp_path)
    except UserError as error:
        assert "b.parquet" in str(error)  # noqa: PT017
    else:
        assert [key.partition("/")[0] for key in faults(items)] == ["b.parquet"]


def test_parquet_with_two_columns_of_one_name(tmp_path: Path) -> None:
    arrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = [arrow.array([b"0"]), arrow.array(["a"]), arrow.array(["b"])]
    writer.write_table(arrow.Table.from_arrays(columns, ["image", "caption", "caption"]), tmp_path / "a.parquet")
    refused(tmp_path, r'a\.parquet: expected a parquet file, found something else \(two columns "caption"\)')


def test_parquet_without_rows(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    assert read(parquet(tmp_path / "a.parquet", {"text": arrow.array([], arrow.string())})) == []


# --- jsonl ------------------------------------------------------------------------------------------------------------


def lines(*records: object) -> str:
    return "\n".join(record if isinstance(record, str) else json.dumps(record) for record in records) + "\n"


def test_jsonl_interleaved_in_every_spelling(tmp_path: Path) -> None:
    write(tmp_path, {"p/a.png": picture(0), "p/b.png": picture(1)})
    url = "data:image/png;base64," + base64.b64encode(picture(2)).decode()
    text = lines(
        {"parts": [{"text": " first "}, {"image": "p/a.png"}, "then", {"image": url}]},
        {"texts": ["one", None, None, "two"], "images": [None, "p/b.png", "p/a.png", None], "metadata": "[]"},
        {"text": " words\u2028alone "},
    )
    expected = [
        ("first", picture(0), "then", picture(2)),
        ("one", picture(1), picture(0), "two"),
        ("words\u2028alone",),
    ]
    write(tmp_path, {"d.jsonl": "\ufeff" + text.replace("\n", "\r\n") + "\r\n"})
    items = read(tmp_path / "d.jsonl")
    assert documents(items) == expected
    assert [item.key for item in items] == ["d.jsonl:1", "d.jsonl:2", "d.jsonl:3"]
    assert not any(item.pair for item in items if isinstance(item, Raw))
    write(tmp_path / "z", {"d.jsonl.gz": gzip.compress(text.replace("p/", "../p/").encode())})
    assert documents(read(tmp_path / "z")) == expected


def test_jsonl_of_words_alone(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"b.jsonl": lines({"text": "two"}), "sub/a.jsonl": lines({"text": "three"}), "a.jsonl": lines({"text": "one"})},
    )
    assert open_source(str(tmp_path), Columns()).text_only
    assert documents(read(tmp_path)) == [("one",), ("two",), ("three",)]
    write(tmp_path, {"c.json": "{}", "d.jsonl": lines({"content": "x", "text": "y"})})
    assert documents(read(tmp_path / "d.jsonl", caption_column="content")) == [("x",)]


def test_a_picture_beside_text_is_a_pair(tmp_path: Path) -> None:
    url = "data:image/png;base64," + base64.b64encode(picture(2)).decode()
    write(tmp_path, {"a.png": picture(0), "b.png": picture(1)})
    alone = [{"image": None, "text": "words"}, {"images": [], "text": "alone"}]
    text = lines({"image": "a.png", "text": " a crab "}, {"text": "data", "image": url}, *alone)
    items = read(write(tmp_path, {"d.jsonl": text}) / "d.jsonl")
    assert documents(items) == [(picture(0), "a crab"), (picture(2), "data"), ("words",), ("alone",)]
    assert [item.pair for item in items if isinstance(item, Raw)] == [True, True, False, False]
    write(tmp_path, {"e.jsonl": lines({"picture": "b.png", "alt": "sea", "text": "not this"})})
    items = read(tmp_path / "e.jsonl", image_column="picture", caption_column="alt")
    assert documents(items) == [(picture(1), "sea")]


def test_a_jsonl_with_file_names_has_pairs(tmp_path: Path) -> None:
    """The fields of metadata.jsonl in a file of another name are not taken for text alone."""
    write(tmp_path, {"0.png": picture(0), "captions.jsonl": lines({"file_name": "0.png", "text": "a red ball"})})
    assert documents(read(tmp_path)) == [(picture(0), "a red ball")]


FAULTY_LINES: dict[str, object] = {
    "cut": '{"text": "wor',
    "no record": ["words"],
    "no text": {"title": "words"},
    "text of another kind": {"text": 5},
    "null": {"text": None},
    "no parts": {"parts": []},
    "parts of another kind": {"parts": [{"video": "a.png"}]},
    "parts that are numbers": {"parts": [1]},
    "part without words": {"parts": [{"text": None}]},
    "picture gone": {"parts": [{"image": "gone.png"}]},
    "picture of another kind": {"parts": [{"image": {"bytes": "x"}}]},
    "picture with a name too long": {"parts": [{"image": "x" * 5000}]},
    "picture with a name of nothing": {"parts": [{"image": "a\0.png"}]},
    "a folder for a picture": {"parts": [{"image": "."}]},
    "damaged base64": {"parts": [{"image": "data:image/png;base64,AA*="}]},
    "lists that do not match": {"texts": ["a", None], "images": [None]},
    "lists of nothing": {"texts": [None], "images": [None]},
    "pictures next to text": {"images": ["a.png"], "text": "eh"},
    "pictures next to a pair": {"image": "a.png", "images": ["a.png"], "text": "eh"},
    "words and a picture in one part": {"parts": [{"text": "eh", "image": "a.png"}]},
    "a picture of a pair gone": {"image": "gone.png", "text": "eh"},
    "a picture of a pair of another kind": {"image": {"bytes": "x"}, "text": "eh"},
    "a picture without a caption": {"image": "a.png", "text": " "},
    "a picture with a caption of another kind": {"image": "a.png", "text": 5},
}


@pytest.mark.parametrize("what", list(FAULTY_LINES))
def test_faults_of_jsonl(tmp_path: Path, what: str) -> None:
    good = {"parts": [{"text": "eh"}, {"image": "a.png"}]}
    write(tmp_path, {"a.png": picture(0), "d.jsonl": lines(good, "", FAULTY_LINES[what], good)})
    items = read(tmp_path / "d.jsonl")
    assert [item.key for item in items] == ["d.jsonl:1", "d.jsonl:3", "d.jsonl:4"]
    assert list(faults(items)) == ["d.jsonl:3"]
    assert faults(items)["d.jsonl:3"].startswith("expected a document, found none (")


def test_more_faults_of_jsonl(tmp_path: Path) -> None:
    write(tmp_path, {"d.jsonl": b'{"text": "eh"}\n{"text": "caf\x81"}\n{"text": "bee"}'})
    assert list(faults(read(tmp_path))) == ["d.jsonl:2"]
    write(tmp_path, {"a.png": picture(0), "d.jsonl": lines(*[{"text": "eh"}] * 100, {"parts": [{"image": "a.png"}]})})
    assert "pictures, where the first lines have none" in faults(read(tmp_path / "d.jsonl"))["d.jsonl:101"]


def test_jsonl_nested_too_deep(tmp_path: Path) -> None:
    write(tmp_path, {"d.jsonl": lines({"text": "eh"}, "[" * 100_000)})
    assert list(faults(read(tmp_path))) == ["d.jsonl:2"]


def test_words_and_a_picture_in_one_place(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": picture(0), "d.jsonl": lines({"texts": ["words"], "images": ["a.png"]})})
    assert list(faults(read(tmp_path / "d.jsonl"))) == ["d.jsonl:1"]


def test_half_a_character(tmp_path: Path, tokenizer: Tokenizer) -> None:
    r"""A caption cut inside an emoji, "\ud83d", is JSON but no text that has bytes."""
    write(tmp_path, {"text/d.jsonl": '{"text": "eh"}\n{"text": "cut \\ud83d"}\n'})
    write(
        tmp_path, {"pairs/a.png": picture(0), "pairs/metadata.jsonl": '{"file_name": "a.png", "text": "cut \\ud83d"}'}
    )
    write(tmp_path, {"parts/d.jsonl": '{"parts": [{"text": "cut \\ud83d"}, {"image": "../pairs/a.png"}]}'})
    (tmp_path / "tars").mkdir()
    tar(tmp_path / "tars/t.tar", [("x.png", picture(0)), ("x.json", '{"caption": "cut \\ud83d"}')])
    for name in ("text", "pairs", "parts", "tars"):
        results = outcomes(tmp_path / name, tokenizer)
        assert isinstance(results[-1], Dropped), name
        assert results[-1].faulty, name


def test_a_picture_of_no_bytes_in_jsonl(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(
        tmp_path,
        {"a.png": b"", "d.jsonl": lines({"parts": ["eh", {"image": "a.png"}]}, {"parts": [{"image": "data:,"}]})},
    )
    results = outcomes(tmp_path / "d.jsonl", tokenizer)
    assert [(item.key, item.faulty) for item in results if isinstance(item, Dropped)] == [
        ("d.jsonl:1", True),
        ("d.jsonl:2", True),
    ]


@given(
    st.lists(st.text("aé\u2028 ", max_size=12), min_size=1, max_size=8),
    st.integers(1, 40),
    st.sampled_from(["\n", "\r\n", "\n\n"]),
)
@settings(max_examples=40, deadline=None)
def test_jsonl_at_any_boundary_of_a_chunk(
    tmp_path_factory: pytest.TempPathFactory, words: list[str], chunk: int, end: str
) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "d.jsonl"
    path.write_bytes(end.join(json.dumps({"text": word}, ensure_ascii=False) for word in words).encode())
    items = read(JsonReader(*listed(path), Columns(), chunk))
    assert documents(items) == [(word.strip(),) for word in words]
    assert [item.key for item in items] == [f"d.jsonl:{i * len(end.lstrip(chr(13))) + 1}" for i in range(len(words))]


# --- plain text -------------------------------------------------------------------------------------------------------


def test_text_files_whole(tmp_path: Path) -> None:
    write(tmp_path, {"b.md": "# two\n\nmore\n", "a.txt": "\ufeffone\r\nline\r\n", ".c.txt": "hidden"})
    write(tmp_path, {"sub/d.txt.gz": gzip.compress("été".encode())})
    items = read(tmp_path)
    assert documents(items) == [("one\nline",), ("# two\n\nmore",), ("été",)]
    assert [item.key for item in items] == ["a.txt:1", "b.md:1", "sub/d.txt.gz:1"]
    assert open_source(str(tmp_path), Columns()).text_only
    assert documents(read(tmp_path / "sub/d.txt.gz", split="line")) == [("été",)]


def test_paragraphs_and_lines(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "\ufeffone\r\nmore\r\n\r\ntwo\r\n\r\nthree"})
    items = read(tmp_path / "a.txt", split="paragraph")
    assert documents(items) == [("one\nmore",), ("two",), ("three",)]
    assert [item.key for item in items] == ["a.txt:1", "a.txt:4", "a.txt:6"]
    items = read(tmp_path / "a.txt", split="line")
    assert documents(items) == [("one",), ("more",), ("two",), ("three",)]
    assert [item.key for item in items] == ["a.txt:1", "a.txt:2", "a.txt:4", "a.txt:6"]


@given(
    st.lists(st.sampled_from(["a", "bé ", " ", "\n", "\n\n", "\r\n", "\r\n\r\n"]), max_size=20),
    st.integers(1, 9),
    st.sampled_from(["line", "paragraph"]),
)
@settings(max_examples=40, deadline=None)
def test_text_at_any_boundary_of_a_chunk(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[str], chunk: int, split: str
) -> None:
    text = "".join(pieces)
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(text.encode())
    items = read(TextReader(*listed(path), Columns(split=split), chunk))
    expected = re.split(r"\n" if split == "line" else r"\n{2,}", text.replace("\r\n", "\n"))
    assert documents(items) == [(piece.strip(),) for piece in expected if piece.strip()]
    if split == "line":
        rows = text.replace("\r\n", "\n").split("\n")
        assert [item.key for item in items] == [f"a.txt:{i}" for i, row in enumerate(rows, 1) if row.strip()]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_paragraphs_are_read_part_by_part(tmp_path: Path, end: str) -> None:
    """Whatever the line ends are: a file is in memory a part at a time."""
    words = [f"paragraph {i},{end}and more of it" for i in range(50)]
    write(tmp_path, {"a.txt": (2 * end).join(words)})
    reader = TextReader(*listed(tmp_path / "a.txt"), Columns(split="paragraph"), chunk=100)
    values = [part.weight for part in reader.parts()]
    assert sum(values) == reader.total
    assert max(values) < 200
    assert documents(read(reader)) == [(f"paragraph {i},\nand more of it",) for i in range(50)]
    assert [item.key for item in read(reader)] == [f"a.txt:{3 * i + 1}" for i in range(50)]


def test_paragraphs_far_apart_have_the_line_they_begin_at(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "\none\n\n\n\ntwo\n\n\nthree\n"})
    keys = [item.key for item in read(tmp_path / "a.txt", split="paragraph")]
    assert keys == ["a.txt:2", "a.txt:6", "a.txt:9"]


def test_faults_of_text(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"a.txt": "one", "b.txt": b"caf\x81", "c.txt.gz": gzip.compress(b"three" * 99)[:-12], "d.txt.gz": b"no"},
    )
    told = faults(read(tmp_path))
    assert list(told) == ["b.txt:1", "c.txt.gz:1", "d.txt.gz:1"]
    assert "byte 3" in told["b.txt:1"]


@pytest.mark.parametrize("content", ["", "\n \r\n", "\ufeff"])
def test_an_empty_file_of_text(tmp_path: Path, content: str) -> None:
    write(tmp_path, {"a.txt": "one", "b.txt": content})
    assert list(faults(read(tmp_path))) == ["b.txt:1"]


@pytest.mark.parametrize(("split", "between"), [("line", b"\n"), ("paragraph", b"\n\n")])
def test_one_line_of_another_encoding_costs_no_other(tmp_path: Path, split: str, between: bytes) -> None:
    write(tmp_path, {"a.txt": between.join([b"one", b"caf\x81", b"three"])})
    items = read(tmp_path / "a.txt", split=split)
    assert [item.parts for item in items if isinstance(item, Raw)] == [("one",), ("three",)]
    assert list(faults(items)) == [f"a.txt:{1 + len(between)}"]


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz"])
def test_gzip_with_any_byte_flipped(tmp_path: Path, name: str) -> None:
    """The words, or a fault or one line; no other error."""
    content = lines(*({"text": f"{i} words of no meaning"} for i in range(9)))
    data = gzip.compress(content.encode(), mtime=0)
    expected = documents(read(write(tmp_path, {name: data}) / name))
    for place in range(len(data)):
        for mask in (1, 0x80):
            write(tmp_path, {name: data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :]})
            try:
                items = read(tmp_path / name)
            except UserError:
                continue
            assert faults(items) or documents(items) == expected, place


# --- the world, and what is no source ---------------------------------------------------------------------------------


def test_the_world() -> None:
    items = read(open_source("world", Columns(count=70), 16))
    assert len(items) == 70
    world = World(WorldConfig(size=16))
    for number in (0, 69):
        pixels, words = documents(items)[number]
        np.testing.assert_array_equal(pixels, world.render(world.scene(number)))
        assert words == caption(world.scene(number), number)
    refused("world", "--count")


def test_wrong_paths_are_one_line(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", r'nowhere: expected "world", or .* found none')
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "found a folder with none of these")
    write(tmp_path, {"hidden/.a.png": picture(0), "hidden/.b/c.txt": "x", "notes.pdf": b"%PDF"})
    refused(tmp_path / "hidden", "found a folder with none of these")
    refused(tmp_path / "notes.pdf", "found a file of another kind")
    os.mkfifo(tmp_path / "pipe.txt")
    refused(tmp_path / "pipe.txt", "something that is no file")
    refused(tmp_path / "notes.pdf" / "more", "found none")


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.csv", b"", "found no rows"),
        ("a.csv", b"file_name,text\n", "found no rows"),
        ("a.csv", b"a;b\n1;2\n", "image column: expected one of file_name, .*found a, b"),
        ("a.csv", b"file_name,words\na.png,b\n", "caption column: expected one of text, .*found file_name, words"),
        ("a.csv", b"file_name,text\na.png,caf\x81\n", "expected UTF-8"),
        ("metadata.jsonl", b"", "found no rows"),
        ("metadata.jsonl", b"[1]\n", "found rows of another kind"),
        ("metadata.jsonl", b"{\n", "found something else"),
        ("a.jsonl", b"", "found an empty file"),
        ("a.jsonl", b"\n \n", "found an empty file"),
        ("a.jsonl.gz", b"no gzip", "expected a readable file"),
        ("a.parquet", b"PAR1", "parquet"),
    ],
)
def test_sources_without_documents(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    write(tmp_path, {name: content})
    refused(tmp_path / name, what)


def test_the_command_line_says_it_in_a_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["data", "build", str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 2
    line = capfd.readouterr().err
    assert line.startswith("transfuse: ")
    assert line.count("\n") == 1
    assert not (tmp_path / "out").exists()
