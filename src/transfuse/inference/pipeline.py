"""The pipeline: the engine for people. Drawing works as in diffusers:

pipe = transfuse.load("runs/demo/export")
pipe("a crab on a blue background", num_inference_steps=25, guidance_scale=3.0).images[0]
pipe("a crab", image=picture, strength=0.6).images[0]      # a variation; with mask_image only where that says
pipe("a crab left of a star", candidates=4).images[0]      # the one of four that best tells its prompt
pipe.edit(picture, "make the background red")
pipe.caption(picture)
pipe.generate("a story about a crab")        # text and images, in whatever order the model chooses
"""

from __future__ import annotations

import html
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from ..devices import as_device, as_dtype
from ..diffusion import Sampler, SamplerConfig
from ..errors import UserError, shown
from ..export import Exported, load_export, out_of_range
from ..images import ImageSource, decode_image, html_image, read_mask
from ..log import logger
from ..sequence import Document, Image, Part, Text
from ..sequence.chat import Message
from ..vocabulary import PromptReading
from .arguments import (
    DrawOptions,
    ImageSources,
    ReplySettings,
    StepEnd,
    check_options,
    each_image,
    read_images,
    read_prompts,
    read_seeds,
)
from .engine import Engine
from .events import Done, Event, ImageEnd, ImageProgress, TextDelta
from .model_runner import GUIDANCE, Guidance, ModelRunner
from .optimize import Quantize, check_quantize, compile_blocks, pack, quantize_blocks
from .scoring import score
from .sequence_state import Request, Start, with_image_guidance
from .settings import latent_mask

PromptPart = str | Part | Path | bytes | PIL.Image.Image | np.ndarray
"""Text, a part of a document, or an image as `images.decode_image` takes it; a str is text, a `Path` an image file."""
Prompt = str | Sequence[PromptPart]

CANDIDATE = 1_000_003  # the difference between the seeds of two candidates


@dataclass
class ImagesOutput:
    """The output of diffusers' pipelines, with the seed of each image."""

    images: list[Any]
    seeds: list[int]

    def _repr_html_(self) -> str | None:
        """Return PIL images side by side, for notebooks; None for arrays and tensors."""
        shown = [image for image in self.images if isinstance(image, PIL.Image.Image)]
        grid = '<div style="display:flex; flex-wrap:wrap; gap:4px">'  # notebooks show images as blocks, one a line
        return f"{grid}{''.join(map(html_image, shown))}</div>" if shown else None


@dataclass
class Reply:
    """A complete reply: its texts and images in order, and the event that ended it."""

    parts: list[str | PIL.Image.Image]
    done: Done
    seed: int = 0

    def _repr_html_(self) -> str:
        """Return words and images in order, for notebooks."""
        return "".join(html.escape(part) if isinstance(part, str) else html_image(part) for part in self.parts)

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> list[PIL.Image.Image]:
        return [part for part in self.parts if not isinstance(part, str)]


