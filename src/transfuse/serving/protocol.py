"""The shapes of requests: OpenAI's, with the settings of drawing beside them. An unknown field is refused by name."""

from __future__ import annotations

import random
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from ..errors import UserError
from . import pictures
from .messages import Job

MAX_TEXT = 100_000
"""characters of one text"""
MAX_SIDE = 4096
SAMPLERS = Literal["ddpm", "ddim", "dpmpp", "euler", "heun"]


def _plain(text: str) -> str:
    """Half a surrogate pair, which JSON can carry, is no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("expected Unicode text, found half a surrogate pair") from None
    return text


Words = Annotated[str, Field(max_length=MAX_TEXT), AfterValidator(_plain)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Ignored(Strict):
    """Fields of OpenAI's that say nothing to this model, and change nothing."""

    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None


class Drawing(Ignored):
    """What both ways of asking have in common. None: the model's own default."""

    model: str | None = None
    seed: Seed | None = None
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    sampler: SAMPLERS | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=100)] | None = None
    image_guidance_scale: Annotated[float, Field(ge=0, le=100)] | None = None
    guidance_interval: tuple[float, float] | None = None
    size: Annotated[str, Field(pattern=r"^(auto|[1-9]\d{0,3}x[1-9]\d{0,3})$")] = "auto"
    """columns x rows"""
    timeout: Annotated[float, Field(gt=0)] | None = None
    """seconds; the server's own deadline holds where it is shorter"""

    def job(self, parts: list[str | np.ndarray], seed: int, settings: dict[str, Any], **start: Any) -> Job:
        """A job; only what was asked for is in its settings."""
        asked: dict[str, Any] = {"seed": seed, **settings}
        for name in ("guidance_scale", "image_guidance_scale", "guidance_interval"):
            if getattr(self, name) is not None:
                asked[name] = getattr(self, name)
        if self.size != "auto":
            columns, rows = (int(side) for side in self.size.split("x"))
            asked["size"] = (rows, columns)
        return Job(tuple(parts), asked, self.num_inference_steps, self.sampler, **start)


class TextPart(Strict):
    type: Literal["text"]
    text: Words


class ImageURL(Strict):
    url: str
    """a data: URL of a PNG, JPEG or WebP file"""
    detail: str | None = None


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageURL


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(BaseModel):
    """One turn. Its parts, and then its `images`, follow one another in the sequence, whoever says them: the model
    knows no roles. What a reply of this server holds beside that may come back with it."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: Words | Annotated[list[Part], Field(max_length=64)] | None = None
    images: Annotated[list[ImagePart], Field(max_length=16)] | None = None

    def parts(self, where: str) -> list[str | np.ndarray]:
        found: list[str | np.ndarray] = []
        content = [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content or []
        for number, part in enumerate([*content, *(self.images or [])]):
            if isinstance(part, TextPart):
                found += [part.text] if part.text else []
            else:
                found.append(pictures.from_url(part.image_url.url, f"{where}.content.{number}.image_url"))
        return found


class StreamOptions(Strict):
    include_usage: bool = False
    include_progress: bool = False
    """say how far a picture is, with previews of it: chunks with a field `progress`"""
    preview_every: Annotated[int, Field(ge=1, le=1000)] = 5
    """denoising steps between previews"""


class ChatRequest(Drawing):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=256)]
    modalities: Annotated[list[Literal["text", "image"]], Field(min_length=1, max_length=2)] | None = None
    """["text"]: words only; ["image"]: a picture comes first; both, or none given: the model decides"""
    max_tokens: Annotated[int, Field(ge=0, le=100_000)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=0, le=100_000)] | None = None
    max_images: Annotated[int, Field(ge=0, le=16)] = 1
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Literal[1] | None = 1
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    content_format: Literal["text", "parts"] = "text"
    """text: the words in `content`, the pictures in `images`; parts: both in `content`, in their order"""

    def to_job(self) -> Job:
        parts = [part for number, said in enumerate(self.messages) for part in said.parts(f"messages.{number}")]
        if not parts:
            raise UserError("messages: expected some text or a picture, found none")
        asked = set(self.modalities or ["text", "image"])
        draw = "auto" if len(asked) == 2 else "force" if "image" in asked else "never"
        settings: dict[str, Any] = {"draw": draw, "max_images": self.max_images, "reuse": len(self.messages) > 1}
        most = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        for name, value in (("max_tokens", most), ("temperature", self.temperature), ("top_p", self.top_p)):
            if value is not None:
                settings[name] = value
        options = self.stream_options
        if self.stream and options is not None and options.include_progress:
            settings["preview_every"] = options.preview_every
        return self.job(parts, chosen(self.seed), settings)


class ImagesRequest(Drawing):
    """`POST /v1/images/generations`."""

    prompt: Annotated[str, Field(min_length=1, max_length=MAX_TEXT), AfterValidator(_plain)]
    n: Annotated[int, Field(ge=1, le=10)] | None = 1
    response_format: Literal["b64_json"] | None = None
    """a URL is never given: nothing is kept"""
    output_format: Literal["png"] | None = None
    stream: bool | None = False
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
    quality: str | None = None
    style: str | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: str | None = None

    def jobs(self, images: list[np.ndarray], default_steps: int, **start: Any) -> list[Job]:
        """One for each picture; images: those that lie before the prompt."""
        settings: dict[str, Any] = {"draw": "force", "max_tokens": 0}
        if self.stream and self.partial_images:
            steps = self.num_inference_steps or default_steps
            settings["preview_every"] = max(1, steps // (self.partial_images + 1))
        first = chosen(self.seed)
        return [
            self.job([*images, self.prompt], (first + number) % 2**63, settings, **start)
            for number in range(self.n or 1)
        ]


class EditRequest(ImagesRequest):
    """`POST /v1/images/edits`, a form, beside its files: `image`, or several as `image[]`, and `mask`.

    Without `strength` or a mask the prompt is an instruction, and the pictures lie before it. With one it describes the
    result, which is drawn from the picture.
    """

    strength: Annotated[float, Field(ge=0, le=1)] | None = None
    input_fidelity: str | None = None


def chosen(seed: int | None) -> int:
    """A seed, where none was given."""
    return random.SystemRandom().randrange(2**31) if seed is None else seed
