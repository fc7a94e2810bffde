"""Data sets looked at before a run learns from them: what is in each, what was left out, what a mixture makes of them.

report = inspect_sources(("photos-64", "glosses"), Path("inspection"), "demo", row_length=4096)
"""

from __future__ import annotations

import json
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from functools import partial
from html import escape
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from ..autoencoders import Autoencoder, VQTokenizer, open_autoencoder
from ..config import to_dict
from ..data import DamagedError, DataSet, Mixture
from ..data.remote import is_remote
from ..data.rows import pack
from ..data.stored import as_latent, decode_picture
from ..errors import UserError
from ..io import atomic_write
from ..log import logger
from ..presets import Recipe, preset
from ..presets.recipe import train_tokenizer
from ..presets.sources import Opened, mixture, open_sources
from ..sequence import Tokenizer, count_positions
from ..version import __version__
from .charts import histogram
from .page import card, folded, grid, image, page, section, table
from .report import percent

SAMPLED, MIXED = 200_000, 5_000
"""documents of a set, or pictures, that are counted, evenly spread; samples of the stream"""
SHEET, TEXTS, FETCHED, SIZES, LINES = 40, 12, 4, 8, 5
"""shown: pictures, documents of text, of how many shards of a set elsewhere, sizes, lines of what was left out"""
WORDS, TOKENS, SIDE, SMOOTH = 160, 90, 192, 128
"""characters of a caption, tokens of a text; pixels a picture is shrunk to, and from which the browser may smooth it"""

# What the frame's style lacks: bars with words above them, several pictures of one document.
_STYLE = """<style>
.cards { grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)); } .grid + .note { margin-top: 24px; }
.bars { list-style: none; margin: 16px 0 0; padding: 0; } .bars li + li { margin-top: 14px; }
.bars p { display: flex; flex-wrap: wrap; gap: 0 14px; margin: 0 0 5px; max-width: none; font-size: 14.5px; }
.bars p, .begins { overflow-wrap: anywhere; } .bars span { color: var(--soft); margin-left: auto; }
.bar { position: relative; height: 8px; border-radius: 4px; background: var(--track); }
.bar i { position: absolute; inset: 0 auto 0 0; border-radius: 4px; background: var(--accent); }
.bar b { position: absolute; top: -3px; bottom: -3px; width: 2px; margin-left: -1px; background: var(--ink); }
.several { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 6px; align-items: start; }
.charts > :only-child { max-width: 510px; } .smooth img { image-rendering: auto; } .begins { white-space: pre-line; }
</style>"""


def inspect_sources(sources: tuple[str, ...], out: Path, preset_name: str, row_length: int) -> dict[str, Any]:
    """Look at data sets and their mixture under a preset; write `index.html` and `report.json`, which is returned.

    Raises UserError: no such source or preset, sets that do not go together or whose pictures do not fit the preset's
    patches, a folder that can not be written. Why sources can not be mixed otherwise is part of the report.
    """
    recipe = preset(preset_name)
    recipe = replace(recipe, data=replace(recipe.data, sources=sources))
    opened = open_sources(recipe.data)
    context, needed = (
        recipe.model.max_seq_len,
        2 + max((one.manifest.longest for one in opened.sets.values()), default=0),
    )
    # a context that is too short is no reason not to look: the page says so
    recipe = replace(recipe, model=replace(recipe.model, max_seq_len=max(context, needed))).settled()
    autoencoder = None if recipe.model.images == "none" else recipe.open_autoencoder()
    lengths = {one.path: _lengths(one, recipe, autoencoder) for one in opened.sets.values()}
    report: dict[str, Any] = {"version": __version__, "preset": preset_name, "context": context, "needed": needed}
    report["sets"] = {one.path: _figures(one, *lengths[one.path]) for one in opened.sets.values()}
    try:
        report |= _mixed(recipe, opened, autoencoder, row_length, report["sets"])
    except UserError as error:
        logger.info(f"not mixed: {error}")
        report |= {"mixture": None, "rows": None, "not_mixed": str(error)}
    html = _page(report, opened, lengths)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: expected a folder to write to, found none ({error.strerror})") from None
    for name, text in (("index.html", html), ("report.json", json.dumps(report, indent=2, allow_nan=False) + "\n")):
        atomic_write(out / name, partial(Path.write_text, data=text, encoding="utf-8"))
    return report


