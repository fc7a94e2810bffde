"""Pictures and masks of every kind against values known without PIL's conversions; damaged ones refused in one line."""

from __future__ import annotations

import io
import os
import resource
import shutil
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageCms
import pytest

from transfuse.errors import UserError
from transfuse.images import decode_image, fit, image_files, read_image, read_mask

GOLDEN = Path(__file__).parents[1] / "golden"
NOISE = np.random.default_rng(7).integers(0, 256, (24, 40, 3), dtype=np.uint8)
CORNERS = np.array(
    [[[250, 0, 0], [0, 250, 0], [0, 0, 250]], [[9, 9, 9], [90, 90, 90], [200, 200, 200]]], dtype=np.uint8
)
"""2 rows, 3 columns, no two alike: every turn of it is another picture"""


def save(path: Path, image: PIL.Image.Image | np.ndarray, **options: object) -> Path:
    (image if isinstance(image, PIL.Image.Image) else PIL.Image.fromarray(image)).save(path, **options)
    return path


def png(path: Path, width: int, height: int, depth: int, kind: int, rows: bytes, *extra: tuple[bytes, bytes]) -> Path:
    """A PNG by hand: `rows` with their filter bytes, `extra` chunks before them."""
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def tiff(
    path: Path, values: np.ndarray, bits: int, photometric: int = 1, order: str = "<", sample_format: int = 1
) -> Path:
    """An uncompressed grey TIFF by hand, one sample a pixel; 12 bits are packed two to three bytes."""
    rows, columns = values.shape
    if bits == 12:
        data = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in values.reshape(-1, 2).tolist())
    else:
        data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    long = (273, 279)
    tags = [(256, columns), (257, rows), (258, bits), (259, 1), (262, photometric), (273, 134), (277, 1), (278, rows)]
    tags += [(279, len(data)), (339, sample_format)]
    entries = b"".join(  # a SHORT fills the first two of its four bytes
        struct.pack(f"{order}HHII" if tag in long else f"{order}HHIH2x", tag, 4 if tag in long else 3, 1, value)
        for tag, value in tags
    )
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8) + struct.pack(f"{order}H", len(tags))
    head += entries + struct.pack(f"{order}I", 0)
    assert len(head) == 134  # where tag 273 says that the data begin
    path.write_bytes(head + data)
    return path


# --- formats and modes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "webp", "bmp", "dib", "tif", "tiff", "jp2", "j2k", "ppm", "ico"])
def test_lossless_formats(tmp_path: Path, suffix: str) -> None:
    options = {"webp": {"lossless": True}, "ico": {"sizes": [(40, 24)]}}.get(suffix, {})
    image = read_image(save(tmp_path / f"a.{suffix}", NOISE, **options))
    assert image.dtype == np.uint8
    assert image.flags["C_CONTIGUOUS"]
    assert image.flags["WRITEABLE"]
    np.testing.assert_array_equal(image, NOISE)


@pytest.mark.parametrize("suffix", ["jpg", "avif", "heic"])
def test_lossy_formats_are_near(tmp_path: Path, suffix: str) -> None:
    smooth = np.broadcast_to(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], (48, 64, 3))
    if suffix == "heic":
        pytest.importorskip("pi_heif")  # which decodes alone
        shutil.copy(GOLDEN / "gradient.heic", tmp_path / "a.heic")
    else:
        save(tmp_path / f"a.{suffix}", smooth, quality=95)
    image = read_image(tmp_path / f"a.{suffix}")
    assert image.shape == (48, 64, 3)
    assert np.abs(image.astype(int) - smooth).max() <= 6


