"""A folder of 30 formats, each with 20 faults: each file is in the set or in a list, and totals add up."""

from __future__ import annotations

import io
import json
import os
import random
import struct
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from conftest import write

from transfuse.cli import run
from transfuse.data.dataset import DataSet
from transfuse.data.readers import Columns, Fault, open_source

READ = {
    "png": "PNG",
    "apng": "PNG",
    "jpg": "JPEG",
    "jpeg": "JPEG",
    "jfif": "JPEG",
    "webp": "WEBP",
    "gif": "GIF",
    "bmp": "BMP",
    "dib": "DIB",
    "tif": "TIFF",
    "tiff": "TIFF",
    "avif": "AVIF",
    "jp2": "JPEG2000",
    "j2k": "JPEG2000",
    "ppm": "PPM",
    "pgm": "PPM",
    "ico": "ICO",
    "heic": "HEIF",
}
"""endings that are read, and how PIL writes such a file"""
OTHERS = ["svg", "psd", "tga", "pcx", "pdf", "mp4", "zip", "html", "db", "exr", "", "xmp"]
"""endings that are left out"""
FAULTS = [
    *("empty", "truncated", "garbage", "another format", "folder", "no caption", "two captions", "empty caption"),
    *("caption of other bytes", "huge header", "hidden", "hidden folder", "broken link", "link", "pipe"),
    *("name of other bytes", "deep", "capitals", "unreadable", "the same again"),
]
STRAY = {
    "events.jsonl": b'{"text": "a line of a log"}\n{"step": 1}',
    "empty.jsonl": b"",
    "run.jsonl.gz": b"\x1f\x8b",
    "sub/sizes.json": b'{"0000.png": [12, 16]}',
    "sizes.csv": b"name,width\n0000.png,12\n0001.png,12\n",
    "metadata.csv": b'file_name,text\n"open',
    "annotations.json": b'{"images": [{"id": 1, "file_name": null}], "annotations": [{"image_id": 1, "caption": 5}]}',
    "cut.tar": b"0.png\0",
    "cut.parquet": b"PAR1",
}
"""lists and archives without a caption of an image, which no document is made of"""


def image(ending: str, number: int) -> bytes:
    stream, form = io.BytesIO(), READ.get(ending, "PNG")
    pixels = PIL.Image.fromarray(np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8))
    if form == "HEIF":
        return (Path(__file__).parents[1] / "golden" / "gradient.heic").read_bytes()
    pixels.convert("L" if ending == "pgm" else "RGB").save(stream, form)
    return stream.getvalue()


