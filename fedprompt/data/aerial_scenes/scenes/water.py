"""Scenes of rivers, lakes, coasts, harbours and ice."""

from __future__ import annotations

import numpy as np

from fedprompt.data.aerial_scenes.canvas import NOTHING
from fedprompt.data.aerial_scenes.domains import under_snow
from fedprompt.data.aerial_scenes.objects import WHITE, Scene
from fedprompt.data.aerial_scenes.scenes.parts import patchwork, steps, traffic


def river(scene: Scene) -> None:
    """A winding band of water between banks."""
    canvas, rng = scene.canvas, scene.rng
    scene.open_ground()
    if rng.random() < 0.5:
        patchwork(scene, rng.uniform(14, 24), rng.uniform(14, 24))
        scene.notes.append("fields")
    else:
        scene.notes.append("trees")
    course = canvas.wave(canvas.x_HW, rng.uniform(5.0, 14.0), rng.uniform(50.0, 90.0))
    width = rng.uniform(7.0, 15.0) * (1.0 + 0.15 * canvas.noise(3))
    distance = np.abs(canvas.y_HW - course) - width / 2
    canvas.fill(scene.soil, distance - rng.uniform(0.8, 2.5), texture=0.1)
    scene.sea(distance)
    if scene.season.snow and rng.random() < 0.4:
        scene.floes(distance, rng.uniform(4, 8), rng.uniform(0.3, 0.6))
        scene.notes.append("ice")
    scene.trees((distance > 3.0) & (distance < 14.0), int(rng.integers(8, 34)))
    if rng.random() < 0.2:
        x = rng.uniform(-15, 15)
        scene.road(canvas.band(x, 5.0, along_x=False))
        scene.notes.append("road")


def lake(scene: Scene) -> None:
    """A closed, rounded water body with vegetation around it."""
    canvas, rng = scene.canvas, scene.rng
    scene.open_ground()
    radius = rng.uniform(13.0, 23.0)
    ragged = rng.uniform(0.08, 0.4)
    distance = canvas.blob(0.0, 0.0, radius, ragged)
    if rng.random() < 0.25:
        distance = canvas.box(0.0, 0.0, radius, radius * rng.uniform(0.5, 0.9))
        scene.notes.append("rectangular")
    elif ragged < 0.18:
        scene.notes.append("circular")
    canvas.fill(scene.soil, distance - rng.uniform(0.5, 2.5), texture=0.1)
    scene.sea(distance)
    if scene.season.snow and rng.random() < 0.6:
        edge = distance + rng.uniform(0.0, 0.6) * radius
        scene.floes(np.maximum(distance, -edge), rng.uniform(7, 12), rng.uniform(0.4, 0.8))
        scene.notes.append("ice")
    scene.trees(distance > 3.0, int(rng.integers(10, 55)))
    if rng.random() < 0.4:
        for x, y in scene.scatter(distance > 7.0, int(rng.integers(1, 4))):
            scene.house(x, y, 8.0, rng.uniform(0, np.pi))
        scene.notes.append("houses")


def beach(scene: Scene) -> None:
    """Sea, surf, a strip of sand and the land behind it."""
    canvas, rng = scene.canvas, scene.rng
    scene.open_ground()
    scene.show("sand")
    coast = canvas.wave(canvas.x_HW, rng.uniform(2.0, 7.0), rng.uniform(70.0, 130.0))
    inland = canvas.y_HW - coast + rng.uniform(-10.0, 8.0)
    strip = rng.uniform(9.0, 19.0) * (1.0 + 0.15 * canvas.noise(4))
    sand = under_snow(scene.region.sand, scene.season, 0.25)
    canvas.fill(sand, inland - strip, texture=0.05)
    wet = np.maximum(inland - 2.0, -inland)
    canvas.fill(sand * 0.8, wet)
    scene.sea(inland)
    for surf in rng.uniform(-9.0, -0.5, int(rng.integers(2, 5))):
        ripple = 1.2 * canvas.noise(8)
        line = np.abs(inland - surf - ripple) - rng.uniform(0.3, 0.8)
        canvas.paint(WHITE, 0.8 * canvas.cover(line))
    if scene.season.snow and rng.random() < 0.4:
        scene.floes(inland + rng.uniform(2.0, 8.0), rng.uniform(5, 9), rng.uniform(0.25, 0.5))
        scene.notes.append("ice")
    scene.trees(inland > strip + 3.0, int(rng.integers(12, 45)))
    if rng.random() < 0.5:
        for x, y in scene.scatter(np.abs(inland - strip * 0.6) < 3.0, int(rng.integers(5, 22))):
            scene.slab(x, y, 0.9, 0.9, scene.pick(((0.85, 0.2, 0.2), (0.2, 0.4, 0.8), WHITE)))
        scene.notes.append("parasols")