def test_heic_without_its_extra_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By content, whatever the file's name is; an AVIF file needs no extra."""
    (tmp_path / "a.jpg").write_bytes(b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf" + bytes(40))
    monkeypatch.setitem(sys.modules, "pi_heif", None)
    with pytest.raises(UserError, match=r"a\.jpg: expected the extra .* pip install"):
        read_image(tmp_path / "a.jpg")
    assert read_image(save(tmp_path / "a.avif", NOISE)).shape == NOISE.shape


@pytest.mark.parametrize("largest", [255, 1023, 65535])
def test_portable_greymaps_of_any_range(tmp_path: Path, largest: int) -> None:
    values = np.random.default_rng(3).integers(0, largest + 1, (8, 12))
    data = values.astype("u1" if largest < 256 else ">u2").tobytes()
    (tmp_path / "a.pgm").write_bytes(b"P5 12 8 %d\n" % largest + data)
    assert np.abs(read_image(tmp_path / "a.pgm")[..., 1] - values * 255 / largest).max() <= 0.51


def test_grey_and_one_bit(tmp_path: Path) -> None:
    grey = NOISE[..., 0]
    np.testing.assert_array_equal(read_image(save(tmp_path / "grey.png", grey)), np.repeat(grey[..., None], 3, axis=-1))
    bits = grey > 127
    image = read_image(save(tmp_path / "bits.png", PIL.Image.fromarray(bits)))
    np.testing.assert_array_equal(image, np.repeat(bits[..., None], 3, axis=-1) * np.uint8(255))


@pytest.mark.parametrize("kind", ["png", "tif", "tif big-endian"])
def test_sixteen_bit_grey_is_scaled(tmp_path: Path, kind: str) -> None:
    """Every value there is, against exact integer rounding of value / 257."""
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    if kind == "png":
        path = save(tmp_path / "a.png", values)
    else:
        path = tiff(tmp_path / "a.tif", values, 16, order=">" if "big" in kind else "<")
    expected = ((values.astype(np.int64) + 128) // 257).astype(np.uint8)
    np.testing.assert_array_equal(read_image(path), np.repeat(expected[..., None], 3, axis=-1))


def test_sixteen_bit_tiff_whose_zero_is_white(tmp_path: Path) -> None:
    values = np.array([[0, 65535, 257 * 10]], dtype=np.uint16)
    assert read_image(tiff(tmp_path / "a.tif", values, 16, photometric=0))[0, :, 0].tolist() == [255, 0, 245]


def test_twelve_bit_tiff(tmp_path: Path) -> None:
    values = np.array([[0, 4095], [2048, 1000]], dtype=np.uint16)
    assert read_image(tiff(tmp_path / "a.tif", values, 12))[..., 0].tolist() == [[0, 255], [128, 62]]


def test_sixteen_bit_colour(tmp_path: Path) -> None:
    values = np.random.default_rng(1).integers(0, 65536, (5, 4, 3))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    image = read_image(png(tmp_path / "a.png", 4, 5, 16, 2, rows))
    assert np.abs(image - values / 257).max() <= 1


def test_sixteen_bit_transparent_values(tmp_path: Path) -> None:
    """A transparent value, grey or colour, shows white; the others stay."""
    row = b"\0" + struct.pack(">3H", 0x1234, 0x4321, 0)
    image = read_image(png(tmp_path / "grey.png", 3, 1, 16, 0, row, (b"tRNS", struct.pack(">H", 0x1234))))
    assert image[0].tolist() == [[255] * 3, [67] * 3, [0] * 3]
    row = b"\0" + struct.pack(">6H", 0x1234, 0x2345, 0x3456, 0xFF00, 0, 0)
    key = struct.pack(">3H", 0x1234, 0x2345, 0x3456)
    assert read_image(png(tmp_path / "colour.png", 2, 1, 16, 2, row, (b"tRNS", key)))[0].tolist() == [
        [255] * 3,
        [255, 0, 0],
    ]


def test_floating_point_and_wide_integers_are_refused(tmp_path: Path) -> None:
    path = tiff(tmp_path / "f.tif", np.zeros((2, 2), dtype=np.float32), 32, sample_format=3)
    with pytest.raises(UserError, match=r"f\.tif: expected 8 or 16 bits a sample, found floating point \(mode F\)"):
        read_image(path)
    path = tiff(tmp_path / "i.tif", np.zeros((2, 2), dtype=np.int32), 32, sample_format=2)
    with pytest.raises(UserError, match=r"mode I\)"):
        read_image(path)


def test_cmyk(tmp_path: Path) -> None:
    """Pure inks: cyan takes red away, black all; as TIFF (plain) and as JPEG (Adobe's, inverted)."""
    inks = np.zeros((16, 64, 4), dtype=np.uint8)
    for ink in range(4):
        inks[:, 16 * ink : 16 * ink + 16, ink] = 255
    expected = [[0, 255, 255], [255, 0, 255], [255, 255, 0], [0, 0, 0]]
    picture = PIL.Image.fromarray(inks, "CMYK")
    for path, apart in ((save(tmp_path / "a.tif", picture), 0), (save(tmp_path / "a.jpg", picture, quality=95), 6)):
        image = read_image(path)
        assert np.abs(image[8, 8::16].astype(int) - expected).max() <= apart


def test_alpha_lies_on_white(tmp_path: Path) -> None:
    layer = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 128], [0, 0, 200, 51]]], dtype=np.uint8)
    alpha = layer[..., 3:] / 255
    expected = layer[..., :3] * alpha + 255 * (1 - alpha)
    for suffix, options in (("png", {}), ("webp", {"lossless": True, "exact": True}), ("tif", {})):
        image = read_image(save(tmp_path / f"a.{suffix}", layer, **options))
        assert np.abs(image - expected).max() <= 0.5 + 1e-9, suffix
    grey = PIL.Image.fromarray(np.array([[[100, 0], [100, 255]]], dtype=np.uint8), "LA")
    assert read_image(save(tmp_path / "la.png", grey))[0].tolist() == [[255] * 3, [100] * 3]


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_palette_transparency_lies_on_white(tmp_path: Path, suffix: str) -> None:
    picture = PIL.Image.new("P", (3, 1))
    picture.putpalette([10, 20, 30, 200, 100, 50, 1, 2, 3])
    picture.putdata([0, 1, 2])
    image = read_image(save(tmp_path / f"a.{suffix}", picture, transparency=1))
    assert image[0].tolist() == [[10, 20, 30], [255, 255, 255], [1, 2, 3]]


