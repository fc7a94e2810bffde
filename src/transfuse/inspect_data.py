"""`transfuse data inspect`: data sets before a run learns from them: documents, lengths, and their mixture.

report = inspect_sources(("photos-64", "glosses"), Path("inspection"), "pixels-32", row_length=4096)
"""

from __future__ import annotations

import json
import re
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from .autoencoders import Autoencoder, VQTokenizer, open_autoencoder
from .charts import histogram
from .config import to_dict
from .data import CorruptSampleError, DataSet
from .data.dataset import as_latent
from .data.packing import best_fit
from .data.remote import is_remote
from .errors import UserError
from .io import atomic_json
from .log import logger
from .recipes import ImageContext, Recipe, preset
from .report import (
    Bar,
    Bars,
    Block,
    Card,
    Cards,
    Charts,
    Details,
    Numbers,
    Page,
    Section,
    Table,
    Text,
    percent,
    write_page,
)
from .runs import Sources, open_sources, resolve, train_tokenizer
from .runs.sources import mixture
from .sequence import Tokenizer, count_positions
from .version import __version__

IMAGES, TEXTS, SIZES, LINES = 40, 12, 8, 5  # shown: images, documents of text, sizes, what was left out for each reason
GROUPS, ALIKE, CUT = 6, 6, 3  # shown: groups of near duplicates, images of each, captions cut into tokens
MOST_LINES, CAPTIONS = 20_000, 500  # read: lines of what was left out, images for figures of their captions
CHARACTERS, TOKENS, SIDE = 160, 90, 192  # of a caption; of a text; pixels an image is shrunk to


@dataclass(frozen=True)
class Limits:
    """The most that is read: documents or images of a set, evenly spread; samples of the stream; remote shards."""

    lengths: int = 200_000
    samples: int = 5_000
    remote_shards: int = 4


Lengths = tuple[np.ndarray, np.ndarray | None]
"""text tokens and positions of evenly spread documents; no positions if the preset takes no images"""


def inspect_sources(
    sources: tuple[str, ...],
    out: Path,
    preset_name: str,
    row_length: int,
    limits: Limits | None = None,
    context: ImageContext | None = None,
) -> dict[str, Any]:
    """Inspect data sets and their mixture under a preset; write `index.html` and `report.json`, which is returned.

    Why sources cannot be mixed is part of the report. context: `data.context`; None: the preset's.

    Raises:
        UserError: no such source or preset, sets that do not go together, images that do not fit the preset's patches,
            or a folder that cannot be written.
    """
    if row_length < 1:
        raise UserError(f"row_length: expected at least 1, found {row_length}")
    limits, recipe = limits or Limits(), preset(preset_name)
    recipe = replace(recipe, data=replace(recipe.data, sources=sources, context=context or recipe.data.context))
    opened = open_sources(recipe.data)
    sets = opened.sets.values()
    most, needed = recipe.model.max_seq_len, 2 + max((data.manifest.longest for data in sets), default=0)
    # The page reports a context that is too short; it does not prevent the inspection.
    recipe = replace(recipe, model=replace(recipe.model, max_seq_len=max(most, needed)))
    run = resolve(recipe, here=False)
    autoencoder = None if run.recipe.model.images == "none" else run.autoencoder
    lengths = {data.path: _lengths(data, run.recipe, autoencoder, limits) for data in sets}
    report: dict[str, Any] = {"version": __version__, "preset": preset_name, "context": most, "needed": needed}
    report["sets"] = {data.path: _figures(data, *lengths[data.path], limits) for data in sets}
    try:
        report |= _mixture(run.recipe, opened, autoencoder, row_length, report["sets"], limits)
    except UserError as error:
        logger.info(f"not mixed: {error}")
        report |= {"mixture": None, "rows": None, "not_mixed": str(error)}
    page = data_page(report, opened, lengths, limits)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: expected a folder to write to, found none ({error.strerror})") from None
    write_page(out / "index.html", page)
    atomic_json(out / "report.json", report, allow_nan=False)
    return report


