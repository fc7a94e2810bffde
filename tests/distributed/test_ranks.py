"""One process, two and four learn the same, whatever the way the network is spread over them."""

from __future__ import annotations

import json
from pathlib import Path

import cases
import pytest
import torch
from processes import HERE, finished, torchrun
from safetensors.torch import load_file

from transfuse.training.checkpoint import read

pytestmark = [pytest.mark.long, pytest.mark.xdist_group("ranks")]


EXPERTS = ("experts", "experts-codes")


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """Folders 1, 2 and 4, by the number of processes, with what cases.py leaves; `moved` holds runs that resumed with
    another number of processes, named after them."""
    folder = tmp_path_factory.mktemp("ranks")
    moved = "../moved"
    everywhere = ["shard", "uneven"]
    alone = [
        "accumulate",
        "bfloat16",
        "full",
        "selective",
        "timestep",
        "muon",
        "newer",
        "tied",
        "unet",
        "clean-copy",
        "align",
        "align-uneven",
        "dropout",
        "dropout-full",
        "codes",
        "experts",
        "experts-codes",
        "text",
        "text-steps",
        "poisoned",
        "kl-tiny",
        "vq-tiny",
    ]
    cases.main(str(folder / "1"), *everywhere, *alone, f"shard:2:{moved}/1-4", f"shard:2:{moved}/1-tensor")
    two = [*everywhere, *(name for name in alone if "dropout" not in name), "replicate", "tensor"]
    two += ["experts-tensor", "muon-tensor", "poisoned-copies", f"muon:2:{moved}/muon"]
    stopped = [f"shard:2:{moved}/2-2", f"shard:2:{moved}/2-1", f"tensor:2:{moved}/tensor-1"]
    going_on = [f"shard:4:{moved}/2-2", f"tensor:4:{moved}/1-tensor", f"muon:4:{moved}/muon"]
    finished(torchrun(2, str(HERE / "cases.py"), str(folder / "2"), *two, *stopped, *going_on))
    finished(torchrun(3, str(HERE / "cases.py"), str(folder / "3"), *everywhere, "accumulate", "codes"))
    cases.main(str(folder / "1"), f"shard:4:{moved}/2-1", f"shard:4:{moved}/tensor-1")
    four = [*everywhere, "replicate", "tensor", f"shard:4:{moved}/1-4"]
    finished(torchrun(4, str(HERE / "cases.py"), str(folder / "4"), *four))
    return folder


@pytest.mark.parametrize(
    ("alone", "others"),
    [
        ("shard", ["1/accumulate", "1/uneven", *(f"{n}/{name}" for n in (2, 3, 4) for name in ("shard", "uneven"))]),
        ("shard", ["2/accumulate", "3/accumulate", "2/replicate", "4/replicate", "2/tensor", "4/tensor", "moved/2-1"]),
        ("codes", ["2/codes", "3/codes"]),
        ("unet", ["2/unet"]),
        ("clean-copy", ["2/clean-copy"]),
    ],
)
def test_counts_are_equal_for_every_split(runs: Path, alone: str, others: list[str]) -> None:
    """Operations, positions, targets and images of all steps, exactly: padding is not counted."""

    def totals(folder: Path) -> dict[str, float]:
        totals_of_run: dict[str, float] = json.loads((folder / "totals.json").read_text())
        return totals_of_run

    expected = totals(runs / "1" / alone)
    assert expected["flops"] > 0
    for other in others:
        assert totals(runs / other) == expected, other


LOSSES = ("text", "image", "align", "tokens", "gradient_norm")


def losses(folder: Path) -> list[dict[str, float]]:
    return [
        {name: line[name] for name in LOSSES if name in line}
        for line in json.loads((folder / "losses.json").read_text())
    ]


def weights(folder: Path, kind: str = "weights") -> dict[str, torch.Tensor]:
    return load_file(folder / f"{kind}.safetensors")


def same(run: Path, other: Path, tolerance: float) -> None:
    for a, b in zip(losses(run), losses(other), strict=True):
        assert b == pytest.approx(a, rel=tolerance)
    for kind in ("weights", "averages"):
        ours, expected = weights(run, kind), weights(other, kind)
        assert ours.keys() == expected.keys()
        for name, weight in ours.items():
            torch.testing.assert_close(weight, expected[name], rtol=tolerance, atol=tolerance, msg=f"{kind} {name}")


@pytest.mark.parametrize(
    "name",
    [
        "shard",
        "accumulate",
        "full",
        "selective",
        "timestep",
        "newer",
        "tied",
        "unet",
        "clean-copy",
        "align",
        "align-uneven",
        "codes",
        *EXPERTS,
        "text",
        "uneven",
        "text-steps",
    ],
)
def test_two_equal_one(runs: Path, name: str) -> None:
    same(runs / "1" / name, runs / "2" / name, 1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "shard",
        "accumulate",
        "full",
        "selective",
        "timestep",
        "tied",
        "unet",
        "clean-copy",
        "align",
        "align-uneven",
        "codes",
        *EXPERTS,
        "text",
        "uneven",
    ],
)
def test_loss_and_gradient_of_equal_weights(runs: Path, name: str) -> None:
    """The first step's, before rounding has gone through Adam, which makes much of it.

    A convolution's gradient is another sum for another batch: the U-Net's norm moves by 3.5e-6 where one process is
    given the same documents in reverse.
    """
    (first, *_), (two, *_) = losses(runs / "1" / name), losses(runs / "2" / name)
    assert two.pop("gradient_norm") == pytest.approx(first.pop("gradient_norm"), rel=5e-6 if name == "unet" else 1e-6)
    assert two == pytest.approx(first, rel=1e-6)


