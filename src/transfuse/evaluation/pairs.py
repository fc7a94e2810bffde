"""Pairs of prompts and images: what is drawn, captioned, and compared with.

Held-out pairs of the data set's scorer, of a data set on disk, or files the user has: `captions_val2014.json` as COCO
ships it, or Karpathy's `dataset_coco.json` (its test split), and the image folder. A list (`read_ids`) says which items
are taken and which caption is the prompt; without one this rule does, which never changes (`RULE`):

    images that have captions, by the SHA-256 of their id in decimal digits; the first `count`
    of an image's captions the one with the least SHA-256 of "ID:CAPTION", white space around it cut off

So the first 5,000 are among the first 30,000, everywhere. A result has the fingerprint of its ids.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..config import read_json
from ..data.dataset import DataSet, Split
from ..errors import UserError
from ..images import fit, read_image, unpad
from ..log import logger
from .context import EvalContext
from .generate import content_hash, short_hash

RULE = "rule 1"  # the rule's name in every result: numbers of two rules do not compare
ID_COLUMNS, PROMPT_COLUMNS = ("image_id", "coco_id", "cocoid", "id"), ("text", "caption", "prompt")
"""Columns of published lists that are tables."""
WHERE = "https://cocodataset.org (val2014 images and annotations), or Karpathy's caption_datasets.zip"

Captions = dict[str, list[str]]


@dataclass(frozen=True, eq=False)
class Pairs:
    """By number: ids, one prompt, all references, and the picture uint8 `[row, column, 3]`.

    content   the bytes that picture n is made from
    """

    name: str
    ids: Sequence[str]
    prompts: Sequence[str]
    references: Sequence[Sequence[str]]
    picture: Callable[[int], np.ndarray]
    content: Callable[[int], bytes]

    @property
    def label(self) -> str:
        """The prompts, by name, number and hashes: what drawings of them depend on."""
        hashes = f"ids {ids_fingerprint(self.ids)}, prompts {short_hash(list(self.prompts))}"
        return f"{self.name}, {len(self.ids)} pictures, {hashes}"

    @cached_property
    def whole_label(self) -> str:
        """`label` with hashes of all references and of every picture's content, each of which is read for it."""
        pictures = content_hash(self.content(number) for number in range(len(self.ids)))
        references = short_hash([list(wordings) for wordings in self.references])
        return f"{self.label}, references {references}, pictures {pictures}"


def ids_fingerprint(ids: Sequence[str]) -> str:
    """Return twelve digits of the SHA-256 of the ids, a line each, as `sha256sum` prints for such a file."""
    return hashlib.sha256("".join(f"{key}\n" for key in ids).encode()).hexdigest()[:12]


def context_pairs(context: EvalContext) -> Pairs:
    """Return the user's captions and images, or the scorer's. Raises UserError where there are neither."""
    options, size = context.options, context.pipe.exported.image_size
    if options.data:
        return set_pairs(DataSet(options.data), options.count, size)
    if options.captions is None:
        return context.needs_scorer("--captions").pairs(options.count, size)
    assert options.images is not None
    return coco_pairs(options.captions, options.images, options.count, size, options.ids)


def check_pairs(context: EvalContext, metric: str, least: int) -> Pairs:
    """Return `context_pairs` for a metric that needs `least` pictures.

    Raises UserError, before any work, for fewer, and for missing files.
    """
    options = context.options
    if options.captions is None and options.ids is not None:
        raise UserError("--ids: expected --captions, whose pictures it lists, found none")
    if options.captions is not None and (options.images is None or not options.images.is_dir()):
        given = "none" if options.images is None else str(options.images)
        raise UserError(f"--images: expected the folder of pictures that {options.captions} names, found {given}")
    pairs = context_pairs(context)
    if len(pairs.ids) < least:
        raise UserError(f"{metric}: expected at least {least} pictures, found {len(pairs.ids)} (--count, --ids)")
    if options.own_pairs:
        if len(pairs.ids) < options.count:
            source = options.data or options.ids or options.captions
            logger.info(f"{source}: {len(pairs.ids)} pictures, fewer than the {options.count} asked for")
        for number in (0, len(pairs.ids) - 1):
            pairs.picture(number)
    return pairs


