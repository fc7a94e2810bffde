"""The worker: a process that holds the model, and steps its engine while any request runs.

Jobs and cancellations come through a pipe. A thread reads them, encodes their texts and images, and hands them over
between two steps. After each step the worker sends a list of messages: the engine's events, with pixels in place of
latents, and the three below. It ends when the pipe is closed. Importing this file needs no torch, so that the HTTP
process starts at once.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..devices import Device, Precision, for_inference, keep_freed_memory, out_of_memory
from ..errors import UserError
from ..images import fit
from ..inference.events import Done, Event, Failed, ImageEnd, ImageProgress, ImageStart, TextDelta
from ..log import quiet
from ..vocabulary import PromptReading

if TYPE_CHECKING:
    from ..inference import Request
    from ..inference.model_runner import Guidance
    from ..inference.optimize import Quantize
    from ..sequence import Image

    Prepared = tuple[Request, tuple[PromptReading, ...]]

KERNELS = "64"
"""kernels that oneDNN, and torch for it, keep. By default both keep 1,024, which conversations fill with their lengths:
0.3 GB in all"""
OUT_OF_MEMORY = "out of memory: ask for fewer or smaller pictures, or a shorter text"


@dataclass(frozen=True)
class WorkerConfig:
    """The model, and how it computes."""

    model: str  # export folder, or a bundled model's name
    slots: int = 8  # requests that run together
    guidance: Guidance | None = None  # "packed" or "sequential"; None: the faster of the two, timed at the start
    quantize: Quantize | None = None  # eight-bit weights for the blocks
    compile: bool = False  # compile the blocks before the first request
    graphs: bool = True  # record and replay repeated passes, on CUDA
    device: Device = "auto"
    precision: Precision = "auto"


@dataclass(frozen=True, eq=False)
class Job:
    """A request that the model has not read; its images are cropped to the middle square and resized to its size."""

    parts: tuple[str | np.ndarray, ...]  # texts and uint8 RGB images `[row, column, 3]`, in order
    settings: dict[str, Any] = field(default_factory=dict)  # fields of `inference.Request`
    steps: int | None = None  # denoising steps; None, here and for `sampler`: the model's default
    sampler: str | None = None
    start: np.ndarray | None = None  # the image to begin from, with `strength`
    mask: np.ndarray | None = None  # bool `[row, column]` of its size, True to redraw
    strength: float = 1.0
    turns: tuple[tuple[str, int], ...] = ()  # who speaks, and how many parts; none: all parts are one prompt


@dataclass(frozen=True)
class Accepted:
    """A job waits for a slot."""

    request_id: int
    prompt_tokens: int  # positions of its prompt, `image_tokens` of them those of images
    image_tokens: int
    cost: int  # the most positions that the network computes for it
    readings: tuple[PromptReading, ...] = ()  # its texts as the model reads them, with the words that it does not know


@dataclass(frozen=True)
class Refused:
    """A job is invalid, and the reason in one line."""

    request_id: int
    reason: str


@dataclass(frozen=True)
class Started:
    """A request has a slot."""

    request_id: int


WorkerMessage = Accepted | Refused | Started | Event


def process_context() -> Any:
    """Return how processes of the server start.

    Where the system can, they are forked from one that has imported torch and done nothing else, so that one that
    replaces a dead one spends no seconds on imports.
    """
    if sys.platform == "win32":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["transfuse.inference.pipeline", "transfuse.serving.intake"])
    return context


def start_process(config: WorkerConfig) -> tuple[BaseProcess, Connection]:
    """Start a worker's process; return it and our end of its pipe."""
    context = process_context()
    ours, workers = context.Pipe()
    process = context.Process(target=work, args=(workers, config), name="transfuse-worker", daemon=True)
    process.start()
    workers.close()
    return process, ours


