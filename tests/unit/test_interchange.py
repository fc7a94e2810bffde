"""Folders of others: what is refused, and in which words; what a match says; and that nothing is loaded half."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from conftest import randomised, tiny
from safetensors.torch import load_file, save_file
from torch import Tensor

from transfuse.convert.architectures import hf_weights
from transfuse.convert.hf_folder import (
    Match,
    read_hf_config,
    save_hf_folder,
    start_from_hf,
)
from transfuse.errors import UserError
from transfuse.model import Transfusion
from transfuse.sequence import Tokenizer

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500000.0,
}
FIELDS = {
    "text_vocab_size": 300,
    "d_model": 64,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "d_ff": 96,
    "max_seq_len": 128,
    "rope_theta": 500000.0,
    "norm_eps": 1e-6,
}
LAYER = "model.layers.1."


def folder_with(path: Path, **changes: Any) -> Path:
    """A folder with no more than a config.json; a field of `...` is left out."""
    path.mkdir(exist_ok=True)
    values = {name: value for name, value in (CONFIG | changes).items() if value is not ...}
    (path / "config.json").write_text(json.dumps(values))
    return path


def weights_of(seed: int = 1, **changes: Any) -> dict[str, Tensor]:
    """Return the weights of a folder of this shape, as copies that can be dropped, added to or cut."""
    weights = hf_weights(randomised(tiny(**FIELDS | changes), seed))
    return {name: value.clone() for name, value in weights.items()}


def ours(**changes: Any) -> Transfusion:
    return randomised(tiny(**FIELDS | changes), seed=5)


def refused(model: Transfusion, folder: Path, match: str, **arguments: Any) -> None:
    """One line that says so, and a model that is what it was, to the bit."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=match) as error:
        start_from_hf(model, folder, **arguments)
    assert "\n" not in str(error.value)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_fields_of_either_spelling(tmp_path) -> None:
    assert read_hf_config(folder_with(tmp_path)) == FIELDS
    assert read_hf_config(folder_with(tmp_path), max_seq_len=64) == FIELDS | {"max_seq_len": 64}
    new = {"rope_theta": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
    assert read_hf_config(folder_with(tmp_path, **new)) == FIELDS
    llama_2 = {"rope_theta": ..., "rope_scaling": None, "head_dim": None, "num_key_value_heads": ...}
    assert read_hf_config(folder_with(tmp_path, **llama_2)) == FIELDS | {"rope_theta": 1e4, "n_kv_heads": 4}
    harmless = {"attention_bias": False, "hidden_act": "silu", "head_dim": 16, "model_type": "mistral"}
    assert read_hf_config(folder_with(tmp_path, **harmless)) == FIELDS


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"hidden_size": ...}, "hidden_size: expected a number, found None"),
        ({"rms_norm_eps": ...}, "rms_norm_eps: expected a number, found None"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers: expected a number, found '2'"),
        ({"model_type": "granite"}, r'model_type: expected .* found "granite" \(multipliers\)'),
        ({"attention_bias": True}, "attention_bias: expected False, found True"),
        ({"mlp_bias": True}, "mlp_bias: expected False, found True"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', found 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: expected None, found {'bits': 4}"),
        ({"head_dim": 15}, r"model\.d_head: expected a positive, even number, found 15"),
        ({"model_type": "unheard-of"}, 'model_type: expected one of llama, mistral, .* found "unheard-of"'),
        ({"model_type": ...}, 'model_type: expected one of llama, mistral, .* found "None"'),
        ({"num_key_value_heads": 3}, r"model\.n_kv_heads: expected a divisor of n_heads \(4\), found 3"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2}},
            'rope_scaling: expected default, linear.* found "dynamic"',
        ),
        ({"rope_scaling": {"rope_type": "longrope"}}, 'rope_scaling: expected default, linear, .* found "longrope"'),
        ({"rope_parameters": {"rope_type": "yarn", "mscale": 1}}, "rope_parameters.mscale: expected none, found 1"),
        (
            {"rope_scaling": {"type": "linear", "factor": -1}},
            "rope_scaling.factor: expected a positive number, found -1",
        ),
        ({"rope_parameters": {"full_attention": {}, "sliding_attention": {}}}, "rope_parameters: expected the same"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1, found 0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor: expected 1, found 0.25"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layer_types: .* found chunked_attention"),
    ],
    ids=str,
)
def test_what_the_trunk_can_not_be(tmp_path, changes, match) -> None:
    folder = folder_with(tmp_path, **changes)
    with pytest.raises(UserError, match=match) as error:
        read_hf_config(folder)
    assert str(error.value).startswith(f"{folder / 'config.json'}: ")
    assert "\n" not in str(error.value)


