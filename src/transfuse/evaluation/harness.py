"""The Llama suite through lm-evaluation-harness: HellaSwag, PIQA, SIQA, WinoGrande, ARC-e, ARC-c, BoolQ.

Zero-shot ranked classification (Transfusion section 4.1); the paper's tables print the mean over tasks. The paper does
not say whether it divides by length: both accuracies are given where a task has both. `HF_DATASETS_OFFLINE` keeps the
harness from downloading data sets; task files of a folder may read local ones. It needs the extra `eval`.

    lm_eval.simple_evaluate(model=harness_model(pipe), tasks=["hellaswag"])      # or from your own code
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import UserError
from ..inference import TransfusionPipeline, score
from ..log import logger
from ..sequence import Document, Text
from .confidence import share
from .context import EvalContext, Metric, MetricResult, Result
from .generate import short_hash
from .multiple_choice import continuation
from .text import windows

LLAMA_SUITE = ("hellaswag", "piqa", "social_iqa", "winogrande", "arc_easy", "arc_challenge", "boolq")
INSTALL = "pip install 'transfuse[eval]'"
MAX_TOKENS = 256
"""Most tokens written where a task does not say."""


def harness_model(pipe: TransfusionPipeline, batch: int = 32) -> Any:
    """Return the model as an `lm_eval.api.model.LM`. Contexts that are too long lose their beginning."""
    from lm_eval.api.model import LM

    exported = pipe.exported
    room = exported.model.config.max_seq_len - 1  # BOS takes one

    class TransfusionLM(LM):
        """Log-likelihoods and greedy text of one model, `batch` requests at a time."""

        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            documents = [_truncated(continuation(exported.tokenizer, *request.args), room) for request in requests]
            return [
                (-float(scores.nll.sum()), bool(scores.is_argmax.all())) for scores in score(exported, documents, batch)
            ]

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            sums = []
            for request in requests:
                cut = full_windows(exported.tokenizer.encode(request.args[0]), room)
                documents = [Document([Text(tuple(a), predict=False), Text(tuple(b))], closed=False) for a, b in cut]
                sums.append(-sum(float(scores.nll.sum()) for scores in score(exported, documents, batch)))
            return sums

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            texts: list[str] = []
            for start in range(0, len(requests), batch):
                arguments = [request.args for request in requests[start : start + batch]]
                replies = pipe.replies([self._request(*pair) for pair in arguments])
                texts += [
                    _until(r.text, args[1].get("until") or ()) for r, args in zip(replies, arguments, strict=True)
                ]
            return texts

        def _request(self, context: str, settings: dict[str, Any]) -> Any:
            most = int(settings.get("max_gen_toks", MAX_TOKENS))
            ids = exported.tokenizer.encode(context)[-max(1, room - most) :]
            return replace(
                pipe.request([]),
                document=Document([Text(ids)], closed=False),
                draw="never",
                max_tokens=most,
                temperature=float(settings.get("temperature", 0.0)) if settings.get("do_sample") else 0.0,
            )

        @property
        def tokenizer_name(self) -> str:
            return f"transfuse-{exported.tokenizer.fingerprint}"

    return TransfusionLM()


def _truncated(document: Document, room: int) -> Document:
    """Return the document with the end of its context; the continuation stays whole if it fits."""
    context, ending = document.parts
    assert isinstance(context, Text)
    assert isinstance(ending, Text)
    left = room - len(ending.ids)
    ids = context.ids[-left:] if left > 0 else ()
    return replace(document, parts=[replace(context, ids=ids), replace(ending, ids=ending.ids[:room])])


def full_windows(tokens: Sequence[int], room: int) -> list[tuple[Sequence[int], Sequence[int]]]:
    """Return (context, tokens to score): blocks of `room`, the last one with as much context as fits."""
    cut = list(windows(tokens, room, room))
    start = room * (len(cut) - 1)
    return [*cut[:-1], (tokens[max(0, len(tokens) - room) : start], cut[-1][1])]


def _until(text: str, stops: str | Sequence[str]) -> str:
    """Return the text up to the first stop string."""
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.split(stop)[0] if stop else text
    return text


# --- the metric -------------------------------------------------------------------------------------------------------


def _check(context: EvalContext) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"harness: expected the package lm_eval, found none; install it with {INSTALL}")
    folder = context.options.tasks_folder
    if folder is not None and not folder.is_dir():
        raise UserError(f"--tasks-folder: expected a folder of lm-evaluation-harness's task files, found no {folder}")
    known = set(_task_manager(context).all_tasks)
    for task in context.options.tasks or LLAMA_SUITE:
        if task not in known:
            raise UserError(f"--tasks: expected tasks of lm-evaluation-harness, or files for them, found {task}")


def _task_manager(context: EvalContext) -> Any:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ.setdefault(name, "1")
    from lm_eval.tasks import TaskManager

    folder = context.options.tasks_folder
    return TaskManager(include_path=None if folder is None else str(folder))


def _score(context: EvalContext) -> MetricResult:
    import lm_eval

    tasks = list(context.options.tasks or LLAMA_SUITE)
    logger.info(f"harness: {', '.join(tasks)}")
    try:
        output = lm_eval.simple_evaluate(
            model=harness_model(context.pipe, context.batch),
            tasks=tasks,
            num_fewshot=0,
            task_manager=_task_manager(context),
            bootstrap_iters=0,
            log_samples=True,
        )
    except (OSError, ConnectionError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"harness: expected the tasks' data sets on this machine, found none ({reason})") from None
    implementation = f"lm_eval {lm_eval.__version__}, {context.version}, 0-shot"
    results = []
    by_name: dict[str, list[float]] = {"acc": [], "acc_norm": []}
    for task in tasks:
        scores, samples = output["results"][task], output["samples"][task]
        for name in [name for name in by_name if f"{name},none" in scores]:
            right = share([sample[name] for sample in samples])
            by_name[name].append(right.value)
            digest = short_hash([str(sample["doc"]) for sample in samples])
            data = f"{task} version {output['versions'].get(task)}, {len(samples)} questions, {digest}"
            results.append(Result.of(f"{task} {name}", right, "higher", implementation, data, ceiling=1.0))
    for name, values in by_name.items():
        if values:
            mean, count, data = float(np.mean(values)), len(values), ", ".join(tasks)
            results.append(Result(f"mean {name}", mean, None, None, count, "higher", implementation, data))
    return MetricResult(results)


def _numbers(context: EvalContext) -> list[str]:
    """Return both names of each task: only the task's file knows which it has."""
    tasks = (*(context.options.tasks or LLAMA_SUITE), "mean")
    return [f"{task} {name}" for task in tasks for name in ("acc", "acc_norm")]


HARNESS = Metric(
    "harness",
    "the Llama suite through lm-evaluation-harness",
    _check,
    _score,
    _numbers,
    compared="Reference: every answer right.",
)
