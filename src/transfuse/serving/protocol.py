"""The shapes of requests and of errors: OpenAI's, plus the settings of images.

A field that asks for nothing passes, as front ends send many (`SAYS_NOTHING`); any other that is unknown is refused by
name. Pydantic checks a request's fields and `intake` decodes its images; what depends on the model the engine checks.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import HTTPException, UploadFile
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo

from ..config import nearest
from ..errors import UserError
from .worker import Job

MAX_TEXT = 100_000  # characters of one text
ANY = object()
SAYS_NOTHING: dict[str, tuple[object, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "top_k": (0, -1),
    "min_p": (0, 0.0),
    "repetition_penalty": (1, 1.0),
    "best_of": (1,),
    "echo": (False,),
    **dict.fromkeys(("service_tier", "store", "metadata", "user", "safety_identifier"), (ANY,)),
    **dict.fromkeys(("prompt_cache_key", "prompt_cache_retention"), (ANY,)),
    **dict.fromkeys(("prediction", "audio", "web_search_options"), ()),
}
"""fields of OpenAI's and vLLM's that the server does not have, and values that change no result, as null never does"""


class ApiError(HTTPException):
    """A reply that is no success, in OpenAI's shape: one line, and never a traceback."""

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None, retry_after: int = 0
    ) -> None:
        headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
        headers |= {"Retry-After": str(retry_after)} if retry_after else {}
        super().__init__(status, message, headers)
        kind = "server_error" if status >= 500 else "invalid_request_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, kind)
        codes = {429: "queue_full", 502: "computation_failed", 503: "unavailable", 504: "deadline_exceeded"}
        code = code or codes.get(status)
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


def _size(value: object) -> object:
    if not isinstance(value, str) or not re.fullmatch(r"auto|[1-9]\d{0,3}x[1-9]\d{0,3}", value):
        raise ValueError(f"expected auto, or columns and rows such as 64x64, found {value!r:.60}")
    return value


def _with_logprobs(value: int, info: ValidationInfo) -> int:
    """Refuse `top_logprobs`, unless `logprobs` before it asks for any, or is wrong itself."""
    if value and not info.data.get("logprobs", True):
        raise ValueError(f"expected logprobs to be true with it, found {info.data['logprobs']!r}")
    return value


Int = Annotated[int, Field(strict=True)]
Float = Annotated[float, Field(strict=True)]
Bool = Annotated[bool, Field(strict=True)]
String = Annotated[str, Field(max_length=MAX_TEXT), AfterValidator(_unicode)]
Upload = Annotated[UploadFile, BeforeValidator(_file)]


class Strict(BaseModel):
    """A model that refuses unknown fields, infinity and NaN."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class GenerationOptions(Strict):
    """Fields of every request. None: the model's own default."""

    model: str | None = None
    seed: Annotated[Int, Field(ge=0, lt=2**63)] | None = None
    num_inference_steps: Annotated[Int, Field(ge=1, le=1000)] | None = None
    sampler: Literal["ddpm", "ddim", "dpmpp", "euler", "heun"] | None = None
    guidance_scale: Annotated[Float, Field(ge=0, le=100)] | None = None
    image_guidance_scale: Annotated[Float, Field(ge=0, le=100)] | None = None
    guidance_interval: Annotated[list[Float], Field(min_length=2, max_length=2)] | None = None
    size: Annotated[str, BeforeValidator(_size), Field(json_schema_extra={"pattern": r"^(auto|\d+x\d+)$"})] = "auto"
    """columns x rows"""
    strict: Bool = False
    """refuse a prompt with words that training never showed, where the model has a list of its words"""
    timeout: Annotated[Float, Field(gt=0)] | None = None
    """seconds from the request's first byte; the server's own deadline holds where it is shorter"""

    def job_of(self, parts: Sequence[str | np.ndarray], settings: dict[str, Any], **more: Any) -> Job:
        """Return a job whose settings hold only what the request names, and a seed."""
        settings = {"seed": secrets.randbelow(2**31) if self.seed is None else self.seed, **settings}
        for name in ("guidance_scale", "image_guidance_scale"):
            if getattr(self, name) is not None:
                settings[name] = getattr(self, name)
        if self.strict:
            settings["strict"] = True
        if self.guidance_interval is not None:
            settings["guidance_interval"] = tuple(self.guidance_interval)
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


class ImagePart(Strict):
    """An image in a message."""

    type: Literal["image_url"]
    image_url: ImageURL


