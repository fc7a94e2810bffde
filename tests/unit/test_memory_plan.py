"""The planner's memory, compared with the memory that real tensors take."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from transfuse.model import ModelConfig, Transfusion, for_batch
from transfuse.model.costs import AttentionBytes, Checkpointing, Load, flex_bytes, forward_bytes
from transfuse.plan import memory
from transfuse.recipes import preset
from transfuse.sequence import Batch, Document, Image, Text, Tokenizer, collate
from transfuse.training import EMA, OptimizerConfig, build_optimizer


class Living(TorchDispatchMode):
    """Bytes of the storages that came into being under it and are still there (`now`), and the most there ever were.

    Each is counted once, however many tensors and hooks hold it; `known` ones are not.
    """

    def __init__(self, *known: Any) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in tree_leaves(known)}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.seen:
                storage = tensor.untyped_storage()
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return result

    def _gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


@torch.library.custom_op("transfuse_test::flex", mutates_args=())
def like_flex(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Attention `[N, H, D]` that keeps what FlexAttention keeps: q, k, v, the output, and the logsumexp `[H, N]`."""
    heads = q.shape[1] // k.shape[1]
    a, b, c = (x.transpose(0, 1).float() for x in (q, k.repeat_interleave(heads, 1), v.repeat_interleave(heads, 1)))
    scores = (a @ b.transpose(1, 2) * q.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ c).transpose(0, 1).to(q.dtype).contiguous(), scores.logsumexp(-1)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:3], *output)


def _no_gradient(ctx: Any, out: Tensor, lse: Tensor) -> tuple[Tensor | None, ...]:
    """Zeros: only their room is of interest."""
    return *(torch.zeros_like(x) for x in ctx.saved_tensors[:3]), None


like_flex.register_autograd(_no_gradient, setup_context=_keep)


def flex(batch: Batch, dtype: torch.dtype) -> Callable[..., Tensor]:
    key = torch.arange(batch.positions)
    mask = (batch.kv_start[:, None] <= key) & (key < batch.kv_end[:, None])
    return lambda layer, q, k, v: like_flex(q, k, v.contiguous(), mask)[0].flatten(1)


def grouped_bytes(documents: int, config: ModelConfig, positions: int, element: int) -> int:
    """Return the bytes that `Grouped` keeps of documents of one length; it copies values out of the product of q, k, v.

    SDPA in float32: q, k, v, output, logsumexp. bfloat16: those, with keys and values of every head, and all scores.
    """
    rotated, values = (config.n_heads + config.kv_heads) * config.head_dim, config.kv_heads * config.head_dim
    normed = (config.n_heads + 2 * config.kv_heads) * config.head_dim if config.qk_norm else 0
    if element == 4:
        return positions * (element * (rotated + values + normed + config.d_model) + 4 * config.n_heads)
    scores = config.n_heads * positions // documents
    return positions * element * (4 * config.d_model + normed + scores)


def make_batch(config: ModelConfig, tokenizer: Tokenizer, sizes: list[tuple[int, int]], words: int) -> Batch:
    documents = [
        Document([Text((10,) * words), *(Image(torch.ones(config.latent_channels, *size)) for size in sizes)], sample=i)
        for i in range(4)
    ]
    return collate(documents, config.sequence_format(tokenizer))


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.transfuse_test.flex.default)
    return CheckpointPolicy.MUST_SAVE if operator in products else CheckpointPolicy.PREFER_RECOMPUTE


def checkpointed(model: Transfusion, way: Checkpointing) -> Transfusion:
    """Put each block in a checkpoint, as the trainer does."""
    extra = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if way == "selective" else {}
    for block in model.transformer.blocks:
        if way != "none":
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, **extra)
    return model


def cast_bytes(model: Transfusion, way: Checkpointing, element: int) -> int:
    """Return the bytes of the weights' casts that are kept.

    Not kept: embeddings, biases, and the first layers, whose input needs no gradient.
    """
    if element == 4:
        return 0
    kept = 0
    for name, weight in model.named_parameters():
        first = ("embedding", "image_adapter.positions", "image_adapter.time.inner", "image_adapter.first")
        enters = name == "image_adapter.in_proj.weight" and model.config.adapter == "linear"
        enters = enters and model.config.timestep_at == "hidden"
        bias = name.endswith("bias") and "norm" not in name
        again = name.startswith("transformer.blocks") and way != "none"
        kept += 0 if name.startswith(first) or enters or bias or again else weight.numel()
    return kept * element


BASE: dict[str, Any] = {"d_model": 128, "n_layers": 3, "n_heads": 4}
UNET: dict[str, Any] = {**BASE, "adapter": "unet", "patch_positions": "none"}
CASES: dict[str, tuple[ModelConfig, list[tuple[int, int]], int]] = {
    "narrow": (tiny(), [(8, 8)], 10),
    "linear": (tiny(**BASE, patch_positions="none"), [(16, 16)], 10),
    "deep": (tiny(n_layers=8, d_model=96, n_heads=2), [(12, 8)], 30),
    "images of two sizes": (tiny(**BASE), [(16, 16), (8, 4)], 10),
    "timestep before the linear map": (tiny(**BASE, timestep_at="patch"), [(16, 16)], 10),
    "timestep in the blocks": (tiny(**BASE, timestep="adaln"), [(16, 16), (8, 4)], 10),
    "no timestep": (tiny(**{**UNET, "unet_channels": (32, 64), "timestep": "none"}), [(16, 16)], 10),
    "grouped queries": (tiny(**BASE, n_kv_heads=2), [(16, 16)], 30),
    "qk_norm of Qwen3": (tiny(**BASE, qk_norm=True, qk_norm_type="rms", d_head=48, qkv_bias=True), [(16, 16)], 30),
    "qk_norm of OLMo 2": (tiny(**BASE, qk_norm=True, qk_norm_type="rms-all", norm_order="swin"), [(16, 16)], 30),
    "stability set": (tiny(**BASE, norm_order="swin", qk_norm=True), [(16, 16)], 30),
    "unet": (tiny(**{**UNET, "unet_channels": (32, 64)}), [(16, 16)], 10),
    "unet of three levels": (tiny(**{**UNET, "patch_size": 4, "unet_channels": (16, 32, 64)}), [(16, 16)], 10),
    "unet of one level": (tiny(**{**UNET, "patch_size": 1, "unet_channels": (64,)}), [(8, 8)], 10),
    "text": (tiny(**BASE, images="none"), [], 40),
    "long text": (tiny(images="none", max_seq_len=512, d_ff=384), [], 400),
}


