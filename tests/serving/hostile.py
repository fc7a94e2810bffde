"""Pictures that no server should take: each a function of nothing that gives a file, or a URL."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import PIL.Image

Make = Callable[[], bytes | str]
IMAGES: dict[str, Make] = {}


def _file(kind: str, size: tuple[int, int] = (8, 8), mode: str = "RGB", **options: object) -> bytes:
    file = io.BytesIO()
    PIL.Image.new(mode, size, 100).save(file, format=kind, **options)
    return file.getvalue()


def _noise(kind: str) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(file, format=kind)
    return file.getvalue()


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _png(width: int, height: int, depth: int = 8, color: int = 2, data: bytes = b"") -> bytes:
    """A PNG that claims a size, whatever it holds."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    body = _chunk(b"IHDR", header) + _chunk(b"IDAT", data or zlib.compress(b"\0" * 100)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def _flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


# Bombs: small files of huge pictures.
for side in (5_000, 20_000, 40_000, 65_535, 2**31 - 1):
    IMAGES[f"png of {side}"] = lambda side=side: _png(side, side)
IMAGES["png one pixel high, a billion wide"] = lambda: _png(10**9, 1)
IMAGES["png of zeros, compressed a thousandfold"] = lambda: _png(4500, 4500, data=zlib.compress(bytes(4500 * 13501), 9))
IMAGES["jpeg of 65,500"] = lambda: _claimed_jpeg(65_500)
IMAGES["webp of 16,383"] = lambda: _claimed_webp(16_383)
IMAGES["png of no size"] = lambda: _png(0, 0)
IMAGES["png of no width"] = lambda: _png(0, 8)


def _claimed_jpeg(side: int) -> bytes:
    content = _file("JPEG")
    at = content.index(b"\xff\xc0")
    return content[: at + 5] + struct.pack(">HH", side, side) + content[at + 9 :]


def _claimed_webp(side: int) -> bytes:
    content = bytearray(_file("WEBP"))
    at = content.index(b"\x9d\x01\x2a")
    content[at + 3 : at + 7] = struct.pack("<HH", side, side)
    return bytes(content)


# Cut short, or bent.
def _cut(content: bytes, share: float) -> bytes:
    return content[: int(len(content) * share)]


for kind in ("PNG", "JPEG", "WEBP"):
    for share in (0.1, 0.5, 0.9):
        IMAGES[f"{share:.0%} of a {kind}"] = lambda kind=kind, share=share: _noise(kind)[
            : int(len(_noise(kind)) * share)
        ]
    IMAGES[f"first 8 bytes of a {kind}"] = lambda kind=kind: _noise(kind)[:8]
IMAGES["png with a wrong checksum of its header"] = lambda: _flipped(_noise("PNG"), 30)
IMAGES["png with damaged data"] = lambda: _flipped(_noise("PNG"), 60)
IMAGES["png whose data end too early"] = lambda: _png(64, 64, data=zlib.compress(bytes(100)))
IMAGES["png of an unknown colour type"] = lambda: _png(8, 8, color=5)
IMAGES["png of an unknown depth"] = lambda: _png(8, 8, depth=7)
IMAGES["png without data"] = lambda: _noise("PNG")[:33] + _chunk(b"IEND", b"")
IMAGES["png without its first byte"] = lambda: _noise("PNG")[1:]
IMAGES["jpeg without its first byte"] = lambda: _noise("JPEG")[1:]

# Something else, whatever the suffix says.
for kind in ("GIF", "BMP", "TIFF", "PPM", "ICO", "TGA", "PCX", "EPS", "PDF", "SGI", "DDS"):
    IMAGES[f"a {kind} named .png"] = lambda kind=kind: _file(kind)
IMAGES["svg"] = lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
IMAGES["html"] = lambda: b"<html><script>alert(1)</script></html>"
IMAGES["postscript"] = lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(/etc/passwd) run\n"
IMAGES["zip"] = lambda: b"PK\x03\x04" + bytes(100)
IMAGES["elf"] = lambda: b"\x7fELF" + bytes(100)
IMAGES["polyglot: html, then a picture"] = lambda: b"<script>alert(1)</script>" + _noise("PNG")
IMAGES["polyglot: zip, then a picture"] = lambda: b"PK\x03\x04" + _noise("JPEG")
IMAGES["pickle"] = lambda: b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94."
IMAGES["numpy"] = lambda: b"\x93NUMPY\x01\x00" + bytes(100)
IMAGES["empty"] = lambda: b""
IMAGES["one byte"] = lambda: b"\x89"
IMAGES["text"] = lambda: b"a crab"

# URLs that are none of ours.
IMAGES["url: http"] = lambda: "http://127.0.0.1:1/a.png"
IMAGES["url: metadata service"] = lambda: "http://169.254.169.254/latest/meta-data"
IMAGES["url: file"] = lambda: "file:///etc/passwd"
IMAGES["url: nothing"] = lambda: ""
IMAGES["url: data without a comma"] = lambda: "data:image/png;base64"
IMAGES["url: data not in base64"] = lambda: "data:image/png,abc"
IMAGES["url: broken base64"] = lambda: "data:image/png;base64,@@@"
IMAGES["url: base64 of nothing"] = lambda: "data:image/png;base64,"
IMAGES["url: svg"] = lambda: "data:image/svg+xml;base64," + base64.b64encode(b"<svg/>").decode()
