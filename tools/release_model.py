"""Makes the model that comes with the package out of its run: weights in half precision, measured, with its card.

    python tools/release_model.py runs/small-64 runs/small-64-more --out evaluation

Of several runs each began where the one before had ended; the last is exported.

The folder under src/transfuse/weights is replaced whole, docs/images gets what it draws of prompts it never saw, and
docs/reports the page of what was measured. That lies in --out, and goes on where it stopped; the card's numbers are
read from its results.json. How it draws unless told otherwise is what the preset says today.
"""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

import transfuse
from transfuse.cli import run
from transfuse.config import read_json, to_dict
from transfuse.export import describe
from transfuse.folders import WEIGHTS
from transfuse.hub_files import write_json
from transfuse.model.costs import count_parameters
from transfuse.model_card import model_index, write_card
from transfuse.recipes import Recipe, preset
from transfuse.runs import open_sources, read_recipe
from transfuse.runs.monitor import grid
from transfuse.training import read_metrics

MEASURES = (
    (240, "composition"),
    (120, "captioning", "editing", "drawing", "text", "choice", "autoencoder"),
    (30, "dialogues"),
)
"""each with its number of images, captions, edits or conversations; the first page shows drawings"""
SHEET = (3, 8)
"""rows and columns of README's picture"""

COMMANDS = """\
    transfuse train small-64 --model.patch-positions none --data.workers 14 --parallel.compile --loop.max-seconds 425

on one NVIDIA H200 (4,690 of 8,200 steps of 512 documents; the time was over when the learning rate had come down to
42 %), and then, for which of two things lies where it had not learned at all, on two CPU cores with AMX, 48 documents a
step, each from where the one before had ended (`--start`, the first with `--init.allow-changes network`):

| what is shown | settings | steps |
| --- | --- | ---: |
| one or two things | `--data.sources world glosses --data.world.kinds one pair --data.pairs.caption-first 0.5` | 300 |
| two, to be captioned | `--data.sources world --data.world.kinds pair --data.pairs.caption-first 0` | 800 |
| two, most to be drawn | `--data.sources world --data.world.kinds pair --data.pairs.caption-first 0.7` | 618 |
| everything | `--data.sources world edits,weight=0.25 glosses --data.pairs.caption-first 0.6` | 1,450 |

Rates: 3e-4, 4e-4, 4e-4, and 3.5e-4 brought down to 1e-6.

Then, on two cores with AMX beside other jobs, 32 documents a step, it learned to converse, with Muon, levels of noise
shifted by 2 and clean copies (`--diffusion.shift 2 --data.context clean-copy --model.max-seq-len 1024`), and with its
own autoencoder (`--init.allow-changes network --data.autoencoder small-64/autoencoder`):

| what is shown | settings | steps |
| --- | --- | ---: |
| several things; conversations in a template that was wrong | \
`--data.sources world edits,weight=0.3 dialogues,weight=0.6 glosses --data.world.kinds copies pair group` | 457 |
| the same, in the right template | the same | 308 |
| everything | `--data.sources world edits,weight=0.3 dialogues,weight=0.5 glosses` | 604 |

Rates: 7e-4, 6e-4, and 5e-4 brought down to 5e-5, where the time was over. `docs/launch/small-64.sh` continues."""
BEFORE = {"step": 7858, "images": 1.73e6, "flops": 2.4e16, "seconds": 84 * 60}
"""of the runs whose weights were the package's before the given ones"""