def harbor(scene: Scene) -> None:
    """Jetties with boats on both sides, starting from a quay."""
    canvas, rng = scene.canvas, scene.rng
    scene.show("water")
    scene.ground(scene.water, 0.07)
    canvas.kind = NOTHING
    quay = rng.uniform(-24.0, -12.0)
    length, spacing = rng.uniform(7.0, 11.0), rng.uniform(3.2, 4.4)
    pitch = 2 * length + rng.uniform(5.0, 8.0)
    wood = under_snow((0.72, 0.68, 0.60), scene.season, 0.4)
    start = rng.uniform(0.0, pitch)
    empty = rng.uniform(0.05, 0.35)
    if empty < 0.18:
        scene.notes.append("dense")
    for k in range(-4, 5):
        x = start + k * pitch
        if abs(x) > 52.0:
            continue
        end = rng.uniform(20.0, 50.0)
        canvas.fill(wood, canvas.box(x, (quay + end) / 2, 1.0, (end - quay) / 2))
        for y in np.arange(quay + 4.0, end - 1.0, spacing):
            for side in (-1.0, 1.0):
                if rng.random() > empty:
                    size = length * rng.uniform(0.65, 1.0)
                    scene.boat(x + side * (1.6 + size / 2), y, size, 0.0 if side > 0 else np.pi)
    land = canvas.y_HW - quay
    canvas.fill(scene.concrete, land, texture=0.06)
    if rng.random() < 0.6:
        for x in steps(scene, 18.0, 30.0):
            scene.hall(x, quay - 10.0, rng.uniform(5.0, 8.0), 4.0)
        scene.notes.append("industrial")
    else:
        traffic(scene, [quay - 4.0], 5.0)


def sea_ice(scene: Scene) -> None:
    """Floes of all sizes on dark water."""
    canvas, rng = scene.canvas, scene.rng
    scene.show("water")
    scene.ground(scene.water * 0.8, 0.08)
    # A negative distance everywhere: the whole picture is water.
    everywhere = np.full(canvas.x_HW.shape, -9.0)
    scene.floes(everywhere, rng.uniform(9.0, 22.0), rng.uniform(0.45, 0.85))
    if rng.random() < 0.6:
        scene.floes(everywhere, rng.uniform(4.0, 7.0), rng.uniform(0.15, 0.4))


def island(scene: Scene) -> None:
    """Pre-training only: land with a sandy rim in the sea."""
    canvas, rng = scene.canvas, scene.rng
    scene.open_ground()
    scene.show("sand")
    distance = -canvas.blob(0.0, 0.0, rng.uniform(13.0, 22.0), 0.3)
    rim = under_snow(scene.region.sand, scene.season, 0.3)
    canvas.fill(rim, distance - rng.uniform(2.0, 4.0), texture=0.06)
    scene.sea(distance)
    line = np.abs(distance + 2.0 + canvas.noise(8)) - 0.5
    canvas.paint(WHITE, 0.7 * canvas.cover(line))
    scene.trees(distance > 4.0, int(rng.integers(10, 40)))
    if scene.season.snow and rng.random() < 0.5:
        scene.floes(distance + 4.0, rng.uniform(5, 9), rng.uniform(0.2, 0.4))
        scene.notes.append("ice")
