"""Small networks on image features that several methods share, for K clients together.

CLIP-Adapter, CoPrompt, FedCLIP, FedDDA and Tip-Adapter use them on clients, in training and in
evaluation.

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
    width: int, reduction: int, seed: int, *purpose: str | int, name: str = "adapter"
) -> dict[str, Tensor]:
    """Starting weights of a bottleneck without biases, without a client axis.

    Args:
        width: D.
        reduction: divides D to give the hidden width H, at least 1.
        seed: seed of the run.
        purpose: keys the draw, together with `seed`.
        name: prefix of the tensors' names.

    Returns:
        `<name>.down.weight` (H, D) and `<name>.up.weight` (D, H).
    """
    hidden = max(1, width // reduction)
    return linear_start(f"{name}.down", hidden, width, seed, *purpose, bias=False) | linear_start(
        f"{name}.up", width, hidden, seed, *purpose, bias=False
    )


def bottleneck(
    features_KBD: Tensor, tensors: Mapping[str, Tensor], name: str = "adapter"
) -> Tensor:
    """CLIP-Adapter's network ReLU(W_up ReLU(W_down v)): (K, B, D).

    Without biases the network is positively homogeneous: for an L2-normalised v it gives the result
    for the un-normalised v, divided by the length of v. The cached normalised features therefore
    lead to the same direction as the raw features of the public code.
    """
    # The public code has a ReLU behind the second layer as well.
    hidden_KBH = F.relu(linear(features_KBD, tensors[f"{name}.down.weight"]))
    return F.relu(linear(hidden_KBH, tensors[f"{name}.up.weight"]))


def raw_features(inputs: Inputs) -> Tensor:
    """Image features as the frozen tower gives them, before L2 normalisation: (..., D).

    Features whose lengths are unknown are returned with length 1.
    """
    norms = inputs.norms
    return inputs.features if norms is None else inputs.features * norms[..., None]


def template_classes(
    clip: FrozenCLIP,
    class_names: tuple[str, ...],
    templates: tuple[str, ...],
    template: str | None,
) -> Tensor:
    """Frozen text features of the classes.

    Args:
        clip: the frozen backbone.
        class_names: C names; underscores are read as spaces.
        templates: the data set's own templates, used if `template` is None.
        template: a sentence with `{}` for the class name, or None.

    Returns:
        L2-normalised features (1, C, D).
    """
    used = templates if template is None else (template,)
    # The text is the same for all clients: a client axis of 1 broadcasts.
    return clip.zero_shot_classifier(class_names, used)[None]


def check_template(template: str | None) -> None:
    """Check that a template has exactly one place for the class name.

    Raises:
        UserError: the template has no `{}`, more than one, or other braces.
    """
    if template is not None and (template.count("{}") != 1 or template.count("{") != 1):
        raise UserError(f"template '{template}' needs one {{}} where the class name stands.")
