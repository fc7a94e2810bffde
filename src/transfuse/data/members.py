"""A document as members of a tar: KEY.png KEY.txt, or KEY.0.png KEY.1.png KEY.json.

The first name up to its first dot is the document's key, as in WebDataset. The same documents give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from typing import Any

Members = list[tuple[str, bytes]]  # name and content, in order


def digest(members: Members) -> bytes:
    """Return 16 bytes that identify a document: its kinds of members and their content, not its name."""
    pieces = []
    for name, content in members:
        kind = name.rpartition("/")[2].partition(".")[2]
        pieces += [f"{kind}\0{len(content)}\0".encode(), content]
    return hashlib.blake2b(b"".join(pieces), digest_size=16).digest()


def to_members(
    key: str,
    parts: tuple[str | bytes, ...],
    pair: bool,
    suffix: str,
    weights: tuple[float, ...] = (),
    roles: tuple[str, ...] = (),
) -> Members:
    """Return a document's members; its images are files of kind `suffix`.

    weights: of the captions of a pair. roles: who says or shows each part of a dialogue.
    """
    images = [part for part in parts if isinstance(part, bytes)]
    if pair:
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == 1:
            return [(f"{key}.{suffix}", images[0]), (f"{key}.txt", texts[0].encode())]
        captions = {"captions": texts, **({"weights": weights} if weights else {})}
        return [(f"{key}.{suffix}", images[0]), (f"{key}.json", json.dumps(captions, ensure_ascii=False).encode())]
    numbers = iter(range(len(images)))
    listed: list[dict[str, Any]] = [
        {"text": part} if isinstance(part, str) else {"image": next(numbers)} for part in parts
    ]
    for part, role in zip(listed, roles, strict=bool(roles)):
        part["role"] = role
    record = json.dumps({"parts": listed}, ensure_ascii=False).encode()
    return [*((f"{key}.{i}.{suffix}", content) for i, content in enumerate(images)), (f"{key}.json", record)]


def to_tar(members: Members) -> bytes:
    """Return a piece of a tar: the same members give the same bytes, whenever and by whomever they are written."""
    pieces = []
    for name, content in members:
        header = tarfile.TarInfo(name)
        header.size, header.mode = len(content), 0o644
        pieces += [header.tobuf(tarfile.USTAR_FORMAT), content, bytes(-len(content) % tarfile.BLOCKSIZE)]
    return b"".join(pieces)


def untar(data: bytes) -> Members:
    """Return the members of a piece that `to_tar` wrote. Raises ValueError for anything else."""
    members: Members = []
    place = 0
    while place < len(data):
        header = data[place : place + tarfile.BLOCKSIZE]
        start = place + tarfile.BLOCKSIZE
        try:
            size = int(header[124:135], 8)
            name = header[:100].rstrip(b"\0").decode()
        except ValueError:
            raise ValueError("its header in the tar is damaged") from None
        if start + size > len(data) or not name:
            raise ValueError("its header in the tar is damaged")
        members.append((name, data[start : start + size]))
        place = start + size + -size % tarfile.BLOCKSIZE
    return members
