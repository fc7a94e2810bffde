"""Device, precision and memory of this machine: what "auto" means. torch is imported only when it is needed."""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .errors import UserError

if TYPE_CHECKING:
    import torch

Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "float32", "bfloat16"]


@contextmanager
def on_meta() -> Iterator[None]:
    """Build modules on the meta device, without memory and without drawing initial values.

    `torch.nn.init` is skipped: on the meta device its work is for nothing, and imports torch's compiler (a second).
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class SkipInit(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(function, "__module__", "") == "torch.nn.init":
                return args[0] if args else kwargs["tensor"]
            return function(*args, **(kwargs or {}))

    with torch.device("meta"), SkipInit():
        yield


def pick_device(device: Device) -> Literal["cpu", "cuda", "mps"]:
    """Resolve "auto": CUDA if there is one, else the CPU. Raises UserError for "cuda" or "mps" on a machine without.

    "mps" (a Mac's GPU) is never chosen by itself: it was not tried.
    """
    if device == "cpu":
        return "cpu"
    import torch

    if device == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("device: expected a Mac with MPS, found none on this machine")
        return "mps"
    if device not in ("auto", "cuda"):
        raise UserError(f"device: expected auto, cpu, cuda or mps, found {device!r:.80}")
    if torch.cuda.is_available():
        return "cuda"
    if device == "cuda":
        raise UserError("device: expected a CUDA device, found none on this machine")
    return "cpu"


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Return the dtype of a name such as "float16". Raises UserError for any other."""
    import torch

    known = {str(kind).removeprefix("torch."): kind for kind in (torch.float32, torch.bfloat16, torch.float16)}
    chosen = known.get(str(dtype).removeprefix("torch."))
    if chosen is None:
        raise UserError(f"dtype: expected one of {', '.join(known)}, found {dtype}")
    return chosen


def as_device(device: torch.device | str) -> torch.device:
    """Return a device by its name. Raises UserError for a CUDA device on a machine without, and for an unknown name."""
    import torch

    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        raise UserError(f"device: expected cpu, cuda, cuda:N or mps, found {device}") from None
    if chosen.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device: expected cpu, cuda, cuda:N or mps, found {device}")
    if chosen.type != "cpu":
        pick_device(chosen.type)  # type: ignore[arg-type]
    return chosen


def training_precision(precision: Precision, device: str) -> Literal["float32", "bfloat16"]:
    """Resolve "auto" for training: bfloat16 on CUDA and on processors that multiply it natively."""
    if precision != "auto":
        return precision
    facts = Path("/proc/cpuinfo")
    flags = facts.read_text(encoding="utf-8") if facts.is_file() else ""
    native = any(name in flags for name in ("avx512_bf16", "amx_bf16"))
    return "bfloat16" if device == "cuda" or native else "float32"


def for_inference(device: Device, precision: Precision) -> tuple[Literal["cpu", "cuda", "mps"], torch.dtype]:
    """Resolve device and dtype for inference. Raises UserError for "cuda" on a machine without.

    "auto" is bfloat16 on CUDA, and float32 on the CPU, where batching then changes no bit.
    """
    import torch

    picked = pick_device(device)
    if precision == "auto":
        precision = "bfloat16" if picked == "cuda" else "float32"
    return picked, getattr(torch, precision)


def processor_name() -> str:
    """Return the processor's name from /proc/cpuinfo, or from `platform`."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def keep_freed_memory(keep: bool = True) -> None:
    """Tell glibc to keep blocks of up to 32 MB that torch frees, for the next tensor. Does nothing elsewhere.

    By default glibc returns each block to the system and takes it again page by page, a tenth of a CPU step's time
    (docs/benchmarks.md). The setting is for the whole process, so programs call it, not the library. `keep` False
    restores the default, for a process that lives long and needs much only now and then.
    """
    trim_threshold, mmap_threshold, default = -1, -3, 128 << 10  # options of mallopt(3), and what both are at first
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(mmap_threshold, 32 << 20 if keep else default)  # the largest value it accepts
        libc.mallopt(trim_threshold, -1 if keep else default)


def give_back_memory() -> None:
    """Return freed memory to the system where glibc can (malloc_trim); elsewhere the allocator decides."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def out_of_memory(error: BaseException) -> bool:
    """Return True for an out-of-memory error. torch has a class for GPUs; its CPU allocator raises RuntimeError."""
    messages = ("out of memory", "not enough memory", "can't allocate memory")
    no_memory = isinstance(error, RuntimeError) and any(message in str(error) for message in messages)
    return no_memory or isinstance(error, MemoryError)
