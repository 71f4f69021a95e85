"""One function per class, which draws the scene and notes what captions may mention.

Units are approximately metres for a view 64 units wide; rivers, fields and ice are drawn at a
coarser scale, as in RESISC45, whose ground resolution varies from 0.2 to 30 m per pixel. Class
names follow UC Merced (Yang & Newsam, "Bag-of-visual-words and spatial extensions for land-use
classification", ACM GIS 2010) and RESISC45 (Cheng, Han & Lu, "Remote sensing image scene
classification: benchmark and state of the art", Proc. IEEE 2017); no image of either was used.
"""

from __future__ import annotations

from collections.abc import Callable

from fedprompt.data.aerial_scenes.objects import Scene
from fedprompt.data.aerial_scenes.scenes.buildings import (
    dense_residential,
    industrial_area,
    mobile_home_park,
    sparse_residential,
    storage_tanks,
    village,
    warehouse,
)
from fedprompt.data.aerial_scenes.scenes.land import (
    circular_farmland,
    forest,
    orchard,
    rectangular_farmland,
)
from fedprompt.data.aerial_scenes.scenes.sport import baseball_diamond, football_field, tennis_court
from fedprompt.data.aerial_scenes.scenes.transport import (
    freeway,
    intersection,
    parking_lot,
    railway,
    roundabout,
    runway,
)
from fedprompt.data.aerial_scenes.scenes.water import beach, harbor, island, lake, river, sea_ice

DRAW: dict[str, Callable[[Scene], None]] = {
    "baseball diamond": baseball_diamond,
    "beach": beach,
    "circular farmland": circular_farmland,
    "dense residential": dense_residential,
    "forest": forest,
    "freeway": freeway,
    "harbor": harbor,
    "industrial area": industrial_area,
    "intersection": intersection,
    "lake": lake,
    "parking lot": parking_lot,
    "railway": railway,
    "rectangular farmland": rectangular_farmland,
    "river": river,
    "roundabout": roundabout,
    "runway": runway,
    "sea ice": sea_ice,
    "sparse residential": sparse_residential,
    "storage tanks": storage_tanks,
    "tennis court": tennis_court,
}
CLASSES: tuple[str, ...] = tuple(DRAW)
HELD_OUT_CLASSES: tuple[str, ...] = (
    "circular farmland",
    "dense residential",
    "industrial area",
    "sea ice",
)
DRAW_EXTRA: dict[str, Callable[[Scene], None]] = {
    "football field": football_field,
    "island": island,
    "mobile home park": mobile_home_park,
    "orchard": orchard,
    "village": village,
    "warehouse": warehouse,
}
EXTRA_CLASSES: tuple[str, ...] = tuple(DRAW_EXTRA)