class TransfusionPipeline:
    """A loaded model with methods to draw, caption and write. Batches freely; each result equals that of it alone."""

    def __init__(self, exported: Exported, graphs: bool = True) -> None:
        self.exported = exported
        self.engine = Engine(ModelRunner(exported, graphs))
        self._interrupt = False  # diffusers' name: a callback_on_step_end sets it to end a drawing early

    @classmethod
    def from_pretrained(
        cls,
        path: Path | str,
        dtype: torch.dtype | str = torch.float32,
        device: torch.device | str = "cpu",
        quantize: Quantize | None = None,
        compile: bool = False,
        graphs: bool = True,
    ) -> TransfusionPipeline:
        """Load an export and prepare it for inference.

        quantize   keep the blocks' weights in eight bits (`quantize_blocks`)
        compile    compile the blocks at the first pass or `warm_up` (`compile_blocks`)
        graphs     record repeated passes on CUDA (`cuda_graphs`), except with eight bits, where it is not tested
        """
        dtype, device = as_dtype(dtype), as_device(device)
        torchao = None if quantize is None else check_quantize(quantize, torch.device(device))
        exported = load_export(path, dtype, device)
        exported.quantize, exported.compiled = quantize, compile
        if quantize is not None:
            quantize_blocks(exported.model, quantize, torchao)
        if compile:
            compile_blocks(exported.model)  # which does not know oneDNN's packed weights
        else:
            pack(exported.model)
        return cls(exported, graphs and quantize is None)

    def warm_up(self, rows: int = 1, guidance: Guidance | None = None, rounds: int = 3) -> dict[str, float]:
        """Take every path once, and keep the faster way of guidance for `rows` images together, or the one given.

            packed       the branches of all images in one pass: it reads the weights once for all
            sequential   one pass per branch: smaller ones, which a cache may hold better

        Results do not depend on the way. Returns the median seconds of each over `rounds`; none if nothing was timed:
        a way was given, the model does not denoise, or it is not guided.
        """
        runner, images, request = self.engine.runner, self.exported.model.config.images, self.request(["a"])
        draw = "never" if images == "none" else "force"
        request = replace(request, draw=draw, max_tokens=2, guidance_interval=None)
        if images == "latents":
            request = replace(request, sampler=replace(request.sampler, steps=min(4, request.sampler.steps)))

        engine = Engine(runner)  # whose cache is given back at the end

        def seconds() -> float:
            began = time.perf_counter()
            for _ in engine.run([replace(request, seed=seed) for seed in range(rows)]):
                pass
            return time.perf_counter() - began

        seconds()
        medians: dict[str, float] = {}
        if guidance is not None:
            runner.guidance = guidance
        elif images == "latents" and request.guidance_scale != 1:
            times: dict[Guidance, list[float]] = {way: [] for way in GUIDANCE}
            for _ in range(rounds):
                for way in GUIDANCE:
                    runner.guidance = way
                    times[way].append(seconds())
            medians = {way: statistics.median(times[way]) for way in GUIDANCE}
            runner.guidance = min(GUIDANCE, key=lambda way: medians[way])
        return medians

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        image: ImageSources | None = None,
        strength: float | None = None,
        mask_image: ImageSource | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        num_images_per_prompt: int = 1,
        candidates: int = 1,
        generator: torch.Generator | int | Sequence[torch.Generator | int] | None = None,
        sampler: str | None = None,
        eta: float | None = None,
        callback_on_step_end: StepEnd | None = None,
        output_type: str = "pil",
        strict: bool = False,
    ) -> ImagesOutput:
        """Draw an image for each prompt, away from the negative prompt (one for all, or one for each) if there is one.

        output_type: "pil", "np" (uint8 `[row, column, 3]`), "pt" (float32 `[3, row, column]`, 0 to 1) or "latent".
        generator: a seed, which counts up from image to image, a generator, or a list with one of either for each.

        image: one for all prompts, or one for each, as `read_images` takes them: outputs of a pipeline among them.
        With `image` alone prompts are instructions to change it, and it stands before them in the sequence, clean. With
        `strength` or `mask_image` prompts describe the result, and drawing begins from the image (`Start`). The mask
        selects what is redrawn: its transparent area, or the white one of an opaque mask (`images.read_mask`);
        elsewhere the image's latent stays.

        candidates: draw each image that many times, and keep the one after which the model itself most probably writes
        the prompt; `seeds` has its seed. callback_on_step_end(pipe, step, t, {"latents": [image, channel, row,
        column]}) is called after every denoising step, of all candidates; it cannot change the latents, but ends the
        drawing as it is by setting `_interrupt`. strict: refuse prompts with words that training never showed
        (`Vocabulary`), instead of a warning.
        """
        counts = {"num_images_per_prompt": num_images_per_prompt, "candidates": candidates, "height": height}
        numbers = {"strength": strength, "guidance_scale": guidance_scale, "image_guidance_scale": image_guidance_scale}
        check_options(output_type, counts | {"width": width}, numbers | {"eta": eta}, callback_on_step_end)
        prompts, negatives = read_prompts(prompt, negative_prompt, num_images_per_prompt)
        prompts, negatives = ([self.read_prompt(text, strict).text for text in texts] for texts in (prompts, negatives))
        images = each_image(image, len(prompts), num_images_per_prompt)
        share, side = 1.0 if strength is None else strength, self.exported.image_size
        starts: dict[int, Start] | None = None
        if strength is not None or mask_image is not None:
            if not images:
                raise UserError("image: expected one with strength or mask_image, found none")
            distinct = {id(pixels): pixels for pixels in images}
            starts = {key: self.start(pixels, share, mask_image) for key, pixels in distinct.items()}
        seeds, requests = read_seeds(generator, len(prompts)), []
        for number, (text, seed) in enumerate(zip(prompts, seeds, strict=True)):
            settings = (num_inference_steps, guidance_scale, sampler, guidance_interval, eta)
            before = images[number : number + 1] if starts is None else []
            request = self.request([*before, text], *settings)
            if negatives:
                request = replace(request, negative=self.request([*before, negatives[number]], *settings).document)
            request = with_image_guidance(request, image_guidance_scale)
            size, start = (int(height or side), int(width or side)), starts[id(images[number])] if starts else None
            if start is not None:
                size = drawn_size(images[number], height, width)
            requests.append(replace(request, draw="force", max_tokens=0, size=size, start=start, seed=seed))
        requests = repeated(requests, candidates)
        latents = self.latents(requests, callback_on_step_end)
        kept = self._best(requests, latents, candidates)
        latents, seeds = [latents[row] for row in kept], [requests[row].seed for row in kept]
        return ImagesOutput(self._as_output(latents, output_type), seeds)

    def _as_output(self, latents: list[Tensor], kind: str) -> list[Any]:
        """Decode latents to "np" (uint8 `[row, column, 3]`), "pil" or "pt" (float32 `[3, row, column]`)."""
        if kind == "latent":
            return latents
        arrays = [self.exported.autoencoder.decode(latent[None])[0] for latent in latents]
        if kind == "pt":
            return [torch.from_numpy(array).permute(2, 0, 1).float() / 255 for array in arrays]
        return [PIL.Image.fromarray(array) for array in arrays] if kind == "pil" else arrays

    def read_prompt(self, prompt: str, strict: bool = False, draw: str = "force") -> PromptReading:
        """Return a prompt in the words of the model's captions; what is changed and what is unknown is logged.

        One that the model need not draw (`draw` as in `Request`) stays as it is if it has unknown words: it may be one
        to write on. Raises UserError for unknown words if `strict`.
        """
        vocabulary = self.exported.vocabulary
        if vocabulary is None or draw == "never":
            return PromptReading(prompt)
        reading = vocabulary.read_strictly(prompt) if strict else vocabulary.read(prompt)
        if reading.unknown and draw != "force":
            return PromptReading(prompt, unknown=reading.unknown)
        if reading.changes:
            logger.info("prompt: read " + ", ".join(f'"{was}" as "{now}"' for was, now in reading.changes))
        if reading.unknown:
            logger.warning(f"prompt: {vocabulary.told(reading)}")
        return reading

    def latents(self, requests: Sequence[Request], step_end: StepEnd | None = None) -> list[Tensor]:
        """Return the last latent that each request draws; with `step_end` all must take equally many steps.

        If `step_end` sets `_interrupt`, they are those of its step, as noisy as they are.
        """
        latents: dict[int, Tensor] = {}
        self._interrupt = False
        steps: list[Tensor] = []
        for event in self.engine.run(requests):
            match event:
                case ImageEnd(row, _, latent):
                    latents[row] = latent
                case ImageProgress(latent=x) if x is not None and step_end is not None:
                    steps.append(x)
                    if len(steps) == len(requests):
                        together, steps = torch.stack(steps), []
                        returned = step_end(self, event.step - 1, event.t, {"latents": together})
                        if not isinstance(returned, dict | None):
                            expected = "callback_on_step_end: expected it to return tensors by name"
                            raise UserError(f"{expected}, found {shown(returned)}")
                        if returned and returned.get("latents", together) is not together:
                            raise ValueError("callback_on_step_end: expected the latents as they were, found others")
                        if self._interrupt:
                            return list(together)
        return [latents[row] for row in range(len(requests))]

    def edit(self, image: ImageSource, instruction: str, **options: Unpack[DrawOptions]) -> PIL.Image.Image:
        """Return the image changed as the instruction says; options: those of a call."""
        if image is None:  # a call without an image draws
            raise UserError("image: expected one to change, found none")
        edited: PIL.Image.Image = self(instruction, image=image, **options).images[0]
        return edited

    def start(self, image: ImageSource, strength: float = 1.0, mask_image: ImageSource | None = None) -> Start:
        """Encode an image to begin a drawing from; the mask selects what is redrawn (`images.read_mask`).

        Raises UserError where its sides do not divide into patches, or the mask does not fit it.
        """
        exported = self.exported
        if exported.model.config.images != "latents":
            raise UserError("start: expected none, for the model does not denoise, found one")
        factor = exported.autoencoder.factor * exported.model.config.patch_size
        pixels = decode_image(image)
        height, width = pixels.shape[:2]
        if width % factor or height % factor:
            raise UserError(f"image: expected sides in multiples of {factor}, found {width}x{height}")
        mask = None
        if mask_image is not None:
            mask = latent_mask(read_mask(mask_image, (height, width)), exported.autoencoder.factor)
        return Start(exported.autoencoder.encode(pixels[None])[0], strength, mask)

    def caption(self, images: ImageSources, max_tokens: int = 64) -> list[str]:
        """Describe images, greedily; each must have the size the model was trained on."""
        requests = [self.request([pixels]) for pixels in read_images(images)]
        requests = [replace(request, draw="never", max_tokens=max_tokens, temperature=0.0) for request in requests]
        return [reply.text.strip() for reply in self.replies(requests)]

    def generate(self, prompt: Prompt, **settings: Unpack[ReplySettings]) -> Reply:
        """Continue a prompt of text and images; settings are fields of `Request`, else the model's own defaults."""
        if not isinstance(prompt, str | Sequence):
            raise UserError(f"prompt: expected text, or a list of texts and images, found {shown(prompt)}")
        return self.replies([replace(self.request([prompt] if isinstance(prompt, str) else prompt), **settings)])[0]

    def request(
        self,
        parts: Sequence[PromptPart],
        steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: str | None = None,
        guidance_interval: tuple[float, float] | None = None,
        eta: float | None = None,
    ) -> Request:
        """Return a request of texts and images with the model's own defaults. Raises UserError for a bad setting."""
        defaults, process = self.exported.generation, self.exported.process
        if not isinstance(steps, Integral | None) or isinstance(steps, bool):
            raise UserError(f"steps: expected a whole number, found {shown(steps)}")
        steps = None if steps is None else int(steps)
        given = {"steps": steps, "sampler": sampler, "eta": eta}
        if self.exported.model.config.images != "latents" and any(value is not None for value in given.values()):
            raise UserError("steps, sampler, eta: expected none, for the model does not denoise, found some")
        try:
            chosen = defaults.sampler
            if sampler is not None and sampler != chosen.name:
                chosen = SamplerConfig(sampler, chosen.steps)  # type: ignore[arg-type]
            if steps is not None:
                first = None if chosen.first is None else max(chosen.first, steps)
                chosen = replace(chosen, steps=steps, first=first)
            if eta is not None:
                chosen = replace(chosen, eta=eta)
            if chosen.steps > (most := process.config.timesteps):
                raise UserError(f"steps: expected at most {most}, found {chosen.steps}")
            Sampler(process, chosen)
        except ValueError as error:
            raise UserError(f"sampler: {error}") from None
        settings = vars(defaults) | {"sampler": chosen}  # the defaults are named as the fields of a request
        settings |= {} if guidance_scale is None else {"guidance_scale": guidance_scale}
        settings |= {} if guidance_interval is None else {"guidance_interval": guidance_interval}
        document, side = Document([self.part(part) for part in parts], closed=False), self.exported.image_size
        request = Request(document, size=(side, side), **settings)
        if wrong := out_of_range(request):
            raise UserError(wrong)
        return request

    def part(self, part: PromptPart) -> Part:
        """Return a part of a document; an image must have the model's size."""
        if isinstance(part, Text | Image):
            return part
        if isinstance(part, str):
            return Text(self.exported.tokenizer.encode(part))
        side = self.exported.image_size
        pixels = decode_image(part)
        height, width = pixels.shape[:2]
        if (height, width) != (side, side):
            raise UserError(f"image: expected {side}x{side} pixels, found {width}x{height}")
        return Image(self.exported.autoencoder.encode(pixels[None])[0], target=False)

    def message(self, role: str, parts: Sequence[PromptPart]) -> Message:
        """Return a turn of a conversation; its images must have the model's size."""
        encoded = [part if isinstance(part, str) else self.part(part) for part in parts]
        return Message(role, tuple(part for part in encoded if isinstance(part, str | Image)))

    def stream(self, request: Request) -> Iterator[Event]:
        """Yield the events of one request as they happen."""
        return self.engine.run([request])

    def picture(self, latent: Tensor) -> PIL.Image.Image:
        """Decode one latent, or one image's codes."""
        return PIL.Image.fromarray(self.exported.autoencoder.decode(latent[None])[0])

    def replies(self, requests: Sequence[Request], candidates: int = 1) -> list[Reply]:
        """Run requests together and gather each one's reply.

        candidates: answer each that many times, and keep the reply after whose first image the model itself most
        probably writes the prompt.
        """
        requests = repeated(requests, candidates)
        parts: list[list[str | PIL.Image.Image]] = [[] for _ in requests]
        first: list[Tensor | None] = [None for _ in requests]
        done: dict[int, Done] = {}
        for event in self.engine.run(requests):
            match event:
                case TextDelta(row, text):
                    if parts[row] and isinstance(parts[row][-1], str):
                        parts[row][-1] += text  # type: ignore[operator]
                    else:
                        parts[row].append(text)
                case ImageEnd(row, number, latent):
                    parts[row].append(self.picture(latent))
                    first[row] = latent if number == 0 else first[row]
                case Done(row):
                    done[row] = event
        kept = self._best(requests, first, candidates)
        return [Reply(parts[row], done[row], requests[row].seed) for row in kept]

    def _best(self, requests: Sequence[Request], first: Sequence[Tensor | None], candidates: int) -> list[int]:
        """Return the request to keep of each run of `candidates`: after its image its prompt has the least loss.

        One without an image is kept only where none has any.
        """
        rows = range(0, len(requests), candidates)
        if candidates == 1:
            return list(rows)
        images = {row: Image(latent, target=False) for row, latent in enumerate(first) if latent is not None}
        captioned = [Document([image, *requests[row].document.parts], closed=False) for row, image in images.items()]
        losses = dict(zip(images, (scores.nll.sum() for scores in score(self.exported, captioned)), strict=True))
        return [min(range(row, row + candidates), key=lambda number: losses.get(number, math.inf)) for row in rows]


def drawn_size(image: np.ndarray, height: int | None, width: int | None) -> tuple[int, int]:
    """Return the rows and columns of a drawing that begins from an image: the image's. Raises UserError for others."""
    rows, columns = image.shape[:2]
    for name, given, own in (("height", height, rows), ("width", width, columns)):
        if given not in (None, own):
            raise UserError(f"{name}: expected {own}, as the image with strength or mask_image, found {given}")
    return rows, columns


def repeated(requests: Sequence[Request], candidates: int) -> list[Request]:
    """Return each request `candidates` times, with different seeds, the first as it is.

    Raises UserError for prompts by which candidates cannot be compared: no text, or images among it.
    """
    if not isinstance(candidates, Integral) or candidates < 1:
        raise UserError(f"candidates: expected a whole number of at least 1, found {shown(candidates)}")
    if candidates == 1:
        return list(requests)
    for parts in (request.document.parts for request in requests):
        if not parts or not all(isinstance(part, Text) and part.ids for part in parts):
            raise UserError("candidates: expected 1 where a prompt is not of words alone, found more")
    return [replace(base, seed=base.seed + number * CANDIDATE) for base in requests for number in range(candidates)]
