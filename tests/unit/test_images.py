"""Picture files of every kind against values known without PIL's conversions; damaged ones refused in one line."""

from __future__ import annotations

import io
import os
import resource
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from transfuse.errors import UserError
from transfuse.images import fit, image_files, read_image

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


@pytest.mark.parametrize("suffix", ["png", "webp", "bmp", "dib", "tif", "tiff"])
def test_lossless_formats(tmp_path: Path, suffix: str) -> None:
    options = {"lossless": True} if suffix == "webp" else {}
    image = read_image(save(tmp_path / f"a.{suffix}", NOISE, **options))
    assert image.dtype == np.uint8
    assert image.flags["C_CONTIGUOUS"]
    assert image.flags["WRITEABLE"]
    np.testing.assert_array_equal(image, NOISE)


def test_jpeg_is_near(tmp_path: Path) -> None:
    smooth = np.broadcast_to(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], (48, 64, 3))
    image = read_image(save(tmp_path / "a.jpg", smooth, quality=95))
    assert image.shape == (48, 64, 3)
    assert np.abs(image.astype(int) - smooth).max() <= 6


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


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(path: Path, what: str, **options: int) -> None:
    with pytest.raises(UserError, match=what) as caught:
        read_image(path, **options)
    line = str(caught.value)
    assert line.startswith(f"{path}: expected ")
    assert "found" in line
    assert "\n" not in line


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tif"])
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
    save(tmp_path / "a.ico", NOISE)
    refused(tmp_path / "a.ico", "found something else")


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
    for suffix in ("png", "jpg", "gif", "webp", "bmp", "tif"):
        buffer = io.BytesIO()
        PIL.Image.fromarray(NOISE).save(buffer, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper()))
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
