"""Data sets at URLs: the same documents, a cache that keeps its bound, and one line where it fails."""

from __future__ import annotations

import multiprocessing
import sys
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from transfuse.autoencoders import Pixels
from transfuse.data import Cache, DataSet, PairConfig, StepLoader, StoredImages
from transfuse.data.building import build_set
from transfuse.data.building.prepare import BuildConfig
from transfuse.data.readers import Columns
from transfuse.errors import UserError

COUNT = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("remote") / "set"
    config = BuildConfig(size=16, vocabulary=300, shard_size=20, columns=Columns(count=COUNT))
    build_set("world", out, config, workers=0)
    return out


@pytest.fixture
def url(folder: Path) -> str:
    system = fsspec.filesystem("memory")
    for path in folder.rglob("*"):
        if path.is_file():
            system.pipe(f"/sets/{folder.name}/{path.relative_to(folder)}", path.read_bytes())
    return f"memory://sets/{folder.name}"


def sizes(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.iterdir() if not path.name.startswith("."))


def test_the_same_documents_from_memory_and_from_a_file_url(folder: Path, url: str, tmp_path: Path) -> None:
    here = DataSet(str(folder))
    for number, there in enumerate((url, f"file://{folder}", f"{url}/")):
        data = DataSet(there, Cache(tmp_path / str(number)))
        assert data.fingerprint == here.fingerprint
        assert [data.read(n) for n in range(len(data))] == [here.read(n) for n in range(len(here))]


def test_the_cache_keeps_its_bound_and_all_is_read(folder: Path, url: str, tmp_path: Path) -> None:
    """Room for two shards next to the index: the first come back when they are asked for again."""
    here = DataSet(str(folder))
    shard = max(item.bytes for item in here.manifest.shards)
    files = ("manifest.json", "documents.npy", "pictures.npy", "tokenizer.json")
    index = sum((folder / name).stat().st_size for name in files)
    cache = Cache(tmp_path, gigabytes=(index + 2.5 * shard) / 1e9)
    data = DataSet(url, cache)
    data.tokenizer()
    for _ in range(2):
        for number in range(len(data)):
            assert data.read(number) == here.read(number)
            assert sizes(tmp_path) <= cache.gigabytes * 1e9
    assert not list(tmp_path.glob("*.partial"))


def test_a_bound_below_one_file_still_reads(folder: Path, url: str, tmp_path: Path) -> None:
    data, here = DataSet(url, Cache(tmp_path, gigabytes=0)), DataSet(str(folder))
    assert data.read(COUNT // 2) == here.read(COUNT // 2)


@pytest.mark.long
def test_batches_are_the_same_with_workers_that_fetch(folder: Path, url: str, tmp_path: Path) -> None:
    def batches(path: str, workers: int) -> list[list[int]]:
        data = DataSet(path, Cache(tmp_path / "cache"))
        source = StoredImages(data, data.tokenizer(), Pixels(), PairConfig(), seed=0)
        grammar = data.tokenizer().sequence_format(4)
        loader = StepLoader(lambda n: source.document(n, n), grammar, 6, workers=workers)
        return [batch.input_ids.tolist() for step in range(10) for batch in loader(step)]

    assert batches(url, 2) == batches(url, 0) == batches(str(folder), 0)


def _fetch(url: str, cache: Cache) -> int:
    return cache.file(url).stat().st_size


def test_many_processes_fetch_a_file_once(folder: Path, tmp_path: Path) -> None:
    shard = DataSet(str(folder)).manifest.shards[0]
    url, cache = f"file://{folder}/{shard.file}", Cache(tmp_path)
    with multiprocessing.get_context("fork").Pool(6) as pool:
        result = pool.starmap(_fetch, [(url, cache)] * 30)
    assert result == [shard.bytes] * 30
    assert sizes(tmp_path) == shard.bytes


def test_a_fetch_that_breaks_off_leaves_nothing(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError("the connection was reset")

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfileobj", broken)
        with pytest.raises(UserError, match=r"manifest\.json: not fetched \(the connection was reset\)"):
            DataSet(url, Cache(tmp_path, waits=()))
    assert sizes(tmp_path) == 0
    assert len(DataSet(url, Cache(tmp_path))) == COUNT


def test_what_is_not_there(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"memory://none/manifest\.json: expected a file, found none"):
        DataSet("memory://none", Cache(tmp_path))
    with pytest.raises(UserError, match=r"nothing://here/manifest\.json: "):
        DataSet("nothing://here", Cache(tmp_path))
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match='pip install "s3fs<'):
        DataSet("s3://bucket/set", Cache(tmp_path))


def test_a_run_with_a_remote_set(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transfuse.recipes import preset
    from transfuse.runs import open_run

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    recipe = preset("tiny")
    wanted = replace(recipe, data=replace(recipe.data, sources=(url, "glosses")))
    settled = open_run(wanted, tmp_path / "run")
    assert settled.recipe.data.source_fingerprints == (DataSet(url).fingerprint,)
    assert settled.sources.image_size == 16
    assert sizes(tmp_path / "transfuse") > 0
