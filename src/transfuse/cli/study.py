"""`transfuse study`: run an experiment of the repository's `experiments/` folder."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from ..config import nearest
from ..errors import UserError
from .parsing import print_json

STUDIES: dict[str, str] = {
    "scaling": "train variants of several sizes on several budgets and fit power laws (Figure 5)",
    "ablations": "train the rows of Tables 4 to 8 and compare each difference with the paper's",
    "editing": "fine-tune a model on edits and measure it before and after (section 4.4)",
    "baselines": "train Transfusion, Chameleon and Llama on equal compute and measure them alike",
}
"""module of `experiments`, and what it does"""
RENAMED = {"rivals": "baselines", "image-editing": "editing"}


def study(arguments: Sequence[str]) -> int:
    """Run the paper's experiments: scaling, ablations, editing, baselines; from a checkout of the repository.

    transfuse study scaling --sizes xs s m l --budgets 1e6 2e6 4e6
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"  {name:<12} {about}" for name, about in STUDIES.items()]
        print("\n".join([study.__doc__ or "", "", *lines, "", "options: transfuse study NAME --help"]))
        return 0
    name, *rest = arguments
    if name in RENAMED:
        raise UserError(f"study: {name} is now called {RENAMED[name]}")
    if name not in STUDIES:
        raise UserError(f'study: unknown name "{name}"{nearest(name, STUDIES)}')
    root = checkout()
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    code, report = importlib.import_module(f"experiments.{name}").main(rest)
    if "--json" in rest and not code:
        print_json(report)
    return int(code)


def checkout() -> Path:
    """Return the repository's root, that of this package or the working folder. Raises UserError outside one."""
    for root in (Path(__file__).parents[3], Path.cwd()):
        if (root / "experiments" / "scaling.py").is_file():
            return root
    raise UserError("study: the experiments are not in the package; clone the repository and run the command there")
