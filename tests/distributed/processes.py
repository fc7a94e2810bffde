"""Processes side by side, as torchrun starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def torchrun(ranks: int, *arguments: str, options: tuple[str, ...] = (), **settings) -> subprocess.Popen[str]:
    """Start processes; `arguments` is a script or `-m module`, and what follows it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--rdzv-endpoint"]
    command += ["localhost:0", "--rdzv-backend", "c10d", *options, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": ENVIRONMENT}
    return subprocess.Popen(command, **{**pipes, **settings})


def finished(process: subprocess.Popen[str], seconds: float = 300) -> str:
    """Return the output of a process that must end well."""
    output, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, output[-4000:]
    return output
