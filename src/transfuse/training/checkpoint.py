"""Checkpoints that survive a kill at any moment, written by all ranks in the background.

    checkpoints/step-00001000/
        shard-00001-model-00001-of-00003.safetensors   rank 0's shard of weights; 2: averages, 3: moments
        ...                                            the other ranks' shards
        progress.json
        manifest.json                                  sizes and hashes of the other files, written last
    checkpoints/latest                                 name of the newest checkpoint

Tensors are copied first; a thread writes the copies (torch.distributed.checkpoint, as safetensors) to a temporary
folder, syncs every file, writes the manifest last and renames the folder, so a checkpoint is complete or absent.
Nothing is pickled, so loading cannot run code. Any number of ranks can load a checkpoint.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from ..errors import UserError
from ..io import atomic_write, sha256, sync
from .distributed import Distributed, place, restacked, stacked_name

# A single process is a normal case; the warning comes from a thread, where it cannot be caught.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable")

MANIFEST, LATEST, VERSION = "manifest.json", "latest", 2

STAGER_STAYS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
"""True if torch's stager can be reused; in 2.11 it closes itself after its first copy"""

Groups = dict[str, dict[str, Tensor]]
"""tensors by group ("model", "ema", "optimizer") and name"""


@dataclass
class Checkpoint:
    """Named groups of named tensors, and progress as plain numbers and strings."""

    step: int
    tensors: Groups
    progress: dict[str, Any]


