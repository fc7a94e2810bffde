"""`transfuse study`: what the paper compares, run again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ..config import nearest
from ..errors import UserError
from .parsing import parse, print_json
from .writing import default_model

if TYPE_CHECKING:
    from ..studies.queue import Planned


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


@dataclass(frozen=True)
class Queued:
    """What studies of many runs in a shared folder have in common."""

    only: tuple[str, ...] = ()
    """do these runs alone: names or patterns, as "chameleon-*"; one that failed is tried again"""
    index: int | None = None
    """do this run alone, by its number in --list; for arrays of jobs"""
    list_runs: Annotated[bool, tyro.conf.arg(name="list")] = False
    """show every run with its state and its planned 6 N D, and do nothing"""
    report_only: bool = False
    """train and measure nothing: make the report of what is there"""
    pictures: int = 512
    """drawn, and as many captioned, by each run"""
    definitions: int | None = None
    """held-out definitions to foretell; all if not given"""
    recogniser_steps: int | None = None
    """steps that the judge of drawings is trained for; its own default if not given"""
    json: bool = False
    """end with one line of JSON"""


@dataclass(frozen=True)
class Scaling(Queued):
    """Train arms of several sizes on several budgets, fit lines in logarithms, and say what parity costs (Figure 5).

    transfuse study scaling --sizes xs s m l --budgets 1e6 2e6 4e6

    Any number of processes and machines may give this command for one folder: each takes the next run that nobody has.
    A killed run goes on from its checkpoint.
    """

    run: Path = Path("runs/scaling")
    """folder for all runs, results and the report, shared by all processes"""
    arms: tuple[str, ...] = ("transfusion", "transfusion-unet", "chameleon", "llama")
    sizes: tuple[str, ...] = ("xs", "s", "m", "l")
    """of the trunk: xxs, xs, s, m, l, xl, xxl have 0.4 to 90 million parameters"""
    budgets: tuple[float, ...] = (1e6, 2e6, 4e6)
    """positions D of each arm that draws"""
    seeds: tuple[int, ...] = (0,)
    paper: bool = False
    """fit the points that the paper printed instead, and hold the ratios against those it printed"""


@dataclass(frozen=True)
class Ablations(Queued):
    """Train the rows of the paper's Tables 4 to 8 at several seeds, and hold each difference against the paper's.

    transfuse study ablations --size s --positions 2e6 --seeds 0 1 2

    Any number of processes may give this command for one folder, as with `study scaling`.
    """

    run: Path = Path("runs/ablations")
    """folder for all runs, results and the report, shared by all processes"""
    rows: tuple[str, ...] = ()
    """names of rows; those of Tables 4 to 8 if not given (docs/study.md lists them)"""
    size: str = "m"
    """of the trunk: xxs, xs, s, m, l, xl, xxl"""
    positions: float = 2e6
    """D of each row that draws"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """differences are paired by them; one alone gives no interval"""


@dataclass(frozen=True)
class ImageEditing:
    """Fine-tune a trained model on 8,000 edits, and measure what it obeys before and after (section 4.4).

    transfuse study image-editing --start small-64
    """

    run: Path = Path("runs/image-editing")
    """folder for the run, what is drawn, and the report; what is done is not done again"""
    start: Path | None = None
    """export, or a bundled model's name; not given: the newest under runs/ that draws, else the bundled one"""
    triples: int = 8000
    """different edits"""
    epochs: float = 4.0
    """times that each is seen"""
    batch: int = 32
    """edits a step"""
    rate: float = 5e-4
    """largest learning rate"""
    seed: int = 0
    world: str | None = None
    """preset whose scenes are edited; those that the export says it knows if not given"""
    count: int = 240
    """edits that are measured"""
    measures: tuple[str, ...] = ()
    """of `transfuse evaluate`, taken before and after beside editing: what is forgotten"""
    judge_steps: int | None = None
    """steps that the judges of drawings are trained for"""
    report_only: bool = False
    """make the page anew of the report that is there"""
    json: bool = False
    """end with one line of JSON"""