@pytest.mark.parametrize("name", ["replicate", "tensor"])
@pytest.mark.parametrize("ranks", ["2", "4"])
def test_spread_another_way(runs: Path, name: str, ranks: str) -> None:
    """2: two copies of one rank, two halves of each matrix; 4: two copies, or two halves, of two shards."""
    same(runs / "1" / "shard", runs / ranks / name, 1e-5)


def test_matrices_of_both_towers_are_shared_among_two(runs: Path) -> None:
    same(runs / "1" / "experts", runs / "2" / "experts-tensor", 1e-5)


@pytest.mark.parametrize("name", ["shard", "uneven"])
def test_four_equal_one(runs: Path, name: str) -> None:
    """Uneven: the first rank has all images, two ranks have nothing at all."""
    same(runs / "1" / name, runs / "4" / name, 1e-5)


@pytest.mark.parametrize("name", ["kl-tiny", "vq-tiny"])
def test_autoencoders_too(runs: Path, name: str) -> None:
    """Every rank has the whole; a critic is at work, and codes are revived."""
    same(runs / "1" / name, runs / "2" / name, 3e-4)


def test_bfloat16_is_near(runs: Path) -> None:
    """Sums of rounded gradients are not the rounded gradients of a sum."""
    same(runs / "1" / "bfloat16", runs / "2" / "bfloat16", 2e-3)


@pytest.mark.parametrize("name", ["accumulate", "full", "selective"])
def test_settings_of_speed_change_nothing(runs: Path, name: str) -> None:
    same(runs / "1" / "shard", runs / "1" / name, 1e-6)


@pytest.mark.parametrize("name", ["poisoned", "poisoned-copies"])
def test_all_ranks_leave_a_bad_step_out(runs: Path, name: str) -> None:
    """A picture of the second rank is not finite in steps 1 and 3, and the run is saved right after: both ranks end
    with the weights of one process, copies with each other's (`cases.run`), and no moment is lost."""
    alone, two = runs / "1" / "poisoned", runs / "2" / name
    same(alone, two, 1e-5)
    lines = [[json.loads(line) for line in (run / "bad_steps.jsonl").read_text().splitlines()] for run in (alone, two)]
    assert lines[0] == lines[1]
    assert [(line["data_step"], line["samples"]) for line in lines[0]] == [(1, [15]), (3, [31])]
    saved, expected = (read(run / "checkpoints" / "step-00000004") for run in (two, alone))
    assert saved.tensors["optimizer"].keys() == expected.tensors["optimizer"].keys()
    assert {int(value) for key, value in saved.tensors["optimizer"].items() if key.startswith("step.")} == {2}


def test_checkpointing_drops_the_same_again(runs: Path) -> None:
    same(runs / "1" / "dropout", runs / "1" / "dropout-full", 1e-7)
    moved = [(weights(runs / "1" / "dropout")[n] - w).abs().max() for n, w in weights(runs / "1" / "shard").items()]
    assert max(moved) > 1e-5, "dropout does something"


@pytest.mark.parametrize("name", ["muon", "muon-tensor"])
def test_muon_gathers_whole_matrices(runs: Path, name: str) -> None:
    """Newton-Schulz of shards would be another update."""
    same(runs / "1" / "muon", runs / "2" / name, 1e-6)
    adamw = weights(runs / "1" / "shard")
    moved = [(weight - adamw[key]).abs().max() for key, weight in weights(runs / "1" / "muon").items() if "qkv" in key]
    assert min(moved) > 1e-5, "Muon does something else"


@pytest.mark.parametrize(("name", "of_two"), [("shard", "2-2"), ("muon", "muon")])
def test_two_resumed_by_two_are_equal_to_the_bit(runs: Path, name: str, of_two: str) -> None:
    for kind in ("weights", "averages"):
        straight, resumed = weights(runs / "2" / name, kind), weights(runs / "moved" / of_two, kind)
        assert all(torch.equal(weight, resumed[name]) for name, weight in straight.items())


@pytest.mark.parametrize("name", ["2-1", "1-4", "1-tensor", "tensor-1"])
def test_going_on_with_another_number(runs: Path, name: str) -> None:
    """Two steps each: the second half as if nothing had happened."""
    for a, b in zip(losses(runs / "1" / "shard")[2:], losses(runs / "moved" / name), strict=True):
        assert b == pytest.approx(a, rel=1e-5)
    straight = weights(runs / "1" / "shard")
    for key, weight in weights(runs / "moved" / name).items():
        torch.testing.assert_close(weight, straight[key], rtol=1e-5, atol=1e-5)


def test_ranks_write_their_shards(runs: Path) -> None:
    """Four files of weights, of which none holds the whole."""
    files = sorted((runs / "4" / "shard" / "checkpoints" / "step-00000004").glob("*-00001-of-00003.safetensors"))
    assert len(files) == 4
    whole = sum(weight.numel() for weight in weights(runs / "1" / "shard").values()) * 4
    assert all(file.stat().st_size < 0.3 * whole for file in files)


def test_a_signal_to_one_rank_of_a_tensor_group_stops_all(tmp_path: Path) -> None:
    """A rank that stops alone leaves the others waiting for it."""
    finished(torchrun(2, str(HERE / "cases.py"), str(tmp_path), "tensor-stop"))
    assert json.loads((tmp_path / "tensor-stop" / "stops.json").read_text()) == [True, True]
