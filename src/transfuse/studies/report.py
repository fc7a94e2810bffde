"""The demo's report: numbers next to chance and a reference, curves, and everything the model drew, said and wrote."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ..config import to_dict
from ..errors import UserError
from ..evaluation import CaptionResult, DrawingResult
from ..inference import Reply
from ..presets import Recipe
from .charts import Curve, chart, gauge, ramp, shade
from .page import card, folded, grid, image, page, section, table

REAL, RIGHT = "real pictures", "all right"
"""what a share is compared with"""
DRAWINGS_SHOWN, CAPTIONS_SHOWN = 36, 12
"""shown at once; the rest is folded away, none is left out"""


@dataclass(eq=False)
class Exhibits:
    """What there is to see.

    continuations   (prompt, what the model wrote)
    interleaved     (prompt, the reply: texts and pictures in the order the model chose)
    strip           (step, predicted clean image uint8 `[row, column, 3]`) of one drawing of `strip_prompt`
    """

    drawings: DrawingResult
    captions: CaptionResult
    continuations: list[tuple[str, str]]
    interleaved: list[tuple[str, Reply]]
    strip: list[tuple[int, np.ndarray]]
    strip_prompt: str


def write_report(
    path: Path, report: dict[str, Any], exhibits: Exhibits, recipe: Recipe, metrics: Sequence[dict[str, Any]]
) -> Path:
    """Write the page, whole or not at all. report: as in `report.json`; metrics: lines of `metrics.jsonl`."""
    sections = [
        section("What it can do", _WHAT, _cards(report)),
        section("Drawings", _DRAWINGS.format(count=report["pictures_measured"]), _drawings(exhibits.drawings)),
        section("From noise to picture", _STRIP.format(prompt=exhibits.strip_prompt), _strip(exhibits)),
        section("Words and pictures, as it likes", _INTERLEAVED, _interleaved(exhibits.interleaved)),
        section("Captions", _CAPTIONS.format(count=report["pictures_measured"]), _captions(exhibits.captions)),
        section("Definitions", _DEFINITIONS, _continuations(exhibits.continuations)),
        section("How it learned", _LEARNED, _curves(metrics)),
        section("Speed and machine", "", _machine(report)),
        section("How it was made", "", _made(report, recipe)),
    ]
    footer = f"Made by Transfuse {escape(str(report['version']))}. Every number was measured by the run it describes."
    try:
        partial = path.with_suffix(".partial")
        partial.write_text(page("One transformer that writes and draws", _lead(report), sections, footer))
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path}: report not written ({error.strerror or error})") from None
    return path


_WHAT = (
    "Each noun has one background colour on which training never showed it; the shares are measured on just those "
    "combinations. Their bars run from 0 to 100 %: the shaded part is the 95 % interval, the dashed mark is chance, "
    "the solid mark what the same measure says of the real pictures, and of captions that are all right."
)
_DRAWINGS = (
    "All {count} prompts in the order they came, none picked. A strict judge names the thing among all nouns, or finds "
    "none plain; a second one must choose among the nouns of this world, so a blob of the right colour is enough for "
    "it. The background is read off the border."
)
_STRIP = "“{prompt}”: the picture that the model expects at the end, at steps along the way."
_INTERLEAVED = (
    "Nobody tells it to draw: after every token the model may go on with a word, a picture or the end. Its own words "
    "are coloured. The first three of twelve unseen captions, then three beginnings."
)
_CAPTIONS = "All {count} real pictures of held-out combinations in the order they came, described by the model."
_DEFINITIONS = (
    "Text alone, the token of highest probability each time. The first four words name things it draws; the others are "
    "spread evenly over those held out, with all their definitions. A model of this size learns how definitions sound, "
    "not what is true."
)
_LEARNED = (
    "Both losses come from every step of one training run. An image loss is the mean squared error of the predicted "
    "picture; it is small for pictures that are nearly clean, and larger the more noise there is to take away."
)


def percent(value: float) -> str:
    return f"{100 * value:.1f}\u202f%"


def _plural(count: int, name: str) -> str:
    return f"{count:,} {name}{'' if count == 1 else 's'}"


def _lead(report: dict[str, Any]) -> str:
    machine = report["machine"]
    where = _plural(machine["threads"], "processor thread") if machine["device"] == "cpu" else machine["device"]
    return (
        f"{report['parameters'] / 1e6:.1f} million parameters, trained from nothing for "
        f"{report['train_seconds'] / 60:.1f} minutes on {where} with {report['images_seen']:,} captioned pictures of "
        f"{report['nouns']} things and with dictionary definitions: one model that draws, captions and writes."
    )


# --- numbers ----------------------------------------------------------------------------------------------------------


def _cards(report: dict[str, Any]) -> str:
    shares = [
        (
            "Draws the thing plainly",
            "noun_strict_accuracy",
            "noun_strict",
            report["real_noun_strict_accuracy"],
            REAL,
        ),
        ("Draws the right thing, of a few", "noun_accuracy", "noun", report["real_noun_accuracy"], REAL),
        ("Draws the right background", "background_accuracy", "background", report["real_background_accuracy"], REAL),
        ("Names the right background", "caption_background_accuracy", "background", 1.0, RIGHT),
        ("Names the right thing", "caption_noun_accuracy", "noun", 1.0, RIGHT),
    ]
    cards = [
        _share_card(title, report[key], report[f"{key}_interval"], report[f"chance_{kind}_accuracy"], reference, name)
        for title, key, kind, reference, name in shares
    ]
    low, high = report["heldout_text_perplexity_interval"]
    least, most = report["bits_per_byte_interval"]
    near, far = report["frechet_distance_interval"]
    cards += [
        card(
            "Fréchet distance",
            f"{report['frechet_distance']:.2f}",
            f"95 % interval {near:.2f} to {far:.2f}, from the real pictures of the prompts, by the second judge's "
            f"features; other real pictures are {report['frechet_distance_of_other_real_pictures']:.2f} away",
        ),
        card(
            "Perplexity on unread text",
            f"{report['heldout_text_perplexity']:.1f}",
            f"95 % interval {low:.1f} to {high:.1f}, over {report['heldout_text_tokens']:,} tokens; "
            f"{report['bits_per_byte']:.2f} bits per byte ({least:.2f} to {most:.2f})",
        ),
        card(
            "Draws of its own accord",
            percent(report["draws_of_its_own_accord"]),
            "of unseen captions are followed by a picture at once, unasked; of definitions, where none belongs, "
            f"{percent(report['draws_within_definitions'])}",
        ),
        card(
            "Draws",
            f"{report['images_per_second']:.1f} <small>images/s</small>",
            f"many at once, {report['denoising_steps']} steps each with guidance; one alone takes "
            f"{report['seconds_for_one_image']:.2f} s",
        ),
        card(
            "Writes",
            f"{report['tokens_per_second']:,.0f} <small>tokens/s</small>",
            f"many at once; {report['tokens_per_second_alone']:,.0f} tokens/s alone",
        ),
    ]
    return grid("cards", cards)


def _share_card(title: str, value: float, interval: Sequence[float], chance: float, reference: float, name: str) -> str:
    low, high = interval
    return (
        f'<div class="card"><p class="label">{escape(title)}</p><div class="number">{percent(value)}</div>'
        f"{gauge(value, low, high, chance, reference)}"
        f'<p class="beside">95 % interval {percent(low)} to {percent(high)}<br>'
        f"chance {percent(chance)}, {name} {percent(reference)}</p></div>"
    )


# --- pictures and words -----------------------------------------------------------------------------------------------


def _folded(kind: str, items: list[str], at_once: int) -> str:
    """The first items at once, the others behind a line to open."""
    shown, rest = items[:at_once], items[at_once:]
    more = folded(f"The other {len(rest)}", grid(kind, rest)) if rest else ""
    return grid(kind, shown) + more


def _mark(name: str, right: bool, found: str = "") -> str:
    """Whether a thing was right: a sign to see, words to hear; and what was found where it was not."""
    instead = f", found {found}" if found and not right else ""
    said = f'<span class="heard">: {"right" if right else "wrong"}</span>'
    return f'<span class="{"yes" if right else "no"}">{escape(name)}{said}{escape(instead)}</span>'


def _drawings(found: DrawingResult) -> str:
    items = []
    for n, prompt in enumerate(found.prompts):
        marks = (
            _mark("plain", bool(found.noun_strict_right[n]), found.named_strictly[n] or "none")
            + _mark(found.nouns[n], bool(found.noun_right[n]), found.named[n])
            + _mark(found.backgrounds[n], bool(found.background_right[n]), found.seen[n])
        )
        items.append(
            f'<figure class="card picture">{image(found.images[n], prompt)}<figcaption>{escape(prompt)}</figcaption>'
            f'<div class="marks">{marks}</div></figure>'
        )
    return _folded("pictures", items, DRAWINGS_SHOWN)


def _captions(found: CaptionResult) -> str:
    items = [
        f'<div class="card row">{image(found.images[n], found.truths[n])}<div><div>{escape(said) or "(nothing)"}</div>'
        f'<div class="marks">{_mark("noun", bool(found.noun_right[n]))}'
        f"{_mark('background', bool(found.background_right[n]))}</div></div></div>"
        for n, said in enumerate(found.captions)
    ]
    return _folded("wide", items, CAPTIONS_SHOWN)


def _strip(exhibits: Exhibits) -> str:
    figures = [
        f"<figure>{image(pixels, f'{exhibits.strip_prompt}, after step {step}')}<figcaption>step {step}</figcaption>"
        "</figure>"
        for step, pixels in exhibits.strip
    ]
    return f'<div class="card strip">{"".join(figures)}</div>'


def _interleaved(rows: Sequence[tuple[str, Reply]]) -> str:
    items = []
    for prompt, reply in rows:
        said = [f"<span>{escape(prompt)}</span>"]
        for part in reply.parts:
            if isinstance(part, str):
                said.append(f'<span class="said">{escape(part)}</span>')
            else:
                said.append(image(np.asarray(part), f"drawn after: {prompt}", "inline"))
        if not reply.images:
            said.append(
                f'<p class="beside">{"it ended here" if reply.done.reason == "stop" else "no picture so far"}</p>'
            )
        items.append(f'<div class="card">{"".join(said)}</div>')
    return grid("wide", items)


def _continuations(pairs: Sequence[tuple[str, str]]) -> str:
    return grid(
        "wide",
        [
            f'<div class="card"><span>{escape(prompt)}</span><span class="said">{escape(text)}</span></div>'
            for prompt, text in pairs
        ],
    )


# --- curves, tables ---------------------------------------------------------------------------------------------------


def _curves(metrics: Sequence[dict[str, Any]]) -> str:
    def points(name: str) -> list[tuple[float, float]]:
        return [(line["step"], line[name]) for line in metrics if name in line]

    bins = sorted(
        {name for line in metrics for name in line if name.startswith("image_by_timestep/")},
        key=lambda name: int(name.rpartition("/")[2]),
    )
    by_timestep = [Curve(name, points(name), shade(number, len(bins))) for number, name in enumerate(bins)]
    text, picture = [Curve("text", points("text"), "var(--accent)")], [Curve("image", points("image"), "var(--warm)")]
    panels = [
        ("Text loss, nats per token", chart("Text loss by step", text, "step"), ""),
        ("Image loss, weighted", chart("Image loss by step", picture, "step"), ""),
        (
            "Image error by timestep",
            chart(
                f"Image error by step, one curve for each of {len(bins)} ranges of timesteps", by_timestep, "step", True
            ),
            ramp("nearly clean", "nearly noise"),
        ),
    ]
    made = [f'<div class="card"><h3>{title}</h3>{svg}{key}</div>' for title, svg, key in panels if svg]
    return grid("charts", made) if made else '<p class="note">Too few logged steps for a curve.</p>'


def _machine(report: dict[str, Any]) -> str:
    rows = [(name.replace("_", " "), str(value)) for name, value in report["machine"].items()]
    rows += [
        ("training", f"{report['steps']:,} steps in {report['train_seconds']:,.0f} s"),
        ("drawing, many at once", f"{report['images_per_second']:.2f} images/s"),
        ("drawing, one alone", f"{report['seconds_for_one_image']:.2f} s"),
        ("writing, many at once", f"{report['tokens_per_second']:,.0f} tokens/s"),
        ("writing, one alone", f"{report['tokens_per_second_alone']:,.0f} tokens/s"),
        ("captioning, many at once", f"{report['captions_per_second']:.1f} pictures/s"),
    ]
    return table(rows)


def _made(report: dict[str, Any], recipe: Recipe) -> str:
    judge = report["recogniser_accuracy"]
    rows = [
        ("preset and seed", f"{report['preset']}, seed {report['seed']}"),
        ("network", f"{report['parameters']:,} parameters"),
        ("seen in training", f"{report['images_seen']:,} pictures, {report['text_tokens_seen']:,} text tokens"),
        (
            "strict judge of drawings",
            f"{report['strict_judge_digest']}, comes with the package; a guess is right in "
            f"{percent(report['chance_noun_strict_accuracy'])}",
        ),
        (
            "judge that chooses among its nouns",
            f"{report['recogniser_parameters']:,} parameters, {percent(judge)} right on fresh scenes",
        ),
        ("drawing", f"{report['sampler']}, {report['denoising_steps']} steps, guidance {report['guidance_scale']:g}"),
    ]
    whole = json.dumps(to_dict(recipe), indent=2)
    return "".join(
        [
            f"<pre>{escape(str(report['command']))}</pre>{table(rows)}",
            folded("Every number, as in report.json", table(list(_leaves(report)))),
            folded("The whole recipe", f"<pre>{escape(whole)}</pre>"),
        ]
    )


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every value of the report with its name."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name} {key}".strip())
    elif isinstance(value, list):
        yield name, " to ".join(json.dumps(inner) for inner in value)
    else:
        yield name, value if isinstance(value, str) else json.dumps(value)
