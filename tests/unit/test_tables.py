"""Tables and lists as people have them: every caption is read as it was written, or a line says which is not."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from conftest import write

from transfuse.data.readers import Columns, Fault, Raw, open_source
from transfuse.errors import UserError


def read(
    folder: Path, files: dict[str, str], below: str = "", **columns: Any
) -> tuple[dict[str, tuple[Any, ...]], dict[str, str]]:
    """Return the captions, and the faults, by image; there are images 0.png, 1.png and 2.png in the folder `below`."""
    write(folder, {f"{below}{number}.png": b"%d" % number for number in range(3)} | files)
    reader = open_source(str(folder), Columns(**columns))
    items = [item for part in reader.parts() for item in reader.read(part)]
    captions = {item.key: item.parts[1:] for item in items if isinstance(item, Raw)}
    return captions, {item.key: item.reason for item in items if isinstance(item, Fault)}


@pytest.mark.parametrize("name", ["list.csv", "list.tsv", "metadata.csv"])
@pytest.mark.parametrize("columns", [("", "file_name", "text"), ("", "text", "file_name"), ("file_name", "", "text")])
def test_a_column_without_a_name_is_no_surplus(tmp_path: Path, name: str, columns: tuple[str, ...]) -> None:
    """pandas writes its index into such a column."""
    rows = [{"": str(n), "file_name": f"{n}.png", "text": f"number {n}"} for n in range(3)]
    mark = "\t" if name.endswith("tsv") else ","
    told = "".join(mark.join(row[column] for column in columns) + "\n" for row in rows)
    expected = {f"{n}.png": (f"number {n}",) for n in range(3)}
    assert read(tmp_path, {name: mark.join(columns) + "\n" + told}) == (expected, {})


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (["1\t0.png\ta red cat", "2\t1.png\ta dog", "3\t2.png\t"], ["a red cat", "a dog", ""]),
        (["1,0.png,a cat", "2,1.png,a dog, asleep", "3,2.png,a cow"], ["a cat", "a dog, asleep", "a cow"]),
        (["0.png,a cat, sitting", "1.png,a dog", "2.png,a, b, 2"], ["a cat, sitting", "a dog", "a, b, 2"]),
        (["a cat; sitting;0.png", "a dog;1.png", "red; too;2.png"], ["a cat; sitting", "a dog", "red; too"]),
        (["0.png#0\ta cat\t3", "1.png#0\ta dog\t4", "2.png#0\ta hen\t5"], ["a cat", "a dog", "a hen"]),
        (['"0.png","a cat, red"', '"1.png","a ""dog"""', '"2.png","hen"'], ["a cat, red", 'a "dog"', "hen"]),
        (['"0.png"\t"a cat"', '"1.png"\t"a dog"', '"2.png"\t"a hen"'], ["a cat", "a dog", "a hen"]),
        (['0.png\t"Stop" sign', '1.png\t"open', '2.png\t"whole"'], ['"Stop" sign', '"open', '"whole"']),
        (["0.png| 0| a cat | sits", "1.png| 1| a dog", "2.png| 2 a hen"], ["a cat | sits", "a dog", ""]),
    ],
)
def test_lists_without_a_head(tmp_path: Path, rows: list[str], expected: list[str], end: str) -> None:
    """The image is found by its name, numbers are no captions, and all other fields are."""
    captions, faults = read(tmp_path, {"list.csv": end.join([*rows, ""])})
    assert captions == {f"{n}.png": (words,) for n, words in enumerate(expected) if words}
    assert faults == {f"{n}.png": "expected a caption, found none" for n, words in enumerate(expected) if not words}


OPEN = ['0.png{}"Stop" sign', '1.png{}"an open quote', "2.png{}a dog"]


@pytest.mark.parametrize("rows", [OPEN, OPEN[1:], [*OPEN[1:], '0.png{}27"'], ['0.png{}a 5" disc', *OPEN[1:]]])
def test_a_quote_that_stays_open_takes_no_other_row(tmp_path: Path, rows: list[str]) -> None:
    """With tabs quotes are part of the text; with commas the line is named."""
    expected = {row[:5]: (row[7:],) for row in rows}
    table = "\n".join(["image{}caption", *rows, ""])
    captions, _ = read(tmp_path / "a", {"list.tsv": table.replace("{}", "\t")})
    assert captions == expected
    line = 2 + next(n for n, row in enumerate(rows) if row[7] == '"')
    with pytest.raises(UserError, match=rf"list\.csv: expected a table of .*, found something else \(line {line}: "):
        read(tmp_path / "b", {"list.csv": table.replace("{}", ",")})


