"""Picture files, as people have them, to arrays: any common format, mode and orientation; never a half-read picture.
And PNG files that say how they were made."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL.Image
from PIL.Image import Resampling, Transpose
from PIL.PngImagePlugin import PngInfo

from .errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF")
SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp"),
    *(".gif", ".bmp", ".dib", ".tif", ".tiff"),
)
"""what `image_files` takes in a folder, in lower case; a file named by itself may have any"""
MAX_PIXELS = 64_000_000
SETTINGS = "transfuse"
"""the text chunk of a PNG that holds its settings, as JSON"""

UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
"""what sets a picture upright, by its EXIF orientation"""
ORIENTATION, BITS, PHOTOMETRIC = 274, 258, 262
"""EXIF and TIFF tags"""

# `read_image` has a stricter limit and refuses. Not catch_warnings around each reading: that swaps state which all
# threads share, and pictures are read in many.
warnings.filterwarnings("ignore", category=PIL.Image.DecompressionBombWarning)


def read_image(path: Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read a PNG, JPEG, WebP, GIF, BMP or TIFF file: uint8 RGB `[row, column, 3]`, upright.

    EXIF orientation is applied. Transparency, of a palette too, is laid on white. Grey, 1-bit, palette, CMYK and YCCK
    become RGB; colour profiles are ignored. 16-bit grey is divided by 257 and rounded; of 16-bit colour the high byte
    is taken, within one level of that. Of an animation or several pages, the first.

    Raises UserError, one line: no file, none of these formats, damaged or cut short, more than max_pixels (known from
    the header, before anything is decoded), or samples without a known range (floating point, 32-bit).
    """
    if not os.path.isfile(path):  # Path's own raises where a folder above may not be entered
        raise UserError(f"{path}: expected an image file, found {_what_else(path)}")
    try:
        # an open file, not its name: by name PIL may map it into memory, and then turns some grey TIFFs wrongly, and
        # dies with the process where the file is cut short meanwhile
        file = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        wanted = _wanted(FORMATS)
        raise UserError(f"{path}: expected {wanted}, found a damaged or unreadable file ({error.strerror})") from None
    with file:
        return decode_image(file, str(path), max_pixels)


def decode_image(
    file: BinaryIO, name: str, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] = FORMATS
) -> np.ndarray:
    """As `read_image`, from an open file or bytes in memory; `name` is what an error names."""
    wanted = _wanted(formats)
    try:
        with PIL.Image.open(file, formats=formats) as image:
            _check_header(name, image, max_pixels)
            rgb = _to_rgb(image)
            # asked after decoding: the decoder of TIFF turns the picture itself, and strikes the tag
            method = UPRIGHT.get(_orientation(image))
            return np.array(rgb if method is None else rgb.transpose(method))
    except (UserError, MemoryError):
        raise
    except PIL.UnidentifiedImageError:
        found = "something else" if file.seek(0, os.SEEK_END) else "an empty file"
        raise UserError(f"{name}: expected {wanted}, found {found}") from None
    except PIL.Image.DecompressionBombError as error:
        raise UserError(f"{name}: expected at most {max_pixels} pixels, found more ({error})") from None
    except Exception as error:  # a damaged file can make a decoder raise anything: struct.error, IndexError, ...
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{name}: expected {wanted}, found a damaged or unreadable file ({reason})") from None


def _wanted(formats: tuple[str, ...]) -> str:
    names = [{"WEBP": "WebP"}.get(name, name) for name in formats if name != "DIB"]
    return f"a {', '.join(names[:-1])} or {names[-1]} image"


def fit(image: np.ndarray, size: int | tuple[int, int], smallest: int = 1) -> np.ndarray:
    """Cut the middle of that shape out of uint8 `[row, column, 3]`, as large as there is, and resize it (Lanczos,
    antialiased) to `[size, size, 3]`, or `[rows, columns, 3]` of a pair.

    smallest: pixels that the shorter side must have; one from there to `size` is enlarged. Raises ValueError.
    """
    rows, columns = (size, size) if isinstance(size, int) else size
    height, width = image.shape[:2]
    if min(height, width) < smallest:
        raise ValueError(f"image: expected sides of at least {smallest} pixels, found {width}x{height}")
    cut_height = min(height, max(1, round(width * rows / columns)))
    cut_width = min(width, max(1, round(height * columns / rows)))
    top, left = (height - cut_height) // 2, (width - cut_width) // 2
    cut = image[top : top + cut_height, left : left + cut_width]
    if cut.shape[:2] == (rows, columns):
        return cut.copy()
    return np.array(PIL.Image.fromarray(cut).resize((columns, rows), Resampling.LANCZOS))


