"""Count the code: lines, files and functions of each package, and the files that one piece of work crosses.

python tools/house.py                     lines, files and the median length of functions, by package
python tools/house.py trace generate      the files that drawing one image crosses
python tools/house.py trace train         the files that one training step crosses
"""

import ast
import atexit
import inspect
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"


def count() -> None:
    """Print lines, files and the median length of functions, by package."""
    packages: dict[str, list[Path]] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).parts
        packages.setdefault("/".join(parts[:2]) if len(parts) > 2 else parts[0], []).append(path)
    for package, paths in [*packages.items(), ("in all", sorted(SOURCE.rglob("*.py")))]:
        lengths = [length for path in paths for length in lengths_of_functions(path)]
        lines = sum(path.read_text(encoding="utf-8").count("\n") for path in paths)
        median = statistics.median(lengths) if lengths else 0
        print(f"{package:28} {lines:6} lines {len(paths):4} files   median function {median:g} lines")


def lengths_of_functions(path: Path) -> list[int]:
    """Return the number of lines of each function and method in a file."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [
        (node.end_lineno or node.lineno) - node.lineno + 1
        for node in nodes
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def trace(work: str) -> None:
    """Print the project's files whose functions run while one image is drawn or one step is trained."""
    files: set[str] = set()

    def note(frame, event, _argument) -> None:  # type: ignore[no-untyped-def]
        file = frame.f_code.co_filename
        called = event == "call" and frame.f_code.co_name != "<module>"  # else it is an import
        if called and file.startswith(str(SOURCE)) and not is_property(frame):
            files.add(file)

    run = {"generate": drawing, "train": training}[work]()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    for file in sorted(files):
        print(Path(file).relative_to(SOURCE))
    print(f"{len(files)} files", file=sys.stderr)


def is_property(frame) -> bool:  # type: ignore[no-untyped-def]
    """Return True for a property, which a reader meets as a value: reading `config.head_dim` crosses no file."""
    names = frame.f_code.co_qualname.split(".")
    owner = frame.f_globals.get(names[0])
    return len(names) == 2 and isinstance(inspect.getattr_static(owner, names[1], None), property)


def drawing():  # type: ignore[no-untyped-def]
    """Return a function that draws one image with the bundled model, which has drawn before."""
    import transfuse

    pipe = transfuse.load("small-64")
    pipe("a crab", num_inference_steps=2)
    return lambda: pipe("a crab on a blue background", num_inference_steps=2)


def training():  # type: ignore[no-untyped-def]
    """Return a function that runs one step of the preset "tiny", whose first steps were run before."""
    from transfuse.recipes import preset
    from transfuse.runs import open_run
    from transfuse.train import build_trainer
    from transfuse.training.metrics import Average

    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    trainer = build_trainer(open_run(preset("tiny"), folder), folder)
    for _ in range(2):
        trainer.train_step(Average())
    return lambda: trainer.train_step(Average())


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            count()
        case ["trace", ("generate" | "train") as work]:
            trace(work)
        case _:
            raise SystemExit(__doc__)
