"""CoOp on every client alone: the baseline that a federation should beat.

Source: Learning to Prompt for Vision-Language Models (Zhou et al., IJCV 2022, arXiv 2109.01134).
The same prompt, logits and loss as `promptfl`, but the context is private and nothing is sent.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedprompt.methods.base import Tensors
from fedprompt.methods.promptfl import PromptFL, PromptFLConfig


@dataclass(frozen=True)
class CoOpLocalConfig(PromptFLConfig):
    """CoOp's hyper-parameters."""

    supports_image_noise = True


class CoOpLocal(PromptFL):
    """One private context; nothing is shared, so there is no global model."""

    name = "coop_local"
    source = "Zhou et al., IJCV 2022"
    Config = CoOpLocalConfig
    multi_label = True
    has_global = False

    def init_shared(self, seed: int) -> Tensors:
        """Nothing is shared."""
        return {}

    def init_private(self, seed: int, client: int) -> Tensors:
        """`ctx` (M, d); all clients start from the same draw, as PromptFL's clients do."""
        # The purpose strings are PromptFL's, so both methods start from the same context.
        return {"ctx": self.prompts.start(seed, "init", "shared")}

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """Class features (K, C, D) of each client's own context."""
        assert private is not None, "coop_local has no global model"
        # PromptFL reads `ctx` from its first argument; here that is the private container.
        return super().encode(private, None)
