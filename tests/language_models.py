"""Folders of language models as Hugging Face publishes them, tiny and with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch

WORDS = ["a crab on a red background", "two balloons", "user assistant system", "hello, world: what is this?"] * 4


def backend_of(special: list[str], prepended: str | None = None) -> tokenizers.Tokenizer:
    """A byte-level BPE of 290 ids, special tokens first; the tokenizer itself puts `prepended` before a text."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        special_tokens=special, initial_alphabet=alphabet, vocab_size=290, show_progress=False
    )
    backend.train_from_iterator(WORDS, trainer)
    if prepended is not None:
        pair = [(prepended, backend.token_to_id(prepended))]
        backend.post_processor = tokenizers.processors.TemplateProcessing(single=f"{prepended} $A", special_tokens=pair)
    return backend


def write_tokenizer(
    folder: Path, special: list[str], prepended: str | None = None, template: str | None = None, **config: Any
) -> Path:
    """Write tokenizer.json and tokenizer_config.json of a model."""
    folder.mkdir(parents=True, exist_ok=True)
    backend_of(special, prepended).save(str(folder / "tokenizer.json"))
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder


def write_model(folder: Path, kind: str = "Llama", rows: int = 300, **changes: Any) -> Any:
    """Write config.json and weights of a tiny network, none of whose weights is as it starts; return the network."""
    import transformers

    torch.manual_seed(0)
    sizes = {
        "vocab_size": rows,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": None,
    }
    config = getattr(transformers, f"{kind}Config")(**sizes | changes)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(folder)
    return model.eval()
