"""Data sets, their partition among clients, and the cache of their encoded images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fedprompt.config.schema import DataConfig
from fedprompt.data.cache_files import default_cache_dir
from fedprompt.data.sources.registry import source_class

if TYPE_CHECKING:  # this module is imported before any other of the package; it must stay light
    from fedprompt.data.dataset import ImageDataset


def open_dataset(config: DataConfig, seed: int, cache_dir: Path | None = None) -> ImageDataset:
    """Open the data set that the `data` section of an experiment describes.

    Args:
        config: the section; its source opens it.
        seed: seed of the experiment. It decides which images are held out for testing where the
            data set has no test split.
        cache_dir: where hashes of image files are kept between runs; None = the default cache.

    Returns:
        The images, with labels, splits and domains.

    Raises:
        UserError: the data cannot be read, or they do not fit the config.
    """
    source = source_class(config.source)
    return source.load(config, seed, cache_dir or default_cache_dir())
