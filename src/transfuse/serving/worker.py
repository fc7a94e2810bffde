"""The worker: a process of its own with the model in it, which ticks while there is anything to do.

It hears jobs and cancellations through a pipe, and says what happens, tick by tick. It ends when the pipe does.
"""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..devices import Device, Precision, for_inference, keep_freed_memory, out_of_memory
from ..errors import UserError
from ..images import fit
from .messages import Accepted, Drawing, Drawn, Ended, Failed, Job, JobMessage, Ready, Refused, Said, Started

if TYPE_CHECKING:
    from ..inference import Event, Request, TransfusionPipeline
    from ..inference.model_runner import Guidance
    from ..inference.quantize import Quantize


OUT_OF_MEMORY = "out of memory: ask for fewer or smaller pictures, or a shorter text"


@dataclass(frozen=True)
class WorkerConfig:
    """model: export folder. slots: requests that run together. positions: of the cache, a slot; None: the context of
    the model, and what a picture needs beside it. guidance: "packed" or "sequential"; None: the faster one here.
    quantize: weights of the blocks in eight bits. compile: the blocks, before the first request. graphs: passes that
    come again are recorded, on CUDA. device, precision: where it computes, and in what."""

    model: str
    slots: int = 8
    positions: int | None = None
    guidance: Guidance | None = None
    quantize: Quantize | None = None
    compile: bool = False
    graphs: bool = True
    device: Device = "auto"
    precision: Precision = "auto"


def work(connection: Connection, config: WorkerConfig) -> None:
    """What the process does: load, say so, and serve until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, everybody in it hears; the other process decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    keep_freed_memory()
    try:
        try:
            worker = Worker(config)
        except UserError as error:
            connection.send(error)
            return
        connection.send(Ready(worker.facts()))
        worker.serve(connection)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # nobody listens any more
    except BaseException:
        traceback.print_exc()
        sys.exit(1)


class Worker:
    """An engine, and who asked for what in it."""

    def __init__(self, config: WorkerConfig) -> None:
        from ..inference import Engine, TransfusionPipeline

        self.config = config
        self.device, self.dtype = for_inference(config.device, config.precision)
        self.pipe = TransfusionPipeline.from_pretrained(
            config.model, self.dtype, self.device, config.quantize, config.compile, config.graphs
        )
        self.engine = Engine(self.pipe.engine.runner, config.slots, config.positions)
        self.jobs: dict[int, tuple[int, Request]] = {}
        """by the engine's number: the other side's, and what was asked"""
        self.pipe.warm_up(config.slots, config.guidance)

    def facts(self) -> dict[str, Any]:
        from ..model import Transfusion

        exported, runner = self.pipe.exported, self.pipe.exported.model.config
        folder = Path(self.config.model).resolve()
        whole = Transfusion.on_meta(runner)  # of the one that computes, some weights are packed away
        return {
            "name": folder.parent.name if folder.name == "export" else folder.name,
            "images": runner.images,
            "image_size": exported.image_size,
            "context": runner.max_seq_len,
            "parameters": sum(parameter.numel() for parameter in whole.parameters()),
            "fingerprint": exported.fingerprint,
            "slots": self.config.slots,
            "steps": exported.generation.sampler.steps,
            "sampler": exported.generation.sampler.name,
            "device": self.device,
            "precision": str(self.dtype).removeprefix("torch."),
            "quantize": self.config.quantize,
            "compile": self.config.compile,
            "graphs": self.engine.runner.record is not None,
            "guidance": self.engine.runner.guidance,
            "guidance_scale": exported.generation.guidance_scale,
            "temperature": exported.generation.temperature,
            "max_tokens": exported.generation.max_tokens,
        }

    def serve(self, connection: Connection) -> None:
        """Until the other side says None, or is gone."""
        while True:
            while connection.poll(0 if self.engine.busy else None):
                message = connection.recv()
                if message is None:
                    return
                for said in self.hear(*message):
                    connection.send([said])
            # Said before the tick, so that the other side knows who was running, should this process not live on.
            started = [self.jobs[number][0] for number in self.engine.schedule()]
            if started:
                connection.send([Started(number) for number in started])
            messages = [said for event in self.engine.step() for said in self.tell(event)]
            if messages:
                connection.send(messages)

    def hear(self, number: int, job: Job | None) -> Iterator[JobMessage]:
        """A job; None: forget the one of that number."""
        if job is None:
            for ours, (theirs, _) in list(self.jobs.items()):
                if theirs == number:
                    self.engine.cancel(ours)
                    del self.jobs[ours]
            return
        try:
            request = request_of(self.pipe, job)
            ours = self.engine.submit(request)
        except UserError as error:
            yield Refused(number, str(error))
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            yield Failed(number, OUT_OF_MEMORY)
        else:
            self.jobs[ours] = number, request
            prompt, cost = self.engine.cost(ours)
            yield Accepted(number, prompt, cost)

    def tell(self, event: Event) -> list[JobMessage]:
        """What an event of the engine's is to the client. One for whom memory does not suffice ends here."""
        if event.request_id not in self.jobs:  # it failed by an earlier event of this tick
            return []
        number, request = self.jobs[event.request_id]
        try:
            return list(self.told(event, number, request))
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            self.engine.cancel(event.request_id)
            del self.jobs[event.request_id]
            return [Failed(number, OUT_OF_MEMORY)]

    def told(self, event: Event, number: int, request: Request) -> Iterator[JobMessage]:
        from ..inference import events
        from ..inference.pictures import settings_of

        match event:
            case events.TextDelta(text=text) if text:
                yield Said(number, text)
            case events.ImageProgress(image=image, step=step, total=total, preview=preview):
                if request.preview_every and (preview is not None or step == total):
                    yield Drawing(number, image, step, total, None if preview is None else self.pixels(preview))
            case events.ImageEnd(image=image, latent=latent):
                yield Drawn(number, image, self.pixels(latent), settings_of(request, self.pipe.exported, image))
            case events.Done():
                del self.jobs[event.request_id]
                patches = self.engine.runner.drawn(request.size)[1] if event.images else 0
                count = patches * event.images
                yield Ended(number, event.reason, event.text_tokens, count, event.network_evaluations)
            case events.Failed(reason=reason):
                del self.jobs[event.request_id]
                yield Failed(number, reason)

    def pixels(self, latent: Any) -> np.ndarray:
        return self.pipe.exported.autoencoder.decode(latent[None])[0]


def request_of(pipe: TransfusionPipeline, job: Job) -> Request:
    """What a job asks of the engine. Raises UserError, one line, for what can not be."""
    from ..inference.sequence_state import with_image_guidance

    side = pipe.exported.image_size
    parts = [part if isinstance(part, str) else fit(part, side) for part in job.parts]
    request = pipe.request(parts, job.steps, None, job.sampler)
    if job.start is not None:
        mask = None if job.mask is None else fit(job.mask, side)
        request = replace(request, start=pipe.start(fit(job.start, side), job.strength, mask))
    settings = dict(job.settings)
    scale = settings.pop("image_guidance_scale", None)
    return with_image_guidance(replace(request, **settings), scale)
