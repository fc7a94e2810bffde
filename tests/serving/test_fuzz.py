"""Requests drawn from the server's own schema, valid and invalid: never a 5xx, never a traceback or others' words."""

from __future__ import annotations

import threading

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from running import Running
from schemathesis import GenerationMode

pytestmark = pytest.mark.xdist_group("serving")
BRIEF = {"num_inference_steps": 3, "n": 2, "max_images": 1, "max_tokens": 4, "max_completion_tokens": 4}
"""the most that a request may ask for: validation is tested, not long work"""
MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)


def brief(body: object) -> None:
    """Limit what a request asks for to `BRIEF`."""
    if isinstance(body, dict):
        body.pop("timeout", None)  # too short a timeout is a 504, rightly
        for name, most in BRIEF.items():
            if isinstance(body.get(name), (int, float)) and body[name] > most:
                body[name] = most
        body.setdefault("num_inference_steps", BRIEF["num_inference_steps"])


@pytest.mark.parametrize("count", [75, pytest.param(2500, marks=pytest.mark.long)])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/images/generations", "/v1/images/edits", None])
def test_fuzz(server: Running, path: str | None, count: int) -> None:
    """Try `count` cases of a route that generates, or of all other routes together."""
    schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
    operations = [operation.ok() for operation in schema.get_all_operations()]
    if path is None:
        operations = [operation for operation in operations if operation.method.upper() != "POST"]
    else:
        operations = [operation for operation in operations if operation.path == path]
    strategy = st.one_of(
        *(
            operation.as_strategy(generation_mode=mode)
            for operation in operations
            for mode in MODES
            # A route without input cannot get a wrong one.
            if mode is GenerationMode.POSITIVE or operation.body or operation.path_parameters
        )
    )
    statuses: dict[int, int] = {}
    secret, done = "meteorological antechamber", threading.Event()

    def other() -> None:
        while not done.is_set():
            server.post("/v1/images/generations", {"prompt": secret, "num_inference_steps": 2})

    @given(case=strategy)
    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
    def check(case: schemathesis.Case) -> None:
        brief(case.body)
        reply = case.call(timeout=60)
        statuses[reply.status_code] = statuses.get(reply.status_code, 0) + 1
        assert reply.status_code < 500, (reply.text, [line for line in server.log if "ERROR" in line])
        assert "Traceback" not in reply.text
        assert secret not in reply.text
        if reply.status_code >= 400:
            error = reply.json()["error"]
            assert error["message"]
            assert "\n" not in error["message"]

    client = threading.Thread(target=other)
    client.start()
    try:
        check()
    finally:
        done.set()
        client.join()
    print(path, statuses)
    assert sum(statuses.values()) >= count
    assert server.metric("transfuse_worker_restarts") == 0
