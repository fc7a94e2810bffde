"""Metrics of drawings: prompts are drawn once, and compared with their images, by CLIP, or by GenEval's own scorer.

`drawing`   Fréchet distance, KID, precision and recall against the images the prompts belong to
`denoising` the image loss of real pictures: what training minimises, on pairs it has not seen
`clip`      100 x the cosine of drawing and prompt, at least 0 (Hessel et al. 2021; Transfusion section 4.1)
`geneval`   no number: the prompts of GenEval (Ghosh et al. 2023) in its own folder layout, for its own scorer, which
            wants CUDA and packages of 2022

    geneval/guidance-G-seed-S-HASH/00000/metadata.jsonl             the line of evaluation_metadata.jsonl
    geneval/guidance-G-seed-S-HASH/00000/samples/0000.png .. 0003.png

    python evaluation/evaluate_images.py geneval/guidance-G-seed-S-HASH --outfile results.jsonl --model-path MASK2FORMER
    python evaluation/summary_scores.py results.jsonl
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import PIL.Image
import torch

from ..config import nearest, to_dict
from ..data.sources import document_images
from ..errors import UserError, install_command
from ..io import sha256
from ..log import logger, progress
from ..model import for_batch
from ..rng import generator_for
from ..sequence import Document, Text, collate
from .confidence import Estimate, bootstrap
from .context import EvalContext, Example, Metric, MetricResult, Result, extremes, first_of
from .generate import Made, Outcome, Task, short_hash
from .image_quality import (
    RESAMPLES,
    all_features,
    check_images,
    context_features,
    distance_name,
    frechet,
    kernel_distance,
    precision_recall,
)
from .pairs import Pairs, check_pairs, context_pairs, further_pairs

SHOWN, SHOWN_CLIP = 24, 12
LEVELS = 8  # of noise, evenly spaced over all timesteps
IMAGE_LOSS = "image loss"
CLIP_BATCH, CLIP_LEAST = 32, 2  # chance is the drawing of another prompt
CLIP_URL = "https://huggingface.co/openai/clip-vit-large-patch14, or what `open_clip.list_pretrained()` names"
GENEVAL_SAMPLES = 4
GENEVAL_URL = "https://github.com/djghosh13/geneval (prompts/evaluation_metadata.jsonl)"


# --- prompts drawn once -----------------------------------------------------------------------------------------------


def drawing_task(
    context: EvalContext,
    name: str,
    label: str,
    count: int,
    prompt: Callable[[int], Sequence[str | PIL.Image.Image]],
    record: Callable[[int], dict[str, Any]],
    candidates: int = 1,
) -> Task:
    """Return a task that answers each prompt with an image; image n has the seed `drawing.seed + n` in any batch.

    record      what is stored with image n
    candidates  images drawn per prompt, of which the model keeps one
    """
    drawing = context.drawing

    def work(numbers: Sequence[int]) -> list[Made]:
        requests = [
            replace(context.request(prompt(n)), draw="force", max_tokens=0, seed=drawing.seed + n) for n in numbers
        ]
        replies = context.pipe.replies(requests, candidates)
        return [Made(record(n), np.asarray(reply.images[0])) for n, reply in zip(numbers, replies, strict=True)]

    return Task(name, {"data": label, "drawing": to_dict(drawing)}, count, work)


def draw_prompts(context: EvalContext, name: str, label: str, ids: Sequence[str], prompts: Sequence[str]) -> Outcome:
    """Draw each prompt once, or read the images drawn before."""

    def record(n: int) -> dict[str, Any]:
        return {"id": ids[n], "prompt": prompts[n], "seed": context.drawing.seed + n}

    candidates = context.drawing.candidates
    task = drawing_task(context, name, label, len(prompts), lambda n: [prompts[n]], record, candidates)
    return context.make(task)


def drawn_pairs(context: EvalContext) -> tuple[Pairs, Outcome]:
    """Return the pairs and the images drawn for their prompts, shared by `drawing` and `clip`."""
    pairs = context_pairs(context)
    return pairs, draw_prompts(context, "drawings", pairs.label, pairs.ids, pairs.prompts)


# --- drawing ----------------------------------------------------------------------------------------------------------


def _drawing_names(context: EvalContext) -> tuple[str, str, str, str]:
    return distance_name(context), distance_name(context, "KID", "KD"), "precision", "recall"


def _score_drawing(context: EvalContext) -> MetricResult:
    pairs, drawn = drawn_pairs(context)
    network, count = context_features(context), len(pairs.ids)

    def distances(a: np.ndarray, resamples: int = RESAMPLES) -> list[Estimate]:
        return [frechet(a, real, resamples), kernel_distance(a, real), *precision_recall(a, real)]

    drawings, real = all_features(network, drawn.image, count), all_features(network, pairs.picture, count)
    ceilings: list[float | None] = [None] * 4
    others = further_pairs(context, count)
    if others is not None and len(others.ids) == count:
        further = all_features(network, others.picture, len(others.ids))
        ceilings = [estimate.value for estimate in distances(further, 2)]
    code = f"{context.version}, features {network.name}@{network.digest}"
    numbers = zip(_drawing_names(context), distances(drawings), ceilings, strict=True)
    results = [
        Result.of(name, estimate, "higher" if n > 1 else "lower", code, pairs.whole_label, ceiling=ceiling)
        for n, (name, estimate, ceiling) in enumerate(numbers)
    ]
    title = first_of(count, SHOWN, "drawings")
    examples = [
        Example(pairs.prompts[n], [(drawn.image(n), "drawn"), (pairs.picture(n), "real")], group=title)
        for n in range(min(SHOWN, count))
    ]
    return MetricResult(results, examples)


DRAWING = Metric(
    "drawing",
    "Fréchet distance, KID, precision and recall of drawings",
    lambda context: check_images(context, "drawing"),
    _score_drawing,
    _drawing_names,
    True,
    "Reference: other real pictures of the same data, as many, in place of the drawings, which can pass it; none where "
    "the data has fewer.",
)


# --- denoising --------------------------------------------------------------------------------------------------------


def _check_denoising(context: EvalContext) -> None:
    if (images := context.pipe.exported.model.config.images) != "latents":
        raise UserError(f"denoising: expected a model that denoises, found one of {images}")
    check_pairs(context, "denoising", 1)


@torch.inference_mode()
def _score_denoising(context: EvalContext) -> MetricResult:
    pairs, exported = context_pairs(context), context.pipe.exported
    model, process, form = exported.model, exported.process, exported.model.config.sequence_format(exported.tokenizer)

    def work(numbers: Sequence[int]) -> list[Made]:
        images = document_images(np.stack([pairs.picture(n) for n in numbers]), exported.autoencoder)
        texts = [Text(exported.tokenizer.encode(pairs.prompts[n])) for n in numbers]
        documents = [Document([text, image]) for text, image in zip(texts, images, strict=True)]
        batch = collate(documents, form, model.config.image_attention).to(context.device)
        if max(batch.documents) > model.config.max_seq_len:
            raise UserError(
                f"denoising: expected at most {model.config.max_seq_len} positions, found {max(batch.documents)}"
            )
        attend, x0 = for_batch(batch, model.compute_dtype, model.config), torch.stack(list(batch.latents))
        errors = torch.zeros(len(numbers), device=context.device)
        for level in range(LEVELS):
            # The same noise for every model, so that two of them, or two checkpoints, differ in nothing else.
            generators = [generator_for(0, "denoising", n, level) for n in numbers]
            noise = torch.stack([torch.randn(x0.shape[1:], generator=generator) for generator in generators]).to(x0)
            t = torch.full((len(numbers),), round((level + 0.5) / LEVELS * process.config.timesteps), device=x0.device)
            inputs = batch.input_ids, batch.position_ids, attend, batch.loss_positions, batch.patches
            predictions = model(*inputs, process.add_noise(x0, noise, t), t).predictions
            squares = (torch.stack(list(predictions)) - process.target(x0, noise, t)).square()
            errors += squares.flatten(1).mean(1) * process.weight(t) / LEVELS
        return [Made({"id": pairs.ids[n], "error": error}) for n, error in zip(numbers, errors.tolist(), strict=True)]

    task = Task("denoising", {"data": pairs.whole_label, "levels": LEVELS}, len(pairs.ids), work)
    errors = [record["error"] for record in context.make(task).records]
    code = f"{context.version}, {LEVELS} levels of noise, weighted {process.config.weighting}"
    return MetricResult([Result.of(IMAGE_LOSS, bootstrap(errors), "lower", code, pairs.whole_label)])


DENOISING = Metric(
    "denoising",
    "image loss of real pictures after their captions, as in training, at fixed levels of noise",
    _check_denoising,
    _score_denoising,
    lambda context: (IMAGE_LOSS,),
)


# --- CLIP score -------------------------------------------------------------------------------------------------------


def clip_scores(pictures: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Return float64 `[n]`, 0 to 100, of embeddings `[n, channel]` of images and their texts, of any norm."""
    a, b = (np.asarray(embeddings, dtype=np.float64) for embeddings in (pictures, texts))
    cosine = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return 100 * np.maximum(cosine, 0)


