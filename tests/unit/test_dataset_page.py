"""The page about data sets: every figure counted once more, captions that cannot become markup, nothing from afar."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from emoji_scenes import glosses
from transfuse.autoencoders import Pixels, open_autoencoder
from transfuse.data import DataSet, Packer, PairConfig, StoredImages, StoredTexts
from transfuse.data.building import build_set
from transfuse.data.building.prepare import BuildConfig
from transfuse.data.readers import Columns
from transfuse.errors import UserError
from transfuse.inspect_data import Limits, inspect_sources
from transfuse.recipes import preset
from transfuse.runs import open_sources, resolve
from transfuse.runs.sources import mixture
from transfuse.sequence import layout_document

pytestmark = pytest.mark.xdist_group("dataset_page")  # its fixtures are made once

BOLD = "a <b>bold</b> crab & \"friend\" <img src='http://x/'>"
MIXED = 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Sets of one tokenizer: scenes; pairs of which some are left out; text; stories of several pictures and sizes."""
    root = tmp_path_factory.mktemp("sets")
    config = BuildConfig(size=32, vocabulary=512, shard_size=20, heldout=0.1, columns=Columns(count=90))
    build_set("world", root / "scenes", config, workers=0)
    shared = replace(config, tokenizer=str(root / "scenes"), columns=Columns())
    pictures = root / "pictures"
    pictures.mkdir()
    captions = ["a crab", BOLD, "a", "a crab", "w" * 480]
    for number, caption in enumerate([*captions, None]):
        colour = np.full((40, 30 + number, 3), 50 * (number % 3), dtype=np.uint8)
        PIL.Image.fromarray(colour).save(pictures / f"{number}.png")
        if caption:
            (pictures / f"{number}.txt").write_text(caption)
    (pictures / "logo.svg").write_text("<svg/>")
    build_set(str(pictures), root / "pairs", replace(shared, min_caption=3, heldout=0.0), workers=0)
    (root / "words.txt").write_text("\n".join(glosses("heldout")[:150]))
    build_set(str(root / "words.txt"), root / "text", replace(shared, columns=Columns(split="line")), workers=0)
    for number, size in enumerate([(32, 32), (64, 32), (20, 50)]):
        PIL.Image.fromarray(np.full((*size, 3), 60 * number, dtype=np.uint8)).save(root / f"{number}.png")
    lines = [
        {
            "parts": [
                {"text": f"story {i} <i>"},
                *({"image": f"{(i + j) % 3}.png"} for j in range(i % 4)),
                {"text": "end"},
            ]
        }
        for i in range(60)
    ]
    (root / "stories.jsonl").write_text("\n".join(map(json.dumps, [*lines, {"parts": [{"image": "gone.png"}]}])))
    build_set(str(root / "stories.jsonl"), root / "stories", replace(shared, fit="bucket", multiple=8), workers=0)
    return root


@pytest.fixture(scope="module")
def names(folder: Path) -> list[str]:
    return [str(folder / name) for name in ("scenes", "pairs", "stories", "text")]


@pytest.fixture(scope="module")
def done(folder: Path, names: list[str], tmp_path_factory):
    out = tmp_path_factory.mktemp("inspection") / "deep"
    sources = (f"{names[0]},weight=2", *names[1:], "world", "glosses")
    return inspect_sources(sources, out, "pixels-32", 1024, Limits(samples=MIXED)), out, sources


