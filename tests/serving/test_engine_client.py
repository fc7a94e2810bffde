"""The engine client with a worker in this process: a scripted one, or a real one in a thread."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import BYTES, chained, linked
from fastapi.testclient import TestClient
from running import png, says

from transfuse.config import to_dict
from transfuse.errors import UserError
from transfuse.export import GenerationConfig, save_export
from transfuse.inference.events import Done, Event, Failed, ImageProgress, TextDelta
from transfuse.serving.app import build
from transfuse.serving.engine_client import EngineClient, QueueConfig, RequestStream, Share
from transfuse.serving.middleware import AccessConfig
from transfuse.serving.protocol import ApiError
from transfuse.serving.worker import Accepted, Job, Refused, Started, Worker, WorkerConfig
from transfuse.vocabulary import Vocabulary

pytestmark = pytest.mark.xdist_group("serving")
JOB = Job(("a",), {"seed": 0})


class Process:
    """A stand-in for a worker's process, which ends when its pipe is closed."""

    exitcode = -9

    def join(self, seconds: float) -> None:
        pass

    def is_alive(self) -> bool:
        return True

    def kill(self) -> None:
        self.killed = True


class Workers:
    """Starts workers that do nothing by themselves: a test reads what each gets, and sends in its name."""

    def __init__(self) -> None:
        self.pipes: list[Connection] = []
        self.description: object = {"name": "small", "steps": 20}

    def __call__(self, config: WorkerConfig) -> tuple[Process, Connection]:
        ours, workers = Pipe()
        self.pipes.append(workers)
        workers.send(self.description)
        return Process(), ours

    async def receive(self, count: int) -> list[int]:
        """Return the numbers of the next jobs that the newest worker gets."""
        return [(await asyncio.to_thread(self.pipes[-1].recv))[0] for _ in range(count)]

    def send(self, *messages: Any) -> None:
        self.pipes[-1].send(list(messages))

    async def die(self) -> None:
        """End the newest worker, and wait for the one that replaces it."""
        count = len(self.pipes)
        self.pipes[-1].close()
        await until(lambda: len(self.pipes) > count)


def with_client(script: Callable[[EngineClient, Workers], Awaitable[None]], **limits: Any) -> None:
    """Run a script with an engine client whose worker is ready."""

    async def run() -> None:
        workers = Workers()
        client = EngineClient(WorkerConfig("none"), QueueConfig(**{"share": 1.0, **limits}), workers)
        client.start()
        try:
            await until(lambda: client.model is not None)
            await script(client, workers)
        finally:
            await client.stop()

    asyncio.run(asyncio.wait_for(run(), 30))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


async def collect(
    client: EngineClient, streams: list[RequestStream], events: list[tuple[int, Event | None]], ping: float = 15.0
) -> None:
    """Add the events of streams to a list, until they end or fail."""
    async for event in client.events(streams, ping):
        events.append(event)


def test_a_job_that_kills_workers_is_read_twice_at_most() -> None:
    """The first of the jobs that no worker has accepted is tried once more; the others keep their turn."""

    async def script(client: EngineClient, workers: Workers) -> None:
        tasks = {name: asyncio.ensure_future(client.submit([JOB])) for name in ("runs", "waits", "kills", "follows")}
        await workers.receive(4)
        workers.send(Accepted(0, 1, 0, 9), Accepted(1, 1, 0, 9), Started(0))
        running, waiting = await tasks["runs"], await tasks["waits"]
        await until(lambda: client.streams[0].started is not None)
        await workers.die()
        assert await workers.receive(3) == [1, 2, 3], "the next worker gets those that did not run, in their order"
        with pytest.raises(ApiError, match="the worker ended"):
            await collect(client, running, [])
        workers.send(Accepted(1, 1, 0, 9))
        await workers.die()
        assert await workers.receive(2) == [1, 3]
        with pytest.raises(ApiError, match="the worker ended"):
            await tasks["kills"]
        workers.send(
            Accepted(1, 1, 0, 9), Accepted(3, 1, 0, 9), Started(1), TextDelta(1, "a", 7), Done(1, "stop", 1, 0, 0, 0)
        )
        events: list[tuple[int, Event | None]] = []
        await collect(client, waiting, events)
        assert [type(event) for _, event in events] == [TextDelta, Done]
        (follows,) = await tasks["follows"]
        client.cancel(follows)

    with_client(script)


