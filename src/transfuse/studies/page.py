"""The frame of a report: one HTML file that needs nothing else, calm in light and dark, on wide screens and narrow."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import PIL.Image

STYLE = """
:root { color-scheme: light dark; --paper: #fbfaf7; --card: #ffffff; --ink: #22262b; --soft: #626a73; --line: #e6e2da;
  --accent: #17706a; --warm: #c2602f; --good: #17706a; --bad: #b3412e; --band: #17706a33; --track: #ece9e2; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181b; --card: #1c2024; --ink: #e7e5e0; --soft: #9aa2ab;
  --line: #2d3338; --accent: #5fc2b6; --warm: #e8965f; --good: #5fc2b6; --bad: #ef8a76; --band: #5fc2b640;
  --track: #2a3035; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 56px 24px 72px; }
h1, h2 { font-family: "Iowan Old Style", Palatino, "Palatino Linotype", Georgia, serif; font-weight: 600;
  line-height: 1.2; text-wrap: balance; }
h1 { font-size: clamp(30px, 5vw, 46px); margin: 0 0 12px; letter-spacing: -0.01em; }
h2 { font-size: 25px; margin: 60px 0 6px; }
h3 { font-size: 15px; margin: 0 0 8px; font-weight: 600; }
p { margin: 0 0 14px; max-width: 68ch; }
.lead { font-size: 19px; color: var(--soft); margin-bottom: 30px; }
.note { color: var(--soft); font-size: 15px; }
a { color: var(--accent); } :focus-visible { outline: 2px solid var(--accent); outline-offset: 3px; }
.grid { display: grid; gap: 14px; margin: 16px 0 0; padding: 0; list-style: none; }
.cards { grid-template-columns: repeat(auto-fill, minmax(236px, 1fr)); }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); }
.pictures { grid-template-columns: repeat(auto-fill, minmax(146px, 1fr)); }
.grid > li { display: grid; min-width: 0; }
.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 310px), 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 16px; margin: 0;
  min-width: 0; }
.number { font-size: 32px; line-height: 1.15; font-weight: 600; font-variant-numeric: tabular-nums;
  letter-spacing: -0.02em; }
