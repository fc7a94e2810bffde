"""CLIP score: the agreement of drawings with their prompts (Hessel et al. 2021; Transfusion section 4.1).

The mean over drawings of 100 x the cosine of image and prompt, at least 0. It needs open_clip (the extra `eval`) and
its weights as a local file. The result names the CLIP, since each has its own scale.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch

from ..config import nearest
from ..errors import UserError
from ..io import sha256
from ..log import progress
from .confidence import bootstrap
from .context import EvalContext, Example, Metric, MetricResult, Result, extremes
from .image_quality import drawn_pairs
from .pairs import check_pairs

BATCH = 32
SHOWN = 12
LEAST = 2
"""Fewest images: chance is the drawing of another prompt."""
INSTALL = "pip install 'transfuse[eval]'"
WHERE = "https://huggingface.co/openai/clip-vit-large-patch14, or what `open_clip.list_pretrained()` names"


def clip_scores(pictures: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Return float64 `[n]`, 0 to 100, of embeddings `[n, channel]` of images and their texts, of any norm."""
    a, b = (np.asarray(embeddings, dtype=np.float64) for embeddings in (pictures, texts))
    cosine = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return 100 * np.maximum(cosine, 0)


class Clip:
    """A model of open_clip with local weights."""

    def __init__(self, name: str, path: str, device: torch.device | str = "cpu") -> None:
        import open_clip

        self.model, _, self.prepare = open_clip.create_model_and_transforms(name, pretrained=path)
        self.tokenizer: Any = open_clip.get_tokenizer(name)
        self.model.to(device).eval()
        self.device = device

    @torch.inference_mode()
    def embed(self, pictures: Sequence[np.ndarray], texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return embeddings `[n, channel]` of images uint8 `[row, column, 3]` and of texts, by CLIP's preprocessing."""
        images = torch.stack([self.prepare(PIL.Image.fromarray(picture)) for picture in pictures]).to(self.device)
        words = self.tokenizer(list(texts)).to(self.device)
        return self.model.encode_image(images).cpu().numpy(), self.model.encode_text(words).cpu().numpy()


def _check(context: EvalContext) -> None:
    check_pairs(context, "clip", LEAST)
    options = context.options
    if importlib.util.find_spec("open_clip") is None:
        raise UserError(f"clip: expected the package open_clip, found none; install it with {INSTALL}")
    if options.clip is None or not options.clip.is_file():
        given = "none" if options.clip is None else f"no {options.clip}"
        raise UserError(f"--clip: expected weights of {options.clip_model} for open_clip, found {given}; from {WHERE}")
    import open_clip

    known = open_clip.list_models()
    if options.clip_model not in known and ":" not in options.clip_model:  # local-dir:FOLDER is one, too
        raise UserError(f'--clip-model: unknown name "{options.clip_model}"{nearest(options.clip_model, known)}')


def _title(context: EvalContext) -> str:
    return f"CLIP score, {context.options.clip_model}"


def _score(context: EvalContext) -> MetricResult:
    assert context.options.clip is not None
    pairs, drawn = drawn_pairs(context)
    clip = Clip(context.options.clip_model, str(context.options.clip), context.device)
    drawings, real, texts = [], [], []
    with progress("clip", len(pairs.ids), unit="images") as bar:
        for start in range(0, len(pairs.ids), BATCH):
            numbers = range(start, min(len(pairs.ids), start + BATCH))
            prompts = [pairs.prompts[n] for n in numbers]
            images, words = clip.embed([drawn.image(n) for n in numbers], prompts)
            drawings.append(images)
            texts.append(words)
            real.append(clip.embed([pairs.picture(n) for n in numbers], prompts)[0])
            bar.advance(len(numbers))
    a, b, words = (np.concatenate(parts) for parts in (drawings, real, texts))
    scores = clip_scores(a, words)
    implementation = f"{context.version}, open_clip {context.options.clip_model}@{sha256(context.options.clip)[:8]}"
    result = Result.of(
        _title(context),
        bootstrap(scores),
        "higher",
        implementation,
        pairs.whole_label,
        floor=float(clip_scores(np.roll(a, 1, 0), words).mean()),
        ceiling=float(clip_scores(b, words).mean()),
    )
    return MetricResult(
        [result],
        [
            Example(f"{pairs.prompts[n]}  [{scores[n]:.1f}]", [(drawn.image(n), "drawn")], group=title)
            for n, title in extremes(scores, SHOWN, "drawings", "score")
        ],
    )


ABOUT = "CLIP score of drawings with their prompts"
COMPARED = (
    "Chance: each prompt with the drawing of another. Reference: the real pictures with their prompts, which drawings "
    "can pass."
)
CLIP = Metric("clip", ABOUT, _check, _score, lambda context: [_title(context)], True, COMPARED)
