"""The HTTP face: OpenAI-shaped routes over a backend. docs/serving.md says what each takes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from ..errors import UserError
from ..version import __version__
from . import pictures
from .answers import Chat, Images, answer
from .backend import Backend, Unavailable
from .gate import Gate, GateConfig, Problem
from .protocol import ChatRequest, EditRequest, ImagesRequest

FILES = ("image", "image[]", "mask")


def build(backend: Backend, gate: GateConfig) -> FastAPI:
    """The application; while it runs, the backend does."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        backend.start()
        yield
        await backend.stop()

    app = FastAPI(title="Transfuse", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.backend = backend
    app.add_middleware(Gate, backend=backend, config=gate)
    _handlers(app)
    _operations(app, backend)
    _models(app, backend)
    _work(app, backend)
    return app


def _handlers(app: FastAPI) -> None:
    """Every way to fail, in OpenAI's shape: one line, and never a traceback."""

    def reply(problem: Problem) -> JSONResponse:
        return JSONResponse(problem.content, problem.status, problem.headers)

    @app.exception_handler(Problem)
    async def on_problem(request: Request, error: Problem) -> JSONResponse:
        return reply(error)

    @app.exception_handler(UserError)
    async def on_user_error(request: Request, error: UserError) -> JSONResponse:
        return reply(Problem(400, str(error), "invalid_request", str(error).partition(":")[0]))

    @app.exception_handler(Unavailable)
    async def on_unavailable(request: Request, error: Unavailable) -> JSONResponse:
        return reply(Problem.of(error))

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return reply(_invalid(error.errors(), skip=1))

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> JSONResponse:
        return reply(Problem(error.status_code, f"{request.method} {request.url.path[:200]}: {error.detail}"))


def _invalid(errors: Any, skip: int = 0) -> Problem:
    """The first of pydantic's complaints, which names the field."""
    first = errors[0]
    where = ".".join(str(part) for part in first["loc"][skip:]) or "body"
    found = first.get("input")
    shown = "" if isinstance(found, (dict, list)) or first["type"] == "missing" else f", found {str(found)[:60]!r}"
    message = f"{where}: {first['msg'][:1].lower()}{first['msg'][1:]}{shown}".removeprefix("body: body")
    return Problem(400, message.replace("\n", " "), "invalid_request", where)


def _operations(app: FastAPI, backend: Backend) -> None:
    page = (files(__package__) / "page.html").read_text()

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        policy = "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
        return HTMLResponse(page, headers={"Content-Security-Policy": f"{policy}; connect-src 'self'; base-uri 'none'"})

    @app.get("/health")
    async def health() -> dict[str, str]:
        """The process lives."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        """There is a model, and new requests are taken."""
        backend.check_ready()
        return {"status": "ready"}

    @app.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(backend.metrics.text(), media_type="text/plain; version=0.0.4")


def _models(app: FastAPI, backend: Backend) -> None:
    started = int(time.time())

    def entry() -> dict[str, Any]:
        facts = backend.known()
        about = {name: value for name, value in facts.items() if name != "name"}
        return {"id": facts["name"], "object": "model", "created": started, "owned_by": "transfuse", "transfuse": about}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [entry()]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        _check_model(backend, name)
        return entry()


def _check_model(backend: Backend, name: str | None) -> None:
    served = backend.known()["name"]
    if name not in (None, served):
        raise Problem(
            404, f"model: expected {served!r}, which is served here, found {name[:100]!r}", "model_not_found", "model"
        )


def _work(app: FastAPI, backend: Backend) -> None:
    @app.post("/v1/chat/completions")
    async def chat(request: Request, asked: ChatRequest) -> Response:
        """Go on from messages of words and pictures, in words and pictures."""
        _check_model(backend, asked.model)
        job = await asyncio.to_thread(asked.to_job)
        ticket = await backend.submit(job, asked.timeout)
        shape = Chat(backend.known()["name"], asked, ticket)
        return await answer(request, backend, [ticket], shape, bool(asked.stream))

    @app.post("/v1/images/generations")
    async def generations(request: Request, asked: ImagesRequest) -> Response:
        """Draw pictures for a prompt."""
        _check_model(backend, asked.model)
        return await _images(request, backend, asked.jobs([], backend.known()["steps"]), asked, "image_generation")

    @app.post("/v1/images/edits", openapi_extra=_form_schema())
    async def edits(request: Request) -> Response:
        """Draw pictures from pictures: by instruction, by strength, where a mask says."""
        asked, images, mask = await _form(request)
        _check_model(backend, asked.model)
        steps = backend.known()["steps"]
        if asked.strength is None and mask is None:
            jobs = asked.jobs(images, steps)
        else:
            if len(images) != 1:
                raise UserError(f"image: expected one with strength or mask, found {len(images)}")
            strength = 1.0 if asked.strength is None else asked.strength
            jobs = asked.jobs([], steps, start=images[0], mask=mask, strength=strength)
        return await _images(request, backend, jobs, asked, "image_edit")


async def _images(request: Request, backend: Backend, jobs: list[Any], asked: ImagesRequest, kind: str) -> Response:
    """Submit all jobs, or none."""
    tickets: list[Any] = []
    try:
        for job in jobs:
            tickets.append(await backend.submit(job, asked.timeout))
    except BaseException:
        for ticket in tickets:
            backend.cancel(ticket)
        raise
    return await answer(request, backend, tickets, Images(kind, asked, tickets), bool(asked.stream))


async def _form(request: Request) -> tuple[EditRequest, list[np.ndarray], np.ndarray | None]:
    """The fields and files of an edit. Raises Problem, UserError."""
    try:
        async with request.form(max_files=17, max_fields=40, max_part_size=1 << 20) as form:
            fields = {name: value for name, value in form.multi_items() if name not in FILES}
            uploads = [(name, value) for name, value in form.multi_items() if name in FILES]
            for name, value in uploads:
                if not isinstance(value, UploadFile):
                    raise UserError(f"{name}: expected a file, found text")
            contents = [(name, await value.read()) for name, value in uploads if isinstance(value, UploadFile)]
    except HTTPException as error:
        raise Problem(400, f"body: {error.detail}", "invalid_request", "body") from None
    try:
        # All of a form is text, and what is empty is not given.
        asked = EditRequest.model_validate({name: None if value == "" else value for name, value in fields.items()})
    except ValidationError as error:
        raise _invalid(error.errors()) from None
    files = [content for name, content in contents if name != "mask"]
    masks = [content for name, content in contents if name == "mask"]
    if not files:
        raise UserError("image: expected a file, found none")
    if len(masks) > 1:
        raise UserError(f"mask: expected one, found {len(masks)}")
    images = [await asyncio.to_thread(pictures.decode, content, "image") for content in files]
    mask = await asyncio.to_thread(pictures.decode_mask, masks[0], "mask", images[0]) if masks else None
    return asked, images, mask


def _form_schema() -> dict[str, Any]:
    schema = EditRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    file = {"type": "string", "format": "binary"}
    schema["properties"] |= {"image": file, "mask": file}
    schema["required"] = [*schema.get("required", []), "image"]
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}
