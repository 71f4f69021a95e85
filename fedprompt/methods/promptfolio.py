"""PromptFolio: a portfolio of a global and a local prompt, mixed in feature space.

Source: Federated Learning from Vision-Language Foundation Models: Theoretical Analysis and Method
(Pan et al., NeurIPS 2024, arXiv 2409.19610; code PanBikang/PromptFolio). With t the L2-normalised
class features of a prompt,

    t_c = (1 - theta) t_c(global) + theta t_c(local),      logits exp(logit_scale) v . t_c,

the mix is not normalised again; loss CE. The server averages the global prompt only. The global
model is the global prompt alone (theta = 0), which the paper does not evaluate.

Defaults are those of the public code, `trainers/PromptFolio.py`: theta 0.4 (`frac_p`), 8 tokens.
Clients start from the same local prompt, as there.

How we differ: the code holds both prompts in one tensor and slices it; here they are two
containers. It lists the drawn clients' prompts in the order of the draw, but looks them up by
client number: a client's number of images then weights another client's prompt, unless clients are
drawn in order, and the lookup fails if a number is not below the number of clients drawn. Ours
weights each client's prompt by its own images. One optimiser serves all clients and rounds there,
so that momentum passes from client to client; ours starts at zero in each round (docs/concepts.md,
"Momentum between rounds").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.fields import option
from fedprompt.config.search import Range
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import Method, Task, Tensors
from fedprompt.methods.parts.losses import cosine_logits
from fedprompt.methods.parts.prompts import PromptConfig, PromptSource


@dataclass(frozen=True)
class PromptFolioConfig(PromptConfig):
    """Defaults: the public code's."""

    supports_image_noise = True

    context_tokens: int = option(8, "context tokens M of each prompt", ge=1)
    theta: float = option(
        0.4, "share of the local prompt's features", ge=0, le=1, search=Range(0.1, 0.9)
    )
    context_init: str | None = option(None, "words that both prompts start from")


class PromptFolio(Method):
    """One shared and one private context, mixed with fixed weights."""

    name = "promptfolio"
    source = "Pan et al., NeurIPS 2024"
    Config = PromptFolioConfig
    multi_label = True

    def __init__(self, config: PromptFolioConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.theta = config.theta
        self.prompts = PromptSource.of(config, clip, task)

    def init_shared(self, seed: int) -> Tensors:
        """`ctx` (M, d), the global prompt."""
        return {"ctx": self.prompts.start(seed, "init", "shared")}

    def init_private(self, seed: int, client: int) -> Tensors:
        """`ctx` (M, d), the local prompt; all clients start from the same one."""
        return {"ctx": self.prompts.start(seed, "init", "private")}

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """`classes`: mixed class features (K, C, D); the global prompt's own without private."""
        if private is None:
            return {"classes": self.prompts.classes(shared["ctx"])}
        # One pass through the text tower for both prompts. The shared contexts may have a client
        # axis of 1 in evaluation, so the result is divided at their own length.
        both = self.prompts.classes(torch.cat([shared["ctx"], private["ctx"]]))
        clients = len(shared["ctx"])
        return {"classes": (1 - self.theta) * both[:clients] + self.theta * both[clients:]}

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Cosine logits (K, B, C), up to the norm of the mix."""
        return cosine_logits(self.clip, inputs.features, encoded["classes"])
