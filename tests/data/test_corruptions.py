"""The corruptions of ImageNet-C: plain definitions, determinism, and order of severities."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.data.corruptions import CORRUPTIONS, SEVERITIES, corrupted
from fedprompt.data.corruptions.blur import convolved, copied_in_turn, motion_kernel, zoomed
from fedprompt.data.corruptions.dataset import corrupted_dataset
from fedprompt.data.corruptions.weather import plasma
from fedprompt.data.dataset import TEST, ImageDataset
from fedprompt.rng import generator

SIDE = 56


def scene() -> NDArray[np.uint8]:
    """An image with edges, ramps and fine stripes."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    stripes = 0.5 + 0.4 * np.sin(40 * x)
    disk = ((x - 0.4) ** 2 + (y - 0.6) ** 2 < 0.06) * 0.7
    return (np.stack([stripes * y, 0.2 + disk, 0.8 - 0.6 * x], -1).clip(0, 1) * 255).astype("uint8")


def at(name: str, severity: int, seed: int = 0) -> NDArray[np.uint8]:
    return corrupted(scene(), name, severity, generator(seed, name))


def distance(name: str, severity: int) -> float:
    return float(np.square(at(name, severity) / 255 - scene() / 255).mean())


def test_the_fifteen_of_the_paper() -> None:
    assert len(CORRUPTIONS) == 15


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_changes_the_image_and_is_repeatable(name: str) -> None:
    for severity in SEVERITIES:
        found = at(name, severity)
        assert (found.shape, found.dtype) == ((SIDE, SIDE, 3), np.uint8)
        assert not np.array_equal(found, scene())
        assert np.array_equal(found, at(name, severity))


@pytest.mark.parametrize(
    "name",
    ["gaussian_noise", "shot_noise", "impulse_noise", "glass_blur", "snow", "frost", "fog",
     "motion_blur", "elastic_transform"],
)  # fmt: skip
def test_random_ones_follow_the_generator(name: str) -> None:
    assert not np.array_equal(at(name, 3, seed=0), at(name, 3, seed=1))


@pytest.mark.parametrize(
    "name",
    ["gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "zoom_blur", "brightness",
     "contrast", "jpeg_compression"],
)  # fmt: skip
def test_a_higher_severity_is_farther_from_the_image(name: str) -> None:
    found = [distance(name, severity) for severity in SEVERITIES]
    assert found == sorted(found)
    assert found[-1] > found[0]


def test_noise_has_the_deviation_of_the_paper() -> None:
    grey = np.full((64, 64, 3), 128, np.uint8)
    for severity, sigma in zip((1, 2, 3), (0.08, 0.12, 0.18), strict=True):
        noise = corrupted(grey, "gaussian_noise", severity, generator(1, "n")) / 255 - 128 / 255
        assert noise.std() == pytest.approx(sigma, rel=0.05)
    # A Poisson number has its mean as its variance.
    shot = corrupted(grey, "shot_noise", 1, generator(1, "s")) / 255
    assert shot.std() == pytest.approx((128 / 255 / 60) ** 0.5, rel=0.05)
    changed = corrupted(grey, "impulse_noise", 4, generator(1, "i"))
    assert set(np.unique(changed)) == {0, 128, 255}
    assert (changed != 128).mean() == pytest.approx(0.17, abs=0.02)


def test_contrast_and_brightness_by_their_definitions() -> None:
    image = scene() / 255
    expected = (image - image.mean((0, 1))) * 0.2 + image.mean((0, 1))
    assert np.abs(at("contrast", 3) / 255 - expected).max() <= 0.5 / 255 + 1e-9
    import colorsys

    bright = at("brightness", 2) / 255
    for y, x in ((0, 0), (20, 30), (50, 11)):
        hue, saturation, value = colorsys.rgb_to_hsv(*image[y, x])
        plain = colorsys.hsv_to_rgb(hue, saturation, min(1, value + 0.2))
        assert bright[y, x] == pytest.approx(plain, abs=0.5 / 255 + 1e-9)
    black = corrupted(np.zeros((4, 4, 3), np.uint8), "brightness", 1, generator(0))
    assert set(np.unique(black)) == {26}


def test_pixels_and_jpeg_are_pillow_s() -> None:
    image = Image.fromarray(scene())
    small = image.resize((int(SIDE * 0.4), int(SIDE * 0.4)), Image.Resampling.BOX)
    assert np.array_equal(at("pixelate", 3), small.resize((SIDE, SIDE), Image.Resampling.BOX))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=7)
    assert np.array_equal(at("jpeg_compression", 5), Image.open(file))


