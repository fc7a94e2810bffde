"""Small models of both kinds, packed and not, and requests to run on them."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache

import torch
from conftest import exported, latent, randomised, tiny
from torch import Tensor

from transfuse.autoencoders import AutoencoderConfig, ImageAutoencoder, VQTokenizer
from transfuse.diffusion import DiffusionConfig, Process, SamplerConfig
from transfuse.export import Exported, GenerationConfig
from transfuse.inference import Engine, Event, Request, Start
from transfuse.inference.optimize import pack
from transfuse.model import ModelConfig
from transfuse.sequence import Document, Image, Text, Tokenizer

CODEBOOK = 24
STABLE = {"qk_norm": True, "norm_order": "swin"}
PROMPT = Document([Text((10, 11, 12))], closed=False)


def codes(rows: int, columns: int, seed: int = 0, size: int = CODEBOOK) -> Tensor:
    return torch.randint(size, (rows, columns), generator=torch.Generator().manual_seed(seed))


def chameleon(**changes: object) -> ModelConfig:
    own = {"images": "codes", "codebook_size": CODEBOOK, "patch_size": 1, "image_attention": "causal"}
    return tiny(**{**own, "unet_channels": None, "patch_positions": "none", **changes})


@cache
def small_vq() -> VQTokenizer:
    """Two pixels a code."""
    config = AutoencoderConfig(
        "vq", widths=(8, 16), blocks=1, groups=4, latent_channels=4, codebook_size=CODEBOOK, code_channels=4
    )
    return VQTokenizer(ImageAutoencoder(config).initialise(0).eval().requires_grad_(False))


def coded(tokenizer: Tokenizer, **changes: object) -> Exported:
    """A Chameleon with random weights, large ones: what it draws depends on all that it reads."""
    model = randomised(chameleon(**changes)).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(3)
    return Exported(model, Process(DiffusionConfig()), small_vq(), tokenizer, 8, GenerationConfig())


def asking(document: Document = PROMPT, **changes: object) -> Request:
    """A greedy picture of 4 x 4 codes and no more."""
    base = Request(document, draw="force", max_tokens=0, size=(8, 8), code_temperature=0.0, seed=5)
    return replace(base, **changes)  # type: ignore[arg-type]


def packed(one: Exported) -> Exported:
    """Row-invariant, and one that draws now and then."""
    with torch.no_grad():
        one.model.lm_head.weight[one.tokenizer.boi] *= 3
    pack(one.model)
    return one


ARMS = {
    "linear": lambda tokenizer: packed(exported(tokenizer)),
    "unet": lambda tokenizer: packed(exported(tokenizer, adapter="unet")),
    "causal": lambda tokenizer: packed(exported(tokenizer, image_attention="causal", n_kv_heads=2)),
    "newer": lambda tokenizer: packed(exported(tokenizer, positions="2d", timestep="adaln")),
    "codes": lambda tokenizer: packed(coded(tokenizer)),
    "windows": lambda tokenizer: packed(exported(tokenizer, sliding_window=9, tie_embeddings=True)),
    "experts": lambda tokenizer: packed(exported(tokenizer, experts="all")),
    "experts codes": lambda tokenizer: packed(coded(tokenizer, experts="all")),
    "stable codes": lambda tokenizer: packed(coded(tokenizer, n_kv_heads=2, **STABLE)),
}


POSITIONS = 256


def some_request(draws: random.Random, is_coded: bool) -> Request:
    """Prompts of any shape; sizes, steps, samplers and ways of guidance of every kind."""
    size = draws.choice([(8, 8), (4, 8), (8, 4), (4, 4), (12, 8)])
    parts: list[Text | Image] = []
    for _ in range(draws.randrange(4)):
        if draws.random() < 0.35:
            rows, columns = draws.choice([(4, 4), (2, 2), (4, 6)])
            seed = draws.randrange(99)
            parts.append(Image(codes(rows, columns, seed) if is_coded else latent(rows, columns, seed), target=False))
        else:
            parts.append(Text(tuple(draws.randrange(4, 300) for _ in range(draws.choice([1, 2, 3, 5, 17, 40])))))
    asked = Request(
        Document(parts, closed=False),
        draw=draws.choice(["auto", "force", "force", "never"]),
        max_tokens=draws.choice([0, 1, 5, 12]),
        max_images=draws.choice([1, 1, 2]),
        size=size,
        guidance_scale=draws.choice([0.0, 1.0, 2.0, 7.5]),
        image_guidance_scale=draws.choice([None, None, 1.0, 1.5]),
        temperature=draws.choice([0.0, 1.0, 2.5]),
        top_p=draws.choice([1.0, 0.8]),
        seed=draws.randrange(1000),
    )
    if is_coded:
        return replace(asked, code_temperature=draws.choice([0.0, 1.0]), code_top_p=draws.choice([1.0, 0.7]))
    name = draws.choice(["ddim", "ddpm", "dpmpp"])
    eta = draws.choice([0.0, 0.5]) if name == "ddim" else 0.0
    start = None
    if draws.random() < 0.3:
        mask = torch.zeros(size, dtype=torch.bool) if draws.random() < 0.5 else None
        if mask is not None:
            mask[: size[0] // 2] = True
        start = Start(latent(*size, seed=draws.randrange(99)), draws.choice([0.0, 0.4, 1.0]), mask)
    return replace(
        asked,
        sampler=SamplerConfig(name, draws.choice([1, 2, 4]), eta),  # type: ignore[arg-type]
        guidance_interval=draws.choice([None, None, (0.3, 0.8), (0.9, 0.95)]),
        start=start,
        preview_every=draws.choice([0, 1, 2]),
    )


def exactly(event: Event) -> list[object]:
    """As `told`, with the bits of every tensor."""
    plain = [value.numpy().tobytes() if isinstance(value, torch.Tensor) else value for value in vars(event).values()]
    return [type(event).__name__, *plain[1:]]


def alone(one: Exported, request: Request) -> list[list[object]]:
    return [exactly(event) for event in Engine(one).run([request])]


def finish(engine: Engine) -> list[Event]:
    events = []
    while engine.busy:
        events += engine.step()
    return events


def plain(document: Document | None = None, **changes: object) -> Request:
    """Eight by eight pixels in three steps."""
    base = Request(
        document or Document([Text((10, 11, 12))], closed=False),
        draw="force",
        max_tokens=0,
        size=(8, 8),
        sampler=SamplerConfig("ddim", 3),
        seed=5,
    )
    return replace(base, **changes)  # type: ignore[arg-type]
