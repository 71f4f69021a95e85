"""Domains: combinations of sensor, season, region and ground resolution.

A domain determines the colours of a scene, how densely objects stand and how the sensor renders the
result. Four domains are for federated experiments and twelve others for pre-training. No federated
combination occurs in pre-training.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedprompt.data.aerial_scenes.canvas import SIZE, Array, Colour, mix, smooth

RGB = tuple[float, float, float]


@dataclass(frozen=True)
class Season:
    """Colours of vegetation, and the share of the ground under snow (0 to 1)."""

    words: tuple[str, ...]
    grass: RGB
    trees: tuple[RGB, ...]
    crops: tuple[RGB, ...]
    snow: float = 0.0


@dataclass(frozen=True)
class Region:
    """Colours of soil, water, paving and roofs, and how many trees there are."""

    words: tuple[str, ...]
    soil: RGB
    sand: RGB
    water: RGB
    asphalt: RGB
    concrete: RGB
    roofs: tuple[RGB, ...]
    trees: float  # how many trees stand between things, 0 to 1
    flat_roofs: bool = False


@dataclass(frozen=True)
class Sensor:
    """How light is recorded: gains, saturation, contrast, haze, blur (in pixels) and noise."""

    words: tuple[str, ...]
    gains: RGB = (1.0, 1.0, 1.0)
    saturation: float = 1.0
    contrast: float = 1.0
    haze: float = 0.0
    haze_colour: RGB = (0.75, 0.8, 0.85)
    blur: float = 0.45
    noise: float = 0.012


@dataclass(frozen=True)
class Domain:
    """One combination; `zoom` multiplies a scene's ground resolution in metres per pixel."""

    season: Season
    region: Region
    sensor: Sensor
    zoom: float
    zoom_words: tuple[str, ...]


GREEN = Season(
    ("summer", "in summer", "green"),
    grass=(0.36, 0.49, 0.25),
    trees=((0.15, 0.29, 0.13), (0.20, 0.35, 0.15), (0.12, 0.25, 0.14)),
    crops=((0.40, 0.55, 0.26), (0.55, 0.60, 0.30), (0.27, 0.42, 0.20), (0.62, 0.54, 0.36)),
)
DRY = Season(
    ("dry season", "in the dry season", "dry"),
    grass=(0.65, 0.56, 0.37),
    trees=((0.33, 0.36, 0.20), (0.28, 0.32, 0.19), (0.40, 0.38, 0.22)),
    crops=((0.72, 0.62, 0.36), (0.58, 0.46, 0.28), (0.48, 0.50, 0.26), (0.78, 0.70, 0.48)),
)
AUTUMN = Season(
    ("autumn", "in autumn", "brown"),
    grass=(0.50, 0.47, 0.27),
    trees=((0.62, 0.36, 0.12), (0.50, 0.28, 0.12), (0.66, 0.50, 0.18), (0.25, 0.31, 0.15)),
    crops=((0.60, 0.48, 0.28), (0.45, 0.34, 0.22), (0.46, 0.47, 0.25), (0.68, 0.58, 0.36)),
)
WINTER = Season(
    ("winter", "in winter with snow", "snowy"),
    grass=(0.48, 0.47, 0.38),
    trees=((0.20, 0.26, 0.20), (0.26, 0.27, 0.23), (0.16, 0.22, 0.18)),
    crops=((0.62, 0.60, 0.52), (0.50, 0.46, 0.38), (0.70, 0.68, 0.62), (0.55, 0.54, 0.44)),
    snow=0.8,
)
LUSH = Season(
    ("rainy season", "in the rainy season", "lush green"),
    grass=(0.24, 0.46, 0.22),
    trees=((0.07, 0.26, 0.13), (0.10, 0.32, 0.15), (0.06, 0.22, 0.14)),
    crops=((0.25, 0.52, 0.26), (0.38, 0.58, 0.30), (0.17, 0.40, 0.24), (0.42, 0.46, 0.34)),
)