ROPE = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
SMOLLM3 = {"model_type": "smollm3", "rope_theta": 500000.0}
QWEN = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9}
MISTRAL = {"model_type": "mistral"}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rope_scaling": [1]}, r"rope_scaling: expected an object of settings, found \[1\]"),
        ({"rope_scaling": "linear"}, "rope_scaling: expected an object of settings, found 'linear'"),
        ({"rope_scaling": {"type": ["yarn"]}}, "rope_scaling: expected default, linear"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "rope_scaling.factor: expected a positive number"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: expected a number, found none"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor: expected a number, found none"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8.0}},
            "rope_scaling.low_freq_factor: expected a number, found none",
        ),
        ({"rope_scaling": ROPE | {"original_max_position_embeddings": 32.5}}, "expected a positive whole number"),
        ({"rope_scaling": ROPE | {"beta_slow": -1}}, "rope_scaling.beta_slow: expected a positive number, found -1"),
        ({"rope_scaling": ROPE, "model_type": "phi3"}, 'rope_scaling: expected default, found "yarn"'),
        ({"rope_theta": "ten"}, "rope_theta: expected a number above 1, found 'ten'"),
        ({"rope_theta": [1]}, "rope_theta: expected a number above 1"),
        ({"rope_theta": -1.0}, "rope_theta: expected a number above 1, found -1.0"),
        ({"rope_theta": 1.0, "rope_scaling": ROPE}, "rope_theta: expected a number above 1, found 1.0"),
        ({"head_dim": "16"}, "head_dim: expected a positive whole number, found '16'"),
        ({"hidden_size": 64.0}, "hidden_size: expected a positive whole number, found 64.0"),
        ({"num_hidden_layers": True}, "num_hidden_layers: expected a positive whole number, found True"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers: expected a positive whole number"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: expected at most 1000, found 1000000000"),
        ({"num_attention_heads": 0}, "num_attention_heads: expected a positive whole number, found 0"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads: expected a positive whole number, found '2'"),
        ({"num_key_value_heads": -2}, "num_key_value_heads: expected a positive whole number, found -2"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a positive number, found nan"),
        ({"model_type": ["llama"]}, "model_type: expected one of llama"),
        (MISTRAL | {"sliding_window": "9"}, "sliding_window: expected a positive whole number or null, found '9'"),
        (MISTRAL | {"sliding_window": 9.5}, "sliding_window: expected a positive whole number or null"),
        (
            MISTRAL | {"sliding_window": 9, "layer_types": ["sliding_attention"]},
            r"layer_types: expected a list of 2 names, found \['sliding_attention'\]",
        ),
        (MISTRAL | {"layer_types": "sliding_attention"}, "layer_types: expected a list of 2 names"),
        (QWEN | {"max_window_layers": None}, "max_window_layers: expected a whole number of layers, found None"),
        (QWEN | {"max_window_layers": "2"}, "max_window_layers: expected a whole number of layers, found '2'"),
        (SMOLLM3 | {"no_rope_layers": [1]}, "no_rope_layers: expected a list of 0 or 1 for each of 2 layers"),
        (SMOLLM3 | {"no_rope_layers": "1110"}, "no_rope_layers: expected a list of 0 or 1"),
        (SMOLLM3 | {"no_rope_layer_interval": 0}, "no_rope_layer_interval: expected a positive whole number, found 0"),
    ],
    ids=str,
)
def test_fields_of_another_kind_are_one_line_or_dropped(tmp_path, changes, match) -> None:
    folder = folder_with(tmp_path, max_position_embeddings=8192, **changes)
    with pytest.raises(UserError, match=match) as error:
        read_hf_config(folder)
    assert "\n" not in str(error.value)
    named = re.search(r"allow-changes (\S+) drops", str(error.value))
    if named is not None:
        assert read_hf_config(folder, allow=[named[1]])["d_model"] == 64
    else:  # a network has these: no name drops them
        required = str(error.value).split(": ")[1]
        with pytest.raises(UserError, match=match):
            read_hf_config(folder, allow=[required])


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": None},
        {"sliding_window": 128},
        {"sliding_window": 64, "layer_types": ["full_attention"] * 2},
        {"sliding_window": 64, "model_type": "llama"},
    ],
    ids=str,
)
def test_windows_that_hide_nothing(tmp_path, changes) -> None:
    assert read_hf_config(folder_with(tmp_path, **{"model_type": "mistral"} | changes)) == FIELDS


