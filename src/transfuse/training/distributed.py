"""The processes of a run: this one's rank, collectives, sharded tensors, and signals that stop the run.

    python -m transfuse train demo                                  one process, rank 0 of 1: nothing is sent
    torchrun --nproc-per-node 8 -m transfuse train demo             eight processes

A run has replicate x shard x tensor processes. Those of one `tensor` group work on the same data; the others, the data
ranks, each work on their part of every step.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..errors import UserError
from ..log import quiet

T = TypeVar("T")

RESUMABLE = 75
"""exit code of a run that was stopped and saved: the same command resumes it (EX_TEMPFAIL)"""
TIMEOUT = timedelta(minutes=30)  # how long a rank waits for the others


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Turn SIGINT, SIGTERM and SIGUSR1 (not on Windows) into a request to stop after the current step.

    Yields a function that returns True from the first signal on; a second Ctrl-C raises KeyboardInterrupt.
    """
    requested = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal requested
        if requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        requested = True

    names = ("SIGINT", "SIGTERM", "SIGUSR1") if threading.current_thread() is threading.main_thread() else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]  # Python: only in the main thread
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield lambda: requested
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@dataclass(frozen=True, eq=False)
class Distributed:
    """The process group of a run: this is process `rank` of `count`.

    mesh            device mesh with axes `replicate`, `shard`, `tensor`; None for a single process
    data, datas     this data rank, and the number of data ranks
    elastic         started by torchrun, which restarts all processes if one fails
    objects, saving CPU groups for Python objects, and for checkpoints written by a thread
    peers           the data ranks that hold the same part of the network's matrices
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    count: int = 1
    mesh: DeviceMesh | None = None
    data: int = 0
    datas: int = 1
    elastic: bool = False
    objects: dist.ProcessGroup | None = None
    saving: dist.ProcessGroup | None = None
    peers: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """True for the process that writes files and messages."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the data ranks, in place."""
        if self.mesh is not None:
            dist.all_reduce(tensor, group=self.peers)
        return tensor

    def sum_all(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place."""
        if self.mesh is not None:
            dist.all_reduce(tensor)
        return tensor

    def gather_all(self, value: T) -> list[T]:
        """Return the values of all ranks, in order."""
        values: list[Any] = [value] * self.count
        if self.mesh is not None:
            dist.all_gather_object(values, value, group=self.objects)
        return values

    def gather(self, value: T) -> list[T]:
        """Return the values of all data ranks, in order."""
        return self.gather_all(value)[:: self.count // self.datas]

    def broadcast(self, value: T) -> T:
        """Return rank 0's value on every rank."""
        values: list[T] = [value]
        if self.mesh is not None:
            dist.broadcast_object_list(values, src=0, group=self.objects)
        return values[0]

    def wait(self) -> None:
        """Wait for all ranks."""
        self.gather_all(None)

    def all_agree(self, problem: str) -> None:
        """Stop all ranks if any of them has a problem (an empty string is none). Every rank must call this.

        Raises:
            UserError: on rank 0, with the first problem; the other ranks exit with code 2.
        """
        first = next(filter(None, self.gather_all(problem)), "")
        if first and self.first:
            raise UserError(first)
        if first:
            raise SystemExit(2)

    def on_rank0(self, action: Callable[[], T]) -> T | None:
        """Run `action` on rank 0 and return its result there, None elsewhere.

        Every rank must call this; all ranks stop if the action raises UserError.
        """
        problem, result = "", None
        try:
            if self.first:
                result = action()
        except UserError as error:
            problem = str(error)
        self.all_agree(problem)
        return result


def stopped_code(ranks: Distributed) -> int:
    """Return the exit code of a stopped, saved run: 0 under torchrun, which would restart after any other."""
    return 0 if ranks.elastic else RESUMABLE


@contextmanager
def join(device: str, replicate: int = 1, tensor: int = 1) -> Iterator[Distributed]:
    """Join the process group of torchrun (or of a launcher that sets its variables); without one, a single process.

    Raises UserError if the number of processes is not a multiple of `replicate * tensor`.
    """
    count, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if count % (replicate * tensor):
        if rank:
            raise SystemExit(2)  # rank 0 prints the error
        raise UserError(
            f"parallel: expected a multiple of {replicate * tensor} processes (replicate x tensor), found {count}"
        )
    if "RANK" not in os.environ or count == 1:
        yield Distributed(torch.device(device))
        return
    here, backend = torch.device(device), "gloo"
    if device == "cuda":
        here, backend = torch.device(device, int(os.environ.get("LOCAL_RANK", rank))), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(here)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        shared = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        store = dist.PrefixStore(_meet(shared, rank, count), shared)
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=TIMEOUT)
    else:
        dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        with quiet(rank > 0):
            yield arrange(here, replicate, tensor)
    finally:
        dist.destroy_process_group()