class Clip:
    """A model of open_clip (the extra `eval`) with local weights."""

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


def _check_clip(context: EvalContext) -> None:
    check_pairs(context, "clip", CLIP_LEAST)
    options = context.options
    if importlib.util.find_spec("open_clip") is None:
        raise UserError(f"clip: expected the package open_clip, found none; {install_command('eval')}")
    if options.clip is None or not options.clip.is_file():
        wanted = f"weights of {options.clip_model} for open_clip"
        given = "none" if options.clip is None else f"no {options.clip}"
        raise UserError(f"--clip: expected {wanted}, found {given}; from {CLIP_URL}")
    import open_clip

    known = open_clip.list_models()
    if options.clip_model not in known and ":" not in options.clip_model:  # local-dir:FOLDER is one, too
        raise UserError(f'--clip-model: unknown name "{options.clip_model}"{nearest(options.clip_model, known)}')


def _clip_names(context: EvalContext) -> list[str]:
    """Name the CLIP, since each has its own scale."""
    return [f"CLIP score, {context.options.clip_model}"]


def _score_clip(context: EvalContext) -> MetricResult:
    weights = context.options.clip
    assert weights is not None
    pairs, drawn = drawn_pairs(context)
    clip = Clip(context.options.clip_model, str(weights), context.device)
    batches = []
    with progress("clip", len(pairs.ids), unit="images") as bar:
        for start in range(0, len(pairs.ids), CLIP_BATCH):
            numbers = range(start, min(len(pairs.ids), start + CLIP_BATCH))
            prompts = [pairs.prompts[n] for n in numbers]
            drawings, texts = clip.embed([drawn.image(n) for n in numbers], prompts)
            batches.append((drawings, clip.embed([pairs.picture(n) for n in numbers], prompts)[0], texts))
            bar.advance(len(numbers))
    drawings, real, texts = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    scores = clip_scores(drawings, texts)
    result = Result.of(
        _clip_names(context)[0],
        bootstrap(scores),
        "higher",
        f"{context.version}, open_clip {context.options.clip_model}@{sha256(weights)[:8]}",
        pairs.whole_label,
        floor=float(clip_scores(np.roll(drawings, 1, 0), texts).mean()),
        ceiling=float(clip_scores(real, texts).mean()),
    )
    examples = [
        Example(f"{pairs.prompts[n]}  [{scores[n]:.1f}]", [(drawn.image(n), "drawn")], group=title)
        for n, title in extremes(scores, SHOWN_CLIP, "drawings", "score")
    ]
    return MetricResult([result], examples)