def test_quotes_as_csv_has_them_stay(tmp_path: Path) -> None:
    told = 'file_name{0}text\n0.png{0}"a{0} ""big""\ncat"\n1.png{0}5" wide\n2.png{0}"b"\n'
    for name, mark in (("list.csv", ","), ("list.tsv", "\t")):
        captions, faults = read(tmp_path / name, {name: told.format(mark)})
        assert (captions, faults) == (
            {"0.png": (f'a{mark} "big"\ncat',), "1.png": ('5" wide',), "2.png": ("b",)},
            {},
        )


@pytest.mark.parametrize(
    ("head", "columns"),
    [
        ("image,caption,caption,caption", {}),
        ("image,Caption,caption_2,caption_3", {}),
        ("text,text1,text.2,path", {}),
        ("image,caption_0,caption_1,caption_2", {}),
        ("description,file,description,description", {}),
        ("image,mine,mine,mine", {"caption_column": "mine"}),
    ],
)
def test_several_captions_in_columns(tmp_path: Path, head: str, columns: dict[str, str]) -> None:
    """Columns of one name, or of one name and a number."""
    heads = head.split(",")
    place = next(n for n, name in enumerate(heads) if name in ("image", "path", "file"))
    words = [["one", "two", "three"], ["four", "five", ""], ["six", "", "seven"]]
    rows = [[*told[:place], f"{n}.png", *told[place:]] for n, told in enumerate(words)]
    expected = {f"{n}.png": tuple(filter(None, told)) for n, told in enumerate(words)}
    table = {"list.csv": "\n".join([head, *map(",".join, rows)])}
    assert read(tmp_path / "csv", table, **columns) == (expected, {})
    if len(set(heads)) == len(heads):
        records = [dict(zip(heads, row, strict=True)) for row in rows]
        told = {name: "".join(json.dumps(record) + "\n" for record in records) for name in ("a.jsonl",)}
        items, faults = read(tmp_path / "jsonl", told, **columns)
        assert ([*items.values()], faults) == ([*expected.values()], {})


def test_another_row_too_many_of_a_row_with_several_captions(tmp_path: Path) -> None:
    captions, faults = read(tmp_path, {"list.csv": "image,text,text\n0.png,one,two, three\n1.png,a,b\n2.png,c,d\n"})
    assert captions == {"1.png": ("a", "b"), "2.png": ("c", "d")}
    assert list(faults) == ["0.png"]


def test_faulty_rows_of_one_image_are_counted(tmp_path: Path) -> None:
    rows = ["0.png,one, two,web", "0.png,three, four,web", "1.png,five,web", "0.png,,web", "2.png,,web"]
    captions, faults = read(tmp_path, {"list.csv": "\n".join(["image,caption,source", *rows])})
    assert captions == {"1.png": ("five",)}
    assert faults["0.png"].endswith("a comma needs quotes around it (and 2 more of its rows)")
    assert faults["2.png"] == "expected a caption, found none"


def coco(images: list[tuple[int, str]], annotations: list[tuple[int, Any]]) -> dict[str, str]:
    listed = [{"id": number, "file_name": name} for number, name in images]
    told = [{"image_id": number, "caption": words} for number, words in annotations]
    return {"captions.json": json.dumps({"images": listed, "annotations": told})}


def test_captions_of_coco_that_are_no_words(tmp_path: Path) -> None:
    images = [(n, f"{n}.png") for n in range(3)]
    told = [(0, None), (1, ["a", "b"]), (2, "whole"), (2, float("nan")), (2, 5)]
    captions, faults = read(tmp_path, coco(images, told))
    assert captions == {"1.png": ("a", "b"), "2.png": ("whole",)}
    assert faults == {
        "0.png": "expected a caption, found none",
        "2.png": "expected words in caption, found NaN (and 1 more of its rows)",
    }


