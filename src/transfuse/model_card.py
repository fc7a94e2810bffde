"""Model cards: the README.md of an export. Its metadata, YAML between lines of ---, is what the Hub reads.

    write_card({"library_name": "transfuse"}, "# A model")          # the text of a card
    add_results(Path("my-model/README.md"), "my-model", results)    # numbers of `transfuse evaluate`

Measured numbers become the Hub's `model-index` and a table in the section "Measured". A number that is measured again
on the same data replaces the earlier one; others stay, because an export's card is new whenever its weights are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from .errors import UserError
from .io import atomic_write

TASKS = {
    "captioning": "image-to-text",
    "editing": "image-to-image",
    "autoencoder": "image-to-image",
    **dict.fromkeys(("text", "choice", "harness"), "text-generation"),
}
"""the Hub's task of a metric; others are about drawings"""
SECTION = re.compile(r"^## Measured\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)


def write_card(metadata: dict[str, Any], text: str) -> str:
    """Return a card."""
    block = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=1000, default_flow_style=None)
    return f"---\n{block}---\n{text}"


def read_card(path: Path) -> tuple[dict[str, Any], str]:
    """Return a card's metadata and text; none for a missing file. Raises UserError for metadata that is not YAML."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    match = re.match(r"---\n(.*?\n)?---\n", text, re.DOTALL)
    if match is None:
        return {}, text
    try:
        metadata = yaml.safe_load(match[1] or "") or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path}: expected metadata in YAML, found {' '.join(str(error).split()):.160}") from None
    if not isinstance(metadata, dict):
        raise UserError(f"{path}: expected metadata by name, found {metadata!r:.80}")
    return metadata, text[match.end() :]


def add_results(path: Path, name: str, results: Sequence[dict[str, Any]]) -> None:
    """Add results, as `results.json` has them, to a card. Raises UserError for a card that cannot be read.

    name: the model's. Results that are not finite, and speeds, which belong to a machine, are left out.
    """
    metadata, text = read_card(path)
    metadata["model-index"] = index = model_index(name, results, metadata.get("model-index") or ())
    rows = "".join(_row(entry, metric) for entry in index[0]["results"] for metric in entry["metrics"])
    section = f"## Measured\n| measure | value | 95 % | data |\n| --- | ---: | ---: | --- |\n{rows}"
    text = SECTION.sub("", text).rstrip() + f"\n\n{section}"
    atomic_write(path, lambda partial: partial.write_text(write_card(metadata, text), encoding="utf-8"))


def model_index(
    name: str, results: Sequence[dict[str, Any]], earlier: Sequence[dict[str, Any]] = ()
) -> list[dict[str, Any]]:
    """Return the Hub's `model-index` of a model: earlier results, and the given ones in place of the same numbers."""
    flat = [
        (entry["task"], entry["dataset"], metric)
        for model in earlier
        for entry in model["results"]
        for metric in entry["metrics"]
    ]
    flat += [_entry(result) for result in results if result["measure"] != "speed" and math.isfinite(result["value"])]
    latest = {_key(*entry): entry for entry in flat}
    groups: dict[str, dict[str, Any]] = {}
    for task, dataset, metric in latest.values():
        group = groups.setdefault(repr((task, dataset)), {"task": task, "dataset": dataset, "metrics": []})
        group["metrics"].append(metric)
    return [{"name": name, "results": [*groups.values()]}]


def _entry(result: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return the task, data set and metric of one result, with all that its number depends on."""
    names = ("low", "high", "count", "implementation", "drawing")
    metric = {
        "type": result["measure"],
        "name": result["name"],
        "value": result["value"],
        "args": {name: result[name] for name in names if result.get(name) is not None},
    }
    dataset = {"type": re.split(r"[,\s]", result["data"], maxsplit=1)[0] or "unnamed", "name": result["data"]}
    return {"type": TASKS.get(result["measure"], "text-to-image")}, dataset, metric


def _key(task: dict[str, Any], dataset: dict[str, Any], metric: dict[str, Any]) -> str:
    """Return what tells a number from another one: metric, data, and how images were drawn."""
    drawing = (metric.get("args") or {}).get("drawing")
    return repr((task, dataset, metric["type"], metric.get("name"), drawing))


def _row(entry: dict[str, Any], metric: dict[str, Any]) -> str:
    args = metric.get("args") or {}
    interval = f"{args['low']:.3g} to {args['high']:.3g}" if {"low", "high"} <= args.keys() else ""
    name = f"{metric['type']}: {metric.get('name', '')}"
    return f"| {name} | {metric['value']:.3g} | {interval} | {entry['dataset']['name']} |\n"
