"""CLIP score: does a drawing go with its prompt, in the eyes of a CLIP (Hessel et al. 2021; Transfusion section 4.1)?

100 x the cosine of picture and prompt, not below 0, as a mean over drawings. It needs open_clip (an extra) and its
weights as a local file; which CLIP it was is part of the number, since each has its own scale.
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
from .bench import EvalContext, Metric
from .confidence import bootstrap
from .drawing import drawn_pairs
from .pairs import check_pairs
from .result import Example, MetricResult, Result, extremes

BATCH = 32
SHOWN = 12
LEAST = 2
"""pictures; chance is the drawing of another prompt"""
INSTALL = "pip install 'transfuse[eval]'"
WHERE = "https://huggingface.co/openai/clip-vit-large-patch14, or what `open_clip.list_pretrained()` names"


def clip_scores(pictures: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Of embeddings `[n, channel]` of pictures and of their texts, of any length: float64 `[n]`, 0 to 100."""
    a, b = (np.asarray(one, dtype=np.float64) for one in (pictures, texts))
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
        """Pictures uint8 `[row, column, 3]` and texts -> `[n, channel]` each; CLIP's own resize, antialiased."""
        images = torch.stack([self.prepare(PIL.Image.fromarray(picture)) for picture in pictures]).to(self.device)
        words = self.tokenizer(list(texts)).to(self.device)
        return self.model.encode_image(images).cpu().numpy(), self.model.encode_text(words).cpu().numpy()


def _check(bench: EvalContext) -> None:
    check_pairs(bench, "clip", LEAST)
    options = bench.options
    if importlib.util.find_spec("open_clip") is None:
        raise UserError(f"clip: expected the package open_clip, found none; install it with {INSTALL}")
    if options.clip is None or not options.clip.is_file():
        found = "none" if options.clip is None else f"no {options.clip}"
        raise UserError(f"--clip: expected weights of {options.clip_model} for open_clip, found {found}; from {WHERE}")
    import open_clip

    known = open_clip.list_models()
    if options.clip_model not in known and ":" not in options.clip_model:  # local-dir:FOLDER is one, too
        raise UserError(f'--clip-model: unknown name "{options.clip_model}"{nearest(options.clip_model, known)}')


def _title(bench: EvalContext) -> str:
    return f"CLIP score, {bench.options.clip_model}"


def _score(bench: EvalContext) -> MetricResult:
    assert bench.options.clip is not None
    pairs, drawn = drawn_pairs(bench)
    clip = Clip(bench.options.clip_model, str(bench.options.clip), bench.device)
    drawings, real, texts = [], [], []
    with progress("clip", len(pairs.ids), unit="images") as bar:
        for start in range(0, len(pairs.ids), BATCH):
            numbers = range(start, min(len(pairs.ids), start + BATCH))
            prompts = [pairs.prompts[n] for n in numbers]
            seen, said = clip.embed([drawn.image(n) for n in numbers], prompts)
            drawings.append(seen)
            texts.append(said)
            real.append(clip.embed([pairs.picture(n) for n in numbers], prompts)[0])
            bar.advance(len(numbers))
    a, b, words = (np.concatenate(parts) for parts in (drawings, real, texts))
    scores = clip_scores(a, words)
    implementation = f"{bench.version}, open_clip {bench.options.clip_model}@{sha256(bench.options.clip)[:8]}"
    result = Result.of(
        _title(bench),
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
CLIP = Metric("clip", ABOUT, _check, _score, lambda bench: [_title(bench)], True, COMPARED)