def test_a_server_gives_up_on_workers_that_keep_dying() -> None:
    async def script(client: EngineClient, workers: Workers) -> None:
        await workers.die()
        await workers.die()
        workers.pipes[-1].close()
        await client.stopped.wait()
        assert client.failure == "the worker ended 3 times within a minute"
        with pytest.raises(ApiError, match="3 times"):
            await client.submit([JOB])

    with_client(script, restarts=2)


def test_jobs_of_one_request_are_accepted_together_or_not_at_all() -> None:
    async def script(client: EngineClient, workers: Workers) -> None:
        task = asyncio.ensure_future(client.submit([JOB, JOB]))
        await workers.receive(2)
        workers.send(Accepted(0, 1, 0, 9), Refused(1, "size: expected less"))
        with pytest.raises(UserError, match="size: expected less"):
            await task
        assert await workers.receive(1) == [0], "the accepted one is cancelled"
        task = asyncio.ensure_future(client.submit([JOB]))
        await workers.receive(1)
        workers.send(Accepted(2, 1, 0, 9))
        (running,) = await task
        with pytest.raises(ApiError, match="at most 2 requests"):
            await client.submit([JOB, JOB])
        task = asyncio.ensure_future(client.submit([JOB]))
        await workers.receive(1)
        workers.send(Accepted(3, 1, 0, 9))
        with pytest.raises(ApiError, match="at most 10 positions"):
            await task
        client.cancel(running)
        assert not client.streams

    with_client(script, requests=2, cost=10)


def test_events_of_several_streams_keep_their_index_and_their_order() -> None:
    """A preview that nobody has read makes way for the next; a failure ends the whole request."""

    async def script(client: EngineClient, workers: Workers) -> None:
        task = asyncio.ensure_future(client.submit([JOB, JOB]))
        await workers.receive(2)
        workers.send(Accepted(0, 1, 0, 9), Accepted(1, 1, 0, 9))
        streams = await task
        pixels = np.zeros((8, 8, 3), np.uint8)
        for step in range(1, 5):
            workers.send(ImageProgress(0, 0, step, 5, pixels=pixels), TextDelta(1, str(step), 7))
        await until(lambda: len(streams[1].queue) == 4)
        assert [event.step for event in streams[0].queue] == [4]
        workers.send(Done(1, "stop", 4, 0, 0, 0), Failed(0, "out of memory"))
        await until(lambda: not client.streams)
        events: list[tuple[int, Event | None]] = []
        with pytest.raises(ApiError, match="out of memory"):
            await collect(client, streams, events)
        texts = [event.text for index, event in events if index == 1 and isinstance(event, TextDelta)]
        assert texts == sorted(texts)

    with_client(script)


def test_nothing_new_is_answered_with_a_ping_until_the_deadline() -> None:
    async def script(client: EngineClient, workers: Workers) -> None:
        task = asyncio.ensure_future(client.submit([JOB], deadline=time.monotonic() + 0.5))
        await workers.receive(1)
        workers.send(Accepted(0, 1, 0, 9))
        streams, events = await task, list[tuple[int, Event | None]]()
        with pytest.raises(ApiError, match="the deadline passed") as expired:
            await collect(client, streams, events, ping=0.05)
        assert expired.value.status_code == 504
        assert events[2:] == [(0, None)] * len(events[2:]) != []
        assert await workers.receive(1) == [0], "the worker forgets it"

    with_client(script)


def test_what_still_runs_when_draining_ends_fails() -> None:
    async def script(client: EngineClient, workers: Workers) -> None:
        task = asyncio.ensure_future(client.submit([JOB]))
        await workers.receive(1)
        workers.send(Accepted(0, 1, 0, 9))
        streams = await task
        await client.drain(0.05)
        with pytest.raises(ApiError, match="the server stops") as stopped:
            await collect(client, streams, [])
        assert stopped.value.status_code == 503
        with pytest.raises(ApiError, match="takes nothing new"):
            await client.submit([JOB])

    with_client(script)


