"""Scenes of roads, railways and runways."""

from __future__ import annotations

import numpy as np

from fedprompt.data.aerial_scenes.domains import under_snow
from fedprompt.data.aerial_scenes.objects import LIMIT, WHITE, Scene
from fedprompt.data.aerial_scenes.scenes.parts import at, steps, traffic


def freeway(scene: Scene) -> None:
    """Two wide carriageways with a median, lane lines and traffic."""
    canvas, rng = scene.canvas, scene.rng
    scene.open_ground()
    lanes = int(rng.integers(3, 5))
    width, median = 3.6 * lanes, rng.uniform(3.0, 6.0)
    bend = canvas.wave(canvas.x_HW, rng.uniform(0.0, 3.0), 150.0)
    across = canvas.y_HW - bend
    scene.trees(np.abs(across) > width + median, int(rng.integers(6, 30)))
    for side in (-1.0, 1.0):
        middle = side * (median + width) / 2
        scene.road(np.abs(across - middle) - width / 2 - 1.0)
        for k in range(1, lanes):
            scene.dashes(across - middle - (k - lanes / 2) * 3.6, canvas.x_HW, 0.5, 3.0, 4.0)
        for edge in (-width / 2, width / 2):
            scene.dashes(across - middle - edge, canvas.x_HW, 0.5, 1.0, 0.0)
    gap = rng.uniform(14.0, 32.0)
    for side in (-1.0, 1.0):
        for k in range(lanes):
            lane = side * (median + width) / 2 + (k - (lanes - 1) / 2) * 3.6
            for x in steps(scene, 0.4 * gap, 1.6 * gap):
                scene.car(x, lane + at(scene, bend, x), 0.0, truck=rng.random() < 0.15)
    scene.notes.append("dense" if gap < 22 else "sparse")


def intersection(scene: Scene) -> None:
    """Two streets crossing, with zebra crossings and houses at the corners."""
    canvas, rng = scene.canvas, scene.rng
    scene.open_ground()
    width_x, width_y = rng.uniform(9.0, 14.0, 2)
    corner = canvas.box(0, 0, width_y / 2 + 3, width_x / 2 + 3)
    road = np.minimum(canvas.band(0.0, width_x), canvas.band(0.0, width_y, along_x=False))
    scene.road(np.minimum(road, np.maximum(corner, -1.0)), kerb=1.4)
    outside = np.maximum(corner, 0.0) > 0.5
    for across, along in ((canvas.y_HW, canvas.x_HW), (canvas.x_HW, canvas.y_HW)):
        line = np.where(outside, across, 9.0)
        scene.dashes(line, along, 0.6, 3.0, 3.0)
    for sign in (-1.0, 1.0):
        for x, y, turned in (
            (sign * (width_y / 2 + 5.0), 0.0, False),
            (0.0, sign * (width_x / 2 + 5.0), True),
        ):
            reach = (width_y if turned else width_x) / 2 - 0.8
            half = (reach, 1.3) if turned else (1.3, reach)
            zebra = canvas.box(x, y, *half)
            along = canvas.x_HW if turned else canvas.y_HW
            bars = np.abs(np.mod(along, 2.4) - 1.2) - 0.65
            canvas.paint(WHITE, 0.9 * canvas.cover(np.maximum(zebra, bars)))
    quarter = road > 4.0
    scene.trees(quarter, int(rng.integers(4, 26)))
    if rng.random() < 0.7:
        for a in (-1.0, 1.0):
            for b in (-1.0, 1.0):
                if rng.random() < 0.8:
                    size = rng.uniform(10.0, 15.0)
                    scene.house(a * (width_y / 2 + 14), b * (width_x / 2 + 14), size)
        scene.notes.append("houses")
    traffic(scene, [-width_x / 4, width_x / 4], 18.0)
    traffic(scene, [-width_y / 4, width_y / 4], 18.0, along_x=False)


def roundabout(scene: Scene) -> None:
    """A ring road around a green island, with three or four arms."""
    canvas, rng = scene.canvas, scene.rng
    scene.open_ground()
    outer = rng.uniform(15.0, 20.0)
    inner = outer * rng.uniform(0.42, 0.6)
    road = canvas.disc(0, 0, outer)
    turn = rng.uniform(-0.25, 0.25)
    arms = int(rng.integers(3, 5))
    for k in range(arms):
        angle = turn + k * np.pi / 2
        cos, sin = np.cos(angle), np.sin(angle)
        u = canvas.x_HW * cos + canvas.y_HW * sin
        v = canvas.y_HW * cos - canvas.x_HW * sin
        road = np.minimum(road, np.maximum(np.abs(v) - 4.5, -u))
    scene.road(road, kerb=1.0)
    ring = canvas.disc(0, 0, (outer + inner) / 2)
    theta = np.arctan2(canvas.y_HW, canvas.x_HW) * outer
    scene.dashes(ring, theta, 0.5, 3.0, 3.0)
    canvas.fill(scene.concrete, canvas.disc(0, 0, inner + 0.9))
    canvas.fill(scene.grass, canvas.disc(0, 0, inner), texture=0.12)
    for _ in range(int(rng.integers(0, 5))):
        x, y = rng.uniform(-0.5, 0.5, 2) * inner
        scene.tree(x, y, rng.uniform(1.5, 2.8))
    for angle in rng.uniform(0, 2 * np.pi, int(rng.integers(2, 7))):
        r = (outer + inner) / 2 + rng.choice([-0.22, 0.22]) * (outer - inner)
        scene.car(r * np.cos(angle), r * np.sin(angle), angle + np.pi / 2)
    scene.trees(road > 4.0, int(rng.integers(4, 30)))


