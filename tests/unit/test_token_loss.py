"""Losses of tokens in chunks: the same losses and gradients, and never all logits at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import Largest, latent, randomised, tiny
from torch import Tensor
from torch.nn import functional as F

from transfuse.diffusion import DiffusionConfig, Process
from transfuse.model import Transfusion
from transfuse.model.layers import Linear
from transfuse.sequence import Batch, Document, Image, SequenceFormat, Text, collate
from transfuse.training import ObjectiveConfig, TokenObjective, TransfusionObjective
from transfuse.training.loss import MAX_LOGITS, token_losses

WIDTH, IDS = 16, 50


def problem(rows: int, dtype: torch.dtype = torch.float32) -> tuple[Linear, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    head = Linear(WIDTH, IDS)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator))
    x = torch.randn(rows, WIDTH, generator=generator).to(dtype).requires_grad_()
    return head, x, torch.randint(IDS, (rows,), generator=generator)


def losses_and_gradients(
    rows: int, z: bool, dtype: torch.dtype, max_logits: int = MAX_LOGITS
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, and gradients of a sum in which each has another weight."""
    head, x, targets = problem(rows, dtype)
    losses = token_losses(head, x, targets, z, max_logits)
    (losses * torch.linspace(0.1, 1, losses.numel()).view_as(losses)).sum().backward()
    assert x.grad is not None
    assert head.weight.grad is not None
    return losses.detach(), x.grad, head.weight.grad


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 30, 31])
@pytest.mark.parametrize("z", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_change_nothing(rows: int, z: bool, dtype: torch.dtype) -> None:
    expected = losses_and_gradients(rows, z, dtype)
    assert expected[0].shape == (1 + z, rows)
    assert expected[0].dtype == torch.float32
    assert expected[2].dtype == torch.float32
    # Seven rows: 7 are one chunk, 8 two, 30 five with a last one of two rows.
    chunked = losses_and_gradients(rows, z, dtype, max_logits=7 * IDS + 1)
    # A chunk's part of the weight's gradient is rounded to bfloat16, then added up in float32.
    rounded = 1e-6 if dtype == torch.float32 else 2**-8
    for a, b, tolerance in zip(chunked, expected, (1e-6, 1e-6, rounded), strict=True):
        torch.testing.assert_close(a, b, atol=tolerance * max([1.0, *b.abs().flatten().tolist()]), rtol=tolerance)


def test_at_small_sizes_it_is_the_plain_computation() -> None:
    """To the bit, gradients too."""
    for dtype in (torch.float32, torch.bfloat16):
        losses, of_x, of_weight = losses_and_gradients(30, False, dtype)
        head, x, targets = problem(30, dtype)
        plain = F.cross_entropy(head(x).float(), targets, reduction="none")
        (plain * torch.linspace(0.1, 1, 30)).sum().backward()
        assert torch.equal(losses[0], plain)
        assert torch.equal(of_x, x.grad)
        assert torch.equal(of_weight, head.weight.grad)


def test_one_row_may_have_more_ids_than_the_bound() -> None:
    expected = losses_and_gradients(3, True, torch.float32)
    chunked = losses_and_gradients(3, True, torch.float32, max_logits=IDS - 1)
    for a, b in zip(chunked, expected, strict=True):
        torch.testing.assert_close(a, b)


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Elements of the largest tensor that is kept for the backward pass."""

    elements = 0

    def __init__(self) -> None:
        super().__init__(self.note, lambda tensor: tensor)

    def note(self, tensor: Tensor) -> Tensor:
        self.elements = max(self.elements, tensor.numel())
        return tensor


@pytest.mark.parametrize("z", [False, True])
def test_all_logits_never_exist_at_once(z: bool) -> None:
    """Neither in the forward pass nor backwards; between the two a chunk's vectors are all that is kept."""
    rows, bound = 1000, 100 * IDS
    for at_once, largest in ((MAX_LOGITS, rows * IDS), (bound, rows * WIDTH)):
        head, x, targets = problem(rows)
        saved = Saved()
        with Largest() as made, saved:
            token_losses(head, x, targets, z, at_once).sum().backward()
        assert made.elements == largest  # in chunks, the gradient of the vectors
        assert saved.elements == (rows * IDS if at_once > bound else bound // IDS * WIDTH)


def of_model(objective, model: Transfusion, batch: Batch):
    """Losses, details, and gradients of all terms together."""
    model.zero_grad()
    sums = objective.loss(model, batch)
    sums.losses.sum().backward()
    details = {name: (float(total), count) for name, (total, count) in sums.details.items()}
    return sums.losses.detach(), details, {name: p.grad for name, p in model.named_parameters()}


def chunked_equals_plain(objective: Callable[[int], TokenObjective], model: Transfusion, batch: Batch) -> None:
    """Compare an objective without and with chunks; `objective` is called with the number of logits of a chunk."""
    losses, details, gradients = of_model(objective(MAX_LOGITS), model, batch)
    chunked, found_details, found_gradients = of_model(objective(5 * model.config.vocab_size), model, batch)
    torch.testing.assert_close(chunked, losses, rtol=1e-6, atol=1e-6)
    assert found_details.keys() == details.keys()
    for name, (total, count) in details.items():
        assert found_details[name] == (pytest.approx(total, rel=1e-6), count)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("z_weight", [0.0, 1e-2])
def test_a_transfusions_losses(z_weight: float, grammar: SequenceFormat, mixed) -> None:
    config, process = ObjectiveConfig(z_weight=z_weight), Process(DiffusionConfig())
    batch = collate(mixed, grammar)
    assert len(batch.targets) % 5, "a last chunk of another size"
    chunked_equals_plain(
        lambda most: TransfusionObjective(config, process, 0, max_logits=most), randomised(tiny()), batch
    )


@pytest.mark.parametrize("z_weight", [0.0, 1e-2])
def test_a_chameleons_losses(z_weight: float, grammar: SequenceFormat) -> None:
    """Targets of both kinds, text and codes."""
    config = tiny(images="codes", codebook_size=32, patch_size=1, image_attention="causal", patch_positions="none")
    coded = replace(grammar, patch_size=1, first_code=config.text_vocab_size)
    codes = torch.arange(16).view(4, 4)
    documents = [
        Document([Text((9, 8, 7)), Image(codes)], sample=1),
        Document([Image(codes.T), Text((6,) * 9)], sample=2),
    ]
    batch = collate(documents, coded, "causal")
    assert 0 < int(batch.is_image_token.sum()) < len(batch.targets)
    weights = ObjectiveConfig(z_weight=z_weight)
    chunked_equals_plain(lambda most: TokenObjective(weights, 0, most), randomised(config), batch)
    assert TokenObjective(weights, 0).loss(randomised(config), batch).details.keys() == {"text", "codes"}


def test_offenders_are_found_in_any_chunk(grammar: SequenceFormat) -> None:
    """A word without a finite vector spoils its own document alone; the picture of another is spoilt too."""
    model = randomised(tiny())
    with torch.no_grad():
        model.embedding.weight[33] = float("nan")
    bad = latent(4, 4)
    bad[0, 0, 0] = float("inf")
    documents = [Document([Text((9,) * 12)], sample=number) for number in range(6)]
    documents[4] = Document([Text((9, 9, 33, 9))], sample=44)
    documents.append(Document([Text((8,)), Image(bad)], sample=77))
    chunk = 5 * model.config.vocab_size
    objective = TransfusionObjective(ObjectiveConfig(), Process(DiffusionConfig()), 0, max_logits=chunk)
    assert set(objective.nonfinite_samples(model, collate(documents, grammar))) == {44, 77}


def test_nothing_to_predict(grammar: SequenceFormat) -> None:
    objective = TransfusionObjective(ObjectiveConfig(z_weight=1.0), Process(DiffusionConfig()), 0, max_logits=1)
    batch = collate([Document([Image(latent(4, 4))], sample=1, predict=False)], grammar)
    model = randomised(tiny())
    losses, _, gradients = of_model(objective, model, batch)
    assert (losses[0], losses[2]) == (0, 0)
    assert float(gradients["lm_head.weight"].abs().sum()) == 0