Parts = Annotated[
    list[Annotated[TextPart | ImagePart, Field(discriminator="type")]],
    Field(max_length=64),
    BeforeValidator(
        lambda value: [{"type": "text", "text": value}] if isinstance(value, str) else value,
        json_schema_input_type=str | list[TextPart | ImagePart],
    ),
]


class Message(BaseModel):
    """One turn: its parts, then its `images`. Roles count where the model has a chat template.

    A reply of this server may come back as a message: fields that are not listed are ignored.
    """

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: Parts | None = None
    images: Annotated[list[ImagePart], Field(max_length=16)] | None = None

    def parts(self, field: str) -> list[tuple[str, str | ImageURL]]:
        """Return texts that are not empty, and images, each with its name in the request, in order."""
        parts: list[tuple[str, str | ImageURL]] = []
        for number, part in enumerate([*(self.content or []), *(self.images or [])]):
            if isinstance(part, ImagePart):
                parts.append((f"{field}.content.{number}.image_url", part.image_url))
            elif part.text:
                parts.append((f"{field}.content.{number}.text", part.text))
        return parts


class StreamOptions(Strict):
    """Chunks of a chat's stream."""

    include_usage: Bool = False
    include_obfuscation: Bool = False  # ignored
    include_progress: Bool = False  # add chunks with a field `progress`: how far an image is, and previews
    preview_every: Annotated[Int, Field(ge=1, le=1000)] = 5  # denoising steps between previews


class ChatRequest(GenerationOptions):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=256)]
    modalities: Annotated[list[Literal["text", "image"]], Field(min_length=1, max_length=2)] | None = None
    """["text"]: words only; ["image"]: an image comes first; both, or none given: the model decides"""
    max_tokens: Annotated[Int, Field(ge=0, le=100_000)] | None = None
    max_completion_tokens: Annotated[Int, Field(ge=0, le=100_000)] | None = None
    max_images: Annotated[Int, Field(ge=0, le=16)] = 1
    temperature: Annotated[Float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Float, Field(gt=0, le=1)] | None = None
    presence_penalty: Annotated[Float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Float, Field(ge=-2, le=2)] | None = None
    stop: (
        Annotated[
            list[Annotated[String, Field(min_length=1, max_length=1000)]],
            Field(max_length=4),
            BeforeValidator(
                lambda value: [value] if isinstance(value, str) else value, json_schema_input_type=str | list[str]
            ),
        ]
        | None
    ) = None
    logprobs: Bool | None = None
    top_logprobs: Annotated[Int, Field(ge=0, le=20), AfterValidator(_with_logprobs)] | None = None
    n: Annotated[Int, Field(ge=1, le=1)] | None = 1
    stream: Bool | None = False
    stream_options: StreamOptions | None = None
    content_format: Literal["text", "parts"] = "text"
    """text: the words in `content`, the images in `images`; parts: both in `content`, in their order"""

    def job(self, parts: Sequence[str | np.ndarray]) -> Job:
        """Return the job of the request; `parts` are those of its messages, with their images decoded."""
        kinds = set(self.modalities or ["text", "image"])
        draw = "auto" if len(kinds) == 2 else "force" if "image" in kinds else "never"
        settings: dict[str, Any] = {"draw": draw, "max_images": self.max_images, "reuse": len(self.messages) > 1}
        optional = {
            "max_tokens": self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens,
            "stop": None if self.stop is None else tuple(self.stop),
            "logprobs": (self.top_logprobs or 0) if self.logprobs else None,
            **{name: getattr(self, name) for name in ("temperature", "top_p", "presence_penalty", "frequency_penalty")},
        }
        settings |= {name: value for name, value in optional.items() if value is not None}
        if self.stream and self.stream_options is not None and self.stream_options.include_progress:
            settings["preview_every"] = self.stream_options.preview_every
        roles = ("system" if message.role == "developer" else message.role for message in self.messages)
        turns = tuple((role, len(message.parts(""))) for role, message in zip(roles, self.messages, strict=True))
        return self.job_of(parts, settings, turns=turns)


