"""A set built twice is the same to the byte, however it was stopped; documents left out are listed; damage is found."""

from __future__ import annotations

import base64
import errno
import io
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import write
from hypothesis import given
from hypothesis import strategies as st

from transfuse.autoencoders import ImageAutoencoder, open_autoencoder, save_autoencoder
from transfuse.cli import run
from transfuse.data.building import Writer, build_set, verify_set
from transfuse.data.building.prepare import BuildConfig, bucket
from transfuse.data.dataset import DataSet
from transfuse.data.readers import LOST_REST, Columns
from transfuse.errors import UserError
from transfuse.images import decode_image, fit, read_image
from transfuse.sequence import Tokenizer

CONFIG = BuildConfig(size=16, vocabulary=300, shard_size=4, heldout=0.2)
PICTURES = 18


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


def pixels(number: int, rows: int = 16, columns: int = 16) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (rows, columns, 3), dtype=np.uint8)


def png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    PIL.Image.fromarray(image).save(stream, "png")
    return stream.getvalue()


def pictures(folder: Path) -> Path:
    """18 pictures: one is broken, one has no caption, one is small, two are equal to an earlier one."""
    for i in range(PICTURES):
        write(folder, {f"{i:02d}.png": png(pixels(i, 16 + i % 3)), f"{i:02d}.txt": f"picture number {i}, a crab"})
    write(folder, {"03.png": b"broken", "08.png": png(pixels(8, 6))})
    for same, item in (("06", "02"), ("15", "14")):
        write(folder, {f"{same}.{end}": (folder / f"{item}.{end}").read_bytes() for end in ("png", "txt")})
    (folder / "11.txt").unlink()
    return folder


def tars(folder: Path, count: int = 7) -> Path:
    """Two tars of `count` pairs each."""
    folder.mkdir(parents=True)
    for number in range(2):
        with tarfile.open(folder / f"{number}.tar", "w") as file:
            for i in range(count):
                for end, data in (("png", png(pixels(10 * number + i))), ("txt", f"number {i}".encode())):
                    header = tarfile.TarInfo(f"{i}.{end}")
                    header.size = len(data)
                    file.addfile(header, io.BytesIO(data))
    return folder


def stories(folder: Path) -> Path:
    rows = [{"parts": [{"text": f"story {i}"}, *[{"image": f"{j}.png"} for j in range(i % 3)]]} for i in range(11)]
    rows[5] = {"parts": []}
    write(folder, {f"{j}.png": png(pixels(j, 10 + j, 20)) for j in range(3)})
    return write(folder, {"d.jsonl": "\n".join(map(json.dumps, rows))})


def prose(folder: Path) -> Path:
    """Twelve paragraphs, some long, and five that are equal to an earlier one."""
    words = [" ".join(f"w{i * j % 17}" for j in range(5 + 9 * (i % 4))) for i in range(12)]
    first, last = [*words[:4], words[3], *words[4:7]], [words[2], *words[7:], words[0], words[3], words[10]]
    return write(folder, {"a.txt": "\n\n".join(first), "b.txt": b"caf\x81", "c.txt": "\n\n".join(last)})


KINDS: dict[str, tuple[Callable[[Path], Path], BuildConfig]] = {
    "pictures": (pictures, replace(CONFIG, min_side=10)),
    "tars": (tars, replace(CONFIG, format="webp", shard_size=5)),
    "stories": (stories, replace(CONFIG, fit="bucket", multiple=8, format="jpeg")),
    "prose": (prose, replace(CONFIG, max_tokens=21, columns=Columns(split="paragraph"))),
}


