"""Parts that several scenes share: traffic, fields and tanks."""

from __future__ import annotations

import numpy as np

from fedprompt.data.aerial_scenes.canvas import Array
from fedprompt.data.aerial_scenes.domains import under_snow
from fedprompt.data.aerial_scenes.objects import LIMIT, Scene, shows


def steps(scene: Scene, low: float, high: float) -> list[float]:
    """Draw positions from -LIMIT to LIMIT.

    Args:
        scene: its generator is used.
        low: smallest distance between neighbours.
        high: largest distance between neighbours.
    """
    place, places = -LIMIT + float(scene.rng.uniform(0.0, high)), []
    while place < LIMIT:
        places.append(place)
        place += float(scene.rng.uniform(low, high))
    return places


def traffic(scene: Scene, lanes: list[float], gap: float, along_x: bool = True) -> None:
    """Draw cars and a few lorries along straight lanes.

    Args:
        scene: the scene.
        lanes: offset of each lane, y for lanes along x.
        gap: mean distance between vehicles, approximately.
        along_x: whether the lanes are parallel to x or to y.
    """
    for lane in lanes:
        for place in steps(scene, 0.5 * gap, 1.6 * gap):
            x, y = (place, lane) if along_x else (lane, place)
            scene.car(x, y, 0.0 if along_x else np.pi / 2, truck=scene.rng.random() < 0.12)


def at(scene: Scene, curve_HW: Array, x: float) -> float:
    """Evaluate a curve at one x.

    Args:
        scene: the scene.
        curve_HW: values that depend on x alone.
        x: scene coordinate.

    Returns:
        The value at the pixel nearest to x.
    """
    # The view may be rotated, so x varies along rows and along columns.
    nearest = int(np.argmin(np.abs(scene.canvas.x_HW - x)))
    return float(curve_HW.ravel()[nearest])


@shows("farmland")
def patchwork(scene: Scene, size_x: float, size_y: float, rows: float = 0.16) -> None:
    """Cover the whole picture with rectangular fields.

    Args:
        scene: the scene.
        size_x: length of a field along x.
        size_y: length of a field along y.
        rows: contrast of the furrows.
    """
    # The 32 keeps coordinates positive; each strip of fields is shifted by a random amount.
    canvas, rng = scene.canvas, scene.rng
    x, y = canvas.x_HW / size_x + rng.uniform(0, 9), canvas.y_HW / size_y + 32.0
    strip = np.floor(y).astype(np.int64) % 16
    x = x + rng.uniform(0.0, 1.0, 16)[strip] + 32.0
    field = np.floor(x).astype(np.int64) % 16
    crops = np.array([under_snow(crop, scene.season, 0.75) for crop in scene.season.crops])
    tone = crops[rng.integers(len(crops), size=(16, 16))]
    tone = tone * rng.uniform(0.85, 1.15, (16, 16, 1))
    turn = rng.random((16, 16)) < 0.5
    phase = np.where(turn[strip, field], canvas.x_HW, canvas.y_HW)
    pitch = rng.uniform(2.6, 4.0)
    depth = rng.uniform(0.2, 1.0, (16, 16))[strip, field] * rows
    light = 1.0 + depth * np.sin(phase * (2.0 * np.pi / pitch)) + 0.05 * canvas.fbm(6, 3)
    canvas.cover_all(tone[strip, field] * light[..., None])
    edge_x = (0.5 - np.abs(np.mod(x, 1.0) - 0.5)) * size_x
    edge_y = (0.5 - np.abs(np.mod(y, 1.0) - 0.5)) * size_y
    edge = np.minimum(edge_x, edge_y) - rng.uniform(0.3, 0.8)
    canvas.fill(scene.soil * rng.uniform(0.7, 1.1), edge)


@shows("storage tanks")
def tank(scene: Scene, x: float, y: float, radius: float) -> None:
    """Draw a storage tank of the given radius: a shadow, a pale lid and a darker rim."""
    canvas = scene.canvas
    window = canvas.window(x, y, 2.0 * radius)
    if window is None:
        return
    dx, dy = canvas.x_HW[window] - x, canvas.y_HW[window] - y
    sun_x, sun_y = canvas.sun
    drop = 0.5 * radius
    canvas.darken(0.55, np.hypot(dx - sun_x * drop, dy - sun_y * drop) - radius, window)
    r = np.hypot(dx, dy)
    lid = scene.pick(((0.90, 0.90, 0.88), (0.80, 0.81, 0.82), (0.86, 0.82, 0.74)), 0.04)
    light = 1.0 - 0.10 * (dx * sun_x + dy * sun_y) / radius
    canvas.paint(lid * 0.66, canvas.cover(r - radius), window)
    canvas.paint(lid * light[..., None], canvas.cover(r - 0.86 * radius), window)
    canvas.paint(lid * 0.7, 0.6 * canvas.cover(r - 0.14 * radius), window)
