"""The blocks compiled for inference, by torch.compile: what lies before attention and what lies behind it, no more.

Attention stays outside: it reads and writes the cache by slots. The two pieces are the same code in every block, and
the number of positions is left open, so few graphs serve any depth, batch and mixture of writing and drawing. torch
keeps what it compiled, for the next start, in TORCHINDUCTOR_CACHE_DIR (else a temporary folder). On an H200 nothing was
gained by it (docs/benchmarks.md): what is left outside is bound by launches, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..model import Transfusion


def compile_blocks(model: Transfusion, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile a loaded model's blocks, in place; at the first pass, not yet now."""
    for block in model.transformer.blocks:
        for name in ("project_qkv", "finish"):
            setattr(block, name, torch.compile(getattr(block, name), dynamic=True, fullgraph=True, backend=backend))