def test_palette_with_an_alpha_of_its_own(tmp_path: Path) -> None:
    row = b"\0\0\1"
    chunks = ((b"PLTE", bytes([255, 0, 0, 0, 0, 255])), (b"tRNS", bytes([51, 255])))
    assert read_image(png(tmp_path / "a.png", 2, 1, 8, 3, row, *chunks))[0].tolist() == [[255, 204, 204], [0, 0, 255]]


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_the_first_of_many_frames(tmp_path: Path, suffix: str) -> None:
    red, blue = (PIL.Image.new("RGB", (8, 6), colour) for colour in ("#ff0000", "#0000ff"))
    options = {"lossless": True} if suffix == "webp" else {}
    path = save(tmp_path / f"a.{suffix}", red, save_all=True, append_images=[blue], **options)
    np.testing.assert_array_equal(read_image(path), np.broadcast_to(np.uint8([255, 0, 0]), (6, 8, 3)))


TURNS = {
    1: CORNERS,
    2: CORNERS[:, ::-1],
    3: CORNERS[::-1, ::-1],
    4: CORNERS[::-1],
    5: CORNERS.transpose(1, 0, 2),
    6: CORNERS[::-1].transpose(1, 0, 2),
    7: CORNERS[::-1, ::-1].transpose(1, 0, 2),
    8: CORNERS[:, ::-1].transpose(1, 0, 2),
}
"""what a stored CORNERS must look like, by the EXIF standard: 6 says that row 0 is on the right, column 0 on top"""


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
@pytest.mark.parametrize("orientation", list(TURNS))
def test_exif_orientation(tmp_path: Path, suffix: str, orientation: int) -> None:
    exif = PIL.Image.Exif()
    exif[274] = orientation
    options = {"lossless": True} if suffix == "webp" else {}
    path = save(tmp_path / f"a.{suffix}", CORNERS, exif=exif, **options)
    np.testing.assert_array_equal(read_image(path), TURNS[orientation])


def test_exif_orientation_of_jpeg_and_of_sixteen_bits(tmp_path: Path) -> None:
    exif = PIL.Image.Exif()
    exif[274] = 6
    halves = np.zeros((16, 32, 3), dtype=np.uint8)
    halves[:, :16] = 255
    image = read_image(save(tmp_path / "a.jpg", halves, exif=exif))
    assert image.shape == (32, 16, 3)
    assert image[:14].min() > 240
    assert image[18:].max() < 15
    grey = np.array([[0, 1, 2], [3, 4, 5]], dtype=np.uint8)
    for suffix, options in (("png", {}), ("tif", {}), ("tiff", {"compression": "tiff_deflate"})):
        for pixels in (grey, grey * np.uint16(257)):
            image = read_image(save(tmp_path / f"deep.{suffix}", pixels, exif=exif, **options))
            assert image[..., 0].tolist() == [[3, 0], [4, 1], [5, 2]], (suffix, pixels.dtype)


