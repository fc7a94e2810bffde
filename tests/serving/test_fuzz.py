"""Whatever fits, or does not fit, the server's own schema: never a 5xx, never a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from running import Running
from schemathesis import GenerationMode

pytestmark = pytest.mark.xdist_group("serving")
BRIEF = {"num_inference_steps": 3, "n": 2, "max_images": 1, "max_tokens": 4, "max_completion_tokens": 4}
"""at most so many, where more is asked for: what is fuzzed is the door, not the patience"""
MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)


@pytest.fixture(scope="module")
def server(served: Path) -> Iterator[Running]:
    with Running(served) as running:
        yield running


def brief(body: object) -> None:
    if isinstance(body, dict):
        body.pop("timeout", None)  # too little time is a 504, as it should be
        for name, most in BRIEF.items():
            if isinstance(body.get(name), (int, float)) and body[name] > most:
                body[name] = most
            if name == "num_inference_steps":
                body.setdefault(name, most)


@pytest.mark.parametrize("count", [25, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/images/generations", "/v1/images/edits", None])
def test_fuzz(server: Running, path: str | None, count: int) -> None:
    """Of each work route as many cases; of the others, together, too."""
    schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    operations = [operation for operation in operations if (operation.method.upper() == "POST") == (path is not None)]
    chosen = [operation for operation in operations if path in (None, operation.path)]
    modes = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]
    strategy = st.one_of(
        *(
            operation.as_strategy(generation_mode=mode)
            for operation in chosen
            for mode in modes
            if _may(operation, mode)
        )
    )
    statuses: dict[int, int] = {}

    @given(case=strategy)
    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
    def one(case: schemathesis.Case) -> None:
        brief(case.body)
        reply = case.call(timeout=60)
        statuses[reply.status_code] = statuses.get(reply.status_code, 0) + 1
        assert reply.status_code < 500, (reply.text, [line for line in server.log if not line[:16].isalnum()])
        assert "Traceback" not in reply.text
        if reply.status_code >= 400:
            error = reply.json()["error"]
            assert error["message"]
            assert "\n" not in error["message"]

    one()
    print(path, statuses)
    assert sum(statuses.values()) >= count
    assert server.metric("transfuse_worker_restarts") == 0


def _may(operation: object, mode: GenerationMode) -> bool:
    """What takes nothing can be asked for wrongly in no way."""
    return mode is GenerationMode.POSITIVE or bool(operation.body or operation.path_parameters)  # type: ignore[attr-defined]