PLAINS = Region(
    ("plains", "in the countryside"),
    soil=(0.50, 0.41, 0.30),
    sand=(0.80, 0.72, 0.54),
    water=(0.16, 0.30, 0.40),
    asphalt=(0.40, 0.40, 0.41),
    concrete=(0.68, 0.67, 0.64),
    roofs=((0.45, 0.43, 0.42), (0.52, 0.38, 0.32), (0.60, 0.57, 0.53)),
    trees=0.5,
)
MEDITERRANEAN = Region(
    ("southern coast", "with red tile roofs"),
    soil=(0.66, 0.50, 0.36),
    sand=(0.88, 0.79, 0.60),
    water=(0.08, 0.36, 0.48),
    asphalt=(0.50, 0.49, 0.47),
    concrete=(0.76, 0.73, 0.67),
    roofs=((0.72, 0.36, 0.24), (0.66, 0.30, 0.20), (0.76, 0.46, 0.32)),
    trees=0.35,
)
NORTH = Region(
    ("the north", "in northern country"),
    soil=(0.40, 0.36, 0.32),
    sand=(0.66, 0.62, 0.54),
    water=(0.09, 0.17, 0.24),
    asphalt=(0.34, 0.34, 0.37),
    concrete=(0.60, 0.60, 0.61),
    roofs=((0.30, 0.31, 0.34), (0.44, 0.22, 0.20), (0.36, 0.40, 0.46)),
    trees=0.65,
)
DESERT = Region(
    ("desert", "in a desert"),
    soil=(0.76, 0.60, 0.42),
    sand=(0.88, 0.76, 0.56),
    water=(0.16, 0.42, 0.44),
    asphalt=(0.46, 0.44, 0.42),
    concrete=(0.80, 0.75, 0.66),
    roofs=((0.80, 0.72, 0.58), (0.86, 0.80, 0.68), (0.70, 0.60, 0.48)),
    trees=0.12,
    flat_roofs=True,
)
TROPICS = Region(
    ("tropics", "in the tropics"),
    soil=(0.58, 0.34, 0.22),
    sand=(0.86, 0.80, 0.66),
    water=(0.28, 0.34, 0.26),
    asphalt=(0.44, 0.41, 0.39),
    concrete=(0.70, 0.68, 0.62),
    roofs=((0.62, 0.64, 0.66), (0.58, 0.34, 0.24), (0.34, 0.46, 0.58)),
    trees=0.7,
)
CITY = Region(
    ("city", "in a big city"),
    soil=(0.46, 0.42, 0.36),
    sand=(0.76, 0.70, 0.58),
    water=(0.20, 0.31, 0.33),
    asphalt=(0.32, 0.32, 0.34),
    concrete=(0.64, 0.63, 0.62),
    roofs=((0.55, 0.54, 0.54), (0.38, 0.37, 0.38), (0.70, 0.68, 0.66)),
    trees=0.4,
    flat_roofs=True,
)

CLEAR = Sensor(("clear", "sharp colour"), blur=0.45)
VIVID = Sensor(("vivid", "bright colour"), saturation=1.25, contrast=1.1, blur=0.4)
HAZY = Sensor(("hazy", "in haze"), haze=0.34, contrast=0.95, blur=0.7, noise=0.016)
GREY = Sensor(
    ("black and white", "grey panchromatic"), saturation=0.04, contrast=1.15, blur=0.4, noise=0.02
)
FADED = Sensor(
    ("old", "faded film"), gains=(1.12, 1.0, 0.80), saturation=0.55, contrast=0.85, noise=0.04
)
DIM = Sensor(("dark", "dim light"), gains=(0.62, 0.64, 0.72), contrast=1.1, noise=0.03, blur=0.6)
# The federated sensors are of one family, bluer than any in pre-training: a shift that all clients
# share, which one shared prompt can correct in part. Private prompts can correct the differences.
BLUISH: RGB = (0.88, 0.98, 1.19)
BLUISH_HAZY = Sensor(("bluish, hazy",), gains=BLUISH, contrast=1.05, haze=0.10, noise=0.018)
BLUISH_CRISP = Sensor(("bluish, crisp",), gains=BLUISH, contrast=1.15, noise=0.018)
BLUISH_MISTY = Sensor(
    ("bluish, misty",), gains=BLUISH, saturation=0.9, contrast=1.05, haze=0.2, blur=0.7, noise=0.02
)
BLUISH_PALE = Sensor(
    ("bluish, pale",), gains=BLUISH, saturation=0.65, contrast=1.15, blur=0.5, noise=0.02
)