CLIP = Metric(
    "clip",
    "CLIP score of drawings with their prompts",
    _check_clip,
    _score_clip,
    _clip_names,
    True,
    "Chance: each prompt with the drawing of another. Reference: the real pictures with their prompts, which drawings "
    "can pass.",
)


# --- GenEval ----------------------------------------------------------------------------------------------------------


def _geneval_prompts(context: EvalContext) -> list[dict[str, Any]]:
    """Return the lines of the file. Raises UserError where it is missing, or has none with a prompt."""
    path = context.options.geneval
    if path is None or not path.is_file():
        given = "none" if path is None else f"no {path}"
        raise UserError(f"--geneval: expected evaluation_metadata.jsonl, found {given}; from {GENEVAL_URL}")
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if lines and all(isinstance(line["prompt"], str) for line in lines):
            return lines
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path}: expected JSON lines with a "prompt", found something else ({error})') from None
    raise UserError(f'{path}: expected JSON lines with a "prompt", found none')


def _draw_geneval(context: EvalContext) -> MetricResult:
    lines = _geneval_prompts(context)
    prompts = [line["prompt"] for line in lines for _ in range(GENEVAL_SAMPLES)]
    ids = [f"{n:05d}/{k:04d}" for n in range(len(lines)) for k in range(GENEVAL_SAMPLES)]
    drawn = draw_prompts(context, "geneval", f"geneval {short_hash(lines)}", ids, prompts)
    drawing, made = context.drawing, drawn.folder.name.rpartition("-")[2]  # other models have other folders
    folder = context.folder / "geneval" / f"guidance-{drawing.guidance_scale:g}-seed-{drawing.seed}-{made}"
    try:
        for number, line in enumerate(lines):
            place = folder / f"{number:05d}"
            (place / "samples").mkdir(parents=True, exist_ok=True)
            (place / "metadata.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
            for sample in range(GENEVAL_SAMPLES):
                source = drawn.path(number * GENEVAL_SAMPLES + sample)
                shutil.copyfile(source, place / "samples" / f"{sample:04d}.png")
    except OSError as error:
        raise UserError(f"{folder}: expected a folder to write to, found {error.strerror or error}") from None
    logger.info(f"geneval: {len(prompts)} pictures in {folder}; score them with GenEval's evaluate_images.py")
    first = range(0, min(SHOWN // 2, len(lines)) * GENEVAL_SAMPLES, GENEVAL_SAMPLES)
    title = first_of(len(lines), SHOWN // 2, "prompts") + ", the first drawing of each"
    return MetricResult([], [Example(prompts[n], [(drawn.image(n), "drawn")], group=title) for n in first])


GENEVAL = Metric(
    "geneval",
    "prompts of the original GenEval, drawn for its own scorer",
    _geneval_prompts,
    _draw_geneval,
    lambda context: (),
    True,
)
