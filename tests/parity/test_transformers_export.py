"""An export opened by transformers' own classes: the same greedy text as Transfuse's engine, to and fro."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import RESULT, exported, hub, randomised, tiny
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    pipeline,
)

import transfuse
from transfuse.autoencoders import AutoencoderConfig, ImageAutoencoder, Pixels, VQTokenizer
from transfuse.cli import run
from transfuse.diffusion import DiffusionConfig
from transfuse.export import GenerationConfig as OurGenerationConfig
from transfuse.export import load_export, relayout, save_export
from transfuse.folders import MODELLING
from transfuse.inference import TransfusionPipeline
from transfuse.model_card import add_results, read_card
from transfuse.sequence import Tokenizer

TRUST = {"trust_remote_code": True}
KINDS = {
    "linear": {},
    "unet, fewer keys": {"adapter": "unet", "n_kv_heads": 2, "qk_norm": True},
    "causal, swin": {"image_attention": "causal", "norm_order": "swin", "qkv_bias": True},
    "two dimensions": {"positions": "2d", "patch_size": 1, "unet_channels": None, "patch_positions": "none"},
    "text": {"images": "none"},
    "window": {"sliding_window": 5, "n_layers": 3, "full_attention_layers": (1,)},
    "window, causal": {"sliding_window": 4, "image_attention": "causal"},
    "window of text": {"images": "none", "sliding_window": 2},
    "experts": {"experts": "all", "image_d_ff": 96},
    "experts, one norm": {"experts": "ffn", "tie_embeddings": True},
    "adaln": {"timestep": "adaln"},
    "learned positions": {"patch_positions": "learned", "nope_layers": (1,), "qk_norm": True, "qk_norm_type": "rms"},
    "codes": {
        "images": "codes", "codebook_size": 24, "patch_size": 1, "image_attention": "causal", "unet_channels": None,
        "patch_positions": "none",
    },
    "codes, experts": {
        "images": "codes", "codebook_size": 24, "patch_size": 1, "image_attention": "causal", "unet_channels": None,
        "patch_positions": "none", "experts": "all",
    },
}  # fmt: skip


def export(folder: Path, tokenizer: Tokenizer, **changes: object) -> Path:
    model = randomised(tiny(**changes))
    autoencoder = Pixels()
    if changes.get("images") == "codes":
        sizes = {"widths": (8, 16), "blocks": 1, "groups": 4, "latent_channels": 4, "codebook_size": 24}
        vq = ImageAutoencoder(AutoencoderConfig("vq", code_channels=4, **sizes)).initialise(0).requires_grad_(False)
        autoencoder = VQTokenizer(vq.eval())
    settings = (model.config, DiffusionConfig(), tokenizer, autoencoder, 8, OurGenerationConfig(), "a model")
    return save_export(folder, model.state_dict(), *settings)


def image(seed: int, side: int = 8) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def written(folder: Path, prompts: list[list], most: int = 12) -> list[str]:
    """What our engine writes after each prompt."""
    pipe = transfuse.load(str(folder))
    return [pipe.generate(prompt, draw="never", max_tokens=most).text for prompt in prompts]


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("kinds") / "export", tokenizer, **KINDS[request.param])


def test_writes_the_same_and_comes_back(folder: Path, tmp_path: Path) -> None:
    """Batched and padded, with and without images; saved by transformers, opened by us."""
    model, processor = (kind.from_pretrained(folder, **TRUST) for kind in (AutoModel, AutoProcessor))
    prompts: list[list] = [["a crab on a"], ["two balloons and the moon"], ["b"]]
    if model.config.model["images"] != "none":
        prompts += [[image(1)], ["before ", image(2), "after"], [image(3), image(4), "both"]]
    texts = ["".join(part if isinstance(part, str) else "<image>" for part in prompt) for prompt in prompts]
    images = [[part for part in prompt if not isinstance(part, str)] for prompt in prompts]
    inputs = processor(images=images, text=texts)
    ours = written(folder, prompts)
    assert len(set(ours)) > 1
    for options in ({}, {"use_cache": False}):
        ids = model.generate(**inputs, max_new_tokens=12, **options)[:, inputs["input_ids"].shape[1] :]
        assert processor.batch_decode(ids, skip_special_tokens=True) == ours
    twice = model.generate(**inputs, max_new_tokens=12, do_sample=True, num_return_sequences=2, temperature=1e-4)
    new = processor.batch_decode(twice[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert new == [text for text in ours for _ in range(2)], "images follow their rows"
    for part in (model, processor):
        part.save_pretrained(tmp_path / "saved")
    assert written(tmp_path / "saved", prompts) == ours
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", **TRUST)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("cache", ["past_key_values", "cache"])
def test_logits_equal_whatever_is_cached_padded_or_kept(cache: str, folder: Path) -> None:
    """The cache by both of its names: transformers 5.24 renamed it."""
    model, processor = (kind.from_pretrained(folder, **TRUST) for kind in (AutoModel, AutoProcessor))
    inputs = processor(text=["a crab on a red", "moon"])
    with torch.no_grad():
        whole = model(**inputs).logits
        alone = model(**processor(text="moon")).logits
        first = {name: value[:, :3] for name, value in inputs.items()}
        begun = model(**first, use_cache=True)
        rest = model(inputs["input_ids"][:, 3:], inputs["attention_mask"], **{cache: begun.past_key_values})
        last = model(**inputs, logits_to_keep=1).logits
    torch.testing.assert_close(whole[1, -alone.shape[1] :], alone[0])
    torch.testing.assert_close(rest.logits, whole[:, 3:])
    torch.testing.assert_close(last, whole[:, -1:])


def test_labels_give_the_loss_of_text(folder: Path) -> None:
    model, processor = (kind.from_pretrained(folder, **TRUST) for kind in (AutoModel, AutoProcessor))
    inputs = processor(text=["two balloons", "moon"])
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    output = model(**inputs, labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


def test_the_pipeline_captions_and_writes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = export(tmp_path / "export", tokenizer, adapter="unet")
    pipe = pipeline("image-text-to-text", model=str(folder), **TRUST)
    picture = image(5)
    (caption,) = transfuse.load(str(folder)).caption(picture, max_tokens=9)
    (answer,) = pipe(images=picture, text="<image>", max_new_tokens=9, return_full_text=False)
    assert answer["generated_text"].strip() == caption
    assert answer == pipe(images=picture, text="", max_new_tokens=9, return_full_text=False)[0] | {
        "input_text": "<image>"
    }
    (text,) = pipe(text="two ", max_new_tokens=9, return_full_text=False)
    assert text["generated_text"] == written(folder, [["two "]], 9)[0]
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "a"}]
    (chat,) = pipe(text=[{"role": "user", "content": content}], max_new_tokens=9, return_full_text=False)
    assert chat["generated_text"] == written(folder, [[picture, "a"]], 9)[0]


def test_configuration_and_generation_are_transformers_own(served: Path) -> None:
    config, generation = AutoConfig.from_pretrained(served, **TRUST), GenerationConfig.from_pretrained(served)
    tokenizer = load_export(served).tokenizer
    assert (config.hidden_size, config.num_hidden_layers, config.num_key_value_heads) == (64, 2, 4)
    assert (generation.bos_token_id, generation.do_sample, generation.max_new_tokens) == (tokenizer.bos, False, 64)
    assert generation.eos_token_id == [tokenizer.eos, tokenizer.boi]  # where ours would draw, `generate` stops
    assert tokenizer.eoi in generation.suppress_tokens
    with safe_open(served / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_an_export_of_before_is_readable_and_gets_what_it_lacks(served: Path, tmp_path: Path) -> None:
    """Settings of generation in generation_config.json, weights without metadata, no code."""
    from safetensors.torch import load_file, save_file

    old = Path(shutil.copytree(served, tmp_path / "old"))
    for name in ("generation_config.json", "processor_config.json", MODELLING):
        (old / name).unlink()
    settings = json.loads((old / "transfuse_generation.json").read_text()) | {"guidance_scale": 2.5}
    (old / "transfuse_generation.json").unlink()
    (old / "generation_config.json").write_text(json.dumps(settings))
    config = json.loads((old / "config.json").read_text())
    config = {name: value for name, value in config.items() if name != "auto_map" and not name.endswith("_token_id")}
    (old / "config.json").write_text(json.dumps(config))
    save_file(load_file(old / "model.safetensors"), old / "model.safetensors")
    assert load_export(old).generation.guidance_scale == 2.5
    assert run(["export", str(old), "--out", str(tmp_path / "new")]) == 0
    assert load_export(tmp_path / "new").generation.guidance_scale == 2.5
    assert {path.name for path in (tmp_path / "new").iterdir()} == {path.name for path in served.iterdir()}
    assert (tmp_path / "new" / "config.json").read_bytes() == (served / "config.json").read_bytes()
    model = AutoModel.from_pretrained(tmp_path / "new", **TRUST)
    assert torch.equal(model.embedding.weight, load_export(served).model.embedding.weight)
    relayout(old, tmp_path / "theirs", "diffusers")
    assert load_export(tmp_path / "theirs").generation.guidance_scale == 2.5


def test_mistakes_are_one_line(served: Path) -> None:
    model, processor = (kind.from_pretrained(served, **TRUST) for kind in (AutoModel, AutoProcessor))
    with pytest.raises(ValueError, match=r"^images: expected 2, as texts have <image>, found 1$"):
        processor(images=image(1), text="<image> and <image>")
    inputs = processor(images=image(1))
    with pytest.raises(ValueError, match=r"^pixel_values: expected those of the images in input_ids, found none$"):
        model(inputs["input_ids"])
    with pytest.raises(ValueError, match=r"^labels: expected \(1, 1\), as logits, found \(1, 67\)$"):
        model(**inputs, labels=torch.zeros(1, 67, dtype=torch.long), logits_to_keep=1)
    with pytest.raises(ValueError, match=r"^past_key_values: expected a dynamic cache, found a static one of"):
        model.generate(**inputs, max_new_tokens=4, cache_implementation="static")
    with pytest.raises(ValueError, match=r"^output_hidden_states: expected none"):
        model(**inputs, output_hidden_states=True)
    for wrong in ({"truncation": True, "max_length": 4}, {"padding": "max_length"}, {"return_tensors": "np"}):
        with pytest.raises(ValueError, match=r"^processor: expected padding to the longest, no truncation and torch's"):
            processor(text="a", **wrong)
    for text in (3, [], ["a", None]):
        with pytest.raises(ValueError, match=r"^text: expected a text, or a list of them, found "):
            processor(text=text)
    with pytest.raises(
        ValueError, match=r"^max_shard_size: expected at least \d+, for weights are one file, found 3KB$"
    ):
        model.save_pretrained("nowhere", max_shard_size="3KB")
    with pytest.raises(ValueError, match=r"^position_ids: expected none, for they follow from attention_mask"):
        model(inputs["input_ids"], position_ids=torch.arange(3)[None])
    with pytest.raises(ValueError, match=r"^text: expected <image> where an image stands, found the marker <\|eoi\|>$"):
        with_template(processor)(text="one <|eoi|> two")
    with pytest.raises(ValueError, match=r"^pixel_values: expected 1 images, found 0$"):
        model(**{**inputs, "pixel_values": inputs["pixel_values"][:, :0]})
    assert processor(images=image(1, side=30))["pixel_values"].shape == (1, 1, 8, 8, 3), "fitted as by --resize"


def with_template(processor: Any) -> Any:
    """A processor whose chat template writes markers, which its texts may have for that reason."""
    processor.chat_template = "{% for message in messages %}{{ bos_token + message['content'] }}{% endfor %}"
    return processor


def test_markers_that_are_typed_are_plain_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = export(tmp_path / "export", tokenizer)
    model, processor = (kind.from_pretrained(folder, **TRUST) for kind in (AutoModel, AutoProcessor))
    prompts = ["a <|boi|> crab", "<|bos|>moon", "two<|eos|>", "<|eoi|>"]
    inputs = processor(text=prompts)
    ids = model.generate(**inputs, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :]
    assert processor.batch_decode(ids, skip_special_tokens=True) == written(folder, [[prompt] for prompt in prompts], 8)
    marked = with_template(processor)(text="<|bos|>moon")["input_ids"].tolist()
    assert marked == processor(text="moon")["input_ids"].tolist()


def test_the_tokenizer_alone_joins_turns_and_may_begin_as_training_did(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = export(tmp_path / "export", tokenizer)
    theirs = AutoTokenizer.from_pretrained(folder, **TRUST)
    theirs.add_bos_token = True
    assert theirs("a crab")["input_ids"] == [tokenizer.bos, *tokenizer.encode("a crab")]
    messages = [{"role": "user", "content": "a crab "}, {"role": "assistant", "content": "on red"}]
    assert theirs.apply_chat_template(messages, tokenize=False) == "a crab on red"
    ours = load_export(folder).tokenizer
    assert (ours.fingerprint, ours.text_format) == (tokenizer.fingerprint, tokenizer.text_format)
    assert ours.encode("a crab") == tokenizer.encode("a crab")


def test_a_tuple_instead_of_an_object(served: Path) -> None:
    model, processor = (kind.from_pretrained(served, **TRUST) for kind in (AutoModel, AutoProcessor))
    inputs = processor(text="moon")
    logits, cache = model(**inputs, return_dict=False, use_cache=True)
    assert torch.equal(logits, model(**inputs).logits)
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]
    assert len(model(**inputs, return_dict=False, labels=inputs["input_ids"])) == 2


@pytest.mark.parametrize("how", ["push", "save"])
def test_uploads_keep_the_model_card(
    how: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that was opened by a relative path, from another working directory, too."""
    folder, done = export(tmp_path / "export", tokenizer), hub(tmp_path, monkeypatch)
    add_results(folder / "README.md", "crabs", [RESULT])
    monkeypatch.chdir(tmp_path)
    model, processor = (kind.from_pretrained("export", **TRUST) for kind in (AutoModel, AutoProcessor))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    if how == "push":
        model.push_to_hub("someone/crabs", private=True, commit_message="crabs", tags=["drawing"])
    else:
        model.save_pretrained("saved", push_to_hub=True, repo_id="someone/crabs", private=True, commit_message="crabs")
    assert done["create_repo"] == {"repo_id": "someone/crabs", "private": True, "token": None, "exist_ok": True}
    assert done["upload_folder"]["commit_message"] == "crabs"
    metadata, _ = read_card(tmp_path / "uploaded" / "README.md")
    assert metadata["model-index"] == read_card(folder / "README.md")[0]["model-index"]
    assert metadata.get("tags") == (["drawing"] if how == "push" else None)
    assert written(tmp_path / "uploaded", [["a crab"]]) == written(folder, [["a crab"]])
    processor.save_pretrained("words")
    assert Path("words", "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_without_the_package_one_line_says_so(served: Path) -> None:
    code = """
import sys
sys.modules["transfuse"] = None
from transformers import AutoConfig
try:
    AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
except ImportError as error:
    assert "no index has: install it from its repository, pip install . in a checkout" in str(error), error
    assert "pip install transfuse" not in str(error)
else:
    raise SystemExit("expected an ImportError")
"""
    subprocess.run([sys.executable, "-c", code, str(served)], check=True)


def test_the_pipeline_of_ours_is_unchanged_by_theirs(tokenizer: Tokenizer) -> None:
    """`TransfusionPipeline` needs no file of transformers."""
    assert isinstance(TransfusionPipeline(exported(tokenizer)).generate("a", draw="never", max_tokens=2).text, str)
