"""A request, the checks it passes, and the state of its sequence in the engine."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..devices import out_of_memory
from ..diffusion import SamplerConfig, SamplerState
from ..errors import UserError, shown
from ..export import MAX_SCALE, out_of_range
from ..sequence import Document, Image, Layout, Text, Tokenizer, layout_document
from .model_runner import ModelRunner
from .scheduling import PrefixKeys, image_keys

T = TypeVar("T")

REPLACEMENT = "\ufffd"  # the character that a decoder gives for bytes that are no character, or not yet one
MAX_PENALTY = 2.0  # of presence and frequency, in logits (OpenAI's bound)
KINDS: tuple[tuple[str, Any, str], ...] = (
    ("seed", Integral, "a whole number"),
    ("max_images", Integral, "a whole number"),
    ("preview_every", Integral, "a whole number"),
    ("logprobs", Integral | None, "a whole number"),
    ("presence_penalty", Real, "a number"),
    ("frequency_penalty", Real, "a number"),
    ("image_guidance_scale", Real | None, "a number"),
    ("sampler", SamplerConfig, "a transfuse.diffusion.SamplerConfig"),
    ("negative", Document | None, "a transfuse.sequence.Document, as request() makes of a text"),
)
"""fields of a `Request` by name, with the types they take and these in words"""
LONGEST_PREFIX = 3  # bytes of a character that lacks its last one, so at most as many replacements


@dataclass(frozen=True, eq=False)
class Start:
    """A clean latent `[channel, row, column]` from which the first image of a request is drawn, in place of noise."""

    latent: Tensor
    strength: float = 1.0  # share of the denoising steps taken: 1 begins from noise, 0 is the image itself
    mask: Tensor | None = None  # bool `[row, column]` of latent elements, True where it is redrawn; None: everywhere


@dataclass(frozen=True)
class Request:
    """One sequence to continue, and how."""

    document: Document  # the prompt: an open document
    draw: str = "auto"  # "auto": the model decides (BOI is sampled); "force": an image comes first; "never": text only
    max_tokens: int = 64  # most text tokens to write
    max_images: int = 1  # most images to draw
    size: tuple[int, int] = (32, 32)  # pixels (rows, columns) of an image it draws
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig("dpmpp", steps=20))
    guidance_scale: float = 3.0  # scale of classifier-free guidance towards the prompt; 1: none
    # The same towards the images before it alone; `guidance_scale` then counts for the text only (`guide`).
    image_guidance_scale: float | None = None  # None: text and images are one condition
    # Noise levels, as shares of all (0 clean, 1 noise), at which an image is guided; elsewhere one branch is computed.
    guidance_interval: tuple[float, float] | None = None  # None: everywhere
    negative: Document | None = None  # an open document that guidance leads away from; None: training's null branch
    start: Start | None = None  # where the first image begins; None: noise
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0  # keeps the most probable tokens that make up this much probability
    presence_penalty: float = 0.0  # subtracted from the logit of each token already written (OpenAI's formula)
    frequency_penalty: float = 0.0  # the same, for each time it was written
    stop: tuple[str, ...] = ()  # strings that end the reply where one would appear; they are not part of it
    logprobs: int | None = None  # give each token's log probability, and of this many most probable ones; None: not
    code_temperature: float = 1.0  # temperature and nucleus for the codes of images, where images are codes
    code_top_p: float = 1.0
    seed: int = 0
    preview_every: int = 0  # give the predicted clean latent after every `preview_every` steps; 0: never
    # Keep the cached positions for the next request with `reuse`, and begin with those that an earlier one left.
    reuse: bool = False  # for prompts that begin alike: the turns of a conversation

    def guided_at(self, level: float) -> bool:
        """Return True if an image is guided at this noise level, a share of all."""
        low, high = self.guidance_interval or (0, 1)
        return low <= level <= high


class Detokenizer:
    """Turns tokens into text. A token is returned, with the text it completes, once no later token changes that text.

    before: ids of the text that the tokens continue: without it, some tokenizers drop the space of the first word.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self._pending: list[int] = []
        self._window: list[int] = []
        self._given = ""
        self._restart(before)
        if self._given.endswith(REPLACEMENT):  # its last character is cut: it is not continued
            self._restart([])

    def add(self, token: int) -> list[tuple[int, str]]:
        """Return the tokens that are complete now, in order, each with its text: none while a character is cut."""
        self._pending.append(token)
        self._window.append(token)
        text = self.tokenizer.decode(self._window)
        if not text.startswith(self._given):  # some decoders give a run of bytes up whole where its last ones are wrong
            self._window, self._given = list(self._pending), ""
            text = self.tokenizer.decode(self._window)
        if not text.endswith(REPLACEMENT):
            return self._release(text)
        stable = text[: max(len(text.rstrip(REPLACEMENT)), len(text) - LONGEST_PREFIX)]
        if len(stable) <= len(self._given) or len(self._pending) == 1:
            return []
        done, self._pending = self._pending[:-1], self._pending[-1:]
        new, self._given = stable[len(self._given) :], stable
        return [*((earlier, "") for earlier in done[:-1]), (done[-1], new)]

    def flush(self) -> list[tuple[int, str]]:
        """Return all tokens that are held back, the bytes of a cut character as U+FFFD. What follows is a new text."""
        released = self._release(self.tokenizer.decode(self._window)) if self._pending else []
        self._restart([])
        return released

    def _release(self, text: str) -> list[tuple[int, str]]:
        done, new = self._pending, text[len(self._given) :]
        self._restart(done)
        self._pending = []
        return [*((earlier, "") for earlier in done[:-1]), (done[-1], new)]

    def _restart(self, window: Sequence[int]) -> None:
        self._window = list(window)
        self._given = self.tokenizer.decode(self._window)


