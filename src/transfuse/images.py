"""Image files to arrays, in any common format, mode and orientation; and PNG files that record how they were made."""

from __future__ import annotations

import base64
import io
import json
import os
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL.Image
import PIL.ImageCms
import PIL.ImageFile
from PIL.ExifTags import Base as Tag
from PIL.Image import Resampling, Transpose
from PIL.PngImagePlugin import PngInfo

from .errors import UserError, install_command

ImageSource = str | Path | bytes | BinaryIO | PIL.Image.Image | np.ndarray
"""An image file by path, its bytes, an open file, a PIL image, or an array as `PIL.Image.fromarray` takes it."""

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "HEIF", "JPEG2000", "GIF", "BMP", "DIB", "TIFF", "PPM", "ICO")
SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".avif", ".heic", ".heif", ".hif"),
    *(".jp2", ".j2k", ".jpx", ".jpf", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".ico"),
)
"""suffixes that `image_files` accepts in a folder, in lower case; a single file may have any"""
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
"""major brands of HEIF files; those of AVIF also name "avif" among their brands"""
MAX_PIXELS = 64_000_000
EDGE_SIDE = 64
"""pixels of the shorter side at which edges are looked for"""
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
"""the transposition that turns an image upright, by its EXIF orientation"""

# `decode_image` has a stricter limit. A global filter, because catch_warnings changes state that all threads share.
warnings.filterwarnings("ignore", category=PIL.Image.DecompressionBombWarning)


