"""`transfuse tune`: a model learns the user's own images, and keeps what it knew by rehearsing it.

    run/pictures/       the data set, unless one that was built before is given
    run/config.json     checkpoints/ metrics.jsonl best/: a run, as of `transfuse train`
    run/export/         the weights of the last step, or with `patience` the best on the pairs that are held out
    run/report.html     the same captions drawn, and the same images captioned, before and after; report.json

The same command resumes a stopped build or run, and repeats nothing that is done.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import PIL.Image

from .charts import ACCENT, line_chart
from .config import read_json
from .data import DataSet
from .data.building import build_set
from .data.building.prepare import BuildConfig
from .data.bundled import SceneScorer
from .data.readers import SET, Columns
from .errors import UserError, check_kinds
from .evaluation import EvalConfig, EvalContext, check, evaluate, model_hash, named
from .evaluation.drawings import IMAGE_LOSS, draw_prompts
from .evaluation.image_quality import MOBILENET
from .evaluation.pairs import Pairs, context_pairs, set_pairs
from .export import Described, describe
from .folders import bundled_name, find_export
from .inference import TransfusionPipeline
from .io import atomic_write
from .log import logger
from .recipes import Recipe
from .recipes.recipe import BUNDLED, OF_THE_WORLD, DataConfig, SourceSpec
from .report import Block, Card, Cards, Charts, Numbers, Page, Section, Table, plain, write_page
from .runs import recipe_of
from .runs.start import decided_by
from .train import step_seconds, train
from .training import LoopConfig, OptimizerConfig, read_metrics
from .training.finetune import LoRAConfig

BEST = f"denoising/{IMAGE_LOSS}"
MEASURES = 20  # evaluations in a run
MEASURED, SHOWN, SHOWN_OTHERS = 64, 12, 6  # pairs that are measured and shown; of those learned, or known before, shown
RATES = {"whole": 3e-4, "lora": 1e-3}
FEWEST, MOST = 300, 20_000  # steps
KINDS: dict[str, tuple[Any, str]] = {
    "model": (str | Path, "a folder, or a model's name"),
    "pictures": (str | Path, "a folder of images, or a data set"),
    "run": (str | Path, "a folder"),
    **dict.fromkeys(("replay", "heldout"), (Real, "a share from 0 to below 1")),
    **dict.fromkeys(("lora", "patience", "batch_size"), (Integral, "a whole number")),
    "steps": (Integral | None, "a whole number"),
    "columns": (Columns | None, "a transfuse.data.readers.Columns"),
}
"""arguments of `tune_model`, with the types they take and these in words"""


@dataclass(frozen=True)
class Tuned:
    """A tuned model, or a run that was stopped and saved.

    export, report   None for a stopped run, which the same call resumes
    numbers          (before, after) by the name of the pairs and of the number
    """

    run: Path
    export: Path | None = None
    report: Path | None = None
    numbers: dict[str, tuple[float, float]] = field(default_factory=dict)


def tune_model(
    model: Path | str,
    pictures: Path | str,
    run: Path | str = "runs/tuned",
    *,
    lora: int = 0,
    replay: float = 0.3,
    heldout: float = 0.1,
    steps: int | None = None,
    patience: int = 0,
    batch_size: int = 32,
    columns: Columns | None = None,
    max_errors: float = 0.01,
) -> Tuned:
    """Teach a model the images and captions of a folder, or of a data set: `transfuse.tune`.

    lora        rank of adapters that are trained in place of all weights; 0: all weights
    replay      share of what is learned that comes from what the model learned from before, where that can be had
    heldout     share of the images that is not learned, to measure by; a data set has its own
    steps       of training; None: by the number of images (`steps_for`)
    patience    evaluations (20 a run) without a better image loss of the held-out pairs, after which the run ends with
                the best weights; 0: it learns to the end
    columns, max_errors     parts of a source that are read, share of faults let pass, as in `transfuse data build`

    Raises UserError for a wrong input, before anything is written, or another run in the folder.
    """
    check_kinds(locals(), KINDS)
    folder, export = Path(run), describe(model)
    for name, fits, expected, value in (
        ("replay", 0 <= replay < 1, "a share from 0 to below 1", replay),
        ("heldout", 0 <= heldout < 1, "a share from 0 to below 1", heldout),
        ("lora", lora >= 0, "at least 0", lora),
        ("steps", steps is None or steps > 0, "at least 1", steps),
        ("patience", patience >= 0, "at least 0", patience),
        ("batch_size", batch_size > 0, "at least 1", batch_size),
        ("max_errors", 0 <= max_errors <= 1, "a share from 0 to 1", max_errors),
        ("model", export.distilled is None, "a model that was not distilled", model),
        ("model", export.model.images == "latents", "a model that denoises", f"{model}, one of {export.model.images}"),
    ):
        if not fits:
            raise UserError(f"{name}: expected {expected}, found {value}")
    data = _open_pictures(str(model), str(pictures), folder / "pictures", export, heldout, columns, max_errors)
    held = _pairs_in(data, "heldout")
    recipe = _recipe(str(model), export, data, held, replay, lora, steps, patience, batch_size)
    loop, kept = recipe.loop, ", ".join(SourceSpec.parse(text).name for text in recipe.data.sources[1:])
    logger.info(f"{data.path}: {data.size('train')} documents to learn from, {held} pairs held out to measure by")
    if kept:
        logger.info(f"{model}: {replay:.0%} of the time it rehearses what it learned from: {kept}")
    elif replay:
        logger.info(f"{model}: what it learned from cannot be had here, so it may forget it")
    if not (folder / "config.json").exists():
        pace = step_seconds(recipe, 8)
        early = ", fewer if the held-out pairs get no better before" if loop.patience else ""
        logger.info(
            f"tune: {loop.steps} steps of {batch_size} documents, {pace:.2f} s each here: about "
            f"{loop.steps * pace / 60:.0f} minutes{early}"
        )
    trained = train(recipe, folder)
    if trained.export is None:
        return Tuned(folder)
    path, made_of = folder / "report.json", {"model": model_hash(Path(model)), "tuned": model_hash(trained.export)}
    done = read_json(path) if path.is_file() and (folder / "report.html").is_file() else {}
    if not made_of.items() <= done.items():
        facts = {"steps": trained.trainer.step, "seconds": round(trained.trainer.totals["seconds"], 1)}
        numbers = _write_report(Path(model), trained.export, data, held, recipe, facts, folder)
        done = {**made_of, **facts, "pictures": data.size("train"), "heldout": held, "numbers": numbers}
        atomic_write(path, lambda partial: partial.write_text(json.dumps(done, indent=2) + "\n", encoding="utf-8"))
    logger.info(f"{folder / 'report.html'}: open it in a browser")
    pairs = {name: (values[0], values[1]) for name, values in done["numbers"].items()}
    return Tuned(folder, trained.export, folder / "report.html", pairs)


def steps_for(pictures: int) -> int:
    """Return the steps for a number of images: 36 times its square root, at least 300."""
    return min(MOST, max(FEWEST, round(36 * pictures**0.5 / MEASURES) * MEASURES))


# --- what it learns from ----------------------------------------------------------------------------------------------


def _open_pictures(
    model: str, pictures: str, out: Path, export: Described, heldout: float, columns: Columns | None, max_errors: float
) -> DataSet:
    """Open a data set, or build one with the model's tokenizer and image size. Raises UserError for one of text."""
    path = pictures
    if not all((Path(pictures) / name).is_file() for name in SET):
        config = BuildConfig(
            export.image_size,
            tokenizer=bundled_name(Path(model)) or str(find_export(model)),
            heldout=heldout,
            max_tokens=export.model.max_seq_len // 2,
            long="cut",
            columns=columns or Columns(),
        )
        build_set(pictures, out, config, max_errors=max_errors)
        path = str(out)
    data = DataSet(path)
    if data.manifest.kind == "text" or data.manifest.encoding is not None:
        kind = "text" if data.manifest.encoding is None else "latents or codes"
        raise UserError(f"{path}: expected a data set of images, found one of {kind}")
    return data


