"""What a run learns from: `data.sources`, from words on the command line to one mixed stream of documents.

world glosses                         the bundled world's scenes, and definitions: what every preset begins with
world edits,weight=0.3 glosses        and instructions to change scenes, with what they ask for
photos-64 prose                       two data sets of `transfuse data build`, one of pictures and one of text
photos-64,weight=3 world s3://b/set,epochs=4,final=10
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from emoji_scenes import World, caption, glosses

from ..autoencoders import Autoencoder
from ..config import nearest
from ..data import (
    Cache,
    DataSet,
    Ingredient,
    Mixture,
    SceneEdits,
    ScenePairs,
    Source,
    StoredPictures,
    StoredTexts,
    Texts,
)
from ..data.dataset import DamagedError, Split
from ..errors import UserError
from ..sequence import Document, SequenceFormat, Tokenizer, count_positions

if TYPE_CHECKING:
    from .recipe import DataConfig, Recipe

BUNDLED = {"world": "pictures", "edits": "pictures", "glosses": "text"}
OF_THE_WORLD = ("world", "edits")
"""bundled sources whose pictures are as large as `data.world.size`"""
SETTINGS = ("weight", "epochs", "final")


@dataclass(frozen=True)
class SourceSpec:
    """name: a bundled source, or where a data set lies. weight: beside others of its kind (pictures, or text).

    epochs: most passes over it. final: its weight in the last stretch of the run.
    """

    name: str
    weight: float = 1.0
    epochs: float | None = None
    final: float | None = None

    @classmethod
    def parse(cls, text: str) -> SourceSpec:
        """Read "NAME,weight=W,epochs=E,final=F". Raises UserError."""
        name, *settings = text.split(",")
        name = name.rstrip("/") or name
        values: dict[str, float] = {}
        for setting in settings:
            key, equals, value = setting.partition("=")
            if key not in SETTINGS or not equals:
                raise UserError(f'data.sources: {name}: unknown setting "{setting}"{nearest(key, SETTINGS)}')
            try:
                values[key] = float(value)
            except ValueError:
                values[key] = -1.0
            if not 0 <= values[key] < float("inf") or (key == "epochs" and not values[key]):
                raise UserError(f"data.sources: {name}: {key}: expected a number, not negative, found {value}")
        if not name:
            raise UserError(f'data.sources: expected a name or a folder first, found "{text}"')
        return cls(name, **values)


@dataclass(frozen=True)
class Opened:
    """The sources of a run: each with its data set, where it is one."""

    specs: tuple[SourceSpec, ...]
    sets: Mapping[str, DataSet]

    def kind(self, spec: SourceSpec) -> str:
        return BUNDLED.get(spec.name) or self.sets[spec.name].manifest.kind

    @property
    def pictures(self) -> list[SourceSpec]:
        return [spec for spec in self.specs if self.kind(spec) == "pictures"]

    @property
    def texts(self) -> list[SourceSpec]:
        return [spec for spec in self.specs if self.kind(spec) == "text"]

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """Of the data sets, in order: a set that was built anew is another one."""
        return tuple(self.sets[spec.name].fingerprint for spec in self.specs if spec.name in self.sets)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """That of the data sets, if there are any. Raises UserError where two differ."""
        found = [(data.path, data.tokenizer()) for data in self.sets.values()]
        for path, tokenizer in found[1:]:
            if tokenizer.fingerprint != found[0][1].fingerprint:
                raise UserError(
                    f"{path}: expected the tokenizer of {found[0][0]}, found another; build one of them with "
                    f"--tokenizer {found[0][0]}"
                )
        return found[0][1] if found else None

    def check_sizes(self, step: int, most: float) -> None:
        """Raise UserError for pictures that do not divide into patches of `step` pixels, or have more than `most` of
        them a side."""
        for name, data in self.sets.items():
            for side in ("rows", "columns"):
                if (data.pictures[side] % step).any():
                    raise UserError(
                        f"{name}: expected pictures whose sides are multiples of {step} pixels (model.patch_size x the "
                        f"autoencoder's factor), found others; build it with a --size, or --multiple, that is one"
                    )
                if len(data.pictures) and (largest := int(data.pictures[side].max())) > most * step:
                    raise UserError(
                        f"{name}: expected pictures of at most {most * step:g} pixels a side (model.patch_positions "
                        f"learned), found one of {largest}"
                    )

    def check_positions(self, step: int, context: int) -> None:
        """Raise UserError for a document, pictures and words, that is longer than a sequence may be."""
        for name, data in self.sets.items():
            if not len(data.documents):
                continue
            words = count_positions(data.documents["tokens"].astype(np.int64), [])
            longest = int((words + data.image_positions(np.arange(len(data.documents)), step)).max())
            if longest > context:
                raise UserError(
                    f"{name}: expected documents of at most {context} positions (model.max_seq_len), found one of "
                    f"{longest}, its pictures' patches of {step} pixels among them"
                )

    def check_lengths(self, most: int, what: str) -> None:
        """Raise UserError where the text of a document alone is longer than a sequence may be."""
        for name, data in self.sets.items():
            if data.manifest.longest > most:
                raise UserError(
                    f"{name}: expected documents of at most {most} tokens ({what}), found one of "
                    f"{data.manifest.longest}; build it with --max-tokens"
                )


def open_sources(data: DataConfig) -> Opened:
    """Open every data set of a run. Raises UserError: none there, one twice, not as it was at the beginning."""
    specs = tuple(SourceSpec.parse(text) for text in data.sources)
    names = [spec.name for spec in specs]
    if not names or len(set(names)) < len(names):
        raise UserError(f"data.sources: expected each source once, found {', '.join(names) or 'none'}")
    cache = Cache(gigabytes=data.cache_gigabytes)
    opened = Opened(specs, {name: DataSet(name, cache) for name in names if name not in BUNDLED})
    expected = data.source_fingerprints
    if expected and expected != opened.fingerprints:
        raise UserError(
            f"data.sources: expected the data sets {', '.join(expected)}, as the run began, "
            f"found {', '.join(opened.fingerprints)}"
        )
    return opened


def mixture(
    recipe: Recipe, opened: Opened, tokenizer: Tokenizer, grammar: SequenceFormat, autoencoder: Autoencoder | None
) -> Mixture:
    """The stream of a run. Where there is no autoencoder, a text-only model leaves pictures out.

    Raises UserError where the sources are used up before the run ends.
    """
    data = recipe.data
    by_positions = data.share_of == "positions"
    pictures = opened.pictures if data.text_share < 1 and (autoencoder is not None or not by_positions) else []
    texts = opened.texts if data.text_share > 0 else []
    shares = (1 - data.text_share, data.text_share) if pictures and texts else (1.0, 1.0)
    ingredients = []
    for specs, share in zip((pictures, texts), shares, strict=True):
        last = [spec.weight if spec.final is None else spec.final for spec in specs]
        changes = any(spec.final is not None for spec in specs)
        for spec, weight in zip(specs, last, strict=True):
            first = share * spec.weight / (sum(spec.weight for spec in specs) or 1.0)
            final = share * weight / (sum(last) or 1.0) if changes else None
            source = _source(recipe, opened, spec, tokenizer, autoencoder)
            ingredients.append(Ingredient(source, first, spec.epochs, final, _left_out(recipe, opened, spec)))
    if not ingredients or not sum(part.share for part in ingredients):
        raise UserError(f"data.sources: expected something to learn from, found only {', '.join(data.sources)}")
    measured = grammar if by_positions and ((pictures and texts) or len(ingredients) > 1) else None
    found = Mixture(ingredients, measured)
    samples = _samples(recipe, found, grammar)
    if any(part.final is not None for part in ingredients):
        found.plan(final_from=int(samples * (1 - data.final_stretch)))
    if samples > found.end:
        raise UserError(
            f"data.sources: expected enough for loop.steps {recipe.loop.steps}, about {samples} samples, found "
            f"{int(found.end)} in the epochs allowed; allow more, or ask for fewer steps"
        )
    return found


def _samples(recipe: Recipe, found: Mixture, grammar: SequenceFormat) -> int:
    """Samples that a run sees; where they are packed into rows, those that fill its rows."""
    data = recipe.data
    count = recipe.loop.steps * data.batch_size
    return count if data.row_length is None else found.samples_in(count * data.row_length, grammar)


def unseen_noise(recipe: Recipe, document: Callable[[int], Document | None]) -> str | None:
    """One line about the timesteps at which no image of a run is learned; None: every timestep is drawn for some.

    document: gives the documents of the run's stream, by number. The first `LOOKED_AT` are looked at, or fewer: up to
    the first image that all timesteps are drawn for. A damaged document is passed over.
    """
    last, data = recipe.diffusion.timesteps, recipe.data
    count = min(LOOKED_AT, recipe.loop.steps * data.batch_size)
    names, images, most = dict[str, None](), 0, 0
    for sample in range(count):
        try:
            found = document(sample)
        except DamagedError:
            continue
        if found is None or not found.images:
            continue
        names[found.source] = None
        images += len(found.images)
        most = max(most, *(image.max_timestep or last if image.target else 0 for image in found.images))
        if most >= last:
            return None
    if not images:
        return f"data.sources: no image in the first {count} documents: drawing is not learned"
    return (
        f"{', '.join(names)}: no image is learned at timesteps {most + 1} to {last}, where drawing begins; each of the "
        f"{images} images in the first {count} documents stands before its text (data.pairs.image_first_max_timestep "
        f"{data.pairs.image_first_max_timestep}, data.pairs.caption_first {data.pairs.caption_first:g})"
    )


LOOKED_AT = 2_000
"""documents at the beginning of a stream"""


def _source(
    recipe: Recipe, opened: Opened, spec: SourceSpec, tokenizer: Tokenizer, autoencoder: Autoencoder | None
) -> Source | None:
    if opened.kind(spec) == "pictures" and autoencoder is None:
        return None
    if spec.name == "world":
        assert autoencoder is not None
        return ScenePairs(World(recipe.data.world), tokenizer, autoencoder, recipe.data.pairs, recipe.seed)
    if spec.name == "edits":
        assert autoencoder is not None
        return SceneEdits(World(recipe.data.world), tokenizer, autoencoder, recipe.data.edits, recipe.seed)
    if spec.name == "glosses":
        return Texts(glosses("train"), tokenizer, recipe.seed)
    data = opened.sets[spec.name]
    if data.manifest.kind == "text":
        return StoredTexts(data, recipe.seed)
    assert autoencoder is not None
    return StoredPictures(data, tokenizer, autoencoder, recipe.data.pairs, recipe.seed)


def _left_out(recipe: Recipe, opened: Opened, spec: SourceSpec) -> int | None:
    """Documents in a pass of a source, whether or not a run reads it."""
    if spec.name in opened.sets:
        return opened.sets[spec.name].size("train")
    return recipe.data.edits.count if spec.name == "edits" else None


def of_the_world(data: DataConfig) -> bool:
    """Whether a run learns from the bundled world's scenes, among others or alone."""
    return any(SourceSpec.parse(text).name in OF_THE_WORLD for text in data.sources)


def image_size(recipe: Recipe) -> int:
    """Pixels of the side of what a model is shown, and draws unless asked for another: of its first pictures."""
    if of_the_world(recipe.data):
        return recipe.data.world.size
    opened = open_sources(recipe.data)
    for spec in opened.pictures:
        return int(opened.sets[spec.name].manifest.settings["size"])
    return recipe.data.world.size


def held_out_prompts(recipe: Recipe, count: int) -> list[str]:
    """Captions that training does not see: of the world, or else of the first data set with pairs."""
    opened = open_sources(recipe.data)
    for spec in opened.pictures:
        if spec.name in OF_THE_WORLD:
            world = World(replace(recipe.data.world, split="heldout"))
            return [caption(world.scene(index), index) for index in range(count)]
        data = opened.sets[spec.name]
        split: Split = "heldout" if data.manifest.heldout else "train"
        found = []
        for index in range(data.size(split)):
            number = data.number(split, index)
            if data.documents[number]["pair"]:
                with suppress(DamagedError):  # training says so of its own
                    found.append(str(data.read(number).parts[1]))
            if len(found) == count:
                break
        if found:
            return (found * count)[:count]
    return []