def test_a_worker_that_is_replaced_finishes_what_it_has() -> None:
    """Nothing is dropped by a reload: what waits and what runs ends where it began, and new requests go to the new."""

    async def script(client: EngineClient, workers: Workers) -> None:
        task = asyncio.ensure_future(client.submit([JOB, JOB]))
        await workers.receive(2)
        workers.send(Accepted(0, 1, 0, 9), Accepted(1, 1, 0, 9), Started(0))
        (old, _), old_worker = await task, client.worker
        assert old_worker is not None
        client.reload()
        await until(lambda: client.next is None and client.worker is not old_worker)
        assert client.model == {"name": "small", "steps": 20}
        new = asyncio.ensure_future(client.submit([JOB]))
        assert await workers.receive(1) == [2]
        workers.send(Accepted(2, 1, 0, 9))
        await new
        assert not hasattr(old_worker.process, "killed")
        workers.pipes[0].send([Done(0, "stop", 1, 0, 0, 0), Done(1, "stop", 1, 0, 0, 0)])
        await until(lambda: hasattr(old_worker.process, "killed"))
        assert [type(event) for event in old.queue] == [Done]
        assert list(client.streams) == [2]

    with_client(script)


def test_a_model_that_cannot_be_loaded_again_changes_nothing() -> None:
    async def script(client: EngineClient, workers: Workers) -> None:
        worker = client.worker
        workers.description = UserError("config.json: expected JSON, found something else")
        client.reload()
        await until(lambda: len(workers.pipes) == 2 and client.next is None)
        assert client.worker is worker
        client.check_ready()

    with_client(script)


def test_one_client_cannot_take_all_room() -> None:
    """A client has a share of requests and of cost, or what its key says; others still get in."""

    async def script(client: EngineClient, workers: Workers) -> None:
        client.check_room("a", count=4)
        for share, count in ((Share(), 5), (Share(requests=2), 3), (Share(requests=9), 9)):
            with pytest.raises(UserError, match=r"^n: expected at most .* at a time"):
                client.check_room("a", share, count)
        task = asyncio.ensure_future(client.submit([JOB] * 4, "a"))
        await workers.receive(4)
        workers.send(*(Accepted(number, 1, 0, 10) for number in range(4)))
        await task
        with pytest.raises(ApiError, match="4 requests of one client") as full:
            client.check_room("a")
        assert full.value.status_code == 429
        client.check_room("b")
        task = asyncio.ensure_future(client.submit([JOB], "b", Share(cost=5)))
        await workers.receive(1)
        workers.send(Accepted(4, 1, 0, 5))
        await task
        task = asyncio.ensure_future(client.submit([JOB], "b", Share(cost=5)))
        await workers.receive(1)
        workers.send(Accepted(5, 1, 0, 5))
        with pytest.raises(ApiError, match="at most 5 positions to compute of one client"):
            await task

    with_client(script, requests=8, share=0.5, cost=100)


def test_retry_after_is_when_there_is_room() -> None:
    """At a pace of one request in 0.4 s there is room for two after 0.8 s, and for four after 1.6 s."""

    async def script(client: EngineClient, workers: Workers) -> None:
        async def ask(number: int) -> None:
            task = asyncio.ensure_future(client.submit([JOB]))
            await workers.receive(1)
            workers.send(Accepted(number, 1, 0, 9), Started(number))
            await task

        for number in range(4):
            await ask(number)
        for number in range(12):
            await asyncio.sleep(0.4)
            workers.send(Done(number, "stop", 1, 0, 0, 0))
            await until(lambda: len(client.streams) == 3)
            await ask(number + 4)
        for count, seconds in ((2, "1"), (4, "2")):
            with pytest.raises(ApiError) as full:
                client.check_room("a", count=count)
            assert full.value.headers["Retry-After"] == seconds

    with_client(script, requests=4)


