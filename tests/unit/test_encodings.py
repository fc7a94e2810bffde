"""Text in every encoding that people have: read, counted by its name, or a fault that says where; never garbled."""

from __future__ import annotations

import codecs
import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from conftest import write

from transfuse.cli import run
from transfuse.data.building import build_set
from transfuse.data.building.prepare import BuildConfig
from transfuse.data.dataset import DataSet
from transfuse.data.readers import Columns, Fault, Item, Raw, open_source

WORDS = "Ein kühler Fjord – très “bleu”, señor"
RUSSIAN, JAPANESE = "красный шар на столе", "赤いボールと青い箱"


def png(number: int) -> bytes:
    stream = io.BytesIO()
    PIL.Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(stream, "png")
    return stream.getvalue()


def read(source: Path, **columns: Any) -> list[Item]:
    reader = open_source(str(source), Columns(**columns))
    return [item for part in reader.parts() for item in reader.read(part)]


def texts(items: list[Item]) -> list[tuple[str, tuple[str, ...]]]:
    """The last text of each document, and what reading it changed."""
    assert not [item for item in items if isinstance(item, Fault)]
    return [(str(item.parts[-1]), item.changed) for item in items if isinstance(item, Raw)]


BYTES = {
    "utf-8": (WORDS.encode(), ()),
    "utf-8 with a mark": (codecs.BOM_UTF8 + WORDS.encode(), ()),
    "cp1252": (WORDS.encode("cp1252"), ("read as cp1252",)),
    "latin-1": ("cañón".encode("latin-1"), ("read as cp1252",)),
    "a last letter": ("café".encode("latin-1"), ("read as cp1252",)),
    "utf-16 with a mark": (codecs.BOM_UTF16_LE + WORDS.encode("utf-16-le"), ("read as utf-16",)),
    "utf-16 the other way": (codecs.BOM_UTF16_BE + RUSSIAN.encode("utf-16-be"), ("read as utf-16",)),
    "utf-16 without a mark": (WORDS.encode("utf-16-le"), ("read as utf-16-le",)),
    "utf-16 the other way, without": (WORDS.encode("utf-16-be"), ("read as utf-16-be",)),
    "utf-32": (codecs.BOM_UTF32_LE + JAPANESE.encode("utf-32-le"), ("read as utf-32",)),
}


def expected(name: str) -> str:
    known = {"latin-1": "cañón", "a last letter": "café", "utf-16 the other way": RUSSIAN, "utf-32": JAPANESE}
    return known.get(name, WORDS)


@pytest.mark.parametrize("name", list(BYTES))
def test_a_caption_is_read_by_its_bytes(tmp_path: Path, name: str) -> None:
    data, changed = BYTES[name]
    write(tmp_path, {"a.png": png(0), "a.txt": data})
    assert texts(read(tmp_path)) == [(expected(name), changed)]
    write(tmp_path / "prose", {"a.txt": data, "b.txt.gz": gzip.compress(data)})
    assert texts(read(tmp_path / "prose")) == [(expected(name), changed)] * 2


@pytest.mark.parametrize("name", list(BYTES))
@pytest.mark.parametrize("split", ["line", "paragraph"])
def test_lines_of_a_text_in_an_encoding(tmp_path: Path, name: str, split: str) -> None:
    """A line that is ASCII is read as the whole file is, and the numbers of lines stay."""
    data, changed = BYTES[name]
    encoding = {"utf-8 with a mark": "utf-8-sig", "cp1252": "cp1252", "latin-1": "cp1252", "a last letter": "cp1252"}
    mark = data[:4] if "utf-32" in name else data[:2] if changed and "without" not in name and "utf" in name else b""
    code = (changed[0].removeprefix("read as ") if changed else "utf-8").removesuffix("-sig")
    code = {"utf-16": "utf-16-be" if mark == codecs.BOM_UTF16_BE else "utf-16-le", "utf-32": "utf-32-le"}.get(
        code, code
    )
    gap = "\r\n" if split == "line" else "\n\n"
    whole = data + (gap + "plain" + gap).encode(code) + data[len(mark) :]
    if name in encoding and name == "utf-8 with a mark":
        whole = data + (gap + "plain" + gap).encode() + WORDS.encode()
    items = read(write(tmp_path, {"a.txt": whole}) / "a.txt", split=split)
    assert [words for words, _ in texts(items)] == [expected(name), "plain", expected(name)]
    assert {notes for _, notes in texts(items)} == {changed}
    assert [item.key for item in items] == [f"a.txt:{line}" for line in ((1, 2, 3) if split == "line" else (1, 3, 5))]


