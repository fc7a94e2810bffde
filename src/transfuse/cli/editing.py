"""`transfuse edit`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from ..errors import UserError
from .parsing import parse, print_json
from .writing import WithModel, save_picture, to_side

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Edit(WithModel):
    """Change a picture: by an instruction, by redrawing it from part of the way, or only where a mask selects.

    transfuse edit picture.png "make the background red" --out pictures
    transfuse edit picture.png "a crab on a red background" --strength 0.6
    """

    image: tyro.conf.Positional[Path]
    prompt: tyro.conf.Positional[str]
    """an instruction; with --strength or --mask a description of the result"""
    out: Path = Path("out")
    """folder for the picture"""
    strength: float | None = None
    """begin from the picture, noised: 1 is noise alone, 0 changes nothing"""
    mask: Path | None = None
    """a picture of the same size: its transparent area is redrawn, or, if it is opaque, the white one"""
    seed: int = 0
    steps: int | None = None
    """denoising steps; the model's own default if not given"""
    guidance_scale: float | None = None
    image_guidance_scale: float | None = None
    """for instructions: how far to push towards the picture, apart from the words"""
    resize: bool = False
    """crop the middle square and resize it to the model's size, instead of refusing it"""
    json: bool = False
    """end with one line of JSON"""


def edit(arguments: Sequence[str]) -> int:
    """Change a picture as an instruction says, or redraw parts of it."""
    options = parse(Edit, arguments, "edit")
    if not options.prompt.strip():
        raise UserError("edit: prompt: expected some text, found an empty one")
    pipe = options.load()
    from ..images import fit, read_image, read_mask
    from ..inference.pictures import settings_of
    from ..inference.sequence_state import with_image_guidance

    side = pipe.exported.image_size
    pixels = read_image(options.image)
    mask = None if options.mask is None else read_mask(options.mask, pixels.shape[:2])
    if mask is not None and options.resize:
        mask = fit(mask, side)
    picture = to_side(pixels, options.image, side, options.resize)
    start = None
    if options.strength is not None or mask is not None:
        start = pipe.start(picture, 1.0 if options.strength is None else options.strength, mask)
    parts: list[str | np.ndarray] = [options.prompt] if start else [picture, options.prompt]
    request = replace(
        with_image_guidance(pipe.request(parts, options.steps, options.guidance_scale), options.image_guidance_scale),
        draw="force",
        max_tokens=0,
        start=start,
        seed=options.seed,
    )
    settings = settings_of(request, pipe.exported)
    drawn = pipe.replies([request])[0].images[0]
    path = save_picture(drawn, options.out / f"{options.image.stem}-seed-{options.seed}.png", settings)
    if options.json:
        print_json({"path": path, "image": str(options.image), **settings})
    else:
        print(path)
    return 0
