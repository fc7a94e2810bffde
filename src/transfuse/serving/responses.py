"""Responses in OpenAI's shapes, built from a request's events: one JSON object, or a stream of server-sent events."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import numpy as np
import PIL.Image
from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from ..images import save_png
from ..inference.events import Done, ImageEnd, ImageProgress, TextDelta
from .engine_client import EngineClient, RequestStream
from .middleware import Exchange
from .protocol import ApiError, ChatRequest, ImagesRequest

Content = AsyncGenerator[dict[str, Any] | None, None]
"""the JSON of each server-sent event of a stream, None where nothing has happened for a while; or one whole response"""


def unknown_words(streams: Sequence[RequestStream]) -> dict[str, Any]:
    """Return the field of a reply with an image that names the prompt's words which training never showed, if any."""
    words = [word for stream in streams for reading in stream.accepted.readings for word in reading.unknown]
    return {"unknown_words": [*dict.fromkeys(words)]} if words else {}


async def respond(request: Request, content: Content, stream: bool | None, end: str = "") -> Response:
    """Send content. If the client leaves, streaming or not, the content is closed, which cancels the request."""
    if stream:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(_server_sent(content, end), media_type="text/event-stream", headers=headers)

    async def whole() -> dict[str, Any]:
        async with aclosing(content):
            return [item async for item in content if item is not None][-1]

    async def disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, gone = asyncio.ensure_future(whole()), asyncio.ensure_future(disconnect())
    await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
    gone.cancel()
    if not work.done():
        work.cancel()
        await asyncio.wait({work})
        return Response(status_code=499)
    return JSONResponse(work.result())


async def _server_sent(content: Content, end: str) -> AsyncGenerator[str, None]:
    """Write content as server-sent events, named by its "type" if it has one; an error is the last of them."""
    try:
        async with aclosing(content):
            async for item in content:
                if item is None:
                    yield ": still here\n\n"  # keeps proxies from closing, and notices a client that has left
                else:
                    name = f"event: {item['type']}\n" if "type" in item else ""
                    yield f"{name}data: {json.dumps(item)}\n\n"
    except ApiError as error:
        yield f"event: error\ndata: {json.dumps(error.content)}\n\n"
    else:
        if end:
            yield end


def to_png(pixels: np.ndarray | None, settings: dict[str, Any] | None = None) -> str:
    """Return uint8 pixels `[row, column, 3]` as base64 of a PNG: with its settings, or as a preview, quickly made."""
    assert pixels is not None, "a worker sends pixels with every image"
    file, image = io.BytesIO(), PIL.Image.fromarray(pixels)
    if settings is None:
        image.save(file, format="PNG", compress_level=1)
    else:
        save_png(image, file, settings)
    return base64.b64encode(file.getvalue()).decode()


async def chat_content(
    client: EngineClient, stream: RequestStream, body: ChatRequest, model: str, exchange: Exchange
) -> Content:
    """Yield a `chat.completion`, or its chunks where the request asks for a stream."""
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model or model}
    chunk = {**head, "object": "chat.completion.chunk"}
    seed = stream.job.settings["seed"]
    parts: list[dict[str, Any]] = []
    logprobs: list[dict[str, Any]] = []
    if body.stream:
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        yield {**chunk, "choices": [choice]}
    async with aclosing(client.events([stream])) as events:
        async for _, event in events:
            delta: dict[str, Any] = {}
            more: dict[str, Any] = {}
            token: list[dict[str, Any]] = []
            match event:
                case TextDelta(text=text):
                    token = [token_logprobs(event)] if event.logprob is not None else []
                    logprobs += token
                    if not parts or parts[-1]["type"] != "text":
                        parts.append({"type": "text", "text": ""})
                    parts[-1]["text"] += text
                    delta = {"content": text}
                case ImageEnd(pixels=pixels, settings=settings):
                    url = f"data:image/png;base64,{await asyncio.to_thread(to_png, pixels, settings)}"
                    parts.append({"type": "image_url", "image_url": {"url": url}})
                    request = next((part for part in reversed(stream.job.parts) if isinstance(part, str)), None)
                    read = stream.accepted.readings[-1].text if stream.accepted.readings else request
                    revised = {} if read == request else {"revised_prompt": read}
                    delta = {"images": [{**parts[-1], "settings": settings, **revised}]}
                case ImageProgress(image=image, step=step, total=total, pixels=pixels):
                    more = {"progress": {"image": image, "step": step, "total": total}}
                    if pixels is not None:
                        preview = await asyncio.to_thread(to_png, pixels)
                        more["progress"]["preview"] = f"data:image/png;base64,{preview}"
                case Done():
                    done = event
                    break
            if body.stream:
                choice = {"index": 0, "delta": delta, "finish_reason": None}
                choice |= {"logprobs": {"content": token, "refusal": None}} if body.logprobs else {}
                yield None if event is None else {**chunk, "choices": [choice], **more}
    finish_reason = "length" if done.reason == "length" else "stop"
    used = usage([stream], [done])
    exchange.counts = {"tokens": done.text_tokens, "images": done.images}
    more = {"seed": seed, **(unknown_words([stream]) if done.images else {})}
    if body.stream:
        yield {**chunk, "choices": [{"index": 0, "delta": {}, "finish_reason": finish_reason}], **more}
        if body.stream_options is not None and body.stream_options.include_usage:
            yield {**chunk, "choices": [], "usage": used}
        return
    images = [part for part in parts if part["type"] == "image_url"]
    text = "".join(part["text"] for part in parts if part["type"] == "text")
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if body.content_format == "parts":
        message["content"] = parts
    elif images:
        message["images"] = images
    choice = {"index": 0, "message": message, "finish_reason": finish_reason, "logprobs": None}
    if body.logprobs:
        choice["logprobs"] = {"content": logprobs, "refusal": None}
    yield {**head, "object": "chat.completion", "choices": [choice], "usage": used, **more}


