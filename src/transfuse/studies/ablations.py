"""Tables 4 to 8 of the paper at a size anyone can run: every row a preset with a few switches, at several seeds.

    ROWS["causal"].recipe("m")           # transfusion-32, in which patches of a picture see only earlier ones
    ROWS["causal"].words()               # the command that trains it alone: docs/rivals.md has them all
    COMPARISONS                          # which row against which, and what the paper found

Runs are queued as those of the scaling study (`queue.py`). Each row that draws gets the same number of positions, as
in the paper, half of them text: equal positions are equal steps and equal text, whatever a picture is made of. Text
alone takes the steps of the row `transfusion`. Differences are paired by seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from ..config import nearest
from ..errors import UserError
from ..presets import Recipe, preset
from ..presets.scales import UNET_CHANNELS, scaled
from ..version import __version__
from .arms import UNEQUAL, text_read
from .published import ABLATIONS
from .queue import Planned, Survey, plan_run
from .scaling import FIRST, check_grid
from .verdicts import combined, paired


@dataclass(frozen=True)
class Row:
    """A preset with other values of some of its settings, by their names with dots."""

    preset: str
    changes: Mapping[str, Any] = field(default_factory=dict)

    def recipe(self, size: str = "m") -> Recipe:
        return changed(scaled(preset(self.preset), size), self.changes)

    def words(self, name: str) -> list[str]:
        """Of the command that trains this row alone; name: the run's."""
        words = ["transfuse", "train", self.preset]
        words += ["--run", f"runs/{name}"] if self.changes else []
        for setting, value in self.changes.items():
            option = setting.replace("_", "-")
            if value is False:
                part, _, last = option.rpartition(".")
                words.append(f"--{part}.no-{last}")
            else:
                words += [f"--{option}", *map(str, value if isinstance(value, tuple) else (value,))]
        return words


def changed(recipe: Any, changes: Mapping[str, Any]) -> Any:
    """A (nested) dataclass with other values, all put in at once: `{"model.patch_size": 4}`."""
    own: dict[str, Any] = {}
    for name, value in changes.items():
        head, _, rest = name.partition(".")
        if head not in {one.name for one in fields(recipe)}:
            raise KeyError(name)
        if not rest:
            own[head] = value
            continue
        assert is_dataclass(getattr(recipe, head))
        own.setdefault(head, {})[rest] = value
    inner = {
        name: changed(getattr(recipe, name), value) if is_dataclass(getattr(recipe, name)) else value
        for name, value in own.items()
    }
    return replace(recipe, **inner)


def _unet(*channels: int) -> dict[str, Any]:
    return {"model.adapter": "unet", "model.unet_channels": channels or UNET_CHANNELS}


_OURS, _THEIRS = "transfusion-32", "chameleon-32"
_CAUSAL = {"model.image_attention": "causal"}

ROWS: dict[str, Row] = {
    "transfusion": Row(_OURS),
    "llama": Row("llama-32"),
    "llama-stable": Row("llama-32-stable"),
    "chameleon": Row(_THEIRS),
    "causal": Row(_OURS, _CAUSAL),
    "unet": Row(_OURS, _unet()),
    "causal-unet": Row(_OURS, {**_CAUSAL, **_unet()}),
    "patch1": Row(_OURS, {"model.patch_size": 1}),
    "patch4": Row(_OURS, {"model.patch_size": 4}),
    "patch8": Row(_OURS, {"model.patch_size": 8}),
    "patch4-unet": Row(_OURS, {"model.patch_size": 4, **_unet(48, 64, 128)}),
    "patch8-unet": Row(_OURS, {"model.patch_size": 8, **_unet(32, 48, 64, 128)}),
    "no-limit-unet": Row(_OURS, {"data.pairs.image_first_max_timestep": None, **_unet()}),
}
"""Tables 4 to 8"""

PIECES: dict[str, Row] = {
    "no-qk-norm": Row(_THEIRS, {"model.qk_norm": False}),
    "norm-order-pre": Row(_THEIRS, {"model.norm_order": "pre"}),
    "z-weight-0": Row(_THEIRS, {"objective.z_weight": 0}),
    "dropout-0.1": Row(_THEIRS, {"model.dropout": 0.1}),
    "eps-1e-8": Row(_THEIRS, {"optimizer.eps": 1e-8}),
}
"""Chameleon's stability set, piece by piece: the paper has no row for them, so they have no direction"""

MEASURES: dict[str, tuple[str, str]] = {
    "text": ("text_perplexity", "perplexity of unread definitions (C4)"),
    "captions": ("caption_cider", "CIDEr-D of captions (CIDEr)"),
    "distance": ("frechet", "Fréchet distance (FID)"),
    "likeness": ("both", "drawn as asked (CLIP)"),
}
"""what stands for the paper's measures, in brackets: key of a result, words"""


