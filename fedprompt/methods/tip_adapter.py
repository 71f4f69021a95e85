"""Tip-Adapter on every client: CLIP's own logits and the votes of a private memory.

Source: Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification (Zhang et al., ECCV
2022, arXiv 2111.03930; public code: gaopengcuhk/Tip-Adapter):

    logits_c = exp(logit_scale) v . t_c + alpha sum_s exp(-beta (1 - v . k_cs))

t_c are the features of the data set's templates, k_cs those of the client's training images
(`feature_memory.py`). Nothing is trained by default; with `fine_tune` (Tip-Adapter-F) the keys are
trained by cross-entropy, and are not normalised again.

How we differ: the paper is not federated. The memory is made of features of raw images, so NOTHING
is shared: clients do not learn from each other, and the global model is zero-shot CLIP. The method
shows what a client reaches without a federation, as `coop_local` does for prompts. Defaults of
alpha and beta are the public code's for ImageNet. Its alpha is 1.17 for ImageNet, Food101,
OxfordPets and SUN397, 2 for DTD and EuroSAT, 3 for Caltech101, StanfordCars and UCF101, 5 for
Aircraft and 10 for Flowers102; beta is 1 for all. That code then searches both on validation
images, and keeps the epoch with the best TEST accuracy for Tip-Adapter-F: we do neither. It
multiplies cosines by 100, which is exp(logit_scale) of OpenAI's models; we take the backbone's own.
Its 10 augmented epochs for the keys are our cached views (data.views).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.fields import option
from fedprompt.config.search import Range, log_range
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import ClientData, Method, MethodConfig, Task, Tensors
from fedprompt.methods.parts.adapters import template_classes
from fedprompt.methods.parts.feature_memory import empty_memory, fill_memory, recall
from fedprompt.methods.parts.losses import cosine_logits


@dataclass(frozen=True)
class TipAdapterConfig(MethodConfig):
    """Defaults: the public code's for ImageNet, 16 shots."""

    fine_tune: bool = option(False, "train the keys (Tip-Adapter-F)")
    shots: int = option(16, "images of each class that a client remembers, at most", ge=1)
    alpha: float = option(1.17, "weight of the memory", ge=0, search=log_range(0.1, 20))
    beta: float = option(1.0, "sharpness of the memory", gt=0, search=log_range(0.5, 10))

    @property
    def lr_space(self) -> Range | None:
        """A learning rate matters only where the cache is fine-tuned."""
        return super().lr_space if self.fine_tune else None


class TipAdapter(Method):
    """`keys` (N, D) and `owners` (N,) are private; nothing is shared."""

    name = "tip_adapter"
    source = "Zhang et al., ECCV 2022"
    Config = TipAdapterConfig
    no_transfer_reason = "its memory holds images of the classes that a client has"
    images_at_once = 1024

    def __init__(self, config: TipAdapterConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config
        # Without fine-tuning nothing is learned, and a run has no rounds.
        self.trainable = config.fine_tune
        self.frozen = frozenset(
            {"private.owners"} | (set() if self.trainable else {"private.keys"})
        )
        self.classes_1CD = template_classes(clip, task.class_names, task.templates, None)

    def init_shared(self, seed: int) -> Tensors:
        """Nothing is shared."""
        return {}

    def init_private(self, seed: int, client: int) -> Tensors:
        """An empty memory."""
        return empty_memory(self.clip.embed_dim)

    def init_private_from_data(self, private: Tensors, data: ClientData, seed: int) -> Tensors:
        """The memory of the client's own images."""
        return fill_memory(private, data, self.cfg.shots, seed)

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """The fixed class features (1, C, D), and the memory as it is."""
        return {"classes": self.classes_1CD} | (private or {})

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """CLIP's logits plus the memory's votes, (K, B, C)."""
        v_KBD = inputs.features
        logits_KBC = cosine_logits(self.clip, v_KBD, encoded["classes"])
        if "keys" not in encoded:
            return logits_KBC  # the global model has no memory
        votes_KBC = recall(
            v_KBD, encoded["keys"], encoded["owners"], self.cfg.beta, logits_KBC.shape[-1]
        )
        return logits_KBC + self.cfg.alpha * votes_KBC

    def class_embeddings(self, encoded: Tensors) -> Tensor | None:
        """CLIP's class features (C, D) without a memory; None with one."""
        return None if "keys" in encoded else super().class_embeddings(encoded)
