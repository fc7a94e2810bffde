"""Text without pictures: short definitions of common words, from WordNet, the curated nouns' own included."""

from __future__ import annotations

import gzip
from functools import cache
from pathlib import Path
from typing import Literal

from transfuse.draws import stable_hash

GLOSS_FILE = Path(__file__).with_name("glosses.txt.gz")
#: One word in this many is held out, with all its definitions.
WORDS_PER_HELD_OUT = 50


@cache
def _by_split() -> dict[str, tuple[str, ...]]:
    parts: dict[str, list[str]] = {"train": [], "heldout": []}
    for line in gzip.decompress(GLOSS_FILE.read_bytes()).decode().splitlines():
        word = line.partition(":")[0]
        parts["train" if stable_hash(f"gloss {word}") % WORDS_PER_HELD_OUT else "heldout"].append(line)
    # WordNet defines synonyms once for all: a third of the words held out had been read under another name.
    read = {_definition(line) for line in parts["train"]}
    unread = [line for line in parts["heldout"] if _definition(line) not in read]
    return {"train": tuple(parts["train"]), "heldout": tuple(unread)}


def _definition(line: str) -> str:
    """Without its word and its examples."""
    return line.partition(": ")[2].partition('; "')[0]


def glosses(split: Literal["train", "heldout"] = "train") -> list[str]:
    """Lines like "crab: decapod having eyes on short stalks ...", in alphabetical order.

    "heldout" is a fixed 2 % of the words, but for definitions that "train" has under a synonym. Raises ValueError for
    another split.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split: expected 'train' or 'heldout', found {split!r}")
    return list(_by_split()[split])
