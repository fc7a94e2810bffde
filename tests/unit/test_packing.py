"""The stateless shuffle: one to one, the same for numbers and arrays, and mixed like a shuffle."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfuse.data.packing import Shuffle


@given(st.integers(1, 3000), st.integers())
def test_one_to_one_and_alike_for_numbers_and_arrays(count: int, key: int) -> None:
    order = Shuffle(count, key)
    items = order(np.arange(count))
    assert sorted(items) == list(range(count))
    places = [0, count // 2, count - 1]
    assert [order(place) for place in places] == items[places].tolist()


def test_ten_million_are_one_to_one() -> None:
    seen = np.zeros(10_000_000, dtype=bool)
    for start in range(0, len(seen), 1_000_000):
        seen[Shuffle(len(seen), 0)(np.arange(start, start + 1_000_000))] = True
    assert seen.all()


def test_mixed_like_a_shuffle() -> None:
    """Items go anywhere, and independently of their neighbours, as with numpy's own permutation."""
    count = 100_003
    items = Shuffle(count, 1, "epoch", 0)(np.arange(count))
    assert abs(np.corrcoef(items, np.arange(count))[0, 1]) < 0.02
    assert abs(np.corrcoef(items[1:], items[:-1])[0, 1]) < 0.02
    cells = np.histogram2d(np.arange(count), items, bins=20)[0]
    chi_square = ((cells - count / 400) ** 2 / (count / 400)).sum()
    assert chi_square < 361 + 5 * np.sqrt(2 * 361)  # 19 x 19 degrees of freedom
    steps = np.abs(np.diff(items))
    assert steps.mean() == pytest.approx(count / 3, rel=0.02)
    assert (steps == 1).sum() < 20  # 2 expected


def test_keys_give_other_orders() -> None:
    first, second = (Shuffle(1000, 0, epoch)(np.arange(1000)) for epoch in (0, 1))
    assert (first == second).sum() < 10


@pytest.mark.parametrize("place", [-1, 5])
def test_outside(place: int) -> None:
    with pytest.raises(ValueError, match="expected 0 to 4"):
        Shuffle(5, 0)(place)
    with pytest.raises(ValueError, match="expected 0 to 4"):
        Shuffle(5, 0)(np.array([place]))
    with pytest.raises(ValueError, match="at least 1"):
        Shuffle(0, 0)
