"""`transfuse plan` on given GPUs: cards, what is recommended, how long it takes, and the line that starts it."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import exported

from emoji_scenes import glosses
from transfuse.cli import find_command, run
from transfuse.data.building import build_set
from transfuse.data.building.prepare import BuildConfig
from transfuse.data.readers import Columns
from transfuse.errors import UserError
from transfuse.export import save_export
from transfuse.model import Transfusion
from transfuse.plan import SPARE, cluster_plan, plan
from transfuse.recipes import PRESETS, Recipe, preset
from transfuse.runs import resolve
from transfuse.sequence import Tokenizer
from transfuse.train import build_trainer
from transfuse.training import DistilConfig
from transfuse.training.finetune import LoRAConfig
from transfuse.training.hardware import ALIASES, CARDS, card, peak_flops

PARALLEL = ("--parallel.replicate", "--parallel.tensor", "--parallel.activation-checkpointing")


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-PCIE-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100-80"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA RTX A6000", "a6000"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
    ],
)
def test_drivers_names_of_cards(device: str, name: str) -> None:
    assert peak_flops(device) == card(name).flops


def test_other_cards_are_not_taken_for_known_ones() -> None:
    for device in ("", "Tesla V100-SXM2-16GB", "NVIDIA GH200 480GB", "NVIDIA L40", "NVIDIA GeForce RTX 4090 Laptop GPU",
                   "NVIDIA H200 NVL", "NVIDIA A100-SXM4-40GB MIG 1g.5gb"):  # fmt: skip
        assert peak_flops(device) is None, device
    assert set(ALIASES.values()) <= set(CARDS)


def words(line: str) -> dict[str, str]:
    """Options of a command line."""
    parts = shlex.split(line)
    return {name: value for name, value in pairwise(parts) if name.startswith("--")}


def test_a_plan_for_nodes() -> None:
    planned = cluster_plan(preset("7b"), 64, "h100")
    assert {(c["sharding"], c["activation_checkpointing"]) for c in planned["choices"]} == {
        (sharding, way)
        for sharding in ("replicated", "HSDP, nodes of 8", "sharded over 64")
        for way in ("none", "selective", "full")
    }
    for choice in planned["choices"]:
        sizes = dict(choice["memory_gigabytes"])
        assert sizes.pop("total") == pytest.approx(sum(sizes.values()), abs=0.01)
        fits = choice["memory_gigabytes"]["total"] <= (1 - SPARE) * 80
        assert choice["fits"] == fits == (choice["sharding"] != "replicated"), "20 bytes a parameter are 126 GB"
        assert choice["micro_batch"] * choice["accumulate"] * 64 == preset("7b").data.batch_size
    best = planned["recommended"]
    assert (best["sharding"], best["activation_checkpointing"]) == ("HSDP, nodes of 8", "none")
    options = words(planned["launch"])
    assert (options["--nproc-per-node"], options["--nnodes"]) == ("8", "8")
    assert [options[name] for name in PARALLEL] == ["8", "1", "none"]
    assert options["--data.accumulate"] == str(best["accumulate"])


def test_the_largest_micro_batch_that_fits() -> None:
    """Twice as large would not fit, or there is no more to do."""
    share = plan(preset("0.76b"))["positions_per_step"] // 8
    planned = cluster_plan(preset("0.76b"), 8, "a100-40")
    for choice in planned["choices"]:
        grown = choice["memory_gigabytes"]["total"] + choice["memory_gigabytes"]["activations"]
        assert choice["micro_batch_positions"] == share or grown > planned["usable_gigabytes"]
    assert planned["recommended"]["sharding"] == "replicated", "it fits comfortably"
    assert "--nnodes" not in planned["launch"]


def test_less_memory_means_more_computed_again() -> None:
    """A row of 4,096 is the least a GPU can take: 40 GB just hold one with everything kept, 24 GB recompute."""
    places = ((8, "h200"), (8, "a100-40"), (64, "rtx4090"), (8, "rtx4090"))
    ways = [cluster_plan(preset("7b"), gpus, gpu)["recommended"] for gpus, gpu in places]
    assert [way["activation_checkpointing"] for way in ways] == ["none", "none", "selective", "full"]
    assert [way["sharding"] for way in ways] == [f"sharded over {gpus}" for gpus, _ in places]


def test_one_gpu_and_none_that_is_large_enough() -> None:
    planned = cluster_plan(preset("0.16b"), 1, "rtx4090")
    assert planned["launch"].startswith("transfuse train 0.16b --run runs/0.16b --parallel.replicate 1 ")
    assert [choice["sharding"] for choice in planned["choices"]] == ["one GPU"] * 3
    planned = cluster_plan(preset("7b"), 1, "h100")
    assert planned["recommended"] is None
    assert planned["launch"] is None
    assert {choice["micro_batch"] for choice in planned["choices"]} == {1}


def test_time_is_operations_over_what_is_reached() -> None:
    """The paper's 0.5T tokens are its recipe; twice the share of the peak is half the time; 6 N D as without GPUs."""
    recipe = preset("1.4b")
    planned, twice = cluster_plan(recipe, 8, "h100", 0.25), cluster_plan(recipe, 8, "h100", 0.5)
    assert planned["mfu_is"] == "given"
    assert cluster_plan(recipe, 8, "h100")["mfu_is"] == "assumed"
    step, runs = planned["step"], planned["runs"]
    assert step["seconds"] == pytest.approx(step["executed_flops"] / (0.25 * 8 * 989.4e12))
    assert step["seconds"] == pytest.approx(2 * twice["step"]["seconds"])
    assert step["flops"] * recipe.loop.steps == plan(recipe)["train_flops"]
    assert step["executed_flops"] == pytest.approx(step["flops"], rel=0.15), "attention more, embeddings less"
    assert runs["recipe"] == runs["paper_0.5t"]
    assert runs["paper_0.5t"]["tokens"] == pytest.approx(0.524e12, rel=0.001)
    assert runs["paper_2t"]["gpu_hours"] == pytest.approx(4 * runs["paper_0.5t"]["gpu_hours"])
    assert runs["recipe"]["days"] * 24 * 8 == pytest.approx(runs["recipe"]["gpu_hours"])


