"""The HTTP application: OpenAI-shaped routes over an engine client. docs/serving.md lists what each takes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Annotated, Any

from fastapi import FastAPI, Form, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException

from ..errors import UserError
from ..version import __version__
from .engine_client import EngineClient
from .middleware import AccessConfig, Middleware
from .protocol import ApiError, ChatRequest, EditRequest, ImagesRequest
from .responses import chat_content, images_content, respond

PAGE_POLICY = (
    "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'"
)


def build(client: EngineClient, access: AccessConfig) -> FastAPI:
    """Return the application; while it runs, the engine client does."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        client.start()
        yield
        await client.stop()

    async def on_error(request: Request, error: Exception) -> JSONResponse:
        return to_api_error(request, error).response()

    app = FastAPI(title="Transfuse", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Middleware, client=client, config=access)
    for kind in (HTTPException, UserError, RequestValidationError):
        app.add_exception_handler(kind, on_error)
    add_operations(app, client)
    add_generation(app, client)
    return app


def to_api_error(request: Request, error: Exception) -> ApiError:
    """Return an error in OpenAI's shape: one line that names the field, if the request is at fault."""
    match error:
        case ApiError():
            return error
        case UserError():
            return ApiError(400, str(error), "invalid_request", str(error).partition(":")[0])
        case RequestValidationError():
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"][1:]) or "body"
            reason, value = first["msg"].removeprefix("Value error, ").replace("\n", " "), first.get("input")
            message = f"{field}: {reason[:1].lower()}{reason[1:]}"
            if first["type"] not in ("missing", "value_error") and not isinstance(value, dict | list):
                message += f", found {str(value)[:60]!r}"
            return ApiError(400, message, "invalid_request", field)
        case HTTPException(status_code=400):
            return ApiError(400, f"body: {error.detail}", "invalid_request", "body")
        case HTTPException():
            return ApiError(error.status_code, f"{request.method} {request.url.path[:200]}: {error.detail}")
    raise error


def add_operations(app: FastAPI, client: EngineClient) -> None:
    """Add the page, the model's description, and what an operator watches."""
    page = (files(__package__) / "page.html").read_text(encoding="utf-8")
    started = int(time.time())

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_POLICY})

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Reply while the process lives."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        """Reply if there is a model and new requests are accepted."""
        client.check_ready()
        return {"status": "ready"}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Return the counts in Prometheus's format."""
        return Response(generate_latest(client.metrics.registry), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        name = client.require_model()["name"]
        return {"object": "list", "data": [await model(name)]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        check_model(client, name)
        about = dict(client.require_model())
        entry = {"id": about.pop("name"), "object": "model", "created": started, "owned_by": "transfuse"}
        return {**entry, "transfuse": about}


def check_model(client: EngineClient, name: str | None) -> None:
    """Raise ApiError if a request names another model."""
    served = client.require_model()["name"]
    if name not in (None, served):
        message = f"model: expected {served!r}, which is served here, found {str(name)[:100]!r}"
        raise ApiError(404, message, "model_not_found", "model")


def add_generation(app: FastAPI, client: EngineClient) -> None:
    """Add the routes that write and draw."""

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatRequest) -> Response:
        """Continue messages of words and pictures, in words and pictures."""
        check_model(client, body.model)
        (stream,) = await client.submit([await asyncio.to_thread(body.job)], body.timeout)
        content = chat_content(client, stream, body, client.require_model()["name"])
        return await respond(request, content, body.stream, "data: [DONE]\n\n")

    @app.post("/v1/images/generations")
    async def generations(request: Request, body: ImagesRequest) -> Response:
        """Draw pictures for a prompt."""
        return await images(request, body, "image_generation")

    @app.post("/v1/images/edits")
    async def edits(request: Request, body: Annotated[EditRequest, Form(media_type="multipart/form-data")]) -> Response:
        """Change pictures: by an instruction, by strength, or within a mask."""
        return await images(request, body, "image_edit")

    async def images(request: Request, body: ImagesRequest, kind: str) -> Response:
        check_model(client, body.model)
        jobs = await asyncio.to_thread(body.jobs, client.require_model()["steps"])
        streams = await client.submit(jobs, body.timeout)
        return await respond(request, images_content(client, streams, body, kind), body.stream)
