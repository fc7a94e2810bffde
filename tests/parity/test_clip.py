"""CLIP score through open_clip, where that package is: a small CLIP with random weights, saved and read again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import exported

from emoji_scenes import WorldConfig
from emoji_scenes.scorer import SceneScorer
from transfuse.errors import UserError
from transfuse.evaluation import Drawing, EvalConfig, EvalContext, evaluate, named
from transfuse.evaluation.drawings import Clip, clip_scores
from transfuse.inference import TransfusionPipeline

open_clip = pytest.importorskip("open_clip")
NAME = "ViT-S-32-alt"


def test_a_score_is_the_cosine_of_open_clip_s_own_embeddings(tokenizer, tmp_path) -> None:
    torch.manual_seed(0)
    model, _, prepare = open_clip.create_model_and_transforms(NAME)
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    clip = Clip(NAME, str(tmp_path / "clip.pt"))
    pictures = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    texts = ["a crab", "two balloons", "the moon"]
    import PIL.Image

    with torch.inference_mode():
        images = torch.stack([prepare(PIL.Image.fromarray(picture)) for picture in pictures])
        seen = model.eval().encode_image(images, normalize=True)
        words = model.encode_text(open_clip.get_tokenizer(NAME)(texts), normalize=True)
    expected = 100 * (seen * words).sum(1).clamp_min(0)
    np.testing.assert_allclose(clip_scores(*clip.embed(pictures, texts)), expected.numpy(), atol=1e-3)
    loaded = exported(tokenizer)
    loaded.image_size = 16
    world = WorldConfig(size=16, nouns=4, max_objects=1, max_count=1)
    options = EvalConfig(count=3, clip=tmp_path / "clip.pt", clip_model=NAME)
    bench = EvalContext(
        TransfusionPipeline(loaded), "a", tmp_path, SceneScorer(world), options, Drawing(sampler="ddim", steps=1)
    )
    result = next(result for outcome in evaluate(replace(bench), named(["clip"])) for result in outcome)
    assert result.name == f"CLIP score, {NAME}"
    assert 0 <= result.value <= 100
    with pytest.raises(UserError, match='--clip-model: unknown name "ViT-S-32-al"; did you mean "ViT-S-32-alt"'):
        list(evaluate(replace(bench, options=replace(options, clip_model="ViT-S-32-al")), named(["clip"])))
