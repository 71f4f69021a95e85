"""MoCoOp: a mixture of contexts, of which a gate chooses two per image.

Source: Mixture of Prompt Learning for Vision Language Models (Du, Niu, Zhao, 2024, arXiv
2409.12011; code dyabel/mocoop). Templates are divided into G groups. Expert e is a context that
starts from the first template of its group; its class features are t_e = norm(f(ctx_e) + w) with
one correction w for all experts. h = gate(v) are G numbers, and e1, e2 the two experts with the
largest:

    logits = exp(logit_scale) v . sum_e a_e t_e,     a = softmax(h_e1, h_e2), 0 elsewhere
    L = CE + lambda_t L_text + lambda_g L_gate
    L_text: cross-entropy of t_ec . r_ec' over c' with target c, mean over e and c
    L_gate: cross-entropy of h with softmax(v . r_ey + 10 [e is among the two largest v . r_ey])

r_ec are the features of class c under the group's templates: their normalised mean. Neither loss
multiplies its cosines by exp(logit_scale). Checked against the authors' `prompting/moe.py`.

In a federation the contexts and w are shared, and the gate stays on the client, so that each client
routes its own images (`gate: shared` averages it too). A context is averaged by how much the
clients' gates use it (`strategies/per_expert.py`). For that purpose a client uploads
`expert_shares` (G,), its gate's mean weights a over up to `anchors` of its training images, which
THE SERVER SEES. Without a gate, the global model weighs all experts equally.

How we differ: the public code also trains the layer norms of the image tower, at a tenth of the
rate; here the image tower is frozen and features come from the cache. It writes a full stop behind
the class name in L_text only, and L_text also sees the names of held-out classes; here all prompts
end with a full stop, and a client knows the names of its own task. It counts the words of a
template instead of its tokens, and can learn words behind the class name; ours end in the name. It
adds noise to template features in place, step after step, but no loss reads that tensor. Its
configs set keys that its trainer does not read (`LASP_PROMPTS` for `PROMPTS`), so they do not load
unchanged. The code clips the norm of all gradients at 1 and has three epochs at the rate 1e-5; ours
does neither (docs/concepts.md, "Local training").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.text_tokens import context_init, token_count
from fedprompt.backbone.text_tower import TextTower
from fedprompt.config.fields import option
from fedprompt.config.search import log_range
from fedprompt.data.features.inputs import Inputs
from fedprompt.errors import UserError
from fedprompt.methods.base import (
    Batch,
    ClientData,
    Method,
    MethodConfig,
    RoundInfo,
    Task,
    Tensors,
)
from fedprompt.methods.parts.linear import linear, linear_start
from fedprompt.methods.parts.losses import cross_entropy, masked_mean, mixed_logits
from fedprompt.rng import generator

TEMPLATES = (
    "a centered satellite photo of {}.",
    "a photo of a {}.",
    "a photo of the large {}.",
    "a photo of a large {}.",
    "a photo of the small {}.",
    "a photo of a small {}.",
    "a low resolution photo of the {}.",
    "a low resolution photo of a {}.",
    "a pixelated photo of the {}.",
    "a pixelated photo of a {}.",
    "a good photo of the {}.",
    "a good photo of a {}.",
)
"""CLIP's templates (Radford et al., ICML 2021) that the public code takes for EuroSAT."""
HARD = 10.0
"""What the gate's target adds to the two largest cosines."""


