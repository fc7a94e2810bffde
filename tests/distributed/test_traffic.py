"""FSDP2 sends in a step the bytes that `transfuse plan` calculates, and more processes cost no more each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import traffic
from processes import HERE, finished, torchrun

from transfuse.plan import sent_bytes

pytestmark = [pytest.mark.long, pytest.mark.xdist_group("ranks")]


def measured(folder: Path, ranks: int, dtype: str = "float32", replicate: int = 1) -> list[dict[str, float]]:
    finished(torchrun(ranks, str(HERE / "traffic.py"), dtype, str(replicate), str(folder)))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.parametrize(
    ("ranks", "dtype", "replicate"), [(2, "float32", 1), (2, "bfloat16", 1), (4, "float32", 1), (4, "float32", 2)]
)
def test_bytes_sent_are_those_of_the_plan(tmp_path: Path, ranks: int, dtype: str, replicate: int) -> None:
    """Gloo has no reduce-scatter: torch all-reduces instead, which sends twice as much."""
    element, shard = (4 if dtype == "float32" else 2), ranks // replicate
    planned = sent_bytes(traffic.CONFIG, ranks, shard, element)
    expected = planned["gather"] + 2 * planned["scatter"] + planned["replicate"]
    for reading in measured(tmp_path, ranks, dtype, replicate):
        assert reading["forward"] + reading["backward"] == pytest.approx(expected, rel=0.03)
        assert reading["forward"] == pytest.approx(element * planned["scatter"] / 4, rel=0.03), "all weights once"


def test_more_processes_cost_each_no_more(tmp_path: Path) -> None:
    """Weak scaling: each of 2 and of 4 processes has the work of 1. Seconds of the processor, which waiting is not."""
    seconds = {}
    for ranks in (1, 2, 4):
        (tmp_path / str(ranks)).mkdir()
        seconds[ranks] = max(reading["seconds"] for reading in measured(tmp_path / str(ranks), ranks))
    assert max(seconds[2], seconds[4]) < 1.5 * seconds[1], seconds
