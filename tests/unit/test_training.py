"""The step, its losses, its counts; checkpoints and exact resume."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import signal
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import safetensors.torch
import torch
from conftest import KeepsGradients, latent, open_tiny, randomised, tiny
from torch.nn import functional as F

from transfuse.diffusion import DiffusionConfig, Process
from transfuse.errors import UserError
from transfuse.io import sha256
from transfuse.model import dense
from transfuse.recipes import preset
from transfuse.rng import generator_for
from transfuse.sequence import Batch, Document, Image, SequenceFormat, Text, collate
from transfuse.train import build_trainer
from transfuse.training import (
    Checkpoint,
    CheckpointFolder,
    Distributed,
    DivergedError,
    LoopConfig,
    ObjectiveConfig,
    OptimizerConfig,
    Trainer,
    TransfusionObjective,
    learning_rate,
    read_metrics,
)
from transfuse.training.checkpoint import read, step_of, verify
from transfuse.training.metrics import Average, Meter, MetricsLog

SEED = 11


def objective(**diffusion) -> TransfusionObjective:
    return TransfusionObjective(ObjectiveConfig(), Process(DiffusionConfig(**diffusion)), SEED)


def naive_losses(model, document: Document, grammar: SequenceFormat, process: Process) -> tuple[float, int, float, int]:
    """Sums and counts of one document by the definitions: position by position, image by image, no packing."""
    batch = collate([document], grammar)
    noised, times, noises = [], [], []
    for number, image in enumerate(document.images):
        generator = generator_for(SEED, "noise", document.sample, number)
        t = 0
        if image.target:
            cap = image.max_timestep or process.config.timesteps
            t = int(torch.randint(1, cap + 1, (), generator=generator))
        noises.append(torch.randn(image.latent.shape, generator=generator))
        times.append(t)
        noised.append(process.add_noise(image.latent, noises[-1], torch.tensor(t)))
    every = torch.arange(batch.positions)
    out = model(batch.input_ids, batch.position_ids, dense(batch), every, batch.patches, noised, torch.tensor(times))
    text, texts = 0.0, 0
    for position in range(batch.positions - 1):
        if position in batch.loss_positions.tolist():
            text += F.cross_entropy(out.logits[position], batch.input_ids[position + 1]).item()
            texts += 1
    image_loss, images = 0.0, 0
    for number, image in enumerate(document.images):
        if image.target:
            error = (out.predictions[number] - process.target(image.latent, noises[number], times[number])) ** 2
            image_loss += (error.mean() * process.weight(times[number])).item()
            images += 1
    return text, texts, image_loss, images


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_loss_equals_a_naive_loop(prediction: str, grammar: SequenceFormat, mixed) -> None:
    goal = objective(prediction=prediction, weighting="v" if prediction == "x0" else "uniform")
    model = randomised(tiny())
    mixed[3] = replace(mixed[3], parts=[Image(latent(4, 4, 9), target=False), *mixed[3].parts])
    batch = collate(mixed, grammar)
    sums = goal.loss(model, batch)
    naive = [naive_losses(model, document, grammar, goal.process) for document in mixed]
    text, texts, image, images = (sum(column) for column in zip(*naive, strict=True))
    assert goal.counts(batch) == (texts, images)
    assert float(sums.losses[0]) == pytest.approx(text, rel=1e-5)
    assert float(sums.losses[1]) == pytest.approx(image, rel=1e-5)
    assert sum(count for _, count in sums.details.values()) == images


def test_noise_depends_on_the_sample_alone(grammar: SequenceFormat, mixed) -> None:
    goal = objective()
    together = goal.noise(collate(mixed, grammar))
    reordered = goal.noise(collate(mixed[::-1], grammar))
    assert sorted(together.timesteps.tolist()) == sorted(reordered.timesteps.tolist())
    alone = goal.noise(collate([mixed[3]], grammar))
    assert torch.equal(alone.latents[0], together.latents[2])
    assert torch.equal(alone.latents[1], together.latents[3])
    assert not torch.equal(alone.timesteps[0], alone.timesteps[1]), "each image has its own timestep"


def test_timesteps_respect_the_cap_and_context_is_clean(grammar: SequenceFormat) -> None:
    goal = objective()
    documents = [Document([Image(latent(2, 2), max_timestep=500), Text((9,))], sample=i) for i in range(300)]
    capped = goal.noise(collate(documents, grammar)).timesteps
    assert capped.min() >= 1
    assert 450 < capped.max() <= 500
    short = objective(timesteps=100)
    assert short.noise(collate(documents, grammar)).timesteps.max() <= 100, "a limit beyond the last level is none"
    free = goal.noise(collate([Document([Image(latent(2, 2))], sample=i) for i in range(300)], grammar)).timesteps
    assert free.max() > 900
    assert free.float().mean() == pytest.approx(500, abs=60)
    clean = goal.noise(collate([Document([Image(latent(2, 2), target=False), Text((9,))])], grammar))
    assert clean.timesteps.tolist() == [0]
    assert torch.equal(clean.latents[0], latent(2, 2))


def make_trainer(
    folder: Path,
    documents,
    grammar: SequenceFormat,
    accumulate: int = 1,
    model=None,
    flops=lambda batch: 0,
    meter: Meter | None = None,
    ranks: Distributed | None = None,
    **loop,
) -> Trainer:
    size = len(documents) // accumulate
    parts = [collate(documents[i * size : (i + 1) * size], grammar) for i in range(accumulate)]
    config = LoopConfig(**{"steps": 3, "sample_every": 0, "checkpoint_every": 0, "log_every": 1, **loop})
    model, load, optimizer = model or randomised(tiny()), Fixed(parts), OptimizerConfig(warmup=2)
    return Trainer(model, objective(), load, folder, config, optimizer, flops, ranks, meter=meter)


@dataclass
class Fixed:
    """A loader that gives the same batches at every step."""

    parts: list[Batch]

    def __call__(self, step: int) -> list[Batch]:
        return self.parts

    def position(self) -> dict[str, int]:
        return {}

    def start_from(self, position: dict[str, int]) -> None:
        pass


def uneven(grammar: SequenceFormat) -> list[Document]:
    """Four samples, very uneven in text and images: halves and quarters of it have wildly different counts."""
    return [
        Document([Text((9,) * 60)], sample=0),
        Document([Text((8, 7))], sample=1),
        Document([Text((6,)), Image(latent(8, 8, 1))], sample=2),
        Document([Image(latent(2, 2, i)) for i in range(6)], sample=3),
    ]


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_changes_nothing(tmp_path, grammar: SequenceFormat, accumulate: int) -> None:
    averages, gradients = [], []
    for parts in (1, accumulate):
        trainer, average = make_trainer(tmp_path, uneven(grammar), grammar, parts), Average()
        trainer.optimizer = KeepsGradients(trainer.model)
        trainer.train_step(average)
        averages.append(average)
        gradients.append(trainer.optimizer.kept)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5)
    for name, mean in averages[0].means().items():
        assert averages[1].means()[name] == pytest.approx(mean, rel=1e-5), name


@pytest.mark.parametrize(
    "documents",
    [
        [Document([Text((9, 8))], sample=1)],
        [Document([Image(latent(4, 4))], sample=1, predict=False)],
        [Document([], sample=1, predict=False), Document([Text((9,), predict=False)], sample=2, closed=False)],
        [Document([Image(latent(4, 4), target=False), Text((9,))], sample=1)],
    ],
    ids=["no images", "no text targets", "nothing to learn", "context image only"],
)
def test_a_batch_without_a_modality_is_finite(tmp_path, grammar: SequenceFormat, documents) -> None:
    trainer = make_trainer(tmp_path, documents, grammar)
    average = Average()
    trainer.train_step(average)
    assert all(math.isfinite(value) for value in average.means().values())
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())


def test_image_size_leaves_the_text_gradient_alone(tmp_path, grammar: SequenceFormat) -> None:
    """Losses are means over their own targets: more patches must not dilute the text."""
    text = Document([Text((9, 8, 7))], sample=1)
    gradients = []
    for side in (2, 8):
        model = randomised(tiny())
        goal = objective()
        batch = collate([text, Document([Image(latent(side, side))], sample=2, predict=False)], grammar)
        (goal.loss(model, batch).losses[0] / goal.counts(batch)[0]).backward()
        gradients.append(model.lm_head.weight.grad.clone())
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


def test_divergence_stops_before_the_optimizer_and_names_the_sample(tmp_path, grammar: SequenceFormat) -> None:
    bad = latent(4, 4, 5)
    bad[0, 0, 0] = float("nan")
    documents = [*uneven(grammar), Document([Image(bad)], sample=77)]
    trainer = make_trainer(tmp_path, documents, grammar)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(DivergedError, match=r"step 0: expected finite numbers, found .* samples \[77\]; no weight was"):
        trainer.run()
    assert all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters())


@pytest.mark.parametrize(("warmup", "warned"), [(3, False), (4, True), (5, True), (4000, True)])
def test_a_run_shorter_than_its_warmup_is_warned(
    tmp_path, grammar: SequenceFormat, capsys, warmup: int, warned: bool
) -> None:
    """One line before the first step; none where the run is over, and again where it resumes."""

    def run(steps: int, optimizer: OptimizerConfig) -> list[str]:
        loop = LoopConfig(steps, sample_every=0, log_every=1)
        documents = [collate([Document([Text((9, 10))])], grammar)]
        trainer = Trainer(randomised(tiny()), objective(), Fixed(documents), tmp_path, loop, optimizer)
        trainer.restore()
        trainer.run()
        return [line for line in capsys.readouterr().err.splitlines() if "warmup" in line]

    optimizer = OptimizerConfig(1e-3, warmup=warmup)
    line = f"warning: optimizer.warmup: expected fewer steps than the run has (4), found {warmup}; "
    line += f"the learning rate ends at {1e-3 * 4 / warmup:.2g} and never decays"
    assert run(4, optimizer) == [line] * warned
    assert run(4, optimizer) == []
    assert len(run(5, optimizer)) == (warmup >= 5)


def test_learning_rate_follows_the_paper() -> None:
    config = OptimizerConfig()
    assert learning_rate(config, 0, 250_000) == pytest.approx(3e-4 / 4000)
    assert learning_rate(config, 3999, 250_000) == pytest.approx(3e-4)
    assert learning_rate(config, 127_000, 250_000) == pytest.approx((3e-4 + 1.5e-5) / 2, rel=1e-3)
    assert learning_rate(config, 250_000, 250_000) == pytest.approx(1.5e-5)


@dataclass
class Interrupted:
    """A loader that sends SIGTERM while it makes a step's data; the run stops after the next step."""

    load: Any
    at: int

    def __call__(self, step: int) -> list[Batch]:
        if step == self.at:
            signal.raise_signal(signal.SIGTERM)
        return self.load(step)

    def position(self) -> dict[str, int]:
        return self.load.position()

    def start_from(self, position: dict[str, int]) -> None:
        self.load.start_from(position)