def parking_lot(scene: Scene) -> None:
    """Rows of parked cars between white lines on asphalt."""
    canvas, rng = scene.canvas, scene.rng
    scene.ground(scene.asphalt * 1.05, 0.06)
    slot, depth, aisle = rng.uniform(3.0, 3.5), 5.6, rng.uniform(5.5, 7.5)
    pitch = 2 * depth + aisle
    start = rng.uniform(0, pitch)
    filled = rng.uniform(0.35, 0.95)
    margin = rng.uniform(26.0, 60.0)
    for k in range(-4, 5):
        y = start + k * pitch
        if abs(y) > 46.0:
            continue
        bay = canvas.box(0, y, margin, depth)
        lines = np.abs(np.mod(canvas.x_HW, slot) - slot / 2) - 0.28
        canvas.paint(WHITE, 0.7 * canvas.cover(np.maximum(bay, lines)))
        canvas.paint(WHITE, 0.7 * canvas.cover(np.maximum(canvas.band(y, 0.5), bay)))
        for x in np.arange(-np.floor(margin / slot) * slot, margin - slot / 2, slot):
            for side in (-1.0, 1.0):
                if rng.random() < filled:
                    scene.car(x, y + side * depth / 2, np.pi / 2)
    if margin < 45:
        rest = margin + 2.0 - np.abs(canvas.x_HW)
        canvas.fill(scene.grass, rest, texture=0.12)
        scene.trees(rest < -2.0, 12)
    scene.notes.append("dense" if filled > 0.65 else "sparse")


def railway(scene: Scene) -> None:
    """Parallel tracks on ballast: two rails each, sleepers, perhaps a train."""
    canvas, rng = scene.canvas, scene.rng
    scene.open_ground()
    scene.show("railway")
    tracks = int(rng.integers(2, 6))
    gap = rng.uniform(5.5, 7.0)
    bend = canvas.wave(canvas.x_HW, rng.uniform(0.0, 3.0), 150.0)
    across = canvas.y_HW - bend
    ballast = under_snow((0.47, 0.43, 0.40), scene.season, 0.5)
    bed = np.abs(across) - tracks * gap / 2 - 1.0
    canvas.fill(ballast, bed, texture=0.14)
    rail = np.array([0.28, 0.25, 0.25])
    for k in range(tracks):
        middle = (k - (tracks - 1) / 2) * gap
        sleepers = np.maximum(
            np.abs(across - middle) - 1.9, np.abs(np.mod(canvas.x_HW, 2.6) - 1.3) - 0.5
        )
        canvas.paint(rail * 1.15, 0.75 * canvas.cover(sleepers))
        for side in (-1.1, 1.1):
            line = np.abs(across - middle - side) - 0.28
            canvas.paint((0.78, 0.78, 0.80), canvas.cover(line))
    trains = 0
    for k in range(tracks):
        if rng.random() < 0.35:
            trains += 1
            middle = (k - (tracks - 1) / 2) * gap
            colour = scene.pick(((0.62, 0.18, 0.15), (0.2, 0.34, 0.55), (0.7, 0.7, 0.68)))
            head = rng.uniform(-50.0, 20.0)
            for car in range(int(rng.integers(3, 9))):
                x = head + car * 13.0
                scene.slab(x, middle + at(scene, bend, x), 6.1, 1.7, colour, height=1.2)
    if trains:
        scene.notes.append("train")
    scene.trees(bed > 2.0, int(rng.integers(4, 30)))
    if rng.random() < 0.35:
        side = rng.choice([-1.0, 1.0])
        for x in steps(scene, 20.0, 34.0):
            scene.hall(x, side * (tracks * gap / 2 + 12.0), rng.uniform(6, 9), 5.0)
        scene.notes.append("industrial")


def runway(scene: Scene) -> None:
    """One wide strip with a broken centre line, edge lines and threshold bars."""
    canvas, rng = scene.canvas, scene.rng
    scene.open_ground()
    scene.show("runway")
    width = rng.uniform(15.0, 23.0)
    end = rng.uniform(-26.0, -6.0) if rng.random() < 0.75 else -LIMIT
    # Usually the runway's end is in view; otherwise it lies beyond every view.
    strip = np.maximum(canvas.band(0.0, width), end - 4.0 - canvas.x_HW)
    if rng.random() < 0.5:
        taxiway = rng.choice([-1.0, 1.0]) * rng.uniform(width / 2 + 10, width / 2 + 18)
        scene.road(canvas.band(taxiway, 6.0))
        link = canvas.box(rng.uniform(0, 25), taxiway / 2, 3.0, abs(taxiway) / 2)
        scene.road(link)
        scene.notes.append("taxiway")
    scene.road(strip, kerb=1.2)
    # Far outside the runway, so that no line is drawn there.
    inside = np.where(strip < -1.0, canvas.y_HW, 99.0)
    scene.dashes(np.where(canvas.x_HW > end + 12.0, inside, 99.0), canvas.x_HW, 1.0, 7.0, 5.0)
    for side in (-1.0, 1.0):
        scene.dashes(inside - side * (width / 2 - 1.3), canvas.x_HW, 0.7, 1.0, 0.0)
    bars = np.abs(np.mod(canvas.y_HW, 2.8) - 1.4) - 0.75
    keys = np.maximum(canvas.box(end + 4.0, 0.0, 4.0, width / 2 - 2.0), bars)
    canvas.paint(WHITE, 0.95 * canvas.cover(keys))
    for _ in range(int(rng.integers(0, 4))):
        x = rng.uniform(end + 8, 50)
        mark = canvas.band(rng.uniform(-2, 2), 1.2)
        skid = np.maximum(mark, np.abs(canvas.x_HW - x) - 12.0)
        canvas.paint((0.12, 0.12, 0.12), 0.4 * canvas.cover(skid))
