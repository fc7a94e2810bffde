"""From a request's body to the worker's jobs: parsing, checks, and decoding of images, none of it on the event loop.

What is small and without images is read at once. Anything else goes to two separate processes, so that a hostile body
can slow down neither the loop nor the model. A client has at most one of them, and a process holds one decoded image.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import json
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import PIL.Image
from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from ..devices import give_back_memory
from ..errors import UserError
from ..images import decode_image, fit, read_mask
from .protocol import ApiError, ChatRequest, EditRequest, GenerationOptions, ImagesRequest, ImageURL, validate
from .worker import Job, process_context

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 16_000_000  # of one image
MAX_REQUEST_PIXELS = 64_000_000  # of all images of a request
MAX_IMAGES = 16
MAX_VALUES = 1_000_000  # most commas and brackets of a JSON body: each may become an object of 60 bytes and more
SMALL = 16_384  # bytes of a body that is read on the event loop
PROCESSES = 2
KINDS: dict[str, type[GenerationOptions]] = {"chat": ChatRequest, "images": ImagesRequest, "edits": EditRequest}


Read = tuple[Any, list[Job]]  # a request's fields without the content of messages and files, and its jobs


def parse(kind: str, content_type: str, body: bytes) -> Any:
    """Return a request's fields: of a form for edits, and of JSON otherwise, whatever the content type says.

    Raises UserError, one line, with the position where JSON is broken.
    """
    if kind == "edits":
        return validate(EditRequest, asyncio.run(_form(content_type, body)))
    if content_type.lower().startswith("multipart/"):
        raise UserError(f"body: expected JSON, found {content_type.partition(';')[0]:.60}")
    if sum(body.count(mark) for mark in (b",", b"[", b"{")) > MAX_VALUES:
        raise UserError(f"body: expected at most {MAX_VALUES} values, found more")
    try:
        values = json.loads(body)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise UserError(f"body: expected JSON, found a mistake at {where} ({error.msg})") from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).partition(";")[0]
        raise UserError(f"body: expected JSON in UTF-8, found something else ({reason})") from None
    if not isinstance(values, dict):
        raise UserError(f"body: expected a JSON object, found {type(values).__name__}")
    return validate(KINDS[kind], values)


async def _form(content_type: str, body: bytes) -> Mapping[str, Any]:
    """Return the fields of a multipart form; an empty one is not given, and numbers are numbers."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    if not content_type.lower().startswith(("multipart/form-data", "application/x-www-form-urlencoded")):
        raise UserError(f"body: expected multipart/form-data, found {content_type[:60] or 'no content type'}")
    request = Request({"type": "http", "headers": [(b"content-type", content_type.encode("latin-1"))]}, receive)
    try:
        form = await request.form(max_files=3 * MAX_IMAGES, max_fields=100)
    except (MultiPartException, HTTPException) as error:
        message = getattr(error, "message", None) or getattr(error, "detail", "")
        raise UserError(f"body: expected a form, found a broken one ({message})") from None
    values: dict[str, Any] = {}
    for name, value in form.multi_items():
        if not isinstance(value, str) or name in ("image", "image[]", "mask"):
            values.setdefault(name, []).append(value)
        elif value:
            kind = EditRequest.model_fields.get(name)
            values[name] = value
            if kind is not None and not re.search(r"\bstr\b", str(kind.annotation)):
                with suppress(ValueError):  # a number, a list, true or false
                    values[name] = json.loads(value)
    return values


def check_images(files: Sequence[tuple[str, bytes]], model: Mapping[str, Any]) -> None:
    """Raise UserError if images are too many, or too large by their headers alone. Each file has its field's name."""
    if files and model["images"] == "none":
        raise UserError(f"{files[0][0]}: expected text alone, for the model knows no images, found an image")
    if len(files) > MAX_IMAGES:
        raise UserError(f"{files[-1][0]}: expected at most {MAX_IMAGES} images in a request, found {len(files)}")
    pixels = 0
    for name, content in files:
        try:
            with PIL.Image.open(io.BytesIO(content), formats=FORMATS) as image:
                pixels += image.width * image.height
        except Exception:
            continue  # `decode_image` says why
        if pixels > MAX_REQUEST_PIXELS:
            wanted = f"expected at most {MAX_REQUEST_PIXELS} pixels in all images of a request"
            raise UserError(f"{name}: {wanted}, found {pixels} up to this one")


def decode_url(name: str, image: ImageURL) -> bytes:
    """Return the file in a `data:` URL. Raises UserError, one line that begins with `name`."""
    head, comma, data = image.url.partition(",")
    if not head.startswith("data:") or not comma:
        wanted, start = "a data: URL with the picture in it", image.url[:24]
        raise UserError(f"{name}: expected {wanted}, found {start!r}; none is fetched")
    if not head.endswith(";base64"):
        raise UserError(f"{name}: expected base64 after {head[:40]!r}, found something else")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{name}: expected base64, found something else ({error})") from None