def _evenly(count: int, most: int) -> np.ndarray:
    """Return at most `most` numbers below `count`, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(np.int64))


def _lengths(data: DataSet, recipe: Recipe, autoencoder: Autoencoder | None, limits: Limits) -> Lengths:
    numbers = _evenly(len(data), limits.lengths)
    tokens = data.documents["tokens"][numbers].astype(np.int64)
    if data.manifest.kind == "text":
        return tokens, count_positions(tokens, [])
    if autoencoder is None:
        return tokens, None
    side = recipe.model.patch_size * (data.manifest.encoding or autoencoder).factor
    copies = data.copy_positions(numbers, side) if recipe.data.context == "clean-copy" else 0
    return tokens, count_positions(tokens, []) + data.image_positions(numbers, side) + copies


def _figures(data: DataSet, tokens: np.ndarray, positions: np.ndarray | None, limits: Limits) -> dict[str, Any]:
    """Return the report of one set."""
    manifest, left_out = data.manifest, []
    unread = manifest.files.get("left out", 0)
    for name, count in (("dropped", manifest.dropped), ("quarantine", manifest.faulty), ("left_out", unread)):
        if count:
            with data.file(f"{name}.jsonl").open(encoding="utf-8") as file:
                of_reason: Counter[str] = Counter()
                for line in map(json.loads, islice(file, MOST_LINES)):
                    reason = name if name == "quarantine" else line["reason"].partition(":")[0]
                    of_reason[reason] += 1
                    named = {"key": line.get("key", line.get("file")), "reason": line["reason"]}
                    left_out += [named] if of_reason[reason] <= LINES else []
    counts = ("documents", "pictures", "captions", "tokens", "heldout", "seen", "faulty")
    names = ("kind", *counts, "dropped", "changed", "files", "source", "split", "settings")
    sizes = Counter(data.images[["rows", "columns"]][_evenly(len(data.images), limits.lengths)].tolist()).most_common()
    _, members = np.unique(data.groups["first"], return_counts=True)
    return {
        "fingerprint": data.fingerprint,
        **{name: getattr(manifest, name) for name in names},
        "shards": len(manifest.shards),
        "bytes": sum(shard.bytes for shard in manifest.shards) + sum(index.nbytes for index in data.index()),
        "encoding": None if manifest.encoding is None else to_dict(manifest.encoding),
        "tokens_per_document": _distribution(tokens),
        "positions_per_document": None if positions is None else _distribution(positions),
        "sizes": [[rows, columns, count] for (rows, columns), count in sizes],
        "near_duplicates": {
            "groups": len(members),
            "images": int(members.sum()),
            "largest": int(members.max(initial=0)),
        },
        "left_out": left_out,
    }


def _distribution(values: np.ndarray) -> dict[str, float]:
    return {
        "documents": len(values),
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "percentile_95": int(np.percentile(values, 95, method="inverted_cdf")),
        "longest": int(values.max()),
    }


def _mixture(
    recipe: Recipe,
    opened: Sources,
    autoencoder: Autoencoder | None,
    row_length: int,
    sets: dict[str, Any],
    limits: Limits,
) -> dict[str, Any]:
    """Return `mixture` and `rows` of the report. Raises UserError where the sources cannot be mixed."""
    tokenizer = opened.tokenizer or train_tokenizer(recipe)
    form = recipe.sequence_format(tokenizer)
    # The stream of a run whose end is far: annealed weights and the number of samples needed do not matter here.
    opened = replace(opened, specs=tuple(replace(spec, final=None) for spec in opened.specs))
    data = replace(recipe.data, batch_size=1, accumulate=1, row_length=None)
    recipe = replace(recipe, data=data, loop=replace(recipe.loop, steps=1))
    stream = mixture(recipe, opened, tokenizer, form, autoencoder)
    samples = range(int(min(limits.samples, stream.end)))
    lengths = stream.lengths(samples, form)
    copied = lengths - stream.lengths(samples, replace(form, clean_copy=False)) if form.clean_copy else np.zeros(1)
    ends = [*(phase.start for phase in stream.phases[1:]), len(lengths)]
    phases = [(phase, min(end, len(lengths))) for phase, end in zip(stream.phases, ends, strict=True)]
    numbers = np.array([phase.place(sample)[0] for phase, end in phases for sample in range(phase.start, end)])
    total, sources = sum(part.weight for part in stream.components), {}
    for number, part in enumerate(stream.components):
        own = lengths[numbers == number]
        # Images come first in a mixture, and only they are ever left out of it.
        sources[part.source.name if part.source is not None else opened.pictures[number].name] = {
            "asked": part.weight / total,
            "samples": len(own),
            "positions": int(own.sum()),
            "share_of_documents": len(own) / len(lengths),
            "share_of_positions": float(own.sum() / lengths.sum()),
            "passes": len(own) / part.source.epoch if part.source is not None and part.source.epoch else None,
        }
    known = [sets[name]["positions_per_document"] for name in sources if name in sets]
    longest = max([int(lengths.max()), *(spread["longest"] for spread in known if spread)])
    rows = len(best_fit(lengths.tolist(), row_length)) if longest <= row_length else None
    used = float(lengths.sum() / (rows * row_length)) if rows else None
    return {
        "mixture": {
            "samples": len(lengths),
            "share_of": data.share_of,
            "mean_positions": float(lengths.mean()),
            "share_of_copies": float(copied.sum() / lengths.sum()),
            "ends_after": int(stream.end) if isfinite(stream.end) else None,
            "sources": sources,
        },
        "rows": {"length": row_length, "longest": longest, "rows": rows, "used": used},
        "not_mixed": None,
    }


# --- the page ---------------------------------------------------------------------------------------------------------


def data_page(report: dict[str, Any], opened: Sources, lengths: dict[str, Lengths], limits: Limits) -> Page:
    """Return the page: the mixture's shares first, then each data set with examples, then settings."""
    sections, provenance = [], []
    for data in opened.sets.values():
        figures = report["sets"][data.path]
        charts = []
        for title, values in zip(("Tokens per document", "Positions per document"), lengths[data.path], strict=True):
            if values is not None:
                spread = figures[title.lower().replace(" ", "_")]
                heading = (
                    f"{title}: mean {spread['mean']:,.1f} (the line), median {spread['median']:,g}, 95 % at most "
                    f"{spread['percentile_95']:,}, longest {spread['longest']:,}"
                )
                charts.append((heading, histogram(values, title.split()[0].lower())))
        examples = [*_examples(data, figures["sizes"], limits), *_words(data, limits), *_alike(data, figures)]
        blocks: list[Block] = [_set_numbers(figures), *examples, Charts(charts)]
        sections.append(Section(data.name, f"{data.path}, built from {figures['source']}.", blocks))
        left_out = [[line["key"], line["reason"]] for line in figures["left_out"]]
        if left_out:
            title = f"{data.name}: the first that were left out for each reason"
            provenance.append(Details(title, [Table(["document or file", "why"], left_out)]))
        settings = {"fingerprint": figures["fingerprint"], **figures["settings"], **figures["settings"]["columns"]}
        rows = [[name.replace("_", " "), str(value)] for name, value in settings.items() if name != "columns"]
        provenance.append(Details(f"{data.name}: settings that made it", [Table([], rows)]))
    names = ", ".join(spec.name.rstrip("/").rsplit("/", 1)[-1] for spec in opened.specs)
    lead = f"What is in the data, and what the preset {report['preset']} makes of it."
    footer = f"Made by Transfuse {report['version']}. Every number was counted in the sets as they are on disk."
    return Page(f"Data: {names}", lead, _first_screen(report), sections, provenance, footer)


