"""Text only, our trunk is Llama: the same weights give the same logits as transformers' LlamaForCausalLM, and folders
go both ways."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import pytest
import tokenizers
import torch
from conftest import WORDS, randomised, tiny
from torch import Tensor

from transfuse.convert.architectures import hf_config, hf_weights
from transfuse.convert.hf_folder import (
    new_markers,
    read_hf_config,
    save_hf_folder,
    start_from_hf,
)
from transfuse.errors import UserError
from transfuse.model import ModelConfig, Transfusion, dense
from transfuse.sequence import Document, SequenceFormat, Text, Tokenizer, collate

transformers = pytest.importorskip("transformers")


def rotary(theta: float) -> dict[str, object]:
    """The base as transformers 5 reads it, and as 4 does."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}, "rope_theta": theta}


KINDS = {
    "llama": {},
    "mistral": {"sliding_window": None, **rotary(1e6)},
}
BIASES = {"qkv_bias", *(f"self_attn.{name}_proj.bias" for name in "qkv")}
BATCH = collate([Document([Text(tuple(range(4, 60)))])], SequenceFormat(0, 1, 2, 3, 2))


def ours_of(model: Transfusion) -> Tensor:
    with torch.no_grad():
        return model(BATCH.input_ids, BATCH.position_ids, dense(BATCH), torch.arange(BATCH.positions)).logits


def theirs_of(model) -> Tensor:
    with torch.no_grad():
        return model.eval()(BATCH.input_ids[None]).logits[0].float()


def close(ours: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.1
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def hf_model_of(kind: str = "llama", **changes):
    """A small network of transformers in which nothing is as it starts: norms too, but Qwen2's biases are zero."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **sizes | KINDS.get(kind, {}) | changes)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def saved(model, folder: Path, shard: str = "50GB") -> Path:
    weights = {name: value for name, value in model.state_dict().items() if not name.endswith("bias")}
    model.save_pretrained(folder, state_dict=weights, max_shard_size=shard)
    return folder


def started(folder: Path, allow: Collection[str] = (), new_ids: Collection[int] = (), **changes) -> Transfusion:
    """Our model of a folder's shape, with patch layers, whose every weight was something else before."""
    model = randomised(tiny(**read_hf_config(folder) | changes), seed=5)
    start_from_hf(model, folder, allow, new_ids)
    return model.eval()


@pytest.mark.parametrize(
    "variant", [{}, {"n_kv_heads": 2}, {"n_heads": 2, "d_ff": 160, "rope_theta": 500000.0}], ids=str
)
def test_logits_equal_llama(variant) -> None:
    config = tiny(**variant)
    model = randomised(config).eval()
    hf_model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**hf_config(config))).eval()
    result = hf_model.load_state_dict(hf_weights(model), strict=True)
    assert not result.missing_keys
    close(ours_of(model), theirs_of(hf_model))


@pytest.mark.parametrize("shard", ["50GB", "40KB"], ids=["whole", "sharded"])
@pytest.mark.parametrize("kind", KINDS)
def test_import_gives_their_logits(tmp_path, kind, shard) -> None:
    model = hf_model_of(kind)
    folder = saved(model, tmp_path / kind, shard)
    assert (folder / "model.safetensors.index.json").exists() == (shard == "40KB")
    close(ours_of(started(folder)), theirs_of(model))


def test_import_of_a_tied_network(tmp_path) -> None:
    model = hf_model_of(tie_word_embeddings=True)
    ours = started(saved(model, tmp_path / "tied"))
    close(ours_of(ours), theirs_of(model))
    assert ours.lm_head.weight is ours.embedding.weight


def test_import_into_a_larger_vocabulary(tmp_path) -> None:
    model = hf_model_of()
    folder = saved(model, tmp_path / "small")
    before = randomised(tiny(**read_hf_config(folder) | {"text_vocab_size": 310}), seed=5)
    ours = started(folder, text_vocab_size=310)
    close(ours_of(ours)[:, :300], theirs_of(model))
    for name in ("embedding", "lm_head"):
        table, initial = (getattr(network, name).weight for network in (ours, before))
        assert torch.equal(table[300:], initial[300:])
        assert not torch.equal(table[:300], initial[:300])


def test_import_leaves_patch_layers_alone(tmp_path) -> None:
    folder = saved(hf_model_of(), tmp_path / "llama")
    ours = started(folder)
    before = randomised(ours.config, seed=5)
    assert ours.image_adapter is not None
    for name, value in ours.image_adapter.state_dict().items():
        assert torch.equal(value, before.get_submodule("image_adapter").state_dict()[name]), name


