"""The splits (train, validation, test) of a source: what names of files, and fields of records, tell of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

from ...errors import UserError
from ...log import logger

SPLITS = {"train": "train", "training": "train", "restval": "train", "test": "test", "testing": "test", "eval": "test"}
SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev", "minival"), "validation")
SPLITS |= {name: name for name in ("trainval", "testa", "testb")}
FIELDS = ("split", "subset", "partition")  # of records, that name their split
FIELD = re.compile(rf'"\s*({"|".join(FIELDS)})\s*"\s*:', re.IGNORECASE)
"""such a field in JSON"""
MOST_SPLITS = 10  # a field of more values is of something else
CONTAINERS = (".tar", ".parquet", ".arrow", ".jsonl", ".jsonl.gz", ".ndjson", ".json", ".csv", ".tsv")
"""files whose names may hold the name of a split among others, as in captions_train2017.json"""
SAYS_NOTHING = {"image", "images", "img", "imgs", "photos", "pictures", "set", "dataset", "data", "split", "subset"}
"""words of a folder's name that may stand next to its split"""
LAST_WORD = re.compile(r"(?:^|[\W_])([a-z]+)(?:[\W_]*\d+(?:[\W_]*of[\W_]*\d+)?)?$")
"""the word of a file's name that may be its split: the last, before numbers (wiki.train, test-00000-of-00002)"""


def split_of(name: str, images: Collection[str] = ()) -> str | None:
    """Return "train", "validation" or "test" if a folder says so, the outermost first, or a file name; or else None.

    images: names of images, with and without endings; an image's own name, and that of its caption, say nothing.
    """
    of_image = name.rpartition(".")[0] in images
    *folders, last = name.lower().split("/")
    stem, words = last.removesuffix(".gz").rpartition(".")[0], list[str]()
    if last.endswith(CONTAINERS) and not (of_image and last.endswith(".json")):
        words = re.findall(r"[a-z]+", stem)
    elif not of_image:
        words = [last.partition(".")[0], *LAST_WORD.findall(stem)]
    return next((SPLITS[word] for word in (*map(folder_split, folders), *reversed(words)) if word in SPLITS), None)


def folder_split(folder: str) -> str:
    """Return the split that a folder is named for, alone or with words that say nothing (train_images, split=test)."""
    if (named := split_named(folder)) in SPLITS.values():
        return named
    words = [word for word in re.findall(r"[a-z]+", folder.lower()) if word not in SAYS_NOTHING]
    return split_named(words[0]) if len(words) == 1 else folder


def split_named(word: str) -> str:
    """Return the split that a word means, whatever its case, and the year or number after it (val2014)."""
    word = word.strip().lower()
    return SPLITS.get(re.sub(r"[\W_]*\d+$", "", word), word)


def split_in(record: Any) -> str | None:
    """Return the split that a field of a record names (`FIELDS`, in any case), None for a record without one."""
    fields = {str(name).strip().lower(): value for name, value in record.items()} if isinstance(record, dict) else {}
    value = next((fields[name] for name in FIELDS if fields.get(name) not in (None, "")), None)
    if isinstance(value, int | float):
        value = f"{value:g}"
    return split_named(value) or None if isinstance(value, str) else None


def default_split(known: Collection[str]) -> str:
    """Return the split that is taken where none is wanted: train, or trainval where there is no other train."""
    return "trainval" if "trainval" in known and "train" not in known else "train"


def choose_split(of_names: str, place: str, records: Iterable[Any], chosen: str) -> str | None:
    """Return which split of the records by their field is taken; None: there are none, or all are wanted.

    Records without a split are of every one. of_names: the split that names of files have told. chosen: the one that is
    wanted otherwise; "" is train. The field counts as one of splits if a value of it is a usual name of one; other
    values are taken together, and a line says so.

    Raises UserError for a split that does not exist.
    """
    counts = Counter(split for record in records if (split := split_in(record)) is not None)
    known = not counts.keys().isdisjoint(SPLITS.values())
    chosen = of_names or chosen
    if chosen == "all":
        return None
    if not known and (of_names or not chosen):
        if 1 < len(counts) <= MOST_SPLITS:
            listed = ", ".join(f"{count} of {name}" for name, count in sorted(counts.items()))
            which = "" if of_names else " (--source-split NAME takes one)"
            logger.info(f"{place}: the field of splits has no usual name of one, so all are taken: {listed}{which}")
        return None
    if not chosen and len(counts) < 2:
        return None
    wanted = split_named(chosen) or default_split(counts)
    if wanted not in counts:
        there = ", ".join(sorted(counts)) or "no splits"
        raise UserError(f'{place}: expected a split "{wanted}" (--source-split NAME, or all), found {there}')
    others = ", ".join(f"{count} of {name}" for name, count in sorted(counts.items()) if name != wanted)
    if others:
        logger.info(f"{place}: taking the split {wanted}, not {others} (--source-split takes another, or all)")
    return wanted