def run_tiny(folder: Path, steps: int, interrupted: int | None = None, **changes) -> Trainer:
    recipe = preset("tiny")
    recipe = replace(recipe, loop=replace(recipe.loop, steps=steps, checkpoint_every=4, log_every=3), **changes)
    trainer = build_trainer(open_tiny(recipe, folder), folder)
    trainer.restore()
    if interrupted is not None:
        trainer.load = Interrupted(trainer.load, interrupted)
    trainer.run()
    return trainer


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def straight(request, tmp_path_factory) -> Trainer:
    """An undisturbed run of 12 steps."""
    return run_tiny(tmp_path_factory.mktemp("straight") / "run", 12, precision=request.param)


@pytest.mark.parametrize("cut", [2, 5, 8])
def test_straight_equals_resumed_bit_for_bit(tmp_path, straight: Trainer, cut: int) -> None:
    """Weights, moments, EMA, and the metrics of the steps after the cut."""
    changes = {"precision": json.loads((straight.folder / "config.json").read_text())["precision"]}
    assert run_tiny(tmp_path / "resumed", 12, interrupted=cut - 2, **changes).step == cut
    resumed = run_tiny(tmp_path / "resumed", 12, **changes)
    assert resumed.step == straight.step == 12
    saved = [newest(trainer.checkpoints) for trainer in (straight, resumed)]
    for kind, tensors in saved[0].tensors.items():
        assert tensors.keys() == saved[1].tensors[kind].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, saved[1].tensors[kind][name]), (kind, name)
    for kind in ("positions", "images", "text_targets"):
        assert straight.totals[kind] == resumed.totals[kind]
    lines = [read_metrics(trainer.folder / "metrics.jsonl") for trainer in (straight, resumed)]
    assert [line["step"] for line in lines[0]] == [3, 6, 9, 12]
    clock = ("seconds", "_second", "_share", "waited")
    known = [[{k: v for k, v in line.items() if not k.endswith(clock)} for line in run] for run in lines]
    assert {"text", "image", "gradient_norm", "learning_rate"} <= known[0][0].keys()
    assert known[0] == known[1], "a line is of all its steps, those before the cut too"


