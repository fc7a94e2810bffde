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

WORLD = WorldConfig(size=32, nouns=6, styles=("fluent-flat",))
SINGLE = replace(WORLD, max_objects=1, max_count=1, sizes=("large",))


@pytest.fixture
def few_scenes(monkeypatch) -> None:
    """A detector that is not to be any good is examined on fewer."""
    monkeypatch.setattr("emoji_scenes.scene_detector.TEST_SCENES", 30)


def oracle(scenes, pictures):
    """A detector that can not err: it looks pictures up among those of known scenes."""
    known = {picture.tobytes(): scene for scene, picture in zip(scenes, pictures, strict=True)}

    def see(images: np.ndarray) -> list[list[Seen]]:
        return [
            [Seen(t.noun, *p.centre, p.side) for t in known[image.tobytes()].things for p in t.places]
            for image in images
        ]

    return see


# --- detector ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def detector() -> SceneDetector:
    return train_scene_detector(replace(WORLD, nouns=3), steps=110, test_scenes=120)


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
    for n, some in enumerate(seen):
        middles = [place.centre for thing in world.scene(n).things for place in thing.places]
        near += sum(min((max(abs(one.x - x), abs(one.y - y)) for one in some), default=1) < 0.15 for x, y in middles)
    assert near > 0.85 * sum(t.count for n in range(60) for t in world.scene(n).things)


def test_more_noise_is_seen_worse(detector: SceneDetector) -> None:
    asked = task_scenes(replace(WORLD, nouns=3), "train", 60)[1]
    noise = np.random.default_rng(0).normal(size=asked.real.shape)
    shares = []
    for amount in (0, 100, 160, 240):
        images = np.clip(asked.real + amount * noise, 0, 255).astype(np.uint8)
        shares.append(asked.judge(images, detector)[0].mean())
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.5 * shares[0]


def test_detector_is_kept_and_another_file_is_refused(tmp_path, few_scenes) -> None:
    path = tmp_path / "judges" / "detector.safetensors"
    first = keep_scene_detector(path, SINGLE, steps=2)
    again = keep_scene_detector(path, SINGLE, steps=2)
    images = task_scenes(SINGLE, "train", 4)[0].real
    assert again(images) == first(images)
    assert (again.threshold, again.accuracy, again.confusion) == (first.threshold, first.accuracy, first.confusion)
    assert again.digest == first.digest
    path.write_bytes(b"something else")
    with pytest.raises(UserError, match="expected a saved detector"):
        keep_scene_detector(path, SINGLE, steps=2)


# --- composition ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["train", "heldout"])
def asked(request) -> list[TaskScenes]:
    return task_scenes(SINGLE, request.param, 24)


def test_scenes_suit_their_tasks_and_splits(asked: list[TaskScenes]) -> None:
    assert [one.task.name for one in asked] == [ask.name for ask in TASKS]
    assert all(len(one.scenes) == 24 for one in asked)
    for one in asked:
        assert all(held_out(scene) == (one.split == "heldout") for scene in one.scenes)
        for scene, prompt in zip(one.scenes, one.prompts, strict=True):
            assert scene.background in prompt


def test_perfect_drawings_are_right_and_those_of_other_prompts_wrong(asked: list[TaskScenes]) -> None:
    for one in asked:
        see = oracle(one.scenes, one.real)
        right, seen = one.judge(one.real, see)
        assert right.all(), one.task.name
        assert len(seen) == 24
        assert one.judge(one.others, see)[0].mean() < 0.5


def test_swapped_places_counts_sizes_and_colours_are_wrong(asked: list[TaskScenes]) -> None:
    by_name = {one.task.name: one for one in asked}

    def judged(name: str, change) -> np.ndarray:
        one = by_name[name]
        return np.array(
            [
                one.task.right(scene, change(some), image)
                for scene, some, image in zip(one.scenes, oracle(one.scenes, one.real)(one.real), one.real, strict=True)
            ]
        )

    def swap(some, names):
        return [
            replace(one, **{name: getattr(other, name) for name in names})
            for one, other in zip(some, some[::-1], strict=True)
        ]

    assert not judged("position", lambda some: swap(some, ("x", "y"))).any()
    assert not judged("attributes", lambda some: swap(some, ("side",))).any()
    assert not judged("counting", lambda some: [*some, some[0]]).any()
    assert not judged("counting", lambda some: some[1:]).any()
    assert not judged("two objects", lambda some: some[:1]).any()
    assert not judged("single object", lambda some: []).any()
    one = by_name["colours"]
    grounds = [scene.background for scene in one.scenes]
    for n, some in enumerate(oracle(one.scenes, one.real)(one.real)):
        other = next(at for at, ground in enumerate(grounds) if ground != grounds[n])
        assert not one.task.right(one.scenes[n], some, one.real[other])