def work(connection: Connection, config: WorkerConfig) -> None:
    """Run the worker's process: send the model's description, or the UserError that prevents loading it, then serve."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; only the parent acts on it
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    keep_freed_memory()
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # read when the first product is computed
        os.environ.setdefault(name, KERNELS)
    try:
        try:
            worker = Worker(config)
        except UserError as error:
            connection.send(error)
            return
        worker.serve(connection)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the HTTP process has ended
    except BaseException:
        traceback.print_exc()
        sys.exit(1)


class WorkerProcess:
    """A worker as the HTTP process sees it: its pipe, and the description of its model (None: not loaded yet).

    Two threads carry messages to and from the pipe. One of them calls `start`, which returns the process and the pipe:
    the first process of a server imports torch, which takes seconds.
    """

    def __init__(
        self, start: Callable[[], tuple[Any, Connection]], on_message: Callable[[WorkerProcess, Any], None]
    ) -> None:
        self.start, self.on_message = start, on_message
        self.process: Any = None
        self.model: dict[str, Any] | None = None
        self.outbox: queue.SimpleQueue[tuple[int, str, Job | None] | None] = queue.SimpleQueue()
        self.stopped = False
        self.loop = asyncio.get_running_loop()
        threading.Thread(target=self._read, daemon=True).start()

    def stop(self) -> None:
        """End the process, which has nothing to lose."""
        self.stopped = True
        self.outbox.put(None)
        if self.process is not None and self.process.is_alive():
            self.process.kill()

    def _read(self) -> None:
        """Start the process, and carry messages from the pipe to the loop until it ends, in a thread."""
        try:
            self.process, self.connection = self.start()
        except OSError as error:
            failure = UserError(f"expected to start the worker's process, found {error}")
            self.loop.call_soon_threadsafe(self.on_message, self, failure)
            return
        if self.stopped:
            self.process.kill()
        threading.Thread(target=self._write, daemon=True).start()
        message: Any = ()
        while message is not None:
            try:
                message = self.connection.recv()
            except (EOFError, OSError):
                self.process.join(10)  # sets its exit code
                self.connection.close()
                message = None
            try:
                self.loop.call_soon_threadsafe(self.on_message, self, message)
            except RuntimeError:
                return  # the loop is closed

    def _write(self) -> None:
        """Carry jobs to the pipe, in a thread, so that the loop need not wait until the worker reads a large one."""
        message: Any = ()
        while message is not None:
            message = self.outbox.get()
            try:
                self.connection.send(message)  # None ends the worker
            except OSError:
                return  # `_read` reports it


class Worker:
    """An engine, and the client's number of each request in it."""

    def __init__(self, config: WorkerConfig) -> None:
        from ..inference import Engine, TransfusionPipeline

        self.config = config
        self.device, self.dtype = for_inference(config.device, config.precision)
        self.pipe = TransfusionPipeline.from_pretrained(
            config.model, self.dtype, self.device, config.quantize, config.compile, config.graphs
        )
        self.engine = Engine(self.pipe.engine.runner, config.slots)
        self.next_turn, self.turn = threading.Lock(), threading.Lock()
        self.requests: dict[int, tuple[int, Request]] = {}
        """the client's number and the request, by the engine's number"""
        self.pipe.warm_up(config.slots, config.guidance)

    @contextmanager
    def device_turn(self) -> Iterator[None]:
        """On a GPU, hold the device: one thread's work would break a graph that the other records.

        Whoever waits comes before the thread that had it last.
        """
        if self.device != "cuda":
            yield
            return
        with self.next_turn:
            self.turn.acquire()
        try:
            yield
        finally:
            self.turn.release()

    def describe(self) -> dict[str, Any]:
        """Return what a client may want to know about the model, as `/v1/models` shows it."""
        from ..model import Transfusion

        exported, folder = self.pipe.exported, Path(self.config.model).resolve()
        longest = max(map(len, exported.tokenizer.backend.get_vocab(with_added_tokens=True)))
        config, sampler = exported.model.config, exported.generation.sampler
        unpacked = Transfusion.on_meta(config)  # quantizing hides some of the parameters of the model that computes
        known = exported.vocabulary
        return {
            "name": folder.parent.name if folder.name == "export" else folder.name,
            "images": config.images,
            "image_size": exported.image_size,
            "chat_template": exported.tokenizer.text_format.chat_template is not None,
            "vocabulary": known and {"things": known.things, "colours": known.colours, "examples": known.examples},
            "context": config.max_seq_len,
            "max_characters": config.max_seq_len * longest,
            "parameters": sum(parameter.numel() for parameter in unpacked.parameters()),
            "fingerprint": exported.fingerprint,
            "slots": self.config.slots,
            "steps": sampler.steps,
            "sampler": sampler.name,
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
        """Send the model's description; then take jobs and send messages until None comes or the pipe is closed."""
        connection.send(self.describe())
        inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self.receive, args=(connection, inbox), daemon=True).start()
        while True:
            while not (self.engine.busy and inbox.empty()):
                order = inbox.get()
                if order is None:
                    return
                if isinstance(order, BaseException):
                    raise order
                if reply := self.take(*order):
                    connection.send([reply])
            with self.device_turn():
                # Sent before the step, so that the client knows which requests ran if this process dies in it.
                started = [self.requests[number][0] for number in self.engine.schedule()]
                if started:
                    connection.send([Started(request_id) for request_id in started])
                messages = [message for event in self.engine.step() if (message := self.outgoing(event))]
            if messages:
                connection.send(messages)

    def receive(self, connection: Connection, inbox: queue.SimpleQueue[Any]) -> None:
        """Put each job's request, or what refuses it, into the inbox; None at the end. Runs in a thread.

        Before each job all that has come is read: one whose cancellation has come, too, is refused and costs no work.
        """
        jobs: dict[int, tuple[str, Job]] = {}
        try:
            while True:
                while not jobs or connection.poll():
                    if (order := connection.recv()) is None:
                        inbox.put(None)
                        return
                    request_id, client, job = order
                    if job is not None:
                        jobs[request_id] = client, job
                    elif jobs.pop(request_id, None) is not None:
                        inbox.put((request_id, client, Refused(request_id, "cancelled")))
                    else:
                        inbox.put((request_id, client, None))
                request_id = next(iter(jobs))
                client, job = jobs.pop(request_id)
                inbox.put((request_id, client, self.prepare(request_id, job)))
        except (EOFError, OSError):
            inbox.put(None)
        except BaseException as error:
            inbox.put(error)

    def prepare(self, request_id: int, job: Job) -> Prepared | Refused | Failed:
        """Return the engine's request for a job with its texts as they were read, or why there is none."""
        try:
            return self.build(job)
        except UserError as error:
            return Refused(request_id, str(error))
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            return Failed(request_id, OUT_OF_MEMORY)

    def take(
        self, request_id: int, client: str, prepared: Prepared | Refused | Failed | None
    ) -> Accepted | Refused | Failed | None:
        """Submit a request to the engine; None cancels the one of that number."""
        if prepared is None:
            for number in [number for number, (other, _) in self.requests.items() if other == request_id]:
                self.engine.cancel(number)
                del self.requests[number]
            return None
        if isinstance(prepared, Refused | Failed):
            return prepared
        request, readings = prepared
        try:
            number = self.engine.submit(request, client)
        except UserError as error:
            return Refused(request_id, str(error))
        self.requests[number] = request_id, request
        tokens, cost = self.engine.cost(number)
        images = sum(image.latent.shape[-2] * image.latent.shape[-1] for image in request.document.images)
        patch = 1 if self.engine.grammar.first_code is not None else self.engine.grammar.patch_size**2
        return Accepted(request_id, tokens, images // patch, cost, readings)

    def build(self, job: Job) -> Prepared:
        """Return the engine's request for a job, and its texts as they were read. Raises UserError for a wrong one."""
        from ..inference.sequence_state import with_image_guidance
        from ..sequence import Image
        from ..sequence.chat import chat_prompt

        side = self.pipe.exported.image_size
        settings = dict(job.settings)
        draw, strict = settings.get("draw", "auto"), settings.pop("strict", False)
        parts: list[str | Image] = []
        readings: list[PromptReading] = []
        roles = [role for role, count in job.turns for _ in range(count)] or ["user"] * len(job.parts)
        with quiet():  # a server's log has no prompts
            for role, part in zip(roles, job.parts, strict=True):
                if isinstance(part, str):
                    read = self.pipe.read_prompt(part, strict, draw) if role == "user" else PromptReading(part)
                    readings.append(read)
                    parts.append(read.text)
                else:
                    with self.device_turn():
                        parts.append(Image(self.pipe.exported.autoencoder.encode(fit(part, side)[None])[0], False))
        # Images alone are captioned, which no template is for.
        talk = len(job.turns) > 1 or (len(job.turns) == 1 and len(readings) > 0)
        request = self.pipe.request([] if talk else parts, job.steps, None, job.sampler)
        if talk:
            rest = iter(parts)
            messages = [self.pipe.message(role, list(islice(rest, count))) for role, count in job.turns]
            request = replace(request, document=chat_prompt(self.pipe.exported.tokenizer, messages))
        if job.start is not None:
            mask = None if job.mask is None else fit(job.mask, side)
            with self.device_turn():
                request = replace(request, start=self.pipe.start(fit(job.start, side), job.strength, mask))
        scale = settings.pop("image_guidance_scale", None)
        return with_image_guidance(replace(request, **settings), scale), tuple(readings)

    def outgoing(self, event: Event) -> Event | None:
        """Return an event for the client, with its number and with pixels; None for one that it does not need.

        A request whose image cannot be decoded for lack of memory fails.
        """
        from ..inference.settings import settings_of

        if event.request_id not in self.requests:  # it failed at an earlier event of this step
            return None
        request_id, request = self.requests[event.request_id]
        exported, changes = self.pipe.exported, dict[str, Any]()
        try:
            match event:
                case ImageStart():
                    return None
                case TextDelta(text="", logprob=None):
                    return None
                case TextDelta(logprob=logprob, top_logprobs=top) if logprob is not None:
                    ids = [event.token, *(token for token, _ in top)]
                    changes = {"texts": tuple(exported.tokenizer.piece(token) for token in ids)}
                case ImageProgress(step=step, total=total, preview=preview):
                    if not request.preview_every or (preview is None and step != total):
                        return None
                    pixels = None if preview is None else exported.autoencoder.decode(preview[None])[0]
                    changes = {"preview": None, "latent": None, "pixels": pixels}
                case ImageEnd(image=image, latent=latent):
                    pixels = exported.autoencoder.decode(latent[None])[0]
                    changes = {"latent": None, "pixels": pixels, "settings": settings_of(request, exported, image)}
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            self.engine.cancel(event.request_id)
            event, changes = Failed(event.request_id, OUT_OF_MEMORY), {}
        if isinstance(event, Done | Failed):
            del self.requests[event.request_id]
        return replace(event, request_id=request_id, **changes)
