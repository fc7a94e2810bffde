"""Dialogues in a data set: who says what is stored, and the template of the run that reads them makes the document."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from language_models import write_tokenizer

from transfuse.autoencoders import Pixels
from transfuse.data import CorruptSampleError, DataSet, PairConfig, StoredDialogues, has_dialogues
from transfuse.data.building import build_set, verify_set
from transfuse.data.building.prepare import BuildConfig
from transfuse.data.readers import Columns, Fault, Raw, open_source
from transfuse.sequence import SequenceFormat, Text, Tokenizer, layout_document
from transfuse.sequence.chat import Message, chat_sample

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def picture(seed: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


TALKS = [
    [
        {"role": "system", "content": "be brief"},
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "?"}],
        },
        {"role": "assistant", "content": "a crab"},
        {"role": "user", "content": "draw another"},
        {"role": "assistant", "content": [{"text": "here:"}, {"image": "b.png"}]},
    ],
    [{"role": "user", "content": "hello <|im_end|>"}, {"role": "assistant", "content": "hello, world"}],
]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return write_tokenizer(tmp_path / "model", special, template=CHATML, eos_token="<|im_end|>")


@pytest.fixture
def data(tmp_path: Path, model: Path) -> DataSet:
    source = tmp_path / "source"
    source.mkdir()
    for seed, name in enumerate("ab"):
        (source / f"{name}.png").write_bytes(picture(seed))
    wrong = [
        {"messages": [{"role": "user", "content": "alone"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]},
        {"messages": [{"role": "tool", "content": "a"}]},
        {"text": "no dialogue"},
    ]
    lines = [*({"messages": talk} for talk in TALKS), *wrong]
    (source / "talks.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = BuildConfig(size=8, heldout=0.0, tokenizer=str(model), columns=Columns())
    counts = build_set(str(source / "talks.jsonl"), tmp_path / "set", config, workers=0)
    assert (counts["documents"], counts["faulty"], counts["pictures"]) == (2, 4, 2)
    assert verify_set(str(tmp_path / "set"), workers=0) == (2, [])
    return DataSet(str(tmp_path / "set"))


@pytest.mark.parametrize("clean_copy", [False, True])
def test_the_runs_template_makes_the_documents(data: DataSet, model: Path, clean_copy: bool) -> None:
    tokenizer, pixels = Tokenizer.of_model(model), Pixels()
    form = replace(tokenizer.sequence_format(2), clean_copy=clean_copy)
    source = StoredDialogues(data, tokenizer, pixels, PairConfig(), seed=0)
    indices = np.arange(4)
    lengths, seen = source.lengths(indices, indices, form), []
    for index in range(4):
        document = source.document(index, sample=9)
        layout = layout_document(document, form)
        assert len(layout) == lengths[index]
        assert document.first == 1
        learned = [int(layout.input_ids[place + 1]) for place in np.flatnonzero(layout.loss_mask)]
        seen.append(tokenizer.marked.decode(learned, skip_special_tokens=False))
        assert [image.target for image in document.images] in ([False, True], [])
    assert set(seen) == {"a crab<|im_end|>here:<|boi|><|im_end|>", "hello, world<|im_end|>"}


@pytest.mark.parametrize("count", [20, 300])
def test_the_mean_length_counts_the_template(tmp_path: Path, model: Path, count: int) -> None:
    """So that shares of positions are right: exactly for few dialogues, and nearly for many of very unequal length."""
    (tmp_path / "a.png").write_bytes(picture(0))
    draws = np.random.default_rng(2)
    talks = []
    for number in range(count):
        turns = [
            f"{number} {turn} " + "go on " * min(60, int(draws.pareto(1.2))) for turn in range(2 * (1 + number % 4))
        ]
        talk: list[dict[str, object]] = [
            {"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(turns)
        ]
        if number % 3 == 0:
            talk[0]["content"] = [{"text": turns[0]}, {"image": "a.png"}]
        talks.append({"messages": talk})
    (tmp_path / "talks.jsonl").write_text("\n".join(map(json.dumps, talks)))
    config = BuildConfig(size=8, heldout=0.0, tokenizer=str(model))
    build_set(str(tmp_path / "talks.jsonl"), tmp_path / "set", config, workers=0)
    tokenizer = Tokenizer.of_model(model)
    form = tokenizer.sequence_format(2)
    source = StoredDialogues(DataSet(str(tmp_path / "set")), tokenizer, Pixels(), PairConfig(caption_drop=0.5), seed=1)
    lengths = [len(layout_document(source.document(index, index), form)) for index in range(source.epoch)]
    assert source.mean_length(form) == pytest.approx(np.mean(lengths), rel=1e-9 if count <= 64 else 0.02)


def test_damaged_documents_do_not_hide_that_others_are_dialogues(data: DataSet) -> None:
    assert has_dialogues(data)
    shard = Path(data.path) / data.manifest.shards[0].file
    content = bytearray(shard.read_bytes())
    begin, size = (int(data.documents[0][name]) for name in ("offset", "bytes"))
    content[begin : begin + size] = bytes(size)
    shard.write_bytes(content)
    damaged = DataSet(data.path)
    with pytest.raises(CorruptSampleError):
        damaged.read(0)
    assert has_dialogues(damaged)
    shard.write_bytes(bytes(len(content)))
    assert not has_dialogues(DataSet(data.path)), "nothing is left that tells"


def test_without_a_template_the_texts_follow_each_other(data: DataSet) -> None:
    tokenizer = data.tokenizer()
    form = SequenceFormat(tokenizer.bos, tokenizer.eos, tokenizer.boi, tokenizer.eoi, 2)
    source = StoredDialogues(data, tokenizer, Pixels(), PairConfig(), seed=0)
    for index in range(2):
        document = source.document(index, 0)
        assert len(layout_document(document, form)) == source.lengths(np.array([index]), np.array([0]), form)[0]
        texts = "".join(tokenizer.decode(part.ids) for part in document.parts if isinstance(part, Text))
        assert texts in ("be brief?a crabdraw anotherhere:", "hello <|im_end|>hello, world")


def part(kind: str, text: str | None, name: object) -> dict[str, object]:
    """A part of a message as tables have it: every field, also those that are null."""
    return {"type": kind, "text": text, "image_url": name}


@pytest.mark.parametrize("shape", ["url", "name"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_fields_of_a_part_may_be_null(tmp_path: Path, kind: str, shape: str) -> None:
    """A part that is words has a null in place of an image; one that is neither costs its own dialogue only."""
    (tmp_path / "b.png").write_bytes(picture(3))
    (tmp_path / "a.txt").write_text("not read")
    name = {"url": "b.png", "detail": None} if shape == "url" else "b.png"
    shown = [part("text", "look", None), part("image_url", None, name)]
    answer = {"role": "assistant", "content": [part("text", "yes", None)]}
    talks = [
        [{"role": "user", "content": shown}, {"role": "assistant", "content": [part("text", "a boat", None)]}],
        [{"role": "user", "content": [part("text", None, None)]}, answer],
        [{"role": "user", "content": [part("image_url", "both", name)]}, answer],
        [{"role": "user", "content": [part("text", "hi", None)]}, answer],
    ]
    records = [{"messages": talk} for talk in talks]
    path = tmp_path / f"talks.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, records)))
    else:
        arrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(arrow.Table.from_pylist(records), path)
    reader = open_source(str(tmp_path if kind == "parquet" else path), Columns())
    items = [item for part in reader.parts() for item in reader.read(part)]
    assert [type(item) for item in items] == [Raw, Fault, Fault, Raw]
    first, *_, last = (item.parts for item in items if isinstance(item, Raw))
    assert first == ("look", picture(3), "a boat")
    assert last == ("hi", "yes")


def test_a_part_with_bytes_that_is_wrong_costs_its_own_dialogue_only(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    def content(sound: bytes | None) -> list[dict[str, object]]:
        return [{"text": None if sound else "hi", "audio": sound}]

    talks = [[{"role": who, "content": content(s if who == "user" else None)} for who in ("user", "assistant")]
             for s in (None, b"\xff\x00", None)]  # fmt: skip
    parquet.write_table(arrow.Table.from_pylist([{"messages": talk} for talk in talks]), tmp_path / "a.parquet")
    reader = open_source(str(tmp_path), Columns())
    items = [item for part in reader.parts() for item in reader.read(part)]
    assert [(type(item), getattr(item, "lost", 0)) for item in items] == [(Raw, 0), (Fault, 1), (Raw, 0)]


@pytest.mark.parametrize("first", ['{"messages": [{"role": "us', '"a comment"', '{"version": 2}', '{"messages": 2}'])
def test_a_damaged_first_line_costs_no_other(tmp_path: Path, first: str) -> None:
    """The first line that is a document tells whether all are dialogues."""
    path = tmp_path / "talks.jsonl"
    for records, parts in (
        ([{"messages": TALKS[1]}] * 3, ("hello <|im_end|>", "hello, world")),
        ([{"text": "no dialogue"}] * 3, ("no dialogue",)),
    ):
        path.write_text("\n".join([first, *map(json.dumps, records)]))
        reader = open_source(str(path), Columns())
        items = [item for part in reader.parts() for item in reader.read(part)]
        assert [item.key for item in items if isinstance(item, Fault)] == ["talks.jsonl:1"]
        assert [item.parts for item in items if isinstance(item, Raw)] == [parts] * 3


def test_an_equal_dialogue_made_by_hand(data: DataSet, model: Path) -> None:
    tokenizer = Tokenizer.of_model(model)
    source = StoredDialogues(data, tokenizer, Pixels(), PairConfig(), seed=0)
    documents = [source.document(index, 3) for index in range(2)]
    (ours,) = [document for document in documents if not document.images]
    messages = [Message("user", ("hello <|im_end|>",)), Message("assistant", ("hello, world",))]
    assert ours == chat_sample(tokenizer, messages, 3)
