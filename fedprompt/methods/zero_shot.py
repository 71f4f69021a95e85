"""Zero-shot CLIP: hand-written templates; nothing is learned or sent.

Source: Learning Transferable Visual Models From Natural Language Supervision (Radford et al.,
ICML 2021, arXiv 2103.00020), section 3.1.4 for the ensemble of templates.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import Method, MethodConfig, Task, Tensors
from fedprompt.methods.parts.losses import cosine_logits


@dataclass(frozen=True)
class ZeroShotConfig(MethodConfig):
    """No hyper-parameters: the templates belong to the data set."""

    lr_space = None


class ZeroShot(Method):
    """Class features are the normalised mean over the data set's templates."""

    name = "zero_shot"
    source = "Radford et al., ICML 2021"
    Config = ZeroShotConfig
    multi_label = True
    trainable = False

    def __init__(self, config: ZeroShotConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        # A client axis of 1: all clients have the same model, which is then scored only once.
        self.classes_1CD = clip.zero_shot_classifier(task.class_names, task.templates)[None]

    def init_shared(self, seed: int) -> Tensors:
        """Nothing is shared."""
        return {}

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """The fixed class features, the same for every client: (1, C, D)."""
        return {"classes": self.classes_1CD}

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Cosine logits (K, B, C)."""
        return cosine_logits(self.clip, inputs.features, encoded["classes"])
