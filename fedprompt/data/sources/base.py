"""The contract of a data source, and the config keys that several sources share.

A source runs wherever images are read: in the process of a simulation and on the nodes of a
deployment.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from fedprompt.config.fields import option
from fedprompt.config.schema import DataConfig
from fedprompt.data.dataset import ImageDataset
from fedprompt.data.pixels import Pixels
from fedprompt.errors import UserError


class DataSource:
    """One kind of data set: its config keys, and the function that opens it.

    A source is a subclass in a module of `fedprompt.data.sources` that has the source's name, or a
    class that another distribution registers in the entry point group `fedprompt.data.sources`.

    Attributes:
        name: what users write in `data.source`; also the name of the module or entry point.
        Config: a frozen dataclass derived from `DataConfig` whose field `source` defaults to
            `name`. Its keys are the ones that the `data` section may have for this source.
    """

    name: ClassVar[str]
    Config: ClassVar[type[DataConfig]]

    @staticmethod
    def known_classes(config: Any) -> tuple[str, ...] | None:
        """The class names of the data set, where they are known before anything is read.

        Files of common labels are checked against them.

        Args:
            config: an instance of the source's `Config`.

        Returns:
            The names in label order; None if only the stored images tell.
        """
        return tuple(config.class_names) or None

    @staticmethod
    def load(config: Any, seed: int, cache_dir: Path) -> ImageDataset:
        """Open the data set that `config` describes.

        The result must depend on the arguments and on the stored images only, so that every
        process and every machine sees the same images in the same order.

        Args:
            config: an instance of the source's `Config`.
            seed: the seed of the experiment. Use it, through `fedprompt.rng.generator`, only to
                hold out a test split if the data set has none.
            cache_dir: folder, which need not exist yet, for files that later runs can reuse, such
                as hashes of image files.

        Returns:
            The images with labels in [0, C) for C classes, splits and domains. Single images are
            opened on demand.

        Raises:
            UserError: the data cannot be read or do not fit the config. The message is one line and
                says what to do.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class StoredImagesConfig(DataConfig):
    """The keys of every source that reads image files, some of which may be damaged."""

    on_bad_image: Literal["error", "skip"] = option(
        "error", "what to do with unreadable images: stop, or leave them out and report them"
    )
    stretch: list[float] = option(
        [],
        "pixel values that become black and white in images of more than 8 bits, e.g. [0, 4095]; "
        "empty = [0, 65535], with a warning",
    )
    percentiles: list[float] = option(
        [],
        "percentiles of each image and band that become black and white in images of more than 8 "
        "bits, in place of stretch, e.g. [2, 98]",
    )
    bands: list[int] = option(
        [], "bands of multi-band TIFF files that become red, green and blue, counted from 1"
    )

    @property
    def pixels(self) -> Pixels:
        """How stored values become RGB."""
        return Pixels(tuple(self.stretch), tuple(self.bands), tuple(self.percentiles))

    def check(self) -> None:
        """Refuse a range that is not two numbers, and bands that are not three."""
        super().check()
        if self.stretch and (len(self.stretch) != 2 or self.stretch[0] >= self.stretch[1]):
            raise UserError(f"'stretch' is {self.stretch}; it takes two numbers, the lower first.")
        if self.percentiles:
            low, high = self.percentiles if len(self.percentiles) == 2 else (1.0, 0.0)
            if not 0 <= low < high <= 100:
                raise UserError(
                    f"'percentiles' is {self.percentiles}; it takes two numbers from 0 to 100, the "
                    "lower first."
                )
            if self.stretch:
                raise UserError("'stretch' and 'percentiles' are both set; set one of the two.")
        if self.bands and (len(self.bands) != 3 or min(self.bands) < 1):
            raise UserError(f"'bands' is {self.bands}; it takes three numbers, counted from 1.")


@dataclass(frozen=True)
class SplitImagesConfig(StoredImagesConfig):
    """The keys of every source of image files that may have to hold out a test split."""

    test_fraction: float = option(
        0.25, "share of each class held out for testing where there is no test split", gt=0, lt=1
    )