def read_image(path: Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image file, like `decode_image`."""
    return decode_image(path, str(path), max_pixels)


def decode_image(
    source: ImageSource,
    name: str = "image",
    max_pixels: int = MAX_PIXELS,
    formats: tuple[str, ...] = FORMATS,
    background: str = "white",
) -> np.ndarray:
    """Decode any image to uint8 RGB `[row, column, 3]`: upright, in sRGB, transparency on `background`.

    Every input image is decoded here, so a file, its bytes and the PIL image opened from it give the same pixels. EXIF
    orientation is applied. Grey, 1-bit, palette, CMYK and YCCK become RGB, by the embedded colour profile (ICC), if
    there is one; a profile of another colour space is ignored, except that an RGB profile also serves grey. 16-bit grey
    is divided by 257 and rounded; 16-bit colour keeps its high byte, which is within one level of that. Of an animation
    or several pages, the first is read. HEIF, as phones write it, needs the extra `heif`.

    Args:
        name: the name in errors of a source that is not a path.
        background: a colour as CSS writes it, "white" or "#ffcc00"; what is transparent shows it.

    Raises:
        UserError: one line: no file, none of these formats, damaged (image or colour profile) or truncated, more than
            `max_pixels` (by the header, before decoding), or samples without a known range (floating point, 32-bit).
    """
    colours, alpha = _decode(source, name, max_pixels, formats)
    if alpha is None:
        return np.array(colours)
    behind = PIL.Image.new("RGB", colours.size, background)
    behind.paste(colours, mask=alpha)
    return np.array(behind)


def read_mask(
    source: ImageSource,
    size: tuple[int, int],
    name: str = "mask",
    max_pixels: int = MAX_PIXELS,
    formats: tuple[str, ...] = FORMATS,
) -> np.ndarray:
    """Decode a mask to the area to redraw: bool `[row, column]`, turned upright as the image is.

    If any pixel is at all transparent, alpha alone decides and colours do not: alpha below 128 is redrawn. Otherwise
    white is redrawn: luma above 127. True in a bool array is white.

    Args:
        size: rows and columns of the image, which the mask must share.

    Raises:
        UserError: one line: like `decode_image`; a mask of another size, or one that selects nothing.
    """
    colours, alpha = _decode(source, name, max_pixels, formats)
    name = str(source) if isinstance(source, str | Path) else name
    if (colours.height, colours.width) != size:
        raise UserError(
            f"{name}: expected {size[1]}x{size[0]} pixels, as the image, found {colours.width}x{colours.height}"
        )
    redrawn = np.asarray(colours.convert("L")) > 127
    if alpha is not None and np.asarray(alpha).min() < 255:  # many programs give opaque pictures an alpha channel
        redrawn = np.asarray(alpha) < 128
    if not redrawn.any():
        raise UserError(f"{name}: expected a transparent area to redraw, or a white one in an opaque mask, found none")
    return redrawn


def _decode(
    source: ImageSource, name: str, max_pixels: int, formats: tuple[str, ...]
) -> tuple[PIL.Image.Image, PIL.Image.Image | None]:
    """Return the colours in sRGB (mode RGB) and the alpha (mode L; None: opaque), both upright."""
    name = str(source) if isinstance(source, str | Path) else name
    names = [{"WEBP": "WebP", "JPEG2000": "JPEG 2000"}.get(known, known) for known in formats if known != "DIB"]
    wanted = f"a {', '.join(names[:-1])} or {names[-1]} image"
    try:
        if isinstance(source, str | Path):
            if not os.path.isfile(source):  # Path.is_file raises if a parent folder may not be entered
                raise UserError(f"{name}: expected an image file, found {_what_else(source)}")
            # An open file: PIL may memory-map a named one, and a file truncated meanwhile would kill the process.
            with open(source, "rb") as opened:
                return _decode(opened, name, max_pixels, formats)
        if isinstance(source, np.ndarray):
            array = f"{source.dtype} {list(source.shape)}"
            try:
                source = PIL.Image.fromarray(source)
            except TypeError:
                raise UserError(f"{name}: expected an array of uint8 [row, column, 3], found {array}") from None
        if isinstance(source, PIL.Image.Image):
            return _layers(source, name, max_pixels)
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        if not hasattr(file, "read"):
            raise UserError(f"{name}: expected {wanted}, found {type(file).__name__}")
        if "HEIF" in formats:
            _register_heif(file, name)
            formats = tuple(known for known in formats if known != "HEIF" or known in PIL.Image.OPEN)
        with PIL.Image.open(file, formats=formats) as image:
            return _layers(image, name, max_pixels)
    except (UserError, MemoryError):
        raise
    except PIL.UnidentifiedImageError:
        content = "something else" if file.seek(0, os.SEEK_END) else "an empty file"
        raise UserError(f"{name}: expected {wanted}, found {content}") from None
    except PIL.Image.DecompressionBombError as error:
        raise UserError(f"{name}: expected at most {max_pixels} pixels, found more ({error})") from None
    except Exception as error:  # a damaged file can make a decoder raise anything: struct.error, IndexError, ...
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        reason = (isinstance(error, OSError) and error.strerror) or reason
        raise UserError(f"{name}: expected {wanted}, found a damaged or unreadable file ({reason})") from None


def is_animated(data: bytes) -> bool:
    """Return True for an image file that decodes, and has more frames or pages than the one that is read."""
    with PIL.Image.open(io.BytesIO(data)) as image:
        try:
            return bool(getattr(image, "is_animated", False))
        except Exception:  # PIL's kinds, of a file cut short in a later frame
            return True


def _register_heif(file: BinaryIO, name: str) -> None:
    """Let PIL open HEIF files, if this is one. Raises UserError without the extra `heif`."""
    head = file.read(64)
    file.seek(0)
    if head[4:8] != b"ftyp" or head[8:12] not in HEIF_BRANDS or b"avif" in head:
        return
    try:
        import pi_heif
    except ImportError:
        needed = f"expected the extra that reads HEIC and HEIF, found none: {install_command('heif')}"
        raise UserError(f"{name}: {needed}") from None
    pi_heif.register_heif_opener()


def _layers(image: PIL.Image.Image, name: str, max_pixels: int) -> tuple[PIL.Image.Image, PIL.Image.Image | None]:
    """Like `_decode`, for an image that PIL opened or made, which is not modified. Raises PIL's errors."""
    if image.width * image.height > max_pixels:
        raise UserError(f"{name}: expected at most {max_pixels} pixels, found {image.width}x{image.height}")
    if image.format == "PPM" and image.mode == "I":  # PGM above 8 bits, which PIL scales to 16
        image = PIL.Image.fromarray(np.asarray(image).astype(np.uint16))
    if image.mode in ("F", "I"):
        kind = "floating point" if image.mode == "F" else "32-bit or signed integers"
        raise UserError(f"{name}: expected 8 or 16 bits a sample, found {kind} (mode {image.mode})")
    if isinstance(image, PIL.ImageFile.ImageFile):
        # PIL may memory-map a named file, and turns some TIFFs wrongly.
        filename, image.filename = image.filename, ""
        try:
            image.load()
        finally:
            image.filename = filename
    colours, alpha = image, None
    if image.mode.startswith("I;16"):
        colours, alpha = _from_grey16(image)
    elif image.has_transparency_data:
        key = image.info.get("transparency")
        if image.mode == "RGB" and isinstance(key, tuple) and max(key) > 255:
            # PNG with 16 bits a sample: PIL keeps the high bytes of the pixels, but not of the transparent colour
            colours = image.copy()
            colours.info["transparency"] = tuple(value >> 8 for value in key)
        layer = (colours.convert("LA") if image.mode == "La" else colours).convert("RGBA")
        colours, alpha = layer.convert("RGB"), layer.getchannel("A")
    if image.mode in ("1", "L", "LA", "La"):
        colours = colours.convert("L")
    colours = _to_srgb(colours, image.info.get("icc_profile", b""))
    try:
        # Read after decoding, because PIL's TIFF decoder applies the orientation itself and removes the tag.
        orientation = int(image.getexif().get(Tag.Orientation, 1))
    except Exception:  # damaged EXIF data
        orientation = 1
    method = UPRIGHT.get(orientation)
    if method is not None:
        colours, alpha = colours.transpose(method), alpha and alpha.transpose(method)
    return colours, alpha


def fit(image: np.ndarray, size: int | tuple[int, int], smallest: int = 1, smart: bool = False) -> np.ndarray:
    """Crop the largest centred area of the target's shape and resize it (Lanczos, antialiased).

    Args:
        image: uint8 `[row, column, 3]`, or a mask, bool `[row, column]`, which stays bool.
        size: the target's side, or its (rows, columns), in pixels.
        smallest: least pixels of the shorter side; an image between this and `size` is enlarged.
        smart: crop where edges are lost least, not at the centre.

    Raises ValueError for an image with a shorter side below `smallest`.
    """
    if image.dtype == bool:
        return fit(image * np.uint8(255), size, smallest) > 127
    rows, columns = (size, size) if isinstance(size, int) else size
    height, width = image.shape[:2]
    if min(height, width) < smallest:
        raise ValueError(f"image: expected sides of at least {smallest} pixels, found {width}x{height}")
    cut_height = min(height, max(1, round(width * rows / columns)))
    cut_width = min(width, max(1, round(height * columns / rows)))
    top, left = (height - cut_height) // 2, (width - cut_width) // 2
    if smart and (cut_height, cut_width) != (height, width):
        top, left = busiest(image, cut_height, cut_width)
    cut = image[top : top + cut_height, left : left + cut_width]
    if cut.shape[:2] == (rows, columns):
        return cut.copy()
    return np.array(PIL.Image.fromarray(cut).resize((columns, rows), Resampling.LANCZOS))


def busiest(image: np.ndarray, rows: int, columns: int) -> tuple[int, int]:
    """Return the place (top, left) of the window with the most edges: least of the image is lost outside of it.

    Edges are squared differences of neighbours' brightness, in the image shrunk to about `EDGE_SIDE` pixels: noise and
    texture count little there. Of equal windows the one nearest to the centre is taken. rows, columns: the window's;
    one of them is the image's own.
    """
    height, width = image.shape[:2]
    scale = min(1.0, EDGE_SIDE / min(height, width))
    small = PIL.Image.fromarray(image).convert("L")
    small = small.resize((max(1, round(width * scale)), max(1, round(height * scale))), Resampling.BOX)
    grey = np.pad(np.asarray(small, np.float64), 1, mode="edge")
    energy = (grey[1:-1, 2:] - grey[1:-1, :-2]) ** 2 + (grey[2:, 1:-1] - grey[:-2, 1:-1]) ** 2
    along = 0 if rows < height else 1
    length, window = image.shape[along], (rows, columns)[along]
    profile = energy.sum(1 - along)
    total = np.concatenate([[0.0], profile.cumsum()])
    places = np.arange(length - window + 1)
    ends = np.interp([places, places + window], np.linspace(0, length, len(total)), total)
    inside = (ends[1] - ends[0]) / max(total[-1], 1e-9)
    best = np.flatnonzero(inside >= inside.max() - 1e-6)
    place = int(best[np.abs(best - (length - window) / 2).argmin()])
    return (place, 0) if along == 0 else (0, place)


def pad(image: np.ndarray, size: int, background: str = "white") -> tuple[np.ndarray, tuple[int, int]]:
    """Scale a whole image into the middle of a square (Lanczos, antialiased).

    Returns the square, uint8 `[size, size, 3]`, and the rows and columns of it that the image takes (see `unpad`).
    """
    height, width = image.shape[:2]
    scale = size / max(height, width)
    inside = max(1, round(height * scale)), max(1, round(width * scale))
    square = np.array(PIL.Image.new("RGB", (size, size), background))
    unpad(square, inside)[:] = fit(image, inside)
    return square, inside


def unpad(square: np.ndarray, inside: tuple[int, int]) -> np.ndarray:
    """Return the part of a padded image `[row, column, ...]` that is no padding, as a view. inside: its shape."""
    top, left = ((whole - side) // 2 for whole, side in zip(square.shape[:2], inside, strict=True))
    return square[top : top + inside[0], left : left + inside[1]]


def image_files(source: Path) -> list[Path]:
    """Return the image files in a folder and its subfolders, by suffix, sorted; or `source` itself if it is a file.

    Hidden files are left out; a broken link is listed, so that reading it raises an error. Raises UserError if there
    are none.
    """
    if os.path.isfile(source):
        return [source]
    if not os.path.isdir(source):
        raise UserError(f"{source}: expected an image file or a folder of them, found {_what_else(source)}")
    files = [path for path in walk_folder(source)[0] if path.name.lower().endswith(SUFFIXES)]
    if not files:
        raise UserError(f"{source}: expected image files ({' '.join(SUFFIXES)}), found none")
    return sorted(files, key=lambda path: path.relative_to(source).as_posix())


def walk_folder(folder: Path) -> tuple[list[Path], dict[Path, str]]:
    """Return the files in a folder and its subfolders, and why each other entry is left out.

    Left out are hidden files and those in hidden folders, entries that are no file, and folders that cannot be read. A
    linked folder is followed once, unless it is also reached without the link or contains `folder`. A broken link is a
    file. Raises UserError if the folder itself cannot be read.
    """
    files, left_out = list[Path](), dict[Path, str]()
    read, waiting, top = set[str](), [folder], os.path.realpath(folder)

    def refuse(error: OSError) -> None:
        if Path(error.filename) == folder:
            reason = f"expected a readable folder, found an unreadable one ({error.strerror})"
            raise UserError(f"{folder}: {reason}") from None
        left_out[Path(error.filename)] = f"unreadable folder ({error.strerror})"

    while waiting:
        begin, real = waiting[0], os.path.realpath(waiting.pop(0))
        if real in read or (begin != folder and Path(top).is_relative_to(real)):
            left_out[begin] = "link to a folder that is read without it"
            continue
        for place, folders, names in os.walk(begin, onerror=refuse):
            real = os.path.realpath(place)
            if real in read:
                left_out[Path(place)] = "folder that another link leads to"
                folders.clear()
                continue
            read.add(real)
            hidden = any(part.startswith(".") for part in Path(place).relative_to(folder).parts)
            links = [Path(place, name) for name in folders if os.path.islink(Path(place, name))]
            left_out |= {link: "hidden" for link in links if hidden or link.name.startswith(".")}
            waiting += sorted(link for link in links if link not in left_out)
            for path in (Path(place, name) for name in names):
                if hidden or path.name.startswith("."):
                    left_out[path] = "hidden"
                elif os.path.isfile(path) or not os.path.exists(path):
                    files.append(path)
                else:
                    left_out[path] = "not a file"
    return sorted(files), left_out


def _from_grey16(image: PIL.Image.Image) -> tuple[PIL.Image.Image, PIL.Image.Image | None]:
    """Return mode L, scaled by a table (PIL's own conversion clips at 255), and the alpha of a transparent value."""
    tags = getattr(image, "tag_v2", {})
    peak = 4095 if tags.get(Tag.BitsPerSample) == (12,) else 65535
    table = ((np.arange(peak + 1) * 255 + peak // 2) // peak).astype(np.uint8)
    if tags.get(Tag.PhotometricInterpretation) == 0:  # TIFF: 0 is white; PIL inverts 1 and 8 bits a sample, not 16
        table = table[::-1].copy()
    values = np.asarray(image)
    key = image.info.get("transparency")
    alpha = PIL.Image.fromarray((values != key) * np.uint8(255)) if isinstance(key, int) else None
    return PIL.Image.fromarray(table[values]), alpha


def _to_srgb(colours: PIL.Image.Image, profile: bytes | None) -> PIL.Image.Image:
    """Convert opaque colours to sRGB by their profile. Raises ValueError for a damaged one (None: incomplete)."""
    if colours.mode not in ("L", "CMYK"):
        colours = colours.convert("RGB")
    if profile != b"":
        mode, transform = _transform(profile)
        if transform is not None and (mode == colours.mode or (mode, colours.mode) == ("RGB", "L")):
            return transform.apply(colours.convert(mode))
    return colours.convert("RGB")


@lru_cache(maxsize=32)
def _transform(profile: bytes | None) -> tuple[str, PIL.ImageCms.ImageCmsTransform | None]:
    """Return the mode that a profile describes, and its transform to sRGB.

    The transform is None if it changes nothing: the profile is sRGB, as most are, or of an unsupported colour space.
    Raises ValueError for a damaged profile.
    """
    if profile is None:
        raise ValueError("incomplete colour profile")
    try:
        opened = PIL.ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(opened.profile.xcolor_space.strip(), "")
        if not mode:
            return "", None
        transform = PIL.ImageCms.buildTransform(opened, PIL.ImageCms.createProfile("sRGB"), mode, "RGB")
    except (OSError, PIL.ImageCms.PyCMSError) as error:
        raise ValueError(f"damaged colour profile: {error}") from None
    if mode == "RGB":
        lattice = np.stack(np.meshgrid(*[np.arange(0, 256, 15, dtype=np.uint8)] * 3), -1).reshape(1, -1, 3)
        changed = transform.apply(PIL.Image.fromarray(lattice))
        if np.abs(np.asarray(changed, np.int16) - lattice).max() <= 1:
            return mode, None
    return mode, transform


def _what_else(path: str | Path) -> str:
    return "a folder" if os.path.isdir(path) else "something that is no file" if os.path.exists(path) else "none"


def save_png(picture: PIL.Image.Image, file: Path | BinaryIO, settings: dict[str, Any]) -> None:
    """Write a PNG with its settings in a text chunk. Raises OSError."""
    info = PngInfo()
    info.add_itxt(SETTINGS, json.dumps(settings, ensure_ascii=False))
    picture.save(file, format="PNG", pnginfo=info)


def read_settings(path: Path) -> dict[str, Any]:
    """Return the settings in a PNG written by `save_png`. Raises UserError if there are none."""
    try:
        with PIL.Image.open(path, formats=["PNG"]) as image:
            image.load()  # reads text chunks after the pixels, too
            settings = json.loads(getattr(image, "text", {})[SETTINGS])
        reason = "" if isinstance(settings, dict) else "something else"
    except (OSError, KeyError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        reason = "none" if isinstance(error, KeyError) else type(error).__name__
    if reason:
        raise UserError(f"{path}: expected a PNG with the settings it was drawn with, found {reason}")
    return settings


def html_image(image: PIL.Image.Image) -> str:
    """Return an `<img>` that contains the image, as PNG."""
    return f'<img src="{png_url(image)}">'


def png_url(image: PIL.Image.Image, optimize: bool = False) -> str:
    """Return a `data:` address that contains the image, as PNG; `optimize` makes it smaller, and takes longer."""
    stream = io.BytesIO()
    image.save(stream, format="PNG", optimize=optimize)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