@dataclass(eq=False)
class StopStrings:
    """Passes the text of tokens on until one of `stops` appears in it; what may begin one is held back."""

    stops: Sequence[str]
    matched: bool = False
    _held: list[tuple[int, str]] = field(default_factory=list)

    def add(self, pieces: Sequence[tuple[int, str]]) -> list[tuple[int, str]]:
        """Return the tokens, each with its text, that come before any stop string; sets `matched` at the first."""
        if not self.stops:
            return list(pieces)
        self._held += pieces
        text = "".join(piece for _, piece in self._held)
        # The first that is complete counts, so that the tokens' borders have no influence.
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in self.stops if stop in text]
        self.matched = bool(ends)
        # The longest end of the text that begins a stop string stays.
        prefixes = (n for stop in self.stops for n in range(len(stop)) if text.endswith(stop[:n]))
        safe = min(ends)[1] if ends else len(text) - max(prefixes)
        released = []
        while self._held and len(self._held[0][1]) <= safe:
            released.append(self._held.pop(0))
            safe -= len(released[-1][1])
        if ends:
            released += [(token, piece[:safe]) for token, piece in self._held[:1] if safe]
            self._held = []
        return released

    def flush(self) -> list[tuple[int, str]]:
        """Return what is held back: no stop string will appear."""
        released, self._held = self._held, []
        return released


@dataclass(frozen=True)
class Branch:
    """One of the sequences that guide an image: the full sequence, or one that sees less of its prompt.

    The others are at the end of the same slot, from `origin`; `start`, counted from there, is where the image begins,
    and `position` its first rotary position.
    """

    slot: int
    start: int
    position: int
    origin: int = 0


@dataclass(eq=False)
class CodeDrawing:
    """An unfinished image of codes: the codes so far, and each branch's logits `[codebook_size]` of the next one."""

    generator: torch.Generator
    logits: list[Tensor] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)


@dataclass(eq=False)
class SequenceState:
    """A request and its progress."""

    number: int  # the events' `request_id`
    request: Request
    layout: Layout  # of the prompt
    shape: tuple[int, int, int]  # `[channel, row, column]` of the latents it draws
    patches: int  # patches, or codes, per image that it draws
    max_len: int  # the most positions it can take
    cfg_len: int  # positions reserved at the end of its slot for the other branches of classifier-free guidance
    seen: list[Image]  # images of the prompt, then those drawn so far
    detokenizer: Detokenizer
    stops: StopStrings
    prefix_keys: PrefixKeys | None  # describes its cached positions, if a later request may reuse them
    slot: int = -1
    length: int = 0  # positions in the cache
    position: int = 0  # rotary position of what comes next
    written: int = 0  # text tokens
    counts: Counter[int] = field(default_factory=Counter)  # of each token written, where penalties need it
    logprobs: deque[tuple[float, tuple[tuple[int, float], ...]]] = field(default_factory=deque)  # of held tokens
    suspended: list[Tensor] | None = None  # its part of the cache, while another sequence has its slot
    next_token: int | None = None
    drawing: SamplerState | CodeDrawing | None = None
    branches: list[Branch] = field(default_factory=list)  # while it draws: the full sequence, then those that see less
    scales: list[float] = field(default_factory=list)  # of guidance, one per pair of neighbouring branches
    finished: Tensor | None = None  # an image that is complete but not yet in the cache
    images: int = 0
    evaluations: int = 0
    too_large: bool = False  # out of memory even when computed alone