def read_chat(body: ChatRequest, model: Mapping[str, Any]) -> list[Job]:
    """Return the job of a chat. Raises UserError for a text that no context can hold, and for a wrong image."""
    parts = [part for number, message in enumerate(body.messages) for part in message.parts(f"messages.{number}")]
    if not parts:
        raise UserError("messages: expected some text or a picture, found none")
    check_length("messages", sum(len(part) for _, part in parts if isinstance(part, str)), model)
    files = {name: decode_url(name, part) for name, part in parts if isinstance(part, ImageURL)}
    check_images([*files.items()], model)
    decoded: list[str | np.ndarray] = []
    for name, part in parts:
        side = model["image_size"]
        decoded.append(
            part if isinstance(part, str) else fit(decode_image(files.pop(name), name, MAX_PIXELS, FORMATS), side)
        )
    return [body.job(decoded)]


def read_edits(body: EditRequest, model: Mapping[str, Any]) -> list[Job]:
    """Return the jobs of an edit. Raises UserError for a file that cannot be decoded, or too many."""
    files = [("image", file.file.read()) for file in (*body.image, *body.images)]
    masks = [("mask", file.file.read()) for file in body.mask]
    if not files:
        raise UserError("image: expected a file, found none")
    check_images([*files, *masks], model)
    side, start = model["image_size"], body.strength is not None or bool(masks)
    if start and len(files) != 1:
        raise UserError(f"image: expected one with strength or mask, found {len(files)}")
    images, area = [], None
    for name, content in files:
        image = decode_image(content, name, MAX_PIXELS, FORMATS)
        rows, columns = image.shape[:2]
        images.append(fit(image, side))
        del image
    if not start:
        return body.jobs(model["steps"], images)
    for name, content in masks:
        area = fit(read_mask(content, (rows, columns), name, MAX_PIXELS, FORMATS), side)
    strength = 1.0 if body.strength is None else body.strength
    return body.jobs(model["steps"], start=images[0], mask=area, strength=strength)


def check_length(name: str, characters: int, model: Mapping[str, Any]) -> None:
    """Raise UserError for a text that is too long for the model's context whatever its tokens are."""
    if characters > model["max_characters"]:
        raise UserError(
            f"{name}: prompt: expected at most {model['context']} positions, "
            f"so at most {model['max_characters']} characters, found {characters}"
        )


def jobs_of(body: Any, model: Mapping[str, Any]) -> Read:
    """Return a checked request and its jobs."""
    if isinstance(body, ChatRequest):
        return body.model_copy(update={"messages": []}), read_chat(body, model)
    check_length("prompt", len(body.prompt), model)
    if isinstance(body, EditRequest):
        return body.model_copy(update={"image": [], "images": [], "mask": []}), read_edits(body, model)
    return body, body.jobs(model["steps"])


def read(kind: str, content_type: str, body: list[bytes], model: Mapping[str, Any]) -> Read | UserError:
    """Read the pieces of a body, in a process of the pool."""
    try:
        return jobs_of(parse(kind, content_type, b"".join(body)), model)
    except UserError as error:
        return error
    finally:
        give_back_memory()


def prepare_process() -> None:
    """Prepare a process of the pool: it gives way to the model, ends with its parent, which alone acts on Ctrl-C."""

    def end_with_parent() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)  # it holds both ends of its queue, so nothing else ends it if the parent is killed

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    if hasattr(os, "nice"):
        os.nice(5)


@dataclass(eq=False)
class Intake:
    """Reads bodies; a client's large ones one after the other."""

    pool: ProcessPoolExecutor | None = None
    locks: WeakValueDictionary[str, asyncio.Lock] = field(default_factory=WeakValueDictionary)

    async def read(
        self, client: str, kind: str, content_type: str, body: list[bytes], model: Mapping[str, Any]
    ) -> Read:
        """Return a request's jobs; the body is in pieces, which take least time to send to a process.

        Raises UserError, or ApiError if the process that reads it dies.
        """
        if sum(map(len, body)) <= SMALL and kind != "edits":
            parsed = parse(kind, content_type, b"".join(body))
            parts = [part for message in getattr(parsed, "messages", ()) for _, part in message.parts("")]
            if not any(isinstance(part, ImageURL) for part in parts):
                return jobs_of(parsed, model)
        async with self.locks.setdefault(client, asyncio.Lock()):
            if self.pool is None:  # of processes that are each started when first needed
                self.pool = ProcessPoolExecutor(PROCESSES, process_context(), prepare_process)
            try:
                loop = asyncio.get_running_loop()
                result = await loop.run_in_executor(self.pool, read, kind, content_type, body, dict(model))
            except BrokenProcessPool:
                self.stop()
                raise ApiError(502, "the process that read this request ended; try again") from None
        if isinstance(result, UserError):
            raise result
        return result

    def stop(self) -> None:
        """End the processes, each after what it reads."""
        pool, self.pool = self.pool, None
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)