def _first_screen(report: dict[str, Any]) -> list[Block]:
    """Return each source's share with a mark for its weight, and how its samples fill rows."""
    mixture, rows = report["mixture"], report["rows"]
    if mixture is None:
        return [Text(f"These sources cannot be mixed under this preset. {report['not_mixed']}")]
    share, bars, table = f"share_of_{mixture['share_of']}", [], []
    for name, part in mixture["sources"].items():
        bars.append(Bar(Path(name).name, part[share], reference=part["asked"]))
        shares = [percent(part[key]) for key in ("share_of_positions", "share_of_documents", "asked")]
        table.append([name, *shares, f"{part['passes']:.2g}" if part["passes"] else ""])
    note = f"The first {mixture['samples']:,} samples of the preset's stream, before any annealing of weights."
    if report["needed"] > report["context"]:
        note += f" model.max_seq_len {report['context']:,} is too short for its texts: {report['needed']:,} are needed."
    numbers = [("Positions a sample", f"{mixture['mean_positions']:,.1f}", f"the longest has {rows['longest']:,}")]
    if rows["rows"] is None:
        numbers.append(("Rows", "none", f"of {rows['length']:,} positions: the longest document does not fit"))
    else:
        numbers.append(("Rows", f"{rows['rows']:,}", f"of {rows['length']:,} positions, as data.row_length packs"))
        numbers.append(("Filled", percent(rows["used"]), "of these rows; the rest is padding"))
    if mixture["share_of_copies"]:
        copies = percent(mixture["share_of_copies"])
        numbers.append(("Noised copies", copies, "of all positions: data.context clean-copy"))
    if mixture["ends_after"] is not None:
        numbers.append(("Used up after", f"{mixture['ends_after']:,}", "samples, by the epochs allowed"))
    head = ["source", "share of positions", "share of samples", "weight", "passes"]
    first = Bars(bars, f"share of {mixture['share_of']}", "weight asked for")
    return [first, Text(note), Numbers(numbers), Table(head, table)]


