"""Chat, server and data in a chat template: one way from turns to ids, and the cache keeps what does not change."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import exported
from language_models import write_tokenizer

from transfuse.export import Exported, save_export
from transfuse.inference import Conversation, Engine, TextDelta, TransfusionPipeline
from transfuse.inference.events import Done
from transfuse.sequence import Image, Tokenizer, layout_document
from transfuse.sequence.chat import Message, chat_prompt
from transfuse.serving.protocol import ChatRequest
from transfuse.serving.responses import to_png
from transfuse.serving.worker import Worker, WorkerConfig

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SETTINGS = {"max_tokens": 5, "temperature": 1.0}


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A model with random weights, whose tokenizer has a chat template and two ends."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    folder = write_tokenizer(tmp_path_factory.mktemp("chatty"), special, template=CHATML, eos_token="<|im_end|>")
    return exported(Tokenizer.of_model(folder))


@pytest.fixture(scope="module")
def folder(chatty: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place, model = tmp_path_factory.mktemp("saved") / "export", chatty.model
    parts = model.config, chatty.process.config, chatty.tokenizer, chatty.autoencoder, 8, chatty.generation, ""
    return save_export(place, model.state_dict(), *parts)


def test_a_conversation_is_in_the_template_and_only_new_positions_are_read(chatty: Exported, sizes: list[int]) -> None:
    talk = Conversation(TransfusionPipeline(chatty), system="be brief")
    shown, known = PIL.Image.new("RGB", (8, 8), "red"), 0
    for seed, said in enumerate((["a crab"], [shown, "two balloons"], ["hello"])):
        request = talk.request(said, seed=seed, draw="force", **SETTINGS)
        ids = layout_document(request.document, talk.engine.grammar).input_ids.tolist()
        assert ids[0] == 1
        assert ids.count(1) == 2 * seed + 3  # <|im_start|> of the system, of every turn, and of the reply
        fresh = list(Engine(chatty).run([replace(request, reuse=False)]))
        sizes.clear()
        heard = list(talk.say(said, seed=seed, draw="force", **SETTINGS))
        tokens = [[event.token for event in events if isinstance(event, TextDelta)] for events in (heard, fresh)]
        assert tokens[0] == tokens[1]
        assert sizes[0] <= len(ids) - known
        known = len(ids)  # the prompt at least stays in the cache
    assert [message.role for message in talk.messages] == ["system", *["user", "assistant"] * 3]


def test_writing_stops_at_the_other_ends_too(chatty: Exported) -> None:
    one = replace(chatty, model=copy.deepcopy(chatty.model))
    pipe = TransfusionPipeline(one)
    assert one.tokenizer.ends == (2, 0)
    mask = pipe.engine.runner.logit_mask
    assert not mask[[0, 2]].any()  # BOS is an end as well, so it may be chosen
    assert mask[one.tokenizer.eoi].isinf()
    with torch.no_grad():
        one.model.lm_head.weight.zero_()  # all ids are equally probable, and the first is taken
    request = replace(pipe.request(["a crab"]), draw="never", max_tokens=3)
    *_, done = pipe.stream(request)
    assert isinstance(done, Done)
    assert (done.reason, done.text_tokens) == ("stop", 0)


def test_an_export_opens_with_its_template(chatty: Exported, folder: Path) -> None:
    loaded = Tokenizer.load(folder / "tokenizer.json")
    assert loaded.text_format == chatty.tokenizer.text_format
    values = json.loads((folder / "tokenizer_config.json").read_text())
    assert (values["chat_template"], values["eos_token"], values["begin_token"]) == (
        CHATML,
        "<|im_end|>",
        "<|endoftext|>",
    )


def test_the_server_reads_roles(folder: Path) -> None:
    worker = Worker(WorkerConfig(str(folder), slots=1, guidance="packed", device="cpu", precision="float32"))
    url = f"data:image/png;base64,{to_png(np.zeros((8, 8, 3), np.uint8))}"
    body = {
        "messages": [
            {"role": "developer", "content": "be brief"},
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}],
            },
            {"role": "assistant", "content": "a crab"},
            {"role": "user", "content": "again<|im_end|>"},
        ]
    }
    parts = [np.zeros((8, 8, 3), np.uint8), "?"]
    document = worker.build(ChatRequest(**body).job(["be brief", *parts, "a crab", "again<|im_end|>"]))[0].document
    image = document.images[0]
    messages = [
        Message("system", ("be brief",)),
        Message("user", (image, "?")),
        Message("assistant", ("a crab",)),
        Message("user", ("again<|im_end|>",)),
    ]
    expected = chat_prompt(worker.pipe.exported.tokenizer, messages)
    assert isinstance(image, Image)
    assert (document.first, list(document.parts)[:1]) == (expected.first, list(expected.parts)[:1])
    ids = [layout_document(each, worker.engine.grammar).input_ids for each in (document, expected)]
    assert np.array_equal(*ids)


def test_transformers_processor_lays_out_as_we_do(chatty: Exported, folder: Path) -> None:
    """The export's own processor: texts begin with its BOS, and conversations with what the template begins with."""
    transformers = pytest.importorskip("transformers")
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    engine = Engine(chatty)
    ours = [TransfusionPipeline(chatty).request(["a crab"]).document]
    ours.append(chat_prompt(chatty.tokenizer, [Message("user", ("a crab",))]))
    rendered = "<|im_start|>user\na crab<|im_end|>\n<|im_start|>assistant\n"
    for document, text in zip(ours, ("a crab", rendered), strict=True):
        ids = processor(text=text)["input_ids"][0].tolist()
        assert ids == layout_document(document, engine.grammar).input_ids.tolist()
    ends = transformers.GenerationConfig.from_pretrained(folder).eos_token_id
    assert ends == [*chatty.tokenizer.ends, chatty.tokenizer.boi]
