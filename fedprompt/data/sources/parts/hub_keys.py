"""The config keys of a data set on the Hugging Face hub, for sources `hub` and `catalogue`."""

from __future__ import annotations

from dataclasses import dataclass

from fedprompt.config.fields import option
from fedprompt.data.sources.base import SplitImagesConfig
from fedprompt.errors import UserError


@dataclass(frozen=True)
class HubKeys(SplitImagesConfig):
    """The data set of the hub to load, its splits and its columns."""

    hub_id: str | None = option(
        None, "id of a data set on the Hugging Face hub, or a local folder", path=True
    )
    hub_config: str | None = option(None, "configuration of the data set on the hub")
    hub_revision: str | None = option(None, "revision on the hub; a fixed one makes reruns exact")
    train_split: str | None = option(
        "train", "split to train on; null = the data set is for testing only"
    )
    test_split: str | None = option(
        None, "split to test on; null = hold out test_fraction of the training split"
    )
    validation_split: str | None = option(
        None, "split of the server's validation images; null = none"
    )
    image_column: str = option("image", "column with the images")
    label_column: str = option("label", "column with the labels")
    domain_column: str | None = option(None, "column with the domain of each image")
    domains: list[str] = option([], "domains to use; empty = all")

    @property
    def official_validation(self) -> bool:
        """Whether a split holds the server's validation images."""
        return self.validation_split is not None

    def check(self) -> None:
        """Refuse a section that selects no split, or a validation split without a test split."""
        super().check()
        if self.validation_split is not None and self.test_split is None:
            raise UserError(
                "'validation_split' needs a 'test_split'; without one, set "
                "partition.server_validation_fraction instead."
            )
        if self.train_split is None and self.test_split is None:
            raise UserError("'train_split' and 'test_split' are both null; set one of them.")
