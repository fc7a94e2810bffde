"""The events of generation, from the engine to the wire: plain data that needs no torch and can be pickled.

`request_id` is the number that `Engine.submit` returned, or the position in the list given to `Engine.run`; `image`
counts the images of one reply from 0. The engine gives latents; a server's worker decodes them to `pixels`, uint8
`[row, column, 3]`, and sends those instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


@dataclass(frozen=True)
class TextDelta:
    """One new token, and the text it completes: empty while a character still lacks some of its tokens.

    The tokens of one character come together, once it is complete; those of a cut one come before the next image or
    the end, as U+FFFD. Text that may begin a stop string comes once it does not, or not at all.

    logprob        the token's log probability under the model, before penalties and temperature, if it is asked for
    top_logprobs   the most probable tokens with theirs
    texts          of the token and of these, where they are sent
    """

    request_id: int
    text: str
    token: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImageStart:
    """An image begins."""

    request_id: int
    image: int


@dataclass(frozen=True, eq=False)
class ImageProgress:
    """`step` of `total` denoising steps are done, or codes are chosen.

    preview   the predicted clean latent, if the request asks for previews
    latent    the latent after this step, still noisy, and `t` the noise level at which the step began; None for codes
    pixels    the decoded preview
    """

    request_id: int
    image: int
    step: int
    total: int
    preview: Tensor | None = None
    latent: Tensor | None = None
    t: int = 0
    pixels: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class ImageEnd:
    """An image is finished.

    latent     float `[channel, row, column]`, or codes, int64 `[row, column]`; None where only `pixels` are sent
    settings   the settings that draw it again (`pictures.settings_of`), where they are sent
    """

    request_id: int
    image: int
    latent: Any
    pixels: np.ndarray | None = None
    settings: dict[str, Any] | None = None


@dataclass(frozen=True)
class Done:
    """The request is complete.

    reason            "stop" (end of sequence, or a stop string), "length" (max_tokens or the model's max_seq_len) or
                      "images" (all of max_images are drawn, and no text was asked for)
    image_positions   patches or codes of all images drawn
    """

    request_id: int
    reason: str
    text_tokens: int
    images: int
    network_evaluations: int
    image_positions: int


@dataclass(frozen=True)
class Failed:
    """The request ends without a result: memory does not suffice for it, even when computed alone."""

    request_id: int
    reason: str = "out of memory"


Event = TextDelta | ImageStart | ImageProgress | ImageEnd | Done | Failed