def _evenly(count: int, most: int) -> np.ndarray:
    """At most so many numbers below `count`, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(np.int64))


def _lengths(data: DataSet, recipe: Recipe, autoencoder: Autoencoder | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Text tokens and positions of documents evenly spread; no positions where the preset takes no pictures."""
    numbers = _evenly(len(data), SAMPLED)
    tokens = data.documents["tokens"][numbers].astype(np.int64)
    if data.manifest.kind == "text":
        return tokens, count_positions(tokens, [])
    if autoencoder is None:
        return tokens, None
    side = recipe.model.patch_size * (data.manifest.encoding or autoencoder).factor
    return tokens, count_positions(tokens, []) + data.image_positions(numbers, side)


def _figures(data: DataSet, tokens: np.ndarray, taken: np.ndarray | None) -> dict[str, Any]:
    manifest = data.manifest
    names = ("kind", "documents", "pictures", "tokens", "heldout", "seen", "dropped", "faulty", "source", "settings")
    lists = [name for name, some in (("dropped", manifest.dropped), ("quarantine", manifest.faulty)) if some]
    return {
        "fingerprint": data.fingerprint,
        **{name: getattr(manifest, name) for name in names},
        "shards": len(manifest.shards),
        "bytes": sum(shard.bytes for shard in manifest.shards) + data.documents.nbytes + data.pictures.nbytes,
        "encoding": None if manifest.encoding is None else to_dict(manifest.encoding),
        "tokens_per_document": _distribution(tokens),
        "positions_per_document": None if taken is None else _distribution(taken),
        "sizes": _sizes(data.pictures),
        "left_out": [line for name in lists for line in _first_lines(data.file(f"{name}.jsonl"))],
    }


def _first_lines(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in islice(file, LINES)]


def _distribution(values: np.ndarray) -> dict[str, float]:
    most = int(np.percentile(values, 95, method="inverted_cdf"))
    found = {"mean": float(values.mean()), "median": float(np.median(values)), "percentile_95": most}
    return {"documents": len(values), **found, "longest": int(values.max())}


def _sizes(pictures: np.ndarray) -> list[list[int]]:
    """(rows, columns, how many), the most frequent first."""
    counts = Counter(pictures[_evenly(len(pictures), SAMPLED)].tolist())
    return [[rows, columns, count] for (rows, columns), count in counts.most_common()]


def _mixed(
    recipe: Recipe, opened: Opened, autoencoder: Autoencoder | None, row_length: int, sets: dict[str, Any]
) -> dict[str, Any]:
    """`mixture` and `rows` of the report. Raises UserError where the sources can not be mixed."""
    tokenizer = opened.tokenizer or train_tokenizer(recipe)
    grammar = recipe.model.sequence_format(tokenizer)
    # as of a run whose end is far: neither the shares of its last stretch count here, nor how much it needs
    opened = replace(opened, specs=tuple(replace(spec, final=None) for spec in opened.specs))
    data = replace(recipe.data, batch_size=1, accumulate=1, row_length=None)
    recipe = replace(recipe, data=data, loop=replace(recipe.loop, steps=1))
    stream = mixture(recipe, opened, tokenizer, grammar, autoencoder)
    lengths = stream.lengths(range(int(min(MIXED, stream.end))), grammar)
    found: dict[str, Any] = {"samples": len(lengths), "share_of": data.share_of}
    found |= {"mean_positions": float(lengths.mean()), "ends_after": int(stream.end) if isfinite(stream.end) else None}
    sources = _sources(stream, opened, lengths)
    known = [sets[name]["positions_per_document"] for name in sources if name in sets]
    longest = max([int(lengths.max()), *(one["longest"] for one in known if one)])
    rows = len(pack(lengths.tolist(), row_length)) if longest <= row_length else None
    used = float(lengths.sum() / (rows * row_length)) if rows else None
    packed = {"length": row_length, "longest": longest, "rows": rows, "used": used}
    return {"mixture": {**found, "sources": sources}, "rows": packed, "not_mixed": None}


def _sources(stream: Mixture, opened: Opened, lengths: np.ndarray) -> dict[str, dict[str, Any]]:
    """By source: what it has of the first samples, whose lengths are given, beside the share asked for."""
    ends = [*(phase.start for phase in stream.phases[1:]), len(lengths)]
    stretches = [(one, range(one.start, min(end, len(lengths)))) for one, end in zip(stream.phases, ends, strict=True)]
    numbers = np.array([phase.place(sample)[0] for phase, stretch in stretches for sample in stretch])
    asked = sum(part.share for part in stream.ingredients)
    found = {}
    for number, part in enumerate(stream.ingredients):
        chosen = lengths[numbers == number]
        # pictures come first in a mixture, and only they are ever left out of it
        found[part.source.name if part.source is not None else opened.pictures[number].name] = {
            "asked": part.share / asked,
            "samples": len(chosen),
            "positions": int(chosen.sum()),
            "share_of_documents": len(chosen) / len(lengths),
            "share_of_positions": float(chosen.sum() / lengths.sum()),
            "passes": len(chosen) / part.source.epoch if part.source is not None and part.source.epoch else None,
        }
    return found


