"""`transfuse tune`: a model learns a folder of images in one command, and a page shows it before and after."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from conftest import Make, exported

import transfuse
from transfuse.cli import run
from transfuse.config import read_json
from transfuse.data import DataSet
from transfuse.errors import UserError
from transfuse.export import GenerationConfig, load_export, save_export
from transfuse.recipes.recipe import SourceSpec
from transfuse.sequence import Tokenizer
from transfuse.training import LoopConfig, read_metrics
from transfuse.training.trainer import SINCE_BEST
from transfuse.tune import MEASURES, steps_for


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """12 images with captions, and a model of 8 x 8 pixels with random weights that few steps change little."""
    root = tmp_path_factory.mktemp("tune")
    (root / "in").mkdir()
    draw = np.random.default_rng(0)
    for number in range(12):
        PIL.Image.fromarray(draw.integers(0, 256, (10, 8, 3), dtype=np.uint8)).save(root / "in" / f"{number}.png")
        (root / "in" / f"{number}.txt").write_text(f"boat {number} on blue")
    made = exported(tokenizer)
    generation = GenerationConfig(sampler=made.generation.sampler.__class__("ddim", steps=2), max_tokens=4)
    parts = (made.model.state_dict(), made.model.config, made.process.config, tokenizer, made.autoencoder)
    save_export(root / "model", *parts, 8, generation, "# A model", preset="tiny")
    return root


def weights(export: Path) -> dict[str, np.ndarray]:
    return {name: weight.numpy() for name, weight in load_export(export).model.state_dict().items()}


def test_a_folder_is_learned_and_shown(folder: Path, tmp_path: Path, capsys) -> None:
    words = ["tune", str(folder / "model"), str(folder / "in"), "--run", str(tmp_path / "run")]
    words += ["--steps", "12", "--batch-size", "4", "--heldout", "0.3", "--json"]
    assert run(words) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    data = DataSet(str(tmp_path / "run" / "pictures"))
    settings = read_json(tmp_path / "run" / "config.json")["data"]
    assert settings["sources"] == [f"{data.path},weight=1", "glosses,weight=1"]
    assert settings["text_share"] == 0.3, "text alone can be had, and is all that is rehearsed"
    assert data.manifest.documents == 12
    assert data.manifest.heldout > 0
    assert data.manifest.settings["size"] == 8
    before, after = report["numbers"]["own images, held out: image loss"]
    lines = [line["denoising/image loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if len(line) < 5]
    assert after == pytest.approx(lines[-1], rel=0.02), "the weights of the last step are exported"
    assert before > after
    page = (tmp_path / "run" / "report.html").read_text()
    for index in range(data.size("heldout")):
        assert str(data.read(data.number("heldout", index)).parts[1]) in page
    assert "what it knew" not in page.lower(), "it is not recorded"
    first = weights(tmp_path / "run" / "export")
    assert run(words) == 0, "nothing is done twice"
    again = weights(tmp_path / "run" / "export")
    assert all(np.array_equal(first[name], again[name]) for name in first)


@pytest.mark.long
def test_a_stopped_run_is_resumed_to_the_same_weights(folder: Path, tmp_path: Path, monkeypatch) -> None:
    import signal

    from transfuse.data import StepLoader

    options = {"steps": 20, "batch_size": 2, "heldout": 0.3}
    straight = transfuse.tune(folder / "model", folder / "in", tmp_path / "straight", **options)
    assert straight.export is not None
    plain = StepLoader.__call__

    def call(self: StepLoader, step: int):
        if step == 12 and signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
            signal.raise_signal(signal.SIGTERM)
        return plain(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(StepLoader, "__call__", call)
        stopped = transfuse.tune(folder / "model", folder / "in", tmp_path / "stopped", **options)
    assert (stopped.export, stopped.report) == (None, None)
    resumed = transfuse.tune(folder / "model", folder / "in", tmp_path / "stopped", **options)
    assert resumed.export is not None
    first, second = weights(straight.export), weights(resumed.export)
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert resumed.numbers == straight.numbers


@pytest.mark.long
def test_it_ends_when_the_held_out_pairs_get_no_better(folder: Path, tmp_path: Path) -> None:
    """A learning rate of 3e-4 and noise for images: what is held out gets worse long before 2,000 steps."""
    tuned = transfuse.tune(folder / "model", folder / "in", tmp_path, steps=2000, batch_size=2, heldout=0.3, patience=5)
    best, lines = read_json(tmp_path / "best.json"), read_metrics(tmp_path / "metrics.jsonl")
    last = max(line["step"] for line in lines)
    assert last == best["step"] + 5 * 2000 // MEASURES < 2000
    assert tuned.export is not None
    first, second = weights(tuned.export), weights(tmp_path / "best")
    assert all(np.array_equal(first[name], second[name]) for name in first)


def shares(run: Path) -> dict[str, float]:
    """Return the share of positions of each source of a run, by the settings in its folder."""
    data = read_json(run / "config.json")["data"]
    specs = [SourceSpec.parse(text) for text in data["sources"]]
    of_text = {spec.name: spec.weight for spec in specs if spec.name == "glosses"}
    of_images = {spec.name: spec.weight for spec in specs if spec.name != "glosses"}
    return {
        name: share * weight / sum(weights.values())
        for weights, share in ((of_images, 1 - data["text_share"]), (of_text, data["text_share"]))
        for name, weight in weights.items()
    }


@pytest.mark.long
def test_what_it_learned_from_is_rehearsed(tmp_path: Path, folder: Path) -> None:
    """The model of a run rehearses the sources of that run, in their proportions, also after it was tuned once."""
    from test_finetune import recipe

    from transfuse.train import train

    first = recipe("", 2)
    trained = train(first, tmp_path / "first")
    assert trained.export is not None
    options = {"steps": 3, "batch_size": 4, "heldout": 0.3}
    tuned = transfuse.tune(trained.export, folder / "in", tmp_path / "tuned", replay=0.4, lora=2, **options)
    settings = read_json(tmp_path / "tuned" / "config.json")
    own, before = str(tmp_path / "tuned" / "pictures"), shares(tmp_path / "first")
    assert shares(tmp_path / "tuned") == pytest.approx({own: 0.6, **{name: 0.4 * s for name, s in before.items()}})
    assert settings["data"]["world"]["nouns"] == read_json(tmp_path / "first" / "config.json")["data"]["world"]["nouns"]
    assert settings["lora"]["rank"] == 2
    assert any(name.startswith("what it knew: ") for name in tuned.numbers)
    assert "What it knew" in (tmp_path / "tuned" / "report.html").read_text()
    assert tuned.export is not None
    transfuse.tune(tuned.export, folder / "in", tmp_path / "twice", replay=0.5, **options)
    twice = {str(tmp_path / "twice" / "pictures"): 0.5, **{n: s / 2 for n, s in shares(tmp_path / "tuned").items()}}
    assert shares(tmp_path / "twice") == pytest.approx(twice, rel=1e-4)
    (tmp_path / "tuned" / "pictures" / "manifest.json").unlink()
    transfuse.tune(tuned.export, folder / "in", tmp_path / "gone", replay=0.5, **options)
    left = shares(tmp_path / "gone")
    assert list(left) == [str(tmp_path / "gone" / "pictures"), "world", "glosses"]
    assert left["world"] + left["glosses"] == pytest.approx(0.5)
    assert left["glosses"] == pytest.approx(0.5 * shares(tmp_path / "tuned")["glosses"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "nowhere"}, "nowhere: expected an export folder, found none|config.json: expected"),
        ({"pictures": "nothing-here"}, "nothing-here"),
        ({"replay": 1.0}, "replay: expected a share from 0 to below 1, found 1.0"),
        ({"heldout": -0.1}, "heldout: expected a share from 0 to below 1, found -0.1"),
        ({"steps": 0}, "steps: expected at least 1, found 0"),
        ({"lora": -1}, "lora: expected at least 0, found -1"),
        ({"max_errors": 1.5}, "max_errors: expected a share from 0 to 1, found 1.5"),
    ],
)
def test_wrong_inputs_are_one_line(folder: Path, tmp_path: Path, change: dict, message: str) -> None:
    inputs = {"model": folder / "model", "pictures": folder / "in", "run": tmp_path / "run", **change}
    with pytest.raises(UserError, match=message) as raised:
        transfuse.tune(**inputs)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_a_folder_with_faults_and_a_manifest_of_its_own(folder: Path, tmp_path: Path) -> None:
    """An app's manifest.json does not make a folder a data set, and the option that the refusal names is there."""
    shutil.copytree(folder / "in", tmp_path / "in")
    (tmp_path / "in" / "manifest.json").write_text('{"name": "an app"}')
    for number in range(20, 36):
        (tmp_path / "in" / f"{number}.png").write_bytes(b"damaged")
        (tmp_path / "in" / f"{number}.txt").write_text("a boat")
    words = ["tune", str(folder / "model"), str(tmp_path / "in"), "--run", str(tmp_path / "run")]
    words += ["--steps", "2", "--batch-size", "2", "--heldout", "0.3"]
    with pytest.raises(UserError, match="larger --max-errors"):
        transfuse.tune(folder / "model", tmp_path / "in", tmp_path / "run")
    assert run([*words, "--max-errors", "0.9"]) == 0
    assert len(DataSet(str(tmp_path / "run" / "pictures"))) == 12