def accept(runner: ModelRunner, request: Request, number: int, where: str) -> SequenceState:
    """Return the initial state of a request. Raises UserError, one line that begins with `where`, if it is invalid."""
    if request.document.closed:
        raise ValueError(f"{where}: expected an open document, found a closed one")
    if wrong := _wrong_settings(runner, request) or _wrong_images(runner, request):
        raise UserError(f"{where}: {wrong}")
    layout = layout_document(request.document, runner.grammar)
    shape, patches = runner.latent_shape(request.size)
    context = runner.config.max_seq_len
    least = len(layout) + (patches + 2 if request.draw == "force" else 1)
    if least > context:
        raise UserError(f"{where}: prompt: expected at most {context} positions with what is to come, found {least}")
    max_len, cfg_len = len(layout) + request.max_tokens + 1, 0
    if request.draw != "never" and runner.config.images != "none" and request.max_images > 0:
        max_len += request.max_images * (patches + 2)
        # The most positions that the branches of guided images take (`open_branches`).
        scale, image_scale = request.guidance_scale, request.image_guidance_scale
        seen = [math.prod(runner.grammar.grid(image)) for image in request.document.images]
        seen += [patches] * (request.max_images - 1)
        has_images_branch = image_scale is not None and bool(seen)
        if has_images_branch:
            cfg_len += sum(count + 2 for count in seen) + 2 + patches
        if request.negative is not None:
            least = len(layout_document(request.negative, runner.grammar)) + 1 + patches
            if least > context:
                raise UserError(f"{where}: negative: expected at most {context} positions with an image, found {least}")
            cfg_len += least
        elif scale != 1 or (has_images_branch and image_scale != 1):
            cfg_len += len(runner.null_tokens) + patches
    prefix_keys: PrefixKeys | None = None
    if request.reuse:
        prefix_keys = [*layout.input_ids.tolist()]
        for span in layout.spans:
            if not span.image.is_codes:
                prefix_keys[span.start : span.end] = image_keys(span.image.latent, span.end - span.start)
    last = request.document.parts[-1] if request.document.parts else None
    return SequenceState(
        number,
        request,
        layout,
        shape,
        patches,
        min(context, max_len),
        cfg_len,
        seen=list(request.document.images),
        detokenizer=Detokenizer(runner.tokenizer, last.ids if isinstance(last, Text) else ()),
        stops=StopStrings(request.stop),
        prefix_keys=prefix_keys,
    )