def test_workers_change_nothing(tmp_path) -> None:
    recipe = preset("tiny")
    plain = run_tiny(tmp_path / "a", 5)
    helped = run_tiny(tmp_path / "b", 5, data=replace(recipe.data, workers=2))
    for a, b in zip(plain.model.parameters(), helped.model.parameters(), strict=True):
        assert torch.equal(a, b)


def newest(store: CheckpointFolder) -> Checkpoint:
    path, complaints = store.newest()
    assert path is not None
    assert not complaints
    return read(path)


def checkpoint(step: int, value: float) -> Checkpoint:
    return Checkpoint(step, {"model": {"w": torch.full((4,), value)}, "ema": {"w": torch.zeros(4)}}, {"totals": {}})


def test_checkpoints_keep_the_newest_and_fall_back(tmp_path) -> None:
    store = CheckpointFolder(tmp_path, keep=2)
    for step in (1, 2, 3):
        store.save(checkpoint(step, step))
    assert [path.name for path in store.complete()] == ["step-00000002", "step-00000003"]
    last = tmp_path / "step-00000003"
    assert verify(last) is None
    assert (tmp_path / "latest").read_text() == "step-00000003\n"
    file = next(last.glob("*.safetensors"))
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    intact, complaints = store.newest()
    assert intact == tmp_path / "step-00000002"
    assert read(intact).tensors["model"]["w"].tolist() == [2.0] * 4
    assert f"{file.name} does not match its hash; falling back to an older checkpoint" in complaints[0]
    (last / "manifest.json").write_text("{")
    assert store.newest()[0] == intact
    (intact / "manifest.json").write_text('{"version": 99, "files": {}}')
    with pytest.raises(UserError, match=r"step-00000003: .*complete checkpoint to resume from, found none of 2"):
        store.newest()
    assert CheckpointFolder(tmp_path / "empty", keep=2).newest() == (None, [])


