"""FedCoPL: shared visual prompts and private text prompts, for clients without labels.

Source: Cooperative Pseudo Labeling for Unsupervised Federated Classification (Guo et al., ICCV
2025, arXiv 2510.10100), checked against the public code (krumpguo/FedCoPL at ed7e0e0,
methods/unsupervised_learning_new/fedcopl.py): every layer of the image tower but the last has V
tokens of its own, which are averaged; each client has a text context of M tokens, which stays with
it; cosine logits times exp(logit_scale), cross-entropy on pseudo-labels. The images that clients
train on, and as what, are chosen anew every `partition.relabel_every` rounds (5 by default), with
quotas for every class that the clients agree on (`fedprompt/data/partition/pseudo_labels.py`). A
client weighs in the average as many images as it has chosen. Clients with labels, which the paper
does not have, train on all their images with their labels, and do not take part in the counts.

How we differ: visual prompts pass through `ln_pre` before the first layer, as in MaPLe's code and
all our methods, while theirs enter behind it; and the outputs of the last prompts go through the
tower's last layer, where the code drops them. The cosine restarts with every choice, as theirs
does, but falls once per round and not once per epoch. Their loop has one optimiser for all clients,
so that a client starts with the momentum of the client before it; ours start at zero. The shipped
script selects a model name that the loop does not know (`FedCoPL` for `our_dual_local_prompt`), so
that it trains nothing; this is the loop's own path.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.vision_tower import VisionTower
from fedprompt.config.fields import option
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import Method, Task, Tensors
from fedprompt.methods.parts.deep_prompts import layers_within
from fedprompt.methods.parts.losses import cosine_logits
from fedprompt.methods.parts.prompts import PromptSource, RandomPromptConfig
from fedprompt.rng import normal


@dataclass(frozen=True)
class FedCoPLConfig(RandomPromptConfig):
    """Defaults: the public code's (`PromptLearner` and `Transformer_VPTD`), 16 and 5 tokens."""

    visual_tokens: int = option(5, "visual tokens per layer", ge=1)
    visual_depth: int = option(11, "image layers with prompts, the first counts", ge=1)

    relabel_every = 5  # num_repesudo_rounds of the public code's run-textPT_ALL.sh


class FedCoPL(Method):
    """`visual` (J, V, w) is shared; `ctx` (M, d) is private."""

    name = "fedcopl"
    source = "Guo et al., ICCV 2025"
    Config = FedCoPLConfig
    needs = frozenset({"features", "pixels"})
    has_global = False
    images_at_once = 256

    def __init__(self, config: FedCoPLConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config
        self.vision = VisionTower(clip)
        self.prompts = PromptSource.of(config, clip, task)

    def init_shared(self, seed: int) -> Tensors:
        """`visual` (J, V, w)."""
        depth = layers_within("image", self.cfg.visual_depth, self.vision.layers)
        shape = (depth, self.cfg.visual_tokens, self.vision.width)
        return {"visual": normal(shape, self.cfg.init_std, seed, "init", "shared", "visual")}

    def init_private(self, seed: int, client: int) -> Tensors:
        """`ctx` (M, d), the same for all clients."""
        return {"ctx": self.prompts.start(seed, "init", "private")}

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """`classes` (K, C, D) of each client's context, and the visual prompts (K, J, V, w)."""
        assert private is not None  # `has_global` is False
        return {"classes": self.prompts.classes(private["ctx"]), "visual": shared["visual"]}

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Cosine logits (K, B, C) of the prompted image and text features."""
        assert inputs.pixels is not None
        images_KBD = self.vision.features(inputs.pixels, encoded["visual"])
        return cosine_logits(self.clip, images_KBD, encoded["classes"])

    def class_embeddings(self, encoded: Tensors) -> Tensor | None:
        """None: prompts change the image features."""
        return None
