"""Data sets, partitions and the feature cache."""

from __future__ import annotations

from pathlib import Path

from fedprompt.config.schema import DataConfig
from fedprompt.data.dataset import ImageDataset


def open_dataset(config: DataConfig, seed: int, cache_dir: Path | None = None) -> ImageDataset:
    """The data set that `config` names; `seed` decides a held-out test split, if one is made.

    `cache_dir` keeps what a first full check of the images found; None = the default cache.

    Raises:
        UserError: whatever is wrong with the data, in one line.
    """
    # Imported on demand: `datasets` alone takes seconds.
    if config.source == "aerial_scenes":
        from fedprompt.data import aerial_scenes

        return aerial_scenes.load(config, seed)
    from fedprompt.data.features.cache import default_cache_dir

    cache_dir = cache_dir or default_cache_dir()
    if config.source == "folder":
        from fedprompt.data.sources import folder

        return folder.load(config, seed, cache_dir)
    if config.source == "client_folders":
        from fedprompt.data.sources import client_folders

        return client_folders.load(config, seed, cache_dir)
    if config.source == "catalogue":
        from fedprompt.data.sources import published

        return published.load(config, seed, cache_dir)
    if config.source == "multi":
        from fedprompt.data.sources import combined as multi

        return multi.load(config, seed, cache_dir)
    from fedprompt.data.sources import hub

    return hub.load(config, seed, cache_dir)