def further_pairs(context: EvalContext, count: int) -> Pairs | None:
    """Return at most `count` other pairs of the same kind, to compare with: the data set's training part, or the
    scorer's. None where there are none."""
    options, size = context.options, context.pipe.exported.image_size
    if options.data:
        data = DataSet(options.data)
        training = data.number("train", np.arange(data.size("train")))
        return set_pairs(data, count, size, "train") if data.documents["pair"][training].any() else None
    if options.captions is not None:
        return None
    both = context.needs_scorer("drawing").pairs(2 * count, size)
    return Pairs(
        both.name,
        both.ids[count:],
        both.prompts[count:],
        both.references[count:],
        lambda number: both.picture(count + number),
        lambda number: both.content(count + number),
    )


def set_pairs(data: DataSet, count: int, size: int, split: Split = "heldout") -> Pairs:
    """Return the first `count` pairs of a split of a data set, in an order that no seed changes.

    Images are cut to their middle square and resized to `size`; the prompt of several captions is chosen by `RULE`.
    Raises UserError for a set of latents or of text, and one without held-out pairs.
    """
    if data.manifest.kind == "text" or data.manifest.encoding is not None:
        kind = "text" if data.manifest.encoding is None else "latents or codes"
        raise UserError(f"--data: {data.path}: expected a data set of images, found one of {kind}")
    numbers = data.number(split, np.arange(data.size(split)))
    numbers = numbers[data.documents["pair"][numbers]][:count]
    if not len(numbers):
        raise UserError(
            f"--data: {data.path}: expected held-out images with captions, found none of {len(data)} documents; build "
            "it with a larger --heldout"
        )
    stored = [data.read(number) for number in numbers.tolist()]
    captions = [[str(part) for part in document.parts[1:]] for document in stored]

    def picture(number: int) -> np.ndarray:
        whole = data.decode(int(numbers[number]), stored[number], content(number))
        return fit(unpad(whole, data.insides(int(numbers[number]))[0]), size)

    def content(number: int) -> bytes:
        image = stored[number].parts[0]
        assert isinstance(image, bytes)
        return image

    keys = [document.key for document in stored]
    prompts = [_chosen(key, texts) for key, texts in zip(keys, captions, strict=True)]
    return Pairs(f"{data.name} {split} by {RULE}", keys, prompts, captions, picture, content)


# --- COCO -------------------------------------------------------------------------------------------------------------


def coco_pairs(annotations: Path, images: Path, count: int, size: int, ids: Path | None = None) -> Pairs:
    """Return COCO's or Karpathy's pairs; pictures are cut to their middle square and resized to `size`, antialiased.

    ids   a list of pictures, of which the first `count` are taken; None: by `RULE`

    Raises UserError for a wrong file or a missing one, pictures included, and for an id or prompt not in the captions.
    """
    files, captions = _read_coco(annotations)
    if ids is None:
        chosen = sorted((key for key in files if captions.get(key)), key=_rank)[:count]
        if not chosen:
            raise UserError(f"{annotations}: expected pictures with captions, found none")
        prompts = {key: _chosen(key, captions[key]) for key in chosen}
    else:
        listed = read_ids(ids)
        unknown = [key for key in listed if key not in files or not captions.get(key)]
        if unknown:
            others = f"{len(unknown)} it has not, the first {unknown[0]}"
            raise UserError(f"--ids: {ids}: expected pictures of {annotations}, found {others}")
        prompts = {}
        for key, words in listed.items():
            own = {" ".join(caption.split()): caption for caption in captions[key]}
            if words is not None and words not in own:
                wanted = f"a caption of picture {key} in {annotations}"
                raise UserError(f"--ids: {ids}: expected {wanted}, found {words!r:.60}")
            prompts[key] = _chosen(key, list(own.values())) if words is None else own[words]
        chosen = list(prompts)[:count]
    places = {key: (images / files[key], images / Path(files[key]).name) for key in chosen}
    paths = {key: path for key, candidates in places.items() for path in candidates[::-1] if path.is_file()}
    missing = [places[key][0] for key in chosen if key not in paths]
    if missing:
        others = f", nor of {len(missing) - 1} others" if missing[1:] else ""
        raise UserError(f"{missing[0]}: expected a picture that {annotations} names, found none{others}; from {WHERE}")

    def content(number: int) -> bytes:
        path = paths[chosen[number]]
        try:
            return path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: expected a picture to read, found {error.strerror or error}") from None

    return Pairs(
        f"{annotations.stem} by {RULE if ids is None else ids.name}",
        chosen,
        [prompts[key] for key in chosen],
        [captions[key] for key in chosen],
        lambda number: fit(read_image(paths[chosen[number]]), size),
        content,
    )