def _set_numbers(figures: dict[str, Any]) -> Numbers:
    sizes, mean = figures["sizes"], figures["tokens_per_document"]["mean"]
    left_out = {**figures["dropped"], **({"faulty": figures["faulty"]} if figures["faulty"] else {})}
    reasons = "".join(f"; {count:,} {reason}" for reason, count in left_out.items())
    shown = f"all {sizes[0][0]} × {sizes[0][1]} pixels" if len(sizes) == 1 else f"of {len(sizes)} sizes"
    changed, files = figures["changed"], figures["files"]
    changes = "; ".join(f"{count:,} {name}" for name, count in changed.items())
    numbers = [
        ("Documents", f"{figures['documents']:,}", f"{figures['heldout']:,} held out from training"),
        *([("Images", f"{figures['pictures']:,}", shown)] if sizes else []),
        ("Tokens of text", f"{figures['tokens']:,}", f"{mean:,.1f} a document"),
        ("On disk", f"{figures['bytes'] / 1e6:,.1f} MB", f"shards: {figures['shards']:,}"),
        ("Left out", f"{sum(left_out.values()):,}", f"of {figures['seen']:,} seen{reasons}"),
        *([("Changed", f"{sum(changed.values()):,}", changes)] if changed else []),
        *([("Files", f"{files['found']:,}", f"{files['left out']:,} left out")] if files else []),
    ]
    return Numbers(numbers)


