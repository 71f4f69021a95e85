"""FedOTP: a global and a local prompt share an image's patches by unbalanced optimal transport.

Source: Global and Local Prompts Cooperation via Optimal Transport for Federated Learning (Li et
al., CVPR 2024, arXiv 2403.00041; code HongxiaLee/FedOTP). Features and logits are PLOT's with N = 2
prompts per class: the server averages the first context, the second never leaves the client. The
plan carries a mass gamma of the patches (`top_percent` in the code), gamma/2 to each prompt, and at
most 1/P from each patch; `transport: balanced` carries all of it (`OT: Sinkhorn`). Loss CE.

The global model is the shared prompt alone with the same transport, N = 1: the mass gamma comes
from the patches that are most similar to the prompt. Neither the paper nor its code has a global
model.

Defaults are those of the public code, with gamma 0.8 as in both of its scripts (1 on its command
line). Its CIFAR-100 script has 4 tokens, i.e. 2,048 numbers uploaded on ViT-B; its few-shot script
has eps 0.01, where the kernel can leave float32: the code then returns no logits, and agrees with
ours in float64.

How we differ: the public code keeps both prompts in one tensor and slices it; here they are in two
containers. There the mean that stops the iteration is taken over the batch; here it is taken over
each client's own real images. The public code's first round trains all clients whatever the
fraction; ours samples them. A client that has not trained yet holds the starting local prompt,
which is the same for all clients in both. One optimiser serves all clients and rounds there, so
that momentum passes from client to client; ours starts at zero in each round (docs/concepts.md,
"Momentum between rounds").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from fedprompt.config.fields import option
from fedprompt.config.search import Range, log_range
from fedprompt.methods.base import Tensors
from fedprompt.methods.parts.optimal_transport import FLOAT32_EPS, SMALLEST_EPS, Transport
from fedprompt.methods.parts.prompts import RandomPromptConfig
from fedprompt.methods.plot import PLOT


@dataclass(frozen=True)
class FedOTPConfig(RandomPromptConfig):
    """Defaults: the public code's, and its scripts' gamma."""

    supports_image_noise = True

    context_tokens: int = option(16, "context tokens M of each prompt", ge=1)
    transport: Literal["partial", "balanced"] = option("partial", "code: COT or Sinkhorn")
    gamma: float = option(0.8, "partial: mass that is carried", gt=0, le=1, search=Range(0.4, 1.0))
    eps: float = option(
        0.1, "weight of the plan's entropy", ge=SMALLEST_EPS, search=log_range(0.05, 1)
    )
    threshold: float = option(1e-3, "mean change at which the iteration stops", gt=0)
    max_iterations: int = option(100, "iterations at most", ge=1)

    @property
    def needs_float64(self) -> bool:
        """With a small eps, whose kernel would leave float32."""
        return self.eps < FLOAT32_EPS


class FedOTP(PLOT):
    """One shared and one private context."""

    name = "fedotp"
    source = "Li et al., CVPR 2024"
    Config: ClassVar[type[Any]] = FedOTPConfig
    multi_label = True

    def _transport(self) -> Transport:
        cfg = self.config
        gamma = cfg.gamma if cfg.transport == "partial" else None
        return Transport(cfg.eps, cfg.threshold, cfg.max_iterations, gamma)

    def init_shared(self, seed: int) -> Tensors:
        """`ctx` (M, d), the global prompt."""
        return {"ctx": self.prompts.start(seed, "init", "shared")}

    def init_private(self, seed: int, client: int) -> Tensors:
        """`ctx` (M, d), the local prompt; all clients start from the same one."""
        return {"ctx": self.prompts.start(seed, "init", "private")}

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """`prompts`: class features (K, 2, C, D), global, local; (K, 1, C, D) without private."""
        # The prompt axis N stands behind the client axis: (K, N, M, d), N = 1 or 2.
        contexts = shared["ctx"][:, None]
        if private is not None:
            # Shared contexts that are equal on all clients have a client axis of 1 in evaluation.
            local = private["ctx"][:, None]
            contexts = torch.cat([contexts.expand(len(local), -1, -1, -1), local], dim=1)
        return {"prompts": self.prompts.classes(contexts)}
