"""Data sets of the Hugging Face hub, loaded from the hub or from a local folder.

`data.hub_id` is an id on the hub or a folder: one that `save_to_disk` wrote, or one that
`load_dataset` can read, such as a folder of Parquet files. `train_split` and `test_split` may join
several splits with `+`, as in `train+validation`. With `train_split: null`, all images are test
images.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedprompt.config.fields import option
from fedprompt.data.dataset import ImageDataset
from fedprompt.data.sources.base import DataSource
from fedprompt.data.sources.parts.hub_dataset import load_hub
from fedprompt.data.sources.parts.hub_keys import HubKeys
from fedprompt.errors import UserError


@dataclass(frozen=True)
class HubConfig(HubKeys):
    """A data set of the Hugging Face hub, or a local copy of one."""

    source: Literal["hub"] = option("hub", "the data source")

    def check(self) -> None:
        """Refuse a section without a data set id."""
        super().check()
        if not self.hub_id:
            raise UserError("source 'hub' needs 'hub_id'.")


class Hub(DataSource):
    """Any labelled image data set that the `datasets` library can load."""

    name = "hub"
    Config = HubConfig

    @staticmethod
    def load(config: HubConfig, seed: int, cache_dir: Path) -> ImageDataset:
        """Load the data set `config.hub_id`.

        Args:
            config: id of the data set and names of its splits and columns.
            seed: decides which images are held out if `test_split` is null.
            cache_dir: folder that stores hashes of the images between runs.

        Returns:
            The images in the order of the splits and their rows.

        Raises:
            UserError: the hub cannot be reached, a split or column does not exist, labels have no
                names, or an image is unreadable while `on_bad_image` is `error`.
        """
        return load_hub(config, seed, cache_dir)
