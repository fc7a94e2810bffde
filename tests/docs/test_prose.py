"""The rules of prose: docstrings are whole sentences, and the words of `tools/prose.py` stay out."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = [  # what has been rewritten so far
    *("tools/house.py", "tools/try_install.py", "src/transfuse/hub_files.py", "src/transfuse/remote_code"),
    *(f"tests/unit/test_{name}.py" for name in ("scene_fingerprints", "world", "open_set", "report")),
    *(
        f"src/transfuse/{room}"
        for room in (
            "autoencoders",
            "cli",
            "convert",
            "diffusion",
            "evaluation",
            "inference",
            "model",
            "sequence",
            "training",
        )
    ),
    # metrics.py has the title of a table in `results.json`, which keeps its words.
    *(str(path.relative_to(ROOT)) for path in (ROOT / "src/emoji_scenes").glob("*.py") if path.stem != "metrics"),
    *(f"src/transfuse/{name}.py" for name in ("config", "devices", "export", "folders", "images", "io", "log", "rng")),
    *(f"src/transfuse/{room}" for room in ("data", "recipes", "runs", "serving")),
    "tests/serving",
    *(f"src/transfuse/{name}.py" for name in ("plan", "train", "train_autoencoder")),
    *(f"src/transfuse/{name}.py" for name in ("charts", "demo", "evaluate", "report", "tune")),
    *(f"src/transfuse/inspect_{name}.py" for name in ("data", "autoencoder")),
    "experiments",
    "tests/distributed",
    "tests/golden",
    *(f"tests/e2e/test_{name}.py" for name in ("cli", "kill", "lock", "stops")),
    *(f"tests/parity/test_{name}.py" for name in ("chameleon_parity", "clip", "fidelity", "llama", "words")),
    "tests/evaluating.py",
    *(
        f"tests/unit/test_{name}.py"
        for name in (
            *("command_line", "paper", "presets", "renamed", "run", "settings"),
            *("training", "arms", "cluster_plan", "memory_plan", "configuration", "export_pieces", "guard", "trackers"),
            *("interchange", "parallel", "profiling", "stability", "start", "unseen_noise", "token_loss"),
            *("captioning", "distances", "evaluate", "features", "harness", "kept_results", "reconstruction"),
            *(
                "build",
                "bundled",
                "corrupt",
                "data",
                "dataset_page",
                "disk",
                "packing",
                "prefetch",
                "readers",
                "remote",
            ),
            *("remote_sources", "sources_by_content", "stored"),
        )
    ),
]

spec = importlib.util.spec_from_file_location("prose", ROOT / "tools" / "prose.py")
prose = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prose)


@pytest.mark.parametrize("room", ROOMS)
def test_prose_follows_the_rules(room: str) -> None:
    path = ROOT / room
    offences = [
        line for file in ([path] if path.is_file() else sorted(path.rglob("*.py"))) for line in prose.offences(file)
    ]
    assert not offences


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ('"""Of a model what it costs."""', "fragment"),
        ('"""the model."""', "fragment"),
        ('"""Whether it fits."""', "fragment"),
        ('"""Return ' + "a word and " * 12 + 'the end."""', "words, at most 25"),
        ("x = 1  # the file lies there", "`lies`"),
        ('raise ValueError("this can not be")', "`can not`"),
        ("def f(asked): pass", "`asked`"),
        ("for one in (): pass", "`one`"),
    ],
)
def test_an_offence_is_found(tmp_path, source: str, wrong: str) -> None:
    (tmp_path / "a.py").write_text(source)
    assert any(wrong in line for line in prose.offences(tmp_path / "a.py"))


def test_plain_prose_passes(tmp_path) -> None:
    (tmp_path / "a.py").write_text(
        '"""The model, `[batch, position]`."""\n\n\ndef f(x):\n    """Return x; it cannot fail."""\n'
    )
    assert not list(prose.offences(tmp_path / "a.py"))