def _wrong_settings(runner: ModelRunner, request: Request) -> str:
    """Return what is wrong with a request's settings for this model (field, expected, found), or ""."""
    images = runner.config.images
    if not isinstance(request.draw, str) or request.draw not in ("auto", "force", "never"):
        return f'draw: expected "auto", "force" or "never", found {shown(request.draw)}'
    for name, kinds, wanted in KINDS:
        if not isinstance(value := getattr(request, name), kinds) or isinstance(value, bool):
            return f"{name}: expected {wanted}, found {shown(value)}"
    if not isinstance(request.size, Sequence) or [isinstance(side, Integral) for side in request.size] != [True, True]:
        return f"size: expected two whole numbers of pixels, found {shown(request.size)}"
    if images == "none" and (request.draw == "force" or request.document.images):
        given = "an image" if request.document.images else 'draw "force"'
        return f"expected text alone, for the model knows no images, found {given}"
    if request.draw == "force" and request.max_images < 1:
        return f"max_images: expected at least 1 where one is forced, found {request.max_images}"
    if wrong := out_of_range(request):
        return wrong
    if (scale := request.image_guidance_scale) is not None and not 0 <= scale <= MAX_SCALE:
        return f"image_guidance_scale: expected 0 to {MAX_SCALE:g}, found {scale}"
    if request.negative is not None:
        given = "guidance_scale 1" if request.guidance_scale == 1 else "image_guidance_scale"
        if given != "image_guidance_scale" or request.image_guidance_scale is not None:
            return f"negative: expected a guidance_scale other than 1 and no image_guidance_scale, found {given}"
    for name in ("presence_penalty", "frequency_penalty"):
        if not -MAX_PENALTY <= getattr(request, name) <= MAX_PENALTY:
            return f"{name}: expected -{MAX_PENALTY:g} to {MAX_PENALTY:g}, found {getattr(request, name)}"
    if not isinstance(request.stop, list | tuple) or not all(text and isinstance(text, str) for text in request.stop):
        return f"stop: expected strings that are not empty, found {shown(request.stop)}"
    if request.logprobs is not None and request.logprobs < 0:
        return f"logprobs: expected at least 0, found {request.logprobs}"
    for name in ("max_images", "preview_every"):
        if getattr(request, name) < 0:
            return f"{name}: expected at least 0, found {getattr(request, name)}"
    if not isinstance(request.start, Start | None):
        return f"start: expected a Start, as pipe.start() makes of an image, found {shown(request.start)}"
    for name in ("guidance_interval", "start"):
        if images != "latents" and getattr(request, name) is not None:
            return f"{name}: expected none, for the model does not denoise, found one"
    return ""


def _wrong_images(runner: ModelRunner, request: Request) -> str:
    """Return what is wrong with a request's images, image size or start (field, expected, found), or ""."""
    config, start = runner.config, request.start
    for image in request.document.images:
        if image.is_codes and not 0 <= int(image.latent.min()) <= int(image.latent.max()) < config.codebook_size:
            codes = f"{int(image.latent.min())} to {int(image.latent.max())}"
            return f"image: expected codes from 0 to {config.codebook_size - 1}, found {codes}"
    factor = runner.exported.autoencoder.factor * config.patch_size if config.images != "none" else 1
    if min(request.size) < 1 or any(side % factor for side in request.size):
        return f"image size: expected positive multiples of {factor}, found {request.size}"
    shape, _ = runner.latent_shape(request.size)
    if config.max_grid is not None and max(shape[1:]) > config.max_grid * config.patch_size:
        return f"image size: expected at most {config.max_grid * factor} pixels a side, found {request.size}"
    if start is None:
        return ""
    if tuple(start.latent.shape) != shape:
        return f"start: expected a latent {list(shape)}, found {list(start.latent.shape)}"
    if not 0 <= start.strength <= 1:
        return f"strength: expected a share from 0 to 1, found {start.strength}"
    if start.mask is not None and (start.mask.dtype != torch.bool or tuple(start.mask.shape) != shape[1:]):
        mask = f"{start.mask.dtype} {list(start.mask.shape)}".removeprefix("torch.")
        return f"mask: expected bool {list(shape[1:])}, found {mask}"
    return ""


def with_image_guidance(request: Request, scale: float | None) -> Request:
    """Return the request with `image_guidance_scale` set.

    Raises UserError if no image stands before the one to be drawn: the scale would have no effect.
    """
    if scale is not None and not request.document.images and request.max_images <= 1:
        raise UserError(f"image_guidance_scale: expected a picture before the words, found none (scale {scale:g})")
    return replace(request, image_guidance_scale=scale)


def split_on_oom(
    seqs: Sequence[SequenceState], work: Callable[[Sequence[SequenceState]], T]
) -> list[tuple[Sequence[SequenceState], T]]:
    """Run `work` on all seqs at once, or out of memory on halves of them, down to one; return each part's result.

    One that does not fit alone is marked `too_large` and left out. `work` must be safe to run again after a failure.
    """
    try:
        return [(seqs, work(seqs))] if seqs else []
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if len(seqs) == 1:
        seqs[0].too_large = True
        return []
    middle = len(seqs) // 2
    return split_on_oom(seqs[:middle], work) + split_on_oom(seqs[middle:], work)
