"""Passes that come again are recorded, and played back: CUDA graphs.

A pass starts hundreds of small kernels, and on a GPU starting them takes longer than what they compute: a token of the
0.37B network 10.7 ms, where reading its weights takes 0.2. A recording starts them all at once, and takes 2.4
(docs/benchmarks.md).

It holds addresses and sizes, so it serves passes of one shape alone: a drawing has one for all its steps, writing one
for the 64 positions that share a number of keys. What differs between them is copied into the tensors that were there
at recording. A shape is recorded when it comes for the second time: the first warms up what must not be recorded, and
shapes that come once, as most prompts, cost nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..model.transfusion import Output

Work = Callable[[], Output]
Record = Callable[[Work], tuple[Callable[[], object], Output]]
"""Record what work does, without doing it: how to do it again, and where its output will lie."""

KEPT = 64
"""recordings, and shapes seen once, that are remembered: those used last"""


class CudaGraphs:
    """The `Record` for CUDA.

    All take their memory from one pool, where one may write over what another left: outputs are copied at once. A pool
    ends with the last recording in it, and torch then refuses its name: an empty one is kept as long as this is.
    """

    @cached_property
    def _first(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            torch.zeros((), device="cuda")
        return graph

    def __call__(self, work: Work) -> tuple[Callable[[], object], Output]:
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the device meanwhile.
        with torch.cuda.graph(graph, pool=self._first.pool(), capture_error_mode="thread_local"):
            output = work()
        return graph.replay, output


@dataclass(frozen=True, eq=False)
class Recording:
    """inputs: what `replay` reads; output: where it leaves what it finds."""

    inputs: Sequence[Tensor]
    replay: Callable[[], object]
    output: Output


class GraphCache:
    """Those of one cache, by the shape of the pass."""

    def __init__(self) -> None:
        self._seen: OrderedDict[Hashable, Recording | None] = OrderedDict()

    def run(self, record: Record, shape: Hashable, inputs: Sequence[Tensor], work: Work) -> Output:
        """What `work` gives, which reads the inputs, and nothing else that another pass of this shape has otherwise."""
        shape = (shape, tuple(tensor.shape for tensor in inputs))
        seen = shape in self._seen
        found = self._seen.get(shape)
        if not seen:
            output = work()
        else:
            if found is None:
                found = Recording(inputs, *record(work))
            for ours, theirs in zip(found.inputs, inputs, strict=True):
                if ours is not theirs:
                    ours.copy_(theirs)
            found.replay()
            output = _copied(found.output)
        self._seen[shape] = found
        self._seen.move_to_end(shape)
        if len(self._seen) > KEPT:
            self._seen.popitem(last=False)
        return output


def _copied(output: Output) -> Output:
    """The next one played back overwrites it."""
    predictions = output.predictions
    if isinstance(predictions, Tensor):
        return Output(output.logits.clone(), predictions.clone())
    return Output(output.logits.clone(), [one.clone() for one in predictions])
