"""The objects that scenes are made of: ground, vegetation, roads, buildings and vehicles.

`x` and `y` are scene coordinates of an object's centre, lengths are in scene units (about metres)
and angles in radians. Objects are painted over each other, so the order of calls matters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedprompt.data.aerial_scenes.canvas import NOTHING, SIZE, Array, Canvas, Colour, box, mix
from fedprompt.data.aerial_scenes.domains import RGB, Domain, under_snow

WHITE: RGB = (0.93, 0.93, 0.91)
CARS: tuple[RGB, ...] = (
    (0.92, 0.92, 0.92),
    (0.92, 0.92, 0.92),
    (0.66, 0.67, 0.70),
    (0.16, 0.16, 0.18),
    (0.70, 0.14, 0.12),
    (0.16, 0.26, 0.55),
)
LIMIT = 72.0  # scene units from the centre within which things are drawn; beyond every view
LABELS: tuple[str, ...] = (
    "boats",
    "cars",
    "farmland",
    "houses",
    "ice",
    "industrial buildings",
    "railway",
    "road",
    "runway",
    "sand",
    "sports ground",
    "storage tanks",
    "trees",
    "water",
)
"""What a picture can show, for the multi-label task."""
LEAST_PIXELS = 8
"""Of 4,096 pixels: a picture shows what is seen on at least as many."""

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")


def shows(
    label: str,
) -> Callable[
    [Callable[Concatenate[Scene, _Args], _Result]], Callable[Concatenate[Scene, _Args], _Result]
]:
    """Decorate a function that draws what `label` names.

    The label counts for what the function paints itself; what it calls may show another one.
    """

    def decorate(
        draw: Callable[Concatenate[Scene, _Args], _Result],
    ) -> Callable[Concatenate[Scene, _Args], _Result]:
        @wraps(draw)
        def drawn(scene: Scene, /, *args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
            before = scene.canvas.kind
            scene.show(label)
            result = draw(scene, *args, **kwargs)
            scene.canvas.kind = before
            return result

        return drawn

    return decorate


class Scene:
    """A canvas, the domain that colours it, and notes on its content for captions.

    Args:
        canvas: the picture to paint on.
        domain: decides colours, roofs and the number of trees.
        rng: the image's generator, the same as the canvas's.
    """

    def __init__(self, canvas: Canvas, domain: Domain, rng: np.random.Generator) -> None:
        self.canvas = canvas
        self.rng = rng
        self.domain = domain
        self.season = domain.season
        self.region = domain.region
        self.notes: list[str] = []

    # Labels

    def show(self, label: str) -> None:
        """Count what is painted from now on as this label, until another drawing of `LABELS`."""
        self.canvas.kind = LABELS.index(label)

    def shown(self) -> tuple[str, ...]:
        """The labels of the finished picture: what is seen on at least `LEAST_PIXELS` pixels."""
        seen = self.canvas.kind_HW[self.canvas.kind_HW != NOTHING]
        counts = np.bincount(seen, minlength=len(LABELS))
        return tuple(label for label, n in zip(LABELS, counts, strict=True) if n >= LEAST_PIXELS)

    # Colours

    def pick(self, colours: Sequence[RGB], spread: float = 0.08) -> Array:
        """Draw one of `colours` and vary its brightness by up to `spread`."""
        colour = np.array(colours[int(self.rng.integers(len(colours)))])
        return colour * (1.0 + self.rng.uniform(-spread, spread))

    @property
    def grass(self) -> Array:
        """Colour of meadows and lawns, under snow in winter."""
        return under_snow(self.season.grass, self.season)

    @property
    def soil(self) -> Array:
        """Colour of bare ground, half covered by snow in winter."""
        return under_snow(self.region.soil, self.season, 0.55)

    @property
    def asphalt(self) -> Array:
        """Colour of road surfaces, cleared of most snow."""
        return under_snow(self.region.asphalt, self.season, 0.15)

    @property
    def concrete(self) -> Array:
        """Colour of paved yards and quays."""
        return under_snow(self.region.concrete, self.season, 0.3)

    @property
    def water(self) -> Array:
        """Colour of open water; every access draws another brightness."""
        return np.asarray(self.region.water) * self.rng.uniform(0.9, 1.12)

    def roof(self, share: float = 0.55) -> Array:
        """Draw the colour of a roof of the region, partly under snow in winter."""
        return under_snow(self.pick(self.region.roofs, 0.14), self.season, share)

    # Ground

    def ground(self, colour: Colour, texture: float = 0.16) -> None:
        """Cover the whole picture with `colour`, mottled by `texture`."""
        noise = self.canvas.fbm(4, 4) * texture
        self.canvas.cover_all(np.asarray(colour) * (1.0 + noise)[..., None])

    def open_ground(self) -> None:
        """Cover the whole picture with grass and patches of bare soil."""
        self.ground(self.grass)
        # A region with few trees also has much bare soil.
        bare = 0.25 + 0.45 * (1.0 - self.region.trees) + 0.5 * self.canvas.fbm(3, 3)
        self.canvas.paint(self.soil, np.clip(2.0 * (bare - 0.5), 0.0, 0.85))

    @shows("water")
    def sea(self, distance: Array, ripple: float = 0.06) -> None:
        """Fill a shape with water that is lighter near its edge."""
        # Distances are negative inside, so `near` is 1 at the shore and fades over 5 units.
        near = np.exp(np.minimum(distance, 0.0) / 5.0)[..., None]
        tint = self.water * (1.0 - 0.4 * near) + np.array([0.36, 0.48, 0.46]) * 0.4 * near
        waves = 1.0 + ripple * (self.canvas.noise(32) + self.canvas.noise(8))
        self.canvas.paint(tint * waves[..., None], self.canvas.cover(distance))

    @shows("ice")
    def floes(self, distance: Array, size: float, share: float) -> None:
        """Draw ice floes: irregular cells that cracks of open water separate.

        Args:
            distance: signed distance to the water.
            size: mean diameter of a floe.
            share: share of the cells that carry ice, 0 to 1.
        """
        # Floes are the cells of a Voronoi diagram with one random point per grid square. Of each
        # pixel the nearest and the second nearest point are needed; only the 3x3 squares around it
        # are searched. The grid repeats after 16 squares.
        x, y = self.canvas.x_HW / size, self.canvas.y_HW / size
        x = x + 0.25 * self.canvas.noise(8)
        y = y + 0.25 * self.canvas.noise(8)
        cells = self.rng.uniform(0.1, 0.9, (16, 16, 2))
        kept = self.rng.random((16, 16)) < share
        first = np.full(x.shape, 9.0)
        second = np.full(x.shape, 9.0)
        floe = np.zeros(x.shape, dtype=bool)
        base_x, base_y = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
        for step_x in (-1, 0, 1):
            for step_y in (-1, 0, 1):
                i, j = (base_x + step_x) % 16, (base_y + step_y) % 16
                there = np.hypot(
                    base_x + step_x + cells[i, j, 0] - x, base_y + step_y + cells[i, j, 1] - y
                )
                nearer = there < first
                second = np.where(nearer, first, np.minimum(second, there))
                floe = np.where(nearer, kept[i, j], floe)
                first = np.where(nearer, there, first)
        # A crack runs where the two nearest points are almost equally far away.
        crack = (0.16 - (second - first)) * size / 2
        inside = np.maximum(np.where(floe, crack, 9.0), distance)
        ice = np.array([0.88, 0.92, 0.95]) * (1.0 + 0.06 * self.canvas.fbm(8, 3))[..., None]
        self.canvas.paint(ice, self.canvas.cover(inside))

    # Vegetation

    def scatter(self, free_HW: NDArray[np.bool_], count: int) -> list[tuple[float, float]]:
        """Draw `count` random scene points among the free pixels; none if no pixel is free."""
        places = np.flatnonzero(free_HW)
        if not len(places) or count <= 0:
            return []
        chosen = places[self.rng.integers(0, len(places), count)]
        x, y = self.canvas.x_HW.ravel()[chosen], self.canvas.y_HW.ravel()[chosen]
        return list(zip(x.tolist(), y.tolist(), strict=True))

    @shows("trees")
    def tree(self, x: float, y: float, radius: float) -> None:
        """Draw the crown of a tree, lit on one side, and its shadow."""
        canvas = self.canvas
        window = canvas.window(x, y, 2.2 * radius)
        if window is None:
            return
        dx, dy = canvas.x_HW[window] - x, canvas.y_HW[window] - y
        sun_x, sun_y = canvas.sun
        canvas.darken(
            0.45, np.hypot(dx - sun_x * radius * 0.9, dy - sun_y * radius * 0.9) - radius, window
        )
        tone = under_snow(self.pick(self.season.trees, 0.2), self.season, 0.25)
        light = 1.05 - 0.35 * (dx * sun_x + dy * sun_y) / radius
        canvas.paint(tone * light[..., None], canvas.cover(np.hypot(dx, dy) - radius), window)

    def trees(self, free_HW: NDArray[np.bool_], count: int, size: float = 2.6) -> None:
        """Draw trees on free ground.

        Args:
            free_HW: pixels on which a tree may stand.
            count: number of trees in a region of medium greenness; barren regions have fewer.
            size: mean radius of a crown.
        """
        count = round(count * self.region.trees * 1.6)
        for x, y in self.scatter(free_HW, count):
            self.tree(x, y, size * self.rng.uniform(0.6, 1.3))

    @shows("trees")
    def canopy(self, density: float, spacing: float, keep_HW: Array) -> None:
        """Draw closed woodland.

        Args:
            density: share of the grid squares with a crown, 0 to 1.
            spacing: width of a grid square, about the distance between trees.
            keep_HW: the woodland covers the pixels where this is positive.
        """
        # One crown per grid square. Only the 2x2 squares nearest to a pixel are searched, so any
        # number of crowns costs four passes over the picture. The grid repeats after 48 squares.
        canvas = self.canvas
        x, y = canvas.x_HW / spacing - 0.5, canvas.y_HW / spacing - 0.5
        base_x, base_y = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
        place = self.rng.uniform(-0.3, 0.3, (48, 48, 2))
        radius = self.rng.uniform(0.45, 0.8, (48, 48))
        radius[self.rng.random((48, 48)) > density] = -9.0
        tones = np.array([under_snow(tone, self.season, 0.25) for tone in self.season.trees])
        tone = tones[self.rng.integers(len(tones), size=(48, 48))]
        tone = tone * self.rng.uniform(0.75, 1.25, (48, 48, 1))
        best = np.full(x.shape, -9.0)
        colour = np.zeros((SIZE, SIZE, 3))
        for step_x in (0, 1):
            for step_y in (0, 1):
                i, j = (base_x + step_x) % 48, (base_y + step_y) % 48
                dx = x - (base_x + step_x + place[i, j, 0])
                dy = y - (base_y + step_y + place[i, j, 1])
                height = radius[i, j] - np.hypot(dx, dy)
                light = 0.95 - 0.7 * (dx * canvas.sun[0] + dy * canvas.sun[1])
                higher = height > best
                colour = np.where(higher[..., None], tone[i, j] * light[..., None], colour)
                best = np.where(higher, height, best)
        # `best` is the depth below the highest crown's edge, in squares; scene units are needed.
        crown = canvas.cover(-best * spacing) * (keep_HW > 0)
        floor = under_snow(self.season.trees[0], self.season, 0.8) * 0.62
        canvas.paint(floor, np.clip(best * spacing / 2 + 1.0, 0.0, 0.8) * (keep_HW > 0))
        canvas.paint(colour, crown)

    # Roads

    def road(self, distance: Array, kerb: float = 0.0) -> None:
        """Fill a shape with asphalt and surround it with a paler kerb of width `kerb`."""
        before = self.canvas.kind
        if before == NOTHING:  # else it is the asphalt of something else, such as a runway
            self.show("road")
        if kerb:
            self.canvas.fill(self.concrete, distance - kerb)
        self.canvas.fill(self.asphalt, distance, texture=0.05)
        self.canvas.kind = before

    def dashes(
        self, across_HW: Array, along_HW: Array, width: float, dash: float, gap: float
    ) -> None:
        """Draw a broken white line.

        Args:
            across_HW: signed offset of each pixel from the middle of the line.
            along_HW: coordinate of each pixel along the line.
            width: width of the line.
            dash: length of a dash.
            gap: length between dashes; 0 for a continuous line.
        """
        distance = np.abs(across_HW) - width / 2
        if gap:
            phase = np.mod(along_HW + self.rng.uniform(0.0, dash + gap), dash + gap)
            distance = np.maximum(distance, np.abs(phase - dash / 2) - dash / 2)
        self.canvas.paint(WHITE, 0.85 * self.canvas.cover(distance))

    # Things

    def slab(
        self,
        x: float,
        y: float,
        half_x: float,
        half_y: float,
        colour: Colour,
        angle: float = 0.0,
        height: float = 0.0,
        ridge: bool = False,
    ) -> None:
        """Draw a box as seen from above.

        Args:
            x: its centre.
            y: its centre.
            half_x: half of its side along x before the rotation.
            half_y: half of its side along y before the rotation.
            colour: colour of its top.
            angle: rotation in radians.
            height: length of its shadow; 0 for none.
            ridge: whether its roof has a ridge along the longer side, lit on the sunny side.
        """
        canvas = self.canvas
        window = canvas.window(x, y, float(np.hypot(half_x, half_y)) + height)
        if window is None:
            return
        dx, dy = canvas.x_HW[window] - x, canvas.y_HW[window] - y
        cos, sin = float(np.cos(angle)), float(np.sin(angle))
        # In the box's coordinates (u, v) its sides are parallel to the axes; the sun turns along.
        u, v = dx * cos + dy * sin, dy * cos - dx * sin
        sun_u = canvas.sun[0] * cos + canvas.sun[1] * sin
        sun_v = canvas.sun[1] * cos - canvas.sun[0] * sin
        if height:
            shadow = box(u - sun_u * height, v - sun_v * height, half_x, half_y)
            canvas.darken(0.5, shadow, window)
        tint = np.asarray(colour)
        if ridge:
            across, lit = (v, sun_v) if half_x >= half_y else (u, sun_u)
            side = np.clip(across / canvas.step, -1.0, 1.0) * np.sign(lit)
            tint = tint * (1.0 - 0.18 * side)[..., None]
        canvas.paint(tint, canvas.cover(box(u, v, half_x, half_y)), window)

    @shows("houses")
    def house(self, x: float, y: float, size: float, angle: float = 0.0) -> None:
        """Draw a dwelling, gabled or flat as is usual in the region, sometimes L-shaped.

        Args:
            x: its centre.
            y: its centre.
            size: its approximate length.
            angle: rotation in radians.
        """
        half_x = size * self.rng.uniform(0.42, 0.56)
        half_y = half_x * self.rng.uniform(0.6, 0.85)
        roof = self.roof()
        ridge = not self.region.flat_roofs
        if self.rng.random() < 0.35:
            wing = half_x * 0.55
            side = self.rng.choice([-1.0, 1.0])
            shift_u, shift_v = side * (half_x - wing), half_y
            cos, sin = float(np.cos(angle)), float(np.sin(angle))
            self.slab(
                x + shift_u * cos - shift_v * sin,
                y + shift_u * sin + shift_v * cos,
                wing,
                half_y,
                roof * 0.95,
                angle,
                size * 0.22,
                ridge,
            )
        self.slab(x, y, half_x, half_y, roof, angle, size * 0.25, ridge)

    @shows("industrial buildings")
    def hall(self, x: float, y: float, half_x: float, half_y: float) -> None:
        """Draw an industrial hall with a large pale roof and parallel grooves.

        Args:
            x: its centre.
            y: its centre.
            half_x: half of its side along x.
            half_y: half of its side along y.
        """
        roof = under_snow(
            self.pick(((0.78, 0.79, 0.80), (0.62, 0.65, 0.69), (0.70, 0.68, 0.64)), 0.1),
            self.season,
            0.3,
        )
        self.slab(x, y, half_x, half_y, roof, height=2.4)
        teeth = self.rng.uniform(3.0, 4.5)
        canvas = self.canvas
        phase = np.mod(canvas.x_HW - x + half_x, teeth)
        groove = np.maximum(np.abs(phase - teeth / 2) - 0.45, canvas.box(x, y, half_x, half_y) + 1)
        canvas.paint(roof * self.rng.uniform(0.6, 0.78), 0.9 * canvas.cover(groove))

    @shows("cars")
    def car(self, x: float, y: float, angle: float = 0.0, truck: bool = False) -> None:
        """Draw a car, or a lorry more than twice as long; arguments as in `slab`."""
        colour = self.pick(CARS, 0.05)
        if truck:
            self.slab(x, y, 5.0, 1.3, mix(colour, WHITE, 0.5), angle, 1.0)
        else:
            self.slab(x, y, 2.1, 1.0, colour, angle, 0.7)

    @shows("boats")
    def boat(self, x: float, y: float, length: float, angle: float) -> None:
        """Draw a boat: a pale hull, pointed at one end, with a darker deck.

        Args:
            x: its centre.
            y: its centre.
            length: length of the hull.
            angle: direction of the bow, in radians.
        """
        canvas = self.canvas
        window = canvas.window(x, y, length)
        if window is None:
            return
        dx, dy = canvas.x_HW[window] - x, canvas.y_HW[window] - y
        cos, sin = float(np.cos(angle)), float(np.sin(angle))
        u, v = dx * cos + dy * sin, dy * cos - dx * sin
        beam = length * 0.17 * np.clip(1.3 - np.maximum(u, 0.0) / (length / 2), 0.0, 1.0)
        hull = np.maximum(np.abs(v) - beam, np.abs(u) - length / 2)
        canvas.paint(mix(WHITE, self.pick(CARS), 0.12), canvas.cover(hull), window)
        deck = box(u + 0.1 * length, v, length * 0.18, length * 0.06)
        canvas.paint(self.pick(CARS), 0.7 * canvas.cover(deck), window)
