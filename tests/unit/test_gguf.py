"""GGUF files unpacked into folders that transformers opens and a run starts from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from transfuse.cli import run
from transfuse.convert.gguf import gguf_to_folder
from transfuse.errors import UserError
from transfuse.recipes import preset
from transfuse.train import train

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

TEXTS = [
    "a crab on a red background",
    "two balloons, 12345 of them",
    "the moon's above  a boat\n\n",
    "naïve 漢字 🙂",
] * 4
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def trained_tokenizer() -> tokenizers.Tokenizer:
    """A byte-level BPE as SmolLM2 has it: digits apart, control tokens first."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def neighbours_of_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of q or k as llama.cpp stores them: channel i of the first half, then i of the second, and so on."""
    rows = weight.shape[0] // heads
    order = [head * rows + half * (rows // 2) + i for head in range(heads) for i in range(rows // 2) for half in (0, 1)]
    return weight[order]


def write_gguf(path: Path, model, architecture: str, backend: tokenizers.Tokenizer, quantised: bool, **fields) -> None:
    """Write a model of transformers as llama.cpp's converter does."""
    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if "rope_scaling" in fields:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    for name, value in fields.get("more", {}).items():
        kind = gguf.GGUFValueType.get_type(value)
        writer.kv_data[0][name] = gguf.gguf_writer.GGUFValue(value, kind)
    state = json.loads(backend.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].get)
    writer.add_tokenizer_model(fields.get("kind", "gpt2"))
    writer.add_tokenizer_pre(fields.get("pre", "smollm"))
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i < 3 else 1 for i in range(len(tokens))])
    writer.add_token_merges([" ".join(merge) for merge in state["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, weight in model.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")) and architecture == "llama":
            weight = neighbours_of_halves(
                weight, config.num_attention_heads if "q_" in name else config.num_key_value_heads
            )
        found = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}.get(name)
        if name == "lm_head.weight":
            if config.tie_word_embeddings:
                continue
            found = "output.weight"
        if found is None:
            layer, part = name.removeprefix("model.layers.").split(".", 1)
            found = f"blk.{layer}.{PARTS[part.rpartition('.')[0]]}.{part.rpartition('.')[2]}"
        array = weight.float().numpy()
        if quantised and array.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(found, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(found, np.ascontiguousarray(array))
    if "extra" in fields:
        writer.add_tensor(fields["extra"], np.zeros(4, dtype=np.float32))
    if "rope_factors" in fields:
        writer.add_tensor("rope_freqs.weight", fields["rope_factors"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def network(kind: str = "Llama", **changes):
    settings = SHAPE | {"vocab_size": 320, "rms_norm_eps": 1e-6} | changes
    rope = settings.pop("rope_parameters", {"rope_type": "default", "rope_theta": 5000.0})
    config = getattr(transformers, f"{kind}Config")(**settings)
    config.rope_parameters = rope
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("kind", "architecture"), [("Llama", "llama"), ("Qwen2", "qwen2"), ("Qwen3", "qwen3")])
def test_transformers_computes_the_same_from_the_folder(
    tmp_path: Path, kind: str, architecture: str, tied: bool
) -> None:
    model, backend = (
        network(kind, tie_word_embeddings=tied, **({"head_dim": 16} if kind == "Qwen3" else {})),
        trained_tokenizer(),
    )
    with torch.no_grad():
        for parameter in model.parameters():  # biases begin at zero, norms at one
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    write_gguf(tmp_path / "m.gguf", model, architecture, backend, quantised=False)
    folder = gguf_to_folder(tmp_path / "m.gguf", tmp_path / "out")
    opened = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(opened) is type(model)
    ids = torch.tensor([backend.encode(TEXTS[1]).ids])
    with torch.no_grad():
        torch.testing.assert_close(opened(ids).logits, model(ids).logits, rtol=0, atol=1e-6)
    assert (opened.generation_config.bos_token_id, opened.generation_config.eos_token_id) == (1, 2)


@pytest.mark.parametrize("factor", [1.0, 8.0, 32.0])
def test_rotary_factors_of_llama_3_become_its_scaling(tmp_path: Path, factor: float) -> None:
    scaling = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = {"rope_type": "llama3", "rope_theta": 5000.0, "original_max_position_embeddings": 8192, **scaling}
    model = network(max_position_embeddings=32768, rope_parameters=rope)
    plain = network().model.rotary_emb.inv_freq
    factors = (plain / model.model.rotary_emb.inv_freq).numpy()
    assert factors.max() == pytest.approx(factor)
    write_gguf(tmp_path / "m.gguf", model, "llama", trained_tokenizer(), quantised=False, rope_factors=factors)
    opened = transformers.AutoModelForCausalLM.from_pretrained(gguf_to_folder(tmp_path / "m.gguf", tmp_path / "out"))
    torch.testing.assert_close(opened.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    ids, far = torch.arange(3, 40)[None], torch.arange(0, 37)[None] * 500
    with torch.no_grad():
        logits = [each(ids, position_ids=far).logits for each in (opened, model)]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)


def test_quantised_weights_are_within_their_rounding(tmp_path: Path) -> None:
    model = network()
    write_gguf(tmp_path / "m.gguf", model, "llama", trained_tokenizer(), quantised=True)
    opened = transformers.AutoModelForCausalLM.from_pretrained(
        gguf_to_folder(tmp_path / "m.gguf", tmp_path / "out", torch.bfloat16)
    )
    assert opened.dtype == torch.bfloat16
    for name, weight in model.state_dict().items():
        there = opened.state_dict()[name].float()
        assert (there - weight).abs().max() <= weight.abs().max() / 100, name


def test_the_tokenizer_and_chat_template_come_along(tmp_path: Path) -> None:
    backend = trained_tokenizer()
    write_gguf(tmp_path / "m.gguf", network(), "llama", backend, quantised=False)
    opened = transformers.AutoTokenizer.from_pretrained(gguf_to_folder(tmp_path / "m.gguf", tmp_path / "out"))
    for text in [*TEXTS[:4], "<|im_start|>a crab<|im_end|>", "  spaces  and\ttabs", "x" * 50]:
        assert opened(text).input_ids == backend.encode(text).ids, text
        assert opened.decode(opened(text).input_ids) == text
    prompt = opened.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert prompt == "<|im_start|>hi<|im_end|>"
    assert (opened.bos_token, opened.eos_token) == ("<|im_start|>", "<|im_end|>")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "mamba"}, "general.architecture: expected one of llama, qwen2, qwen3, found mamba"),
        ({"kind": "llama"}, r"tokenizer.ggml.model: expected gpt2 \(byte-level BPE\), found llama"),
        ({"pre": "tekken"}, "tokenizer.ggml.pre: expected one of .*smollm.*, found tekken"),
        ({"rope_scaling": True}, "llama.rope.scaling.type: expected none, found yarn"),
        ({"extra": "rope_freqs.weight"}, "tensor rope_freqs.weight: expected the factors of Llama 3.1 or 3.2, found"),
        ({"rope_factors": np.linspace(1, 8, 8, dtype=np.float32)}, "tensor rope_freqs.weight: expected the factors of"),
        ({"extra": "blk.0.attn_q.bias"}, "tensor blk.0.attn_q.bias: expected one of a known network"),
        ({"extra": "blk.0.attn_q_norm.weight"}, "tensor blk.0.attn_q_norm.weight: expected one of a known network"),
        ({"more": {"llama.rope.scaling.factor": 4.0}}, "llama.rope.scaling.factor: expected 0 or 1, found 4.0"),
        ({"more": {"llama.rope.scale_linear": 4.0}}, "llama.rope.scale_linear: expected 0 or 1, found 4.0"),
        ({"more": {"llama.rope.dimension_count": 8}}, "llama.rope.dimension_count: expected 16, found 8"),
        ({"more": {"llama.attention.value_length": 8}}, "llama.attention.value_length: expected 16, found 8"),
        ({"more": {"llama.attention.scale": 0.5}}, "llama.attention.scale: expected no such field, found 0.5"),
        ({"more": {"llama.logit_scale": 0.5}}, "llama.logit_scale: expected no such field, found 0.5"),
        (
            {"more": {"llama.attention.sliding_window": 9}},
            "llama.attention.sliding_window: expected no such field, found 9",
        ),
        (
            {"more": {"llama.attention.head_count_kv": [2, 2]}},
            "llama.attention.head_count_kv: expected a positive whole number",
        ),
        (
            {"more": {"llama.attention.head_count": 0}},
            "llama.attention.head_count: expected a positive whole number, found 0",
        ),
    ],
)
def test_what_is_not_known_is_one_line_and_leaves_no_folder(tmp_path: Path, fields: dict, message: str) -> None:
    fields = dict(fields)
    write_gguf(
        tmp_path / "m.gguf", network(), fields.pop("architecture", "llama"), trained_tokenizer(), False, **fields
    )
    with pytest.raises(UserError, match=f"m.gguf: {message}") as error:
        gguf_to_folder(tmp_path / "m.gguf", tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_fields_that_change_nothing_are_read(tmp_path: Path) -> None:
    more = {"llama.rope.dimension_count": 16, "llama.attention.value_length": 16, "llama.vocab_size": 320}
    more |= {"llama.rope.scaling.factor": 1.0, "llama.expert_count": 0, "llama.attention.key_length": 16}
    write_gguf(tmp_path / "m.gguf", network(), "llama", trained_tokenizer(), quantised=False, more=more)
    folder = gguf_to_folder(tmp_path / "m.gguf", tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["head_dim"] == 16


@pytest.mark.parametrize("content", [b"", b"GGUF", b"PK\x03\x04" + bytes(100), b"hello, world" * 50])
def test_another_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(UserError, match=r"m\.gguf: expected a GGUF file, found something else"):
        gguf_to_folder(tmp_path / "m.gguf", tmp_path / "out")
    with pytest.raises(UserError, match=r"n\.gguf: expected a GGUF file, found no file"):
        gguf_to_folder(tmp_path / "n.gguf", tmp_path / "out")


def test_a_file_cut_off_is_one_line(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", network(), "llama", trained_tokenizer(), quantised=False)
    whole = (tmp_path / "m.gguf").read_bytes()
    for share in (0.1, 0.5, 0.99):
        (tmp_path / "m.gguf").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(UserError, match=r"m\.gguf: expected a GGUF file, found something else"):
            gguf_to_folder(tmp_path / "m.gguf", tmp_path / "out")


def test_the_command_gives_a_folder_to_start_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_gguf(tmp_path / "m.gguf", network(), "llama", trained_tokenizer(), quantised=False)
    assert run(["convert", str(tmp_path / "m.gguf"), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    trained = train(
        replace(
            preset("tiny"),
            start=str(tmp_path / "out"),
            loop=replace(preset("tiny").loop, steps=1),
            model=replace(preset("tiny").model, max_seq_len=128),
        ),
        tmp_path / "run",
    )
    assert trained.outcome == "finished"
    assert run(["convert", str(tmp_path / "missing.gguf"), str(tmp_path / "out")]) == 2
    assert "missing.gguf: expected a GGUF file, found no file" in capsys.readouterr().err
