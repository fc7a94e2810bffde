"""The sources of a run, opened: `data.sources` as one mixed stream of documents.

world glosses                         the bundled world's scenes, and definitions: the default of every preset
world edits,weight=0.3 glosses        with instructions to change scenes, and their results
photos-64 prose                       two data sets of `transfuse data build`, pictures and text
photos-64,weight=3 world s3://b/set,epochs=4,final=10
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property

from ..autoencoders import Autoencoder
from ..data import (
    Cache,
    CorruptSampleError,
    DataSet,
    Mixture,
    MixtureComponent,
    SceneDialogues,
    SceneEdits,
    ScenePairs,
    Source,
    StoredDialogues,
    StoredImages,
    StoredTexts,
    Texts,
    has_dialogues,
)
from ..data.bundled import World, WorldConfig, caption, glosses
from ..data.dataset import Split
from ..errors import UserError
from ..recipes.recipe import BUNDLED, OF_THE_WORLD, DataConfig, Recipe, SourceSpec
from ..sequence import Document, SequenceFormat, Tokenizer

PROBED = 2_000  # documents at the beginning of a stream that `unseen_noise` reads


@dataclass(frozen=True)
class Sources:
    """The sources of a run, each opened once: data sets by name, and the bundled world."""

    specs: tuple[SourceSpec, ...]
    sets: Mapping[str, DataSet]
    world_config: WorldConfig

    @cached_property
    def world(self) -> World:
        """The bundled world, as training sees it. Raises ValueError for one that shows nothing."""
        return World(self.world_config)

    @cached_property
    def heldout(self) -> World:
        """The held-out combinations of the bundled world. Raises ValueError for a world without any."""
        return World(replace(self.world_config, split="heldout"))

    def kind(self, spec: SourceSpec) -> str:
        """Return "pictures" or "text"."""
        return BUNDLED.get(spec.name) or self.sets[spec.name].manifest.kind

    @property
    def pictures(self) -> list[SourceSpec]:
        """The sources with images."""
        return [spec for spec in self.specs if self.kind(spec) == "pictures"]

    @property
    def texts(self) -> list[SourceSpec]:
        """The sources of text alone."""
        return [spec for spec in self.specs if self.kind(spec) == "text"]

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """Fingerprints of the data sets, in order; a set that was rebuilt has another one."""
        return tuple(self.sets[spec.name].fingerprint for spec in self.specs if spec.name in self.sets)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of the data sets; None without data sets. Raises UserError if two sets differ."""
        if not self.sets:
            return None
        first, *others = self.sets.values()
        tokenizer = first.tokenizer()
        for other in others:
            if other.tokenizer().fingerprint != tokenizer.fingerprint:
                raise UserError(
                    f"{other.path}: expected the tokenizer of {first.path}, found another; build one of them with "
                    f"--tokenizer {first.path}"
                )
        return tokenizer

    @cached_property
    def image_size(self) -> int:
        """Side, in pixels, of the images a model is trained on and draws by default, by its first source of images."""
        for spec in self.pictures:
            if spec.name in OF_THE_WORLD or any(other.name in OF_THE_WORLD for other in self.specs):
                break
            return int(self.sets[spec.name].manifest.settings["size"])
        return self.world_config.size

    def held_out_prompts(self, count: int) -> list[str]:
        """Return captions that training never shows: the world's, or those of the first data set with pairs."""
        for spec in self.pictures:
            if spec.name in OF_THE_WORLD:
                return [caption(self.heldout.scene(index), index) for index in range(count)]
            data = self.sets[spec.name]
            split: Split = "heldout" if data.manifest.heldout else "train"
            captions: list[str] = []
            for index in range(data.size(split)):
                number = data.number(split, index)
                if data.documents[number]["pair"]:
                    with suppress(CorruptSampleError):  # the loader reports damage
                        captions.append(str(data.read(number).parts[1]))
                if len(captions) == count:
                    break
            if captions:
                return (captions * count)[:count]
        return []


def open_sources(data: DataConfig) -> Sources:
    """Open every data set of a run.

    Raises UserError for a set that does not exist, is given twice, or is not the one the run began with.
    """
    specs = data.specs
    cache = Cache(gigabytes=data.cache_gigabytes)
    sets = {spec.name: DataSet(spec.name, cache) for spec in specs if spec.name not in BUNDLED}
    sources = Sources(specs, sets, data.world)
    expected = data.source_fingerprints
    if expected and expected != sources.fingerprints:
        raise UserError(
            f"data.sources: expected the data sets {', '.join(expected)}, as the run began, "
            f"found {', '.join(sources.fingerprints)}"
        )
    return sources


