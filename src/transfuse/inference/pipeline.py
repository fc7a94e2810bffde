"""The pipeline: the engine for people. Drawing works as in diffusers:

pipe = transfuse.load("runs/demo/export")
pipe("a crab on a blue background", num_inference_steps=25, guidance_scale=3.0).images[0]
pipe.caption(picture)
pipe.generate("a story about a crab")        # text and images, in whatever order the model chooses
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from ..diffusion import SamplerConfig
from ..errors import UserError
from ..export import Exported, load_export
from ..model import pack
from ..sequence import Document, Image, Text
from .engine import Engine
from .events import Done, Event, ImageEnd, Request, TextDelta

Prompt = str | Sequence["str | PIL.Image.Image"]


@dataclass
class ImagesOutput:
    """As diffusers' pipelines return it; `seeds` has the seed of each image."""

    images: list[Any]
    seeds: list[int]


@dataclass
class Reply:
    """What a row produced: texts and pictures in order, why it ended, and the count of what it took."""

    parts: list[str | PIL.Image.Image]
    done: Done

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> list[PIL.Image.Image]:
        return [part for part in self.parts if not isinstance(part, str)]


class TransfusionPipeline:
    """A loaded model with methods to draw, caption and write. Batches freely; each result equals that of it alone."""

    def __init__(self, exported: Exported) -> None:
        self.exported = exported
        self.engine = Engine(exported)

    @classmethod
    def from_pretrained(
        cls, path: Path | str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> TransfusionPipeline:
        exported = load_export(path, dtype, device)
        pack(exported.model)
        return cls(exported)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | int | None = None,
        sampler: str | None = None,
        output_type: str = "pil",
    ) -> ImagesOutput:
        """Draw a picture for each prompt. output_type: "pil", "np" (uint8 `[row, column, 3]`) or "latent"."""
        if output_type not in ("pil", "np", "latent"):
            raise UserError(f'output_type: expected "pil", "np" or "latent", found {output_type!r}')
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        prompts = [text for text in prompts for _ in range(num_images_per_prompt)]
        size = (height or self.exported.image_size, width or self.exported.image_size)
        seeds = _seeds(generator, len(prompts))
        requests = [
            replace(
                self.request([text], num_inference_steps, guidance_scale, sampler), draw="force", size=size, seed=seed
            )
            for text, seed in zip(prompts, seeds, strict=True)
        ]
        requests = [replace(request, max_tokens=0) for request in requests]
        found = {event.row: event.latent for event in self.engine.run(requests) if isinstance(event, ImageEnd)}
        latents = [found[row] for row in range(len(requests))]
        if output_type == "latent":
            return ImagesOutput(latents, seeds)
        arrays = [self.exported.autoencoder.decode(latent[None])[0] for latent in latents]
        return ImagesOutput([PIL.Image.fromarray(a) for a in arrays] if output_type == "pil" else arrays, seeds)

    def caption(self, images: PIL.Image.Image | Sequence[PIL.Image.Image], max_tokens: int = 64) -> list[str]:
        """Describe pictures, greedily; each must have the size the model was trained on."""
        pictures = [images] if isinstance(images, PIL.Image.Image) else list(images)
        requests = [replace(self.request([picture]), draw="never", max_tokens=max_tokens) for picture in pictures]
        return [reply.text.strip() for reply in self.replies(requests)]

    def generate(
        self, prompt: Prompt, *, seed: int = 0, draw: str = "auto", max_tokens: int | None = None, **settings: Any
    ) -> Reply:
        """Go on from a prompt of text and pictures; settings are fields of `Request`."""
        request = replace(
            self.request([prompt] if isinstance(prompt, str) else prompt), seed=seed, draw=draw, **settings
        )
        if max_tokens is not None:
            request = replace(request, max_tokens=max_tokens)
        return self.replies([request])[0]

    def request(
        self,
        parts: Sequence[str | PIL.Image.Image],
        steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: str | None = None,
    ) -> Request:
        """A request from texts and pictures with the model's own defaults. Raises UserError for a bad setting."""
        defaults = self.exported.generation
        if self.exported.model.config.images != "latents" and (steps is not None or sampler is not None):
            raise UserError("steps, sampler: expected none, for the model does not denoise, found some")
        try:
            chosen = SamplerConfig(
                name=sampler or defaults.sampler.name,  # type: ignore[arg-type]
                steps=steps if steps is not None else defaults.sampler.steps,
            )
        except ValueError as error:
            raise UserError(f"sampler: {error}") from None
        if chosen.steps > self.exported.process.config.timesteps:
            raise UserError(f"steps: expected at most {self.exported.process.config.timesteps}, found {chosen.steps}")
        return Request(
            Document([self._part(part) for part in parts], closed=False),
            max_tokens=defaults.max_tokens,
            size=(self.exported.image_size, self.exported.image_size),
            sampler=chosen,
            guidance_scale=defaults.guidance_scale if guidance_scale is None else guidance_scale,
            temperature=defaults.temperature,
            top_p=defaults.top_p,
            code_temperature=defaults.code_temperature,
            code_top_p=defaults.code_top_p,
        )

    def replies(self, requests: Sequence[Request]) -> list[Reply]:
        """Run requests together and gather each row's parts."""
        parts: list[list[str | PIL.Image.Image]] = [[] for _ in requests]
        done: dict[int, Done] = {}
        for event in self.engine.run(requests):
            match event:
                case TextDelta(row, text):
                    if parts[row] and isinstance(parts[row][-1], str):
                        parts[row][-1] += text  # type: ignore[operator]
                    else:
                        parts[row].append(text)
                case ImageEnd(row, _, latent):
                    parts[row].append(self.picture(latent))
                case Done(row):
                    done[row] = event
        return [Reply(those, done[row]) for row, those in enumerate(parts)]

    def stream(self, request: Request) -> Iterator[Event]:
        """Events of one request as they happen."""
        return self.engine.run([request])

    def picture(self, latent: Tensor) -> PIL.Image.Image:
        return PIL.Image.fromarray(self.exported.autoencoder.decode(latent[None])[0])

    def _part(self, part: str | PIL.Image.Image) -> Text | Image:
        if isinstance(part, str):
            return Text(self.exported.tokenizer.encode(part))
        side = self.exported.image_size
        if part.size != (side, side):
            raise UserError(f"image: expected {side}x{side} pixels, found {part.size[0]}x{part.size[1]}")
        pixels = np.asarray(part.convert("RGB"))
        return Image(self.exported.autoencoder.encode(pixels[None].copy())[0], target=False)


def _seeds(generator: torch.Generator | int | None, count: int) -> list[int]:
    """One seed per image: counted up from a number, or drawn from a generator (a new one: not reproducible)."""
    if isinstance(generator, int):
        return [generator + number for number in range(count)]
    return torch.randint(2**31, (count,), generator=generator).tolist()
