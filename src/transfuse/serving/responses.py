"""Responses in OpenAI's shapes, built from a request's events: one JSON object, or a stream of server-sent events."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

import numpy as np
import PIL.Image
from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from ..images import save_png
from ..inference.events import Done, Event, ImageEnd, ImageProgress, TextDelta
from .engine_client import EngineClient, RequestStream
from .protocol import ApiError, ChatRequest, ImagesRequest


class ResponseBuilder(Protocol):
    """A response as it grows."""

    async def add(self, index: int, event: Event) -> list[str]:
        """Take an event of the stream with that index; return the server-sent events that tell of it."""

    def body(self) -> dict[str, Any]:
        """Return the whole response, when every stream has ended."""

    def closing(self) -> list[str]:
        """Return the server-sent events at the end of a stream."""


async def respond(
    request: Request, client: EngineClient, streams: Sequence[RequestStream], builder: ResponseBuilder, stream: bool
) -> Response:
    """Respond to a request from its events. If the client leaves, streaming or not, the request is cancelled."""
    if stream:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        content = _server_sent(client, streams, builder)
        return StreamingResponse(content, media_type="text/event-stream", headers=headers)

    async def complete() -> dict[str, Any]:
        async for index, event in client.events(streams):
            if event is not None:
                await builder.add(index, event)
        return builder.body()

    async def disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, gone = asyncio.ensure_future(complete()), asyncio.ensure_future(disconnect())
    await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
    gone.cancel()
    if not work.done():
        work.cancel()
        await asyncio.wait({work})
        return Response(status_code=499)
    return JSONResponse(work.result())


async def _server_sent(
    client: EngineClient, streams: Sequence[RequestStream], builder: ResponseBuilder
) -> AsyncIterator[str]:
    try:
        async for index, event in client.events(streams):
            if event is None:
                yield ": still here\n\n"  # keeps proxies from closing, and notices a client that has left
            else:
                for text in await builder.add(index, event):
                    yield text
    except ApiError as error:
        yield server_sent_event(error.content, "error")
    else:
        for text in builder.closing():
            yield text


def server_sent_event(content: dict[str, Any], name: str | None = None) -> str:
    """Return JSON as one server-sent event."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(content)}\n\n"


async def encode_png(pixels: np.ndarray | None, settings: dict[str, Any] | None = None) -> str:
    """Return uint8 pixels `[row, column, 3]` as base64 of a PNG: with its settings, or as a preview, quickly made."""

    def encode() -> str:
        assert pixels is not None, "a worker sends pixels with every image"
        file, image = io.BytesIO(), PIL.Image.fromarray(pixels)
        if settings is None:
            image.save(file, format="PNG", compress_level=1)
        else:
            save_png(image, file, settings)
        return base64.b64encode(file.getvalue()).decode()

    return await asyncio.to_thread(encode)


