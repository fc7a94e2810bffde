"""The commands as a user gives them: each in a folder, with real files."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file

from transfuse.autoencoders import load_autoencoder
from transfuse.cli import run
from transfuse.cli.chat import inline
from transfuse.images import read_settings

pytestmark = pytest.mark.xdist_group("cli")  # its fixtures are made once

COMMAND = [sys.executable, "-c", "from transfuse.cli import main; main()"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TINY = ("--model", "runs/tiny/export")
"""the run of `home`, which is never a default"""


@dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


def transfuse(folder: Path, *arguments: str) -> Result:
    """The command in this process: the same entry as a user's, without starting Python again each time."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = run(arguments)
        except SystemExit as stop:  # --help
            code = int(stop.code or 0)
    return Result(code, out.getvalue(), err.getvalue())


def transfuse_process(folder: Path, *arguments: str, **options) -> Result:
    """Run the command as a process."""
    reply = subprocess.run(
        [*COMMAND, *arguments], cwd=folder, capture_output=True, text=True, env=ENVIRONMENT, timeout=300, **options
    )
    return Result(reply.returncode, reply.stdout, reply.stderr)


def refused(folder: Path, *arguments: str, call=transfuse, **options) -> str:
    """The one line a mistake gets; exit code 2, no traceback, nothing on standard output."""
    result = call(folder, *arguments, **options)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("transfuse: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return lines[0]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with one trained tiny run."""
    folder = tmp_path_factory.mktemp("home")
    result = transfuse(folder, "train", "tiny", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["step"] == 30
    assert (folder / report["export"] / "model.safetensors").is_file()
    return folder


def test_generate(home: Path) -> None:
    for draw, kind in (("force", "image"), ("never", "text"), ("auto", None)):
        result = transfuse(home, "generate", "a crab", "--draw", draw, "--seed", "3", "--steps", "2",
                           "--guidance-scale", "1.5", "--out", "pictures", *TINY, "--json")  # fmt: skip
        assert result.returncode == 0, result.stderr
        reply = json.loads(result.stdout.splitlines()[-1])
        assert reply["seed"] == 3
        assert reply["steps"] == 2
        if kind:
            assert reply["parts"][0]["type"] == kind
        for part in reply["parts"]:
            if part["type"] == "image":
                assert PIL.Image.open(home / part["path"]).size == (32, 32)
    again = transfuse(home, "generate", "a crab", "--draw", "force", "--seed", "3", "--steps", "2", "--guidance-scale",
                      "1.5", "--out", "again", *TINY, "--json")  # fmt: skip
    path = json.loads(again.stdout)["parts"][0]["path"]
    assert (home / path).read_bytes() == (home / "pictures" / Path(path).name).read_bytes(), "one seed, one picture"


def test_generate_the_best_of_several(home: Path) -> None:
    request = ("generate", "a crab", "--draw", "force", "--max-tokens", "0", "--steps", "2", "--json", *TINY)
    kept = json.loads(transfuse(home, *request, "--seed", "3", "--candidates", "3", "--out", "of-three").stdout)
    assert kept["seed"] in (3, 1_000_006, 2_000_009)
    alone = json.loads(transfuse(home, *request, "--seed", str(kept["seed"]), "--out", "alone").stdout)
    pictures = [(home / reply["parts"][0]["path"]).read_bytes() for reply in (kept, alone)]
    assert pictures[0] == pictures[1]
    assert "candidates: expected a whole number of at least 1, found 0" in refused(
        home, "generate", "a crab", "--candidates", "0", *TINY
    )


def test_edit(home: Path) -> None:
    """By instruction, from part of the way, and where a mask selects; the PNG says how."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(home / "before.png")
    mask = np.zeros((32, 32), dtype=np.uint8)
    mask[8:24, 8:24] = 255
    PIL.Image.fromarray(mask).save(home / "mask.png")
    common = ("edit", "before.png", "make it red", "--steps", "3", "--seed", "2", "--json", *TINY)

    def edited(*options: str) -> tuple[dict, np.ndarray]:
        result = transfuse(home, *common, "--out", "edits" + "".join(options).replace("/", ""), *options)
        assert result.returncode == 0, result.stderr
        told = json.loads(result.stdout.splitlines()[-1])
        assert read_settings(home / told["path"]).items() <= told.items()
        return told, np.asarray(PIL.Image.open(home / told["path"]))

    told, by_words = edited()
    assert {"prompt": "make it red", "seed": 2, "steps": 3, "images_in_prompt": 1}.items() <= told.items()
    assert len(told["model"]) == 16
    assert by_words.shape == (32, 32, 3)
    assert (edited("--strength", "0")[1] == pixels).all()
    told, masked = edited("--mask", "mask.png")
    assert told["masked"]
    assert (masked[mask == 0] == pixels[mask == 0]).all()
    assert (masked[mask == 255] != pixels[mask == 255]).any()
    for name, colours in (("kept", pixels), ("cleared", pixels * (mask == 0)[..., None]), ("black", pixels * 0)):
        PIL.Image.fromarray(np.dstack([colours, 255 - mask])).save(home / f"{name}.png")
        assert (edited("--mask", f"{name}.png")[1] == masked).all(), "alpha decides, colours do not"
    PIL.Image.new("L", (32, 32)).save(home / "black.png")
    assert "black.png: expected a transparent area to redraw" in refused(home, *common, "--mask", "black.png")
    PIL.Image.fromarray(mask).resize((16, 16)).save(home / "small.png")
    for options in ((), ("--resize",)):
        told = refused(home, *common, "--mask", "small.png", *options)
        assert "small.png: expected 32x32 pixels, as the image, found 16x16" in told
    assert "strength: expected a share from 0 to 1, found 2.0" in refused(home, *common, "--strength", "2")
    assert "expected an image file, found none" in refused(home, *common, "--mask", "nothing.png")
    assert "expected some text, found an empty one" in refused(home, "edit", "before.png", " ")
    PIL.Image.new("RGB", (50, 40)).save(home / "large.png")
    assert "large.png: expected 32x32 pixels, found 50x40" in refused(home, "edit", "large.png", "x", *TINY)


def test_every_picture_says_how_it_was_made(home: Path) -> None:
    result = transfuse(home, "generate", "a crab", "--draw", "force", "--steps", "2", "--seed", "5", "--out", "said",
                       *TINY)  # fmt: skip
    assert result.returncode == 0, result.stderr
    reply = read_settings(home / "said" / "seed-5-0.png")
    assert {"prompt": "a crab", "seed": 5, "steps": 2, "sampler": "ddim"}.items() <= reply.items()


def test_chat(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words and paths on standard output, each mistake a line on standard error, after which it continues."""
    PIL.Image.new("RGB", (32, 32), "red").save(home / "shown.png")
    typed = ["/save", "a crab", "", "/image shown.png", "what is it", "/save copy.png", "/seed x", "/seed 9"]
    typed += ["/nothing", "/image none.png", "crab " * 400, "/help", "/new", "a boat", "/quit", "never read"]
    command = ["chat", "--model", "runs/tiny/export", "--out", "talk"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(typed)))
    result = transfuse(home, *command, "--draw", "force")
    assert result.returncode == 0, result.stderr
    errors = result.stderr.splitlines()
    assert len(errors) == 5, result.stderr
    for line, told in zip(
        errors,
        (
            "/save: expected a picture to save, found none drawn yet",
            "/seed: expected a number, found x",
            "expected one of the commands that /help lists, found /nothing",
            "none.png: expected an image file, found none",
            "prompt: expected at most 256 positions",
        ),
        strict=True,
    ):
        assert told in line
    pictures = [line for line in result.stdout.splitlines() if line.endswith(".png")]
    assert pictures == ["talk/chat-0.png", "talk/chat-1.png", "copy.png", "talk/chat-2.png"]
    settings = [read_settings(home / name) for name in pictures]
    assert [each["seed"] for each in settings] == [0, 1, 1, 9]
    assert settings[1]["images_in_prompt"] == 2, "the one it drew, and the one it was shown"
    assert settings[3]["prompt"] == "a boat", "all else is forgotten"
    assert "/quit" in result.stdout
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert transfuse(home, *command, "--draw", "never").returncode == 0, "the end of the input is the end"


def test_pictures_on_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kitty and iTerm2 get the picture itself, other terminals a path."""
    picture = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    for name in ("TERM_PROGRAM", "KITTY_WINDOW_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert inline(picture) is None
    monkeypatch.setenv("TERM", "xterm-kitty")
    chunks = re.findall("\033_G(.*?);(.*?)\033\\\\", inline(picture) or "")
    assert [keys for keys, _ in chunks] == ["a=T,f=100,m=1", *["m=1"] * (len(chunks) - 2), "m=0"]
    assert all(len(data) <= 4096 for _, data in chunks)
    sent = PIL.Image.open(io.BytesIO(base64.b64decode("".join(data for _, data in chunks))))
    assert (np.asarray(sent)[4::8, 4::8] == np.asarray(picture)).all()
    monkeypatch.setenv("TERM_PROGRAM", "iTerm.app")
    size, data = re.fullmatch("\033]1337;File=inline=1;size=(.*):(.*)\a", inline(picture) or "").groups()
    assert int(size) == len(base64.b64decode(data))


def test_caption(home: Path) -> None:
    pixels = np.full((32, 32, 3), 200, dtype=np.uint8)
    for name in ("a.png", "a.jpg", "a.webp"):
        PIL.Image.fromarray(pixels).save(home / name)
        result = transfuse(home, "caption", name, "--json", *TINY)
        assert result.returncode == 0, result.stderr
        assert isinstance(json.loads(result.stdout)["caption"], str)
    PIL.Image.fromarray(pixels).resize((50, 40)).convert("RGBA").save(home / "big.png")
    assert transfuse(home, "caption", "big.png", "--resize", *TINY).returncode == 0


def test_bad_images(home: Path) -> None:
    PIL.Image.new("RGB", (50, 40)).save(home / "big.png")
    PIL.Image.new("RGBA", (32, 32)).save(home / "alpha.png")
    PIL.Image.new("L", (32, 32)).save(home / "gray.png")
    (home / "text.png").write_text("not an image")
    (home / "empty.png").write_bytes(b"")
    whole = (home / "alpha.png").read_bytes()
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(home / "cut.png")
    (home / "cut.png").write_bytes((home / "cut.png").read_bytes()[:700])
    PIL.Image.new("RGB", (32, 32)).save(home / "gif.gif")
    assert whole
    PIL.Image.new("F", (32, 32)).save(home / "float.tiff")
    for name, message in {
        "big.png": "expected 32x32 pixels, found 50x40",
        "float.tiff": "floating point",
        "text.png": "TIFF, PPM or ICO image, found something else",
        "empty.png": "expected a PNG",
        "cut.png": "expected a PNG",
        "none.png": "expected an image file, found none",
        ".": "expected an image file, found a folder",
    }.items():
        line = refused(home, "caption", name, *TINY)
        assert name in line
        assert message in line
    for name in ("alpha.png", "gray.png", "gif.gif"):  # converted, as people expect
        assert transfuse(home, "caption", name, *TINY).returncode == 0


@pytest.mark.long
def test_autoencoder(home: Path) -> None:
    """Train both kinds, encode a folder, look at the reconstructions, train a Transfusion on latents and draw."""
    pictures = home / "photographs"
    pictures.mkdir()
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 50, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(pictures / f"{number}.jpg")
        (pictures / f"{number}.txt").write_text(f"photograph {number}")
    (pictures / "broken.png").write_bytes(b"no picture")
    for kind in ("kl", "vq"):
        result = transfuse(home, "autoencoder", "train", f"{kind}-tiny", "--run", kind, "--loop.steps", "4", "--json")
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout.splitlines()[-1])["images"] == 16
        assert "perceptual term: off" in result.stderr
        again = transfuse(home, "export", kind, "--out", f"{kind}-again")
        assert again.returncode == 0, again.stderr
        weights = [load_autoencoder(home / place) for place in (f"{kind}-again", f"{kind}/export")]
        assert weights[0].fingerprint == weights[1].fingerprint
        result = transfuse(home, "data", "build", "photographs", f"{kind}-data", "--autoencoder", f"{kind}/export",
                           "--size", "32", "--vocabulary", "300", "--json")  # fmt: skip
        assert result.returncode == 0, result.stderr
        reply = json.loads(result.stdout.splitlines()[-1])
        assert (reply["pictures"], reply["faulty"]) == (5, 1)
        assert "broken.png" in (home / f"{kind}-data" / "quarantine.jsonl").read_text()
        result = transfuse(home, "autoencoder", "inspect", f"{kind}/export", "photographs", "--size", "32",
                           "--out", f"{kind}-report", "--json")  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout.splitlines()[-1])["images"] == 5
        assert (home / f"{kind}-report" / "index.html").stat().st_size > 10_000
        assert "left out: photographs/broken.png" in result.stderr
        result = transfuse(home, "train", "tiny", "--run", f"{kind}-model", "--data.autoencoder", f"{kind}/export",
                           "--model.patch-size", "2", "--diffusion.clip-x0", "None", "--loop.steps", "2")  # fmt: skip
        assert result.returncode == 0, result.stderr
        drawn = transfuse(home, "generate", "a crab", "--draw", "force", "--steps", "2", "--out", f"{kind}-drawn",
                          "--model", f"{kind}-model/export")  # fmt: skip
        assert drawn.returncode == 0, drawn.stderr


def test_autoencoder_mistakes(home: Path) -> None:
    def error_of(*arguments: str) -> str:
        return refused(home, "autoencoder", *arguments)

    assert 'unknown command "autoencoder trian"; did you mean "train"' in error_of("trian")
    assert "expected a preset, found none" in error_of("train")
    assert 'did you mean "kl-tiny"' in error_of("train", "kl-tinny")
    assert "data.world.size: expected a multiple of the autoencoder's factor (8)" in error_of(
        "train", "kl-f8-small", "--data.world.size", "60"
    )
    assert 'unknown command "autoencoder encode"; transfuse --help lists' in error_of("encode", "pixels", ".", "out")
    assert "--count: expected at least 1, found 0" in error_of("inspect", "pixels", "world", "--count", "0")
    assert "nowhere" in error_of("inspect", "pixels", "nowhere")
    assert "expected" in error_of("train", "kl-tiny", "--run", "elsewhere", "--objective.perceptual", "no-such-file")


def test_mistakes(home: Path, tmp_path: Path) -> None:
    assert 'preset: unknown name "tinny"; did you mean "tiny"' in refused(home, "train", "tinny")
    assert 'unknown command "trian"; did you mean "train"' in refused(home, "trian")
    assert '"--loop.stepz"; did you mean "--loop.steps"' in refused(home, "train", "tiny", "--loop.stepz", "3")
    assert "model.d_model: expected a multiple of 2 x n_heads" in refused(
        home, "train", "tiny", "--model.d-model", "63"
    )
    assert "--loop.steps" in refused(home, "train", "tiny", "--loop.steps", "many")
    assert "loop.steps: this run has 30" in refused(home, "train", "tiny", "--loop.steps", "31")
    assert "expected some text, found an empty one" in refused(home, "generate", "  ")
    assert "prompt: expected at most 256 positions" in refused(home, "generate", "crab " * 400, *TINY)
    assert "steps: expected at" in refused(home, "generate", "a crab", "--steps", "0")
    assert "expected a JSON file, found none" in refused(home, "generate", "a crab", "--model", "nowhere")
    assert "generate: prompt: expected some text" in refused(
        tmp_path, "generate", ""
    )  # a model is there without any run
    assert "expected a run folder, found nothing" in refused(home, "export", "nowhere")
    (home / "file").write_text("")
    assert "expected a folder to write to" in refused(
        home, "generate", "a", "--draw", "force", "--out", "file/x", *TINY
    )
    assert "expected a folder to write to" in refused(home, "train", "tiny", "--run", "file/x")


def test_run_without_a_complete_checkpoint(home: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "broken"
    run.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json"):
        (run / name).write_bytes((home / "runs" / "tiny" / name).read_bytes())
    assert "expected a complete checkpoint, found none" in refused(tmp_path, "export", "runs/broken")
    (run / "checkpoints" / "step-00000005").mkdir(parents=True)
    assert "expected a complete checkpoint, found none" in refused(tmp_path, "export", "runs/broken")
    config = json.loads((run / "config.json").read_text())
    config["model"]["n_layrs"] = 3
    (run / "config.json").write_text(json.dumps(config))
    assert 'unknown setting "model.n_layrs"; did you mean "n_layers"' in refused(tmp_path, "export", "runs/broken")


def test_export_command_equals_the_training_export(home: Path) -> None:
    result = transfuse(home, "export", "runs/tiny", "--out", "mine", "--json")
    assert result.returncode == 0, result.stderr
    ours, other = (load_file(home / f / "model.safetensors") for f in ("mine", "runs/tiny/export"))
    assert ours.keys() == other.keys()
    assert all((ours[name] == other[name]).all() for name in ours)


@pytest.mark.long
def test_full_disk_is_one_line_and_loses_nothing(home: Path, tmp_path: Path) -> None:
    """Every file is limited to 100 kB, so that the weights cannot be written."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    line = refused(tmp_path, "train", "tiny", call=transfuse_process, preexec_fn=limit)
    assert "checkpoint not written" in line
    assert not list((tmp_path / "runs" / "tiny" / "checkpoints").iterdir())
    line = refused(home, "export", "runs/tiny", "--out", "limited", call=transfuse_process, preexec_fn=limit)
    assert "export not written" in line
    assert not list(home.glob("limited*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.long
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path: Path, number: int) -> None:
    command = ["train", "tiny", "--loop.steps", "300", "--loop.checkpoint-every", "1000"]
    process = subprocess.Popen([*COMMAND, *command], cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "runs" / "tiny" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "the same command resumes it" in errors
    resumed = transfuse(tmp_path, *command, "--json")
    assert "resumed from step" in resumed.stderr
    assert json.loads(resumed.stdout)["step"] == 300
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == sorted(set(steps))


def test_plan_and_doctor(tmp_path: Path, monkeypatch) -> None:
    reply = json.loads(transfuse(tmp_path, "plan", "0.37b", "--json").stdout)
    assert reply["parameters"] == pytest.approx(373.9e6, rel=0.005)
    assert reply["train_flops_per_token"] == 6 * reply["total_parameters"]
    assert "parameters" in transfuse(tmp_path, "plan", "demo").stdout
    reply = json.loads(transfuse(tmp_path, "doctor", "--json").stdout)
    assert reply["problems"] == []
    assert "gloo" in reply["processes_speak_by"]
    assert {"tensorboard", "wandb", "trackio", "torchao"} <= reply["optional"].keys()
    names = ["NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: names[number])
    cards = json.loads(transfuse(tmp_path, "doctor", "--json").stdout)["cards"]
    assert cards == [f"{names[0]} (989.4 TFLOPS in bfloat16)", f"{names[1]} (peak not known: no mfu)"]
    for name in ("train", "demo", "generate", "caption", "edit", "chat", "plan", "export", "doctor"):
        help_text = transfuse(tmp_path, name, "--help")
        assert help_text.returncode == 0
        assert f"transfuse {name}" in help_text.stdout, "every help shows an example"


CODES = ["--model.images", "codes", "--model.codebook-size", "1024", "--model.patch-size", "1",
         "--model.image-attention",
         "causal", "--data.autoencoder", "vq-f4-small"]  # fmt: skip


def test_chameleon(home: Path) -> None:
    """The rival is the same commands with other settings."""
    result = transfuse(home, "train", "tiny", "--run", "chameleon", *CODES, "--loop.steps", "4", "--json")
    assert result.returncode == 0, result.stderr
    config = json.loads((home / "chameleon/export/config.json").read_text())
    assert config["architectures"] == ["TransfusionChameleon"]
    assert config["autoencoder"]["name"] == "vq-f4-small"
    request = ("a crab", "--draw", "force", "--model", "chameleon/export")
    result = transfuse(home, "generate", *request, "--out", "codes", "--json")
    assert result.returncode == 0, result.stderr
    reply = json.loads(result.stdout.splitlines()[-1])
    picture = next(part["path"] for part in reply["parts"] if part["type"] == "image")
    assert PIL.Image.open(home / picture).size == (32, 32)
    assert "expected none, for the model does not denoise" in refused(home, "generate", *request, "--steps", "3")
    result = transfuse(home, "caption", picture, "--model", "chameleon/export", "--json")
    assert result.returncode == 0, result.stderr
    message = refused(home, "train", "tiny", "--run", "no", *CODES[:-1], "kl-f4-small")
    assert 'expected one with a codebook, found "kl-f4-small"' in message
    assert "model.codebook_size: expected a positive number" in refused(home, "train", "tiny", *CODES[:2], *CODES[4:])


def test_llama_out_and_in(home: Path) -> None:
    """A run's trunk leaves as a Llama, with its tokenizer, and another run starts from it."""
    result = transfuse(home, "export", "runs/tiny", "--format", "llama", "--json")
    assert result.returncode == 0, result.stderr
    folder = home / json.loads(result.stdout.splitlines()[-1])["export"]
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    command = ["train", "tiny", "--run", "started", "--start", str(folder), "--model.n-layers", "7",
               "--loop.steps", "1",
               "--optimizer.learning-rate", "0", "--optimizer.final-learning-rate", "0"]  # fmt: skip
    result = transfuse(home, *command)
    assert result.returncode == 0, result.stderr
    assert "n_layers 2" in result.stderr, "the folder's shape is taken, and said"
    assert "missing 0" in result.stderr
    other, ours = load_file(folder / "model.safetensors"), load_file(home / "started/export/model.safetensors")
    assert (other["lm_head.weight"] == ours["lm_head.weight"]).all()
    assert (other["model.layers.1.mlp.down_proj.weight"] == ours["transformer.blocks.1.feed_forward.down.weight"]).all()
    (folder / "model.safetensors").unlink()
    assert transfuse(home, *command).returncode == 0, "what has begun does not need it again"
    assert "expected safetensors weights, found no file" in refused(home, *command[:2], "--run", "x", *command[4:])


def test_study(home: Path) -> None:
    assert transfuse(home, "study", "baselines", "--help").returncode == 0
    assert "scaling" in transfuse(home, "study").stdout
    assert 'study: unknown name "scalling"; did you mean "scaling"' in refused(home, "study", "scalling")
    assert "study: rivals is now called baselines" in refused(home, "study", "rivals")
    assert "expected a budget and presets" in refused(home, "study", "baselines", "--flops", "0")
    assert not (home / "runs" / "baselines").exists()
