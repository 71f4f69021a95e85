"""FedCLIP: attention over the components of the image feature, averaged uniformly.

Source: FedCLIP: Fast Generalization and Personalization for CLIP in Federated Learning (Lu et al.,
IEEE Data Eng. Bull. 2023, arXiv 2302.13485; public code: microsoft/PersonalizedFL). With v the
un-normalised image feature, t_c the text feature of "a picture of a {class}", B images in a batch:

    a(v) = softmax(W_2 tanh(W_1 v + b_1) + b_2)      over the D components
    v'   = a(v) * v
    logits = exp(logit_scale) cos(v', t_c)
    loss = (CE(Z, diagonal) + CE(Z^T, diagonal)) / 2,   Z_ij = exp(logit_scale) cos(v'_i, t_{y_j})

The loss is CLIP's own over the batch's image-text pairs. Only the attention is trained and
averaged: 2 (D^2 + D) numbers, 525,312 at D = 512; all clients have equal weights.

As in the paper, two images of one class in a batch are negatives of each other, so the loss of such
a batch cannot reach zero. The loss and the gradient of a batch with a single image are zero (the
public code skips it). How we differ: the public code keeps the round with the best validation
accuracy; here the protocol decides what is reported. Adam starts anew in each round in both.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.fields import option
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import UNIFORM_AVERAGE, Batch, Method, MethodConfig, Task, Tensors
from fedprompt.methods.parts.adapters import (
    attended,
    attention_start,
    check_template,
    template_classes,
)
from fedprompt.methods.parts.losses import cosine_logits, masked_mean


@dataclass(frozen=True)
class FedCLIPConfig(MethodConfig):
    """The only hyper-parameter is the text."""

    default_strategy = UNIFORM_AVERAGE

    template: str | None = option(
        "a picture of a {}", "text with {} for the class; null = the data set's own"
    )

    def check(self) -> None:
        """Refuse a template without a place for the class name."""
        check_template(self.template)


class FedCLIP(Method):
    """`attention.0` and `attention.2` (weights (D, D), biases (D,)) are shared."""

    name = "fedclip"
    source = "Lu et al., IEEE Data Eng. Bull. 2023"
    Config = FedCLIPConfig

    def __init__(self, config: FedCLIPConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.classes_1CD = template_classes(clip, task.class_names, task.templates, config.template)

    def init_shared(self, seed: int) -> Tensors:
        """Both layers, as torch.nn.Linear starts them."""
        return attention_start(self.clip.embed_dim, seed)

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """The fixed class features (1, C, D), and the attention's layers as they are."""
        return {"classes": self.classes_1CD, **shared}

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Cosine logits (K, B, C) of the attended features."""
        return cosine_logits(self.clip, attended(encoded, inputs), encoded["classes"])

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        """`ce` (K,): the symmetric cross-entropy over the batch's pairs, not over classes."""
        # t_{y_j} of each image's label; class features are the same for all clients.
        texts_KBD = encoded["classes"][0][batch.labels_KB]
        pairs_KBB = cosine_logits(self.clip, attended(encoded, batch.inputs), texts_KBD)
        there_K = _diagonal(pairs_KBB, batch.mask_KB)
        back_K = _diagonal(pairs_KBB.transpose(-1, -2), batch.mask_KB)
        return {"ce": (there_K + back_K) / 2}

    def class_embeddings(self, encoded: Tensors) -> Tensor | None:
        """None: the attention changes the image features."""
        return None


def _diagonal(logits_KBB: Tensor, mask_KB: Tensor) -> Tensor:
    """Mean cross-entropy with target i in row i, over real rows and real columns alone: (K,)."""
    # Padding must not be a negative. The diagonal of a padding row is then infinite, and is set to
    # 0 because the mask would turn it into 0 * inf, which is NaN.
    real_KBB = logits_KBB.masked_fill(~mask_KB[:, None, :], float("-inf"))
    own_KB = real_KBB.log_softmax(-1).diagonal(dim1=-2, dim2=-1)
    return masked_mean(-own_KB.masked_fill(~mask_KB, 0.0), mask_KB)