def _page(report: dict[str, Any], opened: Opened, lengths: dict[str, tuple[np.ndarray, np.ndarray | None]]) -> str:
    sections = [_STYLE]
    for data in opened.sets.values():
        found = report["sets"][data.path]
        body = _cards(found) + _charts(found, *lengths[data.path]) + _holds(data) + _made(found)
        sections.append(section(data.name, f"{data.path}, built from {found['source']}.", body))
    names = ", ".join(spec.name.rstrip("/").rsplit("/", 1)[-1] for spec in opened.specs)
    lead = f"What is in the data, and what the preset {report['preset']} makes of it."
    footer = f"Made by Transfuse {escape(report['version'])}. Every number was counted in the sets as they lie there."
    return page(f"Data: {names}", lead, [*sections, _mixture(report)], footer)


def _cards(found: dict[str, Any]) -> str:
    sizes, mean = found["sizes"], found["tokens_per_document"]["mean"]
    left_out = {**found["dropped"], **({"faulty": found["faulty"]} if found["faulty"] else {})}
    reasons = "".join(f"; {count:,} {reason}" for reason, count in left_out.items())
    shown = f"all {sizes[0][0]} \u00d7 {sizes[0][1]} pixels" if len(sizes) == 1 else f"of {len(sizes)} sizes"
    cards = [
        card("Documents", f"{found['documents']:,}", f"{found['heldout']:,} held out from training"),
        *([card("Pictures", f"{found['pictures']:,}", shown)] if sizes else []),
        card("Tokens of text", f"{found['tokens']:,}", f"{mean:,.1f} a document"),
        card("On disk", f"{found['bytes'] / 1e6:,.1f} <small>MB</small>", f"shards: {found['shards']:,}"),
        card("Left out", f"{sum(left_out.values()):,}", f"of {found['seen']:,} seen{reasons}"),
    ]
    return grid("cards", cards)


def _charts(found: dict[str, Any], tokens: np.ndarray, taken: np.ndarray | None) -> str:
    panels = []
    for title, values in (("Tokens per document", tokens), ("Positions per document", taken)):
        if values is not None:
            its = found[title.lower().replace(" ", "_")]
            svg = histogram(title, values.tolist(), title.split()[0].lower(), its["mean"])
            said = f"mean {its['mean']:,.1f} (the line), median {its['median']:,g}, 95 % at most "
            said += f"{its['percentile_95']:,}, longest {its['longest']:,}"
            panels.append(f'<div class="card"><h3>{title}</h3>{svg}<p class="beside">{said}</p></div>')
    sizes, total = found["sizes"], sum(count for *_, count in found["sizes"])
    if len(sizes) > 1:
        bars = _bars([(f"{rows} \u00d7 {columns}", f"{n:,}", n / total, None) for rows, columns, n in sizes[:SIZES]])
        panels.append(f'<div class="card"><h3>Rows \u00d7 columns, {len(sizes)} sizes</h3>{bars}</div>')
    return grid("charts", panels)


def _bars(rows: list[tuple[str, str, float, float | None]]) -> str:
    """A bar for each (name, what stands beside it, share, mark)."""
    items = []
    for name, beside, share, mark in rows:
        line = "" if mark is None else f'<b style="left:{100 * mark:.2f}%"></b>'
        said = f"<p>{escape(name)} <span>{escape(beside)}</span></p>"
        items.append(f'<li>{said}<div class="bar"><i style="width:{100 * share:.2f}%"></i>{line}</div></li>')
    return f'<ul class="bars">{"".join(items)}</ul>'


def _made(found: dict[str, Any]) -> str:
    """The first of what was left out, and the settings, folded away."""
    settings = {"fingerprint": found["fingerprint"], **found["settings"], **found["settings"]["columns"]}
    rows = [(name.replace("_", " "), str(value)) for name, value in settings.items() if name != "columns"]
    first = [(one["key"], one["reason"]) for one in found["left_out"]]
    parts = [("The first that were left out", first), ("Settings that made it", rows)]
    return "".join(folded(title, table(rows)) for title, rows in parts if rows)


