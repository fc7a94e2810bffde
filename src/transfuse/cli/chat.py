"""`transfuse chat`: a conversation in words and pictures, in a terminal or through a pipe."""

from __future__ import annotations

import base64
import io
import os
import re
import select
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from ..errors import UserError
from .options import Flat
from .writing import ModelChoice, read_picture, save_picture

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image

    from ..inference import TransfusionPipeline

HELP = """/image PATH   show the model a picture, with what you say next
/save [PATH]  keep the last picture it drew
/seed N       of what is drawn and sampled from here on
/new          forget the conversation
/quit         leave; so does the end of the input"""

KITTY_CHUNK = 4096
"""characters of base64 that the kitty protocol takes at a time"""


@dataclass(frozen=True)
class ChatOptions:
    """Options of a conversation."""

    out: Path = Path("out")
    """folder for the images"""
    seed: int = 0
    """of the first turn; each turn counts it up"""
    draw: Literal["auto", "force", "never"] = "auto"
    """force: every reply begins with an image; never: words only"""
    resize: bool = False
    """crop and resize images shown to the model, instead of refusing those of another size"""
    system: str | None = None
    """system prompt, for a model with a chat template; None: the template's own"""


def chat(*, model: ModelChoice, options: Annotated[ChatOptions, Flat]) -> int:
    """Talk with a model in words and images; it decides when to draw.

    $ transfuse chat --model runs/demo/export

    Images are shown where the terminal can (kitty, iTerm2, WezTerm, sixel), and saved elsewhere. /help lists what else
    can be typed.
    """
    session = _Session(model.load(), options)
    for line in _lines():
        try:
            if line == "/quit":
                break
            session.run(line)
        except (UserError, MemoryError) as error:
            print(f"transfuse: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print("\nstopped: this turn is forgotten", file=sys.stderr)
    return 0


def _lines() -> Iterator[str]:
    """Yield the lines typed, stripped, with a prompt on a terminal."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line:
            yield line


class _Session:
    """A conversation, and the images to send with the next line."""

    def __init__(self, pipe: TransfusionPipeline, options: ChatOptions) -> None:
        from ..inference import Conversation

        self.options, self.pipe = options, pipe
        self.conversation = Conversation(self.pipe, self.options.system)
        self.shown: list[np.ndarray] = []
        self.seed, self.images = options.seed, 0
        self.last: tuple[PIL.Image.Image, dict[str, Any]] | None = None
        self.sixel: bool | None = None

    def run(self, line: str) -> None:
        """Run one line. Raises UserError for a line that cannot be run, and then changes nothing."""
        from ..inference import Conversation

        command, _, rest = line.partition(" ")
        rest = rest.strip()
        match command:
            case "/help":
                print(HELP)
            case "/image":
                side = self.pipe.exported.image_size
                self.shown.append(read_picture(Path(rest).expanduser(), side, self.options.resize))
            case "/save":
                self.save(rest)
            case "/seed":
                if not rest.isdecimal():
                    raise UserError(f"/seed: expected a number, found {rest or 'none'}")
                self.seed = int(rest)
            case "/new":
                self.conversation, self.shown = Conversation(self.pipe, self.options.system), []
            case _ if line.startswith("/"):
                raise UserError(f"chat: expected one of the commands that /help lists, found {command}")
            case _:
                self.reply(line)

    def save(self, path: str) -> None:
        """Save the last image. Raises UserError where there is none."""
        if self.last is None:
            raise UserError("/save: expected a picture to save, found none drawn yet")
        where = Path(path).expanduser() if path else self.options.out / f"chat-{self.images - 1}.png"
        print(save_picture(self.last[0], where, self.last[1]))

    def reply(self, line: str) -> None:
        """Send a line, after the images shown since the last one, and print the reply as it comes.

        An image is shown where the terminal can, and saved elsewhere.
        """
        from ..inference import ImageEnd, TextDelta
        from ..inference.settings import settings_of

        parts: list[str | np.ndarray] = [*self.shown, line]
        settings: dict[str, Any] = {"seed": self.seed, "draw": self.options.draw}
        request = self.conversation.request(parts, **settings)
        for event in self.conversation.say(parts, **settings):
            match event:
                case TextDelta(text=text):
                    print(text, end="", flush=True)
                case ImageEnd(image=number, latent=latent):
                    self.last = self.pipe.picture(latent), settings_of(request, self.pipe.exported, number)
                    self.images += 1
                    print()
                    escape = None
                    if sys.stdout.isatty():
                        escape = inline(self.last[0])
                        if escape is None and self.sixel is None and sys.stdin.isatty():
                            self.sixel = takes_sixel(sys.stdin.fileno(), sys.stdout.fileno())
                        if escape is None and self.sixel:
                            escape = sixel(enlarged(self.last[0]))
                    if escape is None:
                        self.save("")
                    else:
                        print(escape, flush=True)
        print()
        self.shown, self.seed = [], self.seed + 1


def enlarged(image: PIL.Image.Image) -> PIL.Image.Image:
    """Return a small image with each pixel as a square, about 256 pixels wide."""
    side = max(1, 256 // image.width)
    return image.resize((image.width * side, image.height * side), 0)


def inline(image: PIL.Image.Image) -> str | None:
    """Return the characters that show an image on this terminal; None if its name is not known to show any."""
    file = io.BytesIO()
    enlarged(image).save(file, format="PNG")
    data = base64.b64encode(file.getvalue()).decode()
    if os.environ.get("TERM_PROGRAM") in ("iTerm.app", "WezTerm"):
        return f"\033]1337;File=inline=1;size={len(file.getvalue())}:{data}\a"
    if "KITTY_WINDOW_ID" in os.environ or os.environ.get("TERM", "") in ("xterm-kitty", "xterm-ghostty"):
        chunks = [data[at : at + KITTY_CHUNK] for at in range(0, len(data), KITTY_CHUNK)]
        more = [f"m={int(number < len(chunks) - 1)}" for number in range(len(chunks))]
        more[0] = f"a=T,f=100,{more[0]}"
        return "".join(f"\033_G{keys};{chunk}\033\\" for keys, chunk in zip(more, chunks, strict=True))
    return None


def takes_sixel(reader: int, writer: int, seconds: float = 1.0) -> bool | None:
    """Return whether a terminal, given by its file descriptors, lists sixel (4) among its device attributes (DA1).

    False without an answer in time. None, unasked, while typed characters wait: the answer would mix with them.
    """
    try:
        import termios
        import tty
    except ImportError:  # Windows
        return False
    if os.environ.get("TERM", "dumb") in ("", "dumb"):
        return False
    answer, until = b"", time.monotonic() + seconds
    with suppress(termios.error, OSError):
        before = termios.tcgetattr(reader)
        try:
            tty.setcbreak(reader, termios.TCSADRAIN)  # neither echoed nor held back until a line ends
            if select.select([reader], [], [], 0)[0]:
                return None
            os.write(writer, b"\033[c")
            while not re.search(rb"\033\[\?[\d;]*c", answer):
                if not select.select([reader], [], [], max(0.0, until - time.monotonic()))[0]:
                    return False
                answer += os.read(reader, 1)
        finally:
            termios.tcsetattr(reader, termios.TCSADRAIN, before)
    attributes = re.search(rb"\033\[\?([\d;]*)c", answer)
    return attributes is not None and b"4" in attributes[1].split(b";")


def sixel(image: PIL.Image.Image) -> str:
    """Return an image as sixel graphics in at most 256 colours: bands of six rows, each colour's columns in turn."""
    import numpy as np

    reduced = image.convert("RGB").quantize(256)
    numbers, palette = np.asarray(reduced), np.reshape(reduced.getpalette() or [], (-1, 3))
    used = np.unique(numbers).tolist()
    colours = [f"#{n};2;" + ";".join(str(round(part / 2.55)) for part in palette[n].tolist()) for n in used]
    bands = []
    for top in range(0, len(numbers), 6):
        band = numbers[top : top + 6]
        bits = 1 << np.arange(len(band))
        bands.append("$".join(f"#{n}{run_lengths((bits @ (band == n)).tolist())}" for n in np.unique(band).tolist()))
    return f'\033P0;1q"1;1;{image.width};{image.height}{"".join(colours)}{"-".join(bands)}\033\\'


def run_lengths(columns: Sequence[int]) -> str:
    """Return the sixel characters of columns, bits of six pixels each; runs above three are counted."""
    runs = [(chr(63 + bits), len(list(run))) for bits, run in groupby(columns)]
    return "".join(f"!{count}{character}" if count > 3 else character * count for character, count in runs)
