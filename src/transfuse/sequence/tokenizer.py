"""Text to ids and back, with the four markers of the sequence format. A thin layer over `tokenizers`.

tokenizer = Tokenizer.train(texts, vocab_size=4096)
tokenizer.encode("a crab")            # ids, without markers: `layout_document` adds them
tokenizer.save(folder / "tokenizer.json")

The tokens that begin and end a language model's texts, and its chat template, are read from next to its tokenizer.json:

tokenizer_config.json      bos_token, eos_token, add_bos_token, chat_template
chat_template.jinja        the template, where it has a file to itself
config.json                bos_token_id, eos_token_id, where tokenizer_config.json names none
generation_config.json     eos_token_id: further tokens that end a text
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from ..config import read_json
from ..errors import UserError, install_command
from ..folders import bundled_models, places
from .layout import Positions, SequenceFormat

BOS, EOS, BOI, EOI = "<|bos|>", "<|eos|>", "<|boi|>", "<|eoi|>"
SPECIAL = (BOS, EOS, BOI, EOI)
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>")
"""names of the token between two documents of pretraining, in models that do not begin a text with BOS"""
TOKENIZER_CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
TURNS = "{%- for message in messages -%}{{ message['content'] }}{%- endfor -%}"
"""the chat template that other libraries find in an export without its own: turns follow each other without markers"""
NAMED_TOKENS = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""special tokens that a template may name, next to BOS and EOS"""
LONG = 20_000
"""characters above which other threads run while a text is encoded: only the call for batches releases Python's lock"""


@dataclass(frozen=True)
class TextFormat:
    """The tokens that begin and end a text, by name, and the chat template.

    other_ends       further tokens after which nothing is written, such as the end of a document in a chat model
    bos_token        the `bos_token` that a template knows, which need not begin other texts; None: it has none
    chat_template    Jinja source of the chat template (`chat`); None: turns follow each other without markers
    named            further tokens that a template may name: pairs of a name, such as pad_token, and a token
    """

    bos: str = BOS
    eos: str = EOS
    other_ends: tuple[str, ...] = ()
    bos_token: str | None = BOS
    chat_template: str | None = None
    named: tuple[tuple[str, str], ...] = ()

    def config(self) -> dict[str, Any]:
        """Return tokenizer_config.json as transformers reads it; begin_token, end_tokens and named_tokens are ours."""
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "bos_token": self.bos_token,
            "eos_token": self.eos,
            "pad_token": self.eos,
            **dict(self.named),
            **({"named_tokens": [name for name, _ in self.named]} if self.named else {}),
            "begin_token": self.bos,
            "end_tokens": list(self.other_ends),
            "chat_template": self.chat_template,
        }