def test_a_set_of_another_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    assert run(["data", "build", str(folder / "in"), str(tmp_path / "set"), "--size", "8", "--vocabulary", "300"]) == 0
    with pytest.raises(UserError, match=r"expected data sets with the tokenizer of .*build them with --tokenizer"):
        transfuse.tune(folder / "model", tmp_path / "set", tmp_path / "run")


def test_patience_ends_a_run_and_a_resumed_one(make: Make) -> None:
    settings = {"steps": 9, "measure_every": 1, "patience": 2, "best": "a/b", "checkpoint_every": 4}
    trainer = make("a", **settings)
    assert trainer.run(measure=lambda weights: {SINCE_BEST: max(0.0, trainer.step - 3.0)}) == "finished"
    assert trainer.step == 5
    resumed = make("a", **settings)
    assert resumed.run(measure=lambda weights: {}) == "finished"
    assert resumed.step == 5
    longer = make("a", **{**settings, "patience": 4})
    assert longer.run(measure=lambda weights: {SINCE_BEST: 0.0}) == "finished"
    assert longer.step == 9
    with pytest.raises(ValueError, match=r"loop.best: expected the number that loop.patience \(2\) is about"):
        LoopConfig(patience=2)


def test_steps_grow_with_the_images() -> None:
    assert [steps_for(n) for n in (4, 60, 300, 1_000_000)] == [300, 300, 620, 20_000]
