"""Scenes of homes and industry."""

from __future__ import annotations

import numpy as np

from fedprompt.data.aerial_scenes.canvas import Array
from fedprompt.data.aerial_scenes.objects import WHITE, Scene
from fedprompt.data.aerial_scenes.scenes.parts import tank, traffic


def _street(scene: Scene, distance: Array) -> None:
    scene.road(distance, kerb=0.8)


def sparse_residential(scene: Scene) -> None:
    """One to four houses in large gardens, with drives and perhaps a pool."""
    canvas, rng = scene.canvas, scene.rng
    scene.open_ground()
    count = int(rng.integers(1, 5))
    lane = rng.uniform(-30.0, 30.0)
    road = canvas.band(lane + canvas.wave(canvas.x_HW, 3.0, 120.0), 4.5)
    scene.road(road)
    placed: list[tuple[float, float]] = []
    middle = np.hypot(canvas.x_HW - canvas.centre[0], canvas.y_HW - canvas.centre[1])
    in_view = middle < 24.0 * canvas.step  # so that a house never falls outside the picture
    for x, y in scene.scatter((road > 8.0) & in_view, 12 * count):
        if len(placed) < count and all(np.hypot(x - a, y - b) > 19.0 for a, b in placed):
            placed.append((x, y))
    blocked = -road
    for x, y in placed:
        near = np.sign(lane - y) * np.maximum(abs(lane - y) / 2, 1.0)
        canvas.fill(scene.concrete * 0.92, canvas.box(x + 3.0, y + near, 1.1, abs(near)))
    scene.trees((road > 4.0) & (blocked < 0), int(rng.integers(8, 40)))
    for x, y in placed:
        scene.house(x, y, rng.uniform(11.0, 14.0), rng.choice([0.0, np.pi / 2, 0.4]))
        if rng.random() < 0.3:
            angle = rng.uniform(0, 2 * np.pi)
            scene.slab(x + 10 * np.cos(angle), y + 10 * np.sin(angle), 2.6, 1.5, (0.3, 0.7, 0.8))


def village(scene: Scene) -> None:
    """Pre-training only: five to nine houses along one street."""
    canvas, rng = scene.canvas, scene.rng
    scene.open_ground()
    road = canvas.band(canvas.wave(canvas.x_HW, 2.0, 120.0), 5.5)
    _street(scene, road)
    gap = rng.uniform(11.5, 18.0)
    start = rng.uniform(0, gap)
    scene.trees(road > 4.0, int(rng.integers(10, 30)))
    for side in (-1.0, 1.0):
        for k in range(-4, 5):
            if rng.random() < 0.85:
                y = side * rng.uniform(10.0, 13.0)
                scene.house(start + k * gap, y, rng.uniform(8.5, 11.0), rng.choice([0, np.pi / 2]))
    if rng.random() < 0.6:
        traffic(scene, [rng.choice([-1.5, 1.5])], 20.0)
    if gap < 14.0:
        scene.notes.append("dense")


def mobile_home_park(scene: Scene) -> None:
    """Pre-training only: rows of narrow pale caravans along lanes on grass."""
    canvas, rng = scene.canvas, scene.rng
    scene.open_ground()
    pitch, gap = rng.uniform(17.0, 21.0), rng.uniform(5.0, 6.5)
    lane, lean = rng.uniform(0.0, pitch), rng.uniform(-0.5, 0.5)
    for k in range(-3, 4):
        y = lane + k * pitch
        scene.road(canvas.band(y, 3.6))
        for x in np.arange(-48.0, 48.0, gap):
            for side in (-1.0, 1.0):
                if rng.random() < 0.88:
                    roof = scene.roof(0.4) * 0.4 + np.asarray(WHITE) * 0.6
                    scene.slab(x, y + side * 6.0, 1.6, 3.8, roof, side * lean, 1.2)
    anywhere = np.ones(canvas.x_HW.shape, dtype=bool)
    scene.trees(anywhere, int(rng.integers(4, 20)), size=1.8)


