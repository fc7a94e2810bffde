"""The HTTP application: OpenAI-shaped routes over an engine client. docs/serving.md lists what each takes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import generate_latest
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from ..errors import UserError
from ..version import __version__
from .engine_client import EngineClient, RequestStream
from .intake import KINDS, Intake
from .middleware import AccessConfig, Exchange, Middleware
from .protocol import ApiError
from .responses import chat_content, images_content, respond

PAGE_POLICY = (
    "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'"
)
NAMES = {"image size": "size", "steps": "num_inference_steps"}
"""fields of requests that the engine's errors name otherwise"""
ROUTES = {"/v1/chat/completions": "chat", "/v1/images/generations": "images", "/v1/images/edits": "edits"}


def build(client: EngineClient, access: Callable[[], AccessConfig], aliases: tuple[str, ...] = ()) -> FastAPI:
    """Return the application; while it runs, the engine client does. `access` gives the limits as they are now."""
    intake = Intake()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        client.start()
        yield
        intake.stop()
        await client.stop()

    async def on_error(request: Request, error: Exception) -> JSONResponse:
        """Respond in OpenAI's shape: one line that names the field, if the request is at fault."""
        if isinstance(error, UserError):
            message = str(error).removeprefix("request: ")
            field, colon, _ = message.partition(": ")
            error = ApiError(400, message, "invalid_request", NAMES.get(field, field) if colon else None)
        elif isinstance(error, HTTPException) and not isinstance(error, ApiError):
            error = ApiError(error.status_code, f"{request.method} {request.url.path[:200]}: {error.detail}")
        assert isinstance(error, ApiError)
        return error.response()

    app = FastAPI(title="Transfuse", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Middleware, client=client, config=access)
    if origins := access().origins:
        exposed = ["x-request-id", "retry-after"]
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"], expose_headers=exposed
        )
    for kind in (HTTPException, UserError):
        app.add_exception_handler(kind, on_error)
    add_operations(app, client, aliases)
    add_generation(app, client, intake, aliases)
    app.openapi = lambda: with_bodies(app)  # type: ignore[method-assign]
    return app


def with_bodies(app: FastAPI) -> dict[str, Any]:
    """Return the schema of all routes, with the bodies that `intake` reads."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        models, shared = models_json_schema(
            [(kind, "validation") for kind in KINDS.values()], ref_template="#/components/schemas/{model}"
        )
        schema.setdefault("components", {}).setdefault("schemas", {}).update(shared["$defs"])
        for path, name in ROUTES.items():
            media = "multipart/form-data" if name == "edits" else "application/json"
            content = {media: {"schema": models[KINDS[name], "validation"]}}
            schema["paths"][path]["post"]["requestBody"] = {"required": True, "content": content}
        app.openapi_schema = schema
    return app.openapi_schema


def add_operations(app: FastAPI, client: EngineClient, aliases: tuple[str, ...]) -> None:
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
        names = [client.require_model()["name"], *aliases]
        return {"object": "list", "data": [await model(name) for name in names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        check_model(client, name, aliases)
        about = dict(client.require_model())
        del about["name"]
        return {"id": name, "object": "model", "created": started, "owned_by": "transfuse", "transfuse": about}


def check_model(client: EngineClient, name: str | None, aliases: tuple[str, ...]) -> None:
    """Raise ApiError if a request names another model."""
    served = client.require_model()["name"]
    if name not in (None, served, *aliases):
        message = f"model: expected {served!r}, which is served here, found {str(name)[:100]!r}"
        raise ApiError(404, message, "model_not_found", "model")


def add_generation(app: FastAPI, client: EngineClient, intake: Intake, aliases: tuple[str, ...]) -> None:
    """Add the routes that write and draw."""

    async def submit(request: Request, kind: str) -> tuple[Any, list[RequestStream], Exchange]:
        """Read a request and submit its jobs; its deadline counts from its first byte."""
        exchange: Exchange = request.scope["exchange"]
        body, rest = list[bytes](), bytearray()
        async for piece in request.stream():
            rest += piece
            if len(rest) >= 1_000_000:  # pieces of this size take least time to send to a process
                body.append(bytes(rest))
                rest.clear()
        body.append(bytes(rest))
        deadline = exchange.began + client.limits.deadline
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                content_type = request.headers.get("content-type", "")
                read, jobs = await intake.read(exchange.client, kind, content_type, body, client.require_model())
        except TimeoutError:
            raise ApiError(504, "the deadline passed before the request was read", retry_after=1) from None
        finally:
            del body, rest
            exchange.read()
        check_model(client, read.model, aliases)
        deadline = min(deadline, exchange.began + (read.timeout or client.limits.deadline))
        return read, await client.submit(jobs, exchange.client, exchange.share, deadline), exchange

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        """Continue messages of words and pictures, in words and pictures."""
        body, (stream,), exchange = await submit(request, "chat")
        content = chat_content(client, stream, body, client.require_model()["name"], exchange)
        return await respond(request, content, body.stream, "data: [DONE]\n\n")

    @app.post("/v1/images/generations")
    async def generations(request: Request) -> Response:
        """Draw pictures for a prompt."""
        body, streams, exchange = await submit(request, "images")
        return await respond(request, images_content(client, streams, body, "image_generation", exchange), body.stream)

    @app.post("/v1/images/edits")
    async def edits(request: Request) -> Response:
        """Change pictures: by an instruction, by strength, or within a mask."""
        body, streams, exchange = await submit(request, "edits")
        return await respond(request, images_content(client, streams, body, "image_edit", exchange), body.stream)
