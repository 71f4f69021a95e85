"""A small experiment on disk, which several processes can open: image folder, cache, weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from fedprompt.backbone.loading import load_clip
from fedprompt.bench.workload import Sizes, random_features, settings
from fedprompt.config.schema import Config
from fedprompt.data import open_dataset
from fedprompt.data.features.cache import put
from fedprompt.data.features.encoding import plain

PIXELS = 8


def write_job(
    folder: Path,
    class_names: Sequence[str],
    sizes: Sizes,
    *,
    invent_features: bool = True,
    **sections: Any,
) -> Config:
    """Write the images of an experiment, and random numbers as their features.

    Every image is one flat colour of 8 x 8 pixels. Clients share the training images evenly.

    Args:
        folder: an empty folder; images, cache and run folder are created in it.
        class_names: names of the classes, which are also folders.
        sizes: numbers of images.
        invent_features: write random features into the cache. Otherwise every process that opens
            the experiment encodes its images, as a client with access to only its images must.
        sections: merged over the config.

    Returns:
        The config that opens the experiment.
    """
    for split, count in (("train", sizes.clients * sizes.per_client), ("test", sizes.server_test)):
        for name in class_names:
            (folder / "images" / split / name).mkdir(parents=True)
        for number in range(max(count, len(class_names))):
            name = class_names[number % len(class_names)]
            _write_image(folder / "images" / split / name / f"{number:06d}.png", number)
    config = settings(
        sizes.clients,
        **{
            **sections,
            "data": {"source": "folder", "title": "bench", "root": str(folder / "images")},
            "partition": {
                "scheme": "iid",
                "local_test_fraction": sizes.test / sizes.per_client,
                "min_images": 1,
            },
            "output": {
                "report": False,
                "cache": str(folder / "cache"),
                "dir": str(folder / "run"),
            },
        },
    )
    if not invent_features:
        return config
    cache = folder / "cache"
    dataset = open_dataset(config.data, config.seed, cache)
    clip = load_clip(config.backbone, cache)
    # Stored as the cache would store them, so that no process encodes an image.
    features_ND = random_features(len(dataset), clip.embed_dim).numpy()
    put(clip, dataset, cache, plain(clip, dataset), features_ND)
    return config


def _write_image(path: Path, number: int) -> None:
    # A different colour for every image, so that no two files are equal.
    colour = (number % 256, number // 256 % 256, number // 65536)
    Image.new("RGB", (PIXELS, PIXELS), colour).save(path)
