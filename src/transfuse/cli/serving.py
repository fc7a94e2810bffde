"""`transfuse serve`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated, Literal

from ..config import nearest
from ..errors import UserError, install_command
from ..folders import bundled_models, is_export
from .options import Flat
from .writing import ModelChoice, default_model


@dataclass(frozen=True)
class ServeOptions:
    """Options of a server."""

    host: str = "127.0.0.1"
    """address to listen on; 0.0.0.0: all of this machine's"""
    port: int = 8000
    names: tuple[str, ...] = ()
    """more host names that clients may use; on all addresses, any name unless this lists some"""
    slots: int = 8
    """requests that run together; their memory is allocated at the start"""
    guidance: Literal["auto", "packed", "sequential"] = "auto"
    """compute the branches of guided images in one pass or one by one; auto: the faster, timed at the start"""
    quantize: Literal["int8", "float8"] | None = None
    """eight-bit weights for the blocks: int8 anywhere, float8 on newer NVIDIA cards (extra: quantize)"""
    compile: bool = False
    """compile the blocks before the first request (torch.compile): half a minute or more"""
    graphs: bool = True
    """on CUDA, record and replay repeated passes (CUDA graphs)"""
    max_requests: int = 64
    """most requests that wait or run; one more gets 429"""
    max_cost: int = 4_000_000
    """most positions that the network may have to compute for all of them; a request beyond it gets 429"""
    max_body: int = 32_000_000
    """most bytes of a request"""
    deadline: float = 300.0
    """seconds for a request, waiting included"""
    drain: float = 30.0
    """seconds to finish what runs before stopping"""


def serve(*, model: ModelChoice, options: Annotated[ServeOptions, Flat]) -> int:
    """Serve a model over HTTP to many clients at once, with a page to try it.

    $ transfuse serve --model runs/demo/export --port 8000

    Ctrl-C or SIGTERM finishes what runs, then stops; a second one stops at once. If TRANSFUSE_API_KEYS is set, to
    keys separated by commas, clients must send one of them.
    """
    for name in ("slots", "max_requests", "max_cost", "max_body", "deadline"):
        if getattr(options, name) <= 0:
            raise UserError(f"serve: --{name.replace('_', '-')}: expected above 0, found {getattr(options, name)}")
    if not 0 <= options.port < 65536:
        raise UserError(f"serve: --port: expected 0 to 65535, found {options.port}")
    folder = model.model or default_model()
    if not is_export(folder):
        hint = nearest(str(folder), bundled_models(), "")
        raise UserError(f"{folder}: expected an export folder with a config.json, found none{hint}")
    try:
        from ..serving.engine_client import QueueConfig
        from ..serving.middleware import LOOPBACK, AccessConfig
        from ..serving.server import run
        from ..serving.worker import WorkerConfig
    except ModuleNotFoundError as error:
        wanted = f"the extra serve ({install_command('serve')})"
        raise UserError(f"serve: expected {wanted}, found no {error.name}") from None
    keys = tuple(key for key in os.environ.get("TRANSFUSE_API_KEYS", "").split(",") if key)
    everywhere = options.host in ("0.0.0.0", "::")
    hosts = options.names if everywhere else (*LOOPBACK, options.host, *options.names)
    return run(
        WorkerConfig(
            str(folder),
            options.slots,
            guidance=None if options.guidance == "auto" else options.guidance,
            quantize=options.quantize,
            compile=options.compile,
            graphs=options.graphs,
            device=model.device,
            precision=model.precision,
        ),
        QueueConfig(options.max_requests, options.max_cost, options.deadline),
        AccessConfig(keys, hosts, options.max_body),
        options.host,
        options.port,
        options.drain,
    )
