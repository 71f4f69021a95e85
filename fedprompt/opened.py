"""What several runs of one process share: the frozen backbone and data sets, opened once.

Both are only read, so a run on them gives the same bits as one that opened its own. Files that
change while the process lives are not looked at again.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

from fedprompt.clip import FrozenCLIP, load_clip
from fedprompt.data import open_dataset
from fedprompt.data.base import ImageDataset
from fedprompt.schema import BackboneConfig, DataConfig

DATASETS_KEPT = 8
"""Data sets that stay open: as many seeds of one, say, since each seed may split it anew."""


class Opened:
    """The last backbone and the last few data sets."""

    def __init__(self) -> None:
        self._clip: tuple[str, FrozenCLIP] | None = None
        self._datasets: OrderedDict[str, ImageDataset] = OrderedDict()

    def clip(self, config: BackboneConfig, cache_dir: Path) -> FrozenCLIP:
        """`load_clip`, or what it gave for the same config; another backbone is let go first."""
        key = f"{config!r} {cache_dir}"
        if self._clip is None or self._clip[0] != key:
            self._clip = None
            self._clip = key, load_clip(config, cache_dir)
        return self._clip[1]

    def dataset(self, config: DataConfig, seed: int, cache_dir: Path) -> ImageDataset:
        """`open_dataset`, or what it gave for the same config and seed."""
        key = f"{config!r} {seed} {cache_dir}"
        if key not in self._datasets:
            self._datasets[key] = open_dataset(config, seed, cache_dir)
        self._datasets.move_to_end(key)
        while len(self._datasets) > DATASETS_KEPT:
            self._datasets.popitem(last=False)
        return self._datasets[key]
