"""TFUP on every client: CLIP's own logits and the votes of a memory of unlabelled images.

Source: Training-Free Unsupervised Prompt for Vision-Language Models (Long et al., 2024, arXiv
2404.16339; public code wlb12345/TFUP at d95d4d3):

    logits_c = exp(logit_scale) v . t_c + alpha votes_c(v)

The memory and its votes are in `parts/pseudo_memory.py`; a class keeps k = clip(0.3 n / C, 9, 16)
of a client's n images. t_c is the mean feature of sentences about the class (`data.descriptions`).
Nothing is trained, and no label is read, so a client without labels has as good a memory as others.

How we differ: the paper is not federated. The memory is made of features of raw images, so NOTHING
is shared, and the global model is zero-shot CLIP. The code fills the memories of Office and VisDA
from the TEST images, which makes those results transductive; here a memory holds training images
only, so results are inductive. The mean of sentences is that of their L2-normalised features, the
code's that of unnormalised ones. The code multiplies cosines by 100, which is exp(logit_scale) of
OpenAI's models; we take the backbone's own. Without `data.descriptions` the templates stand in.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.fields import option
from fedprompt.config.search import Range, log_range
from fedprompt.data.features.inputs import Inputs
from fedprompt.errors import UserError
from fedprompt.methods.base import ClientData, Method, MethodConfig, Task, Tensors
from fedprompt.methods.parts.feature_memory import empty_memory
from fedprompt.methods.parts.losses import cosine_logits
from fedprompt.methods.parts.pseudo_memory import confident, similar_votes
from fedprompt.methods.parts.sentences import described_classes


@dataclass(frozen=True)
class TFUPConfig(MethodConfig):
    """Defaults: the public code's."""

    learns_without_labels = True

    share: float = option(0.3, "share of a client's images that its memory holds", gt=0, le=1)
    fewest: int = option(9, "images of each class in the memory, at least", ge=1)
    most: int = option(16, "images of each class in the memory, at most", ge=1)
    alpha: float = option(0.3, "weight of the memory", ge=0, search=log_range(0.05, 5))
    beta: float = option(1.0, "sharpness of the memory", gt=0, search=log_range(0.2, 10))

    @property
    def lr_space(self) -> Range | None:
        """None: nothing is trained."""
        return None

    def check(self) -> None:
        """Refuse limits that exclude each other."""
        if self.fewest > self.most:
            raise UserError(f"'fewest' ({self.fewest}) is above 'most' ({self.most}).")


class TFUP(Method):
    """`keys` (M, D) and `owners` (M,) are private; nothing is shared."""

    name = "tfup"
    source = "Long et al., 2024"
    Config = TFUPConfig
    no_transfer_reason = "its memory has pseudo-labels of the classes that it was filled for"
    trainable = False
    reads_descriptions = True
    frozen = frozenset({"private.keys", "private.owners"})
    images_at_once = 1024

    def __init__(self, config: TFUPConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config
        self.classes_1CD = described_classes(clip, task)

    def init_shared(self, seed: int) -> Tensors:
        """Nothing is shared."""
        return {}

    def init_private(self, seed: int, client: int) -> Tensors:
        """An empty memory."""
        return empty_memory(self.clip.embed_dim)

    def init_private_from_data(self, private: Tensors, data: ClientData, seed: int) -> Tensors:
        """The memory of the client's own images."""
        return private | pseudo_memory(data, self.classes_1CD[0], self.cfg)

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """The fixed class features (1, C, D), and the memory as it is."""
        return {"classes": self.classes_1CD} | (private or {})

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """CLIP's logits plus the memory's votes, (K, B, C)."""
        v_KBD, classes_KCD = inputs.features, encoded["classes"]
        logits_KBC = cosine_logits(self.clip, v_KBD, classes_KCD)
        if "keys" not in encoded:
            return logits_KBC  # the global model has no memory
        votes_KBC = similar_votes(
            v_KBD, encoded["keys"], encoded["owners"], classes_KCD, self.cfg.beta
        )
        return logits_KBC + self.cfg.alpha * votes_KBC

    def class_embeddings(self, encoded: Tensors) -> Tensor | None:
        """CLIP's class features (C, D) without a memory; None with one."""
        return None if "keys" in encoded else super().class_embeddings(encoded)


def pseudo_memory(data: ClientData, classes_CD: Tensor, config: TFUPConfig) -> Tensors:
    """A filled memory: `keys` (M, D), and `owners` (M,), which is 1 + the class of each key."""
    features_ND = data.plain().features.cpu()
    classes_CD = classes_CD.cpu()
    shots = int(config.share * len(data) / len(classes_CD))
    shots = min(max(shots, config.fewest), config.most)
    rows, classes = confident(features_ND, classes_CD, shots)
    return {"keys": features_ND[rows], "owners": (classes + 1).float()}