class ChatResponse:
    """A `chat.completion`, or its chunks."""

    def __init__(self, model: str, body: ChatRequest, stream: RequestStream) -> None:
        self.request, self.stream = body, stream
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.seed = stream.job.settings["seed"]
        self.parts: list[dict[str, Any]] = []
        self.role_sent = False
        self.done: Done

    async def add(self, index: int, event: Event) -> list[str]:
        match event:
            case TextDelta(text=text):
                if self.parts and self.parts[-1]["type"] == "text":
                    self.parts[-1]["text"] += text
                else:
                    self.parts.append({"type": "text", "text": text})
                return [self._delta({"content": text})]
            case ImageEnd(pixels=pixels, settings=settings):
                url = f"data:image/png;base64,{await encode_png(pixels, settings)}"
                part = {"type": "image_url", "image_url": {"url": url}}
                self.parts.append(part)
                return [self._delta({"images": [{**part, "settings": settings}]})]
            case ImageProgress(image=image, step=step, total=total, pixels=pixels):
                progress: dict[str, Any] = {"image": image, "step": step, "total": total}
                if pixels is not None:
                    progress["preview"] = f"data:image/png;base64,{await encode_png(pixels)}"
                return [self._chunk({}, progress=progress)]
            case Done():
                self.done = event
        return []

    def _delta(self, delta: dict[str, Any]) -> str:
        role = {} if self.role_sent else {"role": "assistant"}
        self.role_sent = True
        return self._chunk({**role, **delta})

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return server_sent_event({**self.head, "object": "chat.completion.chunk", "choices": [choice], **more})

    @property
    def finish_reason(self) -> str:
        return "length" if self.done.reason == "length" else "stop"

    def body(self) -> dict[str, Any]:
        images = [part for part in self.parts if part["type"] == "image_url"]
        text = "".join(part["text"] for part in self.parts if part["type"] == "text")
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self.request.content_format == "parts":
            message["content"] = self.parts
        elif images:
            message["images"] = images
        choice = {"index": 0, "message": message, "finish_reason": self.finish_reason, "logprobs": None}
        used = usage([self.stream], [self.done])
        return {**self.head, "object": "chat.completion", "choices": [choice], "usage": used, "seed": self.seed}

    def closing(self) -> list[str]:
        chunks = [self._chunk({}, self.finish_reason, seed=self.seed)]
        if self.request.stream_options is not None and self.request.stream_options.include_usage:
            used = usage([self.stream], [self.done])
            chunk = {**self.head, "object": "chat.completion.chunk", "choices": [], "usage": used}
            chunks.append(server_sent_event(chunk))
        return [*chunks, "data: [DONE]\n\n"]


class ImagesResponse:
    """A list of images, or events of the kinds `KIND.partial_image` and `KIND.completed`."""

    def __init__(self, kind: str, body: ImagesRequest, streams: Sequence[RequestStream]) -> None:
        self.kind, self.streams, self.most = kind, streams, body.partial_images or 0
        self.created = int(time.time())
        self.images: dict[int, dict[str, Any]] = {}
        self.done: dict[int, Done] = {}
        self.previews = [0] * len(streams)

    async def add(self, index: int, event: Event) -> list[str]:
        match event:
            case ImageProgress(pixels=pixels) if pixels is not None and self.previews[index] < self.most:
                number = self.previews[index]
                self.previews[index] += 1
                preview = await encode_png(pixels)
                return [self._event("partial_image", index, partial_image_index=number, b64_json=preview)]
            case ImageEnd(pixels=pixels, settings=settings):
                assert settings is not None
                content = await encode_png(pixels, settings)
                self.images[index] = {"b64_json": content, "seed": settings["seed"], "settings": settings}
            case Done():
                self.done[index] = event
                used = usage([self.streams[index]], [event])
                return [self._event("completed", index, usage=used, **self.images[index])]
        return []

    def _event(self, name: str, index: int, **more: Any) -> str:
        kind = f"{self.kind}.{name}"
        body = {"type": kind, "created_at": self.created, "output_format": "png", "image_index": index, **more}
        return server_sent_event(body, kind)

    def body(self) -> dict[str, Any]:
        order = range(len(self.streams))
        used = usage(self.streams, [self.done[index] for index in order])
        images = [self.images[index] for index in order]
        return {"created": self.created, "data": images, "output_format": "png", "usage": used}

    def closing(self) -> list[str]:
        return []


def usage(streams: Sequence[RequestStream], done: Sequence[Done]) -> dict[str, Any]:
    """Return the counts of requests that have ended, by the names of chat and by those of images."""
    prompt = sum(stream.prompt_tokens for stream in streams)
    text, images = sum(end.text_tokens for end in done), sum(end.image_positions for end in done)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": text + images,
        "input_tokens": prompt,
        "output_tokens": text + images,
        "total_tokens": prompt + text + images,
        "completion_tokens_details": {"text_tokens": text, "image_tokens": images},
        "network_evaluations": sum(end.network_evaluations for end in done),
    }
