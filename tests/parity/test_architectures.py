"""Every family of `convert.architectures` against transformers, on tiny random weights: both ways, to 1e-4.

The logits of a started model are transformers' own: uncached, packed beside another text, and token by token with the
engine's cache (to 5e-6). A folder that is written opens in transformers as the same class with the same logits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from transfuse.autoencoders import Pixels
from transfuse.convert.architectures import ARCHITECTURES, OTHER_MATHEMATICS, model_type_of
from transfuse.convert.hf_folder import read_hf_config, save_hf_folder, start_from_hf
from transfuse.diffusion import DiffusionConfig, Process
from transfuse.export import Exported, GenerationConfig
from transfuse.inference import Engine, Request, TextDelta
from transfuse.model import ModelConfig, Transfusion, dense, for_batch
from transfuse.sequence import Document, SequenceFormat, Text, Tokenizer, collate

transformers = pytest.importorskip("transformers")

SHAPE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1000000.0}
WINDOW = {"use_sliding_window": True}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 2": ("Llama", {"num_key_value_heads": 4}),
    "Llama 3.1": ("Llama", {"rope_parameters": LLAMA3}),
    "Llama, linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
    "Llama 3.2, tied": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "head_dim": 32}),
    "SmolLM2": (
        "Llama",
        {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    ),
    "Mistral": ("Mistral", {"sliding_window": None}),
    "Mistral, wide heads": ("Mistral", {"sliding_window": 128, "head_dim": 32}),
    "Qwen2.5": ("Qwen2", {"use_sliding_window": False, "sliding_window": 32}),
    "Qwen2.5, yarn": ("Qwen2", {"rope_parameters": YARN}),
    "Qwen3": ("Qwen3", {"head_dim": 32}),
    "Qwen3, yarn": ("Qwen3", {"head_dim": 16, "rope_parameters": YARN | {"attention_factor": 1.2}}),
    "SmolLM3": ("SmolLM3", {}),
    "SmolLM3, its own layers": ("SmolLM3", {"no_rope_layers": [0, 1, 1, 0, 1]}),
    "OLMo 2": ("Olmo2", {}),
    "OLMo 2, grouped": ("Olmo2", {"num_key_value_heads": 4}),
    "Phi-3": ("Phi3", {"sliding_window": None}),
    "Mistral, window": ("Mistral", {"sliding_window": 17}),
    "Phi-3, window": ("Phi3", {"sliding_window": 24}),
    "Qwen2, window of some layers": ("Qwen2", WINDOW | {"sliding_window": 12, "max_window_layers": 2}),
    "Qwen3, window": ("Qwen3", WINDOW | {"sliding_window": 33, "max_window_layers": 0, "head_dim": 32}),
    "SmolLM3, window, tied": (
        "SmolLM3",
        WINDOW
        | {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"]}
        | {"tie_word_embeddings": True},
    ),
}
IDS = torch.randint(5, 320, (60,), generator=torch.Generator().manual_seed(0))


def theirs(row: str) -> Any:
    """Return the family's network in transformers with random weights, none of them zero or one."""
    return network(*ROWS[row])


