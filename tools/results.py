"""Check the cards of committed results against their files and the pages that quote them, and write the pages of cards.

    python tools/results.py            # writes docs/results.md, docs/leaderboard.md, the tables of docs/benchmarks.md
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
    board                          optional: the table of docs/leaderboard.md with it as a row, one of `BOARDS`
    log, seeds                     of an entry of the race: the log's path from the repository's root, and three numbers
    rows                           optional: rows of the machine's table in docs/benchmarks.md, whose numbers are read
                                   from docs/results/benchmarks/NAME.json
    name                           what is measured; its last word is the unit, of which `LOWER` are better if small
    at                             keys of the JSON as above, below which are ours, peer, ratio, their range, the aim
    ours, peer, limit, ratio       or the keys of each, times `scale`; a missing ratio is calculated. A list counts by
                                   its median, a text by its first number. No keys at all: "not measured"
    of                             the name of the peer, or of the limit
"""

from __future__ import annotations

import html
import json
import re
import statistics
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CARDS = ROOT / "docs" / "results"
PAGE = ROOT / "docs" / "results.md"
BENCHMARKS = ROOT / "docs" / "benchmarks.md"
MARKS = "<!-- tables: python tools/results.py -->\n", "<!-- end of tables -->\n"
LOWER = ("s", "ms", "GB")
FIELDS = ("title", "page", "command", "commit", "machine", "seconds", "measured", "checked", "figures")
HEAD = """# Results, a card each

Every committed result has a card in `docs/results/`: the command, the commit that holds it, the machine, the seconds of
the run, the figures, and the days on which it was measured and last checked. Checked means that all figures were
compared with the result's file and with the pages that quote them; a test does that. `python tools/results.py` writes
this page.

| result and command | figures | machine | seconds | commit | measured | checked |
| --- | --- | --- | ---: | --- | --- | --- |
"""


LEADERBOARD = ROOT / "docs" / "leaderboard.md"
BOARDS = {"race-cpu": "The race on two cores", "race-gpu": "The race on one GPU", "models": "Models that were measured"}
"""names of the leaderboard's tables, and their headings"""
RULES = """# Leaderboard

How fast can one model learn to draw and to read a small world? Anyone may enter. Every row is a [card](results.md)
whose figures a test compares with the result's file; `python tools/results.py` writes this page.

## The race
Train one model from nothing until it meets all three aims. The score is the seconds of training; fewer is better.

| aim | on held-out combinations | at least |
| --- | --- | ---: |
| one thing drawn | right, corrected for the judge's errors | 95 % |
| two things drawn | both right, corrected likewise | 75 % |
| captions | nouns right | 95 % |

**Data.** The world of the preset `small-64`: scenes of 24 nouns in one style at 64 pixels, with one or two kinds of
things and up to three copies. Its split is fixed: training never shows a held-out combination. No other images and
captions, and no pretrained weights of the network. The bundled autoencoders are allowed; training against the
judges is not.

**Classes.** CPU: two cores. GPU: one device. The seconds are those of the training steps in the run's log, from the
first step to the first measurement that meets all aims at once. Measuring does not count. How often a run is measured
(`--every`) is part of the entry.

**Seeds.** Three runs with different seeds, all committed; the median counts. A run that misses an aim counts as the
slowest.

**Judges.** Each drawing is judged twice, and each judge must find the aims met, so that nobody tunes a model to one.

| | one thing | two things |
| --- | --- | --- |
| first judge | the [strict judge](evaluation.md#the-strict-judge) names it | the detector of `composition` sees both |
| second judge | sees that thing and no other | sees both |

The second judge is a detector of another architecture, trained from another seed on other scenes. Both detectors are
trained on the machine that runs the race, and kept with its runs.

Shares of drawings are corrected for the judge's errors on real images and on those of other prompts, as in
[`composition`](evaluation.md#the-metrics). Without that 95 % could not be reached: of 240 real images of one thing the
strict judge names 90 % (100 % of large things, 93 % of medium ones, 63 % of small ones).

## How to enter
1. Write the recipe as a settings file for a preset with the race's world, and run the race. The same command resumes.

   ```sh
   transfuse study race --config my-recipe.toml --seeds 0 1 2 --run runs/race    # --every 600: each ten minutes
   ```

   `docs/launch/studies/race-cpu.sh` and `race-gpu.sh` run this project's own recipes.
2. Commit the recipe, the three logs (`runs/race/seed*/metrics.jsonl`) and `runs/race/report.json`, which has all scores
   with their intervals, and the judges' shares on real images and on those of other prompts.
3. Write a card in `docs/results/`, as described in `tools/results.py`, with `board = "race-cpu"` or `"race-gpu"`,
   the log and the seeds. Then run `python tools/results.py`.
4. Open a pull request. It is merged once the command was repeated on another machine of the class.

The command trains recipes of this project alone. Models of other code are not ranked yet.
"""