@dataclass(frozen=True)
class Comparison:
    """Rows with weights: `{"a": -1, "b": 1}` asks what b is above a, in the paper's table and here."""

    table: str
    asks: str
    weights: Mapping[str, float]

    def expected(self, measure: str) -> float | None:
        """The paper's difference; None where it has no such numbers."""
        rows = ABLATIONS.get(self.table, {})
        if not all(measure in rows.get(row, {}) for row in self.weights):
            return None
        return sum(weight * rows[row][measure] for row, weight in self.weights.items())

    @property
    def rounding(self) -> float:
        """The largest difference that printing to a tenth may make."""
        return 0.05 * sum(map(abs, self.weights.values()))


def _from(table: str, before: str, after: str, asks: str) -> Comparison:
    return Comparison(table, asks, {before: -1, after: 1})


COMPARISONS: tuple[Comparison, ...] = (
    _from("Table 4", "llama", "transfusion", "what diffusion beside it costs text"),
    _from("Table 4", "llama", "llama-stable", "what Chameleon's stability set costs text"),
    _from("Table 4", "llama-stable", "chameleon", "what learning pictures as tokens costs text"),
    _from("Table 4", "transfusion", "llama-stable", "the stability set alone against Transfusion"),
    _from("Table 5", "causal", "transfusion", "patches of a picture that see each other, linear"),
    _from("Table 5", "causal-unet", "unet", "patches of a picture that see each other, U-Net"),
    _from("Table 6", "patch1", "transfusion", "patches of 2 x 2 for 1 x 1, linear"),
    _from("Table 6", "transfusion", "patch4", "4 x 4 for 2 x 2, linear"),
    _from("Table 6", "patch4", "patch8", "8 x 8 for 4 x 4, linear"),
    _from("Table 6", "unet", "patch4-unet", "4 x 4 for 2 x 2, U-Net"),
    _from("Table 6", "patch4-unet", "patch8-unet", "8 x 8 for 4 x 4, U-Net"),
    Comparison(
        "Table 6",
        "how much more linear layers change from 2 x 2 to 8 x 8 than U-Net",
        {"transfusion": -1, "patch8": 1, "unet": 1, "patch8-unet": -1},
    ),
    _from("Table 7", "transfusion", "unet", "U-Net for linear patch layers"),
    _from("Table 8", "no-limit-unet", "unet", "a limit of the noise where the picture comes first"),
    *(_from("", "chameleon", name, f"Chameleon with {name}") for name in PIECES),
)


def plan_ablations(
    folder: Path, rows: Sequence[str], size: str, positions: float, seeds: Sequence[int]
) -> list[Planned]:
    """Rows at one size and budget, at every seed. Raises UserError for names that are not there."""
    check_grid(rows=rows, seeds=seeds, positions=(positions,))
    known = ROWS | PIECES
    for row in rows:
        if row not in known:
            raise UserError(f'--rows: unknown name "{row}"{nearest(row, known)}')
    survey, runs = Survey(folder), []
    settled = {row: known[row].recipe(size).settled() for row in {*rows, FIRST}}
    for row, seed in product(rows, seeds):
        name = f"{row}-seed{seed}"
        recipe = replace(settled[row], seed=seed, preset=f"{row}-{size}")
        payer = settled[FIRST] if recipe.model.images == "none" else recipe
        facts = {"arm": row, "size": size, "budget": positions, "seed": seed}
        runs.append(plan_run(name, recipe, positions, payer, survey, facts))
    return runs


def analyse(results: Sequence[dict[str, Any]], failures: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Every comparison whose rows are there, by measure: plain JSON, from the results alone.

    Raises UserError for results of several sizes or budgets: a difference would not be the rows' alone.
    """
    for fact in ("size", "budget"):
        if len(found := {result[fact] for result in results}) > 1:
            raise UserError(f"ablations: expected results of one {fact}, found {', '.join(map(str, sorted(found)))}")
    return {
        "study": "ablations",
        "version": __version__,
        "results": list(results),
        "failures": list(failures),
        "comparisons": list(_compared(results)),
    }


def _compared(results: Sequence[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    for comparison in COMPARISONS:
        for measure, (key, _) in MEASURES.items():
            values: dict[str, dict[int, float]] = {}
            for result in results:
                if key in result:
                    values.setdefault(result["arm"], {})[result["seed"]] = result[key]
            differences = combined(comparison.weights, values)
            if not differences:
                continue
            found, expected = paired(differences), comparison.expected(measure)
            read = [text_read(result) for result in results if result["arm"] in comparison.weights]
            if measure == "text" and max(read) > UNEQUAL * min(read):
                verdict = f"not comparable: one reads {max(read) / min(read):.2g} times the text"
            elif expected is None:
                verdict = "no direction"
            else:
                verdict = found.verdict(expected, comparison.rounding)
            yield {
                "table": comparison.table,
                "asks": comparison.asks,
                "weights": dict(comparison.weights),
                "measure": measure,
                "paper": expected,
                **asdict(found),
                "verdict": verdict,
            }
