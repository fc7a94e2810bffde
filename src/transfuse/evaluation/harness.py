"""The Llama suite through lm-evaluation-harness (an extra): HellaSwag, PIQA, SIQA, WinoGrande, ARC-e, ARC-c, BoolQ.

Zero-shot ranked classification, as Transfusion section 4.1 has it; the mean over tasks is what its tables print. The
paper does not say whether it divides by length: both accuracies are given where a task has both. The harness fetches
data sets unless told otherwise, so it is told (`HF_DATASETS_OFFLINE`); task files of a folder may read local ones.

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
from ..inference import TransfusionPipeline
from ..log import logger
from ..sequence import Document, Text
from .bench import EvalContext, Metric
from .confidence import share
from .generate import short_hash
from .multiple_choice import continuation
from .result import MetricResult, Result
from .text import foretell, windows

LLAMA_SUITE = ("hellaswag", "piqa", "social_iqa", "winogrande", "arc_easy", "arc_challenge", "boolq")
INSTALL = "pip install 'transfuse[eval]'"
MAX_TOKENS = 256
"""written at most where a task does not say"""


def harness_model(pipe: TransfusionPipeline, batch: int = 32) -> Any:
    """The model as the harness wants it, an `lm_eval.api.model.LM`. Long contexts lose their beginning."""
    from lm_eval.api.model import LM

    exported = pipe.exported
    room = exported.model.config.max_seq_len - 1  # BOS takes one

    class TransfusionLM(LM):
        """Log-likelihoods and greedy text of one model, `batch` requests at a time."""

        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            documents = [_fitted(continuation(exported.tokenizer, *request.args), room) for request in requests]
            found = foretell(exported, documents, batch)
            return [(-float(one.nats.sum()), bool(one.likeliest.all())) for one in found]

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            sums = []
            for request in requests:
                tokens = exported.tokenizer.encode(request.args[0])
                cut = full_windows(tokens, room)
                documents = [Document([Text(tuple(a), predict=False), Text(tuple(b))], closed=False) for a, b in cut]
                sums.append(-sum(float(one.nats.sum()) for one in foretell(exported, documents, batch)))
            return sums

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            said: list[str] = []
            for start in range(0, len(requests), batch):
                said += self._written([request.args for request in requests[start : start + batch]])
            return said

        def _written(self, asked: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
            made = []
            for context, settings in asked:
                most = int(settings.get("max_gen_toks", MAX_TOKENS))
                ids = exported.tokenizer.encode(context)[-max(1, room - most) :]
                temperature = float(settings.get("temperature", 0.0)) if settings.get("do_sample") else 0.0
                request = replace(
                    pipe.request([]),
                    document=Document([Text(ids)], closed=False),
                    draw="never",
                    max_tokens=most,
                    temperature=temperature,
                )
                made.append(request)
            replies = pipe.replies(made)
            return [_until(reply.text, asked[n][1].get("until") or ()) for n, reply in enumerate(replies)]

        @property
        def tokenizer_name(self) -> str:
            return f"transfuse-{exported.tokenizer.fingerprint}"

    return TransfusionLM()


def _fitted(document: Document, room: int) -> Document:
    """With as much of the context as there is room for, the end of it; the continuation stays whole if it fits."""
    known, asked = document.parts
    assert isinstance(known, Text)
    assert isinstance(asked, Text)
    left = room - len(asked.ids)
    ids = known.ids[-left:] if left > 0 else ()
    return replace(document, parts=[replace(known, ids=ids), replace(asked, ids=asked.ids[:room])])


def full_windows(tokens: Sequence[int], room: int) -> list[tuple[Sequence[int], Sequence[int]]]:
    """(context, tokens to foretell): blocks of `room`, of which the last sees as much before it as fits."""
    cut = list(windows(tokens, room, room))
    start = room * (len(cut) - 1)
    return [*cut[:-1], (tokens[max(0, len(tokens) - room) : start], cut[-1][1])]


def _until(text: str, stops: str | Sequence[str]) -> str:
    """Up to the first of the texts at which writing ends."""
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.split(stop)[0] if stop else text
    return text


# --- as a measure -----------------------------------------------------------------------------------------------------


def _check(bench: EvalContext) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"harness: expected the package lm_eval, found none; install it with {INSTALL}")
    folder = bench.options.tasks_folder
    if folder is not None and not folder.is_dir():
        raise UserError(f"--tasks-folder: expected a folder of lm-evaluation-harness's task files, found no {folder}")
    known = set(_manager(bench).all_tasks)
    for task in bench.options.tasks or LLAMA_SUITE:
        if task not in known:
            raise UserError(f"--tasks: expected tasks of lm-evaluation-harness, or files for them, found {task}")


def _manager(bench: EvalContext) -> Any:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ.setdefault(name, "1")
    from lm_eval.tasks import TaskManager

    folder = bench.options.tasks_folder
    return TaskManager(include_path=None if folder is None else str(folder))


def _score(bench: EvalContext) -> MetricResult:
    import lm_eval

    tasks = list(bench.options.tasks or LLAMA_SUITE)
    logger.info(f"harness: {', '.join(tasks)}")
    try:
        found = lm_eval.simple_evaluate(
            model=harness_model(bench.pipe, bench.batch),
            tasks=tasks,
            num_fewshot=0,
            task_manager=_manager(bench),
            bootstrap_iters=0,
            log_samples=True,
        )
    except (OSError, ConnectionError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"harness: expected the tasks' data sets on this machine, found none ({reason})") from None
    said = f"lm_eval {lm_eval.__version__}, {bench.version}, 0-shot"
    findings = MetricResult([])
    by_name: dict[str, list[float]] = {"acc": [], "acc_norm": []}
    for task in tasks:
        scores, samples = found["results"][task], found["samples"][task]
        for name, values in by_name.items():
            if f"{name},none" not in scores:
                continue
            right = share([sample[name] for sample in samples])
            values.append(right.value)
            asked = short_hash([str(sample["doc"]) for sample in samples])
            data = f"{task} version {found['versions'].get(task)}, {len(samples)} questions, {asked}"
            findings.results.append(Result.of(f"{task} {name}", right, "higher", said, data, ceiling=1.0))
    for name, values in by_name.items():
        if values:
            mean = float(np.mean(values))
            findings.results.append(
                Result(f"mean {name}", mean, None, None, len(values), "higher", said, ", ".join(tasks))
            )
    return findings


def _numbers(bench: EvalContext) -> list[str]:
    """Both of each task: which a task has, its file alone knows."""
    return [
        f"{task} {name}" for task in (*(bench.options.tasks or LLAMA_SUITE), "mean") for name in ("acc", "acc_norm")
    ]


ABOUT = "the Llama suite through lm-evaluation-harness"
HARNESS = Metric("harness", ABOUT, _check, _score, _numbers, compared="Reference: every answer right.")
