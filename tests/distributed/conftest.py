"""Processes side by side, as torchrun starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cases
import pytest

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def torchrun(ranks: int, *arguments: str, options: tuple[str, ...] = (), **settings) -> subprocess.Popen[str]:
    """Start processes; `arguments` is a script or `-m module`, and what follows it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--rdzv-endpoint"]
    command += ["localhost:0", "--rdzv-backend", "c10d", *options, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": ENVIRONMENT}
    return subprocess.Popen(command, **{**pipes, **settings})


def finished(process: subprocess.Popen[str], seconds: float = 300) -> str:
    """What a process said, once it ended well."""
    said, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, said[-4000:]
    return said


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """Folders 1, 2 and 4, by the number of processes, with what cases.py leaves; `moved` holds runs that went on with
    another number of processes, named after them."""
    folder = tmp_path_factory.mktemp("ranks")
    moved = "../moved"
    everywhere = ["shard", "uneven"]
    alone = ["accumulate", "bfloat16", "full", "selective", "unet", "dropout", "dropout-full", "codes", "text"]
    cases.main(str(folder / "1"), *everywhere, *alone, f"shard:2:{moved}/1-4", f"shard:2:{moved}/1-tensor")
    two = [*everywhere, *(name for name in alone if "dropout" not in name), "replicate", "tensor"]
    stopped = [f"shard:2:{moved}/2-2", f"shard:2:{moved}/2-1", f"tensor:2:{moved}/tensor-1"]
    going_on = [f"shard:4:{moved}/2-2", f"tensor:4:{moved}/1-tensor"]
    finished(torchrun(2, str(HERE / "cases.py"), str(folder / "2"), *two, *stopped, *going_on))
    cases.main(str(folder / "1"), f"shard:4:{moved}/2-1", f"shard:4:{moved}/tensor-1")
    four = [*everywhere, "replicate", "tensor", f"shard:4:{moved}/1-4"]
    finished(torchrun(4, str(HERE / "cases.py"), str(folder / "4"), *four))
    return folder
