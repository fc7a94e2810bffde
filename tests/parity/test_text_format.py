"""A started model's texts begin and end as before: its own BOS and EOS, transformers' logits and nats on equal ids."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from language_models import write_model, write_tokenizer
from torch.nn import functional as F

from transfuse.errors import UserError
from transfuse.export import load_export
from transfuse.inference.scoring import score
from transfuse.model import Transfusion
from transfuse.recipes import Recipe, preset
from transfuse.runs import resolve
from transfuse.sequence import Document, Text, Tokenizer
from transfuse.train import build_trainer, export_run

transformers = pytest.importorskip("transformers")

CHAT = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
FORMATS: dict[str, tuple[list[str], str | None, dict[str, Any], tuple[str, tuple[str, ...]]]] = {
    "Llama 2": (["<unk>", "<s>", "</s>"], "<s>", {"bos_token": "<s>", "eos_token": "</s>"}, ("<s>", ("</s>",))),
    "named as objects": (
        ["<unk>", "<s>", "</s>"],
        "<s>",
        {"bos_token": {"content": "<s>"}, "eos_token": {"content": "</s>", "lstrip": False}},
        ("<s>", ("</s>",)),
    ),
    "asked to begin": (
        ["<|end_of_text|>", "<|begin_of_text|>"],
        None,
        {"bos_token": "<|begin_of_text|>", "add_bos_token": True, "eos_token": "<|end_of_text|>"},
        ("<|begin_of_text|>", ("<|end_of_text|>",)),
    ),
    "Qwen": (CHAT, None, {"bos_token": None, "eos_token": "<|endoftext|>"}, ("<|endoftext|>", ("<|endoftext|>",))),
    "Qwen, chat": (CHAT, None, {"eos_token": "<|im_end|>"}, ("<|endoftext|>", ("<|im_end|>", "<|endoftext|>"))),
    "SmolLM2": (
        CHAT,
        None,
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
        ("<|endoftext|>", ("<|im_end|>", "<|endoftext|>")),
    ),
    "an end alone": (["</s>"], None, {"eos_token": "</s>"}, ("</s>", ("</s>",))),
    "a beginning that is not put there": (
        ["<s>", "</s>"],
        None,
        {"bos_token": "<s>", "eos_token": "</s>"},
        ("<s>", ("</s>",)),
    ),
    "none": (["<unk>"], None, {}, ("<|bos|>", ("<|eos|>",))),
}


@pytest.mark.parametrize("name", FORMATS)
def test_how_texts_begin_and_end(name: str, tmp_path: Path) -> None:
    special, prepended, config, (bos, ends) = FORMATS[name]
    tokenizer = Tokenizer.of_model(write_tokenizer(tmp_path / "model", special, prepended, **config))
    spelled = [tokenizer.backend.id_to_token(id) for id in (tokenizer.bos, *tokenizer.ends)]
    assert spelled == [bos, *ends]
    new = (
        [tokenizer.boi, tokenizer.eoi]
        if name != "none"
        else [tokenizer.bos, tokenizer.eos, tokenizer.boi, tokenizer.eoi]
    )
    assert new == list(range(290, 290 + len(new)))
    tokenizer.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    assert (again.bos, again.ends, again.fingerprint) == (tokenizer.bos, tokenizer.ends, tokenizer.fingerprint)
    assert Tokenizer.adopt(tmp_path / "model").text_fingerprint == tokenizer.text_fingerprint


def test_ids_name_tokens_where_no_name_does(tmp_path: Path) -> None:
    """As Llama 3 has it: several ends by id, of which generation_config.json has more."""
    folder = write_tokenizer(tmp_path, ["<a>", "<b>", "<c>", "<d>"], "<a>")
    (folder / "config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [1, 2]}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 1]}))
    tokenizer = Tokenizer.of_model(folder)
    assert (tokenizer.bos, tokenizer.ends) == (0, (1, 2, 3))


@pytest.mark.parametrize(
    ("file", "values", "match"),
    [
        (
            "tokenizer_config.json",
            {"eos_token": "<|im_end|>"},
            r"tokenizer_config\.json: eos_token: expected a token of .*, found '<\|im_end\|>'",
        ),
        ("tokenizer_config.json", {"bos_token": 7}, r"bos_token: expected a token of .*, found 7"),
        (
            "config.json",
            {"eos_token_id": 290},
            r"config\.json: eos_token_id: expected an id of .* \(0 to 289\), found 290",
        ),
        ("generation_config.json", {"eos_token_id": [1, -1]}, r"generation_config\.json: eos_token_id: .* found -1"),
        ("config.json", [], r"config\.json: expected settings by name, found a list"),
        ("tokenizer_config.json", {"chat_template": 7}, r"chat_template: expected a text, found a int"),
        ("tokenizer_config.json", {"end_tokens": "</s>"}, r"end_tokens: expected a list of tokens, found '</s>'"),
    ],
)
def test_tokens_that_the_tokenizer_does_not_have(file: str, values: Any, match: str, tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, ["<s>", "</s>"])
    (folder / file).write_text(json.dumps(values))
    with pytest.raises(UserError, match=match):
        Tokenizer.of_model(folder)


def recipe(folder: Path) -> Recipe:
    """The smallest run that starts from a folder, in float32."""
    base = preset("tiny")
    return replace(
        base, start=str(folder), precision="float32", device="cpu", model=replace(base.model, max_seq_len=128)
    )


@pytest.mark.parametrize("rows", [290, 291, 300], ids=["full", "one spare", "padded"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_started_model_reads_as_before(rows: int, tied: bool, tmp_path: Path) -> None:
    """Before the first step, exported and loaded: transformers' logits on the same ids, and the nats of any text."""
    folder = write_tokenizer(tmp_path / "model", CHAT, bos_token="<|im_start|>", eos_token="<|im_end|>")
    hf_model = write_model(folder, rows=rows, bos_token_id=1, eos_token_id=2, tie_word_embeddings=tied)
    run = resolve(recipe(folder))
    trainer = build_trainer(run, tmp_path / "run")
    exported = load_export(export_run(run, trainer, tmp_path / "export"))
    tokenizer = exported.tokenizer
    assert (tokenizer.bos, tokenizer.eos, tokenizer.boi, tokenizer.eoi) == (0, 2, 290, 291)
    assert exported.model.config.text_vocab_size == max(rows, 292)
    for text in ("a crab on a blue background", "What?\n\nHm."):
        ids = tokenizer.encode(text)
        with torch.no_grad():
            theirs = hf_model(torch.tensor([[0, *ids]])).logits[0]
        documents = [Document([Text(ids)], closed=False)]
        ours = logits_of(exported.model, [0, *ids])
        torch.testing.assert_close(ours[:, :290], theirs[:, :290], atol=1e-4, rtol=0)
        # A row that is the mean of rows has the mean of their logits: far below the largest, where a model is sure.
        theirs = F.pad(theirs, (0, ours.shape[1] - rows))
        theirs[:, 290:292] = theirs[:, :290].mean(1, keepdim=True)
        nats = F.cross_entropy(theirs[:-1].double(), torch.tensor(ids), reduction="none")
        torch.testing.assert_close(torch.from_numpy(score(exported, documents)[0].nll), nats, atol=1e-4, rtol=0)
    mean = exported.model.embedding.weight[:290].mean(0)
    torch.testing.assert_close(exported.model.embedding.weight[[290, 291]], mean.expand(2, -1))