def test_figures_of_a_set_are_those_of_its_documents(done, names: list[str]) -> None:
    report, out, _ = done
    assert json.loads((out / "report.json").read_text()) == report
    assert sorted(path.name for path in out.iterdir()) == ["index.html", "report.json"]
    assert list(report["sets"]) == names
    for name, result in report["sets"].items():
        data = DataSet(name)
        tokenizer, grammar = data.tokenizer(), data.tokenizer().sequence_format(8)
        tokens, taken, sizes = [], [], Counter()
        for split in ("train", "heldout") if data.manifest.heldout else ("train",):
            source = StoredTexts(data, 0, split)
            if data.manifest.kind == "pictures":
                source = StoredImages(data, tokenizer, Pixels(), PairConfig(caption_drop=0.0), 0, split)
            documents = [source.document(index, index) for index in range(source.epoch)]
            taken += [len(layout_document(document, grammar)) for document in documents]
            tokens += [sum(len(getattr(part, "ids", ())) for part in document.parts) for document in documents]
            sizes.update(image.latent.shape[1:] for document in documents for image in document.images)
        assert (result["documents"], result["pictures"], result["tokens"]) == (len(tokens), sizes.total(), sum(tokens))
        for key, values in (("tokens_per_document", tokens), ("positions_per_document", taken)):
            its = result[key]
            assert its["documents"] == len(values)
            assert its["mean"] == pytest.approx(np.mean(values))
            assert (its["median"], its["longest"]) == (np.median(values), max(values))
            assert sum(value <= its["percentile_95"] for value in values) >= 0.95 * len(values)
        assert {(rows, columns): count for rows, columns, count in result["sizes"]} == sizes
        assert [count for *_, count in result["sizes"]] == sorted(sizes.values(), reverse=True)
        files = [path for path in Path(name).rglob("*") if path.suffix in (".tar", ".tokens")]
        assert result["shards"] == len(files)
        on_disk = sum(path.stat().st_size for path in [*files, *Path(name).glob("*.npy")])
        assert 0 <= on_disk - result["bytes"] <= 5 * 256, "but for the heads of the index files"


def test_what_was_left_out_is_counted_and_named(done, names: list[str]) -> None:
    report, out, _ = done
    pairs = report["sets"][names[1]]
    assert (pairs["seen"], pairs["documents"], pairs["faulty"]) == (6, 3, 1)
    assert pairs["dropped"] == {"caption length": 1, "duplicate": 1}
    reasons = {line["key"]: line["reason"] for line in pairs["left_out"]}
    assert reasons["2.png"] == "caption length: 1 characters"
    assert reasons["logo.svg"] == "image format that is not read (.svg): write it as PNG"
    assert pairs["files"] == {"found": 12, "read": 11, "left out": 1}
    assert "5.txt" in reasons["5.png"]
    text = unescape((out / "index.html").read_text())
    for line in [*pairs["left_out"], *report["sets"][names[2]]["left_out"]]:
        assert f"{line['key']}</th><td>{line['reason']}</td>" in text
    assert "of 6 seen; 1 caption length; 1 duplicate; 1 faulty" in text
    assert "1 left out" in text
    assert pairs["settings"] == DataSet(names[1]).manifest.settings
    assert report["sets"][names[3]]["left_out"] == []


# --- the mixture ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stream(done):
    """The stream of a run with the preset, and the lengths of its first documents by source."""
    recipe = preset("pixels-32")
    recipe = resolve(replace(recipe, data=replace(recipe.data, sources=done[2])), here=False).recipe
    opened = open_sources(recipe.data)
    grammar = recipe.model.sequence_format(opened.tokenizer)
    result = mixture(recipe, opened, opened.tokenizer, grammar, Pixels())
    documents = [result.document(sample) for sample in range(MIXED)]
    return [(document.source, len(layout_document(document, grammar))) for document in documents]


def test_the_mixture_is_that_of_the_first_samples(done, stream) -> None:
    values = done[0]["mixture"]
    assert (values["samples"], values["share_of"], values["ends_after"]) == (MIXED, "positions", None)
    total = sum(length for _, length in stream)
    assert values["mean_positions"] == pytest.approx(total / MIXED)
    assert set(values["sources"]) == {source for source, _ in stream}
    for name, item in values["sources"].items():
        lengths = [length for source, length in stream if source == name]
        assert (item["samples"], item["positions"]) == (len(lengths), sum(lengths))
        assert item["share_of_documents"] == pytest.approx(len(lengths) / MIXED)
        assert item["share_of_positions"] == pytest.approx(sum(lengths) / total)
    for share in ("asked", "share_of_documents", "share_of_positions"):
        assert sum(item[share] for item in values["sources"].values()) == pytest.approx(1)
    scenes, pairs, stories, world, text, bundled = values["sources"].values()
    assert scenes["asked"] == pytest.approx(2 * 0.9 / 5)
    assert pairs["asked"] == stories["asked"] == world["asked"] == pytest.approx(0.9 / 5)
    assert text["asked"] == bundled["asked"] == pytest.approx(0.05)
    assert scenes["passes"] == scenes["samples"] / 81
    assert world["passes"] is None
    for item in values["sources"].values():
        assert item["share_of_positions"] == pytest.approx(item["asked"], abs=0.03)