def test_a_folder_without_a_config_or_with_another_thing(tmp_path) -> None:
    with pytest.raises(UserError, match=r"config\.json: expected a JSON file, found none"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config\.json: expected the fields of a model, found a list"):
        read_hf_config(tmp_path)


def test_everything_lands_where_it_belongs(tmp_path) -> None:
    weights, model = weights_of(), ours()
    save_file(weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, tmp_path / "model.safetensors")
    match = start_from_hf(model, folder_with(tmp_path))
    assert match == Match(tuple(sorted(weights)), (), ())
    assert str(match) == "matched 21\nmissing 0\nunexpected 0"
    for name, value in randomised(tiny(**FIELDS), seed=1).transformer.state_dict().items():
        assert torch.equal(model.transformer.state_dict()[name], value), name


def test_weights_take_the_dtype_of_the_model(tmp_path) -> None:
    weights, model = weights_of(), ours().to(torch.bfloat16)
    save_file({name: value.half() for name, value in weights.items()}, tmp_path / "model.safetensors")
    start_from_hf(model, folder_with(tmp_path))
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    expected = weights["model.norm.weight"].half().bfloat16()
    assert torch.equal(model.transformer.norm.weight, expected)


def test_missing_and_unexpected_names(tmp_path) -> None:
    weights, model = weights_of(), ours()
    for name in ("self_attn.k_proj", "mlp.up_proj"):
        del weights[LAYER + name + ".weight"]
    weights |= {f"{LAYER}self_attn.{name}_proj.bias": torch.ones(64) for name in "qo"}
    save_file(weights, folder_with(tmp_path) / "model.safetensors")
    missing = ("model.layers.1.mlp.up_proj.weight", "model.layers.1.self_attn.k_proj.weight")
    unexpected = ("model.layers.1.self_attn.o_proj.bias", "model.layers.1.self_attn.q_proj.bias")
    kinds = ["mlp.up_proj.weight", "self_attn.k_proj.weight", "self_attn.o_proj.bias", "self_attn.q_proj.bias"]
    named = f"found missing 2: {', '.join(missing)}; unexpected 2: {', '.join(unexpected)} "
    refused(model, tmp_path, re.escape(f"{named}(--init.allow-changes {' '.join(kinds)} does without)"))
    refused(model, tmp_path, re.escape("(--init.allow-changes self_attn.q_proj.bias does"), allow=kinds[:3])
    match = start_from_hf(model, tmp_path, kinds)
    assert (match.missing, match.unexpected, len(match.matched)) == (missing, unexpected, 19)
    before, after = hf_weights(ours()), hf_weights(model)
    for name in after:
        assert torch.equal(after[name], before[name] if name in missing else weights[name]), name


def test_a_match_lists_the_first_eight() -> None:
    match = Match((), ("m",), tuple("abcdefghij"))
    assert str(match) == "matched 0\nmissing 1: m\nunexpected 10: a, b, c, d, e, f, g, h and 2 more"


@pytest.mark.parametrize(
    ("name", "shape", "match"),
    [
        (LAYER + "self_attn.v_proj.weight", (64, 64), r"v_proj\.weight: expected \(32, 64\), found \(64, 64\)"),
        ("model.norm.weight", (1,), r"model\.norm\.weight: expected \(64,\), found \(1,\)"),
        ("lm_head.weight", (301, 64), r"lm_head\.weight: expected at most 300 rows of 64, found \(301, 64\)"),
        ("model.embed_tokens.weight", (300, 1), r"embed_tokens\.weight: expected .* of 64, found \(300, 1\)"),
    ],
)
def test_a_wrong_shape_is_refused_and_nothing_written(tmp_path, name, shape, match) -> None:
    save_file(weights_of() | {name: torch.ones(shape)}, folder_with(tmp_path) / "model.safetensors")
    refused(ours(), tmp_path, match, allow=[name.removeprefix(LAYER), name])


def test_rows_of_codes_are_not_for_words(tmp_path) -> None:
    codes = {
        "images": "codes",
        "codebook_size": 64,
        "patch_size": 1,
        "unet_channels": None,
        "image_attention": "causal",
    }
    save_file(weights_of(text_vocab_size=301), folder_with(tmp_path) / "model.safetensors")
    refused(ours(**codes), tmp_path, r"expected at most 300 rows of 64, found \(301, 64\)")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"n_heads": 8, "n_kv_heads": 4}, r"model\.n_heads: expected 4, found 8"),
        ({"n_kv_heads": None}, r"model\.n_kv_heads: expected 2, found 4"),
        ({"norm_order": "swin"}, r"model\.norm_order: expected pre, found swin"),
    ],
    ids=str,
)
def test_another_network_of_the_same_shapes(tmp_path, changes, match) -> None:
    save_file(weights_of(), folder_with(tmp_path) / "model.safetensors")
    refused(ours(**changes), tmp_path, match)


