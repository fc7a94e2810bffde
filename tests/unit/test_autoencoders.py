from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from transfuse.autoencoders import (
    AutoencoderConfig,
    ImageAutoencoder,
    Pixels,
    load_autoencoder,
    open_autoencoder,
    save_autoencoder,
)
from transfuse.errors import UserError
from transfuse.recipes import AUTOENCODERS, AutoencoderRecipe, preset
from transfuse.train_autoencoder import resolve_autoencoder

SMALL = AutoencoderConfig(widths=(8, 16), blocks=1, latent_channels=4, groups=4, codebook_size=32, code_channels=4)
WEIGHTS = "diffusion_pytorch_model.safetensors"


def small(kind: str = "kl", **fields) -> ImageAutoencoder:
    return ImageAutoencoder(replace(SMALL, kind=kind, **fields)).initialise(0).eval()


def images(count: int = 3, size: int = 16) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_the_paper_size(kind: str) -> None:
    """Appendix A: 86M parameters, 256 x 256 pixels to 32 x 32 x 8."""
    config = preset(f"{kind}-f8", AutoencoderRecipe).model
    with torch.device("meta"):
        count = sum(p.numel() for p in ImageAutoencoder(config).parameters())
    assert count == pytest.approx(86e6, rel=0.05)
    assert (config.factor, config.bottleneck_channels, config.codebook_size) == (8, 8, 16_384)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_batched_is_single(kind: str) -> None:
    autoencoder, pictures = small(kind), images(5)
    parts_of_two = ImageAutoencoder(autoencoder.config, max_pixels=2 * 16 * 16).initialise(0).eval()
    whole = autoencoder.encode(pictures)
    assert whole.shape == (5, 4, 8, 8)
    assert whole.dtype == torch.float32
    torch.testing.assert_close(parts_of_two.encode(pictures), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(autoencoder.encode(pictures[3:4]), whole[3:4], atol=1e-5, rtol=1e-5)
    again = autoencoder.decode(whole)
    assert again.shape == pictures.shape
    for decoded in (parts_of_two.decode(whole)[3], autoencoder.decode(whole[3:4])[0]):
        assert np.abs(decoded.astype(int) - again[3]).max() <= 1


def test_kl_is_the_divergence() -> None:
    mean, log_variance = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    found = small().bottleneck(torch.cat([mean, log_variance], 1)).kl
    standard = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    normal = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    expected = torch.distributions.kl_divergence(normal, standard).flatten(1).sum(1)
    torch.testing.assert_close(found, expected)
    nothing = torch.zeros(1, 8, 2, 2, requires_grad=True)
    kl = small().bottleneck(nothing).kl
    assert kl.sum().item() == 0
    kl.sum().backward()
    assert not nothing.grad.any()


def test_the_sample_has_the_spread_it_says() -> None:
    h = torch.cat([torch.full((1, 4, 100, 100), 2.0), torch.full((1, 4, 100, 100), -2.0)], 1)
    z = small().bottleneck(h, torch.randn(1, 4, 100, 100, generator=torch.Generator().manual_seed(0))).z
    assert float(z.mean()) == pytest.approx(2, abs=0.01)
    assert float(z.std()) == pytest.approx(np.exp(-1), rel=0.02)


def test_the_nearest_code_is_nearest() -> None:
    autoencoder = small("vq")
    h = torch.randn(2, 4, 3, 5)
    codes = autoencoder.quantize.embedding.weight
    flat = h.movedim(1, -1).reshape(-1, 1, 4)
    expected = (flat - codes).square().sum(-1).argmin(-1).view(2, 3, 5)
    assert (autoencoder.quantize.nearest(h) == expected).all()
    bottled = autoencoder.bottleneck(h)
    assert (bottled.codes == expected).all()
    torch.testing.assert_close(bottled.z, codes[expected].movedim(-1, 1))


def test_who_learns_from_the_codebook_losses() -> None:
    autoencoder = small("vq")
    h = torch.randn(2, 4, 3, 5, requires_grad=True)
    bottled = autoencoder.bottleneck(h)
    weight = autoencoder.quantize.embedding.weight
    ones = torch.ones_like(h)
    (through,) = torch.autograd.grad(bottled.z, h, ones, retain_graph=True)
    torch.testing.assert_close(through, ones)  # straight through
    a = torch.autograd.grad(bottled.codebook.sum(), (h, weight), retain_graph=True, allow_unused=True)
    b = torch.autograd.grad(bottled.commitment.sum(), (h, weight), retain_graph=True, allow_unused=True)
    assert a[0] is None
    assert a[1].abs().sum() > 0
    assert b[0].abs().sum() > 0
    assert b[1] is None
    on_codes = weight[torch.arange(15).view(1, 3, 5)].movedim(-1, 1).detach()
    assert float(autoencoder.bottleneck(on_codes).codebook.abs().sum()) == 0


def test_statistics_normalise() -> None:
    autoencoder, pictures = small(), images(8)
    raw = autoencoder.encode(pictures)
    autoencoder.with_statistics(raw.mean((0, 2, 3)), raw.std((0, 2, 3)))
    latents = autoencoder.encode(pictures)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(autoencoder.denormalise(latents), raw)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_folder_round_trip(kind: str, tmp_path: Path) -> None:
    autoencoder = small(kind).with_statistics(torch.arange(4.0), torch.arange(1.0, 5.0))
    save_autoencoder(tmp_path / "a", autoencoder, "mine")
    again = load_autoencoder(tmp_path / "a")
    assert isinstance(again, ImageAutoencoder)
    assert (again.name, len(again.fingerprint)) == ("mine", 12)
    assert replace(again.config, codebook_size=32) == autoencoder.config  # a KL says nothing of codes
    assert (again.encode(images()) == autoencoder.encode(images())).all()
    for number in range(4):  # the order of a file's header is arbitrary
        save_autoencoder(tmp_path / str(number), again, "mine")
        assert load_autoencoder(tmp_path / str(number)).fingerprint == again.fingerprint
    save_autoencoder(tmp_path / "half", again, "mine", dtype=torch.float16)
    assert load_autoencoder(tmp_path / "half").fingerprint != again.fingerprint
    assert open_autoencoder("pixels") == Pixels()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("variant", ["", ".fp16", ".non_ema"])
@pytest.mark.parametrize("place", [".", "vae", "autoencoder"])
def test_variants_dtypes_and_models_with_an_autoencoder(
    dtype: torch.dtype, variant: str, place: str, tmp_path: Path
) -> None:
    """The same network as its weights of that dtype, wherever they are and whatever their name."""
    autoencoder, folder = small(), tmp_path / "model" / place
    save_autoencoder(folder, autoencoder, "mine", dtype=dtype)
    (folder / WEIGHTS).rename(folder / WEIGHTS.replace(".", f"{variant}.", 1))
    if place == "vae":
        (tmp_path / "model" / "model_index.json").write_text(json.dumps({"vae": ["diffusers", "AutoencoderKL"]}))
    if place == "autoencoder":
        (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "transfusion"}))
    opened = open_autoencoder(str(tmp_path / "model"))
    assert isinstance(opened, ImageAutoencoder)
    for name, weights in autoencoder.state_dict().items():
        assert torch.equal(opened.state_dict()[name], weights.to(dtype).float()), name


