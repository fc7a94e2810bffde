"""The shapes of requests and of errors: OpenAI's, plus the settings of images. An unknown field is refused by name.

Pydantic checks a request's fields; `job` and `jobs` decode its images, which takes a thread. What depends on the model
(its sizes, its context) the engine checks.
"""

from __future__ import annotations

import base64
import binascii
import secrets
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import HTTPException, UploadFile
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from ..errors import UserError
from ..images import decode_image, read_mask
from .worker import Job

MAX_TEXT = 100_000
"""characters of one text"""
MAX_PIXELS = 16_000_000
FORMATS = ("PNG", "JPEG", "WEBP")


class ApiError(HTTPException):
    """A reply that is no success, in OpenAI's shape: one line, and never a traceback."""

    CODES = {429: "queue_full", 503: "unavailable", 504: "deadline_exceeded"}  # noqa: RUF012
    TYPES = {401: "authentication_error", 429: "rate_limit_error"}  # noqa: RUF012

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None, retry_after: int = 0
    ) -> None:
        headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
        headers |= {"Retry-After": str(retry_after)} if retry_after else {}
        super().__init__(status, message, headers)
        kind = self.TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        code = code or self.CODES.get(status)
        self.content = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        """Return the error as an HTTP response."""
        return JSONResponse(self.content, self.status_code, self.headers)


def _unicode(text: str) -> str:
    """Refuse half a surrogate pair, which JSON can carry and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("expected Unicode text, found half a surrogate pair") from None
    return text


def _file(value: object) -> object:
    if isinstance(value, str):
        raise ValueError("expected a file, found text")
    return value


String = Annotated[str, Field(max_length=MAX_TEXT), AfterValidator(_unicode)]
Upload = Annotated[UploadFile, BeforeValidator(_file)]


class Strict(BaseModel):
    """A model that refuses unknown fields, infinity and NaN."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class GenerationOptions(Strict):
    """Fields of every request. None: the model's own default."""

    model: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    sampler: Literal["ddpm", "ddim", "dpmpp", "euler", "heun"] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=100)] | None = None
    image_guidance_scale: Annotated[float, Field(ge=0, le=100)] | None = None
    guidance_interval: tuple[float, float] | None = None
    size: Annotated[str, Field(pattern=r"^(auto|[1-9]\d{0,3}x[1-9]\d{0,3})$")] = "auto"
    """columns x rows"""
    timeout: Annotated[float, Field(gt=0)] | None = None
    """seconds; the server's own deadline holds where it is shorter"""
    user: str | None = None
    """ignored, as are `metadata` and `store`"""
    metadata: dict[str, str] | None = None
    store: bool | None = None

    def job_of(self, parts: list[str | np.ndarray], settings: dict[str, Any], **more: Any) -> Job:
        """Return a job whose settings hold only what the request names, and a seed."""
        settings = {"seed": secrets.randbelow(2**31) if self.seed is None else self.seed, **settings}
        for name in ("guidance_scale", "image_guidance_scale", "guidance_interval"):
            if getattr(self, name) is not None:
                settings[name] = getattr(self, name)
        if self.size != "auto":
            columns, rows = (int(side) for side in self.size.split("x"))
            settings["size"] = (rows, columns)
        return Job(tuple(parts), settings, self.num_inference_steps, self.sampler, **more)


class TextPart(Strict):
    """Text in a message."""

    type: Literal["text"]
    text: String


class ImageURL(Strict):
    """An image as a `data:` URL of a PNG, JPEG or WebP file; nothing is ever fetched."""

    url: str
    detail: str | None = None

    def decode(self, field: str) -> np.ndarray:
        """Return the image, uint8 RGB. Raises UserError, one line that names `field`."""
        head, comma, data = self.url.partition(",")
        if not head.startswith("data:") or not comma:
            wanted, start = "a data: URL with the picture in it", self.url[:24]
            raise UserError(f"{field}: expected {wanted}, found {start!r}; none is fetched")
        if not head.endswith(";base64"):
            raise UserError(f"{field}: expected base64 after {head[:40]!r}, found something else")
        try:
            content = base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError) as error:
            raise UserError(f"{field}: expected base64, found something else ({error})") from None
        return decode_image(content, field, MAX_PIXELS, FORMATS)


class ImagePart(Strict):
    """An image in a message."""

    type: Literal["image_url"]
    image_url: ImageURL