def test_captions_of_coco_that_are_of_no_image_or_of_two(tmp_path: Path) -> None:
    images = [(0, "0.png"), (0, "1.png"), (2, "2.png"), (2, "2.png")]
    captions, faults = read(tmp_path, coco(images, [(0, "which"), (2, "two"), (99, "lost"), (99, "too")]))
    assert captions == {"2.png": ("two",)}
    assert faults == {
        **dict.fromkeys(["0.png", "1.png"], "expected one image of the id 0, found 0.png and 1.png"),
        "image_id 99": "expected an image of this id, found none (and 1 more of its rows)",
    }


@pytest.mark.parametrize("below", ["images/", ""])
@pytest.mark.parametrize("name", ["list.csv", "meta_cap.json"])
def test_two_paths_to_one_image(tmp_path: Path, below: str, name: str) -> None:
    """Nobody knows which of two folders that are gone has the image; one that has moved is found."""
    told = {"cats/0.png": "a cat", "dogs/0.png": "a dog", "1.png": "one", "dogs/2.png": "two"}
    table = "image,caption\n" + "".join(f"{image},{words}\n" for image, words in told.items())
    if name == "meta_cap.json":
        table = json.dumps({image: {"caption": words} for image, words in told.items()})
    captions, faults = read(tmp_path / "a", {name: table}, below)
    assert captions == {f"{below}1.png": ("one",), f"{below}2.png": ("two",)}
    both = "expected one image for each path, found it for cats/0.png and dogs/0.png (and 1 more of its rows)"
    assert faults == {f"{below}0.png": both}
    table = "image,caption\n" + "".join(f"{folder}1.png,{n}\n" for n, folder in enumerate(("a/b/", "./a/b/", "B/")))
    captions, _ = read(tmp_path / "b", {"list.csv": table}, below)
    assert captions == {f"{below}1.png": ("0", "1", "2")}


def test_a_field_with_two_values(tmp_path: Path) -> None:
    twice = '{"file_name": "0.png", "text": "first", "text": "second"}'
    same = '{"file_name": "1.png", "file_name": "1.png", "text": "one"}'
    with pytest.raises(UserError, match=r'metadata\.jsonl: .* in line 2 found .*two values of "text"'):
        read(tmp_path / "a", {"metadata.jsonl": f"{same}\n{twice}\n"})
    captions, faults = read(tmp_path / "b", {"all.jsonl": f"{same}\n{twice}\n"})
    assert captions == {"all.jsonl:1": ("one",)}
    assert 'two values of "text"' in faults["all.jsonl:2"]
    kohya = '{"0.png": {"caption": "first"}, "1.png": {"caption": "x"}, "0.png": {"caption": "second"}}'
    with pytest.raises(UserError, match=r'two values of "0\.png"'):
        read(tmp_path / "c", {"meta_cap.json": kohya})


@pytest.mark.parametrize(
    ("field", "captions"),
    [
        ("['a cat', 'big']", ("a cat", "big")),
        ("""["it's one", 'a "two"', ]""", ("it's one", 'a "two"')),
        ("['one' 'two'\n 'three']", ("one", "two", "three")),
        ('["caf\\u00e9", "b"]', ("café", "b")),
        ("[]", ()),
        ("[a cat]", ("[a cat]",)),
        ("['a cat'] sits ['b']", ("['a cat'] sits ['b']",)),
    ],
)
def test_lists_in_fields_of_tables(tmp_path: Path, field: str, captions: tuple[str, ...]) -> None:
    quoted = field.replace('"', '""')
    captions_read, faults = read(tmp_path, {"list.csv": f'file_name,text\n0.png,"{quoted}"\n1.png,one\n2.png,two\n'})
    assert captions_read.get("0.png", ()) == captions
    assert bool(faults) == (not captions)


@pytest.mark.parametrize("weights", ["[1e39, 1]", "[1e-60, 1]", f"[1{'0' * 400}, 1]", f"[1{'0' * 400}, -1]"])
def test_weights_that_the_index_cannot_have(tmp_path: Path, weights: str) -> None:
    record = f'{{"captions": ["a", "b"], "weights": {weights}}}'
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        for name, data in (("a.png", b"0"), ("a.json", record.encode())):
            header = tarfile.TarInfo(name)
            header.size = len(data)
            file.addfile(header, io.BytesIO(data))
    reader = open_source(str(tmp_path), Columns())
    (fault,) = [item for part in reader.parts() for item in reader.read(part)]
    assert isinstance(fault, Fault)
    assert fault.reason.startswith("expected weights above 0 in float32, found ")
