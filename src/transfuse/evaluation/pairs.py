"""Pictures and what was said about each: what is drawn, captioned, and compared with.

The bundled world's held-out scenes, or files the user has: `captions_val2014.json` as COCO ships it, Karpathy's
`dataset_coco.json` (its test split), and the folder of pictures. Which items are taken is a rule, not a list: in the
order of a hash of their ids, one caption an image, so that the first 5,000 are among the first 30,000 everywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..configuration import read_json
from ..data.world import World, WorldConfig, caption
from ..errors import UserError
from ..images import fit, read_image
from .bench import Bench
from .generate import short_hash

WORDINGS = 5
"""references of a scene of the bundled world, as many as COCO has; fewer where wordings coincide"""
KARPATHY = "test"
WHERE = "https://cocodataset.org (val2014 images and annotations), or Karpathy's caption_datasets.zip"


@dataclass(frozen=True, eq=False)
class Pairs:
    """By number: ids, one prompt, all references, and the picture uint8 `[row, column, 3]`. `label` names the data."""

    name: str
    ids: Sequence[str]
    prompts: Sequence[str]
    references: Sequence[Sequence[str]]
    picture: Callable[[int], np.ndarray]

    @property
    def label(self) -> str:
        return f"{self.name}, {len(self.ids)} pictures, ids {short_hash([list(self.ids), list(self.prompts)])}"


def bench_pairs(bench: Bench) -> Pairs:
    """The user's, or the bundled world's."""
    options, size = bench.options, bench.pipe.exported.image_size
    if options.captions is None:
        return world_pairs(replace(bench.world, size=size), options.count)
    assert options.images is not None
    return coco_pairs(options.captions, options.images, options.count, size)


def check_pairs(bench: Bench) -> None:
    """Raise UserError for files that are not there, before any work."""
    options = bench.options
    if options.captions is None:
        return
    if options.images is None or not options.images.is_dir():
        found = "none" if options.images is None else str(options.images)
        raise UserError(f"--images: expected the folder of pictures that {options.captions} names, found {found}")
    pairs = bench_pairs(bench)
    for number in (0, len(pairs.ids) - 1):
        pairs.picture(number)


def world_pairs(config: WorldConfig, count: int, split: Any = "heldout") -> Pairs:
    """Scenes of a split of the world, as many as asked for, each with several wordings of what it shows."""
    world = World(replace(config, split=split))
    scenes = [world.scene(index) for index in range(count)]
    references = [
        list(dict.fromkeys(caption(scene, index, seed) for seed in range(WORDINGS)))
        for index, scene in enumerate(scenes)
    ]
    ids = [f"{index}:{short_hash(repr(scene))}" for index, scene in enumerate(scenes)]
    prompts = [some[0] for some in references]
    return Pairs(f"world:{split}:{config.size}", ids, prompts, references, lambda n: world.render(scenes[n]))


def coco_pairs(annotations: Path, images: Path, count: int, size: int) -> Pairs:
    """COCO's or Karpathy's captions; pictures are cut to their middle square and resized to `size`, antialiased."""
    if not annotations.is_file():
        raise UserError(f"{annotations}: expected captions_val2014.json or dataset_coco.json, found none; from {WHERE}")
    table = read_json(annotations)
    try:
        files, said = _karpathy(table) if "sentences" in table["images"][0] else _coco(table)
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"{annotations}: expected COCO's or Karpathy's captions, found something else ({error})"
        ) from None
    chosen = sorted((key for key in files if said.get(key)), key=_rank)[:count]
    if not chosen:
        raise UserError(f"{annotations}: expected pictures with captions, found none")
    prompts = [min(said[key], key=lambda words: _rank(f"{key}:{words}")) for key in chosen]

    def picture(number: int) -> np.ndarray:
        name = files[chosen[number]]
        places = (images / name, images / Path(name).name)
        path = next((place for place in places if place.is_file()), places[0])
        if not path.is_file():
            raise UserError(f"{path}: expected a picture that {annotations} names, found none; from {WHERE}")
        return fit(read_image(path), size)

    return Pairs(annotations.stem, chosen, prompts, [said[key] for key in chosen], picture)


def _coco(table: dict[str, Any]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """File and captions by the picture's id."""
    said: dict[str, list[str]] = {}
    for record in sorted(table["annotations"], key=lambda record: record["id"]):
        said.setdefault(str(record["image_id"]), []).append(record["caption"].strip())
    return {str(image["id"]): image["file_name"] for image in table["images"]}, said


def _karpathy(table: dict[str, Any]) -> tuple[dict[str, str], dict[str, list[str]]]:
    images = [image for image in table["images"] if image["split"] == KARPATHY]
    files = {str(image["cocoid"]): f"{image.get('filepath', '.')}/{image['filename']}" for image in images}
    return files, {str(image["cocoid"]): [one["raw"].strip() for one in image["sentences"]] for image in images}


def _rank(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
