"""Data sets, their partition among clients, and the cache of their encoded images.

The simulation opens all images in one process; a node of a deployment opens its images only.
This module is the entry point for Python programs, which open a data set by its name:

>>> import fedprompt
>>> "aerial_scenes" in fedprompt.data.names()
True
>>> dataset = fedprompt.data.open("aerial_scenes", images_per_class=8, domains=["savanna"])
>>> len(dataset.class_names)
20
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedprompt.config.schema import DataConfig
from fedprompt.data.cache_files import default_cache_dir
from fedprompt.data.class_names import refuse_invisible
from fedprompt.data.sections import available, data_config
from fedprompt.data.sources.registry import source_class

if TYPE_CHECKING:  # this module is imported before any other of the package; it must stay light
    from fedprompt.data.dataset import ImageDataset


def open_dataset(config: DataConfig, seed: int, cache_dir: Path | None = None) -> ImageDataset:
    """Open the data set that the `data` section of an experiment describes.

    Args:
        config: the section; `config.source` names the data source that opens it.
        seed: seed of the experiment. It decides which images are held out for testing if the data
            set has no test split.
        cache_dir: folder that stores hashes of image files between runs; None = the default cache.

    Returns:
        The images with labels, splits and domains.

    Raises:
        UserError: the data cannot be read or do not fit the config, or a class has no name.
    """
    source = source_class(config.source)
    dataset = source.load(config, seed, cache_dir or default_cache_dir())
    refuse_invisible(dataset.class_names, dataset.name)
    return dataset


def names() -> list[str]:
    """The names that `data=NAME` accepts: shipped files and entries of the catalogue."""
    return available("data")


def open(name: str, *, seed: int = 1, **keys: Any) -> ImageDataset:
    """Open a data set by its name.

    Args:
        name: one of `names()`.
        seed: decides which images are held out for testing if the data set has no test split.
        **keys: keys of the `data` section of an experiment, for example `root="/images"`.

    Returns:
        The images with labels, splits and domains.

    Raises:
        UserError: the name or a key is unknown, a value is not allowed, or the data cannot be read.
    """
    return open_dataset(data_config({"use": name, **keys}, "data"), seed)