@pytest.mark.parametrize("code", ["cp1252", "utf-16", "utf-16-le", "utf-8-sig"])
def test_tables_and_records(tmp_path: Path, code: str) -> None:
    changed = () if code == "utf-8-sig" else (f"read as {code}",)
    write(tmp_path / "csv", {"a.png": png(0), "list.csv": f"file_name,caption\r\na.png,{WORDS}\r\n".encode(code)})
    assert texts(read(tmp_path / "csv")) == [(WORDS, changed)]
    row = json.dumps({"file_name": "a.png", "text": WORDS}, ensure_ascii=False)
    write(tmp_path / "metadata", {"a.png": png(0), "metadata.jsonl": f"{row}\n".encode(code)})
    assert texts(read(tmp_path / "metadata")) == [(WORDS, changed)]
    write(tmp_path / "lines", {"a.png": png(0), "talk.jsonl": f"{row}\n\n{row}\n".encode(code)})
    assert texts(read(tmp_path / "lines")) == [(WORDS, changed)] * 2
    write(tmp_path / "list", {"a.png": png(0), "all.json": f"[{row}]".encode(code)})
    assert texts(read(tmp_path / "list")) == [(WORDS, changed)]
    coco = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "caption": WORDS}]}
    write(tmp_path / "coco", {"a.png": png(0), "captions.json": json.dumps(coco, ensure_ascii=False).encode(code)})
    assert texts(read(tmp_path / "coco")) == [(WORDS, changed)]
    named = json.dumps({"a.png": WORDS}, ensure_ascii=False)
    write(tmp_path / "named", {"a.png": png(0), "meta_cap.json": named.encode(code)})
    assert texts(read(tmp_path / "named")) == [(WORDS, changed)]


FOREIGN = {"koi8-r": RUSSIAN, "cp1251": RUSSIAN, "shift_jis": JAPANESE, "euc-jp": JAPANESE, "cp1253": "κόκκινη μπάλα"}


@pytest.mark.parametrize("code", list(FOREIGN))
def test_other_alphabets_are_not_garbled_but_named(tmp_path: Path, code: str) -> None:
    data = FOREIGN[code].encode(code)
    write(tmp_path, {"a.png": png(0), "a.txt": data, "b/words.txt": b"one\n" + data + b"\nthree"})
    (item,) = read(tmp_path)
    assert isinstance(item, Fault)
    assert item.reason.startswith("a.txt: expected UTF-8 (or --encoding NAME), found something else at byte ")
    assert texts(read(tmp_path, encoding=code)) == [(FOREIGN[code], (f"read as {code}",))]
    words = tmp_path / "b" / "words.txt"
    assert [type(item) for item in read(words, split="line")] == [Raw, Fault, Raw]
    assert [word for word, _ in texts(read(words, split="line", encoding=code))] == ["one", FOREIGN[code], "three"]


def test_a_mark_goes_before_the_option(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": png(0), "a.txt": codecs.BOM_UTF8 + WORDS.encode()})
    assert texts(read(tmp_path, encoding="cp1251")) == [(WORDS, ())]


def test_a_byte_that_the_encoding_does_not_have_costs_one_line(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": b"one\ncaf\xe9 \x81\nthree caf\xe9"})
    items = read(tmp_path / "a.txt", split="line", encoding="cp1252")
    assert [type(item) for item in items] == [Raw, Fault, Raw]
    assert items[1].key == "a.txt:2"
    with pytest.raises(ValueError, match=r"encoding: expected the name of a character set .*, found klingon"):
        Columns(encoding="klingon")
    with pytest.raises(ValueError, match="found hex"):
        Columns(encoding="hex")


@pytest.mark.parametrize("data", [b"\xff\xfea", b"\xff\xfe\x00\xd8a\x00", b"\x00\x00\xfe\xffabc"])
def test_damaged_wide_text_is_a_fault(tmp_path: Path, data: bytes) -> None:
    (item,) = read(write(tmp_path, {"a.png": png(0), "a.txt": data}))
    assert isinstance(item, Fault)
    assert "\n" not in item.reason


def test_a_build_counts_them(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for number, (data, _) in enumerate(BYTES.values()):
        write(tmp_path / "in", {f"{number}.png": png(number), f"{number}.txt": data})
    write(tmp_path / "in", {"x.png": png(99), "x.txt": RUSSIAN.encode("koi8-r")})
    assert (
        run(["data", "build", str(tmp_path / "in"), str(tmp_path / "out"), "--size", "8", "--vocabulary", "300"]) == 0
    )
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert "3 read as cp1252" in line
    assert "2 read as utf-16," in line
    assert "1 faulty" in line
    data = DataSet(str(tmp_path / "out"))
    assert [data.read(n).parts[1] for n in range(len(data))] == [expected(name) for name in BYTES]
    (fault,) = map(json.loads, (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines())
    assert fault["key"] == "x.png"
    config = BuildConfig(size=8, vocabulary=300, columns=Columns(encoding="koi8-r", reader="text"))
    write(tmp_path / "text", {"a.txt": RUSSIAN.encode("koi8-r")})
    counts = build_set(str(tmp_path / "text"), tmp_path / "words", config, workers=0)
    assert (counts["changed"], counts["faulty"]) == ({"read as koi8-r": 1}, 0)