def test_a_request_that_would_never_have_room_is_a_mistake() -> None:
    """Too dear or too many alone: no time of waiting is named, and the field that makes it so is."""

    async def script(client: EngineClient, workers: Workers) -> None:
        drawing = Job(("a",), {"seed": 0, "draw": "force"})
        writing = Job(("a",), {"seed": 0, "draw": "never"})
        cases = (([drawing] * 2, 6, "^n: expected at most 10 positions .* found 12"),
                 ([drawing], 11, "^num_inference_steps: expected at most 10 positions .* found 11"),
                 ([writing], 11, "^max_tokens: expected at most 10 positions"))  # fmt: skip
        for jobs, cost, message in cases:
            task = asyncio.ensure_future(client.submit(jobs, "a"))
            numbers = await workers.receive(len(jobs))
            workers.send(*(Accepted(number, 1, 0, cost) for number in numbers))
            with pytest.raises(UserError, match=message):
                await task
            assert sorted(await workers.receive(len(jobs))) == numbers, "the worker forgets them"
        with pytest.raises(UserError, match=r"^n: expected at most 4 requests .* found 5"):
            await client.submit([drawing] * 5, "a")

    with_client(script, requests=8, share=0.5, cost=20)


def test_a_deadline_that_has_passed_costs_the_worker_nothing() -> None:
    async def script(client: EngineClient, workers: Workers) -> None:
        for _ in range(100):
            with pytest.raises(ApiError, match="the deadline passed") as late:
                await client.submit([JOB], deadline=time.monotonic())
            assert late.value.status_code == 504
        task = asyncio.ensure_future(client.submit([JOB]))
        assert await workers.receive(1) == [*client.streams], "the first that it gets"
        task.cancel()

    with_client(script)


def test_those_who_leave_hold_their_place_until_the_worker_has_read_them() -> None:
    """Else any number of jobs could wait in the pipe, each by a client that left at once."""

    async def script(client: EngineClient, workers: Workers) -> None:
        for _ in range(2):
            with pytest.raises(ApiError, match="the deadline passed"):
                await client.submit([JOB], deadline=time.monotonic() + 0.02)
        assert not client.streams
        with pytest.raises(ApiError, match="at most 2 requests") as full:
            await client.submit([JOB])
        assert full.value.status_code == 429
        assert await workers.receive(4) == [0, 0, 1, 1], "each job, and that it is cancelled"
        workers.send(Refused(0, "cancelled"), Accepted(1, 1, 0, 9))
        await until(lambda: not client.abandoned)
        client.check_room(count=2)
        with pytest.raises(ApiError, match="the deadline passed"):
            await client.submit([JOB], deadline=time.monotonic() + 0.02)
        await workers.die()
        await until(lambda: client.model is not None)
        client.check_room(count=2)

    with_client(script, requests=2)


def test_retry_after_counts_from_the_oldest_start_before_anything_has_ended() -> None:
    async def script(client: EngineClient, workers: Workers) -> None:
        task = asyncio.ensure_future(client.submit([JOB]))
        await workers.receive(1)
        workers.send(Accepted(0, 1, 0, 9), Started(0))
        await task
        await until(lambda: client.streams[0].started is not None)
        await asyncio.sleep(2.1)
        with pytest.raises(ApiError) as full:
            client.check_room("a")
        assert int(full.value.headers["Retry-After"]) >= 3

    with_client(script, requests=1)


def test_a_job_whose_cancellation_has_come_is_not_read(served: Path) -> None:
    """The worker reads all that has come before it prepares the next job."""
    worker = Worker(WorkerConfig(str(served), slots=1))
    ours, workers = Pipe()
    job = Job(("a crab",), {"seed": 0, "draw": "never", "max_tokens": 1})
    for number in range(40):
        ours.send((number, "a", job))
        ours.send((number, "a", None))
    ours.send((40, "a", job))
    thread = threading.Thread(target=worker.serve, args=(workers,), daemon=True)
    thread.start()
    ours.recv()
    replies: dict[int, list[object]] = {}
    while not any(isinstance(event, Done) for event in replies.get(40, [])):
        for event in ours.recv():
            replies.setdefault(event.request_id, []).append(event)
    assert all(replies[number] == [Refused(number, "cancelled")] for number in range(40))
    ours.send(None)
    thread.join(10)
    assert not thread.is_alive()


@contextmanager
def in_thread(folder: Path) -> Iterator[TestClient]:
    """Serve a model whose worker is a thread of this process."""

    def start(config: WorkerConfig) -> tuple[Process, Connection]:
        ours, workers = Pipe()
        threading.Thread(target=lambda: Worker(config).serve(workers), daemon=True).start()
        return Process(), ours

    client = EngineClient(WorkerConfig(str(folder), slots=1), QueueConfig(), start)
    with TestClient(build(client, lambda: AccessConfig(hosts=()))) as http:
        while http.get("/ready").status_code != 200:
            pass
        yield http