def logits_of(model: Transfusion, ids: list[int]) -> torch.Tensor:
    from transfuse.model import dense
    from transfuse.sequence import SequenceFormat, collate

    batch = collate([Document([Text(tuple(ids[1:]))], closed=False)], SequenceFormat(ids[0], 2, 290, 291, 2))
    with torch.no_grad():
        every = torch.arange(batch.positions)
        return model(batch.input_ids, batch.position_ids, dense(batch), every).logits[: len(ids)]


def test_tokens_that_tokenizer_config_adds_keep_their_ids(tmp_path: Path) -> None:
    """BOI and EOI come after them: `added_tokens_decoder` may go beyond tokenizer.json."""
    transformers = pytest.importorskip("transformers")
    tool = {"content": "<|tool|>", "special": True, "normalized": False}
    folder = write_tokenizer(tmp_path, ["<s>", "</s>"], eos_token="</s>", added_tokens_decoder={"290": tool})
    tokenizer, theirs = Tokenizer.of_model(folder), transformers.AutoTokenizer.from_pretrained(folder)
    number = tokenizer.backend.token_to_id("<|tool|>")
    assert number == theirs.convert_tokens_to_ids("<|tool|>") == 290
    assert number not in (tokenizer.boi, tokenizer.eoi)
    assert Tokenizer.adopt(folder).backend.token_to_id("<|tool|>") == 290
    for wrong, match in (({"295": tool}, r"the next id, 290, found '<\|tool\|>' with id 295"), ({"290": {}}, "token")):
        write_tokenizer(tmp_path, ["<s>", "</s>"], eos_token="</s>", added_tokens_decoder=wrong)
        with pytest.raises(UserError, match=rf"tokenizer_config\.json: added_tokens_decoder: expected .*{match}"):
            Tokenizer.of_model(folder)
