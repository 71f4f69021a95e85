"""CoOp with class-specific contexts in a federation: every class has a context of its own.

Source: Learning to Prompt for Vision-Language Models (Zhou et al., IJCV 2022, arXiv 2109.01134),
class-specific context (CSC): `[SOS][v_1^c .. v_M^c][class c].`, cosine logits times
exp(logit_scale), cross-entropy.

How we differ: CoOp is not federated. If a client has no image of a class, its gradient only pushes
that class away from its images, so a plain average would degrade such classes. The strategy
`per_class` averages each class's context over the clients that have images of the class. For this
purpose a client uploads `class_shares` (C,), the share of each class among its training images: a
frozen shared tensor that `end_round` fills and that the server sends back as zeros. THIS REVEALS
THE CLIENT'S LABEL HISTOGRAM TO THE SERVER, which no other method of this family does.

If `context_init` is given, every class starts from the same words; CoOp's code then silently drops
the class-specific contexts. The code's first epoch has the rate 1e-5, and its loader leaves out the
last partial batch of an epoch; ours does neither (docs/concepts.md, "Local training").
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.text_tokens import context_init
from fedprompt.backbone.text_tower import TextTower
from fedprompt.config.fields import option
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import Method, RoundInfo, Task, Tensors
from fedprompt.methods.parts.class_shares import SHARES, class_shares
from fedprompt.methods.parts.losses import cosine_logits
from fedprompt.methods.parts.prompts import PromptConfig
from fedprompt.rng import normal


@dataclass(frozen=True)
class CoOpCSCConfig(PromptConfig):
    """Defaults: CoOp's 16 context tokens per class, N(0, 0.02^2)."""

    token_space = True

    default_strategy = MappingProxyType({"name": "per_class"})

    context_tokens: int = option(16, "context tokens M of each class", ge=1)
    context_init: str | None = option(None, "words that every class starts from")
    class_position: Literal["end", "middle", "front"] = option("end", "where the class name stands")


class CoOpCSC(Method):
    """One shared context per class; nothing is private, and `class_shares` reveals the labels."""

    name = "coop_csc"
    source = "Zhou et al., IJCV 2022"
    Config = CoOpCSCConfig
    frozen = frozenset({f"shared.{SHARES}"})
    no_transfer_reason = "a context belongs to the class that it was trained for"

    def __init__(self, config: CoOpCSCConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config
        self.tower = TextTower(
            clip,
            task.class_names,
            config.context_tokens,
            position=config.class_position,
            class_specific=True,
        )

    def init_shared(self, seed: int) -> Tensors:
        """`ctx` (C, M, d) and `class_shares` (C,), zeros until a client has trained."""
        classes, tokens = len(self.task.class_names), self.cfg.context_tokens
        shape = (classes, tokens, self.clip.text.width)
        draw = normal(shape, self.cfg.init_std, seed, "init", "shared")
        # With start words, every class gets the same embeddings and its draw is not used.
        starts = [context_init(self.clip, self.cfg.context_init, tokens, d) for d in draw]
        return {"ctx": torch.stack(starts), SHARES: torch.zeros(classes)}

    def end_round(
        self, shared: Tensors, private: Tensors, round_info: RoundInfo
    ) -> tuple[Tensors, Tensors]:
        """Add each class's share of the client's training images."""
        # The received zeros are replaced: what a client uploads does not depend on earlier rounds.
        return {**shared, SHARES: class_shares(round_info)}, private

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """Class features (K, C, D) of the contexts (K, C, M, d)."""
        return {"classes": F.normalize(self.tower(shared["ctx"]), dim=-1)}

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Cosine logits (K, B, C)."""
        return cosine_logits(self.clip, inputs.features, encoded["classes"])