def dense_residential(scene: Scene) -> None:
    """Block after block of houses wall to wall along a grid of streets."""
    canvas, rng = scene.canvas, scene.rng
    scene.ground(scene.soil * 0.95)
    canvas.paint(scene.grass, 0.6 * np.clip(canvas.fbm(8, 2) + 0.5, 0, 1))
    gap = rng.uniform(8.6, 10.5)
    pitch = 2 * gap + rng.uniform(6.0, 8.0)
    lane = rng.uniform(0.0, pitch)
    lanes = [lane + k * pitch for k in range(-4, 5)]
    cross = rng.uniform(-25.0, 25.0)
    roads = canvas.band(cross, 5.0, along_x=False)
    for y in lanes:
        roads = np.minimum(roads, canvas.band(y, 5.0))
    _street(scene, roads)
    scene.trees(roads > 2.0, int(rng.integers(5, 25)), size=1.9)
    turn = rng.random() < 0.5
    for y in lanes:
        for row in (y + pitch / 2 - gap / 2, y + pitch / 2 + gap / 2):
            x = -48.0 + rng.uniform(0, gap)
            while x < 48.0:
                size = rng.uniform(0.86, 0.98) * gap
                if abs(x - cross) > 2.5 + size / 2 and rng.random() < 0.96:
                    scene.house(x, row, size, np.pi / 2 if turn else 0.0)
                x += gap * rng.uniform(0.92, 1.05)
    traffic(scene, [y + 1.4 for y in lanes if abs(y) < 48], 16.0)


def industrial_area(scene: Scene) -> None:
    """Large halls on paved yards with lorries, a chimney or small tanks."""
    canvas, rng = scene.canvas, scene.rng
    scene.ground(scene.concrete * 0.9, 0.08)
    lane = rng.uniform(-12.0, 12.0)
    scene.road(canvas.band(lane, 6.0))
    for side in (-1.0, 1.0):
        x = -46.0 + rng.uniform(0, 14)
        while x < 46.0:
            half_x, half_y = rng.uniform(7.0, 13.0), rng.uniform(7.0, 12.0)
            y = lane + side * (6.0 + half_y)
            if rng.random() < 0.85:
                scene.hall(x + half_x, y, half_x, half_y)
            far = y + side * (half_y + 9.0)
            if abs(far) < 48.0:
                scene.hall(x + half_x, far + side * 2.0, half_x, 7.0)
            x += 2 * half_x + rng.uniform(3.0, 6.0)
    traffic(scene, [lane - 1.5, lane + 1.5], 17.0)
    for x, y in scene.scatter(np.abs(canvas.y_HW - lane) > 5.0, int(rng.integers(0, 3))):
        tank(scene, x, y, rng.uniform(2.0, 3.5))


def warehouse(scene: Scene) -> None:
    """Pre-training only: one large hall with lorries on open ground."""
    canvas, rng = scene.canvas, scene.rng
    scene.open_ground()
    half_x, half_y = rng.uniform(9.0, 15.0), rng.uniform(7.0, 11.0)
    canvas.fill(scene.concrete * 0.92, canvas.box(0, 0, half_x + 8, half_y + 8), texture=0.06)
    scene.hall(0.0, 0.0, half_x, half_y)
    for x in np.arange(-half_x, half_x, 4.0):
        if rng.random() < 0.5:
            scene.car(x, half_y + 5.0, np.pi / 2, truck=True)
    outside = canvas.box(0, 0, half_x + 10, half_y + 10) > 0
    scene.trees(outside, int(rng.integers(4, 20)))


def storage_tanks(scene: Scene) -> None:
    """A group of cylindrical tanks on paved ground."""
    canvas, rng = scene.canvas, scene.rng
    scene.open_ground()
    yard = canvas.box(0, 0, rng.uniform(24, 40), rng.uniform(20, 36))
    canvas.fill(scene.concrete * rng.uniform(0.8, 0.95), yard, texture=0.08)
    radius = rng.uniform(4.0, 9.5)
    pitch = 2 * radius + rng.uniform(2.5, 6.0)
    for row in range(-3, 4):
        for column in range(-3, 4):
            x = column * pitch + rng.uniform(-1, 1)
            y = row * pitch + rng.uniform(-1, 1)
            if max(abs(x), abs(y)) < 30.0 and rng.random() < 0.72:
                tank(scene, x, y, radius * rng.choice([1.0, 1.0, 0.7]))
    # At least one tank is in view, whatever was drawn above.
    tank(scene, 0.0, 0.0, radius)
    scene.trees(yard > 3.0, int(rng.integers(2, 15)))
