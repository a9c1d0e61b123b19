"""Pictures against arithmetic in NumPy: formats that Pillow cannot write, and every resizing."""

import io
import math
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data_helpers import refuses
from optgen.data import decoding
from optgen.data.decoding import (
    common_channels,
    count_channels,
    decode_image,
    find_unreadable,
    read_image,
)
from optgen.data.images import DataError, DataWarning

GRAY, COLOR, GRAY_ALPHA, COLOR_ALPHA = 0, 2, 4, 6  # color types of a PNG file
SEEDS = [0, 1, 2]


def chunk(kind: bytes, content: bytes) -> bytes:
    """Return a chunk of a PNG file."""
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def write_png(samples: np.ndarray, depth: int, kind: int, key: tuple[int, ...] = ()) -> io.BytesIO:
    """Return a PNG file as the specification describes it, without Pillow.

    Args:
        samples: (H, W, channels) whole numbers below 2**depth.
        depth: bits of a sample.
        kind: color type.
        key: samples of the transparent color.
    """
    height, width, _ = samples.shape
    shifts = np.arange(depth - 1, -1, -1)
    bits = (samples.reshape(height, -1, 1) >> shifts & 1).reshape(height, -1).astype(np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in np.packbits(bits, axis=1))
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    if key:
        file += chunk(b"tRNS", struct.pack(f">{len(key)}H", *key))
    return io.BytesIO(file + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def read(file: io.BytesIO, size: tuple[int, int]) -> np.ndarray:
    """Return a picture as (H, W, C) numbers."""
    return read_image(file, size).permute(1, 2, 0).numpy().astype(float)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("has_key", [False, True])
def test_gray_of_any_depth_and_its_transparent_gray(depth, has_key, seed):
    x = np.random.default_rng(seed).integers(0, 2**depth, (6, 9, 1))
    key = (int(x[2, 3, 0]),) if has_key else ()
    white = 2**depth - 1
    expected = x // 256 if depth == 16 else x * 255 // white
    if has_key:
        expected = expected * (x != key[0])
    assert np.array_equal(read(write_png(x, depth, GRAY, key), (6, 9)), expected)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("kind, channels", [(COLOR, 3), (GRAY_ALPHA, 2), (COLOR_ALPHA, 4)])
def test_color_and_alpha_of_8_and_16_bits(depth, kind, channels, seed):
    x = np.random.default_rng(seed).integers(0, 2**depth, (6, 9, channels))
    found, upper = read(write_png(x, depth, kind), (6, 9)), x >> (depth - 8)
    if kind == COLOR:
        assert np.array_equal(found, upper)
        return
    on_black = upper[..., :-1] * (upper[..., -1:] / 255)
    assert np.abs(found - on_black).max() <= 0.5 + 1e-9


def test_the_transparent_color_of_8_bits_is_black_and_of_16_is_refused():
    x = np.random.default_rng(0).integers(0, 3, (20, 20, 3))
    key = (1, 2, 0)
    is_key = (x == key).all(-1, keepdims=True)
    assert is_key.any()
    assert np.array_equal(read(write_png(x, 8, COLOR, key), (20, 20)), x * ~is_key)
    file = write_png(x, 16, COLOR, key)
    assert count_channels(file) is None
    with refuses("transparent color"):
        read_image(file, 9)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_cmyk_jpeg_is_ink_on_paper(seed, tmp_path):
    random = np.random.default_rng(seed)
    corners = random.uniform(0, 255, (2, 2, 4))
    y, x = np.mgrid[0:1:32j, 0:1:48j][..., None]
    top, bottom = ((1 - x) * a + x * b for a, b in corners)
    inks = np.round((1 - y) * top + y * bottom)
    path = tmp_path / "inks.jpg"
    picture = Image.frombytes("CMYK", (48, 32), inks.astype(np.uint8).tobytes())
    picture.save(path, quality=100, subsampling=0)
    expected = (255 - inks[..., :3]) * (255 - inks[..., 3:]) / 255
    assert np.abs(read(path, (32, 48)) - expected).max() <= 4  # the loss of the JPEG
    assert count_channels(path) == 3


def triangle_weights(old: int, new: int, low: float, high: float) -> np.ndarray:
    """Return the weights of `old` pixels in each of `new` ones that cover [low, high]."""
    scale = (high - low) / new
    width = max(scale, 1.0)
    centers = low + scale * (np.arange(new)[:, None] + 0.5)
    weights = np.clip(1 - np.abs(np.arange(old) + 0.5 - centers) / width, 0, None)
    return weights / weights.sum(1, keepdims=True)


def resized(x: np.ndarray, size: tuple[int, int], box: tuple[float, ...]) -> np.ndarray:
    """Return the part of a picture in a box (left, top, right, bottom), in another size."""
    rows = triangle_weights(x.shape[0], size[0], box[1], box[3])
    columns = triangle_weights(x.shape[1], size[1], box[0], box[2])
    return np.einsum("ih,hwc,jw->ijc", rows, x, columns)


def expect(x: np.ndarray, size: tuple[int, int], resize: str) -> np.ndarray:
    """Return what a picture becomes, by the definition of each way."""
    (old_h, old_w), (h, w) = x.shape[:2], size
    if resize == "stretch":
        return resized(x, size, (0, 0, old_w, old_h))
    if resize == "crop":
        scale = max(w / old_w, h / old_h)
        left, top = (old_w - w / scale) / 2, (old_h - h / scale) / 2
        return resized(x, size, (left, top, old_w - left, old_h - top))
    scale = min(w / old_w, h / old_h)
    inner = max(1, round(scale * old_h)), max(1, round(scale * old_w))
    out = np.zeros((h, w, x.shape[2]))
    top, left = (h - inner[0]) // 2, (w - inner[1]) // 2
    small = resized(x, inner, (0, 0, old_w, old_h))
    out[top : top + inner[0], left : left + inner[1]] = small
    return out


@pytest.mark.parametrize("resize", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("old", [(40, 30), (30, 47), (9, 9), (200, 3), (1, 1)])
@pytest.mark.parametrize("new", [(48, 64), (12, 20), (8, 8), (5, 40)])
def test_a_picture_is_fitted_as_defined(old, new, resize):
    x = np.random.default_rng(0).integers(0, 256, (*old, 3))
    file = io.BytesIO()
    Image.fromarray(x.astype(np.uint8)).save(file, "png")
    found = read_image(file, new, resize=resize).permute(1, 2, 0).numpy()
    assert found.shape == (*new, 3)
    assert np.abs(found - expect(x, new, resize)).max() <= 1.01  # Pillow rounds between its passes


def test_the_default_is_to_crop_to_a_square():
    x = np.random.default_rng(0).integers(0, 256, (30, 50, 3))
    file = io.BytesIO()
    Image.fromarray(x.astype(np.uint8)).save(file, "png")
    assert np.abs(read(file, 10) - expect(x, (10, 10), "crop")).max() <= 1.01
    assert math.prod(read_image(file, 10).shape) == 300


def test_files_are_looked_at_by_header_and_by_content(tmp_path):
    random = np.random.default_rng(0)
    kinds = {
        "gray": "L",
        "color": "RGB",
        "palette": "P",
        "bits": "1",
        "alpha": "LA",
        "deep": "I;16",
    }
    for name, mode in kinds.items():
        Image.new(mode, (9, 9)).save(tmp_path / f"{name}.png")
    Image.new("F", (9, 9)).save(tmp_path / "float.tif")
    noise = Image.fromarray(random.integers(0, 256, (99, 99, 3)).astype(np.uint8))
    noise.save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:4000])
    (tmp_path / "text.png").write_text("no picture")
    files = sorted(tmp_path.iterdir())
    counts = {file.stem: count_channels(file) for file in files}
    one, three = dict.fromkeys(("gray", "bits", "alpha", "deep"), 1), {"color": 3, "palette": 3}
    assert counts == {**one, **three, "cut": 3, "float": None, "text": None}
    assert sorted(file.stem for file in find_unreadable(files)) == ["cut", "float", "text"]
    with pytest.warns(DataWarning, match="mine: 4 gray and 3 color images, all are read in color"):
        assert common_channels("mine", files) == 3
    assert common_channels("mine", [tmp_path / "float.tif"]) is None


