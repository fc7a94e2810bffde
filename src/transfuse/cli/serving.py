"""`transfuse serve`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from ..config import nearest
from ..errors import UserError, install_command
from ..folders import bundled_models, is_export
from ..log import set_format
from .options import Config, Flat
from .writing import ModelChoice, default_model


@dataclass(frozen=True)
class ServeOptions:
    """Options of a server."""

    host: str = "127.0.0.1"
    """address to listen on; 0.0.0.0: all of this machine's"""
    port: int = 8000
    names: tuple[str, ...] = ()
    """more host names that clients may use; on all addresses, any name unless this lists some"""
    cors: tuple[str, ...] = ()
    """other sites whose pages may send requests, such as https://chat.example; "*": all"""
    root_path: str = ""
    """prefix of all paths under a proxy: /transfuse"""
    keys: Path | None = None
    """file of the keys that clients need: lines name:key, or TOML with limits for each"""
    model_alias: tuple[str, ...] = ()
    """other names by which requests may ask for the model"""
    tls_cert: Path | None = None
    """certificate chain (PEM), for https"""
    tls_key: Path | None = None
    """its private key (PEM), if it is not in the same file"""
    log_format: Literal["text", "json"] = "text"
    """one line a request, for people or for programs"""
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
    client_share: float = 0.75
    """most of either that one client may hold, a key or else an address"""
    max_connections: int = 512
    """most connections; half of them from one address"""
    max_body: int = 32_000_000
    """most bytes of a request"""
    deadline: float = 300.0
    """seconds for a request, from its first byte and waiting included"""
    drain: float = 30.0
    """seconds to finish what runs before stopping"""


def serve(*, model: ModelChoice, options: Annotated[ServeOptions, Flat], config: Config = None) -> int:
    """Serve a model over HTTP to many clients at once, with a page to try it.

    $ transfuse serve --model runs/demo/export --port 8000

    Ctrl-C or SIGTERM finishes what runs, then stops; a second one stops at once. SIGHUP reads the keys, the
    certificate and the model again, and drops no request. If --keys or TRANSFUSE_API_KEYS (keys, or name:key,
    separated by commas) gives some, clients must send one of them.
    """
    for name in ("slots", "max_requests", "max_cost", "client_share", "max_connections", "max_body", "deadline"):
        if getattr(options, name) <= 0:
            raise UserError(f"serve: --{name.replace('_', '-')}: expected above 0, found {getattr(options, name)}")
    if not 0 <= options.port < 65536:
        raise UserError(f"serve: --port: expected 0 to 65535, found {options.port}")
    if options.tls_key is not None and options.tls_cert is None:
        raise UserError("serve: --tls-cert: expected a certificate with --tls-key, found none")
    folder = model.model or default_model()
    if not is_export(folder):
        hint = nearest(str(folder), bundled_models(), "")
        raise UserError(f"{folder}: expected an export folder with a config.json, found none{hint}")
    try:
        from ..serving.engine_client import QueueConfig
        from ..serving.middleware import LOOPBACK, AccessConfig, read_keys
        from ..serving.server import ServerConfig, run
        from ..serving.worker import WorkerConfig
    except ModuleNotFoundError as error:
        wanted = f"the extra serve ({install_command('serve')})"
        raise UserError(f"serve: expected {wanted}, found no {error.name}") from None
    set_format(options.log_format)
    everywhere = options.host in ("0.0.0.0", "::")
    hosts = options.names if everywhere else tuple(dict.fromkeys((*LOOPBACK, options.host, *options.names)))

    def access() -> AccessConfig:
        keys = read_keys(options.keys, os.environ.get("TRANSFUSE_API_KEYS", ""))
        root = options.root_path.rstrip("/")
        return AccessConfig(keys, hosts, options.cors, options.max_body, 4 * options.max_body, root_path=root)

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
        QueueConfig(options.max_requests, options.max_cost, options.client_share, options.deadline),
        access,
        ServerConfig(
            options.host,
            options.port,
            options.drain,
            options.tls_cert,
            options.tls_key,
            options.model_alias,
            options.max_connections,
        ),
    )
