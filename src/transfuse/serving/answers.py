"""What is made of a job's messages: whole answers, or streams of server-sent events, in OpenAI's shapes."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from . import pictures
from .backend import Backend, Ticket, Unavailable
from .gate import Problem
from .messages import Drawing, Drawn, Ended, Failed, JobMessage, Said
from .protocol import ChatRequest, ImagesRequest


class Answer(Protocol):
    """An answer as it grows."""

    async def hear(self, index: int, message: JobMessage) -> list[str]:
        """Take in what has happened to the job of that number; the events that say so in a stream."""

    def whole(self) -> dict[str, Any]:
        """All of it, when every job has ended."""

    def last(self) -> list[str]:
        """The events at the end of a stream."""


def event(content: dict[str, Any], name: str | None = None) -> str:
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(content)}\n\n"


async def answer(
    request: Request, backend: Backend, tickets: Sequence[Ticket], shape: Answer, stream: bool
) -> Response:
    """The answer to some jobs. Where the client goes away, streaming or not, the jobs are cancelled."""
    if stream:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(_stream(backend, tickets, shape), media_type="text/event-stream", headers=headers)
    gone = asyncio.ensure_future(_gone(request))
    work = asyncio.ensure_future(_whole(backend, tickets, shape))
    await asyncio.wait({gone, work}, return_when=asyncio.FIRST_COMPLETED)
    for task in (gone, work):
        if not task.done():
            task.cancel()
    if gone.done() and not gone.cancelled() and not work.done():
        await asyncio.wait({work})
        return Response(status_code=499)
    return JSONResponse(await work)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _whole(backend: Backend, tickets: Sequence[Ticket], shape: Answer) -> dict[str, Any]:
    async for index, message in _merged(backend, tickets):
        if isinstance(message, Failed):
            raise _problem(message)
        if message is not None:
            await shape.hear(index, message)
    return shape.whole()


async def _stream(backend: Backend, tickets: Sequence[Ticket], shape: Answer) -> AsyncIterator[str]:
    async for index, message in _merged(backend, tickets):
        if message is None:
            yield ": still here\n\n"  # keeps proxies from closing, and notices a client that is gone
        elif isinstance(message, Failed):
            yield event(_problem(message).content, "error")
            return
        else:
            for line in await shape.hear(index, message):
                yield line
    for line in shape.last():
        yield line


def _problem(failed: Failed) -> Problem:
    return Problem.of(Unavailable(failed.message, failed.status))


async def _merged(backend: Backend, tickets: Sequence[Ticket]) -> AsyncIterator[tuple[int, JobMessage | None]]:
    """Messages of all jobs as they come, each with the number of its job among these. Leaving it cancels them all."""
    inbox: asyncio.Queue[tuple[int, JobMessage | None]] = asyncio.Queue(1)  # so that what waits, waits in the tickets

    async def pump(index: int, ticket: Ticket) -> None:
        async for message in backend.events(ticket):
            await inbox.put((index, message))

    tasks = [asyncio.ensure_future(pump(index, ticket)) for index, ticket in enumerate(tickets)]
    try:
        left = len(tasks)
        while left:
            index, message = await inbox.get()
            left -= isinstance(message, (Ended, Failed))
            yield index, message
    finally:
        for task in tasks:
            task.cancel()
        for ticket in tickets:
            backend.cancel(ticket)


class Chat:
    """`chat.completion`, or its chunks."""

    def __init__(self, model: str, asked: ChatRequest, ticket: Ticket) -> None:
        self.model, self.asked, self.ticket = model, asked, ticket
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.parts: list[dict[str, Any]] = []
        self.ended: Ended | None = None
        self.role_said = False

    async def hear(self, index: int, message: JobMessage) -> list[str]:
        match message:
            case Said(text=text):
                if self.parts and self.parts[-1]["type"] == "text":
                    self.parts[-1]["text"] += text
                else:
                    self.parts.append({"type": "text", "text": text})
                return [self._delta({"content": text})]
            case Drawn(pixels=pixels, settings=settings):
                url = pictures.data_url(await asyncio.to_thread(pictures.png, pixels, settings))
                part = {"type": "image_url", "image_url": {"url": url}}
                self.parts.append(part)
                return [self._delta({"images": [{**part, "settings": settings}]})]
            case Drawing(image=image, step=step, total=total, pixels=pixels):
                progress: dict[str, Any] = {"image": image, "step": step, "total": total}
                if pixels is not None:
                    progress["preview"] = pictures.data_url(await asyncio.to_thread(pictures.preview, pixels))
                return [self._chunk({}, progress=progress)]
            case Ended():
                self.ended = message
        return []

    def _delta(self, delta: dict[str, Any]) -> str:
        role = {} if self.role_said else {"role": "assistant"}
        self.role_said = True
        return self._chunk({**role, **delta})

    def _chunk(self, delta: dict[str, Any], finish: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return event({**self.head, "object": "chat.completion.chunk", "choices": [choice], **more})

    def _finish(self) -> str:
        assert self.ended is not None
        return "length" if self.ended.reason == "length" else "stop"

    def _usage(self) -> dict[str, Any]:
        assert self.ended is not None
        return usage([self.ticket], [self.ended])

    def whole(self) -> dict[str, Any]:
        texts = [part["text"] for part in self.parts if part["type"] == "text"]
        images = [part for part in self.parts if part["type"] == "image_url"]
        message: dict[str, Any] = {"role": "assistant", "content": "".join(texts), "refusal": None}
        if self.asked.content_format == "parts":
            message["content"] = self.parts
        elif images:
            message["images"] = images
        choice = {"index": 0, "message": message, "finish_reason": self._finish(), "logprobs": None}
        seed = self.ticket.job.settings["seed"]
        return {**self.head, "object": "chat.completion", "choices": [choice], "usage": self._usage(), "seed": seed}

    def last(self) -> list[str]:
        lines = [self._chunk({}, self._finish(), seed=self.ticket.job.settings["seed"])]
        if self.asked.stream_options is not None and self.asked.stream_options.include_usage:
            chunk = {**self.head, "object": "chat.completion.chunk", "choices": [], "usage": self._usage()}
            lines.append(event(chunk))
        return [*lines, "data: [DONE]\n\n"]


class Images:
    """A list of pictures, or events of the kinds `KIND.partial_image` and `KIND.completed`."""

    def __init__(self, kind: str, asked: ImagesRequest, tickets: Sequence[Ticket]) -> None:
        self.kind, self.asked, self.tickets = kind, asked, tickets
        self.created = int(time.time())
        self.data: dict[int, dict[str, Any]] = {}
        self.ended: dict[int, Ended] = {}
        self.shown = [0] * len(tickets)

    async def hear(self, index: int, message: JobMessage) -> list[str]:
        match message:
            case Drawing(pixels=pixels) if pixels is not None and self.shown[index] < (self.asked.partial_images or 0):
                content = await asyncio.to_thread(pictures.preview, pixels)
                number, self.shown[index] = self.shown[index], self.shown[index] + 1
                return [self._event("partial_image", index, content, partial_image_index=number)]
            case Drawn(pixels=pixels, settings=settings):
                content = await asyncio.to_thread(pictures.png, pixels, settings)
                self.data[index] = {"b64_json": content, "seed": settings["seed"], "settings": settings}
            case Ended():
                self.ended[index] = message
                used = usage([self.tickets[index]], [message])
                return [self._event("completed", index, usage=used, **self.data[index])]
        return []

    def _event(self, what: str, index: int, content: str | None = None, **more: Any) -> str:
        name = f"{self.kind}.{what}"
        body = {"type": name, "created_at": self.created, "output_format": "png", "image_index": index, **more}
        return event(body if content is None else {**body, "b64_json": content}, name)

    def whole(self) -> dict[str, Any]:
        data = [self.data[index] for index in range(len(self.tickets))]
        used = usage(self.tickets, [self.ended[index] for index in range(len(self.tickets))])
        return {"created": self.created, "data": data, "output_format": "png", "usage": used}

    def last(self) -> list[str]:
        return []


def usage(tickets: Sequence[Ticket], ended: Sequence[Ended]) -> dict[str, Any]:
    """In both of OpenAI's vocabularies: chat's and images'."""
    prompt = sum(ticket.prompt for ticket in tickets)
    text, images = sum(end.text_tokens for end in ended), sum(end.image_positions for end in ended)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": text + images,
        "input_tokens": prompt,
        "output_tokens": text + images,
        "total_tokens": prompt + text + images,
        "completion_tokens_details": {"text_tokens": text, "image_tokens": images},
        "network_evaluations": sum(end.evaluations for end in ended),
    }