def test_other_constants_are_refused_if_strict(tmp_path) -> None:
    save_file(weights_of(), folder_with(tmp_path) / "model.safetensors")
    for field, value in (("rope_theta", 10000.0), ("norm_eps", 1e-5)):
        refused(ours(**{field: value}), tmp_path, rf"model\.{field}: expected .*, found {value}")
        assert not start_from_hf(ours(**{field: value}), tmp_path, {field}).missing


def test_norms_of_queries_and_keys_are_ours(tmp_path) -> None:
    save_file(weights_of(), folder_with(tmp_path) / "model.safetensors")
    model, before = ours(qk_norm=True), ours(qk_norm=True)
    assert not start_from_hf(model, tmp_path).missing
    name = "blocks.1.query_norm.weight"
    assert torch.equal(model.transformer.state_dict()[name], before.transformer.state_dict()[name])


def test_a_tied_head_is_a_copy(tmp_path) -> None:
    weights, model = weights_of(), ours(text_vocab_size=304)
    del weights["lm_head.weight"]
    save_file(weights, folder_with(tmp_path) / "model.safetensors")
    refused(model, tmp_path, r"missing 1: lm_head\.weight")
    match = start_from_hf(model, folder_with(tmp_path, tie_word_embeddings=True), new_ids=[300])
    assert (match.missing, len(match.matched)) == ((), 20)
    for weight in (model.embedding.weight, model.lm_head.weight):
        assert torch.equal(weight[:300], weights["model.embed_tokens.weight"])
        torch.testing.assert_close(weight[300], weights["model.embed_tokens.weight"].mean(0))
    before = ours(text_vocab_size=304)
    assert torch.equal(model.embedding.weight[301:], before.embedding.weight[301:])
    assert torch.equal(model.lm_head.weight[301:], before.lm_head.weight[301:])


def test_a_tied_head_that_is_in_the_file_is_read_and_one_of_no_embedding_is_missing(tmp_path) -> None:
    weights, folder = weights_of(), folder_with(tmp_path, tie_word_embeddings=True)
    save_file(weights, folder / "model.safetensors")
    model = ours()
    assert len(start_from_hf(model, folder).matched) == 21
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])
    assert torch.equal(model.embedding.weight, weights["model.embed_tokens.weight"])
    both = ("lm_head.weight", "model.embed_tokens.weight")
    save_file({name: value for name, value in weights.items() if name not in both}, folder / "model.safetensors")
    assert start_from_hf(ours(), folder, both).missing == both


