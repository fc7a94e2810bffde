"""Three ways to continue from a model: whole, an image tower next to a frozen text tower, LoRA."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import assert_equal, exported, latent, tensors, tiny
from torch.utils.flop_counter import FlopCounterMode

from emoji_scenes import WorldConfig
from transfuse.errors import UserError
from transfuse.export import Exported, load_export, save_export
from transfuse.model import Grouped, Transfusion
from transfuse.model.costs import step_flops
from transfuse.plan import plan
from transfuse.recipes import Recipe
from transfuse.recipes.recipe import InitConfig
from transfuse.recipes.small import tiny as tiny_recipe
from transfuse.runs import open_run, resolve
from transfuse.sequence import Document, Image, SequenceFormat, Text, Tokenizer, collate
from transfuse.train import build_trainer, export_run, train
from transfuse.training.finetune import LoRAConfig, adapt, merged
from transfuse.training.metrics import Average
from transfuse.training.optimizer import OptimizerConfig
from transfuse.training.trainer import Trainer

FROZEN = {"freeze": "text", "experts": "all"}
LORA = {"lora": LoRAConfig(4)}


def recipe(start: Path | str, steps: int = 3, **changes: object) -> Recipe:
    base = tiny_recipe()
    data = replace(base.data, world=WorldConfig(size=16, nouns=4, max_objects=1), batch_size=8)
    loop = replace(base.loop, steps=steps, checkpoint_every=2, ema_decay=0.5, sample_every=0)
    model = replace(base.model, experts=changes.pop("experts", "shared"), image_d_ff=changes.pop("image_d_ff", None))
    settings = {"device": "cpu", "precision": "float32", "start": str(start), **changes}
    return replace(base, data=data, loop=loop, model=model, **settings)


def begun(asked: Recipe, folder: Path) -> Trainer:
    """The trainer of a run in `folder`, resumed if it has begun."""
    trainer = build_trainer(open_run(asked, folder), folder)
    trainer.restore()
    return trainer


def text_logits(export: Exported) -> list[torch.Tensor]:
    """Logits of every id but BOI: of texts alone and packed, and after the markers of an image that was not drawn."""
    form = export.model.config.sequence_format(export.tokenizer)
    texts = [(10, 11, 12, 13), (40,) * 17, (form.boi, form.eoi, 20, 21), (30, form.eoi, 31)]
    documents = [Document([Text(ids)], sample=number) for number, ids in enumerate(texts)]
    found = []
    for batch in (collate(documents, form), *(collate([document], form) for document in documents)):
        every = torch.arange(batch.positions)
        attend = Grouped(batch, torch.float32)
        for patches in (None, batch.patches):
            logits = export.model(batch.input_ids, batch.position_ids, attend, every, patches).logits
            logits[:, form.boi] = 0
            found.append(logits)
    return found


def boi_logits(export: Exported) -> torch.Tensor:
    batch = collate([Document([Text((10, 11))])], export.model.config.sequence_format(export.tokenizer))
    inputs = batch.input_ids, batch.position_ids, Grouped(batch, torch.float32), batch.loss_positions
    return export.model(*inputs).logits[:, export.tokenizer.boi]


@pytest.fixture(scope="module")
def frozen_run(served: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Path]:
    folder = tmp_path_factory.mktemp("frozen")
    trained = train(recipe(served, **FROZEN), folder)
    assert trained.export is not None
    return trained.trainer, trained.export


@torch.no_grad()
def test_frozen_text_keeps_every_bit_of_its_logits(frozen_run, served: Path) -> None:
    _, folder = frozen_run
    before, after = load_export(served), load_export(folder)
    for a, b in zip(text_logits(after), text_logits(before), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(boi_logits(after), boi_logits(before)), "when to draw is learned"
    weights, original = after.model.state_dict(), before.model.state_dict()
    changed = {name for name in original if not torch.equal(weights[name], original[name])}
    assert {name for name in changed if not name.startswith("image_adapter.")} == {"lm_head.weight"}
    rows = (weights["lm_head.weight"] != original["lm_head.weight"]).any(1).nonzero().flatten().tolist()
    assert rows == [after.tokenizer.boi]


def test_frozen_weights_have_no_gradient_moment_or_average(frozen_run) -> None:
    trainer, _ = frozen_run
    trained = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert all(name == "lm_head.rows" or "image" in name for name in trained)
    assert trainer.ema.weights.keys() == trained
    held = [weight for group in trainer.optimizer.param_groups for weight in group["params"]]
    assert {id(w) for w in held} == {id(w) for n, w in trainer.model.named_parameters() if n in trained}
    saved = tensors(trainer)
    assert {name.split(".", 1)[1] for name in saved["optimizer"]} == trained
    assert saved["model"].keys() == dict(trainer.model.named_parameters()).keys(), "a run resumes without its start"
    trainer.train_step(Average())
    assert all(weight.grad is None for weight in trainer.model.parameters())


@pytest.mark.parametrize("way", [FROZEN, LORA, {"text_rate": 0.1, "experts": "ffn"}], ids=str)
def test_resumed_is_straight(way, served: Path, tmp_path: Path) -> None:
    straight = begun(recipe(served, 4, **way), tmp_path / "straight")
    straight.run()
    stopped = begun(recipe(served, 4, **way), tmp_path / "stopped")
    for _ in range(2):
        stopped.train_step(stopped.average)
    stopped.save()
    resumed = begun(recipe(served, 4, **way), tmp_path / "stopped")
    assert resumed.step == 2
    resumed.run()
    assert_equal(tensors(resumed), tensors(straight))


def test_lora_trains_adapters_and_merges_them(served: Path, tmp_path: Path) -> None:
    """The export is a plain network whose outputs are those of the adapted one."""
    asked = recipe(served, 3, lora=LoRAConfig(4, alpha=12, targets=("qkv", "down")))
    asked = replace(asked, loop=replace(asked.loop, ema_decay=0.0))
    trainer = begun(asked, tmp_path)
    trainer.run()
    own = dict(trainer.model.named_parameters())
    trained = {name for name, weight in own.items() if weight.requires_grad}
    adapters = {name for name in trained if ".lora_" in name}
    assert {name.split(".")[-2] for name in adapters} == {"qkv", "down"}
    rest = {name for name in trained - adapters if not name.startswith("image_adapter.")}
    assert rest == {"embedding.rows", "lm_head.rows"}
    original = load_export(served).model.state_dict()
    assert all(torch.equal(own[name], original[name]) for name in original if name not in trained)
    plain = load_export(export_run(open_run(asked, tmp_path), trainer, tmp_path / "export"))
    form = plain.model.config.sequence_format(plain.tokenizer)
    batch = collate([Document([Text((10, 11)), Image(latent(8, 8)), Text((12, 13))])], form)
    with torch.no_grad():
        for model in (plain.model, trainer.model):
            model.compute_dtype = torch.float32
        outputs = [
            model(
                batch.input_ids,
                batch.position_ids,
                Grouped(batch, torch.float32),
                torch.arange(batch.positions),
                batch.patches,
                batch.latents,
                torch.tensor([400]),
            )
            for model in (plain.model, trainer.model)
        ]
    for a, b in zip(outputs[0], outputs[1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert not torch.equal(
        plain.model.state_dict()["transformer.blocks.0.qkv.weight"], original["transformer.blocks.0.qkv.weight"]
    )


def test_an_adapter_that_is_zero_changes_nothing() -> None:
    form = SequenceFormat(0, 1, 2, 3, 2)
    model = adapt(Transfusion.on_meta(tiny()), "none", LoRAConfig(3, alpha=1.5), form)
    model.to_empty(device="cpu").initialise(0)
    plain = merged(model, {name: torch.randn(w.shape) for name, w in model.named_parameters()})
    assert plain.keys() == Transfusion.on_meta(tiny()).state_dict().keys()
    weights = {
        name: torch.zeros(w.shape) if "lora_b" in name else torch.ones(w.shape) if "lora_a" in name else w.detach()
        for name, w in model.named_parameters()
    }
    assert torch.equal(
        merged(model, weights)["transformer.blocks.1.out.weight"], model.transformer.blocks[1].out.weight
    )


def test_text_learns_at_its_own_rate(served: Path, tmp_path: Path) -> None:
    trainer = begun(recipe(served, experts="all", text_rate=0.0), tmp_path)
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    for _ in range(2):  # the second step's rate is above 0
        trainer.train_step(Average())
    rates = {group["rate"]: group["lr"] for group in trainer.optimizer.param_groups}
    assert rates.keys() == {0.0, 1.0}
    assert rates[0.0] == 0.0 < rates[1.0]
    for name, weight in trainer.model.named_parameters():
        assert torch.equal(weight, before[name]) == ("image" not in name) or not weight.any(), name


@pytest.mark.parametrize("tower", ["copy", "new"])
def test_how_the_image_tower_begins(tower: str, served: Path, tmp_path: Path) -> None:
    wider = {"image_d_ff": 96} if tower == "new" else {}
    trainer = begun(recipe(served, experts="all", init=InitConfig(image_tower=tower), **wider), tmp_path)
    weights = trainer.model.state_dict()
    original = load_export(served).model.state_dict()
    for name in original:
        assert torch.equal(weights[name], original[name])
    copied = [
        torch.equal(weights[name.replace(".qkv", ".image.qkv")], weights[name]) for name in original if ".qkv" in name
    ]
    assert set(copied) == {tower == "copy"}


@pytest.mark.parametrize("way", [FROZEN, LORA], ids=str)
def test_tied_embeddings_part_where_an_output_row_is_trained(way, tokenizer: Tokenizer, tmp_path: Path) -> None:
    made = exported(tokenizer, tie_embeddings=True, timestep="adaln")
    weights, model = made.model.state_dict(), made.model.config
    folder = save_export(
        tmp_path / "x", weights, model, made.process.config, tokenizer, made.autoencoder, 8, made.generation, ""
    )
    trainer = begun(recipe(folder, **way), tmp_path / "run")
    plain = {name: weight.clone() for name, weight in trainer.averaged().items()}
    assert torch.equal(plain["lm_head.weight"], weights["embedding.weight"])
    assert torch.equal(plain["embedding.weight"], weights["embedding.weight"])
    trainer.train_step(Average())
    moved = {name for name, weight in trainer.averaged().items() if not torch.equal(weight, plain[name])}
    assert {"transformer.blocks.0.modulation", "timestep_modulation.out.weight", "lm_head.weight"} <= moved
    assert ("embedding.weight" in moved) == (way is LORA)
    assert load_export(export_run(open_run(recipe(folder, **way), tmp_path / "run"), trainer, tmp_path / "e"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": "", "freeze": "text", "experts": "all"}, "freeze: expected none without start, found text"),
        ({"start": "", **LORA}, "lora.rank: expected 0 without start, found 4"),
        ({"freeze": "text"}, "freeze: expected none with model.experts shared, found text"),
        ({**FROZEN, **LORA}, "lora.rank: expected 0 with freeze text"),
        ({"experts": "all", "image_d_ff": 96}, "init.image_tower: expected new with image_d_ff, found copy"),
        (
            {"init": InitConfig(image_tower="new"), "experts": "all", **LORA},
            "init.image_tower: expected copy with lora, found new",
        ),
        (
            {"optimizer": OptimizerConfig(name="muon"), **LORA},
            "optimizer.name: expected adamw with lora, which trains no whole matrix, found muon",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(changes, message: str, served: Path) -> None:
    start = changes.pop("start", served)
    with pytest.raises(UserError, match=f"^{message}"):
        resolve(recipe(start, **changes))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": -1}, "lora.rank: expected at least 0, found -1"),
        ({"rank": 4, "alpha": 0.0}, "lora.alpha: expected a number above 0, found 0.0"),
        ({"rank": 4, "targets": ("qkv", "lm_head")}, "lora.targets: expected some of qkv, out, gate_up, down, found"),
    ],
)
def test_adapters_that_cannot_be(settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**settings)


@pytest.mark.parametrize("way", [FROZEN, LORA], ids=str)
def test_plan_counts_what_is_trained(way, served: Path, tmp_path: Path) -> None:
    costs, trainer = plan(recipe(served, **way)), begun(recipe(served, **way), tmp_path)
    sizes = [(weight.numel(), weight.requires_grad) for weight in trainer.model.parameters()]
    assert costs["total_parameters"] == sum(size for size, _ in sizes)
    assert costs["trained_parameters"] == sum(size for size, trains in sizes if trains)


@pytest.mark.parametrize("frozen", ["none", "text", "all"])
def test_operations_of_a_step_are_near_torchs_count(frozen: str) -> None:
    """Torch leaves out gradients of what nothing before it learns from: the first layer's inputs, the latents."""
    config, form = tiny(experts="all", n_layers=6, image_d_ff=96), SequenceFormat(0, 1, 2, 3, 2)
    freeze, lora = ("text", LoRAConfig()) if frozen == "text" else ("none", LoRAConfig(1 if frozen == "all" else 0))
    model = adapt(Transfusion.on_meta(config, torch.bfloat16), freeze, lora, form)
    model.to_empty(device="cpu").initialise(0)
    batch = collate([Document([Text((9,) * 30), Image(latent(16, 16))])], form)
    with FlopCounterMode(display=False) as counter:
        attend = Grouped(batch, torch.bfloat16)
        out = model(
            batch.input_ids,
            batch.position_ids,
            attend,
            batch.loss_positions,
            batch.patches,
            batch.latents,
            torch.tensor([5]),
        )
        (out.logits.float().logsumexp(-1).sum() + out.predictions[0].sum()).backward()
    pairs = batch.positions**2
    counted, expected = (
        counter.get_total_flops(),
        step_flops(config, batch.positions, pairs, len(batch.loss_positions), [(16, 16)], frozen),
    )
    adapters = 0.06 if frozen == "all" else 0.0
    assert expected * 0.9 < counted < expected * (1 + adapters)