METADATA = {"pipeline_tag": "any-to-any", "library_name": "transfuse", "license": "apache-2.0"}
CARD = """# {name}

A small Transfusion (Zhou et al., arXiv 2408.11039), trained from nothing by

{commands}

Then:

    import transfuse
    pipe = transfuse.load("{name}")
    pipe("two balloons on a blue background").images[0].save("balloons.png")

- **Knows** {nouns} things ({things}) in one drawing style, up to {count} of a kind and {kinds} kinds in an image, on
  eleven background colours, at {size} pixels a side; definitions of words; edits by instruction; conversations about
  its drawings and about images that it is shown. Every word: vocabulary.json.
- **Data**: scenes of the project's bundled world (drawings: {styles}; licences in NOTICE), instructions to change
  them, conversations about them, and definitions from WordNet 3.1. No photograph, no person, nothing from the web.
- **Network**: {parameters:,.0f} parameters, stored in float16; images through an earlier {autoencoder}, which is in
  its folder: one of its eight channels is dead, and an eighth of the model's image loss was about nothing.
- **Compute**: {steps:,.0f} steps, {images:,.0f} images, {flops:.2g} operations, {minutes:.0f} minutes.
- **Licence**: Apache-2.0.

## Measured

{measures}

Means with 95 % intervals, beside what chance and what a reference (real images, other captions, exact targets) score
by the same measure. A model can pass a reference. "Held out" combinations were never shown in training. The same with
images: docs/reports/{name}.html, {name}-captioning.html and {name}-dialogues.html; what each number is, and is not:
docs/evaluation.md.

| measure | value | 95 % interval | chance | reference |
| --- | ---: | ---: | ---: | ---: |
{rows}

Before it learned to converse (240 of each): composition 0.725 (0.677 to 0.773) of seen combinations and 0.721 (0.672 to
0.77) of held-out ones, position 0.85 and 0.725, counting 0.275 and 0.375; captions' nouns 0.992; edits 0.725.

## Limits
It knows the things above and nothing else; other words give something between them. It counts badly (three umbrellas
are four). It has seen few conversations: its words are right far more often than its drawings, which are poorer there
than from a prompt alone. A judge of its {nouns} nouns says which it drew, not whether a person would name it. Small
things lose their details. Its settings for drawing were chosen among six by 120 images of each split, before it learned
to converse.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("evaluation"))
    asked = parser.parse_args()
    recipe = read_recipe(asked.runs[-1] / "config.json", Recipe)
    folder, last = WEIGHTS / recipe.preset, asked.runs[-1]
    shutil.rmtree(folder, ignore_errors=True)
    source = last if (last / "checkpoints").is_dir() else last / "export"  # of a run elsewhere, that alone may be here
    done(["export", str(source), "--out", str(folder), "--dtype", "float16"])
    for name in ("modeling_transfusion.py", "processor_config.json"):  # `transfuse export small-64` writes them
        (folder / name).unlink()
    config = read_json(folder / "config.json")
    del config["auto_map"]
    write_json(folder / "config.json", config)
    settings = to_dict(preset(recipe.preset).generation)  # chosen when the model was there to be looked at
    write_json(folder / "transfuse_generation.json", settings)
    kept: list[dict[str, Any]] = []
    for count, *suite in MEASURES:
        done(["evaluate", "--model", recipe.preset, "--suite", *suite, "--count", str(count), "--out", str(asked.out)])
        report = json.loads((asked.out / "results.json").read_text())
        kept += [result for result in report["results"] if not result["name"].endswith("corrected")]
        page = recipe.preset if suite[0] == MEASURES[0][1] else f"{recipe.preset}-{suite[0]}"
        shutil.copyfile(asked.out / "report.html", Path("docs/reports") / f"{page}.html")
    ends = [BEFORE, *(read_metrics(run / "metrics.jsonl")[-1] for run in asked.runs)]
    totals = {name: sum(line[name] for line in ends) for name in ("step", "images", "flops", "seconds")}
    metadata = METADATA | {"model-index": model_index(recipe.preset, kept)}
    (folder / "README.md").write_text(write_card(metadata, card(recipe, totals, kept)), encoding="utf-8")
    draw_sheet(recipe, Path("docs/images") / f"{recipe.preset}.png")


def draw_sheet(recipe: Recipe, path: Path) -> None:
    """Draw the first held-out prompts with seeds from 0, and write a sheet, the prompts and a labelled grid."""
    prompts = open_sources(recipe.data).held_out_prompts(SHEET[0] * SHEET[1])
    images = transfuse.load(recipe.preset)(prompts, generator=0, output_type="np").images
    grid(images, SHEET[1], zoom=2).save(path, optimize=True)
    path.with_suffix(".txt").write_text("\n".join(prompts) + "\n")
    label(images[:12], prompts[:12]).save(path.with_name(f"{path.stem}-labelled.png"), optimize=True)


def label(images: Sequence[np.ndarray], prompts: Sequence[str], columns: int = 4, side: int = 192) -> PIL.Image.Image:
    """Lay images out in a grid with gutters, each above its prompt. Images are uint8 `[row, column, 3]`."""
    gutter, text = 16, 44
    font = PIL.ImageFont.load_default(size=13)
    rows = -(-len(images) // columns)
    size = (columns * (side + gutter) + gutter, rows * (side + text + gutter) + gutter)
    sheet = PIL.Image.new("RGB", size, "white")
    draw = PIL.ImageDraw.Draw(sheet)
    for number, (pixels, prompt) in enumerate(zip(images, prompts, strict=True)):
        x = gutter + number % columns * (side + gutter)
        y = gutter + number // columns * (side + text + gutter)
        sheet.paste(PIL.Image.fromarray(pixels).resize((side, side), PIL.Image.Resampling.BICUBIC), (x, y))
        draw.rectangle((x, y, x + side - 1, y + side - 1), outline="#cccccc")
        draw.multiline_text((x, y + side + 5), textwrap.fill(prompt, 31), fill="#333333", font=font, spacing=3)
    return sheet


def done(command: list[str]) -> None:
    code = run(command)
    if code:
        raise SystemExit(code)


def card(recipe: Recipe, totals: dict[str, Any], results: list[dict[str, Any]]) -> str:
    world = recipe.data.world
    return CARD.format(
        name=recipe.preset,
        commands=COMMANDS,
        nouns=len(world.noun_names),
        things=", ".join(world.noun_names),
        count=world.max_count,
        kinds=world.max_objects,
        size=world.size,
        styles=", ".join(world.styles or ("all",)),
        parameters=count_parameters(recipe.model).total,
        autoencoder=describe(recipe.preset).autoencoder.name,
        steps=totals["step"],
        images=totals["images"],
        flops=totals["flops"],
        minutes=totals["seconds"] / 60,
        measures="\n".join(
            f"    transfuse evaluate --model {recipe.preset} --suite {' '.join(suite)} --count {count}"
            for count, *suite in MEASURES
        ),
        rows="\n".join(map(row, results)),
    )


def row(result: dict[str, Any]) -> str:
    def said(value: float | None) -> str:
        return "" if value is None else f"{value:.3g}"

    interval = "" if result["low"] is None else f"{said(result['low'])} to {said(result['high'])}"
    cells = (f"{result['measure']}: {result['name']}", said(result["value"]), interval)
    return f"| {' | '.join(cells)} | {said(result['floor'])} | {said(result['ceiling'])} |"


if __name__ == "__main__":
    main()
