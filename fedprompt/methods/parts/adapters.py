"""Small networks on image features that several methods share, for K clients together.

CLIP-Adapter, CoPrompt, FedCLIP, FedDDA, FLORA and Tip-Adapter use them on clients, in training and
in evaluation.

Suffixes: K clients, B images, D joint embedding, H hidden width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
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


def attention_start(width: int, seed: int) -> dict[str, Tensor]:
    """Starting values of `attended`'s layers (D, D), as torch.nn.Linear's, no client axis."""
    key = (seed, "init", "shared")
    return linear_start("attention.0", width, width, *key) | linear_start(
        "attention.2", width, width, *key
    )


def attended(
    tensors: Mapping[str, Tensor],
    inputs: Inputs,
    activation: Callable[[Tensor], Tensor] = torch.tanh,
) -> Tensor:
    """FedCLIP's attention over the components of image features.

    Args:
        tensors: `attention.0` and `attention.2`, weights (K, D, D) and biases (K, D).
        inputs: images.
        activation: between the layers.

    Returns:
        The unit vectors (K, B, D) of softmax(W_2 activation(W_1 v + b_1) + b_2) * v.
    """
    # tanh and softmax are not homogeneous, so the length of the raw feature matters here.
    v_KBD = raw_features(inputs)
    hidden = activation(linear(v_KBD, tensors["attention.0.weight"], tensors["attention.0.bias"]))
    scores = linear(hidden, tensors["attention.2.weight"], tensors["attention.2.bias"])
    return F.normalize(scores.softmax(-1) * v_KBD, dim=-1)


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