def mixture(
    recipe: Recipe, sources: Sources, tokenizer: Tokenizer, form: SequenceFormat, autoencoder: Autoencoder | None
) -> Mixture:
    """Return the stream of a run. Without an autoencoder a text-only model leaves pictures out.

    Raises UserError if the sources are used up before the run ends.
    """
    data = recipe.data
    by_positions = data.share_of == "positions"
    pictures = sources.pictures if data.text_share < 1 and (autoencoder is not None or not by_positions) else []
    texts = sources.texts if data.text_share > 0 else []
    shares = (1 - data.text_share, data.text_share) if pictures and texts else (1.0, 1.0)
    components = []
    for specs, share in zip((pictures, texts), shares, strict=True):
        last = [spec.weight if spec.final is None else spec.final for spec in specs]
        changes = any(spec.final is not None for spec in specs)
        for spec, weight in zip(specs, last, strict=True):
            first = share * spec.weight / (sum(spec.weight for spec in specs) or 1.0)
            final = share * weight / (sum(last) or 1.0) if changes else None
            source = _source(recipe, sources, spec, tokenizer, autoencoder)
            documents = recipe.data.edits.count if spec.name == "edits" else None  # in one pass, also if left out
            if spec.name in sources.sets:
                documents = sources.sets[spec.name].size("train")
            components.append(MixtureComponent(source, first, spec.epochs, final, documents))
    if not components or not sum(part.weight for part in components):
        raise UserError(f"data.sources: expected something to learn from, found only {', '.join(data.sources)}")
    measured = form if by_positions and ((pictures and texts) or len(components) > 1) else None
    stream = Mixture(components, measured)
    samples = recipe.loop.steps * data.batch_size
    if data.row_length is not None:  # those that fill the rows
        samples = stream.samples_in(samples * data.row_length, form)
    if any(part.anneal_weight is not None for part in components):
        stream.plan(anneal_from=int(samples * (1 - data.final_stretch)))
    if samples > stream.end:
        raise UserError(
            f"data.sources: expected enough for loop.steps {recipe.loop.steps}, about {samples} samples, found "
            f"{int(stream.end)} in the epochs allowed; allow more, or ask for fewer steps"
        )
    return stream


def unseen_noise(recipe: Recipe, document: Callable[[int], Document | None]) -> str | None:
    """Return a line about the timesteps at which no image is trained; None if all timesteps are drawn.

    `document` returns the run's documents by number. Reads the first `PROBED` of them at most, up to the first image
    that takes every timestep, and skips damaged ones.
    """
    last, data = recipe.diffusion.timesteps, recipe.data
    count = min(PROBED, recipe.loop.steps * data.batch_size)
    names, images, most = dict[str, None](), 0, 0
    for sample in range(count):
        try:
            read = document(sample)
        except CorruptSampleError:
            continue
        if read is None or not read.images:
            continue
        names[read.source] = None
        images += len(read.images)
        most = max(most, *(image.max_timestep or last if image.target else 0 for image in read.images))
        if most >= last:
            return None
    if not images:
        return f"data.sources: no image in the first {count} documents: drawing is not learned"
    return (
        f"{', '.join(names)}: no image is learned at timesteps {most + 1} to {last}, where drawing begins; each of the "
        f"{images} images in the first {count} documents comes before its text (data.pairs.image_first_max_timestep "
        f"{data.pairs.image_first_max_timestep}, data.pairs.caption_first {data.pairs.caption_first:g})"
    )


def _source(
    recipe: Recipe, sources: Sources, spec: SourceSpec, tokenizer: Tokenizer, autoencoder: Autoencoder | None
) -> Source | None:
    """Return the documents of one source; None for images without an autoencoder."""
    if spec.name == "glosses":
        return Texts(glosses("train"), tokenizer, recipe.seed)
    data = sources.sets.get(spec.name)
    if data is not None and data.manifest.kind == "text":
        return StoredTexts(data, recipe.seed)
    if autoencoder is None:
        return None
    pairs = recipe.data.pairs
    if recipe.data.context == "clean-copy":  # nothing reads an image with its noise
        pairs = replace(pairs, image_first_max_timestep=None)
    if data is not None:
        kind = StoredDialogues if has_dialogues(data) else StoredImages
        return kind(data, tokenizer, autoencoder, pairs, recipe.seed)
    if spec.name == "edits":
        return SceneEdits(sources.world, tokenizer, autoencoder, recipe.data.edits, recipe.seed)
    if spec.name == "dialogues":
        return SceneDialogues(sources.world, tokenizer, autoencoder, recipe.seed)
    return ScenePairs(sources.world, tokenizer, autoencoder, pairs, recipe.seed)