def test_damaged_exif_does_not_cost_the_picture(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", CORNERS, exif=b"Exif\0\0nonsense of no kind")
    np.testing.assert_array_equal(read_image(path), CORNERS)


# --- colour profiles --------------------------------------------------------------------------------------------------

SRGB_TO_D50 = np.array([[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])
"""linear sRGB to XYZ under D50, as the profiles of sRGB have it"""
WIDE_TO_D50 = np.array([[0.5151, 0.2920, 0.1571], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]])
"""of Display P3"""


def profile(space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile by hand, version 2."""
    head = struct.pack(">I4sI4s4s4s", 0, b"", 0x02400000, b"mntr", space.ljust(4), connection.ljust(4))
    head += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061) + bytes(48)
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += struct.pack(">4sII", name, 128 + 4 + 12 * len(tags) + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    return struct.pack(">I", 128 + len(table) + len(body)) + head[4:] + table + body


def fixed(values: np.ndarray) -> bytes:
    return np.round(np.asarray(values) * 65536).astype(">i4").tobytes()


def gamma(power: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(power * 256))


def rgb_profile(to_d50: np.ndarray, power: float) -> bytes:
    """Of primaries, the columns of a matrix, and a gamma."""
    colours = {name + b"XYZ": b"XYZ " + bytes(4) + fixed(to_d50[:, n]) for n, name in enumerate((b"r", b"g", b"b"))}
    return profile(b"RGB", b"XYZ", {**colours, **{name + b"TRC": gamma(power) for name in (b"r", b"g", b"b")}})


def grey_profile(power: float) -> bytes:
    white = b"XYZ " + bytes(4) + fixed([0.9642, 1, 0.8249])
    return profile(b"GRAY", b"XYZ", {b"wtpt": white, b"kTRC": gamma(power)})


def cmyk_profile() -> bytes:
    """A press whose cyan ink is a neutral grey of L* 50, whose black is black, and whose other inks are invisible."""
    table = bytes(range(256))
    inks = [(cyan, black) for cyan in (0, 1) for _ in range(4) for black in (0, 1)]
    corners = b"".join(bytes([0 if black else 128 if cyan else 255, 128, 128]) for cyan, black in inks)
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + fixed(np.eye(3)) + table * 4 + corners + table * 3
    return profile(b"CMYK", b"Lab", {b"A2B0": lut})


def srgb(linear: np.ndarray) -> np.ndarray:
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_a_wide_profile_is_converted(tmp_path: Path, suffix: str) -> None:
    """Against the matrices: gamma 1.8, Display P3's primaries."""
    stored = np.array([[[0, 200, 60], [200, 30, 30], [90, 90, 90], [10, 250, 250], [255, 255, 255]]], dtype=np.uint8)
    expected = srgb((stored / 255) ** 1.8 @ (np.linalg.inv(SRGB_TO_D50) @ WIDE_TO_D50).T)
    options = {"lossless": True, "exact": True} if suffix == "webp" else {}
    path = save(tmp_path / f"a.{suffix}", stored, icc_profile=rgb_profile(WIDE_TO_D50, 1.8), **options)
    assert np.abs(read_image(path) - expected).max() <= 2
    assert np.abs(expected - stored).max() > 20


def test_a_profile_of_exchanged_channels() -> None:
    """Stored blue, seen red, as any viewer shows it; transparency is laid on white after that."""
    swapped = rgb_profile(SRGB_TO_D50[:, ::-1], 2.2)
    picture = PIL.Image.new("RGBA", (2, 1), (10, 20, 240, 255))
    picture.putpixel((1, 0), (10, 20, 240, 0))
    picture.info["icc_profile"] = swapped
    found = decode_image(picture).astype(int)
    assert np.abs(found[0, 0] - srgb((np.array([240, 20, 10]) / 255) ** 2.2)).max() <= 2
    assert found[0, 1].tolist() == [255, 255, 255]
    palette = PIL.Image.new("P", (1, 1))
    palette.putpalette([10, 20, 240])
    palette.info["icc_profile"] = swapped
    assert (decode_image(palette)[0, 0] == found[0, 0]).all()


def test_profiles_of_grey(tmp_path: Path) -> None:
    """Grey of gamma 1.6, of 8 and 16 bits, with alpha, and by a profile of RGB."""
    ramp = np.arange(0, 256, 5, dtype=np.uint8)[None]
    expected = srgb((ramp / 255) ** 1.6)
    for kind, icc in (("grey", grey_profile(1.6)), ("rgb", rgb_profile(SRGB_TO_D50, 1.6))):
        for name, pixels in (("8", ramp), ("16", ramp * np.uint16(257)), ("la", np.stack([ramp, ramp | 255], -1))):
            image = read_image(save(tmp_path / f"{kind}{name}.png", pixels, icc_profile=icc))
            assert np.abs(image[..., 0] - expected).max() <= 2, (kind, name)
            assert (np.ptp(image.astype(int), axis=-1) <= 1).all()


def test_a_profile_of_inks(tmp_path: Path) -> None:
    inks = np.zeros((16, 48, 4), dtype=np.uint8)
    inks[:, 16:32, 0], inks[:, 32:, 1] = 255, 255
    grey = 255 * (1.055 * 0.1842 ** (1 / 2.4) - 0.055)
    picture = PIL.Image.fromarray(inks, "CMYK")
    for name in ("a.tif", "a.jpg"):
        image = read_image(save(tmp_path / name, picture, icc_profile=cmyk_profile()))[8, 8::16]
        assert np.abs(image - [[255] * 3, [grey] * 3, [255] * 3]).max() <= 6


def test_srgb_stays_to_the_bit(tmp_path: Path) -> None:
    own = PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes()
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.png", NOISE, icc_profile=own)), NOISE)


def test_a_profile_of_another_colour_space_is_ignored() -> None:
    """As of a picture that a program converted and whose profile it kept."""
    for icc in (cmyk_profile(), grey_profile(1.0)):
        picture = PIL.Image.fromarray(NOISE)
        picture.info["icc_profile"] = icc
        np.testing.assert_array_equal(decode_image(picture), NOISE)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_a_damaged_profile_is_refused(tmp_path: Path, suffix: str) -> None:
    whole = rgb_profile(WIDE_TO_D50, 2.2)
    for number, icc in enumerate((b"nonsense", whole[:150], whole[:300], whole[:128] + bytes(len(whole) - 128))):
        refused(save(tmp_path / f"{number}.{suffix}", NOISE, icc_profile=icc), "damaged colour profile")


def test_a_profile_in_pieces_that_are_not_all_there_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", NOISE, icc_profile=rgb_profile(WIDE_TO_D50, 2.2))
    data = path.read_bytes()
    place = data.index(b"ICC_PROFILE\0") + 12
    path.write_bytes(data[: place + 1] + b"\2" + data[place + 2 :])  # "1 of 2"
    refused(path, "incomplete colour profile")


# --- one decoder ------------------------------------------------------------------------------------------------------


def exif_of(orientation: int) -> PIL.Image.Exif:
    exif = PIL.Image.Exif()
    exif[274] = orientation
    return exif


def sixteen_bit_key(path: Path) -> Path:
    row = b"\0" + struct.pack(">6H", 0x1234, 0x2345, 0x3456, 0xFF00, 0, 0)
    return png(path, 2, 1, 16, 2, row, (b"tRNS", struct.pack(">3H", 0x1234, 0x2345, 0x3456)))


def keyed_palette() -> PIL.Image.Image:
    picture = PIL.Image.fromarray(NOISE).quantize(20)
    picture.info["transparency"] = 3
    return picture


GREY, LAYER = NOISE[..., 0], np.concatenate([NOISE, NOISE[..., :1]], -1)
FILES: dict[str, Callable[[Path], Path]] = {
    "alpha": lambda folder: save(folder / "a.png", LAYER),
    "alpha of a WebP": lambda folder: save(folder / "a.webp", LAYER, lossless=True),
    "grey with alpha": lambda folder: save(folder / "a.png", LAYER[..., 2:]),
    "16-bit grey": lambda folder: save(folder / "a.png", GREY * np.uint16(250)),
    "16-bit TIFF, 0 white": lambda folder: tiff(folder / "a.tif", GREY * np.uint16(200), 16, photometric=0),
    "12-bit TIFF": lambda folder: tiff(folder / "a.tif", GREY * np.uint16(16), 12),
    "a transparent 16-bit colour": lambda folder: sixteen_bit_key(folder / "a.png"),
    "a transparent palette": lambda folder: save(folder / "a.gif", keyed_palette()),
    "1 bit": lambda folder: save(folder / "a.png", GREY > 99),
    "CMYK": lambda folder: save(folder / "a.jpg", PIL.Image.fromarray(LAYER, "CMYK")),
    "turned JPEG": lambda folder: save(folder / "a.jpg", NOISE, exif=exif_of(5)),
    "turned layer": lambda folder: save(folder / "a.png", LAYER, exif=exif_of(8)),
    "turned grey TIFF": lambda folder: save(folder / "a.tif", GREY, exif=exif_of(6)),
    "turned 16-bit TIFF": lambda folder: save(folder / "a.tif", GREY * np.uint16(9), exif=exif_of(7)),
    "profile": lambda folder: save(folder / "a.png", NOISE, icc_profile=rgb_profile(WIDE_TO_D50, 2.2)),
    "several frames": lambda folder: save(folder / "a.gif", NOISE, save_all=True, append_images=[keyed_palette()]),
}


@pytest.mark.parametrize("kind", FILES)
def test_one_picture_has_the_same_pixels_however_it_comes(tmp_path: Path, kind: str) -> None:
    path = FILES[kind](tmp_path)
    expected, content = read_image(path), path.read_bytes()
    with PIL.Image.open(path) as image:
        for source in (str(path), content, io.BytesIO(content), image, image, PIL.Image.open(io.BytesIO(content))):
            np.testing.assert_array_equal(decode_image(source), expected)
        assert image.filename == str(path)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"])
def test_pictures_that_never_were_files(mode: str) -> None:
    """Half opaque red on white is the same in every mode that can say it; decoding changes nothing in the source."""
    layer = PIL.Image.new("RGBA", (3, 2), (255, 0, 0, 128))
    source = layer.convert("LA").convert(mode) if mode == "La" else layer.convert(mode)
    before = source.mode, source.size, source.tobytes(), dict(source.info)
    found = decode_image(source, "picture")
    assert (source.mode, source.size, source.tobytes(), source.info) == before
    if mode in ("RGBA", "RGBa", "P", "PA"):
        expected = [255, 127, 127]
    elif mode in ("LA", "La"):
        expected = [165, 165, 165]  # luma 76 of red, half of it over white
    else:
        expected = np.asarray(source.convert("RGB"))[0, 0].tolist()
    assert np.abs(found[1, 2].astype(int) - expected).max() <= 1


def test_a_picture_of_sixteen_bits_with_its_orientation_in_memory() -> None:
    picture = PIL.Image.fromarray(np.array([[0, 65535, 257]], dtype=np.uint16))
    picture.getexif()[274] = 8
    assert decode_image(picture)[..., 0].tolist() == [[1], [255], [0]]


def test_arrays() -> None:
    np.testing.assert_array_equal(decode_image(NOISE), NOISE)
    np.testing.assert_array_equal(decode_image(NOISE[:, ::-1]), NOISE[:, ::-1])
    np.testing.assert_array_equal(decode_image(GREY)[..., 1], GREY)
    np.testing.assert_array_equal(decode_image(GREY > 9)[..., 2], (GREY > 9) * np.uint8(255))
    layer = np.array([[[0, 0, 0, 0], [9, 8, 7, 255]]], dtype=np.uint8)
    assert decode_image(layer).tolist() == [[[255, 255, 255], [9, 8, 7]]]


def test_what_is_no_picture_is_refused_by_name() -> None:
    for source, found in (
        (NOISE / 255, r"an array of uint8 \[row, column, 3\], found float64 \[24, 40, 3\]"),
        (NOISE[None], r"found uint8 \[1, 24, 40, 3\]"),
        (GREY.astype(np.float32), "found floating point"),
        (PIL.Image.new("F", (4, 4)), "found floating point"),
        (PIL.Image.new("I", (4, 4)), "found 32-bit"),
        ([NOISE], "image, found list"),
        (None, "image, found NoneType"),
        (b"", "found an empty file"),
        (b"words", "found something else"),
    ):
        with pytest.raises(UserError, match=f"^picture: expected .*{found}"):
            decode_image(source, "picture")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^picture: expected at most 959 pixels, found 40x24"):
        decode_image(PIL.Image.fromarray(NOISE), "picture", max_pixels=959)


# --- masks ------------------------------------------------------------------------------------------------------------

REDRAWN = np.zeros((8, 12), dtype=bool)
REDRAWN[1:4, 2:9] = True
REDRAWN[6, 11] = True
COLOURS = np.random.default_rng(5).integers(0, 256, (8, 12, 3), dtype=np.uint8)


def layer_mask(colours: np.ndarray, inside: int = 0, outside: int = 255) -> np.ndarray:
    return np.concatenate([colours, np.where(REDRAWN, inside, outside)[..., None].astype(np.uint8)], -1)


def palette_mask() -> PIL.Image.Image:
    """Index 1 is white and transparent, 0 and 2 are opaque: white, too, and black."""
    picture = PIL.Image.fromarray(np.where(REDRAWN, 1, 2 * (COLOURS[..., 0] > 99)).astype(np.uint8), "P")
    picture.putpalette([255, 255, 255, 255, 255, 255, 0, 0, 0])
    picture.info["transparency"] = 1
    return picture


WHITE = REDRAWN * np.uint8(255)
MASKS: dict[str, PIL.Image.Image | np.ndarray] = {
    "bool": REDRAWN,
    "white": WHITE,
    "white, 1 bit": PIL.Image.fromarray(REDRAWN),
    "white, 16 bits": np.where(REDRAWN, 40_000, 20_000).astype(np.uint16),
    "white, in colour": np.where(REDRAWN[..., None], [255, 250, 240], [200, 0, 60]).astype(np.uint8),
    "white, opaque": np.stack([WHITE, WHITE, WHITE, WHITE | 255], -1),
    "white, grey and opaque": PIL.Image.fromarray(np.stack([WHITE, WHITE | 255], -1)),
    "transparent, colours kept": layer_mask(COLOURS),
    "transparent, colours cleared": layer_mask(np.where(REDRAWN[..., None], 0, COLOURS).astype(np.uint8)),
    "transparent, all black": layer_mask(COLOURS * 0),
    "transparent, all white": layer_mask(COLOURS | 255),
    "transparent, white where it is kept": layer_mask(np.repeat(255 - WHITE[..., None], 3, -1)),
    "transparent, soft": layer_mask(COLOURS, 127, 128),
    "transparent, grey": PIL.Image.fromarray(layer_mask(COLOURS)[..., 2:]),
    "transparent, palette": palette_mask(),
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_masks(tmp_path: Path, kind: str, orientation: int) -> None:
    """Every mask of the same area selects the same area, by file, bytes and object, turned as a picture is."""
    mask = MASKS[kind]
    mask = mask if isinstance(mask, PIL.Image.Image) else PIL.Image.fromarray(mask)
    expected = {1: REDRAWN, 3: REDRAWN[::-1, ::-1], 6: REDRAWN[::-1].T}[orientation]
    for suffix in ("png",) if mask.mode in ("P", "LA") else ("png", "tif"):
        path = save(tmp_path / f"m.{suffix}", mask, exif=exif_of(orientation))
        for source in (path, str(path), path.read_bytes(), PIL.Image.open(path)):
            np.testing.assert_array_equal(read_mask(source, expected.shape), expected)
    if orientation == 1:
        np.testing.assert_array_equal(read_mask(MASKS[kind], (8, 12)), REDRAWN)


def test_a_transparent_colour_decides_too(tmp_path: Path) -> None:
    """tRNS of grey: 77 is transparent; the white pixel is not."""
    row = b"\0" + bytes([77, 255, 0])
    path = png(tmp_path / "a.png", 3, 1, 8, 0, row, (b"tRNS", struct.pack(">H", 77)))
    assert read_mask(path, (1, 3)).tolist() == [[True, False, False]]


def test_masks_that_are_refused(tmp_path: Path) -> None:
    for mask, found in (
        (np.zeros((8, 12), np.uint8), "a transparent area to redraw, or a white one in an opaque mask, found none"),
        (np.full((8, 12), 127, np.uint8), "found none"),
        (np.zeros((8, 12), bool), "found none"),
        (layer_mask(COLOURS | 255, 128, 255), "found none"),  # not opaque, and nowhere transparent enough
        (WHITE.T, "12x8 pixels, as the image, found 8x12"),
        (WHITE[:4], "12x8 pixels, as the image, found 12x4"),
    ):
        with pytest.raises(UserError, match=f"^mask: expected .*{found}"):
            read_mask(mask, (8, 12))
        path = save(tmp_path / "m.png", mask)
        with pytest.raises(UserError, match=f"m.png: expected .*{found}"):
            read_mask(path, (8, 12))


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(path: Path, what: str, **options: int) -> None:
    with pytest.raises(UserError, match=what) as caught:
        read_image(path, **options)
    line = str(caught.value)
    assert line.startswith(f"{path}: expected ")
    assert "found" in line
    assert "\n" not in line


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tif", "avif", "jp2", "ppm", "ico"])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.95])
def test_truncated(tmp_path: Path, suffix: str, share: float) -> None:
    path = save(tmp_path / f"a.{suffix}", NOISE)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    refused(path, "damaged|something else")


def test_corrupt_png(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", NOISE)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    refused(path, "damaged")


def test_no_images(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    refused(tmp_path / "empty.png", "found an empty file")
    (tmp_path / "text.png").write_text("dear diary")
    refused(tmp_path / "text.png", "found something else")
    refused(tmp_path / "none.png", "found none")
    refused(tmp_path, "found a folder")
    os.mkfifo(tmp_path / "pipe.png")
    refused(tmp_path / "pipe.png", "no file")
    save(tmp_path / "a.pcx", NOISE)
    refused(tmp_path / "a.pcx", "found something else")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # pytest drops the filter of the module
@pytest.mark.parametrize("side", [9_000, 12_000, 60_000])
def test_a_bomb_is_refused_by_its_header(tmp_path: Path, side: int) -> None:
    """Below, between and above PIL's own limits; decoded, the smallest would take 324 MB."""
    path = png(tmp_path / "a.png", side, side, 8, 2, b"\0" * 1000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(path, f"expected at most 64000000 pixels, found {'more' if side == 60_000 else f'{side}x{side}'}")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_the_limit_can_be_set(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", NOISE)
    refused(path, "expected at most 959 pixels, found 40x24", max_pixels=959)
    assert read_image(path, max_pixels=960).shape == NOISE.shape


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_random_damage_never_escapes(tmp_path: Path) -> None:
    """Either an array or a UserError, whatever bytes are changed."""
    random = np.random.default_rng(3)
    for suffix in ("png", "jpg", "gif", "webp", "bmp", "tif", "avif", "jp2", "ppm", "ico"):
        buffer = io.BytesIO()
        names = {"jpg": "JPEG", "tif": "TIFF", "jp2": "JPEG2000"}
        PIL.Image.fromarray(NOISE).save(buffer, names.get(suffix, suffix.upper()))
        for _ in range(60):
            data = bytearray(buffer.getvalue())
            for place in random.integers(0, min(len(data), 200), 3):
                data[place] = random.integers(256)
            (tmp_path / f"a.{suffix}").write_bytes(data)
            try:
                image = read_image(tmp_path / f"a.{suffix}", max_pixels=100_000)
            except UserError:
                continue
            assert image.dtype == np.uint8
            assert image.ndim == 3


# --- fitting, listing -------------------------------------------------------------------------------------------------


def test_fit_takes_the_centre() -> None:
    wide = NOISE[:, :31]
    np.testing.assert_array_equal(fit(wide, 24), wide[:, 3:27])
    np.testing.assert_array_equal(fit(wide.transpose(1, 0, 2), 24), wide[:, 3:27].transpose(1, 0, 2))
    assert not np.shares_memory(fit(wide, 24), wide)


def test_fit_is_antialiased() -> None:
    """A chessboard of single pixels becomes grey, its mean; a constant stays."""
    board = np.repeat((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)[..., None], 3, axis=-1)
    small = fit(board, 16)
    assert small.shape == (16, 16, 3)
    assert np.abs(small.astype(int) - 127.5).max() < 6
    assert (fit(np.full((30, 50, 3), 77, np.uint8), 16) == 77).all()


def test_a_fitted_mask_is_a_mask() -> None:
    found = fit(np.repeat(np.repeat(REDRAWN, 4, 0), 4, 1)[:, 8:40], 8)
    assert found.dtype == bool
    np.testing.assert_array_equal(found, REDRAWN[:, 2:10])


def test_fit_enlarges_only_from_smallest() -> None:
    assert fit(NOISE, 48, smallest=24).shape == (48, 48, 3)
    with pytest.raises(ValueError, match="expected sides of at least 25 pixels, found 40x24"):
        fit(NOISE, 48, smallest=25)


def test_image_files(tmp_path: Path) -> None:
    for name in ("b.PNG", "a/z.jpg", "a/b/c.webp", "a.txt", ".hidden.png", ".thumbs/x.png", "a-.tif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "folder.png").mkdir()
    found = [path.relative_to(tmp_path).as_posix() for path in image_files(tmp_path)]
    assert found == ["a-.tif", "a/b/c.webp", "a/z.jpg", "b.PNG", "gone.png"]
    assert image_files(tmp_path / "a.txt") == [tmp_path / "a.txt"]
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match=r"bare: expected image files .* found none"):
        image_files(tmp_path / "bare")
    with pytest.raises(UserError, match=r"nowhere: expected .* found none"):
        image_files(tmp_path / "nowhere")
