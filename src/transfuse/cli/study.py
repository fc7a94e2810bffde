"""`transfuse study`: what the paper compares, run again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from .parsing import parse, print_json


@dataclass(frozen=True)
class Rivals:
    """Train Transfusion and Chameleon on equal data and compute, a Llama on their texts, and measure them alike.

    transfuse study rivals --flops 2e14
    """

    run: Path = Path("runs/rivals")
    """folder for the runs of all arms and the report; what is finished is not done again"""
    flops: float = 2e14
    """6 N D of each arm that draws"""
    presets: tuple[str, ...] = ("transfusion-32", "chameleon-32", "llama-32")
    """the arms, of one world and batch size; a text-only one takes the steps of the first"""
    only: str | None = None
    """train this arm alone, for instance beside another process that trains another"""
    pictures: int = 512
    """drawn, and as many captioned, by each arm"""
    json: bool = False
    """end with one line of JSON"""


def study(arguments: Sequence[str]) -> int:
    """Compare: `study rivals` trains and measures Transfusion beside Chameleon."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"{study.__doc__}\nstudies: rivals\nsettings: transfuse study rivals --help")
        return 0
    if not arguments or arguments[0] != "rivals":
        raise UserError(f"study: expected a study, found {arguments[0] if arguments else 'none'}; there is rivals")
    asked = parse(Rivals, arguments[1:], "study rivals")
    from ..studies.arms import Effort
    from ..studies.rivals import run_rivals, table

    code, report = run_rivals(asked.run, asked.flops, asked.presets, Effort(asked.pictures), asked.only)
    if report:
        print(table(report))
    if asked.json:
        print_json(report)
    return code
