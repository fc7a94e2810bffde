"""Folders that no run can start from give one line, before a run folder is made; and what may change, by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from language_models import write_model, write_tokenizer
from safetensors.torch import load_file, save_file

from transfuse.cli import run
from transfuse.config import from_dict, to_dict
from transfuse.errors import UserError
from transfuse.recipes import InitConfig, Recipe, preset
from transfuse.runs import resolve

pytest.importorskip("transformers")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = write_tokenizer(tmp_path / "model", ["<s>", "</s>"], bos_token="<s>", eos_token="</s>")
    write_model(place, bos_token_id=0, eos_token_id=1)
    return place


def config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shards(folder: Path, absent: str) -> None:
    """Two shards and their index, one of them absent from the folder."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    files = {"model-1.safetensors": names[:5], "model-2.safetensors": names[5:]}
    for file, part in files.items():
        save_file({name: weights[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    (folder / absent).unlink()


def pickled(folder: Path) -> None:
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def other_words(folder: Path, vocabulary: int) -> None:
    words = json.loads((folder / "tokenizer.json").read_text())
    words["model"]["vocab"] = dict(list(words["model"]["vocab"].items())[:vocabulary])
    for extra in range(len(words["model"]["vocab"]), vocabulary):
        words["model"]["vocab"][f"word{extra}"] = extra
    words["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(words))


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a missing shard": (
        lambda f: shards(f, "model-2.safetensors"),
        r"model-2\.safetensors: expected the shard that .* names, found no file",
    ),
    "a pickle": (pickled, r"model\.safetensors: expected safetensors weights, found only a pickled \.bin"),
    "a truncated file": (truncated, r"model\.safetensors: expected a safetensors file, found something else"),
    "more words than rows": (
        lambda f: other_words(f, 301),
        r"tokenizer\.json: expected the tokens of a vocabulary of 300, .* found 301$",
    ),
    "far fewer words": (
        lambda f: other_words(f, 200),
        r"tokenizer\.json: .* found 200 \(--init\.allow-changes vocabulary takes it\)",
    ),
    "an architecture with a reason": (
        lambda f: config(f, model_type="gemma2"),
        r'config\.json: model_type: expected one of llama, .* found "gemma2" \(norms of 1 \+ weight, capped logits\)$',
    ),
    "an architecture of no name": (
        lambda f: config(f, model_type="hyena"),
        r'model_type: expected one of llama, .* found "hyena"$',
    ),
    "no architecture": (lambda f: (f / "config.json").write_text("{}"), r'model_type: .* found "None"'),
    "biases": (
        lambda f: config(f, attention_bias=True),
        r"attention_bias: expected False, found True \(--init\.allow-changes attention_bias drops it\)",
    ),
    "long rotation": (
        lambda f: config(f, rope_scaling={"rope_type": "longrope"}),
        r'rope_scaling: .* found "longrope" \(--init\.allow-changes rope_scaling drops it\)',
    ),
    "no width": (lambda f: config(f, hidden_size=None), r"hidden_size: expected a number, found None$"),
    "fewer rows than it says": (
        lambda f: config(f, vocab_size=320),
        r"tensor lm_head\.weight: expected 320 rows, as config\.json's vocab_size says, found \(300, 48\)",
    ),
    "a template of other bytes": (
        lambda f: (f / "chat_template.jinja").write_bytes(b"\xff\xfe"),
        r"chat_template\.jinja: expected a template in UTF-8, found none",
    ),
    "no tokenizer": (
        lambda f: (f / "tokenizer.json").unlink(),
        r"tokenizer\.json: expected a tokenizer\.json, found no file",
    ),
    "an index of nothing": (
        lambda f: (pickled(f), (f / "model.safetensors.index.json").write_text("[]")),
        r"index\.json: weight_map: expected the file of every tensor, found none",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_one_line_before_anything_is_written(name: str, folder: Path, tmp_path: Path, capsys: Any) -> None:
    spoil, match = WRONG[name]
    spoil(folder)
    out = tmp_path / "run"
    assert run(["train", "tiny", "--run", str(out), "--start", str(folder)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("transfuse: ")]
    assert len(lines) == 1
    with pytest.raises(UserError, match=match):
        raise UserError(lines[0])
    assert not out.exists()


def started(folder: Path, *allowed: str) -> Recipe:
    return resolve(replace(preset("tiny"), start=str(folder), init=InitConfig(allowed))).recipe


def test_changes_are_named_one_by_one(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    names = [f"model.layers.{layer}.self_attn.{part}_proj.bias" for layer in range(2) for part in "qo"]
    save_file(weights | {name: torch.ones(48) for name in names}, folder / "model.safetensors")
    config(folder, attention_bias=True, model_type="mistral", sliding_window=9, tie_word_embeddings=False)
    kinds = ["self_attn.o_proj.bias", "self_attn.q_proj.bias"]
    for allowed, missing in (
        ([], "attention_bias"),
        (["attention_bias"], kinds[0]),
        (["attention_bias", kinds[0]], kinds[1]),
    ):
        with pytest.raises(UserError, match=rf"allow-changes {missing}"):
            started(folder, *allowed)
    recipe = started(folder, "attention_bias", *kinds)
    assert not recipe.model.qkv_bias
    assert recipe.model.sliding_window == 9
    assert started(folder, "attention_bias", "sliding_window", *kinds).model.sliding_window is None


def test_an_earlier_name_is_told_and_earlier_files_are_read(folder: Path, capsys: Any) -> None:
    assert run(["train", "tiny", "--start", str(folder), "--no-start-strict"]) == 2
    assert '"--no-start-strict" is now called "--init.allow-changes"' in capsys.readouterr().err
    values = to_dict(preset("tiny"))
    del values["init"]
    for strict, allowed in ((True, ()), (False, ("network",))):
        assert from_dict(Recipe, values | {"start_strict": strict}, "config.json").init.allow_changes == allowed


def test_a_run_that_began_with_less_of_the_folder_resumes(folder: Path, tmp_path: Path) -> None:
    """An earlier version untied embeddings and added four markers: what it recorded stays."""
    write_model(folder, bos_token_id=0, eos_token_id=1, tie_word_embeddings=True)
    recipe = replace(preset("tiny"), start=str(folder), device="cpu", precision="float32")
    begun = resolve(recipe).recipe
    assert begun.model.tie_embeddings
    earlier = replace(begun, model=replace(begun.model, tie_embeddings=False, text_vocab_size=304))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(to_dict(earlier)))
    assert resolve(recipe, tmp_path / "run").recipe == earlier
