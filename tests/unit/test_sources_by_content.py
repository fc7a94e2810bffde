"""A build knows its source by content: an edit that keeps names, sizes and times is another source, never mixed in."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from conftest import write

from transfuse.data.building import Writer, build_set
from transfuse.data.building.prepare import BuildConfig
from transfuse.data.dataset import DataSet
from transfuse.errors import UserError

CONFIG = BuildConfig(size=16, vocabulary=300, shard_size=2, heldout=0.0)
COUNT = 6


class Killed(BaseException):
    """Stands for the end of the process."""


def bmp(number: int) -> bytes:
    """Every picture has as many bytes as any other."""
    stream = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(stream, "bmp")
    return stream.getvalue()


def folder(place: Path) -> Path:
    return write(
        place, {f"{n}.{end}": data for n in range(COUNT) for end, data in (("bmp", bmp(n)), ("txt", caption(n)))}
    )


def caption(number: int) -> bytes:
    return f"number {number} is a crab".encode()


def tabled(place: Path) -> Path:
    rows = ["file_name,text", *(f"{n}.bmp,{caption(n).decode()}" for n in range(COUNT))]
    return write(place, {"metadata.csv": "\n".join(rows), **{f"{n}.bmp": bmp(n) for n in range(COUNT)}})


def tars(place: Path) -> Path:
    place.mkdir(parents=True)
    with tarfile.open(place / "a.tar", "w") as file:
        for n in range(COUNT):
            for end, data in (("bmp", bmp(n)), ("txt", caption(n))):
                header = tarfile.TarInfo(f"{n}.{end}")
                header.size = len(data)
                file.addfile(header, io.BytesIO(data))
    return place


def stories(place: Path) -> Path:
    rows = [{"parts": [{"text": caption(n).decode()}, {"image": f"deep/{n}.bmp"}]} for n in range(COUNT)]
    lines = "\n".join(map(json.dumps, rows))
    return write(place, {"d.jsonl": lines, **{f"deep/{n}.bmp": bmp(n) for n in range(COUNT)}})


def parquet(place: Path) -> Path:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    place.mkdir(parents=True)
    rows = arrow.table({"image": [bmp(n) for n in range(COUNT)], "text": [caption(n).decode() for n in range(COUNT)]})
    parquet.write_table(rows, place / "a.parquet", compression="none", use_dictionary=False, write_statistics=False)
    return place


def prose(place: Path) -> Path:
    return write(place, {f"{n}.txt": caption(n) for n in range(COUNT)})


Case = tuple[Callable[[Path], Path], str]
CASES: dict[str, Case] = {
    "a caption": (folder, "4.txt"),
    "a picture": (folder, "4.bmp"),
    "a picture of a table": (tabled, "2.bmp"),
    "a tar": (tars, "a.tar"),
    "a jsonl": (stories, "d.jsonl"),
    "a picture that a jsonl names": (stories, "deep/3.bmp"),
    "a parquet": (parquet, "a.parquet"),
    "text": (prose, "5.txt"),
}
every_case = pytest.mark.parametrize("case", list(CASES.values()), ids=list(CASES))


def edit(path: Path) -> None:
    """The last letters of a caption, or pixels, become others: as many bytes, and the old time."""
    before, data = path.stat(), path.read_bytes()
    other = data.replace(b"crab", b"frog") if b"crab" in data else data[:-300] + bytes(reversed(data[-300:]))
    assert other != data
    path.write_bytes(other)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def half(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, config: BuildConfig = CONFIG) -> None:
    """A build that is killed when all but the last shard is written."""
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "finish", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            build_set(str(source), out, config, workers=0)


def refused(source: Path, out: Path, config: BuildConfig = CONFIG) -> str:
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as caught:
        build_set(str(source), out, config, workers=0)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def begun_again(source: Path, out: Path, caplog: pytest.LogCaptureFixture) -> str:
    """Build in a folder with half a set: the same to the byte as a straight build. Return what was said about it."""
    caplog.clear()
    build_set(str(source), out, CONFIG, workers=0)
    straight = out.with_name("straight")
    shutil.rmtree(straight, ignore_errors=True)
    build_set(str(source), straight, CONFIG, workers=0)
    for path in straight.rglob("*"):
        assert path.is_dir() or path.read_bytes() == (out / path.relative_to(straight)).read_bytes()
    (line,) = [line for line in caplog.messages if "begun again" in line]
    return line


@every_case
def test_a_built_set_of_a_source_edited_since(tmp_path: Path, case: Case) -> None:
    make, name = case
    source, out = make(tmp_path / "source"), tmp_path / "out"
    first = build_set(str(source), out, CONFIG, workers=0)
    assert build_set(str(source), out, CONFIG, workers=0) == {**first, "seconds": 0.0}
    edit(source / name)
    line = refused(source, out)
    assert "listing: expected the same source, found another source, or one that has changed; name another" in line
    assert line.endswith(f"or remove {out}, to build it again")
    other = build_set(str(source), tmp_path / "other", CONFIG, workers=0)
    assert other["documents"] == first["documents"]
    assert shards(tmp_path / "other") != shards(out)


def shards(out: Path) -> list[str]:
    return [shard.sha256 for shard in DataSet(str(out)).manifest.shards]


@every_case
def test_a_half_built_set_of_a_source_edited_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, case: Case
) -> None:
    make, name = case
    source, out = make(tmp_path / "source"), tmp_path / "out"
    half(source, out, monkeypatch)
    edit(source / name)
    assert f"the source has changed ({name} has other content)" in begun_again(source, out, caplog)


def test_what_is_new_and_what_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = folder(tmp_path / "source")
    half(source, tmp_path / "a", monkeypatch)
    half(source, tmp_path / "b", monkeypatch)
    words = (source / "2.txt").read_bytes()
    (source / "2.txt").unlink()
    assert "(2.txt is gone)" in begun_again(source, tmp_path / "a", caplog)
    (source / "2.txt").write_bytes(words)
    write(source, {"9.bmp": bmp(9), "9.txt": caption(9)})
    message = begun_again(source, tmp_path / "b", caplog)
    assert "(the list of pictures and captions has other content, and 2 more changed)" in message


@pytest.mark.parametrize("made", [tars, prose])
def test_a_file_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, made: Callable[[Path], Path]
) -> None:
    source, out = made(tmp_path / "source"), tmp_path / "out"
    half(source, out, monkeypatch)
    name = "z.tar" if made is tars else "z.txt"
    first = next(path for path in sorted(source.iterdir()))
    write(source, {name: first.read_bytes()})
    assert f"({name} is new)" in begun_again(source, out, caplog)


def test_a_half_built_set_of_another_source_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half(tars(tmp_path / "tars"), tmp_path / "out", monkeypatch)
    assert "listing: expected the same source, found another source" in refused(
        prose(tmp_path / "prose"), tmp_path / "out"
    )


def test_a_source_that_changes_while_it_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source, out = folder(tmp_path / "source"), tmp_path / "out"
    add, done = Writer.add, []

    def meanwhile(writer: Writer, *arguments: object) -> None:
        if not done:
            edit(source / "5.txt")
        done.append(1)
        add(writer, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "add", meanwhile)
        with pytest.raises(UserError, match=r"changed while the set was built \(5\.txt has other content\); the same "):
            build_set(str(source), out, CONFIG, workers=0)
    assert not (out / "manifest.json").exists()
    assert "5.txt has other content" in begun_again(source, out, caplog)


@pytest.mark.parametrize("done", [True, False])
def test_a_tokenizer_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: bool) -> None:
    source, out = folder(tmp_path / "source"), tmp_path / "out"
    for name, vocabulary in (("a", 300), ("b", 262)):
        build_set(str(source), tmp_path / name, replace(CONFIG, vocabulary=vocabulary), workers=0)
    config = replace(CONFIG, tokenizer=str(tmp_path / "tokenizer.json"))
    write(tmp_path, {"tokenizer.json": (tmp_path / "a" / "tokenizer.json").read_bytes()})
    if done:
        build_set(str(source), out, config, workers=0)
        assert build_set(str(source), out, config, workers=0)["seconds"] == 0
    else:
        half(source, out, monkeypatch, config)
    write(tmp_path, {"tokenizer.json": (tmp_path / "b" / "tokenizer.json").read_bytes()})
    assert 'tokenizer_fingerprint: expected "' in refused(source, out, config)


def test_a_set_of_another_layout_is_built_again_elsewhere(tmp_path: Path) -> None:
    source, out = folder(tmp_path / "source"), tmp_path / "out"
    build_set(str(source), out, CONFIG, workers=0)
    manifest = json.loads((out / "manifest.json").read_text())
    write(out, {"manifest.json": json.dumps({**manifest, "version": 1})})
    assert refused(source, out).endswith(f"name another folder, or remove {out}, to build it again")


def test_a_half_built_set_of_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions may decode pictures otherwise: their documents are not mixed."""
    source, out = folder(tmp_path / "source"), tmp_path / "out"
    half(source, out, monkeypatch)
    path = out / "building" / "settings.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "transfuse": "0.0.1"}))
    assert 'transfuse: expected "' in refused(source, out)