# JPEG files


def write_jpeg(rng: np.random.Generator) -> bytes:
    """Return a JPEG file of random size, layout and segments; a third have a damage."""
    height, width = rng.integers(1, 70, 2)
    kind = rng.choice(["L", "RGB", "RGB", "CMYK"])
    shape = (height, width) if kind == "L" else (height, width, len(kind))
    image = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), kind)
    settings = {"quality": int(rng.integers(5, 100)), "progressive": bool(rng.integers(2))}
    if kind == "RGB":
        settings["subsampling"] = int(rng.integers(3))
    exif = image.getexif()
    exif[0x112 if rng.integers(2) else 0x10F] = int(rng.integers(1, 9))
    extras = {"exif": exif, "comment": b"mine", "icc_profile": rng.bytes(50), "optimize": True}
    settings |= {name: value for name, value in extras.items() if rng.random() < 0.2}
    file = io.BytesIO()
    image.save(file, "jpeg", **settings)
    data, damage = bytearray(file.getvalue()), rng.integers(9)
    if damage == 0:
        return bytes(data[: rng.integers(len(data))])
    if damage in (1, 2):  # anywhere, and in the header
        data[rng.integers(len(data) if damage == 1 else 400)] = rng.integers(256)
    return bytes(data)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_plain_jpeg_is_what_pillow_opens(seed, tmp_path, monkeypatch):
    rng, path, plain = np.random.default_rng(seed), tmp_path / "a.jpg", 0
    for _ in range(300):
        path.write_bytes(write_jpeg(rng))
        channels, draft = rng.choice([None, 1, 3]), bool(rng.integers(2))
        plain += decoding._decode_plain_jpeg(path, draft) is not None

        def outcome() -> tuple:
            """Return the channels, and the pixels or the error."""
            try:
                pixels = np.asarray(decode_image(path, channels, draft))
                return count_channels(path), pixels.shape, pixels.tobytes()
            except DataError as error:
                return count_channels(path), str(error)

        found = outcome()
        with monkeypatch.context() as patch:
            patch.setattr(decoding, "_read_jpeg", lambda *_: b"")
            assert found == outcome()
    assert plain > 60


@pytest.mark.parametrize("limit, is_plain", [(200, True), (199, False), (None, True)])
def test_a_picture_of_which_pillow_warns_is_not_plain(limit, is_plain, tmp_path, monkeypatch):
    Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert (decoding._decode_plain_jpeg(tmp_path / "a.jpg", False) is not None) == is_plain