def test_what_became_of_a_prompt_is_in_the_reply(served: Path, tmp_path: Path) -> None:
    """The prompt as it was read, where that differs, and the words that training never showed; nothing otherwise."""
    folder = shutil.copytree(served, tmp_path / "export")
    known = Vocabulary(("a", "moon", "crab", "and", "on", "blue", "background"), synonyms={"lobster": "crab"})
    (folder / "vocabulary.json").write_text(json.dumps(to_dict(known)))
    drawn = {"num_inference_steps": 1, "prompt": "A Lobster and a zebra, a gnu and a zebra"}
    with in_thread(folder) as http:
        reply = http.post("/v1/images/generations", json={**drawn, "n": 2}).json()
        assert [image["revised_prompt"] for image in reply["data"]] == ["a crab and a zebra, a gnu and a zebra"] * 2
        assert reply["unknown_words"] == ["zebra", "gnu"]
        last = http.post("/v1/images/generations", json={**drawn, "stream": True}).text.split("data: ")[-1]
        assert json.loads(last)["revised_prompt"] == reply["data"][0]["revised_prompt"]
        assert json.loads(last)["unknown_words"] == ["zebra", "gnu"]
        file = {"image": ("a.png", png())}
        form = {"prompt": "moons", "num_inference_steps": "1", "strength": "0.5"}
        edited = http.post("/v1/images/edits", data=form, files=file).json()
        assert edited["data"][0]["revised_prompt"] == "moon"
        assert "unknown_words" not in edited
        chat = {"messages": [*says("a moon"), *says("a gnu")], "max_tokens": 0, "num_inference_steps": 1}
        assert http.post("/v1/chat/completions", json={**chat, "modalities": ["image"]}).json()["unknown_words"] == [
            "gnu"
        ]
        chat["max_tokens"] = 2
        assert "unknown_words" not in http.post("/v1/chat/completions", json={**chat, "modalities": ["text"]}).json()
        right = http.post("/v1/images/generations", json={**drawn, "prompt": "a crab on a blue background"}).json()
        assert "revised_prompt" not in right["data"][0]
        assert "unknown_words" not in right
        for route, sent in [
            ("images/generations", {"json": {**drawn, "strict": True}}),
            ("images/edits", {"data": {**form, "prompt": "a zebra", "strict": "true"}, "files": file}),
            ("chat/completions", {"json": {**chat, "strict": True, "modalities": ["image"]}}),
        ]:
            refused = http.post(f"/v1/{route}", **sent)
            assert refused.status_code == 400
            assert "expected words that the model knows, found" in refused.json()["error"]["message"]
        accepted = {**drawn, "prompt": "a LOBSTER on a blue background", "strict": True}
        assert (
            http.post("/v1/images/generations", json=accepted).json()["data"][0]["revised_prompt"].startswith("a crab")
        )


def test_a_cut_character_is_not_lost(tmp_path: Path) -> None:
    """Text may end within a character, before an image and at the end, in a whole response and in a stream."""
    start = BYTES.encode("?")[0]
    model = chained(linked(b"ab\xc3", BYTES.boi, start) | linked(b"cd\xe2\x82", BYTES.eos, BYTES.eoi))
    weights, defaults = model.model.state_dict(), GenerationConfig(guidance_scale=1.0)
    folder = save_export(
        tmp_path / "export",
        weights,
        model.model.config,
        model.process.config,
        BYTES,
        model.autoencoder,
        8,
        defaults,
        "",
    )

    body = {"messages": says("?"), "content_format": "parts"}
    with in_thread(folder) as http:
        parts = http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
        assert [part.get("text") for part in parts] == ["ab\ufffd", None, "cd\ufffd"]
        lines = http.post("/v1/chat/completions", json={**body, "stream": True}).text.split("\n\n")
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in lines if line.startswith("data: {")]
    written = ["[]" if "images" in delta else delta.get("content", "") for delta in deltas]
    assert "".join(written) == "ab\ufffd[]cd\ufffd"
