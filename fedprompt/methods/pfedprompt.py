"""pFedPrompt: one text prompt for all, and each client's own memory of images.

Source: pFedPrompt: Learning Personalized Prompt for Vision-Language Models in Federated Learning
(Guo et al., WWW 2023, doi 10.1145/3543507.3583518).

RECONSTRUCTED FROM THE ABSTRACT. It says: a prompt learned in linguistic space carries the users'
consensus; each user adapts in visual space in a non-parametric manner. No public code was found.
That the non-parametric part is a memory of local training features that votes as Tip-Adapter's
does is our inference (`feature_memory.py`), and so are its weight, its sharpness and its part in
training:

    logits_c = exp(logit_scale) v . t_c(ctx) + alpha sum_s exp(-beta (1 - v . k_cs))

ctx is CoOp's unified context, shared and averaged as PromptFL's (8,192 numbers for 16 tokens of
512); the memory stays on the client. By default the memory is not part of the training loss: every
training image in the memory would match itself, and the consensus would be learned around the
memory of one client. `memory_in_training` includes it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.fields import option
from fedprompt.config.search import log_range
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import Batch, ClientData, Task, Tensors
from fedprompt.methods.parts.feature_memory import empty_memory, fill_memory, recall
from fedprompt.methods.parts.losses import cross_entropy
from fedprompt.methods.promptfl import PromptFL, PromptFLConfig


@dataclass(frozen=True)
class PFedPromptConfig(PromptFLConfig):
    """PromptFL's prompt; the memory's defaults are Tip-Adapter's."""

    shots: int = option(16, "images of each class that a client remembers, at most", ge=1)
    alpha: float = option(1.17, "weight of the memory", ge=0, search=log_range(0.1, 10))
    beta: float = option(1.0, "sharpness of the memory", gt=0, search=log_range(0.5, 10))
    memory_in_training: bool = option(False, "whether the training loss sees the memory")


class PFedPrompt(PromptFL):
    """`ctx` (M, d) is shared; `keys` (N, D) and `owners` (N,) are private, never trained."""

    name = "pfedprompt"
    source = "Guo et al., WWW 2023 (reconstructed from the abstract)"
    Config = PFedPromptConfig
    frozen = frozenset({"private.keys", "private.owners"})
    no_transfer_reason = "a client's memory holds images of the classes that it has"
    images_at_once = 1024

    def __init__(self, config: PFedPromptConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config

    def init_private(self, seed: int, client: int) -> Tensors:
        """An empty memory."""
        return empty_memory(self.clip.embed_dim)

    def init_private_from_data(self, private: Tensors, data: ClientData, seed: int) -> Tensors:
        """The memory of the client's own images."""
        return fill_memory(private, data, self.cfg.shots, seed)

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """Class features (K, C, D) of the shared context, and the memory as it is."""
        return super().encode(shared, private) | (private or {})

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """The prompt's logits plus the memory's votes, (K, B, C)."""
        logits_KBC = super().logits(encoded, inputs)
        if "keys" not in encoded:
            return logits_KBC  # the global model has no memory
        votes_KBC = recall(
            inputs.features,
            encoded["keys"],
            encoded["owners"],
            self.cfg.beta,
            logits_KBC.shape[-1],
        )
        return logits_KBC + self.cfg.alpha * votes_KBC

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        """`ce` (K,), of the prompt's logits alone unless `memory_in_training`."""
        # Leaving out the memory makes `logits` return the prompt's part alone.
        seen = encoded if self.cfg.memory_in_training else {"classes": encoded["classes"]}
        return {"ce": cross_entropy(self.logits(seen, batch.inputs), batch)}

    def class_embeddings(self, encoded: Tensors) -> Tensor | None:
        """The prompt's class features (C, D) without a memory; None with one."""
        return None if "keys" in encoded else super().class_embeddings(encoded)
