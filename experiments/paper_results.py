"""The paper's printed results (Transfusion, arXiv 2408.11039, Tables 3 to 8).

Table 3's Transfusion-7B drew its images with guidance 5; Table 7's images, like those of the four smaller sizes, were
drawn with guidance 3, so the fits of image measures use Table 7. The paper prints no other number of Figure 5.
"""

from __future__ import annotations

from .statistics import Better, Bounds, Parity, Point, parity

SIZES: dict[str, float] = {
    "0.16b": 162_423_552,
    "0.37b": 373_867_520,
    "0.76b": 777_856_512,
    "1.4b": 1_364_297_728,
    "7b": 6_738_415_616,
}
"""parameters without patch layers, of Table 2's shapes"""
TOKENS = 0.5e12

MEASURES: dict[str, tuple[Better, Bounds]] = {
    "C4": ("lower", Bounds()),
    "Wikipedia": ("lower", Bounds()),
    "Llama suite": ("higher", Bounds()),
    "CIDEr": ("higher", Bounds(least=4)),
    "FID": ("lower", Bounds(most=100)),
    "CLIP": ("higher", Bounds(least=17)),
}
"""the better direction, and the bounds of footnote 16: the paper leaves out points of weak small models"""

Row = tuple[float, ...]

LINEAR: dict[str, Row] = {
    "0.16b": (14.8, 8.8, 44.2, 6.2, 37.6, 20.0),
    "0.37b": (12.0, 7.0, 47.9, 11.1, 21.5, 22.4),
    "0.76b": (10.4, 6.0, 51.7, 16.0, 20.3, 24.0),
    "1.4b": (9.5, 5.4, 53.8, 19.1, 19.4, 24.3),
    "7b": (7.72, 4.28, 61.5, 27.2, 18.6, 25.9),
}
"""Table 7; text and captions of the largest from Table 3, which prints one more digit"""
UNET: dict[str, Row] = {
    "0.16b": (14.4, 8.5, 45.7, 15.3, 18.8, 23.9),
    "0.37b": (11.8, 6.9, 48.8, 21.1, 18.1, 24.9),
    "0.76b": (10.3, 5.9, 51.9, 25.4, 16.7, 25.4),
    "1.4b": (9.4, 5.4, 53.4, 28.1, 16.6, 25.7),
    "7b": (7.8, 4.3, 61.1, 33.7, 16.0, 26.5),
}
"""Table 7"""
CHAMELEON_7B: Row = (8.41, 4.69, 59.1, 18.0, 29.6, 24.3)
"""Table 3"""
PRINTED: Row = (0.489, 0.526, 0.600, 0.218, 0.029, 0.319)
"""Table 3: parity FLOP ratios"""
REFITTED: Row = (0.491, 0.506, 0.598, 0.234, 0.023, 0.249)
"""the ratios of the printed points by the paper's procedure; those of images differ, as Figure 5 has other points"""


def flops(size: str) -> float:
    """Return 6 N D of a size."""
    return 6 * SIZES[size] * TOKENS


def points(table: dict[str, Row], measure: str) -> list[Point]:
    """Return the points of a table that count by footnote 16."""
    column = list(MEASURES).index(measure)
    return MEASURES[measure][1].split([Point(flops(size), row[column], size) for size, row in table.items()])[0]


def paper_parity(measure: str) -> Parity:
    """Return the parity FLOP ratio of the printed points: linear Transfusion to Chameleon-7B."""
    chameleon = [Point(flops("7b"), CHAMELEON_7B[list(MEASURES).index(measure)], "7b")]
    return parity(points(LINEAR, measure), chameleon, MEASURES[measure][0])


def as_json() -> dict[str, dict[str, float | None]]:
    """Return by measure the ratio fitted to the printed points with its interval, and the printed ratio."""
    ratios = {}
    for measure, printed in zip(MEASURES, PRINTED, strict=True):
        ratio = paper_parity(measure)
        ratios[measure] = {"fitted": ratio.ratio, "low": ratio.low, "high": ratio.high, "printed": printed}
    return ratios


def table() -> str:
    """Return the same as a Markdown table."""
    lines = ["| | parity FLOP ratio, fitted to the printed points | 95 % | as printed |", "| --- |" + " ---: |" * 3]
    for measure, row in as_json().items():
        low, high = row["low"], row["high"]
        interval = "none" if low is None or high is None else f"{low:.2g} to {high:.2g}"
        lines.append(f"| {measure} | {row['fitted']:.3f} | {interval} | {row['printed']} |")
    return "\n".join(lines) + "\n"


ABLATIONS: dict[str, dict[str, dict[str, float]]] = {
    "Table 4": {
        "llama": {"text": 10.1},
        "transfusion": {"text": 10.4},
        "llama-stable": {"text": 11.0},
        "chameleon": {"text": 11.8},
    },
    "Table 5": {
        "causal": {"text": 10.4, "captions": 12.7, "distance": 61.3, "likeness": 23.0},
        "transfusion": {"text": 10.4, "captions": 16.0, "distance": 20.3, "likeness": 24.0},
        "causal-unet": {"text": 10.3, "captions": 23.3, "distance": 16.8, "likeness": 25.3},
        "unet": {"text": 10.3, "captions": 25.4, "distance": 16.7, "likeness": 25.4},
    },
    "Table 6": {
        "patch1": {"text": 10.3, "captions": 12.0, "distance": 21.0, "likeness": 24.0},
        "transfusion": {"text": 10.4, "captions": 16.0, "distance": 20.3, "likeness": 24.0},
        "patch4": {"text": 10.9, "captions": 14.3, "distance": 25.6, "likeness": 22.6},
        "patch8": {"text": 11.7, "captions": 11.3, "distance": 43.5, "likeness": 18.9},
        "unet": {"text": 10.3, "captions": 25.4, "distance": 16.7, "likeness": 25.4},
        "patch4-unet": {"text": 10.7, "captions": 29.9, "distance": 16.0, "likeness": 25.7},
        "patch8-unet": {"text": 11.4, "captions": 29.5, "distance": 16.1, "likeness": 25.2},
    },
    "Table 7": {
        "transfusion": {"text": 10.4, "captions": 16.0, "distance": 20.3, "likeness": 24.0},
        "unet": {"text": 10.3, "captions": 25.4, "distance": 16.7, "likeness": 25.4},
    },
    "Table 8": {
        "no-limit-unet": {"text": 10.3, "captions": 25.4, "distance": 16.7, "likeness": 25.4},
        "unet": {"text": 10.3, "captions": 29.4, "distance": 16.5, "likeness": 25.4},
    },
}
"""Rows at 0.76 billion parameters, by the names of `ablations.ROWS`: perplexity of C4, CIDEr, FID, CLIP score. Our rows
have the noise cap of Table 8 unless their name says otherwise; in the paper the rows of Tables 5 to 7 have none."""