def study(arguments: Sequence[str]) -> int:
    """Compare: rivals at one size, scaling over many, the paper's ablations, editing before and after.

    transfuse study scaling --sizes xs s m l --budgets 1e6 2e6 4e6
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"  {name:<14} {(kind.__doc__ or '').splitlines()[0]}" for name, (kind, _) in STUDIES.items()]
        print("\n".join([study.__doc__ or "", "", *lines, "", "settings: transfuse study NAME --help"]))
        return 0
    name, *rest = arguments
    if name not in STUDIES:
        raise UserError(f'study: unknown name "{name}"{nearest(name, STUDIES)}')
    kind, do = STUDIES[name]
    asked = parse(kind, rest, f"study {name}")
    code, report = do(asked)
    if asked.json and not code:
        print_json(report)
    return code


def _rivals(asked: Rivals) -> tuple[int, dict[str, Any]]:
    from ..studies.arms import Effort
    from ..studies.rivals import run_rivals, table

    code, report = run_rivals(asked.run, asked.flops, asked.presets, Effort(asked.pictures), asked.only)
    if report:
        print(table(report))
    return code, report


def _queued(
    asked: Any,
    plan: Callable[[], list[Planned]],
    analyse: Callable[..., dict[str, Any]],
    page: Callable[[dict[str, Any], Path], str],
    shared: dict[str, Any],
    figures: Callable[[dict[str, Any]], dict[str, str]] = lambda report: {},
) -> tuple[int, dict[str, Any]]:
    """List, work or report, as asked. shared: to what the folder keeps, beside how much is measured."""
    from ..studies.arms import Effort
    from ..studies.queue import Queue, write_report

    if asked.report_only:
        return 0, write_report(asked.run, analyse, page, figures)
    if asked.only and asked.index is not None:
        raise UserError("--index: expected it without --only, found both")
    effort = Effort(asked.pictures, asked.definitions, asked.recogniser_steps)
    queue = Queue(asked.run, plan(), effort, shared)
    if asked.list_runs:
        print(queue.listing())
        return 0, {}
    code = queue.work(queue.chosen(asked.only, asked.index), again=bool(asked.only) or asked.index is not None)
    if code or not queue.any_done():
        return code, {}
    return code, write_report(asked.run, analyse, page, figures)


def _scaling(asked: Scaling) -> tuple[int, dict[str, Any]]:
    from ..studies import published
    from ..studies.scaling import analyse, plan_scaling
    from ..studies.scaling_page import scaling_figures, scaling_page, summary

    if asked.paper:
        print(published.table())
        return 0, published.as_json()

    def plan() -> list[Planned]:
        return plan_scaling(asked.run, asked.arms, asked.sizes, asked.budgets, asked.seeds)

    code, report = _queued(asked, plan, analyse, scaling_page, {"study": "scaling"}, scaling_figures)
    if report:
        print(summary(report))
    return code, report


def _ablations(asked: Ablations) -> tuple[int, dict[str, Any]]:
    from ..studies.ablations import ROWS, analyse, plan_ablations
    from ..studies.ablations_page import ablations_page, summary

    def plan() -> list[Planned]:
        return plan_ablations(asked.run, asked.rows or tuple(ROWS), asked.size, asked.positions, asked.seeds)

    shared = {"study": "ablations", "size": asked.size, "positions": asked.positions}
    code, report = _queued(asked, plan, analyse, ablations_page, shared)
    if report:
        print(summary(report))
    return code, report


def _image_editing(asked: ImageEditing) -> tuple[int, dict[str, Any]]:
    from ..evaluation import EvalConfig
    from ..studies.image_editing import Tuning, run_image_editing, show_image_editing, summary

    if asked.report_only:
        code, report = 0, show_image_editing(asked.run)
    else:
        tuning = Tuning(asked.triples, asked.epochs, asked.batch, asked.rate, asked.seed)
        options = EvalConfig(count=asked.count, judge_steps=asked.judge_steps)
        start = asked.start or default_model()
        code, report = run_image_editing(asked.run, start, tuning, options, asked.measures, asked.world)
    if report:
        print(summary(report))
    return code, report


STUDIES: dict[str, tuple[type, Callable[[Any], tuple[int, dict[str, Any]]]]] = {
    "rivals": (Rivals, _rivals),
    "scaling": (Scaling, _scaling),
    "ablations": (Ablations, _ablations),
    "image-editing": (ImageEditing, _image_editing),
}
"""by name: settings, and what does it"""
