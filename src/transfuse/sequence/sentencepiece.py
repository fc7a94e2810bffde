"""A sentencepiece `.model` as a tokenizer of `tokenizers`: same pieces, same ids. Needs the extra `sentencepiece`.

Both kinds that are used, BPE (Llama, Mistral) and unigram (T5), with byte fallback or without.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers

from ..errors import UserError

SPACE = "\u2581"
"""what sentencepiece writes for a space"""
UNKNOWN, CONTROL, USER = 2, 3, 4
"""kinds of pieces, by the numbers of sentencepiece's own format"""
BPE = 2
NEVER_TYPED = "\U0010fffd"
"""appended to the names of control pieces: a unigram model would take "</s>" in a text for the piece itself"""
"""likewise, kinds of models: 1 is unigram, words and characters are not read"""


def from_sentencepiece(path: Path) -> tokenizers.Tokenizer:
    """Read the model. Raises UserError where the extra is missing, or the file is none of its models."""
    try:
        from sentencepiece import sentencepiece_model_pb2 as format_
    except ImportError:
        needed = "expected the extra that reads it, found none: pip install 'transfuse[sentencepiece]'"
        raise UserError(f"{path}: {needed}") from None
    proto = format_.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's own, which may not be named without protobuf
        raise UserError(f"{path}: expected a sentencepiece model, found something else ({error})") from None
    kind = proto.trainer_spec.model_type
    if not proto.pieces or kind not in (1, BPE):
        raise UserError(f"{path}: expected a sentencepiece model of type unigram or BPE, found another")
    for piece in proto.pieces:
        piece.piece += NEVER_TYPED if piece.type == CONTROL else ""
    backend = tokenizers.Tokenizer(_bpe(proto) if kind == BPE else _unigram(proto))
    backend.normalizer = _normalizer(proto.normalizer_spec)
    strip = [decoders.Strip(" ", left=1)] if proto.normalizer_spec.add_dummy_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    backend.add_special_tokens([AddedToken(p.piece, normalized=False) for p in proto.pieces if p.type == CONTROL])
    backend.add_tokens([AddedToken(p.piece, normalized=False) for p in proto.pieces if p.type == USER])
    return backend


def _unigram(proto: Any) -> models.Unigram:
    unknown = next((number for number, piece in enumerate(proto.pieces) if piece.type == UNKNOWN), None)
    return models.Unigram(
        [(piece.piece, piece.score) for piece in proto.pieces], unknown, proto.trainer_spec.byte_fallback
    )


def _bpe(proto: Any) -> models.BPE:
    """Sentencepiece stores no merges: a pair may be merged where its union is a piece, the best score first."""
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
    return models.BPE(
        ids,
        [(left, right) for _, left, right in merges],
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )


def _normalizer(spec: Any) -> Any:
    steps: list[Any] = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