def test_import_reads_either_spelling_of_the_rotary_base(tmp_path) -> None:
    model = hf_model_of(**rotary(500000.0))
    folder = saved(model, tmp_path / "llama")
    values = json.loads((folder / "config.json").read_text())
    assert read_hf_config(folder)["rope_theta"] == 500000.0
    del values["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(values | {"rope_theta": 500000.0, "rope_scaling": None}))
    close(ours_of(started(folder)), theirs_of(model))


def test_norms_of_qwen3_are_named(tmp_path) -> None:
    folder = saved(hf_model_of("qwen3", head_dim=16), tmp_path / "qwen3")
    with pytest.raises(UserError, match=r"model\.qk_norm: expected True, found False"):
        started(folder, qk_norm=False)
    assert started(
        folder, {"qk_norm", "qk_norm_type", "self_attn.q_norm.weight", "self_attn.k_norm.weight"}, qk_norm=False
    )


def test_biases_of_qwen2_are_named(tmp_path) -> None:
    model = hf_model_of("qwen2")
    folder = tmp_path / "qwen2"
    model.save_pretrained(folder)
    with pytest.raises(UserError, match=r"model\.qkv_bias: expected True, found False"):
        started(folder, qkv_bias=False)
    close(ours_of(started(folder, BIASES, qkv_bias=False)), theirs_of(model))  # they are zero here


@pytest.mark.parametrize("kind", ["ernie4_5", "gemma", "granite", "helium"])
def test_kin_that_no_name_or_shape_would_tell_are_refused(tmp_path, kind) -> None:
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    alike = {"num_hidden_layers": 4, "head_dim": 16, "hidden_act": "silu", "tie_word_embeddings": False}
    folder = saved(hf_model_of(kind, **alike, **ids), tmp_path / kind)
    with pytest.raises(UserError, match=f'model_type: expected .* found "{kind}"'):
        started(folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"model_type": "llama"}))
    assert started(folder)  # by fields, names and shapes alone it would be a Llama: hence the table


@pytest.mark.parametrize(
    "variant",
    [{}, {"n_kv_heads": 2, "rope_theta": 500000.0, "norm_eps": 1e-6}, {"images": "none", "d_ff": 160}],
    ids=str,
)
def test_export_opens_in_transformers(tmp_path, variant, tokenizer) -> None:
    model = randomised(tiny(**variant)).eval()
    save_hf_folder(tmp_path / "out", model, tokenizer)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(opened) is transformers.LlamaForCausalLM
    assert (opened.config.bos_token_id, opened.config.eos_token_id) == (tokenizer.bos, tokenizer.eos)
    assert opened.generation_config.eos_token_id == [tokenizer.eos, tokenizer.boi]
    close(theirs_of(opened), ours_of(model))
    close(ours_of(started(tmp_path / "out")), ours_of(model))


def test_export_of_half_precision_and_of_no_markers(tmp_path) -> None:
    model = randomised(tiny()).to(torch.bfloat16)
    save_hf_folder(tmp_path / "out", model)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert opened.dtype == torch.bfloat16
    assert opened.config.bos_token_id is None
    assert opened.config.eos_token_id is None
    for name, value in hf_weights(model).items():
        assert torch.equal(opened.state_dict()[name], value), name


def test_export_of_a_network_of_codes_has_all_its_ids(tmp_path) -> None:
    config = ModelConfig("codes", 320, 64, 64, 2, 4, max_seq_len=256, patch_size=1, image_attention="causal")
    model = randomised(config).eval()
    save_hf_folder(tmp_path / "out", model)
    close(theirs_of(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")), ours_of(model))


def test_a_folder_with_its_tokenizer(tmp_path) -> None:
    """Their words keep ids and rows; their beginning and end of text are ours; BOI and EOI begin at a mean."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, vocab_size=270)
    backend.train_from_iterator(WORDS, trainer)
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    model = hf_model_of(bos_token_id=0, eos_token_id=[1, 5])
    folder = saved(model, tmp_path / "llama")
    words.save_pretrained(folder)

    ours_words = Tokenizer.of_model(folder)
    assert (ours_words.bos, ours_words.eos, ours_words.boi, ours_words.eoi) == (0, 1, 270, 271)
    assert ours_words.ends == (1, 5)
    assert list(ours_words.encode("two small boats")) == words.encode("two small boats", add_special_tokens=False)
    new_ids = new_markers(folder, ours_words)
    assert new_ids == [270, 271]
    ours, state = started(folder, new_ids=new_ids), model.state_dict()
    for weight, name in ((ours.embedding.weight, "model.embed_tokens.weight"), (ours.lm_head.weight, "lm_head.weight")):
        assert torch.equal(weight[:270], state[name][:270])
        torch.testing.assert_close(weight[270:272], state[name][:270].mean(0).expand(2, -1))
        assert torch.equal(weight[272:], state[name][272:])