class ImagesRequest(GenerationOptions):
    """`POST /v1/images/generations`."""

    prompt: Annotated[String, Field(min_length=1)]
    n: Annotated[Int, Field(ge=1, le=10)] | None = 1
    response_format: Literal["b64_json"] | None = None  # a URL is never given: nothing is kept
    output_format: Literal["png"] | None = None
    output_compression: Literal[100] | None = None  # a PNG is always whole
    stream: Bool | None = False
    partial_images: Annotated[Int, Field(ge=0, le=3)] | None = None
    quality: str | None = None
    style: str | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: str | None = None

    def jobs(self, default_steps: int, images: Sequence[np.ndarray] = (), **start: Any) -> list[Job]:
        """Return a job for each image to draw, with seeds counted up; `images` stand before the prompt."""
        settings: dict[str, Any] = {"draw": "force", "max_tokens": 0}
        if self.stream and self.partial_images:
            steps = self.num_inference_steps or default_steps
            settings["preview_every"] = max(1, steps // (self.partial_images + 1))
        first = self.job_of([*images, self.prompt], settings, **start)
        seed = first.settings["seed"]
        seeds = [(seed + number) % 2**63 for number in range(self.n or 1)]
        return [replace(first, settings={**first.settings, "seed": seed}) for seed in seeds]


class EditRequest(ImagesRequest):
    """`POST /v1/images/edits`: a form with the files `image`, or several as `image[]`, and `mask`.

    Without `strength` or a mask the prompt is an instruction, and the images stand before it. With either it describes
    the result, which is drawn from the image.
    """

    strength: Annotated[Float, Field(ge=0, le=1)] | None = None
    input_fidelity: str | None = None
    image: Annotated[list[Upload], Field(max_length=16)] = []
    images: Annotated[list[Upload], Field(max_length=16, alias="image[]")] = []
    mask: Annotated[list[Upload], Field(max_length=1)] = []


def validate(kind: type[GenerationOptions], values: Mapping[str, Any]) -> Any:
    """Return a request of plain values. Raises UserError: one line that names the field and what was found."""
    given = {}
    for name, value in values.items():
        known = name in kind.model_fields or name == "image[]"
        harmless = () if known else SAYS_NOTHING.get(name, ())
        if value is None or any(other is ANY or (type(value), value) == (type(other), other) for other in harmless):
            continue
        if not known and name in SAYS_NOTHING:
            raise UserError(f"{name}: expected none, which this server does not support, found {_shown(value)}")
        given[name] = value
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise UserError(_first_mistake(error, given, kind)) from None


def _first_mistake(error: ValidationError, values: object, kind: type[BaseModel]) -> str:
    """Return the first error by the names and numbers that lead to it in the request, without pydantic's own."""
    first, path = error.errors(include_url=False)[0], []
    for part in first["loc"]:
        inside = isinstance(values, Mapping) and part in values
        if inside or (isinstance(values, list) and isinstance(part, int) and part < len(values)):
            path.append(str(part) if re.fullmatch(r"[\w.\[\]-]{1,60}", str(part)) else f"{part!r:.60}")
            values = values[part]  # type: ignore[index]
    message = first["msg"]
    match first["type"]:
        case "missing":
            path.append(str(first["loc"][-1]))
            reason = "expected a value, found none"
        case "extra_forbidden":
            reason = f"unknown field{nearest(path[-1], kind.model_fields, '') if len(path) == 1 else ''}"
        case "value_error":
            reason = message.removeprefix("Value error, ")
        case "model_type" | "model_attributes_type" | "dict_type":
            reason = f"expected an object, found {_shown(values)}"
        case "union_tag_invalid" | "union_tag_not_found":
            path.append("type")
            kind_found = values.get("type") if isinstance(values, Mapping) else None
            reason = f"expected 'text' or 'image_url', found {'none' if kind_found is None else _shown(kind_found)}"
        case "list_type" if path[-1:] in (["content"], ["stop"]):
            reason = f"expected text or a list, found {_shown(values)}"
        case "too_long" | "too_short":
            bound = re.sub(r"^\w+ should have ", "", message.split(" after ")[0])
            bound = bound.replace("item", "character") if isinstance(values, str) else bound
            reason = f"expected {bound}, found {first['ctx']['actual_length']}"
        case _:
            wanted = re.sub(r"^\w+ should (be|have|match) ?", "", message).partition(", unable")[0]
            wanted = re.sub(r"a valid (?=[aeiou])", "an ", wanted).replace("a valid ", "a ")
            reason = f"expected {wanted}, found {_shown(values)}"
    return f"{'.'.join(path) or 'body'}: {' '.join(reason.split())}"


def _shown(value: object) -> str:
    return "a list" if isinstance(value, list) else "an object" if isinstance(value, Mapping) else f"{value!r:.60}"
