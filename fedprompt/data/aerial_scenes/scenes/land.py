"""Scenes of farmland and woodland."""

from __future__ import annotations

import numpy as np

from fedprompt.data.aerial_scenes.canvas import SIZE
from fedprompt.data.aerial_scenes.domains import under_snow
from fedprompt.data.aerial_scenes.objects import Scene
from fedprompt.data.aerial_scenes.scenes.parts import patchwork


def rectangular_farmland(scene: Scene) -> None:
    """A patchwork of rectangular fields with furrows."""
    rng = scene.rng
    size_x, size_y = rng.uniform(12.0, 34.0), rng.uniform(10.0, 26.0)
    patchwork(scene, size_x, size_y)
    if rng.random() < 0.4:
        anywhere = np.ones(scene.canvas.x_HW.shape, dtype=bool)
        scene.trees(anywhere, int(rng.integers(2, 9)))


def circular_farmland(scene: Scene) -> None:
    """Centre-pivot fields: discs of crops with sectors and tracks on bare ground."""
    canvas, rng = scene.canvas, scene.rng
    scene.ground(scene.soil)
    scene.show("farmland")
    radius = rng.uniform(10.5, 22.0)
    pitch = 2 * radius + rng.uniform(0.5, 3.0)
    skew = rng.uniform(0.0, pitch) if rng.random() < 0.3 else 0.0
    start_x, start_y = rng.uniform(0.0, pitch, 2)
    for row in range(-4, 5):
        for column in range(-4, 5):
            x = start_x + column * pitch + (skew if row % 2 else 0.0)
            y = start_y + row * pitch
            window = canvas.window(x, y, radius)
            if window is None or rng.random() < 0.06:
                continue
            dx, dy = canvas.x_HW[window] - x, canvas.y_HW[window] - y
            r = np.hypot(dx, dy)
            crop = under_snow(scene.pick(scene.season.crops), scene.season, 0.6)
            other = under_snow(scene.pick(scene.season.crops), scene.season, 0.6)
            tracks = 1.0 + 0.08 * np.sin(r * (2.0 * np.pi / rng.uniform(2.8, 5.0)))
            canvas.paint(crop * tracks[..., None], canvas.cover(r - radius), window)
            if rng.random() < 0.5:
                slope = rng.uniform(0, 2 * np.pi)
                wedge = np.maximum(r - radius, dx * np.cos(slope) + dy * np.sin(slope))
                canvas.paint(other * tracks[..., None], canvas.cover(wedge), window)


def orchard(scene: Scene) -> None:
    """Pre-training only: trees planted in straight rows."""
    canvas = scene.canvas
    scene.open_ground()
    block = np.full(canvas.x_HW.shape, -9.0)
    shape = scene.rng.random()
    if shape < 0.35:
        block = canvas.disc(0.0, 0.0, scene.rng.uniform(17.0, 24.0))
        scene.notes.append("circular")
    elif shape < 0.7:
        block = canvas.box(0.0, 0.0, *scene.rng.uniform(15.0, 25.0, 2))
        scene.notes.append("rectangular")
    scene.show("farmland")
    canvas.fill(under_snow(scene.season.crops[0], scene.season, 0.8), block, texture=0.08)
    gap_x, gap_y = scene.rng.uniform(5.0, 7.5), scene.rng.uniform(5.0, 9.0)
    size = scene.rng.uniform(1.5, 2.4)
    for x in np.arange(-50.0, 50.0, gap_x):
        for y in np.arange(-50.0, 50.0, gap_y):
            # Only trees whose whole crown lies inside the block are drawn.
            column, row = (int(place) for place in canvas.pixel(x, y))
            if 0 <= column < SIZE and 0 <= row < SIZE and block[row, column] < -size:
                scene.tree(x, y, size)


def forest(scene: Scene) -> None:
    """Closed canopy, sometimes with a clearing or a track."""
    canvas, rng = scene.canvas, scene.rng
    scene.open_ground()
    density = rng.uniform(0.6, 1.0)
    keep = np.ones(canvas.x_HW.shape)
    if rng.random() < 0.3:
        x, y = rng.uniform(-20, 20, 2)
        keep = canvas.blob(x, y, rng.uniform(5.0, 11.0), 0.3)
        scene.notes.append("clearing")
    elif rng.random() < 0.3:
        track = canvas.band(canvas.wave(canvas.x_HW, 8.0, 90.0), rng.uniform(2.0, 3.5))
        canvas.fill(scene.soil, track)
        keep = track - 0.8
        scene.notes.append("road")
    scene.notes.append("dense" if density > 0.8 else "sparse")
    scene.canopy(density, rng.uniform(3.4, 6.2), keep)
