"""Checks that a node's frozen CLIP is the server's. Runs on both sides.

The node and the server each encode the same generated picture and the same sentence, and the server
compares the features. Files of the same weights differ in format and precision, so comparing
checksums of files would refuse nodes that are fine.

D is the dimension of the joint embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from fedprompt.backbone.clip import FrozenCLIP

MIN_COSINE = 0.99
"""bfloat16 changes the cosine by far less than this margin, other weights by far more."""
SENTENCE = "a river beside a forest."


@torch.no_grad()
def sample_features(clip: FrozenCLIP) -> NDArray[np.float32]:
    """L2-normalised features (2, D) of the sample picture and of the sample sentence."""
    rows, columns = np.mgrid[0:64, 0:64]
    picture = np.stack([4 * rows, 4 * columns, 255 - 2 * rows - 2 * columns], axis=-1)
    image = clip.preprocess(Image.fromarray(picture.astype(np.uint8)))
    image_D = clip.encode_images(image[None])[0].float().cpu()
    text_D = clip.encode_text_raw([SENTENCE])[0].float().cpu()
    return F.normalize(torch.stack([image_D, text_D]), dim=-1).numpy()


def has_other_weights(features: Sequence[float], sample_2D: NDArray[np.float32]) -> bool:
    """Whether a node's features come from another backbone than the server's.

    Args:
        features: the node's 2 x D numbers, row by row; they are untrusted.
        sample_2D: the server's own features (2, D), L2-normalised.

    Returns:
        True if the numbers of features differ or a cosine is below `MIN_COSINE`.
    """
    if len(features) != sample_2D.size:
        return True
    node_2D = np.asarray(features, dtype=np.float64).reshape(sample_2D.shape)
    # Nothing forces a node to normalise its features, so only their direction is compared.
    lengths = np.linalg.norm(node_2D, axis=1)
    # The lower bound on the length gives a vector of zeros the cosine 0, which is refused.
    cosines = (node_2D * sample_2D).sum(axis=1) / np.maximum(lengths, 1e-12)
    # Written with `not`, so that a NaN counts as other weights: comparisons with NaN are false.
    return not bool((cosines >= MIN_COSINE).all())
