"""Check the cards of committed results against their files and the pages that quote them, and write docs/results.md.

    python tools/results.py            # writes the page
    python tools/results.py --check    # prints each difference; code 1 if there is any

A card is `docs/results/NAME.toml`:

    title, page                    its name, and the page that explains it
    command, commit, machine       what was run, the commit that holds the result, and where it ran
    seconds                        of the run, or "not recorded", as for any other field
    measured, checked              days: of the run, and of the last time that all figures were compared with their file
    [[figures]]
    name, value, shown             the number, and how pages write it: "4.1", "31.0 dB", "17 %"
    at                             "FILE: key / key / 0", under docs/; the key of a list is a number, or values that an
                                   item has, joined by " & ". Without keys the file is a page, which must contain
                                   `text`, whose last word is the number
    quoted                         ["PAGE: text with `shown` in it"], paths from the repository's root
"""

from __future__ import annotations

import html
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CARDS = ROOT / "docs" / "results"
PAGE = ROOT / "docs" / "results.md"
FIELDS = ("title", "page", "command", "commit", "machine", "seconds", "measured", "checked", "figures")
HEAD = """# Results, a card each

Every committed result has a card in `docs/results/`: the command, the commit that holds it, the machine, the seconds of
the run, the figures, and the days on which it was measured and last checked. Checked means that all figures were
compared with the result's file and with the pages that quote them; a test does that. `python tools/results.py` writes
this page.

| result and command | figures | machine | seconds | commit | measured | checked |
| --- | --- | --- | ---: | --- | --- | --- |
"""


def read_cards(folder: Path = CARDS) -> dict[str, dict[str, Any]]:
    """Return all cards by name."""
    return {path.stem: tomllib.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.toml"))}


def differences(name: str, card: dict[str, Any], root: Path = ROOT) -> Iterator[str]:
    """Yield what is wrong with a card: a missing field, a figure that its file or a page has otherwise."""
    yield from (f"{name}: {field}: expected in a card, found none" for field in FIELDS if field not in card)
    for figure in card.get("figures", []):
        where = f"{name}: {figure['name']}"
        if not rounds_to(figure["value"], figure["shown"]):
            yield f"{where}: expected {figure['value']} as it rounds, found {figure['shown']!r}"
        file, _, keys = figure["at"].partition(": ")
        if keys:
            stored = at(json.loads(_text(root / "docs" / file)), keys.split(" / "))
            if stored != figure["value"]:
                yield f"{where}: expected {figure['value']}, found {stored} in {figure['at']}"
        elif figure["text"] not in words(root / "docs" / file):
            yield f"{where}: expected {figure['text']!r} in {file}, found none"
        elif float(figure["text"].split()[-1]) not in (figure["value"], round(100 * figure["value"], 6)):
            yield f"{where}: expected {figure['value']} at the end of its text, found {figure['text']!r}"
        for quote in figure.get("quoted", []):
            page, _, text = quote.partition(": ")
            if figure["shown"].replace(" %", "%") not in text.replace(" %", "%"):
                yield f"{where}: expected {figure['shown']!r} in its quotation, found {text!r}"
            if " ".join(text.split()) not in " ".join(_text(root / page).split()):
                yield f"{where}: expected {text!r} in {page}, found other words"


def rounds_to(value: float, shown: str) -> bool:
    """Return True if `shown` is the value, rounded to the digits that it has; a percentage is of 1."""
    number = re.match(r"-?[\d,]*\.?\d+", shown)
    if number is None:
        return False
    digits = number[0].replace(",", "")
    scale = 100 if "%" in shown else 1
    decimals = len(digits.partition(".")[2])
    return abs(value * scale - float(digits)) <= 0.5001 * 10**-decimals


def at(values: Any, keys: list[str]) -> Any:
    """Return what stands under the keys of a JSON file, or a line that says which is missing."""
    for key in keys:
        if isinstance(values, list):
            wanted = key.split(" & ")
            items = [item for item in values if isinstance(item, dict) and {*wanted} <= {*map(str, item.values())}]
            values = values[int(key)] if key.isdecimal() and int(key) < len(values) else items[0] if items else None
        else:
            values = values.get(key) if isinstance(values, dict) else None
        if values is None:
            return f"nothing under {key!r}"
    return values


@cache
def words(path: Path) -> str:
    """Return the words of an HTML page, or of a text, with single spaces."""
    text = _text(path)
    if path.suffix == ".html":
        text = re.sub(r"<(style|script|svg)\b.*?</\1>", " ", text, flags=re.DOTALL)
        text = html.unescape(re.sub(r"<[^>]+>", " ", text))
    return " ".join(text.replace("\u202f", " ").split())


@cache
def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def page(cards: dict[str, dict[str, Any]]) -> str:
    """Return docs/results.md: a row for each card."""
    rows = []
    for name, card in cards.items():
        figures = "<br>".join(f"{figure['name']}: **{figure['shown']}**" for figure in card["figures"])
        result = f"[{card['title']}]({card['page']}), [card](results/{name}.toml)<br>`{card['command']}`"
        facts = [str(card[field]) for field in ("machine", "seconds", "commit", "measured", "checked")]
        rows.append(f"| {result} | {figures} | {' | '.join(facts)} |\n")
    return HEAD + "".join(rows)


def main() -> int:
    cards = read_cards()
    lines = [line for name, card in cards.items() for line in differences(name, card)]
    print("\n".join(lines), end="\n" if lines else "")
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page(cards), encoding="utf-8")
    return int(bool(lines))


if __name__ == "__main__":
    raise SystemExit(main())
