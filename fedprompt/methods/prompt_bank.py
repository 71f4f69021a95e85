"""Prompt bank: pairs of a key and a bias of the context; images choose among them by their keys.

Source: Image-Object-Specific Prompt Learning for Few-Shot Class-Incremental Learning (Yoon et al.,
arXiv 2309.02833). Only its abstract could be read: pairs of keys and prompts add a bias to the
class classifiers, chosen by the image. The rest is RECONSTRUCTED. With a context `ctx` that starts
from words, and G pairs of a key k_g and a bias p_g that starts at zero:

    t_c^g = f([ctx + p_g, class c])
    w(v) = softmax over g of kappa cos(v, k_g)
    logits = exp(logit_scale) v . sum_g w_g(v) t^g,     L = CE
    k_g = mean of the features of training images of the classes c with c mod G = g

Keys are computed and not trained (`Method.shared_from_data`), as the centroids of S-Prompts (Wang
et al., NeurIPS 2022, arXiv 2207.12819) are: trained keys tend to draw all images to one of them. A
pair without images yet has a zero key and is chosen by no image; while all keys are zero, as in the
first round, every pair has the same weight. So images of new classes mostly train the pairs of
those classes, and the others stay close to what they were: that is what keeps old classes in
class-incremental sessions (`partition.sessions`), if there are at least as many pairs as classes.
With fewer, several classes have a pair together, and the key follows those seen last.

In a federation everything is shared and nothing private. Pair g is averaged by how many images of
its classes a client has (`strategies/per_expert.py`), and kept as it is where there are none. For
that purpose a client uploads `expert_shares` (G,): with at least as many pairs as classes, its
LABEL HISTOGRAM, and its keys are THE MEAN FEATURE OF EACH OF ITS CLASSES (`reveals_classes`).
Upload: G (M d + D + 1) + M d numbers.

The tower encodes the class names once per pair and step, so a step costs G times PromptFL's.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.fields import option
from fedprompt.config.search import log_range
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import ClientData, Method, RoundInfo, Task, Tensors
from fedprompt.methods.parts.losses import mixed_logits
from fedprompt.methods.parts.prompts import PromptConfig, PromptSource


@dataclass(frozen=True)
class PromptBankConfig(PromptConfig):
    """Defaults are ours: the context is CoOp's for new classes."""

    default_strategy = MappingProxyType({"name": "per_expert"})
    reveals_classes = True

    context_tokens: int = option(4, "context tokens M", ge=1)
    context_init: str | None = option("a photo of a", "words to start from; null = random")
    pairs: int = option(8, "pairs G of a key and a bias of the context", ge=1)
    sharpness: float = option(
        100.0, "factor kappa of the cosine with the keys", gt=0, search=log_range(10, 300)
    )


class PromptBank(Method):
    """`ctx` (M, d), `bias.g` (M, d), `key.g` (D,) and `expert_shares` (G,); nothing is private."""

    name = "prompt_bank"
    source = "after Yoon et al., 2023"
    Config = PromptBankConfig

    def __init__(self, config: PromptBankConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config
        self.prompts = PromptSource.of(config, clip, task)
        keys = {f"shared.key.{g}" for g in range(config.pairs)}
        self.frozen = frozenset({"shared.expert_shares", *keys})

    def init_shared(self, seed: int) -> Tensors:
        """The context, biases and keys of zeros, and no shares."""
        context = self.prompts.start(seed, "init", "shared")
        pairs = range(self.cfg.pairs)
        return {
            "ctx": context,
            **{f"bias.{g}": torch.zeros_like(context) for g in pairs},
            **{f"key.{g}": torch.zeros(self.clip.embed_dim) for g in pairs},
            "expert_shares": torch.zeros(self.cfg.pairs),
        }

    def end_round(
        self, shared: Tensors, private: Tensors, round_info: RoundInfo
    ) -> tuple[Tensors, Tensors]:
        """Add the share of the client's images that belongs to each pair."""
        counts_KC = round_info.class_counts_KC
        pair_C = torch.arange(counts_KC.shape[-1], device=counts_KC.device) % self.cfg.pairs
        counts_KG = counts_KC @ F.one_hot(pair_C, self.cfg.pairs).to(counts_KC)
        return {**shared, "expert_shares": counts_KG / counts_KG.sum(-1, keepdim=True)}, private

    def shared_from_data(self, data: ClientData) -> Tensors:
        """The keys of the pairs that the client has images of; zeros elsewhere."""
        pair_N = data.labels_N % self.cfg.pairs
        features_ND = data.plain().features.float().cpu()
        member_NG = F.one_hot(pair_N, self.cfg.pairs).to(features_ND)
        sum_GD, images_G = member_NG.T @ features_ND, member_NG.sum(0)
        keys_GD = sum_GD / images_G.clamp(min=1)[:, None]
        return {f"key.{g}": key for g, key in enumerate(keys_GD)}

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """`pairs`: class features (K, G, C, D); and `keys` (K, G, D), of length 1 or 0."""
        bias_KGMd = torch.stack([shared[f"bias.{g}"] for g in range(self.cfg.pairs)], dim=1)
        keys_KGD = torch.stack([shared[f"key.{g}"] for g in range(self.cfg.pairs)], dim=1)
        return {
            "pairs": self.prompts.classes(shared["ctx"][:, None] + bias_KGMd),
            "keys": F.normalize(keys_KGD, dim=-1),
        }

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Cosine logits (K, B, C) with each image's mixture of class features."""
        v_KBD, keys_KGD = inputs.features, encoded["keys"]
        empty_KG = (keys_KGD == 0).all(-1)
        # While all of them are empty, the scores are zero and the weights equal.
        left_out_KG = empty_KG & ~empty_KG.all(-1, keepdim=True)
        score_KBG = self.cfg.sharpness * torch.einsum("kbd,kgd->kbg", v_KBD, keys_KGD)
        weight_KBG = score_KBG.masked_fill(left_out_KG[:, None], -torch.inf).softmax(-1)
        return mixed_logits(self.clip, v_KBD, encoded["pairs"], weight_KBG)

    def class_embeddings(self, encoded: Tensors) -> Tensor | None:
        """None: every image has a mixture of its own."""
        return None