class Tokenizer:
    """A byte-level BPE (or any `tokenizers` model) in which the four markers are single ids.

    BOS and EOS are ours, or those of a pretrained model (`TextFormat`). `ends` are the ids after which nothing is
    written, EOS first.
    """

    def __init__(self, backend: tokenizers.Tokenizer, text_format: TextFormat | None = None) -> None:
        self.text_format = text_format or TextFormat()
        names = self.text_format.bos, self.text_format.eos, BOI, EOI, *self.text_format.other_ends
        ids = [backend.token_to_id(name) for name in names]
        if None in ids:
            raise UserError(f"tokenizer: expected the special tokens {', '.join(names)}, found only some of them")
        backend.encode_special_tokens = True  # a marker's name typed by a user is plain text, never the marker
        self.backend = backend
        self.bos, self.eos, self.boi, self.eoi, *others = (number for number in ids if number is not None)
        self.ends = self.eos, *others

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "marked"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.backend.encode_special_tokens = True  # which a pickle does not keep

    @cached_property
    def marked(self) -> tokenizers.Tokenizer:
        """A copy that reads special tokens in a text as tokens: for the text that a chat template makes."""
        return tokenizers.Tokenizer.from_str(self.backend.to_str())

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """The names of all tokens that a template may write and a person may not, longest first.

        Added tokens that are not special, such as Qwen3's <think>, are words like any other.
        """
        added = self.backend.get_added_tokens_decoder().values()
        named = {self.text_format.bos, self.text_format.eos, *self.text_format.other_ends}
        names = [token.content for token in added if token.special or token.content in named]
        return tuple(sorted(names, key=lambda name: (-len(name), name)))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Train a byte-level BPE of `vocab_size` ids, markers included; the same texts give the same file."""
        if not 260 <= vocab_size < 1 << 31:
            expected = "expected at least 260 (256 bytes and 4 markers), and below 2^31"
            raise UserError(f"tokenizer vocab_size: {expected}, found {vocab_size}")
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend)

    @classmethod
    def load(cls, path: Path | str) -> Tokenizer:
        """Read a `tokenizer.json`, and the tokenizer_config.json next to it, if there is one.

        Raises UserError where the file is missing or is no tokenizer.
        """
        path = Path(path)
        backend, config = _from_json(path), path.with_name(TOKENIZER_CONFIG)
        values = read_json(config) if config.is_file() else None
        ours = isinstance(values, dict) and "end_tokens" in values  # another's may not name our markers
        return cls(backend, read_text_format(path.parent, backend) if ours else None)

    @classmethod
    def adopt(cls, path: Path | str) -> Tokenizer:
        """Open any tokenizer.json or sentencepiece `.model`; the markers it lacks take the ids after its own.

        A folder, or a bundled model's name, stands for the tokenizer.json in it. A pretrained network may have spare
        rows for the new ids: its vocabulary must be the larger of the two. Raises UserError like `load`, and for ids
        with gaps.
        """
        path = Path(path)
        if path.is_dir() or str(path) in bundled_models():
            path = path / "tokenizer.json" if (path / "tokenizer.json").is_file() else places(path)["tokenizer.json"]
        is_json = path.suffix == ".json" or not path.is_file()
        backend = _with_added(path, _from_json(path)) if is_json else from_sentencepiece(path)
        return cls(_with_markers(path, backend, SPECIAL))

    @classmethod
    def of_model(cls, folder: Path) -> Tokenizer:
        """Open the tokenizer of a pretrained model's folder, with that model's own beginning and end of text.

        BOI and EOI take the ids after its own. Raises UserError like `adopt`, and for tokens that it does not have.
        """
        path = folder / "tokenizer.json"
        backend = _with_added(path, _from_json(path))
        text_format = read_text_format(folder, backend)
        names = text_format.bos, text_format.eos, BOI, EOI
        return cls(_with_markers(path, backend, [name for name in names if name in SPECIAL]), text_format)

    def with_template(self, template: str) -> Tokenizer:
        """Return the same tokenizer with another chat template (Jinja source)."""
        return Tokenizer(self.backend, replace(self.text_format, chat_template=template))

    def save(self, path: Path | str) -> None:
        """Write a `tokenizer.json`; and tokenizer_config.json next to it, unless BOS, EOS and template are ours."""
        path = Path(path)
        if self.text_format != TextFormat():
            config = json.dumps(self.text_format.config(), indent=2, ensure_ascii=False) + "\n"
            path.with_name(TOKENIZER_CONFIG).write_text(config, encoding="utf-8")
        path.write_text(self.backend.to_str(pretty=True), encoding="utf-8")

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides a text's ids: equal for equal tokenizers, wherever they were saved."""
        text = tokenizers.Tokenizer.from_str(self.backend.to_str()).to_str()  # scores may be rounded, once
        names = self.text_format.bos, self.text_format.eos
        text += "" if names == (BOS, EOS) else json.dumps(names)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def text_fingerprint(self) -> str:
        """A hash of what decides a text's ids, whatever the markers are: documents are stored without them."""
        values = json.loads(tokenizers.Tokenizer.from_str(self.backend.to_str()).to_str())
        values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] not in SPECIAL]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]

    @property
    def vocab_size(self) -> int:
        """The number of ids, markers included."""
        return self.backend.get_vocab_size()

    def sequence_format(
        self, patch_size: int, first_code: int | None = None, positions: Positions = "raster"
    ) -> SequenceFormat:
        """Return the format of sequences with this tokenizer's markers."""
        return SequenceFormat(self.bos, self.eos, self.boi, self.eoi, patch_size, first_code, positions)

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the ids of plain text. A marker's name in it is plain characters, so that a prompt cannot inject one.

        Raises UserError for a lone surrogate, which terminals and files make of bytes that are not UTF-8.
        """
        try:
            if len(text) > LONG:
                return tuple(self.backend.encode_batch_fast([text], add_special_tokens=False)[0].ids)
            return tuple(self.backend.encode(text, add_special_tokens=False).ids)
        except TypeError:
            bad = next((c for c in text if "\ud800" <= c <= "\udfff"), None)
            if bad is None:
                raise
            raise UserError(f"text: expected UTF-8, found {bad!a} in {text!a:.80}") from None

    def piece(self, token: int) -> str:
        """Return the text that an id adds in the middle of a text; U+FFFD where it is a part of a character."""
        before = self.encode("a")
        return self.decode([*before, token]).removeprefix(self.decode(before))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without markers."""
        return self.backend.decode(list(ids), skip_special_tokens=True)


