"""Checks that a node's frozen CLIP is the server's. Runs on the server.

The node and the server each encode the same generated picture and the same sentence
(`fedprompt/backbone/sample.py`), and the server compares the features. Files of the same weights
differ in format and precision, so comparing checksums of files would refuse nodes that are fine.

D is the dimension of the joint embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedprompt.backbone.sample import MIN_COSINE


def has_other_weights(features: Sequence[float], sample_2D: NDArray[np.float32]) -> bool:
    """Whether a node's features come from another backbone than the server's.

    Args:
        features: the node's 2 x D numbers, row by row; they are untrusted.
        sample_2D: the server's own features (2, D), L2-normalised.

    Returns:
        True if the numbers of features differ or a cosine is below `MIN_COSINE`.
    """
    return not all(_alike(features, sample_2D))


def has_other_image_tower(features: Sequence[float], sample_2D: NDArray[np.float32]) -> bool:
    """Whether a node's features come from the server's text tower and another image tower.

    Args:
        features: as in `has_other_weights`.
        sample_2D: as in `has_other_weights`.
    """
    return _alike(features, sample_2D) == (False, True)


def _alike(features: Sequence[float], sample_2D: NDArray[np.float32]) -> tuple[bool, bool]:
    """Whether the features of the picture, and of the sentence, are the server's."""
    if len(features) != sample_2D.size:
        return False, False
    node_2D = np.asarray(features, dtype=np.float64).reshape(sample_2D.shape)
    # Nothing forces a node to normalise its features, so only their direction is compared.
    lengths = np.linalg.norm(node_2D, axis=1)
    # The lower bound on the length gives a vector of zeros the cosine 0, which is refused.
    cosines = (node_2D * sample_2D).sum(axis=1) / np.maximum(lengths, 1e-12)
    # A NaN counts as other weights: comparisons with NaN are false.
    image, text = (bool(cosine >= MIN_COSINE) for cosine in cosines)
    return image, text
