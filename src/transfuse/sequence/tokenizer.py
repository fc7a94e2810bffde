"""Text to ids and back, with the four markers of the sequence format. A thin layer over `tokenizers`.

tokenizer = Tokenizer.train(texts, vocab_size=4096)
tokenizer.encode("a crab")            # ids, without markers: `layout_document` adds them
tokenizer.save(folder / "tokenizer.json")
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from ..errors import UserError
from .layout import Positions, SequenceFormat

BOS, EOS, BOI, EOI = "<|bos|>", "<|eos|>", "<|boi|>", "<|eoi|>"
SPECIAL = (BOS, EOS, BOI, EOI)


class Tokenizer:
    """A byte-level BPE (or any `tokenizers` model) in which the four markers are single ids."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        ids = [backend.token_to_id(name) for name in SPECIAL]
        if None in ids:
            raise UserError(f"tokenizer: expected the special tokens {', '.join(SPECIAL)}, found only some of them")
        backend.encode_special_tokens = True  # a marker's name typed by a user is plain text, never the marker
        self.backend = backend
        self.bos, self.eos, self.boi, self.eoi = (number for number in ids if number is not None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.backend.encode_special_tokens = True  # which a pickle does not keep

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Train a byte-level BPE of `vocab_size` ids, markers included; the same texts give the same file."""
        if vocab_size < 260:
            raise UserError(
                f"tokenizer vocab_size: expected at least 260 (256 bytes and 4 markers), found {vocab_size}"
            )
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
        """Read a `tokenizer.json`. Raises UserError where the file is missing or is no tokenizer."""
        return cls(_from_json(Path(path)))

    @classmethod
    def adopt(cls, path: Path | str) -> Tokenizer:
        """Open any tokenizer.json or sentencepiece `.model`; the markers it lacks take the ids after its own.

        A folder stands for the tokenizer.json in it. A pretrained network may have spare rows for the new ids: its
        vocabulary must be the larger of the two. Raises UserError like `load`, and for ids with gaps.
        """
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        backend = _from_json(path) if path.suffix == ".json" or not path.is_file() else from_sentencepiece(path)
        backend.add_special_tokens(list(SPECIAL))  # a marker that is there keeps its id
        backend.no_truncation()  # either may be on in a file, and would change every document
        backend.no_padding()
        ids = sorted(backend.get_vocab(with_added_tokens=True).values())
        if ids != list(range(len(ids))):
            raise UserError(f"{path}: expected ids from 0 to {len(ids) - 1}, found gaps among them")
        return cls(backend)

    def save(self, path: Path | str) -> None:
        """Write a `tokenizer.json`."""
        Path(path).write_text(self.backend.to_str(pretty=True), encoding="utf-8")

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides a text's ids: equal for equal tokenizers, wherever they were saved."""
        text = tokenizers.Tokenizer.from_str(self.backend.to_str()).to_str()  # scores may be rounded, once
        return hashlib.sha256(text.encode()).hexdigest()[:16]

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
            return tuple(self.backend.encode(text, add_special_tokens=False).ids)
        except TypeError:
            bad = next((c for c in text if "\ud800" <= c <= "\udfff"), None)
            if bad is None:
                raise
            raise UserError(f"text: expected UTF-8, found {bad!a} in {text!a:.80}") from None

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without markers."""
        return self.backend.decode(list(ids), skip_special_tokens=True)


def _from_json(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise UserError(f"{path}: expected a tokenizer.json, found no file")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        raise UserError(f"{path}: expected a tokenizer.json, found something else ({error})") from None


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
        needed = "expected the extra that reads it, found none: pip install 'transfuse[sentencepiece]'"
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