def network(kind: str, changes: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**SHAPE | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def started(folder: Path) -> Transfusion:
    model = Transfusion(ModelConfig(images="none", **read_hf_config(folder))).initialise(3).eval()
    match = start_from_hf(model, folder)
    assert not match.missing
    assert not match.unexpected
    return model


def expected(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids[None]).logits[0].float()


@pytest.mark.parametrize("row", ROWS)
def test_logits_are_those_of_transformers(row: str, tmp_path: Path) -> None:
    model = theirs(row)
    model.save_pretrained(tmp_path)
    ours, sequence_format = started(tmp_path), SequenceFormat(0, 1, 2, 3, 2)
    assert ours.config.vocab_size == 320
    texts = [tuple(IDS.tolist()), tuple(IDS[20:45].tolist())]
    # Two documents packed into a row: BOS, whose id is 0, stands before each.
    batch = collate([Document([Text(text)], sample=i) for i, text in enumerate(texts)], sequence_format)
    every = torch.arange(batch.positions)
    for attend in (dense(batch, ours.config), for_batch(batch, torch.float32, ours.config)):
        with torch.no_grad():
            found = ours(batch.input_ids, batch.position_ids, attend, every).logits
        begin = 0
        for text in texts:
            wanted = expected(model, torch.tensor([0, *text]))
            torch.testing.assert_close(found[begin : begin + len(wanted)], wanted, rtol=0, atol=1e-4)
            begin = int((batch.position_ids == 0).nonzero()[1]) if begin == 0 else begin


@pytest.mark.parametrize("row", ROWS)
def test_cached_logits_are_those_of_transformers(row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine writes 24 tokens one by one; each is chosen from transformers' logits on all before it."""
    model, tokenizer = theirs(row), Tokenizer.train([], 260)
    model.save_pretrained(tmp_path)
    config = ModelConfig(images="latents", latent_channels=3, **read_hf_config(tmp_path))
    ours = Transfusion(config).initialise(3).eval().requires_grad_(False)
    start_from_hf(ours, tmp_path)
    export = Exported(ours, Process(DiffusionConfig()), Pixels(), tokenizer, 32, GenerationConfig())
    seen, choose = [], Engine._choose

    def recorded(self: Engine, seq: Any, logits: torch.Tensor, argmax: int) -> Any:
        seen.append(logits.detach().clone().float().flatten()[:320])
        return choose(self, seq, logits, argmax)

    monkeypatch.setattr(Engine, "_choose", recorded)
    ids = tuple(IDS[:40].tolist())
    request = Request(Document([Text(ids)], closed=False), draw="never", max_tokens=24)
    written = [event.token for event in Engine(export).run([request]) if isinstance(event, TextDelta)]
    assert len(seen) >= len(written) > 8
    wanted = expected(model, torch.tensor([tokenizer.bos, *ids, *written]))[len(ids) :]
    for found, logits in zip(seen, wanted, strict=False):
        known = found.isfinite() & (found > -1e8)  # the others may not be written
        assert known.sum() > 250
        torch.testing.assert_close(found[known], logits[known], rtol=0, atol=5e-6)


@pytest.mark.parametrize("row", ROWS)
def test_a_written_folder_opens_in_transformers(row: str, tmp_path: Path) -> None:
    model = theirs(row)
    model.save_pretrained(tmp_path / "in")
    ours = started(tmp_path / "in")
    save_hf_folder(tmp_path / "out", ours)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    # Phi-3 and Mistral without anything of their own are written as Llamas, which they are.
    plain = "Mistral" if "window" in row else "Llama"
    family = {"Mistral": plain, "Phi3": plain}.get(ROWS[row][0], ROWS[row][0])
    assert type(opened).__name__ == f"{family}ForCausalLM"
    torch.testing.assert_close(expected(opened, IDS), expected(model, IDS), rtol=0, atol=1e-4)
    assert read_hf_config(tmp_path / "out") == read_hf_config(tmp_path / "in")


FULL = {"layer_types": ["full_attention"] * 5}
MIXED = {"layer_types": ["full_attention", "sliding_attention"] * 2 + ["sliding_attention"]}
INNER = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}
OUTER = {"original_max_position_embeddings": 32}
YARN_4 = {"type": "yarn", "factor": 4.0}
NO_ROPE: dict[str, Any] = {"rope_parameters": ..., "rope_theta": ...}
NINE = {"sliding_window": 9}
NO_KEY_HEADS: dict[str, Any] = {"num_key_value_heads": ...}
EIGHT = {"num_key_value_heads": 8}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "a window that Llama does not read": ("Llama", {}, NINE),
    "a window that OLMo 2 does not read": ("Olmo2", {}, NINE),
    "a flag that Mistral does not read": ("Mistral", NINE, {"use_sliding_window": False}),
    "Mistral with full layers": ("Mistral", NINE, FULL),
    "Mistral with a window in some layers": ("Mistral", NINE, MIXED),
    "layers and a flag that Phi-3 does not read": ("Phi3", NINE, FULL | {"use_sliding_window": False}),
    "SmolLM3's window without layer_types": ("SmolLM3", WINDOW | NINE, {"layer_types": ...}),
    "SmolLM3 without theta": ("SmolLM3", {}, NO_ROPE),
    "Mistral's own number of key heads": ("Mistral", {"num_attention_heads": 16} | EIGHT, NO_KEY_HEADS),
    "yarn, lengths outside": ("Llama", {}, OUTER | {"rope_parameters": INNER}),
    "yarn of transformers 4, lengths outside": ("Qwen2", {}, NO_ROPE | OUTER | {"rope_scaling": YARN_4}),
    "yarn, other lengths inside": (
        "Llama",
        {},
        OUTER | {"rope_parameters": INNER | {"original_max_position_embeddings": 64}},
    ),
    "yarn without a factor": ("Llama", {}, {"rope_parameters": INNER | OUTER | {"factor": None}}),
    "yarn, all fields null": (
        "Llama",
        {},
        {"rope_parameters": INNER | OUTER | {"mscale": None, "beta_fast": 0, "attention_factor": None}},
    ),
    "yarn, truncate null": ("Llama", {}, {"rope_parameters": INNER | OUTER | {"truncate": None}}),
    "both spellings, one scaled": (
        "Llama",
        {},
        {"rope_scaling": YARN_4 | OUTER, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ),
    "both spellings, two thetas": (
        "Llama",
        {},
        {
            "rope_scaling": {"rope_type": "default", "rope_theta": 77.0},
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        },
    ),
    "theta outside": ("Llama", {}, {"rope_theta": 500.0, "rope_parameters": {"rope_type": "default"}}),
    "swish": ("Llama", {}, {"hidden_act": "swish"}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_config_is_read_as_transformers_reads_it(case: str, tmp_path: Path) -> None:
    """Fields that a family ignores, prefers or takes for granted; `...` leaves a field out."""
    kind, changes, edit = CASES[case]
    network(kind, changes).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text()) | edit
    values = {name: value for name, value in values.items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(values))
    wanted = expected(transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval(), torch.tensor([0, *IDS]))
    ours = started(tmp_path)
    batch = collate([Document([Text(tuple(IDS.tolist()))])], SequenceFormat(0, 1, 2, 3, 2))
    with torch.no_grad():
        found = ours(
            batch.input_ids, batch.position_ids, dense(batch, ours.config), torch.arange(batch.positions)
        ).logits
    torch.testing.assert_close(found[: len(wanted)], wanted, rtol=0, atol=1e-4)


def test_every_family_has_a_row() -> None:
    kinds = {f"{kind}ForCausalLM" for kind, _ in ROWS.values()}
    assert kinds == {architecture.model_class for architecture in ARCHITECTURES.values()}
    for name, architecture in ARCHITECTURES.items():
        assert hasattr(transformers, architecture.model_class), name
    assert not ARCHITECTURES.keys() & OTHER_MATHEMATICS.keys()
    refused = {"olmo3", "ministral", "gpt_oss", "llama4_text", "qwen3_vl", "exaone4", "gemma3", "phi4_multimodal"}
    assert refused <= OTHER_MATHEMATICS.keys()


def test_a_network_of_no_family_is_named() -> None:
    with pytest.raises(ValueError, match=r"transformer of llama, .* found qkv_bias True, qk_norm True"):
        model_type_of(ModelConfig(qkv_bias=True, qk_norm=True))