def _examples(data: DataSet, sizes: list[list[int]], limits: Limits) -> list[Block]:
    """Return documents evenly spread over the set; of a remote set over a few shards, which are fetched whole."""
    manifest, encoding, text = data.manifest, data.manifest.encoding, data.manifest.kind == "text"
    shards, shard_size = len(manifest.shards), manifest.shard_size
    chosen = _evenly(shards, limits.remote_shards if is_remote(data.path) else shards)
    count = TEXTS if text else min(IMAGES, max(TEXTS, IMAGES * len(data) // max(1, manifest.pictures)))
    places = _evenly(len(data) - (shards - len(chosen)) * shard_size, count)
    numbers = chosen[places // shard_size] * shard_size + places % shard_size
    tokenizer, decoder = data.tokenizer(), _decoder(data)
    cards = [_card(data, number, tokenizer, decoder) for number in numbers.tolist()]
    pairs = bool(data.documents["pair"][numbers].all())
    note = f"{len(cards)} documents, evenly spread over the set."
    note += "" if text or pairs else " ▢ marks an image; the first four are shown."
    if encoding:
        note += f" Decoder: {encoding.autoencoder} ({encoding.fingerprint}){'' if decoder else ', which is not here'}."
    blocks: list[Block] = [Text(note), Cards(cards, "", "pictures" if pairs else "wide", IMAGES)]
    if len(sizes) > 1:
        rows = [[f"{height} × {width}", f"{number:,}"] for height, width, number in sizes[:SIZES]]
        blocks.append(Details(f"Sizes: {len(sizes)}", [Table(["rows × columns", "images"], rows)]))
    return blocks


def _words(data: DataSet, limits: Limits) -> list[Block]:
    """Return figures of the captions, and how the tokenizer cuts a few of them; of a set with pairs."""
    pairs = np.flatnonzero(data.documents["pair"][: limits.lengths])
    if not len(pairs) or is_remote(data.path):
        return []
    numbers, tokenizer = pairs[_evenly(len(pairs), CAPTIONS)], data.tokenizer()
    captions: list[str] = []
    for number in numbers.tolist():
        with suppress(CorruptSampleError):
            captions += [str(part) for part in data.read(number).parts[1:]]
    lengths = np.array([len(caption) for caption in captions])
    words = [word for caption in captions for word in re.findall(r"\w+", caption.lower())]
    tokens = sum(len(tokenizer.encode(caption)) for caption in captions)
    often = ", ".join(word for word, _ in Counter(words).most_common(8))
    cut = [
        " · ".join(tokenizer.decode([token]) for token in tokenizer.encode(text)[:TOKENS]) for text in captions[:CUT]
    ]
    figures = [
        ("Captions read", f"{len(captions):,}", f"of {len(numbers):,} images"),
        ("Different ones", f"{len(set(captions)):,}", f"with {len(set(words)):,} different words; most often {often}"),
        ("Characters", f"{np.median(lengths):,g}", f"in the median; {lengths.min():,} to {lengths.max():,}"),
        ("Tokens a word", f"{tokens / max(1, len(words)):.2f}", f"of a tokenizer with {tokenizer.vocab_size:,} ids"),
    ]
    table = Table([], [[text] for text in cut])
    return [Numbers(figures), Details("What the tokenizer makes of captions", [table])]


def _alike(data: DataSet, figures: dict[str, Any]) -> list[Block]:
    """Return the largest groups of near duplicates; of a remote set none, whose shards would be fetched."""
    counts = figures["near_duplicates"]
    if not counts["groups"] or is_remote(data.path):
        return []
    firsts, starts, members = np.unique(data.groups["first"], return_index=True, return_counts=True)
    tokenizer, decoder, cards = data.tokenizer(), _decoder(data), []
    for place in np.argsort(-members, kind="stable")[:GROUPS].tolist():
        numbers = data.groups["document"][starts[place] : starts[place] + min(members[place], ALIKE)].tolist()
        shown = [image for number in numbers for image in _card(data, number, tokenizer, decoder).images[:1]]
        cards.append(Card(f"{members[place]:,} documents, the first is {firsts[place]:,}", shown))
    note = (
        f"{counts['images']:,} documents share an image, exactly or nearly, with another. Each of their "
        f"{counts['groups']:,} groups stands on one side of the split."
    )
    return [Text(note), Cards(cards, "Near duplicates, the largest groups first", "wide", GROUPS)]


def _decoder(data: DataSet) -> Autoencoder | None:
    """Return the autoencoder that made a set of latents or codes, by name or path; None if it is not here."""
    encoding = data.manifest.encoding
    for name in (encoding.autoencoder, data.manifest.settings["autoencoder"]) if encoding else ():
        with suppress(UserError):
            autoencoder = open_autoencoder(name)
            if encoding and autoencoder.fingerprint == encoding.fingerprint:
                return autoencoder if encoding.codebook is None else VQTokenizer(autoencoder)
    return None


def _card(data: DataSet, number: int, tokenizer: Tokenizer, decoder: Autoencoder | None) -> Card:
    """Return the beginning of a text; or the first images of a document, at most SIDE pixels a side, and its words."""
    try:
        if data.manifest.kind == "text":
            ids = data.read_ids(number)
            # The cut may split a character.
            words = tokenizer.decode(ids[:TOKENS].tolist()).rstrip("\ufffd") + ("…" if len(ids) > TOKENS else "")
            return Card(words)
        stored = data.read(number)
        images = [data.decode(number, stored, part) for part in stored.parts if not isinstance(part, str)]
    except CorruptSampleError as error:
        return Card(f"Damaged: {error}")
    between = " / " if stored.pair else " "  # captions of one image, or parts in their order
    words = between.join(part if isinstance(part, str) else "▢" for part in stored.parts[stored.pair :])
    words = words if len(words) <= CHARACTERS else words[:CHARACTERS].rstrip() + "…"
    shown = []
    for image in images[:4]:
        if decoder is not None:
            image = decoder.decode(as_latent(image)[None])[0]
        if image.dtype == np.uint8:
            small = PIL.Image.fromarray(image)
            small.thumbnail((SIDE, SIDE))
            shown.append((np.asarray(small), ""))
    return Card(words, shown)
