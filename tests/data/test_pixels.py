"""Images of more than 8 bits, and files with more bands than three."""

from __future__ import annotations

import io
import logging
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from fedprompt.data import open_dataset
from fedprompt.data.dataset import ImageDataset
from fedprompt.data.images import decode, decode_rgb
from fedprompt.data.pixels import Pixels
from fedprompt.data.sources.folder import FolderConfig
from tests.support.fake_data import encoded
from tests.support.refusals import refused


def grey16(values: list[int], kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.array([values], dtype=np.uint16)).save(buffer, kind)
    return buffer.getvalue()


def tiff(values: NDArray[Any], **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **options)
    return buffer.getvalue()


def colour_png16(rgb: tuple[int, int, int]) -> bytes:
    """A PNG of one pixel with 16 bits per channel, which Pillow reads but cannot write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
    pixel = chunk(b"IDAT", zlib.compress(b"\0" + struct.pack(">HHH", *rgb)))
    return b"\x89PNG\r\n\x1a\n" + header + pixel + chunk(b"IEND", b"")


def row(image: Image.Image) -> list[Any]:
    return np.asarray(image)[0].tolist()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_stretch_maps_a_range_to_8_bits(kind: str) -> None:
    data = grey16([0, 2048, 4095, 60000], kind)
    assert [grey for grey, *_ in row(decode_rgb(data))] == [0, 7, 15, 233]
    stretched = decode_rgb(data, Pixels(stretch=(0, 4095)))
    assert [grey for grey, *_ in row(stretched)] == [0, 127, 255, 255]
    assert decode(data)[1]
    assert not decode(encoded((1, 2, 3)))[1]


def test_the_whole_range_is_what_is_done_without_stretch() -> None:
    data = grey16(list(range(0, 65536, 7)))
    assert row(decode_rgb(data, Pixels(stretch=(0, 65535)))) == row(decode_rgb(data))


def test_colour_of_16_bits_is_stretched_from_tiff_only() -> None:
    values = np.array([[[0, 2048, 4095]]], dtype=np.uint16)
    data = tiff(values, photometric="rgb")
    assert decode(data)[1]
    assert row(decode_rgb(data, Pixels(stretch=(0, 4095)))) == [[0, 127, 255]]
    png = colour_png16((0, 2048, 4095))
    assert decode(png)[1]
    with pytest.raises(ValueError, match="save it as TIFF"):
        decode_rgb(png, Pixels(stretch=(0, 4095)))


@pytest.mark.parametrize(
    "options",
    [
        {"planarconfig": "contig"},
        {"planarconfig": "separate"},
        {"planarconfig": "contig", "compression": "zlib"},
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_bands_of_a_multi_band_file(options: dict[str, Any], dtype: Any) -> None:
    values_HWS = np.arange(4 * 5 * 6).reshape(4, 5, 6).astype(dtype)
    apart = options["planarconfig"] == "separate"
    stored = np.moveaxis(values_HWS, -1, 0) if apart else values_HWS
    data = tiff(np.ascontiguousarray(stored), photometric="minisblack", **options)
    with pytest.raises(ValueError, match=r"6 bands of \d+ bits; choose three: data\.bands=\["):
        decode_rgb(data)
    image, deep = decode(data, Pixels(stretch=(0, 255), bands=(4, 2, 1)))
    assert np.array_equal(np.asarray(image), values_HWS[:, :, [3, 1, 0]].astype(np.uint8))
    assert deep == (dtype is not np.uint8)
    with pytest.raises(ValueError, match="6 bands, no band 7"):
        decode_rgb(data, Pixels(bands=(7, 2, 1)))


@pytest.mark.parametrize("kind", ["f8", "f4 colour", "f2", "u8", "big"])
def test_a_tiff_file_that_pillow_does_not_read_gets_advice(kind: str) -> None:
    if kind == "big":
        values, options = np.zeros((4, 4, 7), np.uint16), {"planarconfig": "contig"}
        data = tiff(values, photometric="minisblack", bigtiff=True, **options)
    elif "colour" in kind:
        data = tiff(np.full((4, 4, 3), 0.5, np.float32), photometric="rgb")
    else:
        data = tiff(np.full((4, 4), 1, dtype=kind))
    with pytest.raises(ValueError, match=r"data\.bands=\[") as caught:
        decode_rgb(data)
    # The advice works as it is written.
    bands = tuple(int(c) for c in str(caught.value).partition("data.bands=[")[2][:7:3])
    assert decode_rgb(data, Pixels(stretch=(0, 2), bands=bands)).size == (4, 4)


def percentile_normalization(image: NDArray[Any], lower: float, upper: float) -> NDArray[Any]:
    """As torchgeo.datasets.utils documents it, for each band."""
    low, high = (np.percentile(image, q, axis=(0, 1)) for q in (lower, upper))
    return np.clip((image - low) / (high - low + 1e-5), 0, 1)


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_percentiles_of_each_band(dtype: Any) -> None:
    draw = np.random.default_rng(0)
    values_HWS = (draw.random((20, 30, 4)) * [100, 1000, 4000, 60000]).astype(dtype)
    data = tiff(values_HWS, photometric="minisblack", planarconfig="contig")
    image = decode_rgb(data, Pixels(bands=(4, 2, 1), percentiles=(2, 98)))
    expected = percentile_normalization(values_HWS[..., [3, 1, 0]].astype(np.float64), 2, 98)
    assert np.array_equal(np.asarray(image), np.floor(255 * expected).astype(np.uint8))
    # Each band uses the whole range, however dark it is.
    assert (np.asarray(image).min((0, 1)) == 0).all()
    assert (np.asarray(image).max((0, 1)) == 255).all()


@pytest.mark.parametrize("bands", [(), (1, 1, 1)])
def test_pixels_without_data_are_black_and_not_counted(bands: tuple[int, ...]) -> None:
    values = np.array([[9999, 9999, 9999, 100, 150, 200]], dtype=np.uint16)
    options: dict[str, Any] = {"extratags": [(42113, "s", 0, "9999", True)]}
    pixels = Pixels(bands=bands, percentiles=(0, 100))
    found = row(decode_rgb(tiff(values, photometric="minisblack", **options), pixels))
    assert [grey for grey, *_ in found] == [0, 0, 0, 0, 127, 254]
    counted = row(decode_rgb(tiff(values, photometric="minisblack"), pixels))
    assert [grey for grey, *_ in counted][:4] == [254, 254, 254, 0]
    nothing = tiff(np.full((2, 2), 9999, np.uint16), photometric="minisblack", **options)
    assert not np.asarray(decode_rgb(nothing, pixels)).any()


def test_a_folder_with_percentiles(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = folder(tmp_path / "root", {"1.png": grey16([0, 2000, 4000]), "2.png": grey16([7, 7])})
    caplog.set_level(logging.WARNING)
    found = load(root, percentiles=[0, 100])
    assert not caplog.text
    assert [grey for grey, *_ in row(found.open_image(0))] == [0, 127, 254]
    assert found.fingerprint != load(root, percentiles=[0, 50]).fingerprint
    both = FolderConfig(root=str(root), stretch=[0, 9], percentiles=[2, 98])
    assert "both" in refused(both.check)


def test_bands_that_cannot_be_read_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="another format"):
        decode_rgb(encoded((1, 2, 3)), Pixels(bands=(3, 2, 1)))
    data = tiff(
        np.zeros((4, 4, 6), dtype=np.uint16), photometric="minisblack", planarconfig="contig"
    )
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ValueError, match=r"pip install 'fedprompt\[tiff\]'"):
        decode_rgb(data, Pixels(bands=(3, 2, 1)))


def folder(root: Path, files: dict[str, bytes]) -> Path:
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        for file, data in files.items():
            (root / name / file).write_bytes(data)
    return root


def load(root: Path, **config: Any) -> ImageDataset:
    return open_dataset(FolderConfig(root=str(root), **config), 1, root.parent / "cache")


def test_a_folder_warns_until_stretch_is_set(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = folder(tmp_path / "root", {"1.png": grey16([0, 4095]), "2.png": encoded((1, 2, 3))})
    caplog.set_level(logging.WARNING)
    plain = load(root)
    assert "2 of 4 images" in caplog.text
    assert "data.stretch" in caplog.text
    caplog.clear()
    assert load(root).fingerprint == plain.fingerprint
    assert "data.stretch" in caplog.text, "also when no image is decoded again"
    caplog.clear()
    stretched = load(root, stretch=[0, 4095])
    assert stretched.fingerprint != plain.fingerprint, "the feature cache must not mix them"
    assert stretched.open_image(0).getpixel((1, 0)) == (255, 255, 255)
    assert not caplog.text


def test_a_folder_of_multi_band_files(tmp_path: Path) -> None:
    data = tiff(
        np.full((4, 4, 6), 500, dtype=np.uint16), photometric="minisblack", planarconfig="contig"
    )
    root = folder(tmp_path / "root", {"1.tif": data, "2.tif": data})
    assert load(root, bands=[3, 2, 1], stretch=[0, 1000]).open_image(0).getpixel((0, 0))[0] == 127
    # What could be read with bands is not taken for readable without them.
    line = refused(lambda: load(root))
    assert "1.tif" in line
    assert "data.bands=[3, 2, 1]" in line


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("percentiles", [5]),
        ("percentiles", [98, 2]),
        ("percentiles", [2, 101]),
        ("stretch", [5]),
        ("stretch", [9, 2]),
        ("bands", [1, 2]),
        ("bands", [0, 1, 2]),
    ],
)
def test_impossible_options_are_refused(tmp_path: Path, key: str, value: list[int]) -> None:
    assert key in refused(FolderConfig(root=str(tmp_path), **{key: value}).check)