@dataclass(frozen=True)
class MoCoOpConfig(MethodConfig):
    """Defaults: the public code's config for EuroSAT and its weights of the losses."""

    default_strategy = MappingProxyType({"name": "per_expert"})

    templates: list[str] = option(list(TEMPLATES), "sentences that end in {}, group after group")
    groups: list[int] = option(
        [1, 1, 2, 2, 4, 2], "sizes of the groups; the first template of each starts an expert"
    )
    text_weight: float = option(
        5.0, "weight of the pull towards the group's templates (lambda_t)",
        ge=0, search=log_range(0.5, 20),
    )  # fmt: skip
    gate_weight: float = option(
        1.0, "weight of the gate's target (lambda_g)", ge=0, search=log_range(0.1, 10)
    )
    gate: Literal["private", "shared"] = option("private", "whether clients keep their own gate")
    anchors: int = option(64, "training images over which a client's gate shares are taken", ge=1)

    def check(self) -> None:
        """Refuse templates that do not end in the class name, and groups that do not fit them."""
        for template in self.templates:
            if template.count("{}") != 1 or not template.removesuffix(".").endswith("{}"):
                raise UserError(f"'templates': '{template}' must end in {{}}, the class name.")
            if not template.split("{}")[0].strip():
                raise UserError(f"'templates': '{template}' has no words that could be learned.")
        if len(self.groups) < 2 or min(self.groups) < 1:
            raise UserError(
                f"'groups' is {self.groups}; give two or more sizes, each at least 1: the gate "
                "chooses two experts."
            )
        if sum(self.groups) != len(self.templates):
            raise UserError(
                f"'groups' {self.groups} adds up to {sum(self.groups)}, but there are "
                f"{len(self.templates)} templates."
            )