def test_rows_are_counted_as_long_as_they_are() -> None:
    recipe = preset("0.37b")
    recipe = replace(recipe, data=replace(recipe.data, row_length=2048, batch_size=256))
    planned = cluster_plan(recipe, 8, "h100")
    assert planned["step"]["positions"] == 256 * 2048
    assert planned["recommended"]["micro_batch_positions"] == 2048 * planned["recommended"]["micro_batch"]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_line_that_starts_it(name: str) -> None:
    gpus = min(8, preset(name).data.batch_size)
    assert all(value is not None for value in plan(preset(name)).values())
    launch = cluster_plan(preset(name), gpus, "b200")["launch"]
    start, settings = launch.split(f" train {name} ")
    assert start == ("transfuse" if gpus == 1 else "torchrun --nproc-per-node 8 -m transfuse --")
    arguments = [part for key, value in words(settings).items() for part in (key, value)]
    options = find_command(["train", name, *arguments]).keywords
    assert str(options["run"]) == f"runs/{name}"
    assert options["recipe"].data.accumulate >= 1


@pytest.mark.parametrize(
    ("name", "gpus", "gpu", "mfu", "message"),
    [
        ("7b", 8, "h1000", None, 'gpu: unknown card "h1000"; did you mean "h100"'),
        ("7b", 0, "h100", None, "gpus: expected at least 1, found 0"),
        ("7b", 12, "h100", None, "gpus: expected at most 8, or whole nodes of 8, found 12"),
        ("7b", 3, "h100", None, r"gpus: expected a divisor of data.batch_size \(512\), found 3"),
        ("demo", 64, "h100", None, r"gpus: expected a divisor of data.batch_size \(32\), found 64"),
        ("7b", 8, "h100", 0.0, "mfu: expected a share above 0 and up to 1, found 0"),
        ("7b", 8, "h100", 1.5, "mfu: expected a share above 0 and up to 1, found 1.5"),
    ],
)
def test_mistakes(name: str, gpus: int, gpu: str, mfu: float | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        cluster_plan(preset(name), gpus, gpu, mfu)


def test_the_command(capsys: Any) -> None:
    assert run(["plan", "0.76b", "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert alone == plan(preset("0.76b"))
    assert run(["plan", "0.76b", "--gpus", "16", "--gpu", "A100", "--mfu", "0.5", "--json"]) == 0
    both = json.loads(capsys.readouterr().out)
    assert both == {**alone, **cluster_plan(preset("0.76b"), 16, "a100", 0.5)}
    assert run(["plan", "0.76b", "--gpus", "16", "--gpu", "a100"]) == 0
    shown = capsys.readouterr().out
    assert "assumed, not measured" in shown
    assert "torchrun --nproc-per-node 8 --nnodes 2" in shown
    assert run(["plan", "7b", "--gpu", "l4"]) == 0
    assert "nothing fits" in capsys.readouterr().out
    assert run(["plan", "0.76b", "--gpus", "16"]) == 2
    assert capsys.readouterr().err == "transfuse: plan: expected a card (--gpu h100) with --gpus or --mfu, found none\n"


# --- what a run opens before it knows its network -------------------------------------------------------------------


def parameters_of(recipe: Recipe) -> int:
    model = Transfusion.on_meta(resolve(recipe, here=False).recipe.model)
    return sum(weight.numel() for weight in model.parameters())


def tied(tokenizer: Tokenizer, folder: Path) -> Path:
    made = exported(tokenizer, tie_embeddings=True)
    parts = made.model.config, made.process.config, tokenizer, made.autoencoder, 8, made.generation
    return save_export(folder, made.model.state_dict(), *parts, "a model")


def starting(folder: Path, **changes: Any) -> Recipe:
    base = preset("tiny")
    data = replace(base.data, world=replace(base.data.world, size=16))
    return replace(base, start=str(folder), data=data, **changes)


def test_a_plan_counts_the_row_of_a_tied_matrix_that_is_trained_apart(tokenizer: Tokenizer, tmp_path: Path) -> None:
    recipe = starting(tied(tokenizer, tmp_path / "export"), lora=LoRAConfig(8))
    apart = 320 * 64
    assert parameters_of(recipe) == parameters_of(replace(recipe, lora=LoRAConfig())) + apart
    trainer = build_trainer(resolve(recipe), tmp_path / "run")
    assert plan(recipe)["total_parameters"] == sum(weight.numel() for weight in trainer.model.parameters())


def test_a_plan_counts_the_words_of_the_data(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("\n".join(glosses("heldout")[:150]))
    config = BuildConfig(size=16, vocabulary=700, heldout=0.0, columns=Columns(split="line"))
    build_set(str(tmp_path / "words.txt"), tmp_path / "text", config, workers=0)
    base = preset("tiny")
    recipe = replace(base, data=replace(base.data, sources=("world", str(tmp_path / "text"))))
    words = resolve(recipe, here=False).recipe.model.text_vocab_size
    assert words > base.model.text_vocab_size
    planned = plan(recipe)
    assert planned["total_parameters"] == parameters_of(recipe)
    assert planned["total_parameters"] == plan(base)["total_parameters"] + 2 * (words - 512) * base.model.d_model
    assert "source-fingerprints" not in cluster_plan(recipe, 1, "l4")["launch"]


def test_a_plan_counts_the_teacher(served: Path, tmp_path: Path) -> None:
    alone, recipe = (starting(served, distil=distil) for distil in (DistilConfig(), DistilConfig(2, 20, 3.0)))
    planned, without = plan(recipe), plan(alone)
    teacher = 4 * parameters_of(recipe) / 2**30
    assert planned["memory_gigabytes"] - without["memory_gigabytes"] == pytest.approx(teacher, abs=0.002)
    assert "teacher_flops" not in without
    trainer = build_trainer(resolve(recipe), tmp_path)
    steps = 8
    measured = sum(trainer.objective.teacher_flops(batch) for step in range(steps) for batch in trainer.load(step))
    assert planned["teacher_flops"] / recipe.loop.steps == pytest.approx(measured / steps, rel=0.2)
    taught, plain = (cluster_plan(each, 1, "l4")["step"]["executed_flops"] for each in (recipe, alone))
    assert taught - plain == pytest.approx(planned["teacher_flops"] / recipe.loop.steps)
    options = words(cluster_plan(recipe, 1, "l4")["launch"])
    assert (options["--start"], options["--distil.steps"]) == (str(served), "2")
    assert not [name for name in options if name.startswith(("--model", "--diffusion", "--generation"))]


def test_a_plan_of_a_file_without_a_preset(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model: {d_model: 64, n_layers: 2, n_heads: 2, latent_channels: 3, patch_size: 8}\n")
    command = ["plan", "--config", str(file), "--data.batch-size", "16", "--gpu", "l4", "--json"]
    assert run(command) == 0
    launch = json.loads(capsys.readouterr().out)["launch"]
    assert launch.startswith(f"transfuse train --config {file} --run runs/mine --data.batch-size 16 ")
    planned, started = (find_command(each).keywords["recipe"] for each in (command, shlex.split(launch)[1:]))
    assert (started.model, started.data.batch_size) == (planned.model, 16)
    assert cluster_plan(planned, 1, "l4")["launch"] is None, "there is no name for it"


PRINTED = Path(__file__).parents[1] / "golden" / "plans.txt"


def test_printed_plans(capsys: Any) -> None:
    """The output for eight presets, with and without GPUs, is the text of golden/plans.txt."""
    for section in PRINTED.read_text().split("$ transfuse ")[1:]:
        command, _, printed = section.partition("\n")
        assert run(shlex.split(command)) == 0
        assert capsys.readouterr().out == printed, command