def test_a_tied_flag_is_no_reason_to_drop_another_head(tmp_path) -> None:
    """Transformers compares the two matrices and ties only equal ones."""
    weights, folder = weights_of(), folder_with(tmp_path, tie_word_embeddings=True)
    save_file(weights, folder / "model.safetensors")
    assert read_hf_config(folder) == FIELDS
    refused(ours(tie_embeddings=True), folder, r"unexpected 1: lm_head\.weight")
    assert not start_from_hf(ours(tie_embeddings=True), folder, ["lm_head.weight"]).missing
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    assert read_hf_config(folder) == FIELDS | {"tie_embeddings": True}
    assert not start_from_hf(ours(tie_embeddings=True), folder).unexpected


def test_a_family_that_ties_without_a_flag_may_be_untied(tmp_path) -> None:
    """SmolLM3 ties its embeddings by default; `freeze text` trains the output rows apart."""
    weights, folder = weights_of(), folder_with(tmp_path, model_type="smollm3", no_rope_layers=[1, 1])
    head = weights.pop("lm_head.weight")
    save_file(weights, folder / "model.safetensors")
    assert read_hf_config(folder)["tie_embeddings"]
    model = ours()
    assert not start_from_hf(model, folder).missing
    assert torch.equal(model.lm_head.weight, weights["model.embed_tokens.weight"])
    assert not torch.equal(model.lm_head.weight, head)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool])
def test_integers_are_no_weights(tmp_path, dtype) -> None:
    weights, name = weights_of(), LAYER + "mlp.up_proj.weight"
    save_file(weights | {name: (weights[name] * 100).to(dtype)}, folder_with(tmp_path) / "model.safetensors")
    refused(ours(), tmp_path, r"tensor model\.layers\.1\.mlp\.up_proj\.weight: expected floating-point numbers, found ")


def test_an_adapter_is_not_its_base(tmp_path) -> None:
    save_file(weights_of(), folder_with(tmp_path) / "model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(ours(), tmp_path, r"adapter_config\.json: expected a whole model, found an adapter: merge it")
    assert not start_from_hf(ours(), tmp_path, ["adapter"]).missing


@pytest.mark.parametrize("wrong", [5, None, ["a.safetensors"]], ids=str)
def test_an_index_of_other_things(tmp_path, wrong) -> None:
    sharded(folder_with(tmp_path))
    index = tmp_path / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["model.norm.weight"] = wrong
    index.write_text(json.dumps(values))
    refused(ours(), tmp_path, r"index\.json: weight_map: expected the file of every tensor, found another thing")


def test_new_ids_start_at_the_mean_of_those_before_them(tmp_path) -> None:
    weights, model = weights_of(), ours(text_vocab_size=304)
    save_file(weights, folder_with(tmp_path) / "model.safetensors")
    start_from_hf(model, tmp_path, new_ids=[290, 302])  # rows from 290 on pad their table
    for weight, name in (
        (model.embedding.weight, "model.embed_tokens.weight"),
        (model.lm_head.weight, "lm_head.weight"),
    ):
        mean = weights[name][:290].mean(0)
        torch.testing.assert_close(weight[[290, 302]], mean.expand(2, -1))
        assert torch.equal(weight[291:300], weights[name][291:300])
    for wrong in (304, -1):
        refused(model, tmp_path, "new_ids: expected ids below 304, found", new_ids=[wrong])


def sharded(folder: Path) -> dict[str, Tensor]:
    weights = weights_of()
    names = sorted(weights)
    parts = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return weights


def test_shards(tmp_path) -> None:
    weights, model = sharded(folder_with(tmp_path)), ours()
    assert len(start_from_hf(model, tmp_path).matched) == 21
    for name, value in hf_weights(model).items():
        assert torch.equal(value, weights[name]), name


def test_a_shard_that_is_not_there_or_not_one(tmp_path) -> None:
    sharded(folder_with(tmp_path))
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "b.safetensors").read_bytes()[:-1])
    refused(ours(), tmp_path, r"b\.safetensors: expected a safetensors file, found something else")
    (tmp_path / "b.safetensors").unlink()
    refused(ours(), tmp_path, r"b\.safetensors: expected the shard that .* names, found no file")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    refused(ours(), tmp_path, r"index\.json: weight_map: expected the file of every tensor, found none")


