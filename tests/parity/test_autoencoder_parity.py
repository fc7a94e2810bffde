"""Our trunk against diffusers' `AutoencoderKL` and `VQModel`: same folders, same latents, same images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from transfuse.autoencoders import ImageAutoencoder, load_autoencoder, save_autoencoder
from transfuse.evaluation.reconstruction import psnr
from transfuse.inspect_autoencoder import inspect_autoencoder

diffusers = pytest.importorskip("diffusers")

PLAIN = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 2,
}
ATTENDED = {
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
}
KL = {
    "stable diffusion": {**PLAIN, "latent_channels": 4, "scaling_factor": 0.18215},
    "flux": {
        **PLAIN,
        "latent_channels": 16,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "attended": {**ATTENDED, "latent_channels": 4, "mid_block_add_attention": False},
    "statistics": {**ATTENDED, "latent_channels": 2, "latents_mean": (0.1, -2.0), "latents_std": (3.0, 0.5)},
}
VQ = {
    "taming": {**ATTENDED, "latent_channels": 6, "num_vq_embeddings": 64, "vq_embed_dim": 5},
    "plain": {**PLAIN, "latent_channels": 3, "num_vq_embeddings": 16},
}


def randomised(network):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return network.eval().requires_grad_(False)


def pictures() -> tuple[np.ndarray, torch.Tensor]:
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3), dtype=np.uint8)
    return images, torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1


def same_weights(a, b) -> bool:
    return all((x == y).all() for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", KL)
def test_kl(name: str, tmp_path: Path) -> None:
    theirs = randomised(diffusers.AutoencoderKL(**KL[name]))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_autoencoder(tmp_path / "theirs")
    assert isinstance(ours, ImageAutoencoder)
    images, x = pictures()
    mean = theirs.encode(x).latent_dist.mean
    config = theirs.config
    if config.latents_mean is None:
        normalised = (mean - (config.shift_factor or 0)) * config.scaling_factor
    else:
        shift, scale = (torch.tensor(values).view(-1, 1, 1) for values in (config.latents_mean, config.latents_std))
        normalised = (mean - shift) / scale * config.scaling_factor
    torch.testing.assert_close(ours.encode(images), normalised, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.reconstruct(mean), theirs.decode(mean).sample, atol=1e-4, rtol=1e-4)
    made = theirs.decode(mean).sample.permute(0, 2, 3, 1).add(1).mul(127.5).clamp(0, 255).numpy()
    assert np.abs(ours.decode(normalised) - made).max() <= 0.51
    posterior = theirs.encode(x).latent_dist
    assert ours.bottleneck(ours.moments(x)).kl == pytest.approx(posterior.kl(), rel=1e-4)
    save_autoencoder(tmp_path / "ours", ours, name)
    back = diffusers.AutoencoderKL.from_pretrained(tmp_path / "ours")
    assert same_weights(theirs, back)
    kept = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "block_out_channels", "latent_channels")
    for field in kept:
        a, b = back.config[field], theirs.config[field]
        assert (list(a) if isinstance(a, tuple | list) else a) == (list(b) if isinstance(b, tuple | list) else b), field


@pytest.mark.parametrize("name", VQ)
def test_vq(name: str, tmp_path: Path) -> None:
    theirs = randomised(diffusers.VQModel(**VQ[name]))
    theirs.quantize.embedding.weight.normal_(generator=torch.Generator().manual_seed(1))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_autoencoder(tmp_path / "theirs")
    assert isinstance(ours, ImageAutoencoder)
    images, x = pictures()
    latents = theirs.encode(x).latents
    torch.testing.assert_close(ours.encode(images), latents * theirs.config.scaling_factor, atol=1e-4, rtol=1e-4)
    quantised, _, (_, _, codes) = theirs.quantize(latents)
    assert (ours.codes(images).flatten() == codes.flatten()).all()
    torch.testing.assert_close(ours.bottleneck(latents).z, quantised)
    made = theirs.decode(latents).sample.permute(0, 2, 3, 1).add(1).mul(127.5).clamp(0, 255).numpy()
    for again in (ours.decode(ours.encode(images)), ours.decode_codes(ours.codes(images))):
        assert np.abs(again - made).max() <= 0.51
    save_autoencoder(tmp_path / "ours", ours, name)
    assert same_weights(theirs, diffusers.VQModel.from_pretrained(tmp_path / "ours"))


def test_attention_of_old_files(tmp_path: Path) -> None:
    """Stable Diffusion's own files call attention's maps query, key, value and proj_attn."""
    from safetensors.torch import load_file, save_file

    theirs = randomised(diffusers.AutoencoderKL(**KL["stable diffusion"]))
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in load_file(path).items():
        for present, old in former.items():
            name = name.replace(f".{present}.", f".{old}.")
        tensors[name] = tensor
    assert any("proj_attn" in name for name in tensors)
    save_file(tensors, path)
    images, x = pictures()
    ours = load_autoencoder(tmp_path)
    torch.testing.assert_close(ours.encode(images), theirs.encode(x).latent_dist.mean * 0.18215, atol=1e-4, rtol=1e-4)


def test_channels_of_a_diffusers_folder_are_weighed(tmp_path: Path) -> None:
    """Latents that are not normalised by channel: each is replaced by its own mean; 2 is not read by the decoder."""
    theirs = randomised(diffusers.AutoencoderKL(**KL["stable diffusion"], norm_num_groups=8))
    theirs.post_quant_conv.weight[:, 2] = 0
    theirs.save_pretrained(tmp_path / "vae")
    images, x = pictures()
    report = inspect_autoencoder(load_autoencoder(tmp_path / "vae"), images, ["a", "b"], tmp_path / "out")
    assert len(report["channel_loss"]) == 4
    assert report["channel_loss"][2]["db_lost"] == 0
    assert "channel 2 carries nothing: without it PSNR falls by 0.00 dB, less than 0.1" in report["empty_channels"]
    mean = theirs.encode(x).latent_dist.mean
    decibels = []
    for z in (mean, mean.index_copy(1, torch.tensor([1]), mean[:, 1:2].mean().expand(2, 1, *mean.shape[2:]))):
        again = ((theirs.decode(z).sample.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        decibels.append(psnr(images, again).mean())
    assert report["channel_loss"][1]["by_mean"] == pytest.approx(decibels[0] - decibels[1], abs=2e-3)
