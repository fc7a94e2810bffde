"""Pictures in terminals that draw sixels: the graphics decode to the picture, and only terminals that can get them."""

from __future__ import annotations

import os
import re
import select
import threading

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfuse.cli.chat import run_lengths, sixel, takes_sixel


def test_sixel_graphics_decode_to_the_picture() -> None:
    """A decoder of the format gives every pixel back, at a height that is no multiple of six; many colours nearly."""
    numbers = np.random.default_rng(1).integers(0, 4, (20, 33))
    flat = np.array([(0, 0, 0), (255, 255, 255), (204, 51, 0), (0, 102, 255)], dtype=np.uint8)[numbers]
    flat[5:9] = flat[0, 0]
    assert (decoded(sixel(PIL.Image.fromarray(flat))) == flat).all()
    across = np.linspace(0, 255, 64).astype(np.uint8)
    smooth = np.stack([np.tile(across, (50, 1)), np.tile(across[::-1], (50, 1)), np.full((50, 64), 90)], 2).astype(
        np.uint8
    )
    assert np.abs(decoded(sixel(PIL.Image.fromarray(smooth))) - smooth.astype(int)).max() <= 3


@given(st.lists(st.integers(0, 63).flatmap(lambda bits: st.integers(1, 300).map(lambda times: [bits] * times))))
def test_runs_of_sixels_expand_to_the_columns(runs: list[list[int]]) -> None:
    columns = [bits for run in runs for bits in run]
    assert expanded(run_lengths(columns)) == columns
    assert len(run_lengths(columns)) <= min(len(columns), 5 * len(runs))


def expanded(text: str) -> list[int]:
    """Return the columns of sixel characters, as a terminal reads them."""
    columns = []
    for count, character in re.findall(r"(?:!(\d+))?([?-~])", text):
        columns += [ord(character) - 63] * int(count or 1)
    return columns


def decoded(text: str) -> np.ndarray:
    """Return the image of sixel graphics, int `[row, column, 3]`; -1 where no colour was put."""
    header, body = re.fullmatch(r'\033P0;1q"1;1;(\d+;\d+)(.*)\033\\', text, re.DOTALL).groups()
    width, height = map(int, header.split(";"))
    image, palette = np.full((height + 6, width, 3), -1), {}
    for number, *parts in re.findall(r"#(\d+);2;(\d+);(\d+);(\d+)", body):
        palette[number] = [round(int(part) * 2.55) for part in parts]
    for at, band in enumerate(re.sub(r"#\d+;2;\d+;\d+;\d+", "", body).split("-")):
        for number, columns in re.findall(r"#(\d+)([^#$]*)", band):
            for column, bits in enumerate(expanded(columns)):
                for row in range(6):
                    if bits >> row & 1:
                        image[6 * at + row, column] = palette[number]
    assert (image[height:] == -1).all()
    return image[:height]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [(b"\033[?62;4;22c", True), (b"\033[?64;14;22c", False), (b"\033[?4c", True), (b"", False)],
)
def test_terminals_are_asked_for_sixel(monkeypatch: pytest.MonkeyPatch, answer: bytes, expected: bool) -> None:
    """By their device attributes; a terminal that says nothing, or a person who types, gets no graphics."""
    monkeypatch.setenv("TERM", "xterm-256color")
    far, near = os.openpty()
    questions: list[bytes] = []
    terminal = threading.Thread(target=lambda: (questions.append(os.read(far, 3)), os.write(far, answer)))
    terminal.start()
    assert takes_sixel(near, near, 0.5) is expected
    terminal.join()
    assert questions == [b"\033[c"]
    os.write(far, b"hel")  # typed ahead: not lost, and no question goes out
    while not select.select([far], [], [], 5)[0]:  # the echo: it has arrived
        pass
    os.read(far, 10)
    assert takes_sixel(near, near, 0.5) is None
    os.write(far, b"lo\n")
    with os.fdopen(os.dup(near), "rb") as line:
        assert line.readline() == b"hello\n"
    monkeypatch.setenv("TERM", "dumb")
    assert takes_sixel(near, near, 0.5) is False
