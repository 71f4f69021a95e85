"""Whether a node's frozen CLIP is the server's: both encode one picture and one sentence.

Files of the same weights differ in format and precision, so features are compared and not files.
D joint embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from fedprompt.backbone.clip import FrozenCLIP

LEAST_COSINE = 0.99
"""bfloat16 moves a feature by far less, other weights by far more."""
SENTENCE = "a river beside a forest."


@torch.no_grad()
def sample_features(clip: FrozenCLIP) -> NDArray[np.float32]:
    """L2-normalised features (2, D) of the picture and of the sentence."""
    rows, columns = np.mgrid[0:64, 0:64]
    picture = np.stack([4 * rows, 4 * columns, 255 - 2 * rows - 2 * columns], axis=-1)
    image = clip.preprocess(Image.fromarray(picture.astype(np.uint8)))
    image_D = clip.encode_images(image[None])[0].float().cpu()
    text_D = clip.encode_text_raw([SENTENCE])[0].float().cpu()
    return F.normalize(torch.stack([image_D, text_D]), dim=-1).numpy()


def differs(theirs: Sequence[float], ours_2D: NDArray[np.float32]) -> bool:
    """Whether `theirs`, (2 D) numbers, are another backbone's features."""
    if len(theirs) != ours_2D.size:
        return True
    theirs_2D = np.asarray(theirs, dtype=np.float64).reshape(ours_2D.shape)
    # A peer may send any length; only the direction counts.
    lengths = np.linalg.norm(theirs_2D, axis=1)
    cosines = (theirs_2D * ours_2D).sum(axis=1) / np.maximum(lengths, 1e-12)
    return not bool((cosines >= LEAST_COSINE).all())
