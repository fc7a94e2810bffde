"""Composition and edits: perfect drawings score the ceiling, wrong ones the floor; the judge's errors are counted."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import exported, write

from emoji_scenes import World, WorldConfig, held_out
from emoji_scenes.metrics import EDIT_SCORES, TASKS, TaskScenes, scene_edits, task_scenes, untouched_psnr
from emoji_scenes.scene_detector import SceneDetector, Seen, keep_scene_detector, train_scene_detector
from emoji_scenes.scorer import SceneScorer
from transfuse.errors import UserError
from transfuse.evaluation import Drawing, EvalConfig, EvalContext, evaluate, named
from transfuse.evaluation.confidence import corrected
from transfuse.inference import TransfusionPipeline

pytestmark = pytest.mark.xdist_group("composition")  # its fixtures are made once

WORLD = WorldConfig(size=32, nouns=6, styles=("fluent-flat",))
SINGLE = replace(WORLD, max_objects=1, max_count=1, sizes=("large",))


@pytest.fixture
def few_scenes(monkeypatch) -> None:
    """A detector that is not to be any good is examined on fewer."""
    monkeypatch.setattr("emoji_scenes.scene_detector.TEST_SCENES", 30)


def oracle(scenes, pictures):
    """A detector that cannot err: it looks pictures up among those of known scenes."""
    known = {picture.tobytes(): scene for scene, picture in zip(scenes, pictures, strict=True)}

    def see(images: np.ndarray) -> list[list[Seen]]:
        return [
            [Seen(t.noun, *p.centre, p.side) for t in known[image.tobytes()].things for p in t.places]
            for image in images
        ]

    return see


# --- detector ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[False, True], ids=["first", "second"])
def detector(request) -> SceneDetector:
    return train_scene_detector(replace(WORLD, nouns=3), steps=70, test_scenes=80, second=request.param)


def test_detector_finds_names_and_counts(detector: SceneDetector) -> None:
    assert detector.accuracy["found"] > 0.9
    assert detector.accuracy["named"] > 0.8  # chance: a third
    assert detector.accuracy["invented"] < 0.3
    things = sum(times for (truth, _), times in detector.confusion.items() if truth != "nothing")
    right = sum(times for (truth, named), times in detector.confusion.items() if truth == named)
    assert right / things == detector.accuracy["named"]
    config = replace(WORLD, nouns=3, seed=123)
    world = World(config)
    seen = detector(np.stack([world.render(world.scene(n)) for n in range(60)]))
    near = 0
    for n, detections in enumerate(seen):
        middles = [place.centre for thing in world.scene(n).things for place in thing.places]
        for x, y in middles:
            near += min((max(abs(d.x - x), abs(d.y - y)) for d in detections), default=1) < 0.15
    assert near > 0.85 * sum(t.count for n in range(60) for t in world.scene(n).things)


def test_more_noise_is_seen_worse(detector: SceneDetector) -> None:
    task = task_scenes(replace(WORLD, nouns=3), "train", 60)[1]
    noise = np.random.default_rng(0).normal(size=task.real.shape)
    shares = []
    for amount in (0, 100, 160, 1000):
        images = np.clip(task.real + amount * noise, 0, 255).astype(np.uint8)
        shares.append(task.judge(images, detector)[0].mean())
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.5 * shares[0], "about chance, which is a third"


def test_detector_is_kept_and_another_file_is_refused(tmp_path, few_scenes) -> None:
    path = tmp_path / "judges" / "detector.safetensors"
    first = keep_scene_detector(path, SINGLE, steps=2)
    again = keep_scene_detector(path, SINGLE, steps=2)
    images = task_scenes(SINGLE, "train", 4)[0].real
    assert again(images) == first(images)
    assert (again.threshold, again.accuracy, again.confusion) == (first.threshold, first.accuracy, first.confusion)
    assert again.digest == first.digest
    second = keep_scene_detector(tmp_path / "second.safetensors", SINGLE, steps=2, second=True)
    kept = keep_scene_detector(tmp_path / "second.safetensors", SINGLE, steps=2, second=True)
    assert kept(images) == second(images)
    assert second.identity != first.identity
    assert not {*second.network.state_dict()} & {name for name in first.network.state_dict() if "stem" in name}
    path.write_bytes(b"something else")
    with pytest.raises(UserError, match="expected a saved detector"):
        keep_scene_detector(path, SINGLE, steps=2)


# --- composition ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["train", "heldout"])
def tasks(request) -> list[TaskScenes]:
    return task_scenes(SINGLE, request.param, 24)


def test_scenes_suit_their_tasks_and_splits(tasks: list[TaskScenes]) -> None:
    assert [task.task for task in tasks] == list(TASKS)
    assert all(len(task.scenes) == 24 for task in tasks)
    for task in tasks:
        assert all(held_out(scene) == (task.split == "heldout") for scene in task.scenes)
        for scene, prompt in zip(task.scenes, task.prompts, strict=True):
            assert scene.background in prompt


def test_perfect_drawings_are_right_and_those_of_other_prompts_wrong(tasks: list[TaskScenes]) -> None:
    for task in tasks:
        see = oracle(task.scenes, task.real)
        right, seen = task.judge(task.real, see)
        assert right.all(), task.task
        assert len(seen) == 24
        assert task.judge(task.others, see)[0].mean() < 0.5


def test_swapped_places_counts_sizes_and_colours_are_wrong(tasks: list[TaskScenes]) -> None:
    by_name = {task.task: task for task in tasks}

    def judged(name: str, change) -> np.ndarray:
        task = by_name[name]
        see = oracle(task.scenes, task.real)
        return task.judge(task.real, lambda images: [change(seen) for seen in see(images)])[0]

    def swap(seen, names):
        return [
            replace(thing, **{name: getattr(other, name) for name in names})
            for thing, other in zip(seen, seen[::-1], strict=True)
        ]

    assert not judged("position", lambda seen: swap(seen, ("x", "y"))).any()
    assert not judged("attributes", lambda seen: swap(seen, ("side",))).any()
    assert not judged("counting", lambda seen: [*seen, seen[0]]).any()
    assert not judged("counting", lambda seen: seen[1:]).any()
    assert not judged("two objects", lambda seen: seen[:1]).any()
    assert not judged("single object", lambda seen: []).any()
    task = by_name["colours"]
    see, grounds = oracle(task.scenes, task.real), [scene.background for scene in task.scenes]
    others = [next(at for at, ground in enumerate(grounds) if ground != mine) for mine in grounds]
    assert not task.judge(task.real[others], lambda _: see(task.real))[0].any()


def test_corrected_undoes_the_errors_of_the_judge() -> None:
    drawn = np.random.default_rng(0)
    true = drawn.random(4000) < 0.6
    judged = np.where(true, drawn.random(4000) < 0.9, drawn.random(4000) < 0.2)
    real, other = drawn.random(4000) < 0.9, drawn.random(4000) < 0.2
    result = corrected((judged, real, other))
    assert result.value == pytest.approx(true.mean(), abs=0.03)
    assert result.low < true.mean() < result.high
    few = corrected((judged, real[:40], other[:40]))
    assert few.high - few.low > 1.5 * (result.high - result.low)  # a judge that is less well known
    sure = corrected((np.ones(30, bool), np.ones(30, bool), np.zeros(30, bool)))
    assert sure.value == 1.0
    assert sure.low < 1.0
    assert corrected((np.ones(30, bool), np.ones(30, bool), np.zeros(0, bool))).value == 1.0
    halves = corrected((judged, real, other), (np.zeros(4000, bool), real, np.zeros(4000, bool)))
    assert halves.value == pytest.approx(result.value / 2)
    assert halves.high - halves.low == pytest.approx((result.high - result.low) / 2, rel=0.1)


@pytest.fixture
def bench(tokenizer, tmp_path, few_scenes) -> EvalContext:
    loaded = exported(tokenizer)
    loaded.image_size = 16
    drawing = Drawing(sampler="ddim", steps=1, guidance_scale=1.0)
    options = EvalConfig(count=12, judge_steps=2)
    return EvalContext(
        TransfusionPipeline(loaded), "a", tmp_path, SceneScorer(replace(SINGLE, size=16)), options, drawing, batch=8
    )


def test_composition_and_edits_of_a_model(bench: EvalContext) -> None:
    options = replace(bench.options, count=48)
    measured = list(evaluate(replace(bench, options=options), named(["composition", "editing"])))
    names = [result.name for result in measured[0]]
    assert len(names) == 2 * (2 * len(TASKS) + 3)
    assert {"overall, seen", "overall, held out, corrected", "position, held out, corrected"} <= set(names)
    assert all(0 <= result.low <= result.value <= result.high <= 1 for result in measured[0])
    ground = {result.name: result for result in measured[0] if result.name.startswith("background")}
    assert {result.ceiling for result in ground.values()} == {1.0}
    assert all(result.value < 0.5 and result.floor < 0.5 for result in ground.values()), "colours asked for in vain"
    judged = [result for result in measured[0] if result.name not in ground]
    assert all("detector@" in result.implementation for result in judged)
    assert "the detector's confusion, on scenes of its own" in measured[0].tables
    names = [result.name for result in measured[1]]
    assert names[-1].startswith("rest untouched")
    assert [name for name in names[:-1] if not name.endswith(", corrected")] == [*EDIT_SCORES]
    assert all(0 <= result.low <= result.value <= result.high <= 1 for result in list(measured[1])[:-1])
    assert len(measured[0].examples) >= 64
    world = replace(SINGLE, size=16)
    first = [prompt for split in ("train", "heldout") for t in task_scenes(world, split, 8) for prompt in t.prompts[:6]]
    assert [example.text for example in measured[0].examples] == first, "in order, none picked out"
    edits = scene_edits(world, 32).edits
    assert [example.text for example in measured[1].examples] == [change.instruction for change in edits]


def test_a_world_of_one_noun_cannot_be_composed(bench: EvalContext) -> None:
    alone = replace(bench, scorer=SceneScorer(WorldConfig(size=16, nouns=1)))
    with pytest.raises(UserError, match="composition: two objects: expected 60 scenes of the world, found 0"):
        list(evaluate(alone, named(["composition"])))


def test_geneval_s_folder(bench: EvalContext, tmp_path) -> None:
    lines = [{"tag": "single_object", "prompt": "a crab"}, {"tag": "colors", "prompt": "a red balloon"}]
    path = write(tmp_path, {"metadata.jsonl": "".join(json.dumps(line) + "\n" for line in lines)}) / "metadata.jsonl"
    options = replace(bench.options, geneval=path)
    measured = list(evaluate(replace(bench, options=options), named(["geneval"])))
    assert not measured[0].results
    (folder,) = (tmp_path / "geneval").glob("guidance-1-seed-0-*")
    assert json.loads((folder / "00001" / "metadata.jsonl").read_text()) == lines[1]
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    assert names == [f"{n:05d}/samples/{k:04d}.png" for n in range(2) for k in range(4)]
    other = replace(bench, options=options, model="another model")
    list(evaluate(other, named(["geneval"])))
    assert len(list((tmp_path / "geneval").iterdir())) == 2, "pictures of two models are never in one folder"
    with pytest.raises(UserError, match=r"expected evaluation_metadata\.jsonl, found none; from https://github\.com"):
        list(evaluate(bench, named(["geneval"])))
    path.write_text('{"text": "a crab"}\n')
    with pytest.raises(UserError, match='expected JSON lines with a "prompt"'):
        list(evaluate(replace(bench, options=options), named(["geneval"])))


def test_reconstructions_and_speed_of_a_model(bench: EvalContext) -> None:
    by_name = {result.name: result for part in evaluate(bench, named(["autoencoder", "speed"])) for result in part}
    assert by_name["PSNR in dB"].value == 100  # pixels come back as they are
    assert by_name["rFD-recogniser"].value == pytest.approx(0, abs=1e-6)
    for name in (
        "tokens a second, alone",
        "pictures a second, many at once",
        "MFU, drawing many",
        "MBU, writing alone",
    ):
        assert by_name[name].low <= by_name[name].value <= by_name[name].high
        assert by_name[name].value > 0


# --- edits ------------------------------------------------------------------------------------------------------------


def test_exact_edits_are_right_and_no_edit_is_not() -> None:
    edits = scene_edits(WORLD, 80)
    scenes = [scene for change in edits.edits for scene in (change.source, change.target)]
    see = oracle(scenes, [World(WORLD).render(scene) for scene in scenes])
    best, nothing = edits.judge(edits.targets, see), edits.judge(edits.sources, see)
    assert best.things.all()
    assert best.obeyed.all()
    assert (best.rest == 100).all()
    assert not nothing.obeyed.any()
    assert {change.kind for change in edits.edits} == {"background", "replace", "remove", "add", "resize"}
    other = edits.judge(np.roll(edits.targets, 7, axis=0), see)
    assert (other.things & other.obeyed).mean() < 0.3
    assert other.rest.mean() < 30


def test_more_damage_to_the_rest_is_fewer_decibels() -> None:
    edits = scene_edits(WORLD, 40)
    drawn = np.random.default_rng(0)
    noise = drawn.normal(size=edits.targets.shape)
    means = []
    for amount in (0, 5, 20, 60):
        images = np.clip(edits.targets + amount * noise, 0, 255).astype(np.uint8)
        decibels = [untouched_psnr(*three) for three in zip(images, edits.sources, edits.targets, strict=True)]
        means.append(np.mean([value for value in decibels if value is not None]))
    assert means == sorted(means, reverse=True)
    assert len(set(means)) == 4


def test_only_the_rest_counts() -> None:
    source = np.zeros((8, 8, 3), dtype=np.uint8)
    target = source.copy()
    target[2:4, 2:4] = 200
    drawn = source.copy()
    assert untouched_psnr(drawn, source, target) == 100  # what was to change is not asked
    drawn[7, 7] = 30
    rest = 64 - 12  # the square and its neighbours above, below, left and right are left out
    assert untouched_psnr(drawn, source, target) == pytest.approx(10 * np.log10(255**2 / (900 / rest)))
    assert untouched_psnr(drawn, source, source + 1) is None
