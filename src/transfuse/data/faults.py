"""What a run does about documents that turn out damaged: leaves them out, says so, and stops where they are too many.

A document that is left out leaves its step as it is: nothing moves up, so ranks and restarts stay in step.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ..console import say
from ..errors import UserError

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

    sizes: documents of each source. share: of a source, above which `add` raises; ten are let pass in any case.
    """

    def __init__(self, path: Path, sizes: Mapping[str, int], share: float) -> None:
        self.path, self.sizes, self.share = path, sizes, share
        self.met: set[Damage] = set()
        if path.is_file():
            for line in path.read_text().splitlines():
                try:
                    self.met.add(Damage(**json.loads(line)))
                except (ValueError, TypeError):  # cut short by a kill: it will be met again
                    continue

    def add(self, faults: Iterable[Damage]) -> None:
        """Raises UserError above the budget."""
        new = [fault for fault in dict.fromkeys(faults) if fault not in self.met]
        if not new:
            return
        with self.path.open("a") as file:
            for fault in new:
                self.met.add(fault)
                file.write(json.dumps(asdict(fault)) + "\n")
                say(f"left out: {fault.source}/{fault.shard}: {fault.key}: {fault.reason}")
        counts = Counter(fault.source for fault in self.met)
        for source, count in counts.items():
            if count > max(FREE_FAULTS, self.share * self.sizes.get(source, 0)):
                raise UserError(
                    f"{source}: {count} damaged documents, more than data.max_errors {self.share} lets pass (see "
                    f"{self.path}); look with: transfuse data verify {source}"
                )
