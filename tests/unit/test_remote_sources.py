"""Data sets built from files elsewhere: the same as from files here, and what becomes of a line that breaks."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import PIL.Image
import pytest
from conftest import write

from transfuse.data import Cache, CorruptSampleError, DataSet
from transfuse.data.building import Writer, build_set
from transfuse.data.building.prepare import BuildConfig
from transfuse.data.readers import Columns, open_source
from transfuse.data.remote import expanded, look
from transfuse.errors import UserError

CONFIG = BuildConfig(size=16, vocabulary=300, shard_size=8, heldout=0.1)
WAITS = (0.0, 0.0)  # seconds between attempts
PAIRS = 13
"""in each tar"""


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


@dataclass
class Web:
    """A folder over HTTP. faults: of a path, what its next answers are: a code, or "cut" for half of the file."""

    folder: Path
    url: str = ""
    faults: defaultdict[str, list[int | str]] = field(default_factory=lambda: defaultdict(list))
    requests: Counter[str] = field(default_factory=Counter)
    """GET requests by path"""


class Handler(SimpleHTTPRequestHandler):
    def __init__(self, *arguments: Any, web: Web, **more: Any) -> None:
        self.web = web
        super().__init__(*arguments, directory=str(web.folder), **more)

    def do_GET(self) -> None:
        name = self.path.lstrip("/").partition("?")[0]
        self.web.requests[name] += 1
        fault = self.web.faults[name].pop(0) if self.web.faults[name] else None
        if isinstance(fault, int):
            self.send_error(fault)
        elif fault == "cut":
            data = (self.web.folder / name).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Last-Modified", self.date_time_string(int((self.web.folder / name).stat().st_mtime)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        else:
            super().do_GET()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    result = Web(tmp_path / "web")
    result.folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, web=result)) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        result.url = f"http://127.0.0.1:{server.server_port}"
        yield result
        server.shutdown()


def png(number: int) -> bytes:
    stream = io.BytesIO()
    PIL.Image.fromarray(np.random.default_rng(number).integers(0, 256, (18, 16, 3), dtype=np.uint8)).save(stream, "png")
    return stream.getvalue()


def tar(path: Path, first: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for i in range(first, first + PAIRS):
            for end, data in (("png", png(i)), ("txt", f"number {i}".encode())):
                header = tarfile.TarInfo(f"{i:03d}.{end}")
                header.size = len(data)
                file.addfile(header, io.BytesIO(data))
    return path


def tars(web: Web) -> Path:
    for number in range(3):
        tar(web.folder / "tars" / f"{number:05d}.tar", 100 * number)
    return web.folder / "tars"


def build(source: str | Path, out: Path, workers: int = 0, **changes: Any) -> dict[str, Any]:
    gigabytes = changes.pop("gigabytes", 1.0)
    cache = Cache(out.parent / "cache", gigabytes, WAITS)
    return build_set(str(source), out, replace(CONFIG, **changes), workers, cache=cache)


def documents(out: Path) -> dict[str, bytes]:
    """All of a set but what names its source."""
    left_out = ("manifest.json", "SHA256SUMS")
    files = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    return {name: data for name, data in files.items() if name not in left_out}


def kept(out: Path) -> list[str]:
    return sorted(path.name.split("-", 1)[1] for path in (out.parent / "cache").iterdir() if path.name[0] != ".")


def one_line(caught: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the same as here -------------------------------------------------------------------------------------------------


def test_tars_by_a_range_over_http(web: Web, tmp_path: Path) -> None:
    build(tars(web), tmp_path / "here")
    for workers in (0, 2):
        build(f"{web.url}/tars/{{00000..00002}}.tar", tmp_path / f"{workers}", workers)
        assert documents(tmp_path / f"{workers}") == documents(tmp_path / "here")
    assert len(DataSet(str(tmp_path / "0"))) == 3 * PAIRS
    assert kept(tmp_path / "0") == ["00000.tar", "00001.tar", "00002.tar"]
    assert set(web.requests.values()) == {1}  # two builds, each of which read them twice: words, then documents


@pytest.mark.parametrize("source", ["memory://tars", "memory://tars/*.tar", "memory://tars/{00000,00001,00002}.tar"])
def test_tars_of_a_folder_that_can_be_listed(web: Web, tmp_path: Path, source: str) -> None:
    folder = tars(web)
    system = fsspec.filesystem("memory")
    for path in folder.iterdir():
        system.pipe(f"/tars/{path.name}", path.read_bytes())
    build(source, tmp_path / "there")
    build(folder, tmp_path / "here")
    assert documents(tmp_path / "there") == documents(tmp_path / "here")
    build(f"file://{folder}", tmp_path / "url")
    assert documents(tmp_path / "url") == documents(tmp_path / "here")


def test_parquet_text_and_jsonl_with_pictures_beside_it(web: Web, tmp_path: Path) -> None:
    pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    rows = {"image": [png(i) for i in range(9)], "text": [f"row {i}" for i in range(9)]}
    parquet.write_table(pyarrow.table(rows), web.folder / "a.parquet", row_group_size=4)
    stories = [{"parts": [{"text": f"story {i}"}, {"image": f"p/{i % 3}.png"}]} for i in range(7)]
    stories[3] = {"parts": [{"text": "lost"}, {"image": "p/9.png"}]}
    for i, name in enumerate(("../a.parquet", "/etc/hostname", "file:///etc/hostname", f"{web.url}/p/0.png")):
        stories.append({"parts": [{"text": f"elsewhere {i}"}, {"image": name}]})
    write(web.folder, {f"p/{i}.png": png(i) for i in range(3)})
    write(web.folder, {"d.jsonl": "\n".join(map(json.dumps, stories)), "t.txt": "one\n\ntwo\n\nthree"})
    for name in ("a.parquet", "t.txt"):
        build(web.folder / name, tmp_path / f"here-{name}")
        build(f"{web.url}/{name}?signature=secret", tmp_path / f"there-{name}")
        assert documents(tmp_path / f"there-{name}") == documents(tmp_path / f"here-{name}")
        assert b"secret" not in (tmp_path / f"there-{name}" / "manifest.json").read_bytes()
    counts = build(f"{web.url}/d.jsonl", tmp_path / "jsonl")
    assert (counts["documents"], counts["faulty"]) == (6, 5)
    lines = [json.loads(line) for line in (tmp_path / "jsonl" / "quarantine.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == [f"d.jsonl:{n}" for n in (4, 8, 9, 10, 11)]
    assert "p/9.png: expected a file, found none" in lines[0]["reason"]
    assert all("expected a name below" in line["reason"] for line in lines[1:])


def test_a_data_set_over_http_trains_and_is_a_source(web: Web, tmp_path: Path) -> None:
    build(tars(web), web.folder / "set")
    here, there = DataSet(str(web.folder / "set")), DataSet(f"{web.url}/set", Cache(tmp_path / "cache", waits=WAITS))
    assert [there.read(n) for n in range(len(there))] == [here.read(n) for n in range(len(here))]
    build(f"{web.url}/set", tmp_path / "there")
    build(web.folder / "set", tmp_path / "here")
    assert documents(tmp_path / "there") == documents(tmp_path / "here")
    manifest = DataSet(str(tmp_path / "there")).manifest
    assert (manifest.source, manifest.tokenizer) == ("set", here.manifest.tokenizer)


def test_a_cache_too_small_for_two(web: Web, tmp_path: Path) -> None:
    build(tars(web), tmp_path / "here")
    build(f"{web.url}/tars/{{00000..00002}}.tar", tmp_path / "there", workers=2, gigabytes=0.0)
    assert documents(tmp_path / "there") == documents(tmp_path / "here")
    assert len(kept(tmp_path / "there")) == 1


# --- a set that another takes the place of ----------------------------------------------------------------------------


@pytest.fixture
def there(web: Web, tmp_path: Path) -> DataSet:
    """A set of five shards at a URL, of which the first has been read."""
    build(tars(web), web.folder / "set")
    data = DataSet(f"{web.url}/set", Cache(tmp_path / "cache", waits=WAITS))
    data.tokenizer()
    data.read(0)
    assert len(data.manifest.shards) == 5
    return data


def build_anew(web: Web, **changes: Any) -> DataSet:
    shutil.rmtree(web.folder / "set")
    build(web.folder / "tars", web.folder / "set", **changes)
    return DataSet(str(web.folder / "set"))


def test_a_set_built_anew_at_its_url_is_fetched_anew(web: Web, there: DataSet) -> None:
    here = build_anew(web, format="webp")
    data = DataSet(f"{web.url}/set", there.cache)
    assert (data.fingerprint != there.fingerprint, data.fingerprint) == (True, here.fingerprint)
    assert [data.read(n) for n in range(len(data))] == [here.read(n) for n in range(len(here))]


@pytest.mark.parametrize("then", ["another", "shorter", "gone"])
def test_a_set_that_changes_while_it_is_read_is_refused(web: Web, there: DataSet, then: str) -> None:
    """And not taken for one with damaged documents, of which some are let pass."""
    build_anew(web, format="webp", columns=Columns(count=9 if then == "shorter" else 0))
    if then == "gone":
        shutil.rmtree(web.folder / "set")
    sent = pickle.loads(pickle.dumps(there))  # as to a worker process
    for data in (there, sent):
        with pytest.raises(UserError, match=f"set: expected the data set {there.fingerprint}, as .* it has") as caught:
            data.read(len(data) - 1)
        assert one_line(caught).startswith(f"{web.url}/set: ")
        assert not isinstance(caught.value, CorruptSampleError)
        assert data.read(1).tokens


def test_a_shard_damaged_at_its_url_is_the_same_set(web: Web, there: DataSet) -> None:
    here, number = DataSet(str(web.folder / "set")), 20
    path = web.folder / "set" / there.shard(number)
    data = bytearray(path.read_bytes())
    data[int(there.documents[number]["offset"]) + 600] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptSampleError, match="its content does not match its hash"):
        there.read(number)
    others = [n for n in range(len(there)) if n != number]
    assert [there.read(n) for n in others] == [here.read(n) for n in others]
    assert web.requests[f"set/{there.shard(number)}"] == 1


def test_what_is_kept_is_read_where_the_url_cannot_be_reached(
    web: Web, there: DataSet, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = [there.read(n) for n in range(len(there))]
    before = web.requests.copy()
    web.faults["set/manifest.json"] = [503] * 99
    capfd.readouterr()
    for _ in range(3):
        data = DataSet(f"{web.url}/set", there.cache)
        data.tokenizer()
        assert [data.read(n) for n in range(len(data))] == expected
    line = f"{web.url}/set/manifest.json: not fetched (HTTP Error 503: Service Unavailable); going on with the one that"
    assert capfd.readouterr().err == f"{line} is kept here, which may be old\n"
    assert web.requests - before == Counter({"set/manifest.json": 3})  # attempts of one look
    Cache(tmp_path / "other").file(f"{web.url}/set/tokenizer.json")  # the server is reachable again
    (web.folder / "set" / "manifest.json").unlink()
    web.faults.clear()
    with pytest.raises(UserError, match=r"set/manifest\.json: expected a file, found none"):
        DataSet(f"{web.url}/set", there.cache)


def test_pictures_that_a_changed_jsonl_names_are_fetched_anew(web: Web, tmp_path: Path) -> None:
    write(web.folder, {"a.png": png(0), "d.jsonl": json.dumps({"image": "a.png", "text": "a crab"})})
    for out, number, words in (("first", 0, "a crab"), ("second", 1, "another crab")):
        write(web.folder, {"a.png": png(number), "d.jsonl": json.dumps({"image": "a.png", "text": words})})
        build(f"{web.url}/d.jsonl", tmp_path / out)
        build(web.folder / "d.jsonl", tmp_path / f"{out}-here")
        assert documents(tmp_path / out) == documents(tmp_path / f"{out}-here")


# --- a line that breaks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("faults", [["cut"], [503, "cut"], [429], [500, 502]])
def test_what_fails_for_a_moment_is_tried_again(web: Web, tmp_path: Path, faults: list[int | str]) -> None:
    build(tars(web), tmp_path / "here")
    web.faults["tars/00001.tar"] = list(faults)
    build(f"{web.url}/tars/{{00000..00002}}.tar", tmp_path / "there")
    assert documents(tmp_path / "there") == documents(tmp_path / "here")
    assert web.requests["tars/00001.tar"] == len(faults) + 1


def test_a_line_that_breaks_for_good_and_the_build_that_goes_on(web: Web, tmp_path: Path) -> None:
    """Words are learned from the first tar alone while the second is out of reach: nothing half-read is kept."""
    build(tars(web), tmp_path / "here")
    source, out = f"{web.url}/tars/{{00000..00002}}.tar", tmp_path / "there"
    size = (web.folder / "tars" / "00002.tar").stat().st_size
    for workers in (0, 2):
        web.faults["tars/00002.tar"] = ["cut"] * 3
        with pytest.raises(UserError) as caught:
            build(source, out, workers)
        line = f"{web.url}/tars/00002.tar: not fetched (it broke off after {size // 2} of {size} bytes)"
        assert one_line(caught) == line
        assert kept(out) == ["00000.tar", "00001.tar"]
    build(source, out)
    assert documents(out) == documents(tmp_path / "here")


def test_a_build_that_is_killed_goes_on(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tars(web), tmp_path / "here")
    source, out = f"{web.url}/tars/{{00000..00002}}.tar", tmp_path / "there"
    add, left = Writer.add, [20]

    def mortal(writer: Writer, *arguments: Any) -> None:
        left[0] -= 1
        if not left[0]:
            raise Killed
        add(writer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "add", mortal)
        with pytest.raises(Killed):
            build(source, out)
    build(source, out)
    assert documents(out) == documents(tmp_path / "here")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("tars/{00000..00003}.tar", "tars/00003.tar: expected a file, found none"),
        ("none.jsonl", "none.jsonl: expected a file, found none"),
        ("tars", r"tars: expected \.tar, \.parquet, .*found a file of another kind"),
        ("nothing", "nothing: expected .*, found none"),
        ("tars/{5..3}.tar", "expected a range that goes up"),
    ],
)
def test_what_is_not_there(web: Web, tmp_path: Path, name: str, line: str) -> None:
    tars(web)
    with pytest.raises(UserError, match=line) as caught:
        build(f"{web.url}/{name}", tmp_path / "out")
    one_line(caught)
    assert not (tmp_path / "out").exists()


def test_what_is_refused_is_not_tried_again(web: Web, tmp_path: Path) -> None:
    tars(web)
    web.faults["tars/00000.tar"] = [403] * 3
    with pytest.raises(UserError, match=r"00000\.tar: not fetched \(HTTP Error 403"):
        Cache(tmp_path / "cache", waits=WAITS).file(f"{web.url}/tars/00000.tar")
    assert web.requests["tars/00000.tar"] == 1
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9/a\.tar: not fetched"):
        look("http://127.0.0.1:9/a.tar", waits=())


def test_a_file_that_changes_under_way(web: Web, tmp_path: Path) -> None:
    """Between the look at it and its turn; then the source is another one, and the build that was begun starts over."""
    folder, source, out = tars(web), f"{web.url}/tars/{{00000..00002}}.tar", tmp_path / "out"
    reader = open_source(source, Columns(source_split="all"), cache=Cache(tmp_path / "early", waits=WAITS))
    web.faults["tars/00002.tar"] = ["cut"] * 3
    with pytest.raises(UserError, match="broke off"):
        build(source, out)
    (folder / "00002.tar").write_bytes(tar(tmp_path / "other.tar", 500).read_bytes()[:-10240])
    with pytest.raises(UserError, match=r"00002\.tar: expected \d+ bytes .*, as it was, found .*: it has changed"):
        list(reader.parts())
    build(source, out)
    build(source, tmp_path / "fresh")
    assert (out / "SHA256SUMS").read_bytes() == (tmp_path / "fresh" / "SHA256SUMS").read_bytes()


def test_patterns() -> None:
    assert expanded("a/{08..11}.tar") == ["a/08.tar", "a/09.tar", "a/10.tar", "a/11.tar"]
    assert expanded("{x,y}/{0..1}") == ["x/0", "x/1", "y/0", "y/1"]
    assert expanded("plain/{name}") == ["plain/{name}"]