def measure(
    name: str,
    tokenizer: Tokenizer,
    way: Checkpointing,
    dtype: torch.dtype,
    attention: Callable[..., Callable[..., Tensor]] = flex,
) -> tuple[int, int, Load]:
    """Return the bytes that a forward pass keeps for the backward pass, and the most at once in a whole step.

    The weights' casts count, in both; the weights' gradients, allocated before, in neither. What the model returns
    counts in the second alone.
    """
    config, sizes, words = CASES[name]
    model = checkpointed(Transfusion(config, dtype).initialise(0), way)
    batch = make_batch(config, tokenizer, sizes, words)
    attend, timesteps = attention(batch, dtype), torch.ones(len(batch.latents))
    targets = torch.zeros(len(batch.loss_positions), dtype=torch.int64)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    known = [tensor for tensor in vars(batch).values() if isinstance(tensor, Tensor)]
    living = Living(known, batch.latents, timesteps, targets, *((weight, weight.grad) for weight in model.parameters()))
    with living:
        output = model(
            batch.input_ids, batch.position_ids, attend, batch.loss_positions, batch.patches, batch.latents, timesteps
        )
        given = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in (output.logits, *output.predictions)}
        kept = living.now - sum(given.values())
        text = torch.nn.functional.cross_entropy(output.logits.float(), targets)
        loss = text + sum(prediction.float().square().mean() for prediction in output.predictions)
        del output
        loss.backward()
    images = Counter((latent.shape[1], latent.shape[2]) for latent in batch.latents)
    return kept, living.most, Load(batch.positions, len(batch.loss_positions), images)


@pytest.mark.parametrize(
    ("name", "way", "dtype"),
    [
        *((name, way, torch.float32) for name in CASES for way in ("none", "selective", "full")),
        *((name, "none", torch.bfloat16) for name in CASES),
        *((name, way, torch.bfloat16) for name in ("linear", "unet", "text") for way in ("selective", "full")),
    ],
)
def test_activations_and_the_most_of_a_step_are_as_planned(
    name: str, way: Checkpointing, dtype: torch.dtype, tokenizer: Tokenizer
) -> None:
    """A forward pass keeps what is planned within 2 %; the most at once, with the states, is the plan's total."""
    config, element = CASES[name][0], dtype.itemsize
    kept, most, load = measure(name, tokenizer, way, dtype)
    expected = forward_bytes(config, load, element, way) + cast_bytes(Transfusion.on_meta(config), way, element)
    assert kept == pytest.approx(expected, rel=0.02)
    planned = memory(config, load, way, element)
    states = sum(planned[name] for name in ("weights", "gradients", "moments", "ema"))
    assert 0.93 < (states + most) / sum(planned.values()) < 1.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["linear", "stability set", "unet", "text", "long text"])
def test_another_attention_is_another_term(name: str, dtype: torch.dtype, tokenizer: Tokenizer) -> None:
    """The CPU's own backend, as a run on CPU uses it."""
    config, element = CASES[name][0], dtype.itemsize
    kept, _, load = measure(name, tokenizer, "none", dtype, for_batch)
    attention: AttentionBytes = partial(grouped_bytes, 4)
    expected = forward_bytes(config, load, element, "none", attention)
    assert kept == pytest.approx(expected + cast_bytes(Transfusion.on_meta(config), "none", element), rel=0.02)
    assert (attention(config, 64, element) == flex_bytes(config, 64, element)) == (dtype == torch.float32)


@pytest.mark.parametrize("config_of", [OptimizerConfig(), OptimizerConfig(name="muon")], ids=lambda config: config.name)
def test_states_are_as_measured(config_of: OptimizerConfig) -> None:
    """Weights, gradients, moments and the average of a network that is trained, to the byte."""
    config = CASES["unet"][0]
    model = Transfusion(config).initialise(0)
    optimizer, average = build_optimizer(model, config_of), EMA(model, 0.99)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()

    def size(tensors: Any) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    states = [optimizer.state[weight] for weight in model.parameters()]
    planned = memory(config, Load(8, 8), "none", 4, optimizer=config_of)
    assert planned["weights"] == size(model.parameters())
    assert planned["gradients"] == size(weight.grad for weight in model.parameters())
    assert planned["moments"] == size(x for state in states for name, x in state.items() if name != "step")
    assert planned["ema"] == size(average.weights.values())


def test_a_shard_is_a_part() -> None:
    """FSDP divides each weight's first axis, rounded up: a few bytes more."""
    for name, shard in (("0.16b-unet", 8), ("7b", 64)):
        config = preset(name).model
        rows = sum(-(-p.shape[0] // shard) * p[0].numel() for p in Transfusion.on_meta(config).parameters())
        planned = memory(config, Load(8, 8), "none", gpus=shard, shard=shard)
        assert planned["weights"] == pytest.approx(4 * rows, rel=0.002)