def _meet(store: dist.Store, rank: int, count: int) -> str:
    """Return a store prefix shared by the ranks of this restart only.

    torchrun (seen with 2.13) keeps one store for all restarts. It holds the addresses of killed ranks, for which new
    ranks would wait without a fresh prefix.
    """
    mine = uuid4().hex
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    others = set(range(1, count)) if rank == 0 else set()
    store.set(f"hello/{rank}", mine)
    while time.monotonic() < deadline:
        for other in others:
            if store.check([f"hello/{other}"]):
                store.set(f"welcome/{other}", f"{store.get(f'hello/{other}').decode()} {mine}")
        others = {other for other in others if not store.check([f"here/{mine}/{other}"])}
        if rank == 0 and not others:
            return mine
        if rank and store.check([f"welcome/{rank}"]):
            hello, word = store.get(f"welcome/{rank}").decode().split()
            if hello == mine:  # and not meant for this rank of an earlier restart
                store.set(f"here/{word}/{rank}", "")
                return word
        time.sleep(0.05)
    raise RuntimeError(f"rank {rank}: the other ranks did not start within {TIMEOUT}")


def arrange(device: torch.device, replicate: int, tensor: int) -> Distributed:
    """Arrange the processes of the default group in a mesh of replicate x shard x tensor."""
    rank, count = dist.get_rank(), dist.get_world_size()
    axes = ("replicate", "shard", "tensor")
    mesh = init_device_mesh(device.type, (replicate, count // (replicate * tensor), tensor), mesh_dim_names=axes)
    peers = mesh["replicate", "shard"]._flatten("data").get_group()
    objects, saving = (dist.new_group(backend="gloo", timeout=timedelta(hours=2)) for _ in range(2))
    elastic = "TORCHELASTIC_RUN_ID" in os.environ
    return Distributed(device, rank, count, mesh, rank // tensor, count // tensor, elastic, objects, saving, peers)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard, sharing its storage; an unsharded tensor is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return the unsharded tensor; every rank must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def place(weight: Tensor, values: Tensor) -> None:
    """Copy unsharded values, the same on every rank, into a weight or into this rank's shard of it."""
    if isinstance(weight, DTensor):
        mesh, coordinate = weight.device_mesh, weight.device_mesh.get_coordinate()
        assert coordinate is not None
        for axis in reversed(range(mesh.ndim)):  # tensor parallel splits first, FSDP shards its pieces
            placement = weight.placements[axis]
            if not placement.is_replicate():
                pieces = values.chunk(mesh.size(axis), placement.dim)  # type: ignore[attr-defined]
                at = coordinate[axis]
                values = pieces[at] if at < len(pieces) else values.narrow(placement.dim, 0, 0)  # type: ignore[attr-defined]
    local(weight).copy_(values)


def sum_gradients(model: nn.Module, ranks: Distributed) -> None:
    """Sum the gradients of an unsharded network over ranks; a sharded one has done so in its backward pass."""
    if ranks.mesh is None or isinstance(model, FSDPModule):
        return
    parameters = list(model.parameters())
    has_grad = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int64)
    for parameter, ranks_with in zip(parameters, ranks.sum(has_grad.to(parameters[0].device)).tolist(), strict=True):
        if ranks_with and parameter.grad is None:  # without any gradient, the optimizer skips it
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    together = ranks.sum(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, summed in zip(gradients, together.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view(gradient.shape))


def stacked_name(name: str) -> str:
    """Return the name that a weight of `parallel.Parts` has in an unsplit network; other names are unchanged."""
    head, _, tail = name.partition(".parts.")
    return f"{head}.{tail.split('.', 1)[1]}" if tail else name


def restacked(name: str, tensor: Tensor, saved: list[Tensor]) -> Tensor:
    """Return the values of a tensor of this name from the saved stacked matrix, or from its parts in order."""
    if not tensor.ndim:
        return saved[0]
    stacked = saved[0] if len(saved) == 1 else torch.cat(saved)
    if stacked_name(name) == name:
        return stacked
    number = int(name.partition(".parts.")[2].split(".", 1)[0])
    return stacked[number * len(tensor) : (number + 1) * len(tensor)]


def stack(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return tensors under the names of an unsplit network, with parts (unsharded, in order) concatenated."""
    parts: dict[str, list[Tensor]] = {}
    for name, tensor in tensors:
        parts.setdefault(stacked_name(name), []).append(tensor)
    return {name: pieces[0] if len(pieces) == 1 else torch.cat(pieces) for name, pieces in parts.items()}