def _read_coco(path: Path) -> tuple[dict[str, str], Captions]:
    """Return the file and the captions of each picture by its id, of COCO's layout or Karpathy's test split."""
    if not path.is_file():
        raise UserError(f"{path}: expected captions_val2014.json or dataset_coco.json, found none; from {WHERE}")
    table: Any = read_json(path)
    try:
        if "sentences" in table["images"][0]:
            images = {str(image["cocoid"]): image for image in table["images"] if image["split"] == "test"}
            files = {key: f"{image.get('filepath', '.')}/{image['filename']}" for key, image in images.items()}
            return files, {key: [s["raw"].strip() for s in image["sentences"]] for key, image in images.items()}
        captions: Captions = {}
        for record in sorted(table["annotations"], key=lambda record: record["id"]):
            captions.setdefault(str(record["image_id"]), []).append(record["caption"].strip())
        return {str(image["id"]): image["file_name"] for image in table["images"]}, captions
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path}: expected COCO's or Karpathy's captions, found something else ({error})") from None


def read_ids(path: Path) -> dict[str, str | None]:
    """Return prompts, or None, by picture id: from an id a line, or a .csv table with a head (`image_id,text`).

    Raises UserError, with the line, for anything else, and for an id that comes twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"--ids: {path}: expected a list of pictures' ids, found none ({error})") from None
    reader = csv.reader(io.StringIO(text, newline=""))
    at_id, at_prompt = 0, -1
    listed: dict[str, str | None] = {}
    for row in reader:
        where = f"--ids: {path}: line {reader.line_num}"
        if not "".join(row).strip():
            continue
        if reader.line_num == 1 and not row[0].strip().isdecimal():
            head = [name.strip().lower() for name in row]
            at_id, at_prompt = (
                next((head.index(name) for name in names if name in head), -1) for names in (ID_COLUMNS, PROMPT_COLUMNS)
            )
            if at_id < 0:
                wanted = f"an id a line, or a column {' or '.join(ID_COLUMNS)}"
                raise UserError(f"{where}: expected {wanted}, found {', '.join(row):.60}")
            continue
        key = row[at_id].strip() if len(row) > at_id else ""
        if not key.isdecimal():
            raise UserError(f"{where}: expected a picture's id, found {','.join(row):.60}")
        key = str(int(key))
        if key in listed:
            raise UserError(f"{where}: expected each picture once, found {key} again")
        listed[key] = " ".join(row[at_prompt].split()) if 0 <= at_prompt < len(row) else None
    if not listed:
        raise UserError(f"--ids: {path}: expected pictures' ids, found an empty list")
    return listed


def _rank(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _chosen(key: str, captions: Sequence[str]) -> str:
    """Return the caption of an image that is its prompt, by `RULE`."""
    return min(captions, key=lambda text: _rank(f"{key}:{text}"))
