"""The processes of a run: which this one is, and what all of them agree on.

    python -m transfuse train demo                                  one process, rank 0 of 1: nothing is sent anywhere
    torchrun --nproc-per-node 8 -m transfuse train demo             eight

A run has replicate x shard x tensor processes. Those of one `tensor` group work on the same data; the others, the
*data ranks*, each on their part of every step.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..console import quiet
from ..errors import UserError

T = TypeVar("T")

AXES = ("replicate", "shard", "tensor")


@dataclass(frozen=True, eq=False)
class Ranks:
    """Number `rank` of `count` processes.

    mesh            named axes `replicate`, `shard`, `tensor`; None where there is one process
    data, datas     number of this data rank, and how many there are
    elastic         started by torchrun, which starts all of them again where one fails
    objects, saving groups on the processor: for Python objects, and for checkpoints, which a thread writes meanwhile
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

    @property
    def first(self) -> bool:
        """Whether this is the process that writes what is written once, and speaks."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """In place, over the data ranks."""
        if self.mesh is not None:
            dist.all_reduce(tensor, group=self.mesh["data"].get_group())
        return tensor

    def sum_all(self, tensor: Tensor) -> Tensor:
        """In place, over all ranks."""
        if self.mesh is not None:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """Every data rank's, in order."""
        if self.mesh is None:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value, group=self.objects)
        return found[:: self.count // self.datas]

    def share(self, value: T) -> T:
        """The first rank's, on all."""
        if self.mesh is None:
            return value
        found: list[Any] = [value]
        dist.broadcast_object_list(found, src=0, group=self.objects)
        shared: T = found[0]
        return shared

    def wait(self) -> None:
        """Until all have come here."""
        self.gather(None)


@contextmanager
def join(device: str, replicate: int = 1, tensor: int = 1) -> Iterator[Ranks]:
    """The ranks that torchrun (or another launcher that sets its variables) started; one where it did not.

    Raises UserError where so many processes do not make up `replicate` copies of groups of `tensor`.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count % (replicate * tensor):
        raise UserError(
            f"parallel: expected a multiple of {replicate * tensor} processes (replicate x tensor), found {count}"
        )
    if "RANK" not in os.environ or count == 1:
        yield Ranks(torch.device(device))
        return
    rank, cuda = int(os.environ["RANK"]), device == "cuda"
    here = torch.device(device, int(os.environ.get("LOCAL_RANK", rank))) if cuda else torch.device(device)
    if cuda:
        torch.cuda.set_device(here)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(minutes=30))
    quiet(rank > 0)
    try:
        yield arrange(here, replicate, tensor)
    finally:
        quiet(False)
        dist.destroy_process_group()


def arrange(device: torch.device, replicate: int, tensor: int) -> Ranks:
    """The processes of the default group in a mesh of replicate x shard x tensor."""
    rank, count = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(device.type, (replicate, count // (replicate * tensor), tensor), mesh_dim_names=AXES)
    mesh["replicate", "shard"]._flatten("data")
    groups = [dist.new_group(backend="gloo", timeout=timedelta(hours=2)) for _ in range(2)]
    elastic = "TORCHELASTIC_RUN_ID" in os.environ
    return Ranks(device, rank, count, mesh, rank // tensor, count // tensor, elastic, *groups)
