"""`transfuse evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

from ..devices import Device
from ..errors import UserError
from .options import Flat, Json, print_json
from .writing import default_model


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of an evaluation."""

    model: Path | None = None
    """export folder, or a bundled model's name; not given: the newest under runs/ that draws, else the bundled one"""
    suite: tuple[str, ...] = ()
    """quick, pairs, paper, or names of measures; not given: quick, and with --data what fits the set"""
    data: str = ""
    """a data set, whose held-out images and captions (or texts) are used in place of the bundled world"""
    out: Path = Path("evaluation")
    """folder for what is made, results.json and report.html"""
    count: int = 120
    """pictures, captions, edits and questions of each measure"""
    seed: int = 0
    """of the drawings"""
    sampler: str | None = None
    """ddpm, ddim or dpmpp; the model's own if not given, as are the next two"""
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    """noise levels at which drawings are guided, as shares: 0 0.8; elsewhere only the prompt counts"""
    candidates: int = 1
    """images per prompt; the one that the model would most probably caption with the prompt is kept"""
    sweep: str | None = None
    """draw with each of several values, as guidance_scale=1,1.5,3"""
    batch_size: int = 24
    """drawn, captioned and read together"""
    device: Device = "auto"
    world: str | None = None
    """a preset, whose scenes are shown; those the model was trained on if not given"""
    features: str = "recogniser"
    """network for the Fréchet distance: recogniser, imagenet-mobilenet, or a file of weights; FID's own make it FID"""
    captions: Path | None = None
    """captions_val2014.json, or Karpathy's dataset_coco.json, in place of the bundled world"""
    images: Path | None = None
    """folder of their pictures"""
    ids: Path | None = None
    """which of them: an id a line, or a published table with image_id and text; by a rule if not given"""
    ptb_jar: str = ""
    """cut captions by Java: stanford-corenlp-3.4.1.jar, or the pycocoevalcap that contains it; not given: no Java"""
    texts: tuple[Path, ...] = ()
    """files of text (.txt, .jsonl) to score, in place of held-out definitions"""
    stride: int | None = None
    """tokens by which a window over long text moves; none: blocks"""
    clip: Path | None = None
    """weights for open_clip"""
    clip_model: str = "ViT-L-14"
    geneval: Path | None = None
    """evaluation_metadata.jsonl of GenEval: draw its prompts for its own scorer"""
    tasks: tuple[str, ...] = ()
    """of lm-evaluation-harness; the seven of the paper if not given"""
    tasks_folder: Path | None = None
    """folder with files of such tasks"""
    judge_steps: int | None = None
    """steps that the judges of drawings are trained for"""
    card: bool = False
    """write the numbers into the model's card, its README.md: a table, and the metadata that the Hub shows"""


def evaluate(*, args: Annotated[EvaluateOptions, Flat], json: Json = False) -> int:
    """Measure a model: text, captions, drawings; every number with its interval, and a page that shows what it saw.

    $ transfuse evaluate --model runs/demo/export --suite quick --out evaluation

    On your own pairs, of which the page shows the image next to its caption and to a drawing of it:

    $ transfuse evaluate --model runs/photos/export --data photos

    Finished work is kept: the same command resumes where it stopped. docs/evaluation.md says what each number is. Files
    are local, nothing is fetched.
    """
    for name in ("batch_size", "candidates"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: expected at least 1, found {getattr(args, name)}")
    from ..evaluate import run_evaluation
    from ..evaluation import Drawing, EvalConfig
    from ..folders import bundled_name, find_export
    from ..model_card import add_results, read_card

    options = EvalConfig(**{field.name: getattr(args, field.name) for field in fields(EvalConfig)})
    model = args.model or default_model()
    readme = find_export(model) / "README.md"
    if args.card and bundled_name(model):
        raise UserError(f"--card: expected an export of yours, found the bundled model {model}")
    if args.card:
        read_card(readme)
    report = run_evaluation(
        model,
        args.suite,
        args.out,
        options,
        Drawing(**{field.name: getattr(args, field.name) for field in fields(Drawing)}),
        sweep=args.sweep,
        world=args.world,
        batch=args.batch_size,
        device=args.device,
    )
    if args.card:
        folder = readme.parent
        add_results(readme, folder.parent.name if folder.name == "export" else folder.name, report["results"])
    if json:
        print_json({"report": str(args.out / "report.html"), **report})
    return 0
