"""The budget of damaged documents is a whole run's, however many ranks meet them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from transfuse.data import CorruptLog, CorruptSample
from transfuse.errors import UserError


def damage(number: int, source: str = "photos") -> CorruptSample:
    return CorruptSample(source, "shards/shard-00000.tar", str(number), "cut short")


def test_ranks_share_the_budget(tmp_path: Path) -> None:
    """Each meets different documents; the twelfth in all is one too many, whoever meets it, restarts included."""
    logs = [CorruptLog(tmp_path, {"photos": 1100}, 0.01, rank) for rank in range(3)]
    for number in range(10):
        logs[number % 3].add([damage(number)])
    logs = [CorruptLog(tmp_path, {"photos": 1100}, 0.01, rank) for rank in range(2)]  # resumed with fewer ranks
    logs[0].add([damage(10), damage(0, "prose")])
    for log in logs:
        log.add([damage(2), damage(10)])
    with pytest.raises(UserError, match=r"photos: 12 damaged documents, more than data\.max_errors 0\.01 lets pass"):
        logs[1].add([damage(11)])
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["quarantine-rank1.jsonl", "quarantine-rank2.jsonl", "quarantine.jsonl"]
    lines = [json.loads(line) for name in files for line in (tmp_path / name).read_text().splitlines()]
    assert sorted(int(line["key"]) for line in lines) == sorted([*range(12), 0]), "each document is named once"


def test_a_line_another_rank_is_writing_is_read_when_it_is_whole(tmp_path: Path) -> None:
    item, other = (CorruptLog(tmp_path, {}, 0.0, rank) for rank in range(2))
    other.add([damage(1)])
    path = tmp_path / "quarantine-rank1.jsonl"
    whole = path.read_text()
    path.write_text(whole + whole.replace('"1"', '"2"')[:30])
    item.add([damage(3)])
    assert item.known == {damage(1), damage(3)}
    path.write_text(whole + whole.replace('"1"', '"2"'))
    item.add([damage(4)])
    assert item.known == {damage(number) for number in (1, 2, 3, 4)}
