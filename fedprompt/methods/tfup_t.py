"""TFUP-T: a text residual and an image adapter, trained on pseudo-labels; no label is read.

Source: Training-Free Unsupervised Prompt for Vision-Language Models (Long et al., 2024, arXiv
2404.16339; public code wlb12345/TFUP at d95d4d3). With the memory of TFUP (`tfup.py`), the residual
r and the adapter A,

    t'_c = norm(0.5 t_c + 0.5 r_c)    v' = norm(0.8 v + 0.2 A(v))    logits = s v' . t'_c

with s the exponential of the logit scale.

In the first sixth of the rounds (the code's 5 of 30 epochs), training minimises the cross-entropy
of refined images: those that TFUP's selection keeps with k = max(9, 0.75 n / C), with the class
that TFUP's logits give them. After that

    L = CE(strong view, arg max of the weak view) where the weak view's confidence is above 0.9
        + 0.3 sum_c m_c log(m_c + 1e-6)    with m the mean softmax of the strong views

The weak view is answered by v' . t'_c and the memory's votes, without a gradient. Predictions use
t' and v' alone: the code reports those, and keeps the memory for pseudo-labels.

`residual` (C, D) and the adapter are shared; the memory and the refined images, which are features
of raw images, are private. Upload: C D + D^2 / 2 numbers.

How we differ: the paper is not federated, and averages nothing. In warm-up a step sees all refined
images of the client without augmentation, in the code an augmented batch of them. The weak view is
another cached view (data.views), the code's the un-augmented image. The learning rate's cosine runs
over rounds. The code keeps the epoch with the best TEST accuracy, and its memories of Office and
VisDA hold test images; we do neither. Its recipe: AdamW, lr 0.012 (0.05 for Office-31), eps 3e-3,
weight decay 0.1, batches of 256.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.fields import option
from fedprompt.config.search import Range, log_range
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import Batch, ClientData, Method, Task, Tensors
from fedprompt.methods.parts.adapters import bottleneck, bottleneck_start
from fedprompt.methods.parts.feature_memory import empty_memory
from fedprompt.methods.parts.losses import cosine_logits, masked_mean
from fedprompt.methods.parts.pseudo_memory import confident, similar_votes
from fedprompt.methods.parts.sentences import described_classes
from fedprompt.methods.tfup import TFUPConfig, pseudo_memory


@dataclass(frozen=True)
class TFUPTConfig(TFUPConfig):
    """Defaults: the public code's."""

    refined_share: float = option(0.75, "share of a client's images in the warm-up", gt=0, le=1)
    warm_up: float = option(1 / 6, "share of the rounds that are warm-up", ge=0, le=1)
    text_mix: float = option(0.5, "weight of the residual", ge=0, le=1)
    image_mix: float = option(0.2, "weight of the adapter", ge=0, le=1)
    reduction: int = option(4, "divides the width of the features in the adapter", ge=1)
    confidence: float = option(0.9, "pseudo-labels above it are learned", ge=0, lt=1)
    marginal_weight: float = option(0.3, "weight of the marginal entropy", ge=0)

    @property
    def lr_space(self) -> Range | None:
        """From the usual 0.002 beyond the code's 0.05, with AdamW."""
        return log_range(0.0005, 0.1)