def test_rows_hold_all_samples_and_no_others(done, stream) -> None:
    values = done[0]["rows"]
    lengths = np.array([length for _, length in stream] * 2)
    rows = Packer(lambda samples: lengths[np.asarray(samples)], 1024, window=MIXED)
    assert sorted(sample for row in range(values["rows"]) for sample in rows.row(row)) == list(range(MIXED))
    assert values["used"] == pytest.approx(lengths[:MIXED].sum() / (1024 * values["rows"]))
    sets = [item["positions_per_document"]["longest"] for item in done[0]["sets"].values()]
    assert (values["length"], values["longest"]) == (1024, max([*sets, lengths.max()]))


def test_rows_that_are_too_short(names: list[str], tmp_path: Path) -> None:
    report = inspect_sources((names[1], names[3]), tmp_path, "pixels-32", 100, Limits(samples=10))
    longest = report["rows"]["longest"]
    assert (longest > 100, report["rows"]["rows"], report["rows"]["used"]) == (True, None, None)
    assert longest == max(item["positions_per_document"]["longest"] for item in report["sets"].values()), (
        "seen or not yet"
    )
    assert "the longest document does not fit" in (tmp_path / "index.html").read_text()
    report = inspect_sources((names[1], names[3]), tmp_path, "pixels-32", longest, Limits(samples=10))
    assert report["rows"]["rows"] > 0


def test_epochs_and_a_last_stretch(names: list[str], tmp_path: Path) -> None:
    """A run of the preset would be longer than these sources last: here the page reports how long that is."""
    report = inspect_sources((f"{names[0]},epochs=2,final=9", f"{names[3]},epochs=1"), tmp_path, "pixels-32", 1024)
    assert report["mixture"]["samples"] == report["mixture"]["ends_after"] == 2 * 81 + 135
    assert [item["passes"] for item in report["mixture"]["sources"].values()] == [2, 1]
    assert [item["asked"] for item in report["mixture"]["sources"].values()] == pytest.approx([0.9, 0.1])
    values = [
        inspect_sources((names[0] + end, names[1]), tmp_path, "pixels-32", 1024, Limits(samples=50))["mixture"]
        for end in ("", ",final=9")
    ]
    assert values[0] == values[1], "the last stretch is left aside"


# --- the page ---------------------------------------------------------------------------------------------------------


def test_page_needs_nothing_from_elsewhere_and_shows_words_as_they_are(done) -> None:
    _, out, _ = done
    html = (out / "index.html").read_text()
    tags = "".join(re.findall(r"<[^>]*>", html))
    assert not re.search(r"@import|url\((?!#)|<script|<link|<iframe", html)
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'src="([^"]*)"', tags))
    assert "http" not in re.sub(r'alt="[^"]*"', "", tags)
    assert "<b>bold" not in html
    assert "<i>" not in html
    assert BOLD in unescape(html)
    assert f"{'w' * 160}\u2026</p>" in html
    assert not re.search(r"\b(nan|inf|None)\b", re.sub(r'src="[^"]*"|<details>.*?</details>', "", html))
    for words in glosses("heldout")[:1]:
        assert words[:60] in unescape(html)


def shown(out: Path) -> list[np.ndarray]:
    sources = re.findall(r'base64,([^"]*)"', (out / "index.html").read_text())
    return [np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(source)))) for source in sources]


def test_pictures_are_those_of_the_set(names: list[str], tmp_path: Path) -> None:
    inspect_sources((names[0],), tmp_path, "pixels-32", 1024)
    data = DataSet(names[0])
    numbers = np.linspace(0, 89, 40).round().astype(int).tolist()
    html = unescape((tmp_path / "index.html").read_text())
    result = shown(tmp_path)
    assert len(result) == 40
    for number, picture in zip(numbers, result, strict=True):
        stored = data.read(number)
        np.testing.assert_array_equal(picture, np.asarray(PIL.Image.open(io.BytesIO(stored.parts[0]))))
        assert f"{stored.parts[1]}</p>" in html
    assert "40 documents, evenly spread" in html