def _holds(data: DataSet) -> str:
    """Documents evenly spread over the set; over a few shards of one that lies elsewhere: they are fetched whole."""
    manifest, encoding, text = data.manifest, data.manifest.encoding, data.manifest.kind == "text"
    shards, size = len(manifest.shards), manifest.shard_size
    chosen = _evenly(shards, FETCHED if is_remote(data.path) else shards)
    count = TEXTS if text else min(SHEET, max(TEXTS, SHEET * len(data) // max(1, manifest.pictures)))
    places = _evenly(len(data) - (shards - len(chosen)) * size, count)
    tokenizer, decoder = data.tokenizer(), _decoder(data)
    numbers = chosen[places // size] * size + places % size
    cards = [_document(data, number, tokenizer, decoder) for number in numbers.tolist()]
    pairs = bool(data.documents["pair"][numbers].all())
    said = f"{len(cards)} documents, evenly spread over the set, none picked."
    said += "" if text or pairs else " \u25a2 stands for a picture, of which the first four are shown."
    if encoding:
        said += f" Decoder: {encoding.autoencoder} ({encoding.fingerprint}){'' if decoder else ', which is not here'}."
    return f'<p class="note">{escape(said)}</p>' + grid("pictures" if pairs else "wide", cards)


def _decoder(data: DataSet) -> Autoencoder | None:
    """That which a set of latents or codes was made with, by its name or from where it was, if it is here."""
    encoding = data.manifest.encoding
    for name in (encoding.autoencoder, data.manifest.settings["autoencoder"]) if encoding else ():
        with suppress(UserError):
            found = open_autoencoder(name)
            if encoding and found.fingerprint == encoding.fingerprint:
                return found if encoding.codebook is None else VQTokenizer(found)
    return None


def _document(data: DataSet, number: int, tokenizer: Tokenizer, decoder: Autoencoder | None) -> str:
    """A card: the beginning of a text; or the first pictures of a document, and its words."""
    try:
        if data.manifest.kind == "text":
            ids = data.read_ids(number)
            # the cut may go through a character
            said = tokenizer.decode(ids[:TOKENS].tolist()).rstrip("\ufffd") + ("\u2026" if len(ids) > TOKENS else "")
            return f'<p class="card begins">{escape(said)}</p>'
        stored = data.read(number)
        found = [decode_picture(data, number, stored, part) for part in stored.parts if not isinstance(part, str)]
    except DamagedError as error:
        return f'<p class="card">Damaged: {escape(str(error))}</p>'
    said = " ".join(part if isinstance(part, str) else "\u25a2" for part in stored.parts[stored.pair :])
    said = said if len(said) <= WORDS else said[:WORDS].rstrip() + "\u2026"
    shown = [_pixels(one, decoder) for one in found[:4] if decoder or one.dtype == np.uint8]
    kind = ("" if stored.pair else "several ") + ("smooth" if any(max(one.shape) >= SMOOTH for one in shown) else "")
    pictures = f'<div class="{kind}">{"".join(image(one, said) for one in shown)}</div>'
    return f'<figure class="card picture">{pictures}<figcaption>{escape(said)}</figcaption></figure>'


def _pixels(picture: np.ndarray, decoder: Autoencoder | None) -> np.ndarray:
    """uint8 `[row, column, 3]` of a stored picture, at most SIDE pixels a side."""
    if decoder is not None:
        picture = decoder.decode(as_latent(picture)[None])[0]
    small = PIL.Image.fromarray(picture)
    small.thumbnail((SIDE, SIDE))
    return np.asarray(small)


def _mixture(report: dict[str, Any]) -> str:
    found, rows = report["mixture"], report["rows"]
    if found is None:
        return section("Mixture", f"These sources can not be mixed under this preset. {report['not_mixed']}", "")
    bars = []
    for name, one in found["sources"].items():
        said = f"{percent(one['share_of_positions'])} of positions, {percent(one['share_of_documents'])} of samples"
        said += (f"; passes: {one['passes']:.2g}" if one["passes"] else "") + f"; asked {percent(one['asked'])}"
        bars.append((name, said, one[f"share_of_{found['share_of']}"], one["asked"]))
    cards = [card("Positions a sample", f"{found['mean_positions']:,.1f}", f"the longest has {rows['longest']:,}")]
    if rows["rows"] is None:
        cards.append(card("Rows", "none", f"of {rows['length']:,} positions: the longest document does not fit"))
    else:
        cards.append(card("Rows", f"{rows['rows']:,}", f"of {rows['length']:,} positions, as data.row_length packs"))
        cards.append(card("Filled", percent(rows["used"]), "of these rows; the rest is padding"))
    if found["ends_after"] is not None:
        cards.append(card("Used up after", f"{found['ends_after']:,}", "samples, by the epochs allowed"))
    note = f"The first {found['samples']:,} samples of the preset's stream, before any shares of a last stretch. "
    note += f"Bars are shares of {found['share_of']}, marks what was asked for."
    if report["needed"] > report["context"]:
        note += f" model.max_seq_len {report['context']:,} is too short for its texts: {report['needed']:,} are needed."
    return section("Mixture", note, _bars(bars) + grid("cards", cards))