def token_logprobs(event: TextDelta) -> dict[str, Any]:
    """Return a token and the most probable ones in OpenAI's shape; `bytes` is None for a part of a character."""
    values = [event.logprob, *(logprob for _, logprob in event.top_logprobs)]
    entries = [
        {"token": text, "logprob": value, "bytes": None if "\ufffd" in text else [*text.encode()]}
        for text, value in zip(event.texts, values, strict=True)
    ]
    return {**entries[0], "top_logprobs": entries[1:]}


async def images_content(
    client: EngineClient, streams: Sequence[RequestStream], body: ImagesRequest, kind: str, exchange: Exchange
) -> Content:
    """Yield a list of images; where the request asks for a stream, events `KIND.partial_image` and `KIND.completed`."""
    head: dict[str, Any] = {"created_at": int(time.time()), "output_format": "png"}
    head |= {"quality": "auto", "background": "opaque"}
    images: dict[int, dict[str, Any]] = {}
    ended: dict[int, Done] = {}
    previews, most = [0] * len(streams), body.partial_images or 0
    async with aclosing(client.events(streams)) as events:
        async for index, event in events:
            item: dict[str, Any] | None = None
            match event:
                case ImageProgress(pixels=pixels) if pixels is not None and previews[index] < most:
                    preview = await asyncio.to_thread(to_png, pixels)
                    item = {"type": f"{kind}.partial_image", "partial_image_index": previews[index]}
                    item |= {"b64_json": preview, "size": size_of(pixels)}
                    previews[index] += 1
                case ImageEnd(pixels=pixels, settings=settings):
                    assert settings is not None
                    content = await asyncio.to_thread(to_png, pixels, settings)
                    images[index] = {"b64_json": content, "seed": settings["seed"], "settings": settings}
                    size = size_of(pixels)
                    if (read := streams[index].accepted.readings[-1].text) != body.prompt:
                        images[index]["revised_prompt"] = read
                case Done():
                    ended[index] = event
                    exchange.counts["tokens"] = sum(end.text_tokens for end in ended.values())
                    exchange.counts["images"] = sum(end.images for end in ended.values())
                    item = {"type": f"{kind}.completed", "usage": usage([streams[index]], [event]), **images[index]}
                    item |= {"size": size, **unknown_words(streams)}
            if body.stream and (item is not None or event is None):
                yield None if item is None else {**head, "image_index": index, **item}
    if not body.stream:
        order = range(len(streams))
        used = usage(streams, [ended[index] for index in order])
        data = [images[index] for index in order]
        known = {"created": head.pop("created_at"), **head, "size": size, **unknown_words(streams)}
        yield {**known, "data": data, "usage": used}


def size_of(pixels: np.ndarray | None) -> str:
    """Return the size of an image `[row, column, 3]` as columns x rows, such as 64x64."""
    assert pixels is not None, "a worker sends pixels with every image"
    return f"{pixels.shape[1]}x{pixels.shape[0]}"


def usage(streams: Sequence[RequestStream], done: Sequence[Done]) -> dict[str, Any]:
    """Return the counts of requests that have ended, by the names of chat and by those of images."""
    prompt = sum(stream.accepted.prompt_tokens for stream in streams)
    of_images = sum(stream.accepted.image_tokens for stream in streams)
    details = {"text_tokens": prompt - of_images, "image_tokens": of_images}
    text, images = sum(end.text_tokens for end in done), sum(end.image_positions for end in done)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": text + images,
        "input_tokens": prompt,
        "output_tokens": text + images,
        "total_tokens": prompt + text + images,
        "completion_tokens_details": {"text_tokens": text, "image_tokens": images},
        "prompt_tokens_details": details,
        "input_tokens_details": details,
        "network_evaluations": sum(end.network_evaluations for end in done),
    }