class TFUPT(Method):
    """`residual` and `adapter` are shared; the memory and the refined images are private."""

    name = "tfup_t"
    source = "Long et al., 2024"
    Config = TFUPTConfig
    no_transfer_reason = "each row of the residual belongs to one class"
    reads_descriptions = True
    needs_to_train = frozenset({"second_view"})
    frozen = frozenset(
        {"private.keys", "private.owners", "private.refined", "private.refined_owners"}
    )

    def __init__(self, config: TFUPTConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config
        self.classes_1CD = described_classes(clip, task)

    def init_shared(self, seed: int) -> Tensors:
        """`residual` (C, D), zeros, and the adapter's two weights."""
        adapter = bottleneck_start(self.clip.embed_dim, self.cfg.reduction, seed, self.name)
        return {"residual": torch.zeros_like(self.classes_1CD[0], device="cpu"), **adapter}

    def init_private(self, seed: int, client: int) -> Tensors:
        """An empty memory and no refined images."""
        empty = empty_memory(self.clip.embed_dim)
        return empty | {"refined": empty["keys"], "refined_owners": empty["owners"]}

    def init_private_from_data(self, private: Tensors, data: ClientData, seed: int) -> Tensors:
        """TFUP's memory of the client's own images, and the refined ones with their classes."""
        classes_CD, cfg = self.classes_1CD[0].cpu(), self.cfg
        memory = pseudo_memory(data, classes_CD, cfg)
        features_ND = data.plain().features.cpu()
        shots = max(cfg.fewest, int(cfg.refined_share * len(data) / len(classes_CD)))
        refined_RD = features_ND[confident(features_ND, classes_CD, shots)[0]]
        labels_R = self._recalled(refined_RD[None], stacked(memory), classes_CD[None]).argmax(-1)[0]
        return private | memory | {"refined": refined_RD, "refined_owners": (labels_R + 1).float()}

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """Class features t' (K, C, D), and the adapter as it is."""
        mix, residual_KCD = self.cfg.text_mix, shared["residual"]
        mixed_KCD = (1 - mix) * self.classes_1CD + mix * residual_KCD
        adapter = {n: t for n, t in shared.items() if n != "residual"}
        return {"classes": F.normalize(mixed_KCD, dim=-1), **adapter}

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Cosine logits (K, B, C) of v' and t'."""
        return cosine_logits(self.clip, self._images(encoded, inputs.features), encoded["classes"])

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        """Cross-entropy `ce` of pseudo-labels and, after the warm-up, the weighted `marginal`."""
        info = batch.round_info
        # Rounded, so that float noise does not make 5.000000001 rounds six.
        if info.server_round <= math.ceil(round(self.cfg.warm_up * info.rounds, 9)):
            owners_KR = private["refined_owners"]
            logits_KRC = self.logits(encoded, Inputs(private["refined"]))
            ce_K = _masked_cross_entropy(logits_KRC, owners_KR.long() - 1, owners_KR > 0)
            return {"ce": ce_K, "marginal": torch.zeros_like(ce_K)}
        strong_KBC = self.logits(encoded, batch.inputs)
        with torch.no_grad():
            weak_KBD = batch.inputs.features if batch.second_KBD is None else batch.second_KBD
            seen_KBD = self._images(encoded, weak_KBD)
            sure_KB, labels_KB = (
                self._recalled(seen_KBD, private, encoded["classes"]).softmax(-1).max(-1)
            )
        learned_KB = (sure_KB > self.cfg.confidence) & batch.mask_KB
        mask_KBC = batch.mask_KB[:, None].expand(-1, strong_KBC.shape[-1], -1)
        mean_KC = masked_mean(strong_KBC.softmax(-1).transpose(1, 2), mask_KBC)
        return {
            "ce": _masked_cross_entropy(strong_KBC, labels_KB, learned_KB),
            "marginal": self.cfg.marginal_weight * (mean_KC * (mean_KC + 1e-6).log()).sum(-1),
        }

    def class_embeddings(self, encoded: Tensors) -> Tensor | None:
        """None: the adapter changes the image features."""
        return None

    def _images(self, encoded: Tensors, features_KBD: Tensor) -> Tensor:
        """v' (K, B, D), L2-normalised."""
        mix = self.cfg.image_mix
        adapted_KBD = bottleneck(features_KBD, encoded)
        return F.normalize((1 - mix) * features_KBD + mix * adapted_KBD, dim=-1)

    def _recalled(self, features_KBD: Tensor, memory: Tensors, classes_KCD: Tensor) -> Tensor:
        """TFUP's logits (K, B, C): cosine logits and the memory's votes."""
        votes_KBC = similar_votes(
            features_KBD, memory["keys"], memory["owners"], classes_KCD, self.cfg.beta
        )
        return cosine_logits(self.clip, features_KBD, classes_KCD) + self.cfg.alpha * votes_KBC


def stacked(tensors: Tensors) -> Tensors:
    """One client's tensors with a client axis of 1."""
    return {name: tensor[None] for name, tensor in tensors.items()}


def _masked_cross_entropy(logits_KBC: Tensor, labels_KB: Tensor, mask_KB: Tensor) -> Tensor:
    """Mean cross-entropy (K,) over the rows of a mask; 0 where there are none."""
    # A product, whose gradient is summed in a fixed order on a GPU as well.
    one_hot_KBC = F.one_hot(labels_KB.clamp(min=0), logits_KBC.shape[-1])
    picked_KB = (logits_KBC.log_softmax(-1) * one_hot_KBC).sum(-1)
    weight_KB = mask_KB.to(picked_KB.dtype)
    return -(picked_KB * weight_KB).sum(-1) / weight_KB.sum(-1).clamp(min=1)