def _with_markers(path: Path, backend: tokenizers.Tokenizer, names: Sequence[str]) -> tokenizers.Tokenizer:
    """Add markers to a tokenizer that was read from `path`; one that is there keeps its id."""
    backend.add_special_tokens(list(names))
    backend.no_truncation()  # either may be on in a file, and would change every document
    backend.no_padding()
    ids = sorted(backend.get_vocab(with_added_tokens=True).values())
    if ids != list(range(len(ids))):
        raise UserError(f"{path}: expected ids from 0 to {len(ids) - 1}, found gaps among them")
    return backend


def _with_added(path: Path, backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Add the tokens of `added_tokens_decoder` that tokenizer.json lacks, as transformers does.

    Raises UserError for one whose id is not the next: markers would take the ids of the model's own rows.
    """
    where = path.with_name(TOKENIZER_CONFIG)
    values = read_json(where) if where.is_file() else {}
    added = values.get("added_tokens_decoder") if isinstance(values, dict) else None
    if not isinstance(added, dict):
        return backend
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    for number, token in sorted(added.items(), key=lambda item: (len(item[0]), item[0])):
        content = token.get("content") if isinstance(token, dict) else token
        if not isinstance(content, str) or not content:
            raise UserError(f"{where}: added_tokens_decoder: expected a token, found {token!r:.80}")
        if backend.token_to_id(content) is not None:
            continue
        chosen = {name: bool(token[name]) for name in flags if name in token} if isinstance(token, dict) else {}
        backend.add_tokens([AddedToken(content, **chosen)])
        if str(backend.token_to_id(content)) != number:
            expected = f"tokens of its tokenizer.json, or the next id, {backend.token_to_id(content)}"
            raise UserError(f"{where}: added_tokens_decoder: expected {expected}, found {content!r} with id {number}")
    return backend


def _from_json(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise UserError(f"{path}: expected a tokenizer.json, found no file")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        raise UserError(f"{path}: expected a tokenizer.json, found something else ({error})") from None


# --- the tokens of a language model's texts ---------------------------------------------------------------------------


def read_text_format(folder: Path, backend: tokenizers.Tokenizer) -> TextFormat:
    """Return the format of a folder's model; our markers stand for a beginning or an end that no file names.

    A text begins with BOS if the tokenizer puts it there, or else with the end-of-text token that stood between the
    documents of pretraining (Qwen, SmolLM2).

    Raises UserError for a file that is not JSON, or a token that the tokenizer does not have.
    """
    files: dict[str, Any] = {}
    for name in (TOKENIZER_CONFIG, "config.json", "generation_config.json"):
        values = files[name] = read_json(folder / name) if (folder / name).is_file() else {}
        if not isinstance(values, dict):
            raise UserError(f"{folder / name}: expected settings by name, found a {type(values).__name__}")
    named, where = files.pop(TOKENIZER_CONFIG), folder / TOKENIZER_CONFIG
    template = _template(folder, named.get("chat_template"))
    template = None if template == TURNS else template

    def by_name(field: str) -> str | None:
        """Return a token that tokenizer_config.json names, as a string or as an object with its content."""
        token = _content(named.get(field))
        if token is not None and (not isinstance(token, str) or backend.token_to_id(token) is None):
            raise UserError(f"{where}: {field}: expected a token of its tokenizer.json, found {token!r}")
        return token

    listed = named.get("named_tokens", () if "end_tokens" in named else NAMED_TOKENS)
    tokens = {name: _content(named.get(name)) for name in NAMED_TOKENS if isinstance(listed, list | tuple)}
    pairs = tuple(
        (name, token)
        for name, token in tokens.items()
        if name in listed and isinstance(token, str) and backend.token_to_id(token) is not None
    )

    if "end_tokens" in named:  # written by `TextFormat.config`
        begin, eos, bos = by_name("begin_token"), by_name("eos_token"), by_name("bos_token")
        others = named["end_tokens"]
        if not isinstance(others, list) or not all(isinstance(name, str) for name in others):
            raise UserError(f"{where}: end_tokens: expected a list of tokens, found {others!r:.80}")
        return TextFormat(begin or BOS, eos or EOS, tuple(others), bos, template, pairs)

    def by_id(field: str) -> list[str]:
        """Return the tokens that a field of config.json and generation_config.json names by id, each once."""
        tokens: dict[str, None] = {}
        for file, values in files.items():
            ids = values.get(field)
            for number in ids if isinstance(ids, list) else [] if ids is None else [ids]:
                token = backend.id_to_token(number) if isinstance(number, int) and number >= 0 else None
                if token is None:
                    wanted = f"an id of its tokenizer.json (0 to {backend.get_vocab_size() - 1})"
                    raise UserError(f"{folder / file}: {field}: expected {wanted}, found {number}")
                tokens[token] = None
        return [*tokens]

    end_of_text = next((name for name in END_OF_TEXT if backend.token_to_id(name) is not None), None)
    ends = by_id("eos_token_id") + ([] if end_of_text is None else [end_of_text])
    eos = by_name("eos_token") or next(iter(ends), EOS)
    bos_token = by_name("bos_token")
    bos = bos_token or next(iter(by_id("bos_token_id")), None)
    if bos is None or not (named.get("add_bos_token") or _prepends(backend, bos)):
        bos = end_of_text or bos or eos
    others = tuple(dict.fromkeys(name for name in ends if name != eos))
    if bos == eos == EOS:  # nothing is known: both are ours
        return TextFormat(other_ends=others, chat_template=template, named=pairs)
    return TextFormat(bos, eos, others, bos_token, template, pairs)


def _content(token: Any) -> Any:
    """Return a token's name, which stands alone or in an object."""
    return token.get("content") if isinstance(token, dict) else token


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


def _prepends(backend: tokenizers.Tokenizer, bos: str) -> bool:
    """Return True if the tokenizer itself begins a text with this token."""
    ids, number = backend.encode("a", add_special_tokens=True).ids, backend.token_to_id(bos)
    return bool(ids) and ids[0] == number and backend.encode("a", add_special_tokens=False).ids[:1] != [number]


# --- sentencepiece ----------------------------------------------------------------------------------------------------

SPACE = "\u2581"  # sentencepiece writes this for a space
UNIGRAM, BPE = 1, 2  # kinds of models, by the numbers of sentencepiece's format; words and characters are not read
UNKNOWN, CONTROL, USER = 2, 3, 4  # kinds of pieces
NEVER_TYPED = "\U0010fffd"
"""appended to the names of control pieces: a unigram model would take "</s>" in a text for the piece itself"""


def from_sentencepiece(path: Path) -> tokenizers.Tokenizer:
    """Read a sentencepiece `.model`, BPE (Llama, Mistral) or unigram (T5): the same pieces with the same ids.

    Raises UserError where the extra `sentencepiece` is missing, or the file is none of its models.
    """
    try:
        from sentencepiece import sentencepiece_model_pb2 as format_
    except ImportError:
        needed = f"expected the extra that reads it, found none: {install_command('sentencepiece')}"
        raise UserError(f"{path}: {needed}") from None
    proto = format_.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's own, which cannot be named without protobuf
        raise UserError(f"{path}: expected a sentencepiece model, found something else ({error})") from None
    kind, spec = proto.trainer_spec.model_type, proto.normalizer_spec
    if not proto.pieces or kind not in (UNIGRAM, BPE):
        raise UserError(f"{path}: expected a sentencepiece model of type unigram or BPE, found another")
    for piece in proto.pieces:
        piece.piece += NEVER_TYPED if piece.type == CONTROL else ""
    if kind == BPE:
        backend = tokenizers.Tokenizer(_bpe(proto))
    else:
        unknown = next((number for number, piece in enumerate(proto.pieces) if piece.type == UNKNOWN), None)
        pieces = [(piece.piece, piece.score) for piece in proto.pieces]
        model = models.Unigram(pieces, unknown, proto.trainer_spec.byte_fallback)
        backend = tokenizers.Tokenizer(model)
    steps: list[Any] = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", left=1)] if spec.add_dummy_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    backend.add_special_tokens([AddedToken(p.piece, normalized=False) for p in proto.pieces if p.type == CONTROL])
    backend.add_tokens([AddedToken(p.piece, normalized=False) for p in proto.pieces if p.type == USER])
    return backend


def _bpe(proto: Any) -> models.BPE:
    """Return a BPE; sentencepiece stores no merges: a pair merges where its union is a piece, the best score first."""
    ids = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    merges = []
    for piece in proto.pieces:
        if piece.type in (UNKNOWN, CONTROL, USER):
            continue
        halves = ((piece.piece[:cut], piece.piece[cut:]) for cut in range(1, len(piece.piece)))
        pairs = sorted((ids[left], ids[right], left, right) for left, right in halves if left in ids and right in ids)
        merges += [(piece.score, left, right) for _, _, left, right in pairs]
    merges.sort(key=lambda merge: -merge[0])  # stable: pairs of one piece stay in the order of their ids
    unknown = next((piece.piece for piece in proto.pieces if piece.type == UNKNOWN), None)
    pairs_in_order = [(left, right) for _, left, right in merges]
    fallback = proto.trainer_spec.byte_fallback
    return models.BPE(ids, pairs_in_order, unk_token=unknown, fuse_unk=True, byte_fallback=fallback)