class MoCoOp(Method):
    """`ctx.e` (M_e, d) and `correction` (D,) are shared, the gate is private by default."""

    name = "mocoop"
    source = "Du et al., 2024"
    Config = MoCoOpConfig
    frozen = frozenset({"shared.expert_shares", "private.anchors", "private.filled"})
    images_at_once = 1024

    def __init__(self, config: MoCoOpConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config
        self.experts = len(config.groups)
        starts = [sum(config.groups[:e]) for e in range(self.experts)]
        self.words = [config.templates[i].split("{}")[0].strip() for i in starts]
        self.tokens = [token_count(clip, words) for words in self.words]
        # Experts with equally many tokens pass through one tower together.
        self.towers = {m: TextTower(clip, task.class_names, m) for m in sorted(set(self.tokens))}
        groups = torch.split(
            torch.stack(
                [clip.zero_shot_classifier(task.class_names, [t]) for t in config.templates]
            ),
            list(config.groups),
        )
        self.targets_GCD = F.normalize(torch.stack([group.mean(0) for group in groups]), dim=-1)

    def init_shared(self, seed: int) -> Tensors:
        """`ctx.e` (M_e, d), `correction` (D,), `expert_shares` (G,); also a shared gate."""
        nothing = torch.empty(0)
        contexts = {
            f"ctx.{e}": context_init(self.clip, words, tokens, nothing)
            for e, (words, tokens) in enumerate(zip(self.words, self.tokens, strict=True))
        }
        return {
            **contexts,
            "correction": torch.zeros(self.clip.embed_dim),
            "expert_shares": torch.zeros(self.experts),
            **(self._gate(seed) if self.cfg.gate == "shared" else {}),
        }

    def init_private(self, seed: int, client: int) -> Tensors:
        """The gate, the same for all clients, and room for `anchors`, features of own images."""
        anchors = self.cfg.anchors
        return {
            **(self._gate(seed) if self.cfg.gate == "private" else {}),
            "anchors": torch.zeros(anchors, self.clip.embed_dim),
            "filled": torch.zeros(anchors),
        }

    def _gate(self, seed: int) -> Tensors:
        return linear_start("gate", self.experts, self.clip.embed_dim, seed, "init", "gate")

    def init_private_from_data(self, private: Tensors, data: ClientData, seed: int) -> Tensors:
        """Fill `anchors` with images of the client, drawn at random if there are more."""
        order = torch.from_numpy(generator(seed, "anchors", data.client).permutation(len(data)))
        rows = order[: self.cfg.anchors]
        anchors, filled = private["anchors"].clone(), private["filled"].clone()
        anchors[: len(rows)] = data.plain().features.cpu()[rows]
        filled[: len(rows)] = 1.0
        return {**private, "anchors": anchors, "filled": filled}

    def end_round(
        self, shared: Tensors, private: Tensors, round_info: RoundInfo
    ) -> tuple[Tensors, Tensors]:
        """Add how much the client's gate uses each expert."""
        weight_KBG = _top_two(_gate_logits(shared | private, private["anchors"]))
        filled_KB1 = private["filled"][..., None]
        shares_KG = (weight_KBG * filled_KB1).sum(1) / filled_KB1.sum(1).clamp(min=1)
        return {**shared, "expert_shares": shares_KG}, private

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """`experts`: class features (K, G, C, D); and the gate, if there is one."""
        features: list[Tensor] = [torch.empty(0)] * self.experts
        for tokens, tower in self.towers.items():
            here = [e for e, own in enumerate(self.tokens) if own == tokens]
            found_KnCD = tower(torch.stack([shared[f"ctx.{e}"] for e in here], dim=1))
            for i, e in enumerate(here):
                features[e] = found_KnCD[:, i]
        # t_e = norm(f(ctx_e) + w), on the features as the tower gives them.
        experts_KGCD = torch.stack(features, dim=1) + shared["correction"][:, None, None]
        both = shared | (private or {})
        gate: Tensors = {n: t for n, t in both.items() if n in ("gate.weight", "gate.bias")}
        return {"experts": F.normalize(experts_KGCD, dim=-1), **gate}

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Cosine logits (K, B, C) with each image's mixture of class features."""
        v_KBD = inputs.features
        if "gate.weight" in encoded:
            weight_KBG = _top_two(_gate_logits(encoded, v_KBD))
        else:
            weight_KBG = v_KBD.new_full((1, 1, self.experts), 1 / self.experts)
        return mixed_logits(self.clip, v_KBD, encoded["experts"], weight_KBG)

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        """Cross-entropy `ce`, and the weighted terms `text` and `gate`."""
        v_KBD = batch.inputs.features
        # L_text: every expert tells its classes apart by the features of its group's templates.
        cosine_KGCC = encoded["experts"] @ self.targets_GCD.transpose(-1, -2)
        text_K = -cosine_KGCC.log_softmax(-1).diagonal(dim1=-2, dim2=-1).mean((-2, -1))
        # L_gate: the target is made of frozen features and carries no gradient.
        own_KBGD = self.targets_GCD.transpose(0, 1)[batch.labels_KB]
        similar_KBG = torch.einsum("kbd,kbgd->kbg", v_KBD, own_KBGD)
        best_KB2 = similar_KBG.topk(2, dim=-1).indices
        target_KBG = similar_KBG.scatter_add(
            -1, best_KB2, torch.full_like(best_KB2, HARD, dtype=similar_KBG.dtype)
        ).softmax(-1)
        gate_KB = -(target_KBG * _gate_logits(encoded, v_KBD).log_softmax(-1)).sum(-1)
        return {
            "ce": cross_entropy(self.logits(encoded, batch.inputs), batch),
            "text": self.cfg.text_weight * text_K,
            "gate": self.cfg.gate_weight * masked_mean(gate_KB, batch.mask_KB),
        }

    def class_embeddings(self, encoded: Tensors) -> Tensor | None:
        """The mean (C, D) over experts of the global model; None where a gate mixes per image."""
        return None if "gate.weight" in encoded else encoded["experts"][0].mean(0)


def _gate_logits(tensors: Mapping[str, Any], v_KBD: Tensor) -> Tensor:
    """h (K, B, G)."""
    return linear(v_KBD, tensors["gate.weight"], tensors["gate.bias"])


def _top_two(h_KBG: Tensor) -> Tensor:
    """a (K, B, G): the softmax over the two largest, 0 elsewhere."""
    best = h_KBG.topk(2, dim=-1)
    return torch.zeros_like(h_KBG).scatter(-1, best.indices, best.values.softmax(-1))