def test_every_so_many_checkpoints_stay(tmp_path) -> None:
    store = CheckpointFolder(tmp_path, keep=2, keep_every=3)
    for step in range(1, 9):
        store.begin(checkpoint(step, step))
    store.wait()
    assert [step_of(path) for path in store.complete()] == [3, 6, 7, 8]


def test_a_checkpoint_holds_what_was_when_it_was_begun(tmp_path) -> None:
    store, weight, totals = CheckpointFolder(tmp_path), torch.zeros(1_000_000), {"positions": 1}
    store.begin(Checkpoint(1, {"model": {"w": weight}}, {"totals": totals}))
    weight += 1
    totals["positions"] = 2
    store.wait()
    assert not newest(store).tensors["model"]["w"].any()
    assert newest(store).progress == {"totals": {"positions": 1}}


def test_a_checkpoint_counts_what_was_counted_when_it_was_begun(tmp_path, grammar: SequenceFormat, monkeypatch) -> None:
    """The thread that writes is slow, and the run counts on meanwhile."""
    trainer, go_on, plain = (
        make_trainer(tmp_path, uneven(grammar), grammar, steps=4),
        threading.Event(),
        Path.write_text,
    )

    def slow(path: Path, text: str, **options: str) -> int:
        go_on.wait(60)
        return plain(path, text, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", slow)
        trainer.train_step(Average())
        trainer.begin_save()
        counted = dict(trainer.totals)
        trainer.train_step(Average())
        trainer.merge()
        assert trainer.totals["positions"] == 2 * counted["positions"]
        go_on.set()
        trainer.checkpoints.wait()
    assert newest(trainer.checkpoints).progress["totals"] == counted


def test_a_folder_that_has_become_another_runs_gets_no_checkpoint(tmp_path, grammar: SequenceFormat) -> None:
    """Whoever removes the folder of a run removes its lock, too, and may begin another run there."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text('{"seed": 0}')
    trainer = make_trainer(folder, uneven(grammar), grammar, steps=1)
    trainer.save()
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=r"not written: expected the run that this process trains, found it removed"):
        trainer.save()
    assert not folder.exists()
    folder.mkdir()
    (folder / "config.json").write_text('{"seed": 1}')
    with pytest.raises(UserError, match=r"not written: expected the run that this process trains, found it removed"):
        trainer.save()
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    (folder / "config.json").write_text('{"seed": 0}')
    assert trainer.save().is_dir()


def test_a_checkpoint_resumes_the_recipe_it_was_saved_by(tmp_path, grammar: SequenceFormat) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"seed": 0}')
    path = make_trainer(tmp_path, uneven(grammar), grammar).save()
    assert make_trainer(tmp_path, uneven(grammar), grammar).restore()
    config.write_text('{"seed": 1}')
    with pytest.raises(UserError, match=r"expected a checkpoint of this run's config\.json, found another recipe's"):
        make_trainer(tmp_path, uneven(grammar), grammar).restore()
    progress = json.loads((path / "progress.json").read_text())
    del progress["recipe"]  # as before checkpoints named their recipe
    (path / "progress.json").write_text(json.dumps(progress))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["progress.json"] = {
        "size": (path / "progress.json").stat().st_size,
        "sha256": sha256(path / "progress.json"),
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert make_trainer(tmp_path, uneven(grammar), grammar).restore()


def test_the_newest_stays_beside_a_damaged_one_of_a_later_step(tmp_path) -> None:
    """Gone back to before it, a run that keeps one checkpoint keeps the one it has just written."""
    store = CheckpointFolder(tmp_path, keep=1)
    store.save(checkpoint(8, 8.0))
    (tmp_path / "step-00000008" / "progress.json").write_text("{}")
    for step in (4, 5):
        store.save(checkpoint(step, 5.0))
    intact, complaints = store.newest()
    assert intact is not None
    assert intact.name == "step-00000005"
    assert len(complaints) == 1
    assert len(store.complete()) == 2


def test_a_damaged_checkpoint_of_the_last_step_is_written_anew(tmp_path) -> None:
    straight = run_tiny(tmp_path / "run", 5)
    expected = newest(straight.checkpoints)
    damaged = tmp_path / "run" / "checkpoints" / "step-00000005"
    (damaged / "progress.json").write_text("{}")
    again = run_tiny(tmp_path / "run", 5)
    assert verify(damaged) is None
    for kind, tensors in newest(again.checkpoints).tensors.items():
        assert all(torch.equal(tensor, expected.tensors[kind][name]) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("name", "value"), [("steps", -1), ("log_every", 0), ("keep", 0), ("sample_every", -1), ("profile", -1)]
)
def test_settings_of_the_loop_that_make_no_sense(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"loop\.{name}: expected at least {value + 1}, found {value}"):
        LoopConfig(**{name: value})


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.0),
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(0, 4),
        torch.randn(8, 4).t(),
        torch.ones(3).half(),
    ],
    ids=["number", "none", "no rows", "transposed", "half"],
)
def test_tensors_of_every_kind_come_back(tmp_path, tensor: torch.Tensor) -> None:
    store = CheckpointFolder(tmp_path)
    store.save(Checkpoint(1, {"model": {"w": tensor}, "ema": {"w": torch.zeros(1)}}, {"totals": {}}))
    back = newest(store).tensors["model"]["w"]
    assert back.dtype == tensor.dtype
    assert torch.equal(back, tensor)


def test_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch) -> None:
    import transfuse.training.checkpoint as module

    store = CheckpointFolder(tmp_path, keep=1)
    store.save(checkpoint(1, 1.0))

    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    for where, broken in ((safetensors.torch, "save"), (module, "sync"), (Path, "mkdir")):
        with monkeypatch.context() as patch:
            patch.setattr(where, broken, full)
            with pytest.raises(
                UserError, match=r"checkpoint not written .*No space left.*earlier checkpoints are intact"
            ):
                store.save(checkpoint(2, 2.0))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]
        assert newest(store).step == 1


def test_checkpoint_of_another_shape(tmp_path, grammar: SequenceFormat) -> None:
    make_trainer(tmp_path, uneven(grammar), grammar).save()
    other = make_trainer(tmp_path, uneven(grammar), grammar, model=randomised(tiny(d_model=96, n_heads=4)))
    with pytest.raises(UserError, match="the checkpoint has another shape than the model"):
        other.restore()


def test_metrics_lines_after_the_checkpoint_are_dropped(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s}) + "\n" for s in (1, 2, 3)) + '{"step": 4, "te')
    log = MetricsLog(tmp_path)
    log.open(2)
    log.write({"step": 3, "text": 1.0})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3, "text": 1.0}]


def test_metrics_hold_what_they_promise(tmp_path) -> None:
    run_tiny(tmp_path / "run", 6)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [3, 6]
    for name in ("text", "image", "gradient_norm", "learning_rate", "positions", "images", "positions_per_second"):
        assert lines[-1][name] > 0
    assert lines[-1]["flops_per_second"] > 0
    assert any(name.startswith("image_by_timestep/") for name in lines[-1])
    assert lines[-1]["text"] < math.log(512) * 1.2


def test_metrics_tell_where_the_time_went(tmp_path) -> None:
    run_tiny(tmp_path / "run", 9)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    shares = [{name: line[name] for name in line if name.endswith("_share")} for line in lines]
    assert all(0 < sum(line.values()) <= 1 for line in shares)
    assert all({"waited_share", "forward_backward_share", "optimizer_share"} <= line.keys() for line in shares)
    assert ["checkpoint_share" in line for line in shares] == [False, True, True], "saved at steps 4 and 8"
    assert "mfu" not in lines[0], "a processor has no known peak"
    assert "memory_gigabytes" not in lines[0]


class CardMeter(Meter):
    """The meter of a card with 1e12 operations a second, of whose memory 1.5 gigabytes were used."""

    def memory(self) -> int:
        return 3 << 29

    def peak_flops(self) -> float:
        return 1e12


def test_metrics_of_four_cards(tmp_path, grammar: SequenceFormat) -> None:
    meter, ranks = CardMeter(torch.device("cpu")), Distributed(count=4)
    trainer = make_trainer(tmp_path, uneven(grammar), grammar, flops=lambda batch: 10**6, meter=meter, ranks=ranks)
    trainer.run()
    for line in read_metrics(tmp_path / "metrics.jsonl"):
        assert line["mfu"] == pytest.approx(line["flops_per_second"] / 4e12)
        assert line["memory_gigabytes"] == 1.5


class Mark:
    """A CUDA event: the device passes it when the test says so, at a time that the test says."""

    passed: ClassVar[float] = 0.0
    """marks up to here are passed"""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = next(TICKS)

    def query(self) -> bool:
        return self.at <= Mark.passed

    def elapsed_time(self, end: Mark) -> float:
        assert end.query(), "never asked before the device is there: that would wait for it"
        return 1000.0 * (end.at - self.at)


TICKS = itertools.count(1)


def test_a_clock_on_cuda_waits_for_nothing(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Mark)
    clock = Meter(torch.device("cuda"))
    for _ in range(3):  # marks 1 to 6
        with clock.part("forward_backward"):
            pass
    assert clock.read() == {}
    Mark.passed = 4
    with clock.part("checkpoint", on_host=True):
        pass
    seconds = clock.read()
    assert seconds.pop("checkpoint") >= 0
    assert seconds == {"forward_backward": 2.0}
    Mark.passed = 6
    assert clock.read() == {"forward_backward": 1.0}


def test_ema_follows(tmp_path, grammar: SequenceFormat) -> None:
    trainer = make_trainer(tmp_path, uneven(grammar), grammar, ema_decay=0.5)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train_step(Average())
    name = "lm_head.weight"
    after = dict(trainer.model.named_parameters())[name].detach().clone()
    expected = torch.lerp(start[name], after, 1 - min(0.5, 1 / 10))
    torch.testing.assert_close(trainer.ema.weights[name], expected)
    assert torch.equal(trainer.averaged()[name], trainer.ema.weights[name])