def test_captions_near_duplicates_and_tokens_are_shown(folder: Path, tmp_path: Path) -> None:
    """Counted once more: words by hand, the groups by which images were made of which, tokens joined to captions."""
    captions = [["one red cat", "a cat, red & small"], ["two hens"], ["one red cat"], ["the sea at night"]]
    for number, texts in enumerate(captions):
        coarse = np.random.default_rng(number % 3).integers(0, 200, (5, 5, 3), dtype=np.uint8)
        image = PIL.Image.fromarray(coarse).resize((64 + number, 64), PIL.Image.Resampling.BICUBIC)
        (tmp_path / "in").mkdir(exist_ok=True)
        PIL.Image.fromarray(np.asarray(image) + np.uint8(number)).save(tmp_path / "in" / f"{number}.png")
        (tmp_path / "in" / f"{number}.json").write_text(json.dumps({"captions": texts}))
    config = BuildConfig(size=32, tokenizer=str(folder / "scenes"), heldout=0.0)
    build_set(str(tmp_path / "in"), tmp_path / "set", config, workers=0)
    report = inspect_sources((str(tmp_path / "set"),), tmp_path / "out", "pixels-32", 1024)
    figures = report["sets"][str(tmp_path / "set")]
    assert figures["near_duplicates"] == {"groups": 1, "images": 2, "largest": 2}
    html = (tmp_path / "out" / "index.html").read_text()
    text = " ".join(unescape(re.sub("<[^>]*>", " ", html)).split())
    assert "2 documents share an image, exactly or nearly, with another. Each of their 1 groups" in text
    group = html[html.index("Near duplicates, the largest groups first") :]
    assert "2 documents, the first is 0" in group
    pictures = [base64.b64decode(data) for data in re.findall(r'base64,([^"]*)"', group)[:2]]
    data = DataSet(str(tmp_path / "set"))
    for number, picture in zip((0, 3), pictures, strict=True):  # the fourth image is made as the first one
        stored = np.asarray(PIL.Image.open(io.BytesIO(data.read(number).parts[0])))
        np.testing.assert_array_equal(np.asarray(PIL.Image.open(io.BytesIO(picture))), stored)
    flat = [caption for texts in captions for caption in texts]
    words = Counter(word.strip(",") for caption in flat for word in caption.split() if word != "&")
    assert f"{len(flat)} of {len(captions)} images" in text
    assert f"{len(set(flat))} with {len(words)} different words; most often " in text
    often = text.partition("most often ")[2].split(", ")[:2]
    assert {*often} == {"red", "cat"}
    lengths = sorted(map(len, flat))
    assert f"{lengths[2]} in the median; {lengths[0]} to {lengths[-1]}" in text
    tokens = sum(len(data.tokenizer().encode(caption)) for caption in flat)
    assert f"{tokens / words.total():.2f} of a tokenizer with {data.tokenizer().vocab_size} ids" in text
    rows = re.findall(r"<t[dh][^>]*>([^<]*)</t[dh]>", html.partition("What the tokenizer makes of captions")[2])[:3]
    assert [unescape(row).replace(" · ", "") for row in rows] == flat[:3]
    assert all(
        unescape(row).count(" · ") == len(data.tokenizer().encode(c)) - 1 for row, c in zip(rows, flat, strict=False)
    )