class Message(BaseModel):
    """One turn: its parts, then its `images`. Roles count where the model has a chat template.

    A reply of this server may come back as a message: fields that are not listed are ignored.
    """

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: (
        String
        | Annotated[list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], Field(max_length=64)]
        | None
    ) = None
    images: Annotated[list[ImagePart], Field(max_length=16)] | None = None

    def parts(self, field: str) -> list[str | np.ndarray]:
        """Return texts that are not empty, and images. Raises UserError, which names the part of `field`."""
        content = [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content or []
        parts: list[str | np.ndarray] = []
        for number, part in enumerate([*content, *(self.images or [])]):
            if isinstance(part, ImagePart):
                parts.append(part.image_url.decode(f"{field}.content.{number}.image_url"))
            elif part.text:
                parts.append(part.text)
        return parts


class StreamOptions(Strict):
    """Chunks of a chat's stream."""

    include_usage: bool = False
    include_progress: bool = False
    """add chunks with a field `progress`: how far an image is, and previews"""
    preview_every: Annotated[int, Field(ge=1, le=1000)] = 5
    """denoising steps between previews"""


class ChatRequest(GenerationOptions):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=256)]
    modalities: Annotated[list[Literal["text", "image"]], Field(min_length=1, max_length=2)] | None = None
    """["text"]: words only; ["image"]: an image comes first; both, or none given: the model decides"""
    max_tokens: Annotated[int, Field(ge=0, le=100_000)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=0, le=100_000)] | None = None
    max_images: Annotated[int, Field(ge=0, le=16)] = 1
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Literal[1] | None = 1
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    content_format: Literal["text", "parts"] = "text"
    """text: the words in `content`, the images in `images`; parts: both in `content`, in their order"""

    def job(self) -> Job:
        """Return the job of the request. Raises UserError for an image that cannot be decoded."""
        spoken = [message.parts(f"messages.{number}") for number, message in enumerate(self.messages)]
        parts = [part for turn in spoken for part in turn]
        if not parts:
            raise UserError("messages: expected some text or a picture, found none")
        kinds = set(self.modalities or ["text", "image"])
        draw = "auto" if len(kinds) == 2 else "force" if "image" in kinds else "never"
        settings: dict[str, Any] = {"draw": draw, "max_images": self.max_images, "reuse": len(self.messages) > 1}
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        optional = {"max_tokens": max_tokens, "temperature": self.temperature, "top_p": self.top_p}
        settings |= {name: value for name, value in optional.items() if value is not None}
        if self.stream and self.stream_options is not None and self.stream_options.include_progress:
            settings["preview_every"] = self.stream_options.preview_every
        roles = ("system" if message.role == "developer" else message.role for message in self.messages)
        turns = tuple((role, len(turn)) for role, turn in zip(roles, spoken, strict=True))
        return self.job_of(parts, settings, turns=turns)


class ImagesRequest(GenerationOptions):
    """`POST /v1/images/generations`."""

    prompt: Annotated[str, Field(min_length=1, max_length=MAX_TEXT), AfterValidator(_unicode)]
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

    def jobs(self, default_steps: int, images: list[np.ndarray] | None = None, **start: Any) -> list[Job]:
        """Return a job for each image to draw, with seeds counted up; `images` stand before the prompt."""
        settings: dict[str, Any] = {"draw": "force", "max_tokens": 0}
        if self.stream and self.partial_images:
            steps = self.num_inference_steps or default_steps
            settings["preview_every"] = max(1, steps // (self.partial_images + 1))
        first = self.job_of([*(images or []), self.prompt], settings, **start)
        seed = first.settings["seed"]
        seeds = [(seed + number) % 2**63 for number in range(self.n or 1)]
        return [replace(first, settings={**first.settings, "seed": seed}) for seed in seeds]


class EditRequest(ImagesRequest):
    """`POST /v1/images/edits`: a form with the files `image`, or several as `image[]`, and `mask`.

    Without `strength` or a mask the prompt is an instruction, and the images stand before it. With either it describes
    the result, which is drawn from the image.
    """

    strength: Annotated[float, Field(ge=0, le=1)] | None = None
    input_fidelity: str | None = None
    image: Annotated[list[Upload], Field(max_length=16)] = []
    images: Annotated[list[Upload], Field(max_length=16, alias="image[]")] = []
    mask: Annotated[list[Upload], Field(max_length=1)] = []

    def jobs(self, default_steps: int, *_: Any, **__: Any) -> list[Job]:
        """Return a job for each image to draw. Raises UserError for a file that cannot be decoded."""
        files = [file.file.read() for file in (*self.image, *self.images)]
        if not files:
            raise UserError("image: expected a file, found none")
        images = [decode_image(file, "image", MAX_PIXELS, FORMATS) for file in files]
        if self.strength is None and not self.mask:
            return super().jobs(default_steps, images)
        if len(images) != 1:
            raise UserError(f"image: expected one with strength or mask, found {len(images)}")
        area = None
        if self.mask:
            area = read_mask(self.mask[0].file.read(), images[0].shape[:2], "mask", MAX_PIXELS, FORMATS)
        strength = 1.0 if self.strength is None else self.strength
        return super().jobs(default_steps, start=images[0], mask=area, strength=strength)