class CheckpointFolder:
    """The checkpoints of a run: the `keep` newest are kept, and those of steps divisible by `keep_every`.

    recipe   the run's `config.json`: each checkpoint has its digest, and is saved and loaded only while it is the same
    """

    def __init__(
        self,
        folder: Path,
        keep: int = 2,
        keep_every: int = 0,
        ranks: Distributed | None = None,
        recipe: Path | None = None,
    ) -> None:
        self.folder, self.keep, self.keep_every, self.recipe = folder, keep, keep_every, recipe
        self.ranks = ranks or Distributed()
        self._digest = self._recipe_digest()
        self._stager: DefaultStager | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._written: tuple[Path, Future[None]] | None = None

    def begin(self, checkpoint: Checkpoint) -> Path:
        """Wait for the previous checkpoint, copy this one's tensors, and write them in a thread.

        Every rank must call this. Raises UserError if either checkpoint cannot be written, or the folder has become
        another run's; partial files are removed.
        """
        self.wait()
        final = self.folder / f"step-{checkpoint.step:08d}"
        partial = final.with_suffix(".partial")

        def make_room() -> None:
            if self._recipe_digest() != self._digest:
                problem = "expected the run that this process trains, found it removed or another"
                raise UserError(f"{final}: checkpoint not written: {problem}")
            try:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            except OSError as error:
                raise UserError(_not_written(final, error)) from None

        self.ranks.on_rank0(make_room)
        if self._stager is None or not STAGER_STAYS:  # reused, so that copies go to the same memory
            cuda = self.ranks.device.type == "cuda"
            self._stager = DefaultStager(StagingOptions(cuda, False, False, cuda))
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        tensors = {name: tensor.detach().contiguous() for name, tensor in _flat(checkpoint.tensors).items()}
        order = list(checkpoint.tensors)
        files = {name: order.index(name.split("/", 1)[0]) + 1 for name in tensors}
        saving = dcp.async_save(
            tensors,
            storage_writer=HuggingFaceStorageWriter(str(partial), files, save_distributed=True),
            process_group=self.ranks.saving,
            async_stager=self._stager,
            no_dist=self.ranks.mesh is None,
        )
        assert isinstance(saving, Future)
        bound = {} if self._digest is None else {"recipe": self._digest}
        progress = json.dumps({"step": checkpoint.step, **bound, **checkpoint.progress})  # now: the run keeps counting
        self._written = final, self._thread.submit(self._finish, saving, partial, final, progress)
        return final

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint and wait for it."""
        path = self.begin(checkpoint)
        self.wait()
        return path

    def wait(self) -> None:
        """Wait until all ranks have written; every rank must call this. Raises UserError if one could not."""
        problem = ""
        if self._written is not None:
            (final, written), self._written = self._written, None
            try:
                written.result()
            except (OSError, UserError, CheckpointException) as error:
                problem = _not_written(final, error)
        self.ranks.all_agree(problem)

    def settle(self) -> None:
        """Wait for this rank's writing, whatever its result, before an error ends the run."""
        if self._written is not None:
            wait([self._written[1]])

    @property
    def failed(self) -> bool:
        """True if `wait` would raise now."""
        return self._written is not None and self._written[1].done() and self._written[1].exception() is not None

    def _finish(self, saving: Future[Any], partial: Path, final: Path, progress: str) -> None:
        """Complete the checkpoint on rank 0 once all ranks have written, and remove old ones."""
        try:
            saving.result()
            if not self.ranks.first:
                return
            (partial / "progress.json").write_text(progress, encoding="utf-8")
            files = {path.name: _describe(path) for path in sorted(partial.iterdir())}
            (partial / MANIFEST).write_text(
                json.dumps({"version": VERSION, "files": files}, indent=1), encoding="utf-8"
            )
            for path in [*partial.iterdir(), partial]:
                sync(path)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            sync(self.folder)
            atomic_write(self.folder / LATEST, lambda path: path.write_text(final.name + "\n", encoding="utf-8"))
        except BaseException:
            if self.ranks.first:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        # Later checkpoints are damaged ones, before which the run resumed; they do not count.
        for old in [path for path in self.complete() if step_of(path) <= step_of(final)][: -self.keep]:
            if not self.keep_every or step_of(old) % self.keep_every:
                shutil.rmtree(old, ignore_errors=True)

    def complete(self) -> list[Path]:
        """Return the folders with a manifest, oldest first."""
        return sorted(path.parent for path in self.folder.glob(f"step-*/{MANIFEST}") if path.parent.suffix == "")

    def newest(self) -> tuple[Path | None, list[str]]:
        """Return the newest complete checkpoint (None if there are none) and a line about each damaged newer one.

        Raises UserError if all are damaged, because starting again would lose the run's work.
        """
        complaints: list[str] = []
        newest = None
        for path in reversed(self.complete() if self.ranks.first else []):
            problem = verify(path)
            if problem is None:
                newest = path
                break
            complaints.append(f"{path}: {problem}")
        newest, complaints = self.ranks.broadcast((newest, complaints))
        if complaints and newest is None:
            raise UserError(
                f"{complaints[0]}; expected a complete checkpoint to resume from, found none of {len(complaints)}; "
                f"move {self.folder} away to start again"
            )
        return newest, [f"{complaint}; falling back to an older checkpoint" for complaint in complaints]

    def load(
        self, path: Path, allocate: Callable[[dict[str, TensorStorageMetadata]], Mapping[str, Mapping[str, Tensor]]]
    ) -> dict[str, Any]:
        """Read a checkpoint into tensors, sharded or not, and return its progress.

        `allocate` returns the tensors, given the saved ones' sizes by name ("group/name"). Raises UserError if names
        or shapes differ, or if it is of another recipe; one from before checkpoints named theirs is accepted.
        """
        progress: dict[str, Any] = json.loads((path / "progress.json").read_text(encoding="utf-8"))
        problem = ""
        if self.ranks.first and self._digest is not None and progress.get("recipe", self._digest) != self._digest:
            problem = (
                f"{path}: expected a checkpoint of this run's config.json, found another recipe's; "
                f"move {self.folder} away to start again"
            )
        self.ranks.all_agree(problem)
        metadata = HuggingFaceStorageReader(str(path)).read_metadata() if self.ranks.first else None
        saved: Any = self.ranks.broadcast(None if metadata is None else metadata.state_dict_metadata)
        tensors = _flat(allocate(saved))
        # Only if tensor parallel changed between saving and loading; rare, so tensors are read one by one.
        for name in [name for name in tensors if name not in saved]:
            other = {n: torch.empty(saved[n].size) for n in sorted(saved) if stacked_name(n) == stacked_name(name)}
            if other:
                self._read_into(path, other)
                place(tensors[name], restacked(name, tensors[name], list(other.values())))
                del tensors[name]
        for name, tensor in tensors.items():
            expected, stored = tuple(tensor.shape), tuple(saved[name].size) if name in saved else None
            if expected != stored:
                wanted = "x".join(map(str, expected)) or "a number"
                present = "nothing" if stored is None else "x".join(map(str, stored)) or "a number"
                reason = f"{name}: expected {wanted}, found {present}"
                raise UserError(f"{path}: the checkpoint has another shape than the model ({reason})")
        self._read_into(path, tensors)
        return progress

    def _recipe_digest(self) -> str | None:
        """Return the digest of the run's `config.json`; None on other ranks than the first, and where it is missing."""
        if self.recipe is None or not self.ranks.first or not self.recipe.is_file():
            return None
        return sha256(self.recipe)

    def _read_into(self, path: Path, tensors: dict[str, Tensor]) -> None:
        reader = HuggingFaceStorageReader(str(path))
        dcp.load(tensors, storage_reader=reader, process_group=self.ranks.saving, no_dist=self.ranks.mesh is None)


def read(path: Path) -> Checkpoint:
    """Return a checkpoint, unsharded, in memory."""
    groups: Groups = {}

    def allocate(saved: dict[str, TensorStorageMetadata]) -> Groups:
        for key, value in saved.items():
            group, name = key.split("/", 1)
            groups.setdefault(group, {})[name] = torch.empty(value.size, dtype=value.properties.dtype)
        return groups

    progress = CheckpointFolder(path.parent).load(path, allocate)
    return Checkpoint(progress.pop("step"), groups, progress)


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


def verify(path: Path) -> str | None:
    """Return None if every file has the size and hash in the manifest, else what is wrong."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version, expected = manifest["version"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is missing or unreadable"
    if version != VERSION:
        return f"expected version {VERSION}, found {version}"
    for name, description in expected.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if _describe(file) != description:
            return f"{name} does not match its hash"
    return None


def _flat(groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{group}/{name}": tensor for group, members in groups.items() for name, tensor in members.items()}


def _describe(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def _not_written(final: Path, error: BaseException) -> str:
    """Return the message, with the first error among ranks."""
    reason = str(error)
    if isinstance(error, CheckpointException):
        rank, (inner, _) = min(error.failures.items())
        reason = f"rank {rank}: {inner}" if len(error.failures) > 1 or rank else str(inner)
    return f"{final}: checkpoint not written ({reason}); earlier checkpoints are intact"
