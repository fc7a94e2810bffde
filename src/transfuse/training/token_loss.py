"""Cross-entropy of next tokens, and z, without ever holding all their logits.

32,000 ids at 100,000 targets are 13 GB of logits in float32, as much again for their gradient: by far the largest
thing of a step. So above `AT_ONCE` they are made some rows at a time. The forward pass keeps a row's vector alone, and
the backward pass makes its logits again: one more product of the head for a bounded amount of memory.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..model.layers import Linear

AT_ONCE = 2**26
"""how many logits may exist at once: 256 MiB in float32, and some copies of them"""


def token_losses(head: Linear, x: Tensor, targets: Tensor, z: bool) -> Tensor:
    """Losses of each target: cross-entropy `[1, M]`, or with `z` cross-entropy and z `[2, M]`; float32.

    x [M, C], targets [M]   vectors from which tokens are predicted, in any dtype, and the tokens
    z                       the squared logarithm of the softmax's denominator, which keeps logits from drifting

    Up to `AT_ONCE` logits this is one plain computation. Chunks give the same losses; gradients of the head's weight
    are added up chunk by chunk, in the dtype that the weight is kept in.
    """
    if len(x) * head.out_features <= AT_ONCE:
        return _losses(head, x, targets, z)
    rows = max(1, AT_ONCE // head.out_features)
    parts = [
        # Nothing in here draws random numbers, so there is no state of generators to keep.
        checkpoint(_losses, head, *some, z, use_reentrant=False, preserve_rng_state=False)
        for some in zip(x.split(rows), targets.split(rows), strict=True)
    ]
    return torch.cat(parts, dim=1)


def _losses(head: Linear, x: Tensor, targets: Tensor, z: bool) -> Tensor:
    logits = head(x).float()
    if not z:
        # Stacked, not `[None]`: FSDP warns of views among what its root returns.
        return torch.stack([F.cross_entropy(logits, targets, reduction="none")])
    denominator = logits.logsumexp(-1)  # once, for both: the logits are the largest thing of a step
    return torch.stack([denominator - logits.gather(-1, targets[:, None])[:, 0], denominator.square()])
