"""A sample by which two backbones are compared: a generated picture and a sentence.

D is the dimension of the joint embedding.
"""

from __future__ import annotations

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


def same_text_tower(one: FrozenCLIP, other: FrozenCLIP) -> bool:
    """Whether two backbones have one text tower, in whatever precision."""
    if one.embed_dim != other.embed_dim or one.text.width != other.text.width:
        return False
    a, b = (clip.encode_text_raw([SENTENCE])[0] for clip in (one, other))
    return bool(F.cosine_similarity(a.cpu(), b.cpu(), dim=0) >= MIN_COSINE)
