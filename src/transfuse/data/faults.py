"""What a run does about documents that turn out damaged: leaves them out, says so, and stops where they are too many.

A document that is left out leaves its step as it is: nothing moves up, so ranks and restarts stay in step.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import UserError
from ..io import append_jsonl
from ..log import logger

FREE_FAULTS = 10
"""faulty documents of a source that are let pass whatever their share"""


@dataclass(frozen=True)
class Damage:
    """A damaged document: of which source, in which shard, under which name, and what is wrong with it."""

    source: str
    shard: str
    key: str
    reason: str


class FaultLog:
    """Keeps `quarantine.jsonl`, a line for each damaged document that was met; each counts once, restarts included.

    Rank 3 writes `quarantine-rank3.jsonl`, and reads what the others wrote whenever it meets one: so the budget is the
    whole run's, and each file has one writer.

    sizes: documents of each source. share: of a source, above which `add` raises; ten are let pass in any case.
    """

    def __init__(self, folder: Path, sizes: Mapping[str, int], share: float, rank: int = 0) -> None:
        self.folder, self.sizes, self.share = folder, sizes, share
        self.path = folder / (f"quarantine-rank{rank}.jsonl" if rank else "quarantine.jsonl")
        self.met: set[Damage] = set()
        self._counts: Counter[str] = Counter()
        self._ends: dict[Path, int] = {}  # how far each file was read
        self._read()

    def add(self, faults: Iterable[Damage]) -> None:
        """Raises UserError above the budget."""
        found = dict.fromkeys(faults)
        if self.met.issuperset(found):
            return
        self._read()
        for fault in found:
            if fault not in self.met:
                append_jsonl(self.path, [asdict(fault)])
                logger.info(f"left out: {fault.source}/{fault.shard}: {fault.key}: {fault.reason}")
        self._read()
        for source, count in self._counts.items():
            if count > max(FREE_FAULTS, self.share * self.sizes.get(source, 0)):
                raise UserError(
                    f"{source}: {count} damaged documents, more than data.max_errors {self.share} lets pass (see "
                    f"{self.folder / 'quarantine*.jsonl'}); look with: transfuse data verify {source}"
                )

    def _read(self) -> None:
        """Take in the lines that ranks have added; one not yet whole is left for later."""
        for path in self.folder.glob("quarantine*.jsonl"):
            with path.open("rb") as file:
                file.seek(self._ends.get(path, 0))
                text = file.read()
            whole = text.rfind(b"\n") + 1
            self._ends[path] = self._ends.get(path, 0) + whole
            for line in text[:whole].splitlines():
                try:
                    fault = Damage(**json.loads(line))
                except (ValueError, TypeError):  # cut short by a kill: it will be met again
                    continue
                self._counts[fault.source] += fault not in self.met
                self.met.add(fault)
