"""Transfuse: models that write and draw with one transformer.

import transfuse
pipe = transfuse.load("small-64")             # the bundled model, or an export folder
pipe("a crab on a blue background").images[0].save("crab.png")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .inference import TransfusionPipeline

__all__ = ["__version__", "load"]


def load(path: str, **options: Any) -> TransfusionPipeline:
    """Open an export folder (see `transfuse.export`), or a bundled model by name, as a pipeline.

    Options: dtype ("float32", "bfloat16" or "float16"), device, quantize ("int8" or "float8"), compile, graphs.

    Raises UserError for a missing model, and a device or dtype that this machine does not have.
    """
    from .inference import TransfusionPipeline

    return TransfusionPipeline.from_pretrained(path, **options)