def test_defocus_is_a_mean_over_a_disk() -> None:
    """Of one bright pixel it makes a disk whose sum and radius are known."""
    point = np.zeros((224, 224, 3))
    point[112, 112] = 1
    blurred = CORRUPTIONS["defocus_blur"](point, 3, generator(0))
    assert blurred.sum((0, 1)) == pytest.approx([1, 1, 1])
    y, x = np.mgrid[-112:112, -112:112]
    inside = blurred[:, :, 0][y**2 + x**2 <= 3**2]
    assert inside == pytest.approx(np.full(inside.shape, inside.mean()), rel=1e-3)
    assert blurred[:, :, 0][y**2 + x**2 > 9**2] == pytest.approx(0, abs=1e-9)


def test_a_motion_kernel_is_a_line_in_its_direction() -> None:
    flat = motion_kernel(3, 2.0, 0.0)
    row = len(flat) // 2
    assert flat.sum() == pytest.approx(1)
    weights = np.exp(-(np.arange(7) ** 2) / 8)
    assert flat[row, row : row + 7] == pytest.approx(weights / weights.sum())
    assert np.flatnonzero(flat.sum(1)).tolist() == [row]
    image = np.zeros((9, 9))
    image[4, 4] = 1
    assert convolved(image, np.full((3, 3), 1 / 9))[3:6, 3:6] == pytest.approx(
        np.full((3, 3), 1 / 9)
    )


def test_a_zoom_enlarges_the_middle() -> None:
    y, x = np.mgrid[:9, :9].astype(float)
    # Five of nine rows, from the second on, become ten, of which nine remain.
    steps = 2 + np.arange(9) * (5 - 1) / (10 - 1)
    assert zoomed(2 * x + y, 2.0) == pytest.approx(2 * steps[None] + steps[:, None])


def test_pixels_are_copied_one_after_another() -> None:
    draw = np.random.default_rng(0)
    source = draw.integers(0, 60, 60)
    values = np.arange(60)
    for pixel in range(59, -1, -1):
        values[pixel] = values[source[pixel]]
    assert copied_in_turn(source).tolist() == values.tolist()


def test_a_higher_decay_is_a_smoother_texture() -> None:
    rough, smooth = (plasma(40, 60, decay, generator(0, "p")) for decay in (1.2, 2.0))
    for texture in (rough, smooth):
        assert texture.shape == (40, 60)
        assert 0 <= texture.min() < texture.max() <= 1
    assert np.abs(np.diff(smooth)).mean() < np.abs(np.diff(rough)).mean() / 2


def test_the_data_set_of_corrupted_images(clip: FrozenCLIP) -> None:
    """Rows, labels and keys; draws follow the content of an image, not its place."""
    images = [Image.fromarray(np.roll(scene(), 9 * i, 0)) for i in range(3)]
    dataset = ImageDataset(
        "three", ("a", "b"), np.array([0, 1, 0]), np.full(3, TEST, np.int8), np.zeros(3, int),
        ("",), "f", images.__getitem__, pixel_keys=("00" * 16, "11" * 16, "00" * 16),
    )  # fmt: skip
    index = np.array([1, 2])
    found = corrupted_dataset(clip, dataset, index, ["fog", "gaussian_noise"], [1, 5], 3)
    assert found.labels_N.tolist() == [1, 0] * 4
    assert len(set(found.pixel_keys)) == 8
    # Kind 1 (noise) at severity 5 of image 2.
    size = clip.preprocess(images[2]).shape[-1]
    plain = images[2].resize((size, size), Image.Resampling.BICUBIC)
    draw = generator(3, "corruption", "gaussian_noise", "00" * 16)
    expected = corrupted(np.asarray(plain), "gaussian_noise", 5, draw)
    assert np.array_equal(found.open_image(7), expected)
    # The backbone's preprocessing leaves its size alone.
    mean, std = clip.mean_std[:, :, None, None]
    seen = clip.preprocess(found.open_image(7)) * std + mean
    assert np.abs(seen.permute(1, 2, 0).numpy() * 255 - expected).max() < 1e-2
    other = replace(dataset, pixel_keys=("22" * 16, "00" * 16, "11" * 16))
    assert corrupted_dataset(clip, other, np.array([2, 1]), ["fog"], [1], 3).pixel_keys == tuple(
        found.pixel_keys[:2]
    )
    assert corrupted_dataset(clip, dataset, index, ["fog"], [1], 4).pixel_keys[0] not in (
        found.pixel_keys
    )