def _pairs_in(data: DataSet, split: Any) -> int:
    numbers = data.number(split, np.arange(data.size(split)))
    return int(data.documents["pair"][numbers].sum())


def _rehearsed(before: Recipe | None, export: Described, data: DataSet) -> tuple[list[SourceSpec], list[SourceSpec]]:
    """Return the sources that a model learned from and that can be had, with images and of text alone."""
    images: list[SourceSpec] = []
    texts: list[SourceSpec] = []
    for spec in () if before is None else before.data.specs:
        try:
            kind = BUNDLED.get(spec.name) or DataSet(spec.name).manifest.kind
        except UserError as error:
            logger.info(f"not rehearsed: {error}")
            continue
        learned = export.world is not None or spec.name not in OF_THE_WORLD
        if spec.weight and learned and spec.name != data.path:
            (images if kind == "pictures" else texts).append(spec)
    return images, texts


def _recipe(
    model: str,
    export: Described,
    data: DataSet,
    held: int,
    replay: float,
    lora: int,
    steps: int | None,
    patience: int,
    batch_size: int,
) -> Recipe:
    """Return the run: the new images and the replayed sources, each with its share of positions."""
    before = recipe_of(model)
    base = before or Recipe()
    images, texts = _rehearsed(before, export, data) if replay else ([], [])
    steps = steps or steps_for(data.size("train"))
    every = max(1, steps // MEASURES)
    # A share of text comes first, and the rest is divided by weights: 1 - replay, and what of it is of images.
    of_text = replay * (base.data.text_share if images else 1.0) if texts else 0.0
    whole = sum(spec.weight for spec in images)
    sources = [f"{data.path},weight={1 - replay if images else 1:g}"]
    sources += [f"{spec.name},weight={(replay - of_text) * spec.weight / whole:g}" for spec in images]
    sources += [f"{spec.name},weight={spec.weight:g}" for spec in texts]
    own = {name: getattr(base.data, name) for name in ("world", "pairs", "edits", "context", "share_of")}
    measured: dict[str, Any] = {
        "measure_every": every,
        "measures": ("denoising",),
        "measure_count": min(held, MEASURED),
        "measure_data": data.path,
    }
    measured |= {"best": BEST, "patience": patience} if patience else {}
    rate = RATES["lora" if lora else "whole"]
    recipe = Recipe(
        preset=base.preset,
        start=model,
        lora=LoRAConfig(lora),
        objective=base.objective,
        data=DataConfig(tuple(sources), text_share=of_text, batch_size=batch_size, **own),
        optimizer=OptimizerConfig(rate, rate / 30, warmup=steps // 20, weight_decay=0.05),
        loop=LoopConfig(
            steps, 1 - 1 / max(10, every), sample_every=0, checkpoint_every=every, keep=1, **measured if held else {}
        ),
    )
    return replace(recipe, **decided_by(export, recipe))


# --- before and after -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Both:
    """The same pairs, drawn and captioned before and after."""

    pairs: Pairs
    contexts: Sequence[EvalContext]

    def numbers(self) -> dict[str, tuple[float, float]]:
        """Return the image loss and the measures of captions, where the pairs allow them."""
        metrics = []
        for metric in named(("denoising", "captioning")):
            try:
                check(self.contexts[0], [metric])
                metrics.append(metric)
            except UserError as error:  # a single pair, or the same caption everywhere
                logger.info(f"not measured: {error}")
        sides = [[r for results in evaluate(context, metrics) for r in results] for context in self.contexts]
        return {before.name: (before.value, after.value) for before, after in zip(*sides, strict=True)}

    def drawings(self, count: int) -> list[Card]:
        """Return cards of a caption: the real image, and both drawings."""
        count, pairs = min(count, len(self.pairs.ids)), self.pairs
        ids, prompts = pairs.ids[:count], pairs.prompts[:count]
        sides = [draw_prompts(context, "drawings", pairs.label, ids, prompts) for context in self.contexts]
        named_sides = list(zip(("before", "after"), sides, strict=True))
        return [
            Card(prompts[n], [(pairs.picture(n), "real"), *((side.image(n), name) for name, side in named_sides)])
            for n in range(count)
        ]

    def captions(self, count: int) -> list[Card]:
        """Return cards of a real image: its caption, and both models' captions."""
        images = [self.pairs.picture(n) for n in range(min(count, len(self.pairs.ids)))]
        sides = [context.pipe.caption([PIL.Image.fromarray(image) for image in images]) for context in self.contexts]
        return [
            Card("", [(image, self.pairs.prompts[n])], reply=[f"before: {sides[0][n]}", f"after: {sides[1][n]}"])
            for n, image in enumerate(images)
        ]


def _write_report(
    model: Path, tuned: Path, data: DataSet, held: int, recipe: Recipe, facts: dict[str, Any], folder: Path
) -> dict[str, tuple[float, float]]:
    """Draw, caption and measure before and after, write the page, and return the numbers."""
    pipes = [(TransfusionPipeline.from_pretrained(path), model_hash(path)) for path in (model, tuned)]

    def both(options: EvalConfig, scorer: SceneScorer | None = None, pairs: Pairs | None = None) -> _Both:
        contexts = [EvalContext(pipe, name, folder / "measures", scorer, options) for pipe, name in pipes]
        return _Both(pairs or context_pairs(contexts[0]), contexts)

    size, own = (
        describe(tuned).image_size,
        EvalConfig(data=data.path, count=min(max(1, held), MEASURED), features=MOBILENET),
    )
    numbers: dict[str, tuple[float, float]] = {}
    sections = []
    if held:
        unseen = both(own)
        numbers |= {f"own images, held out: {name}": value for name, value in unseen.numbers().items()}
        drawn, captioned = Cards(unseen.drawings(SHOWN)), Cards(unseen.captions(SHOWN))
        sections.append(Section("Captions it has not seen", "Each drawn once, with the same seed.", [drawn]))
        sections.append(Section("Images it has not seen", "Below each image its own caption.", [captioned]))
    if _pairs_in(data, "train"):
        learned = both(own, pairs=set_pairs(data, SHOWN_OTHERS, size, "train"))
        note = "What it draws here may be copies of the images."
        sections.append(Section("Captions it has learned", note, [Cards(learned.drawings(SHOWN_OTHERS))]))
    known = _known(recipe, both)
    if known is not None:
        numbers |= {f"what it knew: {name}": value for name, value in known.numbers().items()}
        note = "Captions of what the model learned from before, held out then and now."
        sections.append(Section("What it knew", note, [Cards(known.drawings(SHOWN_OTHERS))]))
    curve = [(line["step"], line[BEST]) for line in read_metrics(folder / "metrics.jsonl") if BEST in line]
    chart = line_chart([("held out", curve, ACCENT)], "step")
    rows = [[name, plain(before), plain(after)] for name, (before, after) in numbers.items()]
    minutes = facts["seconds"] / 60
    summary: list[Block] = [
        Numbers([
            ("Learned from", str(data.size("train")), f"images or documents; {held} held out"),
            ("Minutes", f"{minutes:.0f}", f"of training, {facts['steps']} of {recipe.loop.steps} steps"),
        ]),
        Table(["", "before", "after"], rows),
    ]  # fmt: skip
    if len(curve) > 1:
        sections.append(Section("Image loss of the held-out pairs", "Lower is better.", [Charts([("By step", chart)])]))
    name = bundled_name(model) or (model.resolve().parent if model.name == "export" else model).name
    lead = f"What {name} draws and says before and after it learned from {data.manifest.source}."
    write_page(folder / "report.html", Page(f"{name}, tuned", lead, summary, sections))
    return numbers


def _known(recipe: Recipe, both: Callable[..., _Both]) -> _Both | None:
    """Return pairs of the first replayed source with images, if it has pairs that are held out."""
    for spec in recipe.data.specs[1:]:
        if BUNDLED.get(spec.name) == "pictures":
            return both(EvalConfig(count=MEASURED), SceneScorer(recipe.data.world))
        if spec.name not in BUNDLED and (held := _pairs_in(DataSet(spec.name), "heldout")):
            return both(EvalConfig(data=spec.name, count=min(held, MEASURED), features=MOBILENET))
    return None


class _CallableModule(ModuleType):
    """A module that is called as `tune_model`: the package has the module and the function under one name."""

    __call__ = staticmethod(tune_model)
    __signature__ = inspect.signature(tune_model)


__doc__ = f"{tune_model.__doc__}\n{__doc__}"  # of `help(transfuse.tune)`
sys.modules[__name__].__class__ = _CallableModule