def test_only_safetensors_are_opened(tmp_path) -> None:
    refused(ours(), folder_with(tmp_path), r"model\.safetensors: expected safetensors weights, found no file")
    torch.save(weights_of(), tmp_path / "pytorch_model.bin")
    refused(ours(), tmp_path, r"expected safetensors weights, found only a pickled \.bin")


def test_what_is_written_is_what_is_read(tmp_path, tokenizer) -> None:
    model, folder = ours(), tmp_path / "out"
    folder.mkdir()
    for former in ("config.json", "former.json"):
        (folder / former).write_text("{}")
    save_hf_folder(folder, model, tokenizer)
    files = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in folder.iterdir()) == files
    assert read_hf_config(folder) == FIELDS
    values = json.loads((folder / "config.json").read_text())
    assert (values["architectures"], values["model_type"]) == (["LlamaForCausalLM"], "llama")
    assert (values["torch_dtype"], values["bos_token_id"], values["eos_token_id"]) == ("float32", 0, 1)
    assert values["rope_theta"] == values["rope_parameters"]["rope_theta"]  # transformers 4, transformers 5
    written = load_file(folder / "model.safetensors")
    for name, value in hf_weights(model).items():
        assert torch.equal(written.pop(name), value), name
    assert not written


def test_what_can_not_be_written(tmp_path, monkeypatch) -> None:
    for changes in ({"qk_norm": True}, {"norm_order": "swin"}):
        with pytest.raises(UserError, match=r"out: model: expected the transformer of llama, .*, found qkv_bias False"):
            save_hf_folder(tmp_path / "out", ours(**changes))
    save_hf_folder(tmp_path / "out", ours())
    former = (tmp_path / "out" / "config.json").read_text()

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("transfuse.convert.hf_folder.save_file", full)
    with pytest.raises(UserError, match=r"out: Llama not written \(no space left\)"):
        save_hf_folder(tmp_path / "out", ours())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "config.json").read_text() == former


def words(path: Path, vocabulary: dict[str, int], **changes: Any) -> Path:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="a"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    path.write_text(json.dumps(json.loads(backend.to_str()) | changes))
    return path


def test_markers_are_added_behind(tmp_path) -> None:
    adopted = Tokenizer.adopt(words(tmp_path / "tokenizer.json", {"a": 0, "b": 1, "<|eos|>": 2}))
    assert (adopted.bos, adopted.eos, adopted.boi, adopted.eoi, adopted.vocab_size) == (3, 2, 4, 5, 6)
    adopted.save(tmp_path / "ours.json")
    again = Tokenizer.load(tmp_path / "ours.json")
    assert (again.bos, again.eos, again.boi, again.eoi) == (3, 2, 4, 5)
    assert Tokenizer.adopt(tmp_path / "ours.json").backend.to_str() == again.backend.to_str()
    assert again.decode([0, 3, 1, 5, 2]) == "a b"  # a word that is a marker's name has become the marker


def test_a_marker_typed_is_text_and_documents_keep_their_length(tmp_path) -> None:
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    filled = {"strategy": {"Fixed": 6}, "direction": "Right", "pad_to_multiple_of": None}
    filled |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "a"}
    path = words(tmp_path / "tokenizer.json", {"a": 0, "b": 1}, truncation=cut, padding=filled)
    adopted = Tokenizer.adopt(path)
    assert adopted.encode("b a b a") == (1, 0, 1, 0)
    assert adopted.bos not in adopted.encode("b <|bos|>")


def test_tokenizers_that_are_none(tmp_path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(UserError, match=r"tokenizer\.json: expected a tokenizer\.json, found no file"):
        Tokenizer.adopt(path)
    path.write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: expected a tokenizer\.json, found something else"):
        Tokenizer.adopt(path)
    with pytest.raises(UserError, match=r"tokenizer\.json: expected ids from 0 to 5, found gaps among them"):
        Tokenizer.adopt(words(path, {"a": 0, "b": 9}))
