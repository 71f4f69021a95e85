"""Small networks on image features that several methods share, for K clients together.

Suffixes: K clients, B images, D joint embedding, H hidden width, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.data.features.inputs import Inputs
from fedprompt.errors import UserError
from fedprompt.methods.parts.linear import linear, linear_start


def bottleneck_start(
    width: int, reduction: int, seed: int, *purpose: str | int
) -> dict[str, Tensor]:
    """`adapter.down.weight` (H, D) and `adapter.up.weight` (D, H), H = D // reduction, no bias."""
    hidden = max(1, width // reduction)
    return linear_start("adapter.down", hidden, width, seed, *purpose, bias=False) | linear_start(
        "adapter.up", width, hidden, seed, *purpose, bias=False
    )


def bottleneck(features_KBD: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """CLIP-Adapter's network ReLU(W_up ReLU(W_down v)): (K, B, D).

    Without biases the network is positively homogeneous: for an L2-normalised v it gives the result
    for the un-normalised v, divided by the length of v.
    """
    hidden_KBH = F.relu(linear(features_KBD, tensors["adapter.down.weight"]))
    return F.relu(linear(hidden_KBH, tensors["adapter.up.weight"]))


def raw_features(inputs: Inputs) -> Tensor:
    """Image features as the frozen tower gives them, before L2 normalisation: (..., D).

    If their lengths are not known, they have length 1.
    """
    norms = inputs.norms
    return inputs.features if norms is None else inputs.features * norms[..., None]


def template_classes(
    clip: FrozenCLIP,
    class_names: tuple[str, ...],
    templates: tuple[str, ...],
    template: str | None,
) -> Tensor:
    """L2-normalised text features (1, C, D) of `template`, or of the data set's own templates.

    Underscores in class names are read as spaces.
    """
    used = templates if template is None else (template,)
    return clip.zero_shot_classifier(class_names, used)[None]


def check_template(template: str | None) -> None:
    """Raise `UserError` where a template has no place, or more than one, for the class name."""
    if template is not None and (template.count("{}") != 1 or template.count("{") != 1):
        raise UserError(f"template '{template}' needs one {{}} where the class name stands.")
