"""Scenes of sports courts and playing fields."""

from __future__ import annotations

import numpy as np

from fedprompt.data.aerial_scenes.domains import under_snow
from fedprompt.data.aerial_scenes.objects import WHITE, Scene


def tennis_court(scene: Scene) -> None:
    """One to four courts side by side: coloured field, white lines, net."""
    canvas, rng = scene.canvas, scene.rng
    scene.open_ground()
    scene.show("sports ground")
    count = int(rng.integers(1, 4))
    field = scene.pick(((0.22, 0.42, 0.60), (0.27, 0.48, 0.34), (0.70, 0.38, 0.24)))
    apron = scene.pick(((0.30, 0.50, 0.36), (0.58, 0.32, 0.26), (0.34, 0.46, 0.52)))
    field, apron = under_snow(field, scene.season, 0.2), under_snow(apron, scene.season, 0.3)
    pitch = 19.0
    extent = canvas.box(0, 0, pitch * count / 2 + 1, 18.5)
    scene.trees(extent > 3.0, int(rng.integers(6, 34)))
    canvas.fill(apron, extent, texture=0.04)
    for k in range(count):
        x = (k - (count - 1) / 2) * pitch
        dx, dy = canvas.x_HW - x, canvas.y_HW
        court = np.maximum(np.abs(dx) - 6.0, np.abs(dy) - 12.5)
        canvas.fill(field, court)
        lines = np.abs(court + 0.1)
        lines = np.minimum(lines, np.maximum(np.abs(np.abs(dx) - 4.5), np.abs(dy) - 12.5))
        service = np.maximum(np.abs(np.abs(dy) - 6.6), np.abs(dx) - 4.5)
        middle = np.maximum(np.abs(dx), np.abs(dy) - 6.6)
        lines = np.minimum(lines, np.minimum(service, middle)) - 0.35
        canvas.paint(WHITE, 0.95 * canvas.cover(lines))
        net = np.maximum(np.abs(dy) - 0.35, np.abs(dx) - 7.0)
        canvas.paint((0.15, 0.16, 0.16), 0.8 * canvas.cover(net))


def baseball_diamond(scene: Scene) -> None:
    """A quarter-circle of dirt around a square of grass, and a mown outfield."""
    canvas, rng = scene.canvas, scene.rng
    scene.open_ground()
    scene.show("sports ground")
    x, y = canvas.x_HW + 16.0, canvas.y_HW + 16.0
    r = np.hypot(x, y)
    wedge = np.maximum(-x, -y)
    far = rng.uniform(38.0, 46.0)
    field = np.maximum(wedge - 5.0, r - far)
    scene.trees(field > 4.0, int(rng.integers(4, 22)))
    dirt = under_snow((0.70, 0.47, 0.31), scene.season, 0.3) * rng.uniform(0.9, 1.08)
    if rng.random() < 0.6:
        canvas.fill(dirt * 0.96, field)
    stripes = 1.0 + 0.07 * np.sign(np.sin(r * (np.pi / rng.uniform(3.0, 5.0))))
    turf = scene.grass * rng.uniform(1.0, 1.15)
    canvas.paint(turf * stripes[..., None], canvas.cover(field + 2.5))
    side = rng.uniform(15.0, 18.0)
    infield = np.maximum(np.maximum(wedge - 2.0, r - side * 1.5), -99.0)
    canvas.fill(dirt, infield, texture=0.05)
    square = np.maximum(np.abs(x - side / 2 - 0.8), np.abs(y - side / 2 - 0.8)) - side / 2 + 2.0
    canvas.fill(turf * 1.03, square)
    canvas.fill(dirt, np.hypot(x - side / 2, y - side / 2) - 1.8)
    canvas.fill(dirt, r - 3.4)
    lines = np.minimum(np.maximum(np.abs(x), -y), np.maximum(np.abs(y), -x))
    canvas.paint(WHITE, 0.9 * canvas.cover(np.maximum(lines - 0.3, r - far + 2.0)))
    for bx, by in ((0.0, 0.0), (side, 0.0), (0.0, side), (side, side)):
        scene.slab(bx - 16.0, by - 16.0, 0.7, 0.7, WHITE)


def football_field(scene: Scene) -> None:
    """Pre-training only: a mown pitch with white lines and a centre circle."""
    canvas, rng = scene.canvas, scene.rng
    scene.open_ground()
    scene.show("sports ground")
    pitch = canvas.box(0, 0, 27.0, 17.0)
    scene.trees(pitch > 4.0, int(rng.integers(4, 26)))
    stripes = 1.0 + 0.08 * np.sign(np.sin(canvas.x_HW * (np.pi / rng.uniform(3.0, 5.0))))
    canvas.paint(scene.grass * 1.05 * stripes[..., None], canvas.cover(pitch - 2.0))
    circle = np.abs(canvas.disc(0, 0, 5.0))
    lines = np.minimum(np.abs(pitch), np.maximum(np.abs(canvas.x_HW), pitch))
    for side in (-1.0, 1.0):
        lines = np.minimum(lines, np.abs(canvas.box(side * 22.5, 0, 4.5, 8.0)))
    lines = np.minimum(lines, circle) - 0.4
    canvas.paint(WHITE, 0.9 * canvas.cover(np.maximum(lines, pitch - 0.5)))