.number small { font-size: 16px; font-weight: 500; color: var(--soft); letter-spacing: 0; }
.label { font-size: 14px; color: var(--soft); margin: 0 0 4px; }
.beside { font-size: 13px; color: var(--soft); margin: 6px 0 0; line-height: 1.45; font-variant-numeric: tabular-nums; }
img { image-rendering: pixelated; display: block; border-radius: 8px; background: var(--track); }
figure { margin: 0; } figure img { width: 100%; height: auto; }
figcaption { font-size: 13.5px; line-height: 1.4; margin-top: 9px; overflow-wrap: anywhere; }
.picture { padding: 11px; display: flex; flex-direction: column; }
.picture .marks { margin-top: auto; padding-top: 7px; }
.marks { font-size: 12px; line-height: 1.5; color: var(--soft); }
.yes::before, .no::before { display: inline-block; width: 1.15em; font-weight: 700; }
.yes::before { content: "\\2713"; color: var(--good); } .no::before { content: "\\2715"; color: var(--bad); }
.no { color: var(--bad); } .marks > span { display: block; }
.heard { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
.ramp { display: flex; align-items: center; gap: 8px; font-size: 12.5px; color: var(--soft); margin-top: 8px; }
.ramp i { flex: 1; height: 4px; border-radius: 2px; max-width: 160px;
  background: linear-gradient(in oklch to right, var(--accent), var(--warm)); }
.row { display: flex; gap: 14px; align-items: flex-start; }
.row img { width: 84px; height: 84px; flex: none; } .row div { min-width: 0; overflow-wrap: anywhere; }
.strip { display: grid; gap: 10px; grid-template-columns: repeat(auto-fill, minmax(82px, 1fr)); }
.strip figcaption { color: var(--soft); margin-top: 4px; font-size: 12.5px; text-align: center; }
.said { color: var(--accent); } .inline { width: 112px; height: 112px; margin: 10px 0 4px; }
.chart, .gauge { display: block; width: 100%; height: auto; } .gauge { height: 22px; margin-top: 6px; }
.rule { stroke: var(--line); stroke-width: 1; } .tick { fill: var(--soft); font-size: 12.5px; }
.curve { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.track { fill: var(--track); } .fill { fill: var(--accent); } .band { fill: var(--band); }
.chance { stroke: var(--bad); stroke-width: 2; stroke-dasharray: 3 2; }
.ceiling { stroke: var(--ink); stroke-width: 2; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 4px 12px; padding: 0; margin: 8px 0 0;
  font-size: 12.5px; color: var(--soft); }
.legend i { display: inline-block; width: 14px; height: 3px; border-radius: 2px; margin-right: 5px;
  vertical-align: middle; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: 14.5px; }
th, td { text-align: left; padding: 7px 14px 7px 0; border-bottom: 1px solid var(--line); vertical-align: top;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
th { font-weight: 500; color: var(--soft); width: 42%; }
.many th { width: auto; } .many thead th { min-width: 4em; } .many tbody th { min-width: 11em; }
.many td { min-width: 5.5em; overflow-wrap: normal; }
details { margin-top: 18px; } summary { cursor: pointer; color: var(--accent); padding: 4px 0; }
code, pre { font: 13.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px; overflow-x: auto; }
footer { margin-top: 64px; padding-top: 16px; border-top: 1px solid var(--line); color: var(--soft); font-size: 14px; }
@media (max-width: 560px) { main { padding: 32px 16px 48px; } h2 { margin-top: 44px; }
  .pictures { grid-template-columns: repeat(2, 1fr); } .strip { grid-template-columns: repeat(5, 1fr); gap: 6px; } }
@media print { .card { break-inside: avoid; } }
"""


def page(title: str, lead: str, sections: list[str], footer: str) -> str:
    """The whole document. Title and lead are plain text; sections and footer are HTML."""
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>",
            f'<h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>',
            *sections,
            f"<footer>{footer}</footer>\n</main>\n</body>\n</html>\n",
        ]
    )


def section(title: str, note: str, body: str) -> str:
    """A part of the page under a heading; title and note are plain text, body is HTML."""
    said = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{said}{body}\n</section>"


def image(pixels: np.ndarray, alt: str, name: str = "") -> str:
    """uint8 `[row, column, 3]` as an inline PNG; the browser enlarges it by whole pixels."""
    stream = io.BytesIO()
    PIL.Image.fromarray(pixels).save(stream, format="PNG", optimize=True)
    source = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
    kind = f' class="{name}"' if name else ""
    height, width = pixels.shape[:2]
    return f'<img{kind} src="{source}" width="{width}" height="{height}" alt="{escape(alt)}" loading="lazy">'


def table(rows: list[tuple[str, str]]) -> str:
    """Two columns of plain text: what it is, and what was found."""
    body = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in rows)
    return f'<div class="scroll"><table>{body}</table></div>'


def columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain text with a head; the first cell of a row is its name."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
        for name, *cells in rows
    )
    return f'<div class="scroll"><table class="many"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def folded(summary: str, body: str) -> str:
    """HTML behind a line to open; summary is plain text."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def failures(runs: Sequence[dict[str, Any]]) -> str:
    """A table of runs that came to nothing, and why; "" for none."""
    return columns(["failed", "why"], [[one["run"], one["why"]] for one in runs]) if runs else ""


def made_of_report(version: str, study: str) -> str:
    """The footer of a page that `transfuse study STUDY --report-only` makes anew."""
    return (
        f"Made by Transfuse {escape(version)}. Every number is in report.json; "
        f"transfuse study {study} --report-only makes this page of it anew."
    )


def card(title: str, number: str, beside: str) -> str:
    """A figure under its name: title and beside are plain text, number is HTML."""
    return (
        f'<div class="card"><p class="label">{escape(title)}</p><div class="number">{number}</div>'
        f'<p class="beside">{escape(beside)}</p></div>'
    )


def grid(kind: str, items: list[str]) -> str:
    return f'<ul class="grid {kind}">' + "".join(f"<li>{item}</li>" for item in items) + "</ul>"
