"""Several data sets, or some of their images, as one table. Suffix: N images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedprompt.data.base import ImageDataset


@dataclass(frozen=True)
class JoinedOpener:
    """Opens image i of the data set it is from; a class, so that a data set can be pickled."""

    openers: tuple[Callable[[int], Image.Image], ...]
    source_N: NDArray[np.int64]
    row_N: NDArray[np.int64]

    def __call__(self, index: int) -> Image.Image:
        """Image `index` of the joined table."""
        opener = self.openers[int(self.source_N[index])]
        return opener(int(self.row_N[index]))


def opener_of(parts: Sequence[ImageDataset], rows: Sequence[NDArray[np.int64]]) -> JoinedOpener:
    """The opener of images `rows[i]` of `parts[i]`, one data set after the other."""
    source_N = np.repeat(np.arange(len(parts)), [len(kept) for kept in rows])
    row_N = np.concatenate([np.zeros(0, dtype=np.int64), *rows])
    return JoinedOpener(tuple(part.open_image for part in parts), source_N, row_N)
