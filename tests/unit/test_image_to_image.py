"""Pictures from pictures: variations, masks, instructions, the guidance interval; what each promises exactly."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import exported, latent
from engines import asking, coded, packed, plain

import transfuse
from transfuse.diffusion import DiffusionConfig, Process, Sampler, SamplerConfig
from transfuse.errors import UserError
from transfuse.images import read_settings, save_png
from transfuse.inference import Done, Engine, ImageEnd, ImageProgress, Request, Start, TransfusionPipeline
from transfuse.inference.settings import latent_mask, settings_of
from transfuse.sequence import Document, Image, Text, Tokenizer

SAMPLERS = [
    SamplerConfig("ddim", 6),
    SamplerConfig("ddim", 6, eta=1.0),
    SamplerConfig("ddpm", 6),
    SamplerConfig("dpmpp", 6),
]
HALF = torch.zeros(8, 8, dtype=torch.bool)
HALF[:, 4:] = True


@pytest.fixture(scope="module")
def engine(tokenizer: Tokenizer) -> Engine:
    return Engine(packed(exported(tokenizer)))


def drawn(engine: Engine, asked: Request) -> torch.Tensor:
    (found,) = [event.latent for event in engine.run([asked]) if isinstance(event, ImageEnd)]
    return found


def source() -> torch.Tensor:
    return latent(8, 8, 7).clamp(-1, 1)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: f"{s.name} {s.eta}")
def test_strength(engine: Engine, sampler: SamplerConfig) -> None:
    """1 is the drawing without a start, to the last bit; 0 the picture; between them so many steps."""
    asked = plain(sampler=sampler)
    free = drawn(engine, asked)
    assert torch.equal(drawn(engine, replace(asked, start=Start(source()))), free)
    assert torch.equal(drawn(engine, replace(asked, start=Start(source(), 0.0))), source())
    for strength, steps in ((0.0, 0), (0.2, 1), (0.5, 3), (0.75, 4), (1.0, 6)):
        events = list(engine.run([replace(asked, start=Start(source(), strength))]))
        assert [event.network_evaluations for event in events if isinstance(event, Done)] == [steps]
        assert sum(isinstance(event, ImageProgress) for event in events) == steps
    assert not torch.equal(drawn(engine, replace(asked, start=Start(source(), 0.5))), free)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: f"{s.name} {s.eta}")
def test_a_small_strength_takes_a_step(engine: Engine, sampler: SamplerConfig) -> None:
    """However few steps there are: 0 alone returns the image as it was."""
    asked = plain(sampler=replace(sampler, steps=3))
    events = list(engine.run([replace(asked, start=Start(source(), 0.01))]))
    assert [event.network_evaluations for event in events if isinstance(event, Done)] == [1]
    (changed,) = [event.latent for event in events if isinstance(event, ImageEnd)]
    assert not torch.equal(changed, source())


def test_a_variation_is_the_end_of_the_chain(engine: Engine) -> None:
    """Begun by hand from the picture with the same noise, at the level where so many steps are left."""
    process, config = engine.exported.process, SamplerConfig("ddim", 6)
    sampler = Sampler(process, config)
    noise = sampler.prepare((3, 8, 8), torch.Generator().manual_seed(3)).x
    state = sampler.prepare_from(source(), torch.Generator().manual_seed(3), 0.5)
    assert state.timesteps == sampler.timesteps[3:]
    assert torch.equal(state.x, process.add_noise(source(), noise, state.timesteps[0]))
    assert state.total == 3


@pytest.mark.parametrize("prediction", ["x0", "v", "epsilon"])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: f"{s.name} {s.eta}")
def test_what_is_given_is_as_noisy_as_the_rest_at_every_step(prediction: str, sampler: SamplerConfig) -> None:
    """A network that is wrong everywhere: yet where the mask is black x_t is noised source, in the end the source."""
    process = Process(DiffusionConfig(prediction=prediction))  # type: ignore[arg-type]
    rule, image = Sampler(process, sampler), latent(64, 64, 1)
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[:, 32:] = True
    state = rule.prepare_from(image, torch.Generator().manual_seed(0), 1.0, mask)
    while not state.done:
        level = process.alpha_bar[state.t].item()
        noise = (state.x - level**0.5 * image)[..., :32] / (1 - level) ** 0.5
        assert abs(float(noise.mean())) < 0.05
        assert abs(float(noise.std()) - 1) < 0.05
        state = rule.step(state, torch.randn(state.x.shape, generator=torch.Generator().manual_seed(state.index)))
    assert torch.equal(rule.finish(state)[..., :32], image[..., :32])
    assert not torch.isclose(rule.finish(state)[..., 32:], image[..., 32:]).all()


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_masks(engine: Engine, strength: float) -> None:
    for sampler in SAMPLERS:
        asked = plain(sampler=sampler, guidance_scale=2.0)
        half = drawn(engine, replace(asked, start=Start(source(), strength, HALF)))
        assert torch.equal(half[..., :4], source()[..., :4]), "kept to the last bit"
        assert (half[..., 4:] - source()[..., 4:]).abs().max() > 1e-2
        everywhere = replace(asked, start=Start(source(), strength, torch.ones(8, 8, dtype=torch.bool)))
        assert torch.equal(drawn(engine, everywhere), drawn(engine, replace(asked, start=Start(source(), strength))))
        nowhere = replace(asked, start=Start(source(), strength, torch.zeros(8, 8, dtype=torch.bool)))
        assert torch.equal(drawn(engine, nowhere), source())
    other = source()
    other[:, :, 0] *= -1
    seen = drawn(engine, replace(asked, start=Start(other, 1.0, HALF)))
    assert not torch.equal(seen[..., 4:], drawn(engine, replace(asked, start=Start(source(), 1.0, HALF)))[..., 4:]), (
        "what is drawn sees what is kept"
    )


def test_only_the_first_image_begins_from_it(engine: Engine) -> None:
    asked = plain(max_images=2, max_tokens=30, start=Start(source(), 0.0), draw="force", temperature=3.0)
    for seed in range(40):
        images = [e.latent for e in engine.run([replace(asked, seed=seed)]) if isinstance(e, ImageEnd)]
        assert torch.equal(images[0], source())
        if len(images) == 2:
            assert not torch.equal(images[1], source())
            return
    raise AssertionError("no second image in 40 rows")


def test_guidance_interval(engine: Engine, sizes: list[int]) -> None:
    """All levels: as without; none: as scale 1; outside of it one branch is computed."""
    asked = plain(sampler=SamplerConfig("ddim", 5), guidance_scale=4.0)  # levels 1000, 800, 600, 400, 200
    assert torch.equal(drawn(engine, asked), drawn(engine, replace(asked, guidance_interval=(0.0, 1.0))))
    unguided = drawn(engine, replace(asked, guidance_scale=1.0))
    assert torch.equal(drawn(engine, replace(asked, guidance_interval=(0.85, 0.95))), unguided)
    sizes.clear()
    some = drawn(engine, replace(asked, guidance_interval=(0.4, 0.8)))
    assert sizes[-5:] == [16, 32, 32, 32, 16]
    assert not torch.equal(some, unguided)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"guidance_interval": (0.8, 0.4)},
            r"guidance_interval: expected shares 0 <= low <= high <= 1, found \(0.8, 0.4\)",
        ),
        ({"guidance_interval": (0.0, 1.5)}, "guidance_interval: expected shares"),
        ({"start": Start(latent(4, 4))}, r"start: expected a latent \[3, 8, 8\], found \[3, 4, 4\]"),
        ({"start": Start(latent(8, 8), 1.5)}, "strength: expected a share from 0 to 1, found 1.5"),
        (
            {"start": Start(latent(8, 8), 1.0, torch.ones(8, 8))},
            r"mask: expected bool \[8, 8\], found float32 \[8, 8\]",
        ),
        ({"start": Start(latent(8, 8), 1.0, HALF[:4])}, r"mask: expected bool \[8, 8\], found bool \[4, 8\]"),
        ({"preview_every": -1}, "preview_every: expected at least 0, found -1"),
        ({"max_tokens": -1}, "max_tokens: expected at least 0, found -1"),
        ({"size": (2, 130)}, r"image size: expected at most 128 pixels a side, found \(2, 130\)"),
    ],
    ids=str,
)
def test_what_can_not_be_is_one_line(engine: Engine, changes: dict[str, object], told: str) -> None:
    with pytest.raises(UserError, match=f"^request: {told}") as error:
        engine.submit(plain(**changes))
    assert "\n" not in str(error.value)
    assert not engine.busy


def test_codes_are_not_denoised(tokenizer: Tokenizer) -> None:
    engine = Engine(coded(tokenizer))
    for changes in ({"guidance_interval": (0.0, 1.0)}, {"start": Start(torch.zeros(4, 4))}):
        with pytest.raises(UserError, match="expected none, for the model does not denoise, found one"):
            engine.submit(asking(**changes))
    pipe, picture = TransfusionPipeline(coded(tokenizer)), PIL.Image.new("RGB", (8, 8))
    with pytest.raises(UserError, match="expected none, for the model does not denoise"):
        pipe("a crab", image=picture, strength=0.5)
    assert pipe.edit(picture, "make it red", generator=0).size == (8, 8), "by instruction it can"


# --- the pipeline ---


@pytest.fixture(scope="module")
def pipe(tokenizer: Tokenizer) -> TransfusionPipeline:
    return TransfusionPipeline(packed(exported(tokenizer)))


def picture(seed: int = 0, size: int = 8) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def test_an_edit_is_an_image_then_the_instruction(pipe: TransfusionPipeline) -> None:
    """The sequence of training: source, clean, instruction, target."""
    image = picture()
    one = pipe("make it red", image=image, num_inference_steps=3, generator=4, output_type="latent").images[0]
    parts = [pipe.part(image), Text(pipe.exported.tokenizer.encode("make it red"))]
    asked = replace(pipe.request([], 3), document=Document(parts, closed=False), draw="force", max_tokens=0, seed=4)
    assert torch.equal(one, drawn(pipe.engine, asked))
    assert isinstance(parts[0], Image)
    assert not parts[0].target
    other = pipe("make it red", image=picture(1), num_inference_steps=3, generator=4, output_type="latent").images[0]
    assert not torch.equal(one, other), "the picture is seen"
    assert pipe.edit(image, "make it red", num_inference_steps=3, generator=4).size == (8, 8)


def test_pixels_outside_the_mask_are_the_same_pixels(pipe: TransfusionPipeline) -> None:
    image, white = picture(), PIL.Image.new("L", (8, 8))
    white.paste(255, (2, 2, 6, 7))
    out = np.asarray(pipe("a crab", image=image, mask_image=white, num_inference_steps=4, generator=1).images[0])
    kept = np.asarray(white) == 0
    assert (out[kept] == np.asarray(image)[kept]).all()
    assert (out[~kept] != np.asarray(image)[~kept]).any()
    assert (np.asarray(pipe("a crab", image=image, strength=0.0).images[0]) == np.asarray(image)).all()
    wide = picture(2, 16)  # any size whose sides divide into patches
    assert pipe("a crab", image=wide, strength=0.5, num_inference_steps=2).images[0].size == (16, 16)


def test_latent_mask() -> None:
    """A latent element is redrawn where any of its pixels is."""
    mask = np.zeros((4, 8), dtype=bool)
    mask[1, 3] = True
    assert latent_mask(mask, 2).tolist() == [[False, True, False, False], [False] * 4]
    assert latent_mask(mask, 1).sum() == 1


def test_a_transparent_mask_means_one_thing(pipe: TransfusionPipeline) -> None:
    """Its colours do not count: kept, cleared, or black where the picture stays."""
    where = np.zeros((8, 8), dtype=bool)
    where[1:4, 2:8] = True
    alpha = np.where(where, 0, 255).astype(np.uint8)[..., None]
    colours = np.asarray(picture(5))
    layers = [np.concatenate([rgb, alpha], -1) for rgb in (colours, colours * alpha.clip(0, 1), colours * 0)]
    for mask in (where, where * np.uint8(255), *layers, *map(PIL.Image.fromarray, layers)):
        start = pipe.start(picture(), 0.5, mask)
        assert start.mask is not None
        assert (start.mask.numpy() == where).all()


def test_a_mask_is_turned_as_the_picture_is(pipe: TransfusionPipeline, tmp_path: Path) -> None:
    where = np.zeros((8, 16), dtype=bool)
    where[:2, :5] = True
    exif = PIL.Image.Exif()
    exif[274] = 6
    layer = np.concatenate([np.zeros((8, 16, 3), np.uint8), np.where(where, 0, 255).astype(np.uint8)[..., None]], -1)
    PIL.Image.fromarray(np.asarray(picture(1, 16))[:8]).save(tmp_path / "image.png", exif=exif)
    for number, mask in enumerate((layer, where * np.uint8(255))):
        PIL.Image.fromarray(mask).save(tmp_path / f"{number}.png", exif=exif)
        for read in (Path, PIL.Image.open, lambda path: path.read_bytes()):
            start = pipe.start(read(tmp_path / "image.png"), 1.0, read(tmp_path / f"{number}.png"))
            assert start.mask is not None
            assert start.latent.shape == (3, 16, 8)
            assert (start.mask.numpy() == where[::-1].T).all()


@pytest.mark.parametrize("kind", ["layer", "sixteen", "turned"])
def test_the_model_sees_one_picture_however_it_comes(pipe: TransfusionPipeline, tmp_path: Path, kind: str) -> None:
    """Path, bytes and PIL image: the same latent, caption and edit."""
    path, colours = tmp_path / "a.png", np.asarray(picture(3))
    exif = PIL.Image.Exif()
    exif[274] = 6
    if kind == "layer":
        PIL.Image.fromarray(np.concatenate([colours, colours[..., :1]], -1)).save(path)
        alpha = colours[..., :1] / 255
        expected = np.round(colours * alpha + 255 * (1 - alpha))
    elif kind == "sixteen":
        PIL.Image.fromarray(colours[..., 1] * np.uint16(257)).save(path)
        expected = np.repeat(colours[..., 1:2], 3, -1)
    else:
        PIL.Image.fromarray(colours).save(path, exif=exif)
        expected = colours[::-1].transpose(1, 0, 2)
    with PIL.Image.open(path) as opened:
        sources = [path, path.read_bytes(), opened]
        latents = [pipe.part(source).latent for source in sources]  # type: ignore[union-attr]
        assert ((latents[0].permute(1, 2, 0).numpy() + 1) * 127.5 - expected).__abs__().max() < 1
        assert all(torch.equal(one, latents[0]) for one in latents)
        assert all(torch.equal(pipe.start(one).latent, latents[0]) for one in [*sources, str(path)])
        assert len({pipe.caption(one, max_tokens=8)[0] for one in [*sources, str(path)]}) == 1
        assert pipe.caption(sources, max_tokens=8) == [pipe.caption(path, max_tokens=8)[0]] * 3
        edits = [pipe.edit(one, "make it red", num_inference_steps=1, generator=0) for one in sources]
        assert len({one.tobytes() for one in edits}) == 1
        assert len({pipe.generate([one, "a"], max_tokens=5, draw="never").text for one in sources}) == 1


def test_callback_on_step_end(pipe: TransfusionPipeline) -> None:
    heard: list[tuple[int, int, tuple[int, ...]]] = []

    def hear(given, step, t, tensors):
        assert given is pipe
        heard.append((step, t, tuple(tensors["latents"].shape)))
        return tensors

    last: list[torch.Tensor] = []
    out = pipe(
        ["a crab", "two"], num_inference_steps=3, generator=0, callback_on_step_end=hear, output_type="latent"
    ).images
    assert heard == [(0, 1000, (2, 3, 8, 8)), (1, 667, (2, 3, 8, 8)), (2, 333, (2, 3, 8, 8))]
    pipe("a crab", num_inference_steps=3, generator=0, output_type="latent",
         callback_on_step_end=lambda p, s, t, tensors: last.append(tensors["latents"][0]))  # fmt: skip
    assert torch.equal(last[-1], out[0])
    with pytest.raises(ValueError, match="expected the latents as they were"):
        pipe("a crab", num_inference_steps=1, callback_on_step_end=lambda *_: {"latents": torch.zeros(1)})


def test_pipeline_mistakes(pipe: TransfusionPipeline) -> None:
    for options, told in (
        ({"strength": 0.5}, "image: expected one with strength or mask_image, found none"),
        ({"image": picture(), "strength": -1.0}, "strength: expected a share from 0 to 1"),
        ({"image": picture(size=7), "strength": 0.5}, "image: expected sides in multiples of 2, found 7x7"),
        ({"image": picture(size=4)}, "image: expected 8x8 pixels, found 4x4"),
        ({"image": picture(), "mask_image": picture(size=4)}, "mask: expected 8x8 pixels, as the image, found 4x4"),
        ({"image": picture(), "mask_image": PIL.Image.new("L", (8, 8))}, "mask: expected a transparent area to redraw"),
        ({"image": np.full((8, 8, 3), 9.0)}, "image: expected values from 0 to 1 where they are floats, found 9 to 9"),
        ({"image": np.zeros((8, 8, 3), np.int32)}, "image: expected an array of uint8"),
        ({"image_guidance_scale": 2.0}, "image_guidance_scale: expected a picture before the words, found none"),
        (
            {"image": picture(), "strength": 0.5, "image_guidance_scale": 2.0},
            "image_guidance_scale: expected a picture before",
        ),
        ({"guidance_interval": (0.8, 0.2)}, "guidance_interval: expected shares"),
    ):
        with pytest.raises(UserError, match=told):
            pipe("a crab", **options)  # type: ignore[arg-type]


def test_a_model_may_say_where_it_is_guided(served: Path, tmp_path: Path) -> None:
    plain, folder = transfuse.load(str(served)), tmp_path / "export"
    shutil.copytree(served, folder)
    settings = json.loads((folder / "transfuse_generation.json").read_text())
    (folder / "transfuse_generation.json").write_text(json.dumps({**settings, "guidance_interval": [0.3, 0.8]}))
    pipe = transfuse.load(str(folder))
    assert pipe.request(["a"]).guidance_interval == (0.3, 0.8)
    for own, other in ((None, (0.3, 0.8)), ((0.0, 1.0), None)):
        drawn = pipe("a crab", generator=1, guidance_interval=own, output_type="latent").images[0]
        expected = plain("a crab", generator=1, guidance_interval=other, output_type="latent").images[0]
        assert torch.equal(drawn, expected)
    assert not torch.equal(drawn, pipe("a crab", generator=1, output_type="latent").images[0])


def test_a_model_may_say_how_it_samples(served: Path, tmp_path: Path) -> None:
    """All of it: eta and the first level too, as far as they go with what is asked for."""
    folder = tmp_path / "export"
    shutil.copytree(served, folder)
    settings = json.loads((folder / "transfuse_generation.json").read_text())
    own = {"name": "ddim", "steps": 10, "eta": 0.5, "first": 700}
    (folder / "transfuse_generation.json").write_text(json.dumps({**settings, "sampler": own}))
    pipe = transfuse.load(str(folder))
    assert pipe.request(["a"]).sampler == SamplerConfig(**own)
    assert pipe.request(["a"], steps=20).sampler == SamplerConfig("ddim", 20, 0.5, 700)
    assert pipe.request(["a"], steps=800).sampler == SamplerConfig("ddim", 800, 0.5, 800)
    assert pipe.request(["a"], sampler="ddim").sampler == SamplerConfig(**own)
    assert pipe.request(["a"], sampler="dpmpp").sampler == SamplerConfig("dpmpp", 10)


def test_an_export_that_does_not_say_its_image_size(served: Path, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    shutil.copytree(served, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["image_size"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.json: image_size: Input should be a valid integer"):
        transfuse.load(str(folder))


# --- settings in a PNG ---


def test_settings_are_read_back(pipe: TransfusionPipeline, tmp_path: Path) -> None:
    asked = replace(pipe.request(["a \u2603 crab"], 4, 2.0), seed=9, guidance_interval=(0.2, 0.9))
    asked = replace(asked, start=Start(source(), 0.5, HALF))
    path, settings = tmp_path / "a.png", settings_of(asked, pipe.exported)
    save_png(picture(), path, settings)
    assert (np.asarray(PIL.Image.open(path)) == np.asarray(picture())).all()
    assert read_settings(path) == json.loads(json.dumps(settings))
    found = read_settings(path)
    assert found["prompt"] == "a \u2603 crab"
    expected = {"seed": 9, "steps": 4, "guidance_scale": 2.0, "strength": 0.5, "masked": True, "model": "unsaved"}
    assert expected.items() <= found.items()
    assert found["guidance_interval"] == [0.2, 0.9]
    picture().save(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no picture")
    for name in ("none.png", "text.png", "missing.png"):
        with pytest.raises(UserError, match=f"{name}: expected a PNG with the settings it was drawn with"):
            read_settings(tmp_path / name)