FINE = ("close up", "seen from low height", "high resolution")
MIDDLE = ("seen from above", "overhead")
COARSE = ("seen from far above", "low resolution", "from high altitude")

DOMAINS: dict[str, Domain] = {
    # federated
    "savanna": Domain(DRY, TROPICS, BLUISH_HAZY, 1.15, MIDDLE),
    "highland": Domain(AUTUMN, MEDITERRANEAN, BLUISH_CRISP, 0.85, FINE),
    "delta": Domain(LUSH, CITY, BLUISH_MISTY, 1.4, COARSE),
    "metropolis": Domain(WINTER, CITY, BLUISH_PALE, 0.95, MIDDLE),
    # pre-training
    "countryside": Domain(GREEN, PLAINS, CLEAR, 1.0, MIDDLE),
    "riviera": Domain(DRY, MEDITERRANEAN, VIVID, 0.8, FINE),
    "boreal": Domain(WINTER, NORTH, DIM, 1.2, COARSE),
    "steppe": Domain(DRY, DESERT, HAZY, 1.3, COARSE),
    "woodland": Domain(AUTUMN, NORTH, FADED, 1.05, MIDDLE),
    "archive": Domain(GREEN, TROPICS, GREY, 0.9, FINE),
    "tundra": Domain(WINTER, PLAINS, CLEAR, 1.3, COARSE),
    "oasis": Domain(GREEN, DESERT, VIVID, 0.9, FINE),
    "fjord": Domain(WINTER, NORTH, GREY, 0.85, FINE),
    "hills": Domain(AUTUMN, PLAINS, VIVID, 1.2, COARSE),
    "suburb": Domain(GREEN, CITY, FADED, 1.0, MIDDLE),
    "plantation": Domain(GREEN, TROPICS, HAZY, 1.1, MIDDLE),
}
FEDERATED_DOMAINS: tuple[str, ...] = tuple(DOMAINS)[:4]
PRETRAINING_DOMAINS: tuple[str, ...] = tuple(DOMAINS)[4:]

SNOW: RGB = (0.90, 0.92, 0.95)


def under_snow(colour: Colour, season: Season, share: float = 1.0) -> Array:
    """Return a colour as it looks under the season's snow.

    Args:
        colour: the colour without snow.
        season: decides how much snow there is.
        share: multiplies the snow cover, e.g. less for roads that are cleared.
    """
    return mix(colour, SNOW, season.snow * share)


def sense(rgb_HW3: Array, sensor: Sensor, rng: np.random.Generator) -> Array:
    """Render a scene as the sensor records it.

    Args:
        rgb_HW3: the scene.
        sensor: the domain's sensor.
        rng: the image's generator; exposure, tint, haze and noise vary from image to image.

    Returns:
        RGB (H, W, 3), float64, clipped to [0, 1].
    """
    # Blur comes first and noise last, because the optics do not blur the sensor's noise.
    image = smooth(rgb_HW3, sensor.blur)
    # Luma weights of ITU-R BT.601.
    grey = image @ np.array([0.30, 0.59, 0.11])
    image = grey[..., None] + sensor.saturation * (image - grey[..., None])
    exposure = rng.uniform(0.90, 1.10)
    tint = 1.0 + rng.uniform(-0.03, 0.03, 3) * sensor.saturation
    image = image * (np.asarray(sensor.gains) * exposure * tint)
    image = 0.45 + sensor.contrast * rng.uniform(0.92, 1.08) * (image - 0.45)
    haze = sensor.haze * rng.uniform(0.7, 1.3)
    image = mix(image, sensor.haze_colour, haze)
    # Grey noise and, half as strong, coloured noise, which a sensor without colours lacks.
    image = image + sensor.noise * rng.standard_normal((SIZE, SIZE, 1))
    image = image + 0.5 * sensor.noise * rng.standard_normal((SIZE, SIZE, 3)) * sensor.saturation
    return np.clip(image, 0.0, 1.0)
