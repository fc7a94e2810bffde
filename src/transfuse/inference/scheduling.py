"""The choice of requests that hold the slots of the cache, fair between clients and kinds of work, and of their slots.

Weighted fair queueing (Demers, Keshav and Shenker, 1989) with the network's positions as the unit of work. A client's
requests of one kind are a flow, served in order. The first of each flow has a virtual finish time: when it would end if
all flows were served at the same rate. Those with the earliest run; others make way for them. A flow is charged for
what was computed, and what a client had while nobody else asked is not held against it.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from torch import Tensor

T = TypeVar("T")


@dataclass(eq=False)
class Entry(Generic[T]):
    """A request of `cost` positions; `start` and `finish` are virtual times, once it is the first of its flow."""

    item: T
    cost: float
    start: float = 0.0
    finish: float | None = None

    def reached(self, used: float) -> float:
        """Return the virtual time at which `used` of its positions are computed, once it has a finish."""
        assert self.finish is not None
        return self.start + (self.finish - self.start) * min(1.0, used / self.cost if self.cost else 1.0)


@dataclass(eq=False)
class Flow(Generic[T]):
    """The requests of one client and kind; `finish` is the virtual time at which the last that started ends."""

    client: str
    waiting: deque[Entry[T]] = field(default_factory=deque)
    running: list[Entry[T]] = field(default_factory=list)
    finish: float = 0.0

    @property
    def active(self) -> bool:
        return bool(self.waiting or self.running)


@dataclass(eq=False)
class FairQueue(Generic[T]):
    """Requests that wait or run. With one flow this is first come, first served.

    used   returns the positions that were computed for a request so far; without it all of its cost are at its end
    flows  by client and kind; one that ended is forgotten once the virtual time has passed its finish
    now    the virtual time: that which the slowest of the running requests has reached
    """

    used: Callable[[T], float] | None = None
    flows: dict[tuple[str, str], Flow[T]] = field(default_factory=dict)
    now: float = 0.0

    def push(self, item: T, cost: float, client: str = "", kind: str = "") -> None:
        """Add a request that waits."""
        self._advance()
        self.flows = {key: flow for key, flow in self.flows.items() if flow.active or flow.finish > self.now}
        self.flows.setdefault((client, kind), Flow(client)).waiting.append(Entry(item, cost))

    def start(self, free: bool) -> tuple[T, T | None] | None:
        """Start the next request; return it, and the one that makes way if no slot is `free`.

        None: nothing waits, or all that run come first.
        """
        self._advance()
        active = [flow for flow in self.flows.values() if flow.active]
        heads: list[tuple[float, int, Flow[T]]] = []
        for number, flow in enumerate(active):
            if flow.waiting:
                entry = flow.waiting[0]
                if entry.finish is None:  # a client with two kinds of work is charged twice for either
                    entry.start = max(self.now, flow.finish)
                    entry.finish = entry.start + entry.cost * sum(other.client == flow.client for other in active)
                heads.append((entry.finish, number, flow))
        if not heads:
            return None
        finish, _, flow = min(heads)
        last: Entry[T] | None = None
        if not free:
            ends = [(entry.finish or 0.0, number) for number, other in enumerate(active) for entry in other.running]
            latest, number = max(ends)
            if latest <= finish:
                return None
            last = next(entry for entry in active[number].running if entry.finish == latest)
            active[number].running.remove(last)
            active[number].waiting.appendleft(last)
        entry = flow.waiting.popleft()
        flow.running.append(entry)
        flow.finish = max(flow.finish, finish)
        self._advance()
        return entry.item, None if last is None else last.item

    def remove(self, item: T) -> None:
        """Take out a request that has ended or is left; its flow gets back what was not computed of its cost."""
        self._advance()
        for flow in self.flows.values():
            for entry in [*flow.running, *flow.waiting]:
                if entry.item is not item:
                    continue
                (flow.running if entry in flow.running else flow.waiting).remove(entry)
                if self.used is None or entry.finish is None:
                    continue
                unused = entry.finish - entry.reached(self.used(item))
                flow.finish -= unused if flow.finish >= entry.finish else 0.0
                for later in [*flow.running, *flow.waiting]:
                    if later.finish is not None and later.start >= entry.finish:
                        later.start, later.finish = later.start - unused, later.finish - unused
        if not any(flow.active for flow in self.flows.values()):  # a busy period has ended: all begin alike
            self.flows.clear()
            self.now = 0.0

    def _advance(self) -> None:
        """Set the virtual time."""
        running = [entry for flow in self.flows.values() for entry in flow.running]
        if running:
            reached = (entry.reached(self.used(entry.item)) if self.used else entry.start for entry in running)
            self.now = max(self.now, min(reached))


PrefixKeys = list[Hashable]
"""One hashable value per position of a sequence: equal prefixes have equal keys and values in the cache."""


def image_keys(latent: Tensor, count: int) -> PrefixKeys:
    """Return the prefix keys of the `count` patches of a clean image."""
    digest = hashlib.blake2b(latent.contiguous().cpu().numpy().tobytes(), digest_size=16)
    return [(digest.digest(), tuple(latent.shape), number) for number in range(count)]


class SlotAllocator:
    """Assign sequences to a fixed number of cache slots.

    A sequence may leave its prefix in its slot for reuse. It is kept until another sequence needs the slot, and never
    makes one wait.
    """

    def __init__(self, count: int) -> None:
        self._free: list[int] = list(range(count))  # slots with a kept prefix stand in order of release
        self._kept: dict[int, PrefixKeys] = {}

    def __len__(self) -> int:
        """The number of free slots."""
        return len(self._free)

    def allocate(self, prefix_keys: PrefixKeys | None) -> tuple[int, int]:
        """Reserve a slot and return `(slot, reused)`.

        `reused` is the number of leading positions already in the slot; at least one position is left to compute.
        Prefers the slot with the longest shared prefix, then the lowest empty slot (neighbours share attention calls),
        then the one released first. None: nothing is reused.

        Raises ValueError if no slot is free.
        """
        wanted = prefix_keys or []

        def shared(slot: int) -> int:
            kept = self._kept.get(slot, [])
            most = max(min(len(kept), len(wanted) - 1), 0)
            return next((number for number in range(most) if kept[number] != wanted[number]), most)

        best = max(self._free, key=shared)
        reused = shared(best)
        if not reused:
            empty = [slot for slot in self._free if slot not in self._kept]
            best = min(empty) if empty else self._free[0]
        self._free.remove(best)
        self._kept.pop(best, None)
        return best, reused

    def free(self, slot: int, prefix_keys: PrefixKeys | None) -> None:
        """Release a slot, keeping the positions that `prefix_keys` describes for reuse."""
        self._free.append(slot)
        if prefix_keys:
            self._kept[slot] = prefix_keys
