"""Mistakes on the command line and in Python calls: one line each, with what was expected and what was found."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import transfuse
from transfuse.cli import COMMANDS, find_command, overview, run
from transfuse.errors import UserError
from transfuse.log import logger, progress
from transfuse.recipes import preset


@pytest.fixture
def error_line(capsys: pytest.CaptureFixture[str]):
    """Return a function that runs a refused command and returns its one line on standard error."""

    def refused(*words: str) -> str:
        assert run(words) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("transfuse: ")
        assert err.count("\n") == 1
        return err.removeprefix("transfuse: ").rstrip()

    return refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("version", 'unknown command "version"; did you mean "--version"?'),
        ("trian", 'unknown command "trian"; did you mean "train"?'),
        ("frobnicate", 'unknown command "frobnicate"; transfuse --help lists them'),
        ("data buld", 'unknown command "data buld"; did you mean "build"?'),
        ("autoencoder encode", 'unknown command "autoencoder encode"; transfuse --help lists them'),
        ("generate a crab", 'generate: unexpected word "crab"; a prompt of several words needs quotes: "a crab"'),
        ("edit x.png make it red", 'edit: unexpected word "it"; a prompt of several words needs quotes: "make it red"'),
        ("caption x.png y.png", 'caption: unexpected word "y.png"; --help shows an example'),
        ("edit x.png", "edit: expected prompt, found none"),
        ("caption", "caption: expected image, found none"),
        ("generate x --seed seven", "generate: --seed: expected a whole number, found seven"),
        ("generate x --seed 1.5", "generate: --seed: expected a whole number, found 1.5"),
        ("generate x --seed", "generate: --seed: expected INT, found too few values"),
        ("generate x --temperature hot", "generate: --temperature: expected a number, found hot"),
        ("generate x --draw forced", 'generate: --draw: unknown value "forced"; did you mean "force"?'),
        ("generate x --sede 4", 'generate: unknown option "--sede"; did you mean "--seed"?'),
        ("generate x --zzz 4", 'generate: unknown option "--zzz"; --help lists them'),
        ("generate x --model small64", 'small64: expected an export folder, found none; did you mean "small-64"?'),
        ("train", "train: expected a preset, found none; transfuse train --help lists them"),
        ("train tinny", 'preset: unknown name "tinny"; did you mean "tiny"?'),
        ("plan tiny --loop.stepz 3", 'plan: unknown option "--loop.stepz"; did you mean "--loop.steps"?'),
        ("plan tiny --model.kv-heads=1", 'plan: "--model.kv-heads" is now called "--model.n-kv-heads"'),
        ("plan tiny --data.batch-size -1", "plan: data.batch_size: expected at least 1, found -1"),
        ("plan tiny --data.world.seed x", "plan: --data.world.seed: expected a whole number, found x"),
        ("plan demo --data.world.nouns 0", "plan: --data.world.nouns: expected a whole number from 1 to 328, found 0"),
        ("plan tiny --config a.ini", "a.ini: expected a file of settings (.yaml, .toml or .json), found .ini"),
        ("plan tiny --config a.yaml", "a.yaml: expected a file of settings, found none (No such file or directory)"),
        ("serve --port 99999", "serve: --port: expected 0 to 65535, found 99999"),
        ("study scaling --arms llama", 'study scaling: "--arms" is now called "--variants"'),
        ("data build a b --size 0", "data build: size: expected at least 1, found 0"),
        ("data build a b --heldout nan", "data build: heldout: expected a share from 0 to below 1, found nan"),
        ("data build a b --max-tokens 0", "data build: max_tokens: expected at least 1, found 0"),
        ("data build a b --count -1", "data build: count: expected at least 0, found -1"),
        ("data build a b --caption no", 'data build: caption: expected words with one {class} in them, found "no"'),
        ("data build a b --cache-gigabytes nan", "cache_gigabytes: expected at least 0, found nan"),
        ("data build https://[bad b", "https://[bad: expected a URL, found something else (Invalid IPv6 URL)"),
        ("data inspect a --row-length 0", "row_length: expected at least 1, found 0"),
        ("tune small-64 a --count -1", "tune: count: expected at least 0, found -1"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(words: str, message: str, error_line) -> None:
    assert error_line(*words.split()) == message


@pytest.mark.parametrize(
    "words",
    [
        "generate a --model LONG",
        "train tiny --run x/LONG/y",
        "evaluate LONG",
        "export LONG",
        "data build LONG out",
        "data build world LONG --count 2",
        "data inspect LONG",
        "data verify LONG",
        "tune LONG pictures",
        "tune small-64 LONG",
        "plan tiny --config LONG.yaml",
    ],
)
def test_names_that_are_too_long_are_one_line(words: str, tmp_path: Path, monkeypatch, error_line) -> None:
    monkeypatch.chdir(tmp_path)
    assert "LLLL" in error_line(*words.replace("LONG", "L" * 280).split())


def test_swapped_arguments_of_edit(tmp_path: Path, monkeypatch, error_line) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.png").write_bytes(b"")
    line = error_line("edit", "make it red", "a.png")
    assert line == 'edit: expected the image first, found the prompt: transfuse edit a.png "make it red"'


def test_numbers_in_other_forms() -> None:
    words = ["train", "tiny", "--loop.steps", "1e3", "--seed", "1_000", "--loop.max-seconds", "None"]
    recipe = find_command(words).keywords["recipe"]
    assert (recipe.loop.steps, recipe.seed, recipe.loop.max_seconds) == (1000, 1000, None)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", "preset: tiny\nloop:\n  steps: 7\noptimizer: {learning_rate: 1e-3}\n"),
        ("a.toml", 'preset = "tiny"\n[loop]\nsteps = 7\n[optimizer]\nlearning_rate = 1e-3\n'),
        ("a.json", '{"preset": "tiny", "loop": {"steps": 7}, "optimizer": {"learning_rate": 0.001}}'),
    ],
)
def test_settings_come_from_a_file_and_options_win(tmp_path: Path, name: str, text: str) -> None:
    file = tmp_path / name
    file.write_text(text)
    recipe = find_command(["train", "--config", str(file)]).keywords["recipe"]
    assert (recipe.preset, recipe.loop.steps, recipe.optimizer.learning_rate) == ("tiny", 7, 0.001)
    assert recipe.model == preset("tiny").model
    recipe = find_command(["train", "demo", f"--config={file}", "--loop.steps", "9"]).keywords["recipe"]
    assert (recipe.loop.steps, recipe.model) == (9, preset("demo").model)


def test_a_runs_own_settings_are_such_a_file(tmp_path: Path) -> None:
    from transfuse.config import to_dict

    file = tmp_path / "config.json"
    file.write_text(json.dumps(to_dict(preset("tiny")) | {"preset": "of-a-study", "seed": 3}))
    assert find_command(["train", "--config", str(file)]).keywords["recipe"].seed == 3
    file.write_text(json.dumps({"version": 1}))
    with pytest.raises(UserError, match=r"config.json: version: expected 2, found 1"):
        find_command(["train", "tiny", "--config", str(file)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loop: {log_evry: 3}", 'unknown setting "loop.log_evry"; did you mean "log_every"?'),
        ("loop: {steps: many}", "loop.steps: Input should be a valid integer"),
        ("preset: tinny", 'preset: unknown name "tinny"; did you mean "tiny"?'),
        ("[1, 2]", "expected settings by name, found [1, 2]"),
        ("a: [", "expected YAML, found something else"),
    ],
)
def test_mistakes_in_a_file_are_one_line(tmp_path: Path, text: str, message: str, error_line) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    line = error_line("plan", *([] if "preset" in text else ["tiny"]), "--config", str(file))
    assert message in line
    assert "preset" in text or line.startswith(f"{file}: ")


def test_every_command_has_help_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        assert name in overview()
        assert run([*name.split(), "--help"]) == 0
        assert f"$ transfuse {name}" in capsys.readouterr().out or name == "completion"
    assert run(["plan", "tiny", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "$ transfuse plan 7b" in shown
    assert "(default: 30)" in shown, "the preset's own number of steps"
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"transfuse {transfuse.__version__}\n"
    assert run(["data"]) == 0
    assert "data verify" in capsys.readouterr().out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_commands_and_options(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ("generate", "verify", "loop.steps", "guidance-scale"))


def test_messages_by_level(capsys: pytest.CaptureFixture[str]) -> None:
    for words, level in ((["--quiet"], logging.ERROR), (["--verbose"], logging.DEBUG), ([], logging.INFO)):
        assert run([*words, "plan", "tinny"]) == 2
        assert logger.level == level
        assert ("Traceback" in capsys.readouterr().err) == (words == ["--verbose"])
    with progress("reading", 3, unit="files"):
        assert capsys.readouterr().err == "reading: 3 files to do\n"


def test_a_reader_that_leaves_gets_no_traceback() -> None:
    """The reader of `transfuse --help | head -1` leaves after a line."""
    code = "import os, sys; os.close(0); from transfuse.cli import main; sys.argv = ['transfuse', '--help']; main()"
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (result.returncode, result.stderr) == (0, "")


def test_no_color_is_obeyed() -> None:
    code = "from transfuse.cli import run; import tyro._settings as s; print(s._experimental_options['ansi_codes'])"
    for value, colours in (("1", "False"), ("", "True")):
        environment = {**os.environ, "NO_COLOR": value}
        result = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        assert result.stdout.strip() == colours


def test_python_calls_with_wrong_values() -> None:
    pipe = transfuse.load("small-64", dtype="float16")
    assert pipe.exported.model.embedding.weight.dtype == torch.float16
    with pytest.raises(UserError, match=r"^guidance_scale: expected a number, found 'high'$"):
        pipe("a crab", guidance_scale="high")
    with pytest.raises(UserError, match=r"^steps: expected a whole number, found 'ten'$"):
        pipe("a crab", num_inference_steps="ten")
    with pytest.raises(UserError, match=r"^dtype: expected one of float32, bfloat16, float16, found int3$"):
        transfuse.load("small-64", dtype="int3")
    with pytest.raises(UserError, match=r"^device: expected cpu, cuda, cuda:N or mps, found abacus$"):
        transfuse.load("small-64", device="abacus")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"^device: expected a CUDA device, found none"):
            transfuse.load("small-64", device="cuda")