def build(source: Path | str, out: Path, config: BuildConfig, workers: int = 0, **options: Any) -> dict[str, Any]:
    return build_set(str(source), out, config, workers, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def listed(path: Path) -> list[tuple[str, str]]:
    return [(line["key"], line["reason"]) for line in map(json.loads, path.read_text().splitlines())]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source of each kind, and the set built of it without a stop: NAME, NAME-set."""
    folder = tmp_path_factory.mktemp("sources")
    for name, (make, config) in KINDS.items():
        build(make(folder / name), folder / f"{name}-set", config)
    return folder


@pytest.fixture
def straight(root: Path) -> dict[str, bytes]:
    """All files of the set of pictures."""
    return contents(root / "pictures-set")


def one_line(caught: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the same to the byte ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(KINDS))
def test_whatever_the_number_of_processes_and_the_place(root: Path, tmp_path: Path, name: str) -> None:
    expected = contents(root / f"{name}-set")
    assert {"manifest.json", "tokenizer.json", "documents.npy", "dropped.jsonl", "quarantine.jsonl"} < set(expected)
    assert len([path for path in expected if path.startswith("shards/")]) > 1
    source = KINDS[name][0](tmp_path / "elsewhere" / name)
    for workers in (0, 1, 3):
        build(source, tmp_path / f"{workers}", KINDS[name][1], workers)
        assert contents(tmp_path / f"{workers}") == expected, workers


def test_the_world(tmp_path: Path) -> None:
    config = replace(CONFIG, columns=Columns(count=70), shard_size=64)
    build("world", tmp_path / "a", config, workers=2)
    build("world", tmp_path / "b", config)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len(DataSet(str(tmp_path / "a"))) == 70


@pytest.mark.parametrize("name", list(KINDS))
def test_stopped_after_any_document(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    add, expected = Writer.add, contents(root / f"{name}-set")
    for count in itertools.count(1, 4 if name == "pictures" else 7):
        out, left = tmp_path / f"{count}", [count]

        def mortal(writer: Writer, *arguments: Any, left: list[int] = left) -> None:
            if not left[0]:
                raise Killed
            left[0] -= 1
            add(writer, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(Writer, "add", mortal)
            try:
                build(root / name, out, KINDS[name][1])
                break  # there were no more
            except Killed:
                assert not (out / "manifest.json").exists()
        build(root / name, out, KINDS[name][1])
        assert contents(out) == expected, count
        shutil.rmtree(out)
    assert count >= 8


def die_at_rename(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Ends the process with the file that is number `count` written aside, and not yet under its name."""
    replace_file, left = os.replace, [count]

    def mortal(path: Path, target: Path) -> None:
        if not left[0]:
            raise Killed
        left[0] -= 1
        replace_file(path, target)

    monkeypatch.setattr(os, "replace", mortal)


def test_stopped_between_any_two_files(
    root: Path, straight: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for count in itertools.count(1):
        with monkeypatch.context() as patch:
            die_at_rename(patch, count)
            try:
                build(root / "pictures", tmp_path / f"{count}", KINDS["pictures"][1])
                break
            except Killed:
                assert list((tmp_path / f"{count}").rglob("*.partial"))
        build(root / "pictures", tmp_path / f"{count}", KINDS["pictures"][1])
        assert contents(tmp_path / f"{count}") == straight, count
    assert count > 10


def test_stopped_within_a_text_that_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of those asked for too: it is counted, and not yet whole."""
    write(tmp_path / "s", {f"{i}.txt": f"some words of text {i} " * 12 for i in range(3)})
    config = replace(CONFIG, max_tokens=8, columns=Columns(count=2))
    straight = build(tmp_path / "s", tmp_path / "straight", config)
    assert (straight["seen"], straight["documents"] > 3 * config.shard_size) == (2, True)
    for count in itertools.count(1):
        with monkeypatch.context() as patch:
            die_at_rename(patch, count)
            try:
                build(tmp_path / "s", tmp_path / f"{count}", config)
                break
            except Killed:
                pass
        build(tmp_path / "s", tmp_path / f"{count}", config)
        assert contents(tmp_path / f"{count}") == contents(tmp_path / "straight"), count
    assert count > 10


def test_stopped_before_the_first_file(
    root: Path, straight: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        die_at_rename(patch, 0)
        with pytest.raises(Killed):
            build(root / "pictures", tmp_path / "out", KINDS["pictures"][1])
    build(root / "pictures", tmp_path / "out", KINDS["pictures"][1])
    assert contents(tmp_path / "out") == straight


def test_stopped_after_the_manifest(
    root: Path, straight: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *a, **k: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            build(root / "pictures", tmp_path / "out", KINDS["pictures"][1])
    assert (tmp_path / "out" / "building").exists()
    assert build(root / "pictures", tmp_path / "out", KINDS["pictures"][1])["seconds"] == 0
    assert contents(tmp_path / "out") == straight


@pytest.fixture
def stopped(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A build of the pictures that has three shards of four."""
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "finish", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            build(root / "pictures", tmp_path / "out", KINDS["pictures"][1])
    assert len(list((tmp_path / "out" / "building").glob("*.npz"))) == 3
    return tmp_path / "out"


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("kept", [None, 0, -1])
def test_a_shard_that_is_lost_or_cut(
    root: Path, straight: dict[str, bytes], stopped: Path, number: int, kept: int | None
) -> None:
    path = stopped / "shards" / f"shard-{number:05d}.tar"
    data = path.read_bytes()
    path.unlink()
    if kept is not None:
        path.write_bytes(data[:kept])
    build(root / "pictures", stopped, KINDS["pictures"][1])
    assert contents(stopped) == straight


@pytest.mark.parametrize("kept", [None, 0, 1, 100, 1000, -1])
def test_a_record_that_is_lost_or_cut(root: Path, straight: dict[str, bytes], stopped: Path, kept: int | None) -> None:
    path = stopped / "building" / "shard-00002.npz"
    data = path.read_bytes()
    path.unlink()
    if kept is not None:
        path.write_bytes(data[:kept])
    build(root / "pictures", stopped, KINDS["pictures"][1])
    assert contents(stopped) == straight


def test_what_is_written_is_not_prepared_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With an autoencoder this is all of the time that a build takes."""
    for i in range(70):
        write(tmp_path / "s", {f"{i:02d}.png": png(pixels(i)), f"{i:02d}.txt": f"number {i}"})
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "finish", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            build(tmp_path / "s", tmp_path / "out", CONFIG)
    decoded: list[bytes] = []
    monkeypatch.setattr(
        "transfuse.data.building.prepare.decode_image",
        lambda image, **how: decoded.append(image) or decode_image(image, **how),
    )
    capfd.readouterr()
    assert build(tmp_path / "s", tmp_path / "out", CONFIG)["documents"] == 70
    assert decoded == [png(pixels(68)), png(pixels(69))], "17 shards of four were whole"
    assert "build: 6 documents to do" in capfd.readouterr().err, "a whole part of 64 is done"
    build(tmp_path / "s", tmp_path / "straight", CONFIG)
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


WORLD = ["--size", "16", "--vocabulary", "300", "--shard-size", "24", "--count", "240", "--duplicates", "keep"]


def of_group(group: int) -> list[int]:
    """Processes of a group that live."""
    values = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, owner = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(owner) == group and state not in "ZX":
            values.append(int(path.parent.name))
    return values


def kill_when(command: list[str], moment: Callable[[], bool]) -> bool:
    """Start it, `kill -9` it, and it alone, at a moment; false where it ended before. All of its workers must end."""
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None and not moment():
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        killed = process.wait() == -signal.SIGKILL
        until = time.monotonic() + 5
        while (left := of_group(process.pid)) and time.monotonic() < until:
            time.sleep(0.02)
        assert not left, "a worker was left over"
        return killed
    finally:
        for number in of_group(process.pid):
            os.kill(number, signal.SIGKILL)


def command(out: Path, source: str = "world", settings: list[str] = WORLD) -> list[str]:
    start = "import sys; from transfuse.cli import run; sys.exit(run(sys.argv[1:]))"
    return [sys.executable, "-c", start, "data", "build", source, str(out), "--workers", "2", *settings]


@pytest.mark.long
def test_two_kills(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for number, wait in ((0, 0.0), (4, 0.03)):
        record = out / "building" / f"shard-{number:05d}.npz"

        def moment(record: Path = record, wait: float = wait) -> bool:
            result = record.exists()
            time.sleep(wait * result)
            return result

        assert kill_when(command(out), moment)
        assert not (out / "manifest.json").exists()
    assert run(["data", "build", "world", str(out), "--workers", "0", *WORLD]) == 0
    assert run(["data", "build", "world", str(tmp_path / "straight"), "--workers", "0", *WORLD]) == 0
    assert contents(out) == contents(tmp_path / "straight")


@pytest.mark.long
def test_one_build_of_tars_killed_ten_times(tmp_path: Path) -> None:
    source, out, draw = str(tars(tmp_path / "tars", 600)), tmp_path / "out", random.Random(0)
    settings = ["--size", "16", "--vocabulary", "300", "--shard-size", "20", "--duplicates", "keep"]
    records: list[int] = []
    for kill in range(10):
        least = 5 * kill + draw.randrange(5)  # of 60 shards

        def moment(least: int = least) -> bool:
            result = (out / "building").exists() and len(list((out / "building").glob("*.npz"))) >= least
            time.sleep(0.02 * draw.random() * result)
            return result

        assert kill_when(command(out, source, settings), moment)
        assert not (out / "manifest.json").exists()
        records.append(len(list((out / "building").glob("*.npz"))))
    assert records == sorted(records)
    assert records[0] < records[-1]
    assert run(["data", "build", source, str(out), "--workers", "2", *settings]) == 0
    assert run(["data", "build", source, str(tmp_path / "straight"), "--workers", "0", *settings]) == 0
    assert contents(out) == contents(tmp_path / "straight")


@pytest.mark.parametrize("call", [0, 1, 2, 3, 5, 8])
def test_a_full_disk(
    root: Path, straight: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    fsync, left = os.fsync, [2 * call]  # a file is synced, and then its folder

    def full(descriptor: int) -> None:
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= 1
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"not written \(.*No space left on device") as caught:
            build(root / "pictures", tmp_path / "out", KINDS["pictures"][1])
    one_line(caught)
    assert not list((tmp_path / "out").rglob("*.partial"))
    build(root / "pictures", tmp_path / "out", KINDS["pictures"][1])
    assert contents(tmp_path / "out") == straight


def test_a_disk_that_is_full_in_the_middle_of_a_shard(
    root: Path, straight: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bytes = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if "shard-00001" in path.name:
            write_bytes(path, data[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_bytes(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(UserError, match=r"shard-00001\.tar: not written .*No space left"):
            build(root / "pictures", tmp_path / "out", KINDS["pictures"][1])
    assert sorted(path.name for path in (tmp_path / "out" / "shards").iterdir()) == ["shard-00000.tar"]
    build(root / "pictures", tmp_path / "out", KINDS["pictures"][1])
    assert contents(tmp_path / "out") == straight


# --- what is asked for does not fit what is there ---------------------------------------------------------------------

OTHER: list[tuple[str, BuildConfig]] = [
    ("size", replace(CONFIG, size=32)),
    ("format", replace(CONFIG, format="webp")),
    ("fit", replace(CONFIG, fit="bucket")),
    ("max_tokens", replace(CONFIG, max_tokens=7)),
    ("heldout", replace(CONFIG, heldout=0.3)),
    ("shard_size", replace(CONFIG, shard_size=5)),
    ("vocabulary", replace(CONFIG, vocabulary=301)),
    ("first_line", replace(CONFIG, columns=Columns(first_line=True))),
]


@pytest.mark.parametrize("done", [True, False])
@pytest.mark.parametrize(("name", "config"), OTHER)
def test_other_settings_are_refused(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, config: BuildConfig, done: bool
) -> None:
    with monkeypatch.context() as patch:
        if not done:
            patch.setattr(Writer, "finish", lambda *_: (_ for _ in ()).throw(Killed))
            with pytest.raises(Killed):
                build(root / "tars", tmp_path / "out", CONFIG)
        else:
            build(root / "tars", tmp_path / "out", CONFIG)
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=rf"\b{name}\b.*found .*; name another folder") as caught:
        build(root / "tars", tmp_path / "out", config)
    one_line(caught)
    assert contents(tmp_path / "out") == before


def changed(source: Path, name: str) -> None:
    """One caption has another letter more, one picture is gone, ..."""
    path = source / name
    if path.suffix == ".png":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes().replace(b"crab", b"crabs"))


@pytest.mark.parametrize("name", ["05.png", "05.txt"])
def test_a_changed_source_is_refused(tmp_path: Path, name: str) -> None:
    source = pictures(tmp_path / "pictures")
    build(source, tmp_path / "out", CONFIG)
    changed(source, name)
    with pytest.raises(UserError, match="listing: expected the same source, found another source, or one that has cha"):
        build(source, tmp_path / "out", CONFIG)


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "list.csv"])
def test_a_changed_table_is_refused(tmp_path: Path, name: str) -> None:
    source = write(tmp_path / "pictures", {f"{i}.png": png(pixels(i)) for i in range(4)})
    rows = [{"file_name": f"{i}.png", "text": f"a crab {i}"} for i in range(4)]
    table = "\n".join(["file_name,text", *(",".join(row.values()) for row in rows)])
    write(source, {name: table if name.endswith(".csv") else "\n".join(map(json.dumps, rows))})
    named = source / name if name == "list.csv" else source
    build(named, tmp_path / "out", CONFIG)
    changed(source, name)
    with pytest.raises(UserError, match="listing: expected the same source"):
        build(named, tmp_path / "out", CONFIG)


def test_other_sources_are_refused(root: Path) -> None:
    for name in ("tars", "stories", "prose"):
        with pytest.raises(UserError, match="listing: expected the same source"):
            build(root / name, root / "pictures-set", KINDS["pictures"][1])


def test_a_folder_that_is_not_empty_is_refused(root: Path, tmp_path: Path) -> None:
    write(tmp_path / "mine", {"thesis.tex": "text"})
    for path in (tmp_path / "mine", tmp_path / "mine" / "thesis.tex"):
        with pytest.raises(UserError, match="expected an empty folder, or a data set begun before, found something"):
            build(root / "tars", path, CONFIG)
    with pytest.raises(UserError, match="expected a folder to write to, found none"):
        build(root / "tars", tmp_path / "mine" / "thesis.tex" / "out", CONFIG)
    assert contents(tmp_path / "mine") == {"thesis.tex": b"text"}
    (tmp_path / "empty").mkdir()
    build(root / "tars", tmp_path / "empty", CONFIG)


def test_paths_that_no_file_can_have(root: Path, tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for source, out in (("x" * 300, "out"), (root / "prose", "y" * 300), (root / "prose", "circle/out")):
        with pytest.raises(UserError, match="expected paths, found others") as caught:
            build(source, tmp_path / out, CONFIG)
        one_line(caught)


def test_a_set_inside_its_source(tmp_path: Path) -> None:
    """`transfuse data build . out`, twice: refused at once, or built already."""
    source = pictures(tmp_path / "pictures")
    try:
        build(source, source / "out", CONFIG)
    except UserError:
        return
    assert build(source, source / "out", CONFIG)["seconds"] == 0


def test_an_autoencoder_that_does_not_fit(root: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, autoencoder="kl-f4-small")
    for settings, what in (
        (replace(config, size=18), "size: expected a multiple of 4 for .*, found 18"),
        (replace(config, fit="bucket", multiple=2), "multiple: expected a multiple of 4"),
        (replace(config, autoencoder="pixels"), "expected one that encodes"),
        (replace(config, autoencoder="nowhere"), "nowhere"),
        (replace(CONFIG, tokenizer="nowhere"), "nowhere"),
        (replace(CONFIG, vocabulary=100), "at least 260"),
    ):
        with pytest.raises(UserError, match=what) as caught:
            build(root / "tars", tmp_path / f"{len(list(tmp_path.iterdir()))}", settings)
        one_line(caught)


def scale(folder: Path, factor: float) -> None:
    """Stands for more training of an autoencoder: its latents have another spread."""
    values = json.loads((folder / "config.json").read_text())
    values["latents_std"] = [factor * value for value in values["latents_std"]]
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("done", [True, False])
def test_an_autoencoder_that_was_trained_further_is_another_one(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: bool
) -> None:
    save_autoencoder(tmp_path / "ae", open_autoencoder("kl-f4-small"), "ae")
    config = replace(CONFIG, autoencoder=str(tmp_path / "ae"))
    with monkeypatch.context() as patch:
        if not done:
            patch.setattr(Writer, "finish", lambda *_: (_ for _ in ()).throw(Killed))
        with nullcontext() if done else pytest.raises(Killed):
            build(root / "tars", tmp_path / "out", config)
    before = contents(tmp_path / "out")
    scale(tmp_path / "ae", 2.0)
    with pytest.raises(UserError, match=r'autoencoder_weights: expected "[0-9a-f]+", found "[0-9a-f]+"') as caught:
        build(root / "tars", tmp_path / "out", config)
    one_line(caught)
    assert contents(tmp_path / "out") == before
    scale(tmp_path / "ae", 0.5)
    assert build(root / "tars", tmp_path / "out", config)["documents"] == 14
    build(root / "tars", tmp_path / "straight", config)
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"size": 0}, "size: expected at least 1"),
        ({"heldout": 1.0}, "heldout: expected a share"),
        ({"max_aspect": 0.5}, "max_aspect: expected at least 1"),
        ({"max_aspect": float("nan")}, "max_aspect: expected at least 1"),
        ({"max_caption": 0}, "max_caption: expected at least min_caption, 1, found 0"),
        ({"fit": "bucket", "multiple": 10}, "size: expected a multiple of 10"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        replace(CONFIG, **settings)


# --- what is left out -------------------------------------------------------------------------------------------------


def test_filters_are_counted_and_listed(tmp_path: Path) -> None:
    shapes = {"a": (16, 16), "flat": (16, 49), "small": (9, 40), "tall": (48, 16), "z": (10, 10)}
    files: dict[str, bytes | str] = {f"{name}.png": png(pixels(i, *s)) for i, (name, s) in enumerate(shapes.items())}
    files |= {f"{name}.txt": f"a {name}" for name in shapes}
    for name, words in {"brief": "ab", "edge": "abc", "long": "x" * 31, "most": "y" * 30, "wordy": "q z " * 7}.items():
        files |= {f"{name}.png": png(pixels(len(files))), f"{name}.txt": words}
    write(tmp_path / "s", files | {"again.png": files["a.png"], "again.txt": "a a", "bare.png": files["a.png"]})
    by_name = {}
    limits = {"min_side": 10, "max_aspect": 3.0, "min_caption": 3, "max_caption": 30, "max_tokens": 20}
    settings = replace(CONFIG, vocabulary=260, **limits)  # of 260 ids, a byte is a token
    result = build(tmp_path / "s", tmp_path / "out", settings)
    manifest = DataSet(str(tmp_path / "out")).manifest
    expected = {"aspect ratio": 1, "caption length": 2, "duplicate": 1, "too many tokens": 2, "too small": 1}
    assert (manifest.seen, manifest.documents, manifest.faulty) == (12, 4, 1)
    assert manifest.dropped == expected == result["dropped"]
    assert list(manifest.dropped) == sorted(manifest.dropped)
    by_name = dict(listed(tmp_path / "out" / "dropped.jsonl"))
    assert by_name["flat.png"] == "aspect ratio: 49x16 pixels"
    assert by_name["small.png"] == "too small: 40x9 pixels"
    assert by_name["brief.png"] == "caption length: 2 characters"
    assert by_name["long.png"] == "caption length: 31 characters"
    assert by_name["most.png"] == "too many tokens: 30 of at most 20"
    assert by_name["wordy.png"].startswith("too many tokens: 27 ")
    assert len(by_name) == 7
    ((key, reason),) = listed(tmp_path / "out" / "quarantine.jsonl")
    assert (key, "bare.txt" in reason) == ("bare.png", True)
    keys = [DataSet(str(tmp_path / "out")).read(number).key for number in range(4)]
    assert [key.partition("-")[2] for key in keys] == ["a", "edge", "tall", "z"]


def test_duplicates_are_listed_by_their_name(root: Path) -> None:
    entries = listed(root / "pictures-set" / "dropped.jsonl")
    assert [key for key, reason in entries if reason.startswith("duplicate")] == ["06.png", "15.png"]


def test_duplicates_may_be_kept(root: Path, tmp_path: Path) -> None:
    assert build(root / "pictures", tmp_path / "a", CONFIG)["documents"] == PICTURES - 4
    assert build(root / "pictures", tmp_path / "b", replace(CONFIG, duplicates="keep"))["documents"] == PICTURES - 2


def test_equal_texts_are_dropped_in_whole(root: Path, tmp_path: Path) -> None:
    """Not the pieces of a text that is cut, where others begin alike."""
    manifest = DataSet(str(root / "prose-set")).manifest
    assert (manifest.seen, manifest.dropped, manifest.faulty) == (18, {"duplicate": 5}, 1)
    entries = listed(root / "prose-set" / "dropped.jsonl")
    assert [key for key, _ in entries] == ["a.txt:9", "c.txt:1", "c.txt:13", "c.txt:15", "c.txt:17"]
    assert all(reason == "duplicate: equal to an earlier document" for _, reason in entries)
    kept = build(root / "prose", tmp_path / "a", replace(KINDS["prose"][1], duplicates="keep"))
    assert (kept["dropped"], kept["documents"] > manifest.documents) == ({}, True)
    start = "one two three four " * 6
    write(tmp_path / "s", {"a.txt": f"{start}\n{start}five\n{start}\n" + "the same line again\n" * 300})
    config = replace(CONFIG, vocabulary=260, max_tokens=19, columns=Columns(split="line"))
    entries = build(tmp_path / "s", tmp_path / "b", config)
    assert (entries["seen"], entries["documents"], entries["dropped"]) == (303, 6 + 7 + 1, {"duplicate": 300})


def test_texts_of_an_earlier_version_are_begun_anew(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its records do not say which texts there were."""
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "finish", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            build(root / "prose", tmp_path / "out", KINDS["prose"][1])
    for path in (tmp_path / "out" / "building").glob("*.npz"):
        with np.load(path) as record:
            arrays = {name: record[name] for name in record if name != "texts"}
        np.savez(path, **arrays)
    build(root / "prose", tmp_path / "out", KINDS["prose"][1])
    assert contents(tmp_path / "out") == contents(root / "prose-set")


def test_a_picture_twice_with_other_words_is_no_duplicate(tmp_path: Path) -> None:
    write(tmp_path / "s", {f"{i}.png": png(pixels(0)) for i in range(3)} | {f"{i}.txt": f"{i}" for i in range(3)})
    assert build(tmp_path / "s", tmp_path / "out", CONFIG)["documents"] == 3


def test_count_limits_the_documents_of_the_source(root: Path, tmp_path: Path) -> None:
    config = replace(KINDS["pictures"][1], columns=Columns(count=9))
    counts = build(root / "pictures", tmp_path / "a", config)
    assert (counts["seen"], counts["documents"], counts["faulty"]) == (9, 6, 1)
    build(root / "pictures", tmp_path / "b", config, workers=2)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_count_and_seen_are_documents_where_text_is_cut(tmp_path: Path) -> None:
    write(tmp_path / "s", {f"{i}.txt": f"{i} some words " * 20 for i in range(4)})
    config = replace(CONFIG, vocabulary=260, max_tokens=8)
    assert build(tmp_path / "s", tmp_path / "a", config)["seen"] == 4
    counts = build(tmp_path / "s", tmp_path / "b", replace(config, columns=Columns(count=2)))
    assert DataSet(str(tmp_path / "b")).manifest.tokens == DataSet(str(tmp_path / "a")).manifest.tokens / 2
    assert counts["seen"] == 2


def table(folder: Path, count: int, faulty: set[int]) -> Path:
    """A table of `count` images, all alike, with captions that are not; some images are gone."""
    rows = [f"{'gone' if i in faulty else 'a'}{i}.png,number {i}" for i in range(count)]
    write(folder, {f"a{i}.png": png(pixels(0)) for i in range(count) if i not in faulty})
    return write(folder, {"list.csv": "\n".join(["file_name,text", *rows])}) / "list.csv"


def test_ten_faults_are_free(tmp_path: Path) -> None:
    source = table(tmp_path / "s", 12, set(range(10)))
    assert build(source, tmp_path / "out", CONFIG, max_errors=0)["faulty"] == 10
    assert len(listed(tmp_path / "out" / "quarantine.jsonl")) == 10


def test_the_rest_of_a_file_is_more_than_one_document(tmp_path: Path) -> None:
    """Archives cut short have lost nobody knows how many: ten of them are not let pass as ten documents are."""
    source = tars(tmp_path / "source")
    paths = sorted(source.glob("*.tar"))
    os.truncate(paths[0], paths[0].stat().st_size // 2 - 100)
    with pytest.raises(UserError, match=r"10\d of 1\d\d documents are faulty"):
        build(source, tmp_path / "out", CONFIG)
    counts = build(source, tmp_path / "out", CONFIG, max_errors=1.0)
    assert counts["faulty"] >= LOST_REST
    assert counts["seen"] == counts["documents"] + counts["faulty"]


def test_too_many_faults_stop_the_build_and_more_let_it_go_on(tmp_path: Path) -> None:
    config = replace(CONFIG, shard_size=10)
    faulty = {3, 5, 21, *range(40, 52)}
    source = table(tmp_path / "s", 80, faulty)
    with pytest.raises(
        UserError, match=r"list\.csv: 11 of 48 documents are faulty, more than the share 0\.1"
    ) as caught:
        build(source, tmp_path / "out", config, max_errors=0.1)
    assert "quarantine.jsonl" in one_line(caught)
    assert len(listed(tmp_path / "out" / "quarantine.jsonl")) == 11
    assert all(key.startswith("gone") for key, _ in listed(tmp_path / "out" / "quarantine.jsonl"))
    assert not (tmp_path / "out" / "manifest.json").exists()
    with pytest.raises(UserError, match="11 of 48 documents are faulty"):
        build(source, tmp_path / "out", config, workers=2, max_errors=0.1)
    assert build(source, tmp_path / "out", config, max_errors=0.3)["faulty"] == 15
    build(source, tmp_path / "straight", config, workers=1, max_errors=0.3)
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")
    assert len(listed(tmp_path / "out" / "quarantine.jsonl")) == 15


@pytest.mark.parametrize("kind", ["faulty", "small"])
def test_nothing_left_says_why(tmp_path: Path, kind: str) -> None:
    config = replace(CONFIG, min_side=99 if kind == "small" else 1)
    write(tmp_path / "s", {"a.png": b"broken" if kind == "faulty" else png(pixels(0)), "a.txt": "words"})
    with pytest.raises(UserError, match="s: expected documents, found 1, none of which can be used") as caught:
        build(tmp_path / "s", tmp_path / "out", config)
    line = one_line(caught) + "".join(map(str, (contents(tmp_path / "out")).items()))
    assert ("something else" if kind == "faulty" else "too small") in line


def test_a_name_that_is_no_unicode(tmp_path: Path) -> None:
    """Files from an old archive have such names."""
    source = pictures(tmp_path / "s")
    try:
        (source / os.fsdecode(b"caf\x81.png")).write_bytes(b"broken")
    except OSError:
        pytest.skip("this file system takes no such name")
    assert build(source, tmp_path / "out", CONFIG)["faulty"] == 3
    assert len(listed(tmp_path / "out" / "quarantine.jsonl")) == 3


def test_a_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    write(tmp_path / "s", {"bomb.png": b"\x89PNG\r\n\x1a\n" + body, "bomb.txt": "a bomb"})
    write(tmp_path / "s", {"a.png": png(pixels(0)), "a.txt": "words"})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert build(tmp_path / "s", tmp_path / "out", CONFIG)["faulty"] == 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB; decoded, it would take 4.8 GB
    ((key, reason),) = listed(tmp_path / "out" / "quarantine.jsonl")
    assert key == "bomb.png"
    assert reason.startswith("expected at most 64000000 pixels, found ")


# --- what is stored ---------------------------------------------------------------------------------------------------


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 16), st.sampled_from([1, 2, 4, 8, 16, 32]))
def test_buckets(rows: int, columns: int, steps: int, multiple: int) -> None:
    size = steps * multiple
    height, width = bucket(rows, columns, size, multiple)
    assert height % multiple == width % multiple == 0
    assert 0 < height * width <= size**2
    assert max(height, width) <= 2 * min(height, width)

    def apart(shape: tuple[int, int]) -> float:
        return abs(math.log(shape[1] / shape[0]) - math.log(columns / rows))

    sides = range(multiple, 2 * size + 1, multiple)
    widest = ((h, size**2 // h // multiple * multiple) for h in sides)
    others = [(h, w) for h, w in widest if w and max(h, w) <= 2 * min(h, w)]
    assert (height, width) in others
    assert apart((height, width)) <= min(map(apart, others)) + 1e-9
    assert bucket(size, size, size, multiple) == (size, size)


def test_buckets_of_a_folder(tmp_path: Path) -> None:
    shapes = {"a": (64, 64), "b": (40, 100), "c": (99, 60)}
    for name, shape in shapes.items():
        write(tmp_path / "s", {f"{name}.png": png(pixels(1, *shape)), f"{name}.txt": name})
    build(tmp_path / "s", tmp_path / "out", replace(CONFIG, size=32, fit="bucket", multiple=8))
    data = DataSet(str(tmp_path / "out"))
    for number, shape in enumerate(shapes.values()):
        expected = bucket(*shape, 32, 8)
        stored = PIL.Image.open(io.BytesIO(data.read(number).parts[0]))
        assert data.sizes(number) == [expected] == [stored.size[::-1]]
        np.testing.assert_array_equal(np.array(stored), fit(pixels(1, *shape), expected))


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet", "jsonl", "data URLs"])
def test_every_reader_decodes_as_read_image_does(tmp_path: Path, kind: str) -> None:
    """Alpha, 16 bits, EXIF and CMYK, by every reader; a picture whose colour profile is damaged is listed."""
    exif = PIL.Image.Exif()
    exif[274] = 6
    layer = np.dstack([pixels(1), pixels(2)[..., 0]])
    made = tmp_path / "made"
    made.mkdir()
    PIL.Image.fromarray(layer).save(made / "a.png", exif=exif)
    PIL.Image.fromarray(pixels(3)[..., 0] * np.uint16(257)).save(made / "b.png")
    PIL.Image.fromarray(layer, "CMYK").save(made / "c.jpg", exif=exif)
    PIL.Image.fromarray(pixels(4)).save(made / "d.webp", icc_profile=b"nonsense")
    files, source = {path.name: path.read_bytes() for path in sorted(made.iterdir())}, tmp_path / "source"
    words = {name: f"picture {name}" for name in files}
    if kind == "folder":
        write(source, {**files, **{f"{name[0]}.txt": text for name, text in words.items()}})
    elif kind == "tar":
        source.mkdir()
        with tarfile.open(source / "a.tar", "w") as file:
            for name, content in files.items():
                for member, data in ((name, content), (f"{name[0]}.txt", words[name].encode())):
                    header = tarfile.TarInfo(member)
                    header.size = len(data)
                    file.addfile(header, io.BytesIO(data))
    elif kind == "parquet":
        pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
        rows = [{"image": {"bytes": content, "path": name}, "text": words[name]} for name, content in files.items()]
        source.mkdir()
        parquet.write_table(pyarrow.Table.from_pylist(rows), source / "a.parquet")
    else:
        urls = {name: "data:;base64," + base64.b64encode(content).decode() for name, content in files.items()}
        rows = [{"image": name if kind == "jsonl" else urls[name], "text": words[name]} for name in files]
        write(source, {"a.jsonl": "\n".join(map(json.dumps, rows)), **(files if kind == "jsonl" else {})})
        source /= "a.jsonl"
    build(source, tmp_path / "out", replace(CONFIG, heldout=0.0), max_errors=0.5)
    data = DataSet(str(tmp_path / "out"))
    for number, name in enumerate(("a.png", "b.png", "c.jpg")):
        np.testing.assert_array_equal(read_image(made / name), decode_image(data.read(number).parts[0]))
    (faulty,) = map(json.loads, (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines())
    assert "damaged colour profile" in json.dumps(faulty)


def test_png_keeps_every_pixel_and_tars_are_as_webdataset_reads_them(tmp_path: Path) -> None:
    names = ["my.cat.v2", "sub/dög & co", "x" * 150]
    captions = ["été\nzwei", "a", " spaces within, none outside"]
    for i, name in enumerate(names):
        write(tmp_path / "s", {f"{name}.png": png(pixels(i, 16, 16 + 8 * i)), f"{name}.txt": captions[i]})
    write(tmp_path / "s", {f"z{i}.png": png(pixels(9 + i)) for i in range(6)} | {f"z{i}.txt": f"{i}" for i in range(6)})
    build(tmp_path / "s", tmp_path / "out", CONFIG)
    groups: dict[str, dict[str, bytes]] = {}
    for path in sorted((tmp_path / "out" / "shards").iterdir()):
        last = ""
        with tarfile.open(path) as file:
            for member in file:
                assert member.isfile()
                assert "/" not in member.name
                key, _, kind = member.name.partition(".")
                assert key == last or key not in groups, "side by side"
                content = file.extractfile(member)
                assert content is not None
                groups.setdefault(key, {})[kind] = content.read()
                last = key
        assert path.read_bytes().endswith(bytes(1024))
        assert path.stat().st_size % 512 == 0
    assert len(groups) == 9
    assert list(groups) == sorted(groups)
    assert all(list(members) == ["png", "txt"] for members in groups.values())
    order = [0, 1, 2]  # as the names sort
    for i, (key, members) in zip(order, groups.items(), strict=False):
        np.testing.assert_array_equal(
            np.array(PIL.Image.open(io.BytesIO(members["png"]))), fit(pixels(i, 16, 16 + 8 * i), 16)
        )
        assert members["txt"].decode() == captions[i].strip()
        assert key.startswith(f"{i:09d}-")


def test_documents_of_several_parts_in_their_order(root: Path) -> None:
    data = DataSet(str(root / "stories-set"))
    assert len(data) == 10
    for number, i in enumerate(i for i in range(11) if i != 5):
        stored = data.read(number)
        assert stored.parts[0] == f"story {i}"
        assert len(stored.parts) == 1 + i % 3
        assert not stored.pair
        assert data.sizes(number) == [bucket(10 + j, 20, 16, 8) for j in range(i % 3)]
    with tarfile.open(root / "stories-set" / "shards" / "shard-00000.tar") as file:
        kinds = [member.name.partition(".")[2] for member in file]
    assert kinds == ["json", "0.jpg", "json", "0.jpg", "1.jpg", "json", "json"]


@pytest.mark.parametrize("name", ["kl-f4-small", "vq-f4-small"])
def test_latents_and_codes(tmp_path: Path, name: str) -> None:
    shapes = [(16, 16), (30, 20), (20, 41)]
    for i, shape in enumerate(shapes):
        write(tmp_path / "s", {f"{i}.png": png(pixels(i, *shape)), f"{i}.txt": f"{i}"})
    build(tmp_path / "s", tmp_path / "out", replace(CONFIG, autoencoder=name, fit="bucket", multiple=8))
    data, autoencoder = DataSet(str(tmp_path / "out")), open_autoencoder(name)
    codes = name.startswith("vq")
    for number, shape in enumerate(shapes):
        image = fit(pixels(number, *shape), bucket(*shape, 16, 8))[None]
        values = data.read(number).parts[0]
        assert isinstance(values, np.ndarray)
        if codes:
            assert values.dtype == np.uint16
            np.testing.assert_array_equal(values, autoencoder.codes(image)[0].numpy())  # type: ignore[attr-defined]
        else:
            assert values.dtype == np.float16
            np.testing.assert_array_equal(values, autoencoder.encode(image)[0].to(torch.float16).numpy())
        assert data.sizes(number) == [image.shape[1:3]]
    encoding = data.manifest.encoding
    assert encoding is not None
    assert (encoding.autoencoder, encoding.fingerprint, encoding.factor) == (name, autoencoder.fingerprint, 4)
    assert (encoding.codebook is not None) == codes
    assert not problems(tmp_path / "out")
    build(tmp_path / "s", tmp_path / "again", replace(CONFIG, autoencoder=name, fit="bucket", multiple=8), workers=1)
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_latents_that_half_precision_can_not_hold(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = ImageAutoencoder.encode
    monkeypatch.setattr(ImageAutoencoder, "encode", lambda self, images: 1e6 * encode(self, images))
    with pytest.raises(UserError, match=r"^0\.tar/0: expected finite latents of kl-f4-small in float16, found others"):
        build(root / "tars", tmp_path / "out", replace(CONFIG, autoencoder="kl-f4-small"))


# --- a data set as a source -------------------------------------------------------------------------------------------


def hashes(folder: Path) -> list[bytes]:
    return [item.tobytes() for item in DataSet(str(folder)).documents["hash"]]


@pytest.mark.parametrize("name", ["pictures", "stories"])
def test_a_set_of_a_set_has_the_same_documents(root: Path, tmp_path: Path, name: str) -> None:
    """The same settings: pictures of png stay as they are; the tokenizer, and so what is held out, is the set's own."""
    config = replace(KINDS[name][1], format="png")
    build(root / name, tmp_path / "first", config)
    for workers in (0, 2):
        build(tmp_path / "first", tmp_path / f"second-{workers}", replace(config, vocabulary=400), workers)
    first, second = (DataSet(str(tmp_path / item)) for item in ("first", "second-0"))
    assert contents(tmp_path / "second-2") == contents(tmp_path / "second-0")
    assert hashes(tmp_path / "second-0") == hashes(tmp_path / "first")
    assert second.manifest.tokenizer == first.manifest.tokenizer
    assert [second.read(n).parts for n in range(len(second))] == [first.read(n).parts for n in range(len(first))]
    assert second.number("heldout", 0) == first.number("heldout", 0)
    assert not problems(tmp_path / "second-0")


@pytest.mark.parametrize("name", ["kl-f4-small", "vq-f4-small"])
def test_latents_of_a_set_are_those_of_its_source(root: Path, tmp_path: Path, name: str) -> None:
    config = replace(KINDS["pictures"][1], autoencoder=name)
    build(root / "pictures-set", tmp_path / "of-set", config)
    build(root / "pictures", tmp_path / "at-once", config)
    assert hashes(tmp_path / "of-set") == hashes(tmp_path / "at-once")
    with pytest.raises(UserError, match=f"of-set: expected a data set of pictures .*, found one of what {name} makes"):
        build(tmp_path / "of-set", tmp_path / "again", config)


def test_a_set_of_text_is_no_source(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="prose-set: expected a data set of pictures to build from, found one of text"):
        build(root / "prose-set", tmp_path / "out", CONFIG)


def test_a_damaged_document_of_a_set_is_named(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "pictures-set", tmp_path / "set")
    data = DataSet(str(tmp_path / "set"))
    shard = tmp_path / "set" / data.shard(1)
    flipped = bytearray(shard.read_bytes())
    flipped[int(data.documents[1]["offset"]) + 600] ^= 1
    shard.write_bytes(flipped)
    build(tmp_path / "set", tmp_path / "out", CONFIG)
    ((key, reason),) = listed(tmp_path / "out" / "quarantine.jsonl")
    assert key.startswith("000000001-")
    assert reason == "its content does not match its hash"
    assert hashes(tmp_path / "out") == [item for n, item in enumerate(hashes(tmp_path / "set")) if n != 1]


def test_a_set_that_has_changed_is_built_from_again(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "set"
    shutil.copytree(root / "pictures-set", source)
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "finish", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            build(source, tmp_path / "out", CONFIG)
    shutil.rmtree(source)
    build(root / "tars", source, CONFIG)
    build(source, tmp_path / "out", CONFIG)
    assert "begun again, because the source has changed (manifest.json has other content)" in caplog.text
    assert hashes(tmp_path / "out") == hashes(source)


# --- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [260, 300])
def test_token_ids_are_those_of_the_tokenizer_cut_where_they_must(tmp_path: Path, vocabulary: int) -> None:
    words = ["a crab on red", "été " * 9, "<|bos|> is no marker"]
    write(tmp_path / "s", {"a.txt": "\r\n".join(words)})
    config = replace(CONFIG, vocabulary=vocabulary, max_tokens=7, columns=Columns(split="line"))
    build(tmp_path / "s", tmp_path / "out", config)
    data = DataSet(str(tmp_path / "out"))
    tokenizer = Tokenizer.load(tmp_path / "out" / "tokenizer.json")
    expected = [ids[i : i + 7] for ids in (tokenizer.encode(w.strip()) for w in words) for i in range(0, len(ids), 7)]
    assert [tuple(data.read_ids(number).tolist()) for number in range(len(data))] == expected
    assert data.documents["tokens"].tolist() == [len(ids) for ids in expected]
    assert (data.manifest.tokens, data.manifest.longest) == (sum(map(len, expected)), 7)
    assert (data.manifest.kind, data.manifest.pictures) == ("text", 0)
    files = [(tmp_path / "out" / shard.file).read_bytes() for shard in data.manifest.shards]
    assert np.frombuffer(b"".join(files), "<u2").tolist() == [number for ids in expected for number in ids]


def test_a_tokenizer_may_be_given(root: Path, tmp_path: Path) -> None:
    build(root / "tars", tmp_path / "out", replace(CONFIG, tokenizer=str(root / "prose-set")))
    given, taken = (Tokenizer.load(folder / "tokenizer.json") for folder in (root / "prose-set", tmp_path / "out"))
    assert given.fingerprint == taken.fingerprint == DataSet(str(tmp_path / "out")).manifest.tokenizer


# --- transfuse data verify --------------------------------------------------------------------------------------------


@pytest.fixture
def copied(root: Path, tmp_path: Path) -> Path:
    """A copy of every set, to be damaged."""
    for name in KINDS:
        shutil.copytree(root / f"{name}-set", tmp_path / name)
    return tmp_path


def problems(path: Path) -> list[str]:
    """Return the problems of a set; a traceback is an error here."""
    try:
        return verify_set(str(path), workers=0)[1]
    except UserError as error:
        return [str(error)]


def flips(path: Path, places: range | list[int]) -> Iterator[tuple[int, int]]:
    """Flip a byte, one after another; each is as it was before the next."""
    data = path.read_bytes()
    for number, place in enumerate(places):
        mask = (1, 0x80, 0x10)[number % 3]
        path.write_bytes(data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :])
        yield place, mask
    path.write_bytes(data)


@pytest.mark.parametrize("name", list(KINDS))
def test_a_whole_set(root: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    documents = len(DataSet(str(root / f"{name}-set")))
    assert verify_set(str(root / f"{name}-set"), workers=2) == (documents, [])
    assert run(["data", "verify", str(root / f"{name}-set")]) == 0
    assert "all whole" in capfd.readouterr().err


@pytest.mark.parametrize("name", list(KINDS))
def test_a_flipped_byte_of_a_shard(copied: Path, name: str) -> None:
    """In a header, a picture, words, padding, the end."""
    path = sorted((copied / name / "shards").iterdir())[0]
    size = path.stat().st_size
    places = [0, 99, 124, 148, 156, 257, 511, 512, 513, 600, 1500, size - 1025, size - 1024, size - 1]
    for place, _ in flips(path, sorted({p for p in places if 0 <= p < size} | set(range(7, size, max(1, size // 9))))):
        complaints = problems(copied / name)
        assert any(path.name in line for line in complaints), place
        assert not any("\n" in line for line in complaints)
    assert not problems(copied / name)


def test_the_document_that_is_damaged_is_named(copied: Path) -> None:
    path = copied / "pictures" / "shards" / "shard-00001.tar"
    with tarfile.open(path) as file:
        members = file.getmembers()
    for member in members:
        for _ in flips(path, [member.offset_data + member.size // 2]):
            complaints = problems(copied / "pictures")
            assert len(complaints) == 2, "the shard, and the document"
            assert member.name.partition(".")[0] in complaints[1]
            assert complaints[1].startswith(f"{copied / 'pictures'}/shards/shard-00001.tar: ")


@pytest.mark.parametrize("name", ["pictures", "prose"])
@pytest.mark.parametrize("file", ["documents.npy", "pictures.npy"])
def test_a_flipped_byte_of_the_header_of_the_index(copied: Path, name: str, file: str) -> None:
    path = copied / name / file
    (start,) = struct.unpack("<H", path.read_bytes()[8:10])
    for place, _ in flips(path, range(0, 10 + start, 11 if file == "documents.npy" else 5)):
        assert any(file in line for line in problems(copied / name)), place


@pytest.mark.parametrize("name", ["pictures", "prose"])
@pytest.mark.parametrize("file", ["documents.npy", "pictures.npy"])
def test_a_flipped_byte_of_the_index(copied: Path, name: str, file: str) -> None:
    """Any byte of the first row, and some of the rest."""
    path = copied / name / file
    data = path.read_bytes()
    start, size = 10 + struct.unpack("<H", data[8:10])[0], len(data)
    for place, _ in flips(path, sorted({*range(start, min(size, start + 41)), *range(start, size, 97)})):
        complaints = problems(copied / name)
        assert f"{file}: expected SHA-256" in complaints[0], place


@pytest.mark.parametrize("name", ["pictures", "prose"])
def test_a_flipped_byte_of_the_tokenizer(copied: Path, name: str) -> None:
    path = copied / name / "tokenizer.json"
    for place, _ in flips(path, range(0, path.stat().st_size, 197)):
        assert any(file in line for line in problems(copied / name) for file in ("tokenizer.json", "tokens")), place


@pytest.mark.parametrize("name", ["pictures", "prose"])
def test_a_flipped_byte_of_the_manifest(copied: Path, name: str) -> None:
    path = copied / name / "manifest.json"
    missed = []
    for place, mask in flips(path, range(0, path.stat().st_size, 29)):
        if not problems(copied / name):
            missed.append((place, mask))
    data = path.read_bytes().decode()
    lines = sorted({data[: place + 1].count("\n") for place, _ in missed})
    assert not missed, [data.split("\n")[number] for number in lines]


@pytest.mark.parametrize("name", ["pictures", "prose"])
def test_a_flipped_byte_of_the_sums(copied: Path, name: str) -> None:
    path = copied / name / "SHA256SUMS"
    assert subprocess.run(["sha256sum", "--check", "--quiet", path.name], cwd=path.parent).returncode == 0
    for place, _ in flips(path, range(0, path.stat().st_size, 19)):
        assert problems(copied / name), place


@pytest.mark.parametrize("kept", [0, 511, 3000, -1])
def test_a_shard_cut_short(copied: Path, kept: int) -> None:
    path = copied / "tars" / "shards" / "shard-00001.tar"
    path.write_bytes(path.read_bytes()[:kept])
    complaints = problems(copied / "tars")
    assert "its bytes do not match their hash" in complaints[0]
    assert "shard-00001.tar" in complaints[0]


def test_a_shard_that_is_gone(copied: Path) -> None:
    (copied / "tars" / "shards" / "shard-00001.tar").unlink()
    complaints = problems(copied / "tars")
    assert len(complaints) == 1 + 5, "the shard, and each of its documents"
    assert all("shard-00001.tar" in line for line in complaints)


@pytest.mark.parametrize("file", ["manifest.json", "tokenizer.json", "documents.npy", "pictures.npy"])
@pytest.mark.parametrize("kept", [None, 0, 1, 100, -2])
def test_other_files_gone_or_cut(copied: Path, file: str, kept: int | None) -> None:
    path = copied / "pictures" / file
    data = path.read_bytes()
    path.unlink()
    if kept is not None:
        path.write_bytes(data[:kept])
    (result,) = problems(copied / "pictures")
    assert file in result
    assert "\n" not in result


def test_a_set_closes_its_files(root: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        data = DataSet(str(root / "tars-set"))
        for number in range(len(data)):
            data.read(number)
    del data
    assert len(os.listdir("/proc/self/fd")) <= before


def test_the_command_line_says_what_is_damaged(root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(root / "tars-set", tmp_path / "set")
    path = tmp_path / "set" / "shards" / "shard-00002.tar"
    for _ in flips(path, [700]):
        assert run(["data", "verify", str(tmp_path / "set"), "--json"]) == 2
    told = capfd.readouterr()
    report = json.loads(told.out)
    assert (report["documents"], report["count"]) == (13, 2)
    assert "Traceback" not in told.err
    assert told.err.endswith(f"transfuse: {tmp_path / 'set'}: 2 problems; 13 documents are whole\n")
    assert run(["data", "verify", str(tmp_path / "nowhere")]) == 2
    assert "expected a data set" in capfd.readouterr().err
