"""The tokens that begin and end a language model's texts, and its chat template, read from next to its tokenizer.json.

tokenizer_config.json      bos_token, eos_token, add_bos_token, chat_template
chat_template.jinja        the template, where it has a file to itself
config.json                bos_token_id, eos_token_id, where tokenizer_config.json names none
generation_config.json     eos_token_id: further tokens that end a text
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from ..config import read_json
from ..errors import UserError

BOS, EOS, BOI, EOI = "<|bos|>", "<|eos|>", "<|boi|>", "<|eoi|>"
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>")
"""names of the token between two documents of pretraining, in models that do not begin a text with BOS"""
TOKENIZER_CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"


@dataclass(frozen=True)
class TextFormat:
    """The tokens that begin and end a text, by name, and the chat template.

    other_ends       further tokens after which nothing is written, such as the end of a document in a chat model
    bos_token        the `bos_token` that a template knows, which need not begin other texts; None: it has none
    chat_template    Jinja source of the chat template (`chat`); None: turns follow each other without markers
    """

    bos: str = BOS
    eos: str = EOS
    other_ends: tuple[str, ...] = ()
    bos_token: str | None = BOS
    chat_template: str | None = None

    def config(self) -> dict[str, Any]:
        """Return tokenizer_config.json as transformers reads it; `begin_token` and `end_tokens` are ours."""
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "bos_token": self.bos_token,
            "eos_token": self.eos,
            "pad_token": self.eos,
            "begin_token": self.bos,
            "end_tokens": list(self.other_ends),
            "chat_template": self.chat_template,
        }


def read_text_format(folder: Path, backend: tokenizers.Tokenizer) -> TextFormat:
    """Return the format of a folder's model; our markers stand for a beginning or an end that no file names.

    A text begins with BOS if the tokenizer puts it there, or else with the end-of-text token that stood between the
    documents of pretraining (Qwen, SmolLM2).

    Raises UserError for a file that is not JSON, or a token that the tokenizer does not have.
    """
    files = {name: _read(folder / name) for name in (TOKENIZER_CONFIG, "config.json", "generation_config.json")}
    named = files.pop(TOKENIZER_CONFIG)
    template = _template(folder, named.get("chat_template"))
    if "end_tokens" in named:  # written by `TextFormat.config`
        begin, eos, bos = (_token(folder, named, f"{name}_token", backend) for name in ("begin", "eos", "bos"))
        others = named["end_tokens"]
        if not isinstance(others, list) or not all(isinstance(name, str) for name in others):
            raise UserError(f"{folder / TOKENIZER_CONFIG}: end_tokens: expected a list of tokens, found {others!r:.80}")
        return TextFormat(begin or BOS, eos or EOS, tuple(others), bos, template)

    def by_id(field: str) -> list[str]:
        """Return the tokens that a field of config.json and generation_config.json names by id, each once."""
        tokens: dict[str, None] = {}
        for file, values in files.items():
            ids = values.get(field)
            for number in ids if isinstance(ids, list) else [] if ids is None else [ids]:
                token = backend.id_to_token(number) if isinstance(number, int) and number >= 0 else None
                if token is None:
                    most = backend.get_vocab_size() - 1
                    wanted = f"an id of its tokenizer.json (0 to {most})"
                    raise UserError(f"{folder / file}: {field}: expected {wanted}, found {number}")
                tokens[token] = None
        return [*tokens]

    end_of_text = next((name for name in END_OF_TEXT if backend.token_to_id(name) is not None), None)
    ends = by_id("eos_token_id") + ([] if end_of_text is None else [end_of_text])
    eos = _token(folder, named, "eos_token", backend) or next(iter(ends), EOS)
    bos_token = _token(folder, named, "bos_token", backend)
    bos = bos_token or next(iter(by_id("bos_token_id")), None)
    if bos is None or not (named.get("add_bos_token") or _prepends(backend, bos)):
        bos = end_of_text or bos or eos
    others = tuple(dict.fromkeys(name for name in ends if name != eos))
    if bos == eos == EOS:  # nothing is known: both are ours
        return TextFormat(other_ends=others, chat_template=template)
    return TextFormat(bos, eos, others, bos_token, template)


def _template(folder: Path, template: Any) -> str | None:
    """Return the chat template: of its file, or from tokenizer_config.json, where it stands alone or in a list."""
    if (folder / TEMPLATE).is_file():
        try:
            return (folder / TEMPLATE).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{folder / TEMPLATE}: expected a template in UTF-8, found none ({error})") from None
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        kind = type(template).__name__
        raise UserError(f"{folder / TOKENIZER_CONFIG}: chat_template: expected a text, found a {kind}")
    return template


def _read(path: Path) -> Mapping[str, Any]:
    values = read_json(path) if path.is_file() else {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected settings by name, found a {type(values).__name__}")
    return values


def _token(folder: Path, values: Mapping[str, Any], field: str, backend: tokenizers.Tokenizer) -> str | None:
    """Return a token that tokenizer_config.json names, as a string or as an object with its content."""
    token = values.get(field)
    token = token.get("content") if isinstance(token, dict) else token
    if token is not None and (not isinstance(token, str) or backend.token_to_id(token) is None):
        raise UserError(
            f"{folder / TOKENIZER_CONFIG}: {field}: expected a token of its tokenizer.json, found {token!r}"
        )
    return token


def _prepends(backend: tokenizers.Tokenizer, bos: str) -> bool:
    """Return True if the tokenizer itself begins a text with this token."""
    ids, number = backend.encode("a", add_special_tokens=True).ids, backend.token_to_id(bos)
    return bool(ids) and ids[0] == number and backend.encode("a", add_special_tokens=False).ids[:1] != [number]