def test_of_several_variants_the_most_exact_is_read(tmp_path: Path) -> None:
    autoencoder = small()
    save_autoencoder(tmp_path, autoencoder, "mine")
    for variant in ("fp16", "bf16", "fp32"):
        half = {name: value.half() for name, value in autoencoder.state_dict().items()}
        kept = autoencoder.state_dict() if variant == "fp32" else half
        save_file(kept, tmp_path / f"diffusion_pytorch_model.{variant}.safetensors")
    expected = load_autoencoder(tmp_path).fingerprint
    (tmp_path / WEIGHTS).unlink()
    assert load_autoencoder(tmp_path).fingerprint == expected, "fp32 goes before bf16 and fp16"
    (tmp_path / "diffusion_pytorch_model.fp32.safetensors").unlink()
    assert load_autoencoder(tmp_path).fingerprint != expected


def broken(folder: Path, what: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / WEIGHTS)
    match what:
        case "class":
            config["_class_name"] = "AutoencoderDC"
        case "channels":
            config["in_channels"] = 4
        case "attention":
            config["down_block_types"][1] = "AttnDownEncoderBlock2D"
        case "groups":
            config["norm_num_groups"] = 3
        case "tensor":
            tensors["decoder.conv_in.weight"] = torch.zeros(1, 2, 3, 3)
        case "missing":
            del tensors["encoder.conv_out.bias"]
        case "pickle":
            (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")
        case "garbage":
            (folder / WEIGHTS).write_bytes(b"not a tensor")
    (folder / "config.json").write_text(json.dumps(config))
    if what in ("tensor", "missing"):
        save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("class", "_class_name: expected AutoencoderKL or VQModel, found 'AutoencoderDC'"),
        ("channels", "in_channels: expected 3, found 4"),
        ("attention", "up_block_types: expected attention at the levels of down_block_types"),
        ("groups", r"widths: expected multiples of groups \(3\), found \(8, 16\)"),
        ("tensor", r"tensor decoder.conv_in.weight: expected \(16, 4, 3, 3\), found \(1, 2, 3, 3\)"),
        ("missing", r"tensor encoder.conv_out.bias: expected \(8,\), found none"),
        ("pickle", "expected safetensors weights, found only a pickled .bin"),
        ("garbage", "expected a safetensors file"),
    ],
)
def test_what_can_not_be_loaded_is_named(what: str, message: str, tmp_path: Path) -> None:
    save_autoencoder(tmp_path, small(), "mine")
    broken(tmp_path, what)
    with pytest.raises(UserError, match=message):
        load_autoencoder(tmp_path)


def test_bad_images_and_fields() -> None:
    autoencoder = small()
    with pytest.raises(ValueError, match="expected uint8"):
        autoencoder.encode(images().astype(np.float32))
    with pytest.raises(ValueError, match="multiples of 2"):
        autoencoder.encode(images(size=15))
    with pytest.raises(ValueError, match="expected uint8"):
        autoencoder.encode(images()[:0])
    with pytest.raises(ValueError, match="expected a codebook"):
        autoencoder.codes(images())
    for fields, message in (
        ({"blocks": 0}, "blocks: expected at least 1"),
        ({"attended": (2,)}, "attended: expected resolutions 0 to 1"),
        ({"latents_mean": (0.0,) * 4}, "latents_mean: expected together"),
        ({"latents_mean": (0.0,), "latents_std": (1.0,)}, "latents_mean: expected 4 numbers, found 1"),
        ({"latents_mean": (0.0,) * 4, "latents_std": (0.0,) * 4}, "latents_std: expected positive"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(SMALL, **fields)


def test_presets_build() -> None:
    for name in AUTOENCODERS:
        recipe = preset(name, AutoencoderRecipe)
        assert recipe.preset == name
        assert resolve_autoencoder(recipe, here=False).recipe == recipe
    with pytest.raises(UserError, match='did you mean "kl-f4-small"'):
        preset("kl-f4-smal", AutoencoderRecipe)
