"""The API as clients use it: OpenAI's own client, images in and out, and mistakes."""

from __future__ import annotations

import base64
import contextlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openai
import PIL.Image
import pytest
from hostile import IMAGES
from running import LONG, Running, data_url, decode, encode, png, says

import transfuse
from transfuse.cli import run
from transfuse.images import read_settings
from transfuse.inference import TransfusionPipeline

pytestmark = pytest.mark.xdist_group("serving")


@pytest.fixture(scope="module")
def pipe(served: Path) -> TransfusionPipeline:
    """The served model, in this process."""
    return transfuse.load(str(served))


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


# ---- OpenAI's client, unmodified


def test_openai_lists_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("small").id == "small"
    with pytest.raises(openai.NotFoundError, match="model: expected 'small'"):
        client.models.retrieve("gpt-5")


def test_openai_writes_what_the_pipeline_writes(client: openai.OpenAI, pipe: TransfusionPipeline) -> None:
    expected = pipe.generate("a crab", draw="never", max_tokens=12).text
    body = {"model": "small", "messages": says("a crab"), "max_tokens": 12, "modalities": ["text"]}
    reply = client.chat.completions.create(**body)
    assert reply.choices[0].message.content == expected
    assert reply.choices[0].finish_reason in ("stop", "length")
    assert reply.usage.completion_tokens <= 12
    chunks = list(client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
    assert (chunks[0].choices[0].delta.role, chunks[0].choices[0].delta.content) == ("assistant", "")
    assert not any(chunk.choices[0].delta.role for chunk in chunks[1:] if chunk.choices)
    assert chunks[-1].usage == reply.usage
    assert chunks[-2].choices[0].finish_reason == reply.choices[0].finish_reason


def test_log_probabilities_are_those_of_the_pipeline(client: openai.OpenAI, pipe: TransfusionPipeline) -> None:
    """Whole and streamed, a token each; together their bytes are the text."""
    body = {"model": "small", "messages": says("a crab"), "max_tokens": 8, "modalities": ["text"], "logprobs": True}
    reply = client.chat.completions.create(**body, top_logprobs=3)
    tokens = reply.choices[0].logprobs.content
    assert len(tokens) == reply.usage.completion_tokens == 8
    for token in tokens:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == max(other.logprob for other in token.top_logprobs) >= token.logprob
        assert token.bytes is None or bytes(token.bytes).decode() == token.token
    assert tokens[0].token == tokens[0].top_logprobs[0].token, "at temperature 0 the most probable one"
    chunks = list(client.chat.completions.create(**body, top_logprobs=3, stream=True))
    streamed = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert streamed == tokens
    plain = client.chat.completions.create(**body)
    assert [token.logprob for token in plain.choices[0].logprobs.content] == [token.logprob for token in tokens]
    assert not any(token.top_logprobs for token in plain.choices[0].logprobs.content)
    assert plain.choices[0].message.content == pipe.generate("a crab", draw="never", max_tokens=8).text


def test_openai_draws_what_the_pipeline_draws(client: openai.OpenAI, pipe: TransfusionPipeline, tmp_path: Path) -> None:
    expected = pipe("a crab", generator=7, num_images_per_prompt=2).images
    reply = client.images.generate(model="small", prompt="a crab", n=2, extra_body={"seed": 7})
    for number, (data, ours) in enumerate(zip(reply.data, expected, strict=True)):
        assert np.array_equal(decode(data.b64_json), np.asarray(ours))
        path = tmp_path / f"{number}.png"
        path.write_bytes(base64.b64decode(data.b64_json))
        assert read_settings(path)["seed"] == 7 + number
    events = list(
        client.images.generate(model="small", prompt="a crab", stream=True, partial_images=3, extra_body={"seed": 7})
    )
    kinds = [event.type.rsplit(".", 1)[1] for event in events]
    # A preview that waits when the next one comes makes way for it: on a machine with other work fewer arrive.
    assert kinds in [["partial_image"] * previews + ["completed"] for previews in (1, 2, 3)]
    assert np.array_equal(decode(events[-1].b64_json), np.asarray(expected[0]))
    assert decode(events[0].b64_json).shape == (8, 8, 3)
    for event in (*events, reply):
        assert (event.size, event.quality, event.background, event.output_format) == ("8x8", "auto", "opaque", "png")
    for event in events:
        type(event).model_validate(event.model_dump())  # the client itself checks nothing
    assert reply.usage.input_tokens_details.text_tokens == reply.usage.input_tokens > 0
    assert reply.usage.input_tokens_details.image_tokens == 0


def test_a_picture_of_the_server_is_drawn_again(server: Running, served: Path, tmp_path: Path) -> None:
    """By `generate --again`, to the same bytes: generations, an edit by words and one by a mask, and a chat."""
    mask = np.zeros((8, 8), np.uint8)
    mask[:, :4] = 255
    (tmp_path / "shown.png").write_bytes(png())
    (tmp_path / "mask.png").write_bytes(encode(mask))
    parts = [{"type": "image_url", "image_url": {"url": data_url(png())}}, {"type": "text", "text": "a crab"}]
    chat = {"messages": [{"role": "user", "content": parts}], "modalities": ["image"], "seed": 2, "temperature": 0.5}
    form = {"prompt": "red", "seed": 3, "num_inference_steps": 4}
    files = [("image", ("a.png", png()))]
    masked = [*files, ("mask", ("m.png", encode(mask)))]
    body = {"prompt": "a crab", "n": 2, "seed": 7, "sampler": "ddim", "size": "8x4"}
    images = [(image["b64_json"], ()) for image in server.post("/v1/images/generations", body).json()["data"]]
    for given, options in ((files, ()), (masked, ("--mask", "mask.png"))):
        (edited,) = server.post("/v1/images/edits", data=form, files=given).json()["data"]
        images.append((edited["b64_json"], ("--images", "shown.png", *options)))
    (image,) = server.post("/v1/chat/completions", chat).json()["choices"][0]["message"]["images"]
    images.append((image["image_url"]["url"].partition(",")[2], ("--images", "shown.png")))
    for number, (content, options) in enumerate(images):
        file = tmp_path / f"{number}.png"
        file.write_bytes(base64.b64decode(content))
        command = ["generate", "--again", str(file), "--model", str(served), "--out", str(tmp_path / "again")]
        with contextlib.chdir(tmp_path):
            assert run([*command, *options]) == 0
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    assert read_settings(tmp_path / "1.png")["size"] == [4, 8]


def test_openai_edits_as_the_pipeline_does(client: openai.OpenAI, pipe: TransfusionPipeline) -> None:
    content = png()
    picture = PIL.Image.fromarray(decode(content))
    reply = client.images.edit(model="small", image=("a.png", content), prompt="make it red", extra_body={"seed": 3})
    assert np.array_equal(decode(reply.data[0].b64_json), np.asarray(pipe.edit(picture, "make it red", generator=3)))
    half = np.zeros((8, 8, 4), np.uint8)
    half[:, :4, 3] = 255  # OpenAI's masks are drawn where they are transparent
    settings = {"seed": 3, "strength": 0.7}
    masked = client.images.edit(
        model="small", image=("a.png", content), mask=("m.png", encode(half)), prompt="a crab", extra_body=settings
    )
    edited = decode(masked.data[0].b64_json)
    assert np.array_equal(edited[:, :4], decode(content)[:, :4])
    assert not np.array_equal(edited[:, 4:], decode(content)[:, 4:])


def test_every_mask_means_what_it_means_to_the_pipeline(client: openai.OpenAI, pipe: TransfusionPipeline) -> None:
    """White or transparent, whatever its colours, turned by EXIF: the same bytes as from Python."""
    content, exif = png(seed=4), PIL.Image.Exif()
    exif[274] = 3
    where, colours = np.zeros((8, 8), np.uint8), decode(png(seed=5))
    where[1:3, 2:7] = 255
    for mask in (where, np.dstack([colours, 255 - where]), np.dstack([colours * 0, 255 - where])):
        file = encode(mask, exif=exif)
        reply = client.images.edit(
            model="small", image=("a.png", content), mask=("m.png", file), prompt="x", extra_body={"seed": 3}
        )
        edited = decode(reply.data[0].b64_json)
        assert np.array_equal(edited, pipe("x", image=content, mask_image=file, generator=3).images[0])
        kept = where[::-1, ::-1] == 0
        assert np.array_equal(edited[kept], decode(content)[kept])
    for file, message in (
        (encode(where * 0), "mask: expected a transparent area to redraw"),
        (png(9), "mask: expected 8x8 pixels, as the image, found 9x9"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            client.images.edit(model="small", image=("a.png", content), mask=("m.png", file), prompt="x")


def test_openai_chats_in_words_and_pictures(client: openai.OpenAI) -> None:
    content = [{"type": "image_url", "image_url": {"url": data_url(png())}}, {"type": "text", "text": "a crab"}]
    body = {"model": "small", "messages": [{"role": "user", "content": content}], "max_tokens": 6}
    forced = {"modalities": ["image"], "seed": 1}
    reply = client.chat.completions.create(**body, extra_body=forced)
    images = reply.choices[0].message.images
    assert len(images) == 1
    parts = client.chat.completions.create(**body, extra_body={**forced, "content_format": "parts"})
    assert parts.choices[0].message.content[0]["type"] == "image_url"
    back = [*body["messages"], reply.choices[0].message.model_dump(), *says("and then")]
    assert client.chat.completions.create(**{**body, "messages": back}).choices[0].message.content is not None


def test_progress_is_told_where_asked_for(server: Running) -> None:
    body = {"messages": says("a crab"), "modalities": ["image"], "max_tokens": 0, "stream": True}
    options = {"include_progress": True, "preview_every": 10}
    for given, expected in ((None, []), (options, [10, 20])):
        lines = server.post("/v1/chat/completions", {**body, "stream_options": given}).text.split("\n\n")
        assert lines[-2] == "data: [DONE]"
        chunks = [json.loads(line[6:]) for line in lines[:-2]]
        assert [chunk["progress"]["step"] for chunk in chunks if "progress" in chunk] == expected
        previews = [chunk["progress"]["preview"] for chunk in chunks if "preview" in chunk.get("progress", {})]
        assert all(decode(preview.partition(",")[2]).shape == (8, 8, 3) for preview in previews)


# ---- The same bytes, whoever else is there


def test_alone_in_a_crowd_and_beside_those_who_leave(server: Running) -> None:
    body = [{"prompt": f"a crab {number}", "seed": number, "num_inference_steps": 12} for number in range(8)]

    def drawn(body: dict[str, object]) -> str:
        return server.post("/v1/images/generations", body).json()["data"][0]["b64_json"]

    alone = [drawn(body) for body in body]
    with ThreadPoolExecutor(16) as crowd:
        leaving = [crowd.submit(server.leave, {"prompt": "x", **LONG}, 0.05 * number) for number in range(6)]
        assert list(crowd.map(drawn, body)) == alone
        for future in leaving:
            future.result()


# ---- Mistakes, each named


MISTAKES = [
    ("/v1/chat/completions", {}, "messages: expected a value, found none"),
    ("/v1/chat/completions", {"messages": []}, "messages: expected at least 1 item, found 0"),
    ("/v1/chat/completions", {"messages": says("")}, "messages: expected some text or a picture"),
    (
        "/v1/chat/completions",
        {"messages": says("a"), "temprature": 1},
        'temprature: unknown field; did you mean "temperature"?',
    ),
    (
        "/v1/chat/completions",
        {"messages": says("a"), "temperature": 3},
        "temperature: expected less than or equal to 2, found 3",
    ),
    ("/v1/chat/completions", {"messages": says("a" * 20_000)}, "prompt: expected at most 256 positions"),
    ("/v1/chat/completions", {"messages": says("\ud800")}, "messages.0.content"),
    ("/v1/chat/completions", {"messages": says("a"), "model": "x"}, "model: expected 'small'"),
    ("/v1/chat/completions", {"messages": says("a"), "size": "7x7", "modalities": ["image"]}, "image size"),
    ("/v1/images/generations", {"prompt": ""}, "prompt: expected at least 1 character, found 0"),
    ("/v1/images/generations", {"prompt": "a", "n": 11}, "n: expected less than or equal to 10, found 11"),
    (
        "/v1/images/generations",
        {"prompt": "a", "response_format": "url"},
        "response_format: expected 'b64_json', found 'url'",
    ),
    ("/v1/images/generations", {"prompt": "a", "seed": -1}, "seed: expected greater than or equal to 0, found -1"),
    ("/v1/images/generations", {"prompt": "a", "guidance_interval": [0.9, 0.1]}, "guidance_interval: expected shares"),
    ("/v1/images/generations", {"prompt": "a", "size": "64x64"}, "expected at most 256 positions"),
    ("/v1/images/generations", {"prompt": "a", "size": "520x8"}, "expected at most 128 pixels a side"),
]


PARAMS = {"messages", "messages.0.content", "temprature", "temperature", "prompt", "model", "size", "n"}
PARAMS |= {"response_format", "seed", "guidance_interval"}


@pytest.mark.parametrize(("path", "body", "message"), MISTAKES, ids=lambda value: str(value)[:40])
def test_mistakes_are_named(server: Running, path: str, body: dict[str, object], message: str) -> None:
    content = json.dumps(body).encode()
    reply = server.post(path, content=content, headers={"Content-Type": "application/json"})
    error = reply.json()["error"]
    assert message in error["message"]
    assert "\n" not in error["message"]
    assert reply.status_code == (404 if "model" in body else 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] in PARAMS


@pytest.mark.parametrize(
    ("fields", "files", "message"),
    [
        ({}, ["image"], "prompt: expected a value, found none"),
        ({"prompt": "a"}, [], "image: expected a file, found none"),
        ({"prompt": "a", "image": "text"}, [], "image.0: expected a file, found text"),
        ({"prompt": "a", "strenght": "1"}, ["image"], 'strenght: unknown field; did you mean "strength"?'),
        ({"prompt": "a", "strength": "2"}, ["image"], "strength: expected less than or equal to 1, found 2"),
        ({"prompt": "a", "strength": "1"}, ["image[]"] * 2, "image: expected one with strength or mask, found 2"),
        ({"prompt": "a"}, ["image", "mask", "mask"], "mask: expected at most 1 item, found 2"),
        ({"prompt": "a"}, ["image[]"] * 17, "image[]: expected at most 16 items, found 17"),
    ],
    ids=str,
)
def test_mistakes_in_a_form_are_named(server: Running, fields: dict[str, str], files: list[str], message: str) -> None:
    parts = [*((name, ("a.png", png())) for name in files), *((name, (None, text)) for name, text in fields.items())]
    reply = server.post("/v1/images/edits", files=parts)
    assert reply.status_code == 400
    assert message in reply.json()["error"]["message"]


def test_empty_fields_of_a_form_are_not_given(server: Running) -> None:
    """A web form sends every field."""
    empty = dict.fromkeys(("seed", "strength", "size", "model"), "")
    form = {"prompt": "a", "num_inference_steps": "2", **empty}
    assert server.post("/v1/images/edits", data=form, files={"image": ("a.png", png())}).status_code == 200


@pytest.mark.parametrize("name", IMAGES)
def test_hostile_pictures(server: Running, name: str) -> None:
    """Each is refused with its reason, in both ways in."""
    content = IMAGES[name]()
    url = content if isinstance(content, str) else data_url(content)
    body = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}
    replies = [server.post("/v1/chat/completions", body)]
    if isinstance(content, bytes):
        files = {"image": ("a.png", content)}
        replies.append(server.post("/v1/images/edits", files=files, data={"prompt": "a crab"}))
    for reply in replies:
        assert reply.status_code == 400, reply.text
        message = reply.json()["error"]["message"]
        assert "image" in message
        assert "expected" in message
        assert "Traceback" not in message
    assert len(IMAGES) >= 50


def test_other_paths_and_methods(server: Running) -> None:
    for reply, status in ((server.get("/nothing"), 404), (server.get("/v1/chat/completions"), 405)):
        assert reply.status_code == status
        assert reply.json()["error"]["type"] == "invalid_request_error"
    for body in (b"", b"{", b"[1]", b"\xff\xfe"):
        reply = server.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
        assert reply.status_code == 400
        assert reply.json()["error"]["message"]