def image_files(source: Path) -> list[Path]:
    """The picture files in a folder and its folders, by known suffix, sorted; or the one file that `source` is.

    What is hidden (a name that begins with a dot) is left out; links to folders are not followed; a link to a file
    that is gone is listed, so that reading it says so. Raises UserError where there is nothing.
    """
    if os.path.isfile(source):
        return [source]
    if not os.path.isdir(source):
        raise UserError(f"{source}: expected an image file or a folder of them, found {_what_else(source)}")
    files = []
    for folder, folders, names in os.walk(source, onerror=_refuse_folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.startswith(".") or not name.lower().endswith(SUFFIXES):
                continue
            path = Path(folder, name)
            if os.path.isfile(path) or not os.path.exists(path):
                files.append(path)
    if not files:
        raise UserError(f"{source}: expected image files ({' '.join(SUFFIXES)}), found none")
    return sorted(files, key=lambda path: path.relative_to(source).as_posix())


def _check_header(name: str, image: PIL.Image.Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise UserError(f"{name}: expected at most {max_pixels} pixels, found {image.width}x{image.height}")
    if image.mode in ("F", "I"):
        kind = "floating point" if image.mode == "F" else "32-bit or signed integers"
        raise UserError(f"{name}: expected 8 or 16 bits a sample, found {kind} (mode {image.mode})")


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Decode to mode RGB. Raises what PIL raises."""
    if image.mode.startswith("I;16"):
        return _from_grey16(image)
    image.load()  # first: some formats find their transparency only while decoding
    key = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(key, tuple) and max(key) > 255:
        # PNG, 16 bits a sample: the picture was cut to its high bytes, its transparent colour was not
        image.info["transparency"] = tuple(value >> 8 for value in key)
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    layer = image.convert("RGBA")
    white = PIL.Image.new("RGB", layer.size, "white")
    white.paste(layer, mask=layer.getchannel("A"))
    return white


def _from_grey16(image: PIL.Image.Image) -> PIL.Image.Image:
    """Scale by a table: PIL's own conversion clips at 255."""
    tags = getattr(image, "tag_v2", {})
    peak = 4095 if tags.get(BITS) == (12,) else 65535
    table = ((np.arange(peak + 1) * 255 + peak // 2) // peak).astype(np.uint8)
    if tags.get(PHOTOMETRIC) == 0:  # TIFF: 0 is white; PIL inverts 1 and 8 bits a sample, not 16
        table = table[::-1].copy()
    values = np.asarray(image)
    key = image.info.get("transparency")
    if isinstance(key, int):
        table[key] = 255
    return PIL.Image.fromarray(table[values]).convert("RGB")


def _orientation(image: PIL.Image.Image) -> int:
    """1 to 8; 1, upright, where the EXIF data are damaged: they are no reason to refuse a picture."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:
        return 1


def _what_else(path: Path) -> str:
    return "a folder" if os.path.isdir(path) else "something that is no file" if os.path.exists(path) else "none"


def _refuse_folder(error: OSError) -> None:
    raise UserError(f"{error.filename}: expected a readable folder, found one that is not ({error.strerror})") from None


def save_png(picture: PIL.Image.Image, file: Path | BinaryIO, settings: dict[str, Any]) -> None:
    """Write a PNG with its settings in it. Raises OSError."""
    info = PngInfo()
    info.add_itxt(SETTINGS, json.dumps(settings, ensure_ascii=False))
    picture.save(file, format="PNG", pnginfo=info)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a PNG that `save_png` wrote. Raises UserError, one line, where there are none."""
    try:
        with PIL.Image.open(path, formats=["PNG"]) as image:
            image.load()  # text behind the pixels counts too
            found = json.loads(getattr(image, "text", {})[SETTINGS])
    except (OSError, KeyError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        reason = "none" if isinstance(error, KeyError) else type(error).__name__
        raise UserError(f"{path}: expected a PNG with the settings it was drawn with, found {reason}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a PNG with the settings it was drawn with, found something else")
    return found
