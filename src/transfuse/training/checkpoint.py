"""Checkpoints that survive a kill at any moment.

    checkpoints/step-00001000/
        model.safetensors  ema.safetensors  optimizer.safetensors  progress.json
        manifest.json      sizes and hashes of the others, written last

A checkpoint is written in a folder with another name, every file and the folder synced, the manifest last, then
renamed: it is there whole or not at all. Nothing is pickled, so loading one can not run code.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import UserError
from ..files import sha256, sync

MANIFEST = "manifest.json"


@dataclass
class Checkpoint:
    """What a checkpoint holds: named sets of tensors, and progress as plain numbers and strings."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    progress: dict[str, Any]


class CheckpointFolder:
    """The checkpoints of one run. `keep`: how many of the newest stay."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write one, then drop the oldest. On a full disk nothing half-written stays, and UserError says where."""
        final = self.folder / f"step-{checkpoint.step:08d}"
        partial = final.with_suffix(".partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            for name, tensors in checkpoint.tensors.items():
                save_file(
                    {key: tensor.contiguous() for key, tensor in tensors.items()}, partial / f"{name}.safetensors"
                )
            (partial / "progress.json").write_text(json.dumps({"step": checkpoint.step, **checkpoint.progress}))
            files = {path.name: _describe(path) for path in sorted(partial.iterdir())}
            (partial / MANIFEST).write_text(json.dumps({"version": 1, "files": files}, indent=1))
            for path in [*partial.iterdir(), partial]:
                sync(path)
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
            sync(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(f"{final}: checkpoint not written ({error}); earlier checkpoints are intact") from None
        for old in self.complete()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)
        return final

    def complete(self) -> list[Path]:
        """Folders that have a manifest, oldest first."""
        return sorted(path.parent for path in self.folder.glob(f"step-*/{MANIFEST}") if path.parent.suffix == "")

    def load(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that is whole, or None; and a line about each newer one that is not."""
        complaints: list[str] = []
        for path in reversed(self.complete()):
            problem = verify(path)
            if problem is None:
                return read(path), complaints
            complaints.append(f"{path}: {problem}; falling back to an older checkpoint")
        return None, complaints


def verify(path: Path) -> str | None:
    """None where every file has the size and hash of the manifest, else what is wrong."""
    try:
        expected = json.loads((path / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is missing or unreadable"
    for name, description in expected.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if _describe(file) != description:
            return f"{name} does not match its hash"
    return None


def read(path: Path) -> Checkpoint:
    """Read a checkpoint folder that `verify` has passed."""
    progress = json.loads((path / "progress.json").read_text())
    tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    return Checkpoint(progress.pop("step"), tensors, progress)


def _describe(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256(path)}
