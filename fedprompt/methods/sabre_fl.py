"""SABRE-FL: any prompt method whose clients also send embeddings of some training images.

Source: SABRE-FL: Selective and Accurate Backdoor Rejection for Federated Prompt Learning (Khan,
Chandio, Anwar, ICLR 2026, arXiv 2506.22506), reconstructed. By these embeddings the server, which
is the strategy `sabre_fl`, leaves out clients that train on images with a trigger. What that costs
in privacy is said there.

Training is the base's. The shared container has a further tensor `embeddings` (N, D): in a reply,
the frozen, L2-normalised features of N of the images that the client has trained on, evenly spread
over them, and repeated if it has fewer; zeros in what the server sends. How many images the paper's
clients send is not known to us; 32 is our choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import torch

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.fields import option
from fedprompt.errors import UserError
from fedprompt.methods.base import ClientData, Task, Tensors
from fedprompt.methods.parts.wrapper import BASE, WrappedMethod, WrapperConfig

EMBEDDINGS = "embeddings"
"""The part, and the name of its only tensor."""


@dataclass(frozen=True)
class SabreFLConfig(WrapperConfig):
    """How many embeddings are sent."""

    default_strategy = MappingProxyType({"name": "sabre_fl"})
    supported_strategies = frozenset({"sabre_fl"})

    images: int = option(32, "images of which a client sends the embedding in each round", ge=1)

    def check(self) -> None:
        """Refuse a base whose own strategy would be lost."""
        super().check()
        strategy = self.base_config().default_strategy["name"]
        if strategy != "fedavg":
            raise UserError(
                f"sabre_fl averages the prompts itself, but method '{self.base}' needs the "
                f"strategy '{strategy}'; choose another method.base."
            )


class SabreFL(WrappedMethod):
    """The base, with embeddings of the client's images among what it sends."""

    name = "sabre_fl"
    source = "Khan et al., ICLR 2026 (reconstructed)"
    Config = SabreFLConfig

    def __init__(self, config: SabreFLConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.shared_layout = self.shared_layout.with_part(EMBEDDINGS, [EMBEDDINGS])
        self.frozen = self.base.frozen | {f"shared.{EMBEDDINGS}"}

    def init_shared(self, seed: int) -> Tensors:
        """The base's tensors, and zeros."""
        empty_ND = torch.zeros(self.config.images, self.clip.embed_dim)
        return self.shared_layout.flatten(
            {BASE: self.base.init_shared(seed), EMBEDDINGS: {EMBEDDINGS: empty_ND}}
        )

    def shared_from_data(self, data: ClientData) -> Tensors:
        """What the base computes, and the embeddings of N images."""
        spread_N = torch.linspace(0, len(data) - 1, self.config.images).round().long()
        sent = {EMBEDDINGS: data.plain().features[spread_N].float().cpu()}
        return self.base.shared_from_data(data) | self.shared_layout.flatten({EMBEDDINGS: sent})