def add(folder: Path, stem: str, ending: str, fault: str, number: int) -> None:
    """Write one image, its caption, and what is wrong with them."""
    data, name = image(ending, number), f"{stem}.{ending}".rstrip(".")
    captions = {f"{stem}.txt": f"image number {number}"}
    match fault:
        case "empty":
            data = b""
        case "truncated":
            data = data[: len(data) // 3]
        case "garbage":
            data = random.Random(number).randbytes(99)
        case "another format":
            data = image("bmp" if ending != "bmp" else "png", number)
        case "huge header":
            head = struct.pack(">IIBBBBB", 90_000, 90_000, 8, 2, 0, 0, 0)
            data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + head + bytes(40)
        case "the same again":
            data, captions = image("png", 0), {f"{stem}.txt": "image of all"}
        case "no caption":
            captions = {}
        case "two captions":
            captions[f"{stem}.caption"] = f"again number {number}"
        case "empty caption":
            captions = {f"{stem}.txt": " \n"}
        case "hidden":
            name = f".{name}"
        case "hidden folder":
            name, captions = f".thumbs/{name}", {}
        case "deep":
            name = f"{stem}/a/b/c.{ending}".rstrip(".")
            captions = {f"{stem}/a/b/c.txt": f"image number {number}"}
        case "capitals":
            name = f"{stem}.{ending.upper()}".rstrip(".")
    if fault == "folder":
        (folder / name).mkdir()
        write(folder, captions)
    elif fault == "broken link":
        (folder / name).symlink_to(folder / "nowhere")
    elif fault == "pipe":
        os.mkfifo(folder / name)
    elif fault == "link":
        write(folder.parent / "elsewhere", {name: data})
        (folder / name).symlink_to(folder.parent / "elsewhere" / name)
        write(folder, captions)
    elif fault == "name of other bytes":
        for path, content in ((name, data), *((path, text.encode()) for path, text in captions.items())):
            write(folder, {os.fsdecode(b"other-\xff-") + path.replace("/", "-"): content})
    else:
        write(folder, {name: data, **captions})
        if fault == "caption of other bytes":
            write(folder, {f"{stem}.txt": b"caf\xe9 \xff\xfe"})
        if fault == "unreadable":
            (folder / name).chmod(0)


def entries(folder: Path) -> set[str]:
    """Return what is in a folder and its folders, folders themselves and links to them left out."""
    paths = (Path(place, name) for place, _, names in os.walk(folder) for name in names)
    return {os.fsencode(path.relative_to(folder)).decode(errors="backslashreplace") for path in paths}


def shown(name: str) -> str:
    return os.fsencode(name).decode(errors="backslashreplace")


@pytest.mark.parametrize(("count", "step"), [(150, 7), pytest.param(2_000, 1, marks=pytest.mark.long)])
def test_every_file_is_in_the_set_or_in_a_list(
    tmp_path: Path, count: int, step: int, capfd: pytest.CaptureFixture[str]
) -> None:
    source, draw = tmp_path / "source", random.Random(count)
    endings, faults, made = [*READ, *OTHERS], [*FAULTS, "whole"], set[tuple[str, str]]()
    write(source, STRAY)
    for number in range(0, count * step, step):
        ending, fault = endings[number % 30], faults[number // 30 % 21]
        made.add((ending, fault))
        add(source, f"{draw.choice(['', 'sub/'])}{number:04d}", ending, fault, number)
    assert (len(endings), len(FAULTS)) == (30, 20)
    assert {ending for ending, _ in made} == {*endings}
    assert {fault for _, fault in made} == {*faults}
    assert step > 1 or len(made) == 30 * 21
    (source / "loop").symlink_to(source)
    (source / "sub" / "up").symlink_to(source / "sub")
    (source / "twice").symlink_to(source / "sub")
    settings = ["--size", "8", "--vocabulary", "300", "--workers", "0", "--max-errors", "1", "--json"]
    assert run(["data", "build", str(source), str(tmp_path / "set"), *settings]) == 0
    printed = capfd.readouterr()
    assert "Traceback" not in printed.err
    counts = json.loads(printed.out.splitlines()[-1])

    def names(file: str, field: str) -> list[str]:
        return [shown(json.loads(line)[field]) for line in (tmp_path / "set" / file).read_text().splitlines()]

    left_out, faulty, dropped = (
        names("left_out.jsonl", "file"),
        names("quarantine.jsonl", "key"),
        names("dropped.jsonl", "key"),
    )
    assert counts["seen"] == counts["documents"] + counts["faulty"] + sum(counts["dropped"].values())
    assert (len(faulty), len(dropped)) == (counts["faulty"], sum(counts["dropped"].values()))
    assert counts["files"]["found"] == counts["files"]["read"] + counts["files"]["left out"]
    assert len(set(left_out)) == len(left_out) == counts["files"]["left out"]
    assert {"loop", "sub/up", "twice"} <= set(left_out), "folders by another way"
    assert {*STRAY} <= set(left_out)
    present = entries(source)
    assert counts["files"]["found"] == len(present) + 3

    reader = open_source(str(source), Columns())
    items = [item for part in reader.parts() for item in reader.read(part)]
    documents = {shown(item.key) for item in items if not isinstance(item, Fault)}
    used = {shown(name) for name in reader.contents()} & present
    assert used | set(left_out) == present | {"loop", "sub/up", "twice"}
    assert not used & set(left_out)
    assert set(faulty) | set(dropped) <= present
    assert len(documents - set(faulty) - set(dropped)) == counts["documents"] == len(DataSet(str(tmp_path / "set")))
    images = {name for name in present if name.lower().endswith(tuple(f".{ending}" for ending in READ))}
    assert images <= documents | set(faulty) | set(dropped) | set(left_out)
