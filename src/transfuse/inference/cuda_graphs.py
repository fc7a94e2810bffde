"""CUDA graphs: a pass of a shape that comes again is recorded, and replayed from then on.

A pass starts hundreds of small kernels, and on a GPU starting them takes longer than computing them; a recording
starts them all at once (docs/benchmarks.md). It holds addresses and sizes, so it serves passes of one shape: all steps
of an image, or the 64 tokens that read the same number of keys. What differs between them is copied into the tensors of
the recorded pass. A shape is recorded when it comes for the second time: the first pass warms up what must not be
recorded, and shapes that come once, as most prompts do, cost nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..model import Output

Work = Callable[[], Output]
Record = Callable[[Work], tuple[Callable[[], object], Output]]
"""Record work without doing it: return how to replay it, and the tensors that hold its output then."""
Recording = tuple[Sequence[Tensor], Callable[[], object], Output]
"""the tensors that a replay reads, the replay, and the tensors it writes"""

KEPT = 64  # shapes that are remembered, recorded or seen once: the latest


@dataclass(eq=False)
class CudaGraphs:
    """The `Record` for CUDA.

    All graphs share one memory pool, in which one may overwrite another's output; so outputs are copied at once. A pool
    ends with its last graph, and torch then refuses its name: an empty graph keeps it alive.
    """

    _first: torch.cuda.CUDAGraph | None = None

    def __call__(self, work: Work) -> tuple[Callable[[], object], Output]:
        if self._first is None:
            self._first = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._first):
                torch.zeros((), device="cuda")
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile.
        with torch.cuda.graph(graph, pool=self._first.pool(), capture_error_mode="thread_local"):
            output = work()
        return graph.replay, output


@dataclass(eq=False)
class GraphCache:
    """The recordings of one key-value cache, by the shape of the pass."""

    _seen: OrderedDict[Hashable, Recording | None] = field(default_factory=OrderedDict)

    def run(self, record: Record, shape: Hashable, inputs: Sequence[Tensor], work: Work) -> Output:
        """Run `work`, or replay a recording of it if this shape came before.

        Passes of one shape may differ in the content of `inputs`, and in nothing else.
        """
        shape = (shape, tuple(tensor.shape for tensor in inputs))
        recording = self._seen.get(shape)
        if shape not in self._seen:
            output = work()
        else:
            if recording is None:
                recording = (inputs, *record(work))
            recorded_inputs, replay, recorded = recording
            for old, new in zip(recorded_inputs, inputs, strict=True):
                if old is not new:
                    old.copy_(new)
            replay()
            predictions = recorded.predictions
            copied = predictions.clone() if isinstance(predictions, Tensor) else [p.clone() for p in predictions]
            output = Output(recorded.logits.clone(), copied)
        self._seen[shape] = recording
        self._seen.move_to_end(shape)
        if len(self._seen) > KEPT:
            self._seen.popitem(last=False)
        return output