def read_cards(folder: Path = CARDS) -> dict[str, dict[str, Any]]:
    """Return all cards by name."""
    return {path.stem: tomllib.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.toml"))}


def differences(name: str, card: dict[str, Any], root: Path = ROOT) -> Iterator[str]:
    """Yield what is wrong with a card: a missing field, a figure that its file or a page has otherwise."""
    yield from (f"{name}: {field}: expected in a card, found none" for field in FIELDS if field not in card)
    if (board := card.get("board", "models")) not in BOARDS:
        yield f"{name}: board: expected one of {', '.join(BOARDS)}, found {board!r}"
    if board.startswith("race-"):
        if len(card.get("seeds", [])) != 3 or isinstance(card["seconds"], str):
            yield f"{name}: expected the seconds and the three seeds of an entry of the race, found others"
        if not (root / card.get("log", "none")).is_file():
            yield f"{name}: log: expected a file of the repository, found {card.get('log')!r}"
    for row in card.get("rows", []):
        yield from (f"{name}: {row['name']}: {value}" for value in cells(name, row, root) if "nothing under" in value)
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


def leaderboard(cards: dict[str, dict[str, Any]]) -> str:
    """Return docs/leaderboard.md: rules, and a row for each card that is on a board, the fastest first."""
    parts = [RULES]
    for board, heading in BOARDS.items():
        entries = {name: card for name, card in cards.items() if card.get("board") == board}
        head = "| entry and command | figures | seconds | seeds | machine | commit | measured |"
        parts += [f"\n## {heading}\n", f"{head}\n| --- | --- | ---: | --- | --- | --- | --- |\n"]
        if not entries:
            parts.append("| no entry yet |  |  |  |  |  |  |\n")
        known = [name for name, card in entries.items() if not isinstance(card["seconds"], str)]
        others = [name for name in entries if name not in known]
        for name in [*sorted(known, key=lambda name: entries[name]["seconds"]), *others]:
            card = entries[name]
            log = f", [log](../{card['log']})" if "log" in card else ""
            figures = "<br>".join(f"{figure['name']}: **{figure['shown']}**" for figure in card["figures"])
            entry = f"[{card['title']}]({card['page']}), [card](results/{name}.toml){log}<br>`{card['command']}`"
            seeds = ", ".join(map(str, card.get("seeds", ["not recorded"])))
            facts = [figures, card["seconds"], seeds, card["machine"], card["commit"], card["measured"]]
            parts.append(f"| {entry} | {' | '.join(map(str, facts))} |\n")
    parts.append("\nThe models of the last table did not race: they had other aims, and some know other worlds.\n")
    return "".join(parts)


def cells(name: str, row: dict[str, Any], root: Path = ROOT) -> tuple[str, str, str, str]:
    """Return ours, the best peer, the limit and the ratio of a row of a table, as the page writes them."""
    keys = {key: row[key] for key in ("ours", "peer", "limit", "ratio") if key in row}
    if not keys and "at" not in row:
        return "not measured", "", "", ""
    stored = json.loads(_text(root / "docs" / "results" / "benchmarks" / f"{name}.json"))
    below: Any = at(stored, row["at"].split(" / ")) if "at" in row else {}
    if isinstance(below, str):
        return below, "", "", ""
    stored_values = {
        key: value for key, value in below.items() if key in ("ours", "peer", "ratio") and value is not None
    }
    stored_values |= {key: at(stored, path.split(" / ")) for key, path in keys.items()}
    missing = next(
        (value for value in stored_values.values() if isinstance(value, str) and "nothing under" in value), None
    )
    if missing is not None:
        return missing, "", "", ""
    rounds = stored_values.get("ratio") if isinstance(stored_values.get("ratio"), list) else below.get("ratios") or []
    if "ratio" in keys and not rounds:
        parent = at(stored, keys["ratio"].split(" / ")[:-1])
        rounds = [parent[end] for end in ("least", "most") if isinstance(parent, dict) and end in parent]
    values = {
        key: _number(value) * (1 if key == "ratio" else row.get("scale", 1)) for key, value in stored_values.items()
    }
    if "limit" not in values and "peer" not in values and {"ours", "ratio"} <= values.keys() and "at" not in row:
        values["limit"] = values["ours"] / values["ratio"]
    other = values.get("limit", values.get("peer"))
    if "ratio" not in values and other is not None:
        lower = re.split(r"[ ,]+", row["name"])[-1] in LOWER
        values["ratio"] = other / values["ours"] if lower else values["ours"] / other
    ratio = ""
    if "ratio" in values:
        ratio = f"**{short(values['ratio'], 'limit' in values)}**"
        ratio += f" ({short(min(rounds))} to {short(max(rounds))})" if rounds and "limit" not in values else ""
        aim = below.get("target")
        if aim is not None and values["ratio"] < aim and not below.get("at_most"):
            ratio += f", aim {short(aim, 'limit' in values)} missed"
    ours, peer, limit = (short(values[key]) if key in values else "" for key in ("ours", "peer", "limit"))
    if "of" in row:
        peer, limit = (peer, f"{limit} {row['of']}".strip()) if "limit" in values else (f"{peer} {row['of']}", limit)
    return ours, peer.strip(), limit, ratio


def _number(value: Any) -> float:
    """Return a number, the median of a list, or the first number of a text."""
    if isinstance(value, list):
        return float(statistics.median(value))
    return float(re.findall(r"\d[\d.]*", value)[0] if isinstance(value, str) else value)


def short(value: float, share: bool = False) -> str:
    """Return a number with three digits, or all of a larger one; a share with two digits as a percentage."""
    if share:
        return f"{float(f'{100 * value:.2g}'):g} %"
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def tables(cards: dict[str, dict[str, Any]]) -> str:
    """Return the tables of docs/benchmarks.md: one for each machine, a row for each that its cards name."""
    machines: dict[str, list[str]] = {}
    for name, card in cards.items():
        command = re.sub(r"python benchmarks/| --(out|json) FILE", "", card["command"])
        command = command if len(command) < 64 else command.split()[0]
        for row in card.get("rows", []):
            measured = cells(name, row)
            source = "" if measured[0] == "not measured" else f"[{name}](results/benchmarks/{name}.json)"
            run = f"`{row.get('command', command)}`"
            line = f"| {row['name']} | {' | '.join(measured)} | {run} | {source} |\n"
            machines.setdefault(card["machine"], []).append(line)
    head = "| measured | ours | best peer | limit | ratio | command | JSON |\n"
    head += "| --- | ---: | ---: | ---: | ---: | --- | --- |\n"
    longest_first = sorted(machines.items(), key=lambda machine: -len(machine[1]))
    return "".join(f"\n## {name[0].upper()}{name[1:]}\n{head}{''.join(rows)}" for name, rows in longest_first) + "\n"


def with_tables(text: str, cards: dict[str, dict[str, Any]]) -> str:
    """Return docs/benchmarks.md with its tables written from the cards."""
    before, rest = text.split(MARKS[0])
    return before + MARKS[0] + tables(cards) + MARKS[1] + rest.split(MARKS[1])[1]


def main() -> int:
    cards = read_cards()
    lines = [line for name, card in cards.items() for line in differences(name, card)]
    print("\n".join(lines), end="\n" if lines else "")
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page(cards), encoding="utf-8")
        LEADERBOARD.write_text(leaderboard(cards), encoding="utf-8")
        BENCHMARKS.write_text(with_tables(_text(BENCHMARKS), cards), encoding="utf-8")
    return int(bool(lines))


if __name__ == "__main__":
    raise SystemExit(main())
