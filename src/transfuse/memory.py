"""How the process keeps its memory, and how it says that there is none left."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def keep_freed_memory() -> None:
    """Tell glibc to keep blocks of up to 32 MB that torch frees, for the next tensor. Elsewhere: nothing.

    Left alone it hands each back to the system and then takes it again page by page, which costs a CPU step a tenth of
    its time (docs/benchmarks.md). The peak stays what it is. Of the whole process, so for programs, not for a library.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_MMAP_THRESHOLD, 32 << 20)  # the most it takes
        libc.mallopt(_TRIM_THRESHOLD, -1)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says so; torch has one of its own for GPUs, and on CPU a plain RuntimeError."""
    said = isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    return said or isinstance(error, MemoryError)


_NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")
