"""Encoding a folder of pictures: what is stored, what is counted, and that a kill costs no more than a shard."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from transfuse.data import encoded
from transfuse.data.ahead import ahead
from transfuse.data.encoded import encode_images, read_encoded
from transfuse.errors import UserError
from transfuse.images import fit, read_image

COUNT, BROKEN, SMALL = 23, "05.png", "11.png"


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


@dataclass
class Blocks:
    """Means of blocks of 4 by 4 pixels. After `alive` calls it ends the process."""

    name: str = "blocks"
    fingerprint: str = "f00d"
    factor: int = 4
    channels: int = 3
    alive: int = 10**9
    calls: list[int] = field(default_factory=list)

    def encode(self, images: np.ndarray) -> Tensor:
        if len(self.calls) == self.alive:
            raise Killed
        self.calls.append(len(images))
        n, rows, columns, _ = images.shape
        x = torch.from_numpy(images).float().view(n, rows // 4, 4, columns // 4, 4, 3).mean((2, 4))
        return (x.movedim(-1, 1) - 120.0) / 60.0


@dataclass
class Coded(Blocks):
    codebook_size: int | None = 256

    def codes(self, images: np.ndarray) -> Tensor:
        return torch.from_numpy(images[:, ::4, ::4, 0]).to(torch.int64)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 pictures in two folders, one of them broken, one too small; and a file that is no picture by its name."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "sub").mkdir()
    random = np.random.default_rng(5)
    for number in range(COUNT):
        path = folder / (f"{number:02d}.png" if number < 15 else f"sub/{number:02d}.webp")
        sides = (3, 40) if path.name == SMALL else random.integers(16, 50, 2)
        PIL.Image.fromarray(random.integers(0, 256, (*sides, 3), dtype=np.uint8)).save(path)
    (folder / BROKEN).write_bytes((folder / BROKEN).read_bytes()[:200])
    (folder / "notes.txt").write_text("none of these")
    return folder


def run(source: Path, out: Path, autoencoder: Blocks | None = None, **changes: object) -> dict[str, float]:
    settings: dict[str, object] = {"size": 16, "batch_size": 3, "shard_size": 8, "workers": 2, **changes}
    return encode_images(autoencoder or Blocks(), source, out, **settings)  # type: ignore[arg-type]


def contents(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def straight(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("straight") / "out"
    run(source, out)
    return out


# --- what is stored ---------------------------------------------------------------------------------------------------


def test_latents_are_those_of_each_picture(source: Path, straight: Path) -> None:
    good = [f"{n:02d}.png" if n < 15 else f"sub/{n:02d}.webp" for n in range(COUNT)]
    good = [name for name in good if name not in (BROKEN, SMALL)]
    pairs = list(read_encoded(straight))
    assert [name for name, _ in pairs] == good
    for name, latent in pairs:
        assert latent.dtype == torch.float32
        torch.testing.assert_close(latent, Blocks().encode(fit(read_image(source / name), 16)[None])[0])


def test_layout(straight: Path) -> None:
    shards = [f"shards/shard-{n:05d}.{end}" for n in range(3) for end in ("json", "safetensors")]
    assert sorted(contents(straight)) == sorted(["config.json", "rejected.jsonl", "statistics.json", *shards])
    with safe_open(straight / "shards" / "shard-00001.safetensors", "pt") as file:
        assert file.get_slice("latents").get_shape() == [7, 3, 4, 4]
    record = json.loads((straight / "shards" / "shard-00001.json").read_text())
    assert record["files"][:4] == ["08.png", "09.png", "10.png", "12.png"]
    config = json.loads((straight / "config.json").read_text())
    assert {key: config[key] for key in ("autoencoder", "fingerprint", "size", "factor", "channels", "files")} == {
        "autoencoder": "blocks",
        "fingerprint": "f00d",
        "size": 16,
        "factor": 4,
        "channels": 3,
        "files": COUNT,
    }


def test_statistics(straight: Path) -> None:
    latents = torch.stack([latent for _, latent in read_encoded(straight)]).double()
    found = json.loads((straight / "statistics.json").read_text())
    assert (found["images"], found["rejected"]) == (COUNT - 2, 2)
    torch.testing.assert_close(torch.tensor(found["channel_mean"]).double(), latents.mean((0, 2, 3)), check_dtype=False)
    expected = latents.movedim(1, 0).flatten(1).std(1, correction=0)
    np.testing.assert_allclose(found["channel_std"], expected.numpy(), rtol=1e-12)
    np.testing.assert_allclose([found["mean"], found["std"]], [latents.mean(), latents.std(correction=0)], rtol=1e-12)


def test_rejected_are_named(straight: Path) -> None:
    lines = [json.loads(line) for line in (straight / "rejected.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines] == [BROKEN, SMALL]
    assert "found a damaged or unreadable file" in lines[0]["reason"]
    assert lines[1]["reason"] == "image: expected sides of at least 4 pixels, found 40x3"


def test_figures(source: Path, tmp_path: Path) -> None:
    figures = run(source, tmp_path / "out")
    assert (figures["images"], figures["rejected"], figures["encoded"]) == (COUNT - 2, 2, COUNT - 2)
    assert figures["images_per_second"] == figures["encoded"] / figures["seconds"]
    assert 0 < figures["network_seconds"] < figures["seconds"]
    assert figures["network_share"] == figures["network_seconds"] / figures["seconds"]


def test_half_precision_statistics_are_of_what_is_stored(source: Path, straight: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "half", dtype="float16")
    pairs = dict(read_encoded(tmp_path / "half"))
    for name, latent in read_encoded(straight):
        assert torch.equal(pairs[name], latent.half())
    found = json.loads((tmp_path / "half" / "statistics.json").read_text())
    np.testing.assert_allclose(found["mean"], torch.stack(list(pairs.values())).double().mean(), rtol=1e-12)


def test_an_autoencoder_with_codes(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "codes", Coded())
    pairs = list(read_encoded(tmp_path / "codes"))
    assert len(pairs) == COUNT - 2
    for name, codes in pairs:
        assert codes.dtype == torch.int32
        assert codes.tolist() == fit(read_image(source / name), 16)[::4, ::4, 0].tolist()
    assert json.loads((tmp_path / "codes" / "statistics.json").read_text()) == {"images": COUNT - 2, "rejected": 2}
    run(source, tmp_path / "plain", Coded(codebook_size=None))
    assert next(read_encoded(tmp_path / "plain"))[1].shape == (3, 4, 4)


def test_one_file_and_none_that_is_good(source: Path, tmp_path: Path) -> None:
    assert run(source / "00.png", tmp_path / "one")["images"] == 1
    assert [name for name, _ in read_encoded(tmp_path / "one")] == ["00.png"]
    assert run(source / BROKEN, tmp_path / "none")["rejected"] == 1
    assert list(read_encoded(tmp_path / "none")) == []
    assert json.loads((tmp_path / "none" / "statistics.json").read_text()) == {"images": 0, "rejected": 1}


# --- carrying on ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calls", range(9))
def test_resumed_equals_straight(source: Path, straight: Path, tmp_path: Path, calls: int) -> None:
    """Ended in the network at each of its calls, three a shard; then on, with other workers, to the same bytes."""
    out, second = tmp_path / "out", Blocks()
    with pytest.raises(Killed):
        run(source, out, Blocks(alive=calls))
    assert not (out / "statistics.json").exists()
    run(source, out, second, workers=1)
    assert contents(out) == contents(straight)
    assert sum(second.calls) == COUNT - 2 - 7 * (calls // 3)


def test_statistics_do_not_depend_on_the_batches(source: Path, straight: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out", batch_size=5, workers=3)
    assert contents(tmp_path / "out") == contents(straight)


@pytest.mark.parametrize("writes", range(1, 9))
def test_killed_between_any_two_files(
    source: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """Ended after each file that was written aside and not yet renamed, one of them a tensor without its record."""
    out, rename, done = tmp_path / "out", Path.rename, []

    def mortal(path: Path, target: Path) -> Path:
        if len(done) == writes:
            raise Killed
        done.append(target)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", mortal)
    with pytest.raises(Killed):
        run(source, out)
    monkeypatch.undo()
    assert list(out.rglob("*.partial"))
    if writes == 2:
        assert sorted(contents(out)) == [
            "config.json",
            "shards/shard-00000.json.partial",
            "shards/shard-00000.safetensors",
        ]
    run(source, out)
    assert contents(out) == contents(straight)


def test_a_second_call_runs_no_network(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out")
    before = contents(tmp_path / "out")
    figures = run(source, tmp_path / "out", Blocks(alive=0))
    assert (figures["images"], figures["encoded"], figures["network_share"]) == (COUNT - 2, 0, 0)
    assert contents(tmp_path / "out") == before


def test_a_shard_cut_short_is_made_again(source: Path, straight: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out")
    shard = tmp_path / "out" / "shards" / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"shard-00001\.safetensors: expected a whole shard, found none"):
        list(read_encoded(tmp_path / "out"))
    assert run(source, tmp_path / "out")["encoded"] == 7
    assert contents(tmp_path / "out") == contents(straight)


@pytest.mark.parametrize(
    ("autoencoder", "changes", "line"),
    [
        (Blocks(fingerprint="beef"), {}, 'fingerprint: expected "beef", found "f00d"'),
        (Blocks(name="other"), {}, 'autoencoder: expected "other", found "blocks"'),
        (Blocks(), {"size": 32}, "size: expected 32, found 16"),
        (Blocks(), {"shard_size": 9}, "shard_size: expected 9, found 8"),
        (Blocks(), {"dtype": "float16"}, 'dtype: expected "float16", found "float32"'),
        (Coded(), {}, "codebook_size: expected 256, found null"),
    ],
)
def test_other_settings_are_refused(
    source: Path, straight: Path, autoencoder: Blocks, changes: dict[str, object], line: str
) -> None:
    before = contents(straight)
    with pytest.raises(UserError) as caught:
        run(source, straight, autoencoder, **changes)
    assert line in str(caught.value)
    assert str(caught.value).startswith(f"{straight / 'config.json'}: ")
    assert contents(straight) == before


def test_another_source_is_refused(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    PIL.Image.new("RGB", (20, 20)).save(source / "a.png")
    run(source, out)
    before = (source / "a.png").read_bytes()
    PIL.Image.effect_noise((20, 20), 50).save(source / "a.png")
    with pytest.raises(UserError, match=r'config\.json: source: expected "[0-9a-f]{64}", found "[0-9a-f]{64}"'):
        run(source, out)
    (source / "a.png").write_bytes(before)
    PIL.Image.new("RGB", (20, 20)).save(source / "b.png")
    with pytest.raises(UserError, match="files: expected 2, found 1"):
        run(source, out)
    (out / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json: expected the settings of the shards beside it, found none"):
        run(source, out)


def test_a_full_disk(source: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: dict[str, Tensor], path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    out = tmp_path / "out"
    monkeypatch.setattr(encoded, "save_file", full)
    with pytest.raises(UserError, match=r"shard-00000\.safetensors: not written .*No space left"):
        run(source, out)
    assert list(contents(out)) == ["config.json"]
    monkeypatch.undo()
    run(source, out)
    assert contents(out) == contents(straight)


# --- reading ahead, settings ------------------------------------------------------------------------------------------


def test_pictures_are_read_while_the_network_runs(source: Path, tmp_path: Path, monkeypatch) -> None:
    """The first call of the network returns only once the second batch has been read."""
    read, enough, count = read_image, threading.Event(), []

    def counted(path: Path) -> np.ndarray:
        count.append(path)
        if len(count) >= 6:
            enough.set()
        return read(path)

    class Waiting(Blocks):
        def encode(self, images: np.ndarray) -> Tensor:
            assert enough.wait(10)
            return super().encode(images)

    monkeypatch.setattr(encoded, "read_image", counted)
    run(source, tmp_path / "out", Waiting(), workers=1)
    assert len(count) == COUNT


def test_reading_ahead_is_bounded_and_in_order() -> None:
    begun: list[int] = []

    def read(item: int) -> int:
        begun.append(item)
        return -item

    with ThreadPoolExecutor(3) as pool:
        results = ahead(lambda item: pool.submit(read, item), range(100), window=10)
        assert [next(results) for _ in range(5)] == [0, -1, -2, -3, -4]
        results.close()
        assert len(begun) <= 15
        found = list(ahead(lambda item: pool.submit(read, item), range(7), window=10))
    assert found == [0, -1, -2, -3, -4, -5, -6]


def test_a_defect_while_reading_is_no_rejection(source: Path, tmp_path: Path, monkeypatch) -> None:
    def defective(path: Path) -> np.ndarray:
        raise ZeroDivisionError

    monkeypatch.setattr(encoded, "read_image", defective)
    with pytest.raises(ZeroDivisionError):
        run(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"size": 18}, r"size: expected a multiple of 4 \(of blocks\), found 18"),
        ({"size": 0}, "size: expected a multiple of 4"),
        ({"batch_size": 0}, "batch_size: expected at least 1, found 0"),
        ({"shard_size": 0}, "shard_size: expected at least 1, found 0"),
        ({"workers": 0}, "workers: expected at least 1, found 0"),
        ({"dtype": "int8"}, "dtype: expected float32 or float16, found int8"),
    ],
)
def test_settings(source: Path, tmp_path: Path, changes: dict[str, object], line: str) -> None:
    with pytest.raises(UserError, match=line):
        run(source, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_what_an_autoencoder_must_give(source: Path, tmp_path: Path) -> None:
    class Infinite(Blocks):
        def encode(self, images: np.ndarray) -> Tensor:
            return super().encode(images) * 1e6

    class Wrong(Blocks):
        def encode(self, images: np.ndarray) -> Tensor:
            return super().encode(images)[:, :2]

    with pytest.raises(UserError, match=r"00\.png: expected finite latents of blocks in torch\.float16, found none"):
        run(source, tmp_path / "infinite", Infinite(), dtype="float16")
    with pytest.raises(ValueError, match=r"latents: expected \(3, 3, 4, 4\), found \(3, 2, 4, 4\)"):
        run(source, tmp_path / "wrong", Wrong())
    with pytest.raises(ValueError, match="expected a fingerprint"):
        run(source, tmp_path / "nameless", Blocks(fingerprint=""))


def test_reading_what_is_not_whole(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json: expected a JSON file, found none"):
        list(read_encoded(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="expected an encoded data set of version 1, found another"):
        list(read_encoded(tmp_path))
    with pytest.raises(Killed):
        run(source, tmp_path / "out", Blocks(alive=4))
    with pytest.raises(UserError, match=r"shard-00001\.safetensors: expected a whole shard, found none"):
        list(read_encoded(tmp_path / "out"))