def test_large_sets_are_sampled_and_distant_ones_read_from_few_shards(
    names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    url = f"file://{names[0]}"
    limits = Limits(lengths=10, remote_shards=2)
    figures = inspect_sources((url,), tmp_path / "out", "pixels-32", 1024, limits)["sets"][url]
    assert figures["tokens_per_document"]["documents"] == figures["positions_per_document"]["documents"] == 10
    fetched = {path.name.partition("-")[2] for path in (tmp_path / "transfuse").glob("*.tar")}
    assert fetched == {"shard-00000.tar", "shard-00004.tar"}, "the first shard and the last, which is half full"
    assert len(shown(tmp_path / "out")) == 30


def test_damage_is_shown_in_its_place(folder: Path, tmp_path: Path) -> None:
    for name, place in (("pairs", 520), ("text", 3)):  # after the header in the tar
        shutil.copytree(folder / name, tmp_path / name)
        shard = tmp_path / name / DataSet(str(tmp_path / name)).shard(0)
        content = bytearray(shard.read_bytes())
        content[place] ^= 1
        shard.write_bytes(content)
    inspect_sources((str(tmp_path / "pairs"), str(tmp_path / "text")), tmp_path / "out", "pixels-32", 1024)
    html = (tmp_path / "out" / "index.html").read_text()
    assert len(re.findall(r"Damaged: \S+: [^<]*its content does not match its hash", html)) == 2
    assert len(shown(tmp_path / "out")) == 4, "two of three documents, which are shown as one image, too"


@pytest.fixture(scope="module")
def encoded(folder: Path) -> dict[str, Path]:
    config = BuildConfig(size=32, tokenizer=str(folder / "scenes"), heldout=0.0, columns=Columns(count=3))
    for kind in ("kl", "vq"):
        build_set("world", folder / kind, replace(config, autoencoder=f"{kind}-f4-small"), workers=0)
    return {kind: folder / kind for kind in ("kl", "vq")}


@pytest.mark.parametrize(("kind", "fitting"), [("kl", "latent-64"), ("vq", "chameleon-32")])
def test_latents_and_codes_are_decoded(encoded: dict[str, Path], tmp_path: Path, kind: str, fitting: str) -> None:
    data = DataSet(str(encoded[kind]))
    autoencoder = open_autoencoder(f"{kind}-f4-small")
    inspect_sources((data.path, "glosses"), tmp_path, fitting, 1024)
    for number, picture in enumerate(shown(tmp_path)):
        array = data.read(number).parts[0]
        if kind == "kl":
            expected = autoencoder.decode(torch.from_numpy(array.astype(np.float32))[None])
        else:
            expected = autoencoder.decode_codes(torch.from_numpy(array.astype(np.int64))[None])
        np.testing.assert_array_equal(picture, expected[0])
    assert len(shown(tmp_path)) == 3


def test_what_can_not_be_mixed_or_decoded_is_looked_at_all_the_same(encoded: dict[str, Path], tmp_path: Path) -> None:
    report = inspect_sources((str(encoded["kl"]),), tmp_path / "out", "pixels-32", 1024)
    assert report["mixture"] is report["rows"] is None
    assert "found those of kl-f4-small" in report["not_mixed"]
    assert report["not_mixed"] in unescape((tmp_path / "out" / "index.html").read_text())
    values = report["sets"][str(encoded["kl"])]
    patch = values["positions_per_document"]["median"] - values["tokens_per_document"]["median"] - 4
    assert patch == (32 // (8 * 4)) ** 2, "by the factor of the set's autoencoder"
    shutil.copytree(encoded["kl"], tmp_path / "strange")
    manifest = json.loads((tmp_path / "strange" / "manifest.json").read_text())
    manifest["encoding"]["fingerprint"] = "0123456789ab"
    (tmp_path / "strange" / "manifest.json").write_text(json.dumps(manifest))
    inspect_sources((str(tmp_path / "strange"),), tmp_path / "out", "pixels-32", 1024)
    html = (tmp_path / "out" / "index.html").read_text()
    assert "kl-f4-small (0123456789ab), which is not here" in html
    assert not shown(tmp_path / "out")
    assert html.count('<p class="text">') == 3


def test_a_model_of_text_alone(names: list[str], tmp_path: Path) -> None:
    report = inspect_sources((names[0], names[3]), tmp_path, "llama-32", 1024)
    assert report["sets"][names[0]]["positions_per_document"] is None
    assert list(report["mixture"]["sources"]) == [names[3]], (
        "where shares are of positions, pictures are no part of them"
    )
    assert report["mixture"]["sources"][names[3]]["share_of_positions"] == 1


def test_texts_longer_than_the_context_are_looked_at(folder: Path, tmp_path: Path) -> None:
    config = BuildConfig(tokenizer=str(folder / "scenes"), max_tokens=1024, columns=Columns(split="file"))
    build_set(str(folder / "words.txt"), tmp_path / "long", config, workers=0)
    report = inspect_sources((str(tmp_path / "long"),), tmp_path / "out", "pixels-32", 4096)
    assert (report["context"], report["needed"]) == (512, 1026)
    assert (
        "model.max_seq_len 512 is too short for its texts: 1,026 are needed"
        in (tmp_path / "out" / "index.html").read_text()
    )


def test_refusals(folder: Path, names: list[str], tmp_path: Path) -> None:
    def refused(message: str, *sources: str, name: str = "pixels-32", out: str = "out") -> None:
        with pytest.raises(UserError, match=message):
            inspect_sources(sources, tmp_path / out, name, 1024)

    refused("unknown name", names[0], name="dmeo")
    refused("expected a data set", str(tmp_path / "nothing"))
    config = BuildConfig(size=20, tokenizer=str(folder / "scenes"), columns=Columns(count=3))
    build_set("world", tmp_path / "odd", config, workers=0)
    refused("sides are multiples of 8 pixels", str(tmp_path / "odd"))
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    refused("file: expected a folder to write to", names[3], out="file")