def test_corrected_undoes_the_errors_of_the_judge() -> None:
    drawn = np.random.default_rng(0)
    true = drawn.random(4000) < 0.6
    judged = np.where(true, drawn.random(4000) < 0.9, drawn.random(4000) < 0.2)
    real, other = drawn.random(4000) < 0.9, drawn.random(4000) < 0.2
    found = corrected((judged, real, other))
    assert found.value == pytest.approx(true.mean(), abs=0.03)
    assert found.low < true.mean() < found.high
    few = corrected((judged, real[:40], other[:40]))
    assert few.high - few.low > 1.5 * (found.high - found.low)  # a judge that is less well known
    sure = corrected((np.ones(30, bool), np.ones(30, bool), np.zeros(30, bool)))
    assert sure.value == 1.0
    assert sure.low < 1.0
    assert corrected((np.ones(30, bool), np.ones(30, bool), np.zeros(0, bool))).value == 1.0
    halves = corrected((judged, real, other), (np.zeros(4000, bool), real, np.zeros(4000, bool)))
    assert halves.value == pytest.approx(found.value / 2)
    assert halves.high - halves.low == pytest.approx((found.high - found.low) / 2, rel=0.1)


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
    found = list(evaluate(bench, named(["composition", "editing"])))
    names = [result.name for result in found[0]]
    assert len(names) == 2 * (2 * len(TASKS) + 3)
    assert {"overall, seen", "overall, held out, corrected", "position, held out, corrected"} <= set(names)
    assert all(0 <= result.low <= result.value <= result.high <= 1 for result in found[0])
    ground = {result.name: result for result in found[0] if result.name.startswith("background")}
    assert {result.ceiling for result in ground.values()} == {1.0}
    assert all(result.value < 0.5 and result.floor < 0.5 for result in ground.values()), "colours asked for in vain"
    judged = [result for result in found[0] if result.name not in ground]
    assert all("detector@" in result.implementation for result in judged)
    assert "the detector's confusion, on scenes of its own" in found[0].tables
    names = [result.name for result in found[1]]
    assert names[-1].startswith("rest untouched")
    assert [name for name in names[:-1] if not name.endswith(", corrected")] == [*EDIT_SCORES]
    assert all(0 <= result.low <= result.value <= result.high <= 1 for result in list(found[1])[:-1])


def test_a_world_of_one_noun_can_not_be_composed(bench: EvalContext) -> None:
    alone = replace(bench, scorer=SceneScorer(WorldConfig(size=16, nouns=1)))
    with pytest.raises(UserError, match="composition: two objects: expected 60 scenes of the world, found 0"):
        list(evaluate(alone, named(["composition"])))


def test_geneval_s_folder(bench: EvalContext, tmp_path) -> None:
    lines = [{"tag": "single_object", "prompt": "a crab"}, {"tag": "colors", "prompt": "a red balloon"}]
    path = write(tmp_path, {"metadata.jsonl": "".join(json.dumps(line) + "\n" for line in lines)}) / "metadata.jsonl"
    options = replace(bench.options, geneval=path)
    found = list(evaluate(replace(bench, options=options), named(["geneval"])))
    assert not found[0].results
    (folder,) = (tmp_path / "geneval").glob("guidance-1-seed-0-*")
    assert json.loads((folder / "00001" / "metadata.jsonl").read_text()) == lines[1]
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    assert names == [f"{n:05d}/samples/{k:04d}.png" for n in range(2) for k in range(4)]
    other = replace(bench, options=options, model="another model")
    list(evaluate(other, named(["geneval"])))
    assert len(list((tmp_path / "geneval").iterdir())) == 2, "pictures of two models do not lie in one folder"
    with pytest.raises(UserError, match=r"expected evaluation_metadata\.jsonl, found none; from https://github\.com"):
        list(evaluate(bench, named(["geneval"])))
    path.write_text('{"text": "a crab"}\n')
    with pytest.raises(UserError, match='expected JSON lines with a "prompt"'):
        list(evaluate(replace(bench, options=options), named(["geneval"])))


def test_reconstructions_and_speed_of_a_model(bench: EvalContext) -> None:
    found = {result.name: result for some in evaluate(bench, named(["autoencoder", "speed"])) for result in some}
    assert found["PSNR in dB"].value == 100  # pixels come back as they are
    assert found["rFD-recogniser"].value == pytest.approx(0, abs=1e-6)
    for name in (
        "tokens a second, alone",
        "pictures a second, many at once",
        "MFU, drawing many",
        "MBU, writing alone",
    ):
        assert found[name].low <= found[name].value <= found[name].high
        assert found[name].value > 0


# --- edits ------------------------------------------------------------------------------------------------------------


def test_exact_edits_are_right_and_no_edit_is_not() -> None:
    edits = scene_edits(WORLD, 80)
    scenes = [scene for one in edits.edits for scene in (one.source, one.target)]
    see = oracle(scenes, [World(WORLD).render(scene) for scene in scenes])
    best, nothing = edits.judge(edits.targets, see), edits.judge(edits.sources, see)
    assert best.things.all()
    assert best.obeyed.all()
    assert (best.rest == 100).all()
    assert not nothing.obeyed.any()
    assert {one.kind for one in edits.edits} == {"background", "replace", "remove", "add", "resize"}
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
        found = [untouched_psnr(*three) for three in zip(images, edits.sources, edits.targets, strict=True)]
        means.append(np.mean([value for value in found if value is not None]))
    assert means == sorted(means, reverse=True)
    assert len(set(means)) == 4


def test_only_the_rest_counts() -> None:
    source = np.zeros((8, 8, 3), dtype=np.uint8)
    target = source.copy()
    target[2:4, 2:4] = 200
    drawn = source.copy()
    assert untouched_psnr(drawn, source, target) == 100  # what was to change is not asked
    drawn[7, 7] = 30
    rest = 64 - 12  # the square and its neighbours above, below and beside are left out
    assert untouched_psnr(drawn, source, target) == pytest.approx(10 * np.log10(255**2 / (900 / rest)))
    assert untouched_psnr(drawn, source, source + 1) is None
