"""PLAN: clients learn prompts of their own, then attention aggregators of all clients' prompts.

Source: Federated Domain Generalization via Prompt Learning and Aggregation (Gong, Cui, Zhang, Wang,
Nie, Zhu, IEEE TIFS 2025, arXiv 2411.10063); public code GongShuai8210/PLAN. P_n are the deep
prompts (J, M, w) of client n in either tower, at each layer j and token m:

    X = [P_1 .. P_N]      X <- norm1(X + attention(X, X, X))      over the N clients, 8 heads
    X <- norm2(X + FFN(X))      global prompt = mean over the clients

1. In odd rounds (counted from 1) a client trains its own prompts: L = CE + c CE(teacher, logits),
   the divergence up to a constant from a teacher, which is zero-shot CLIP in round 1, the model of
   the last global prompts after.
2. In even rounds prompts are fixed and the aggregators of both towers are trained: L = CE with the
   global prompts. Each layer has its own attention and FFN of twice the width; both norms of a
   tower are common to its layers.

Prompts are exchanged by `strategies/all_peers.py`; aggregators are averaged, and all clients count
the same. Nothing is private: everybody predicts with the global prompts. Distillation and
aggregator equal the authors' functions on equal inputs.

PRIVACY: every client sees every other client's prompts before any averaging.

UPLOAD: 82,024,448 numbers on ViT-B/16, of which 122,880 are prompts. A reply has the same tensors
in all rounds, so that prompts and aggregators travel together, as in the code.

How we differ from the public code: after round 0 its local step cuts the graph of the prompts
(`u.data`) before the aggregator, so that a client's visual prompts have no gradient at all and its
text prompts have one through the teacher, which is not detached; here the client's own prompts are
the student in all odd rounds, as in its first round and as in the paper's figure. The loop that
freezes aggregators names the text aggregator twice, so the visual one trains in all rounds. The
text aggregator is built and averaged, but tests and aggregation rounds take a plain mean of the
text prompts: `text_aggregator: mean`; the default is the paper's attention. All text contexts of
the code are one tensor at first, and visual ones differ by client; here all clients start equal.
There, the code's best round by validation accuracy is reported; here the last one. Between rounds,
the code has no schedule; ours is `training.schedule`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.fields import option
from fedprompt.config.search import log_range
from fedprompt.data.features.inputs import Inputs
from fedprompt.errors import UserError
from fedprompt.methods.base import Batch, Task, Tensors
from fedprompt.methods.ivlp import IVLP, IVLPConfig
from fedprompt.methods.parts.linear import layer_norm, linear_start, uniform_start
from fedprompt.methods.parts.losses import cosine_logits, cross_entropy, distillation
from fedprompt.methods.parts.remembered import Remembered

TOWERS = ("text", "visual")
PEERS, KNOWN = "peers.", "peers.known"


@dataclass(frozen=True)
class PLANConfig(IVLPConfig):
    """Defaults of the code: 8 + 8 tokens in 12 layers, c = 1."""

    default_strategy = MappingProxyType({"name": "all_peers", "weights": "uniform"})
    supported_strategies = frozenset({"all_peers"})

    text_tokens: int = option(8, "text tokens per layer", ge=1)
    visual_tokens: int = option(8, "visual tokens per layer", ge=1)
    context_init: str | None = option(None, "start words; those after M tokens stay")
    distill_weight: float = option(
        1.0, "weight c of the teacher's term", ge=0, search=log_range(0.1, 5)
    )
    heads: int = option(8, "heads of the aggregators' attention", ge=1)
    text_aggregator: Literal["attention", "mean"] = option(
        "attention", "how text prompts become global ones; mean is what the public code does"
    )
    peers: int = option(16, "room for the prompts of so many clients", ge=1)


class PLAN(IVLP):
    """`text` (J, M, d), `visual` (J, M, w) and the aggregators' tensors are shared."""

    name = "plan"
    source = "Gong et al., IEEE TIFS 2025"
    Config = PLANConfig
    no_graph_reason = "odd and even rounds train different tensors"

    def __init__(self, config: PLANConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config
        self.widths = {"text": clip.text.width, "visual": self.vision.width}
        self.attending = [t for t in TOWERS if t == "visual" or config.text_aggregator != "mean"]
        for tower in self.attending:
            if self.widths[tower] % config.heads:
                raise UserError(
                    f"plan: method.heads={config.heads} does not divide the {self.widths[tower]} "
                    f"numbers of {clip.name}'s {tower} prompts."
                )
        self.zero_shot_CD = clip.zero_shot_classifier(task.class_names, task.templates)
        self._teacher = Remembered[Tensors]()

    def init_shared(self, seed: int) -> Tensors:
        """The prompts of `IVLP`, and per tower the tensors of `aggregator_start`."""
        shared = super().init_shared(seed)
        for tower in self.attending:
            shared |= aggregator_start(tower, len(shared[tower]), self.widths[tower], seed)
        return shared

    def init_extras(self, seed: int) -> Tensors:
        """`peers.text` (E, J, M, d), `peers.visual` (E, J, M, w) and `peers.known` (E,)."""
        prompts, rows = super().init_shared(seed), self.cfg.peers
        peers = {f"{PEERS}{n}": torch.zeros(rows, *t.shape) for n, t in prompts.items()}
        return {**peers, KNOWN: torch.zeros(rows)}

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """`classes` (K, C, D) and `visual` (K, J, M, w) of the global prompts.

        In training, which alone has leaves that require a gradient, the tensors are passed on: what
        a step needs of them depends on the round, which `loss_terms` knows.
        """
        if any(t.requires_grad for t in shared.values()):
            return dict(shared)
        return self._global(shared)

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Cosine logits (K, B, C) under the global prompts."""
        model = encoded if "classes" in encoded else self._global(encoded)
        return super().logits(model, inputs)

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        """`ce` and `distillation` (K,), which is zero in even rounds."""
        if batch.round_info.server_round % 2 == 0:
            ce_K = cross_entropy(self.logits(self._global(shared), batch.inputs), batch)
            return {"ce": ce_K, "distillation": torch.zeros_like(ce_K)}
        own = {"classes": self.text.classes(shared["text"]), "visual": shared["visual"]}
        logits_KBC = self.logits(own, batch.inputs)
        soft_K = distillation(logits_KBC, self._teachers_logits(batch), batch)
        return {
            "ce": cross_entropy(logits_KBC, batch),
            "distillation": self.cfg.distill_weight * soft_K,
        }

    @torch.no_grad()
    def _teachers_logits(self, batch: Batch) -> Tensor:
        info = batch.round_info
        if info.server_round == 1:
            return cosine_logits(self.clip, batch.inputs.features, self.zero_shot_CD)
        model = self._teacher(tuple(info.received.values()), lambda: self._global(info.received))
        return self.logits(model, batch.inputs)

    def _global(self, shared: Tensors) -> Tensors:
        """The model of the global prompts."""
        prompts = {}
        for tower in TOWERS:
            rows, known_KE = self._rows(shared, tower)
            if tower in self.attending:
                weights = {n: t for n, t in shared.items() if n.startswith(f"{tower}.")}
                prompts[tower] = aggregate(tower, weights, rows, known_KE, self.cfg.heads)
            else:
                prompts[tower] = _mean(rows.movedim(1, 2), known_KE)
        return {"classes": self.text.classes(prompts["text"]), "visual": prompts["visual"]}

    @staticmethod
    def _rows(shared: Tensors, tower: str) -> tuple[Tensor, Tensor]:
        """Prompts (K, E + 1, J, M, w) and which rows count (K, E + 1).

        The last row is the tower's shared prompts, which count while nobody's are known.
        """
        # Detached, because no gradient reaches a client's prompts through the aggregator.
        own = shared[tower].detach()[:, None]
        if KNOWN not in shared:
            return own, torch.ones_like(own[:, :, 0, 0, 0])
        known_KE = shared[KNOWN]
        nobody_K1 = (known_KE.sum(1, keepdim=True) == 0).to(known_KE.dtype)
        clients = max(len(own), len(known_KE))
        peers = shared[f"{PEERS}{tower}"].expand(clients, *[-1] * (own.dim() - 1))
        rows = torch.cat([peers, own.expand(clients, *[-1] * (own.dim() - 1))], dim=1)
        return rows, torch.cat([known_KE, nobody_K1], dim=1).expand(clients, -1)


def aggregator_start(tower: str, layers: int, width: int, seed: int) -> Tensors:
    """Starting values of a tower's aggregator, distributed as those of torch's modules.

    Args:
        tower: prefix of the names.
        layers: J.
        width: w.
        seed: seed of the run.

    Returns:
        `in_proj`, `out_proj`, `ffn1`, `ffn2`, each `.weight` and `.bias` with J in front, and
        `norm1` and `norm2` without.
    """
    key = ("init", "aggregator", tower)
    # As torch.nn.MultiheadAttention: Xavier's bound for all three projections together.
    bound = math.sqrt(6 / (4 * width))
    start = {
        "in_proj.weight": uniform_start((layers, 3 * width, width), bound, seed, *key, "in_proj"),
        "in_proj.bias": torch.zeros(layers, 3 * width),
        "out_proj.bias": torch.zeros(layers, width),
    }
    per_layer = [
        linear_start("out_proj", width, width, seed, *key, j, bias=False)
        | linear_start("ffn1", 2 * width, width, seed, *key, j)
        | linear_start("ffn2", width, 2 * width, seed, *key, j)
        for j in range(layers)
    ]
    start |= {name: torch.stack([layer[name] for layer in per_layer]) for name in per_layer[0]}
    for norm in ("norm1", "norm2"):
        start |= {f"{norm}.weight": torch.ones(width), f"{norm}.bias": torch.zeros(width)}
    return {f"{tower}.{name}": tensor for name, tensor in start.items()}


def aggregate(
    tower: str, weights: Tensors, rows_KEJMw: Tensor, known_KE: Tensor, heads: int
) -> Tensor:
    """Global prompts (K, J, M, w) of the prompts of E clients.

    Args:
        tower: prefix of the names in `weights`.
        weights: the tensors of `aggregator_start` with K in front.
        rows_KEJMw: prompts.
        known_KE: 1 for rows that count; at least one of each K does.
        heads: heads of the attention.
    """

    def layer(x_KJEMw: Tensor, name: str) -> Tensor:
        weight_KJow, bias_KJo = (weights[f"{tower}.{name}.{kind}"] for kind in ("weight", "bias"))
        flat = x_KJEMw.flatten(2, 3) @ weight_KJow.transpose(-1, -2) + bias_KJo[:, :, None]
        out: Tensor = flat.unflatten(2, x_KJEMw.shape[2:4])
        return out

    def norm(x: Tensor, name: str) -> Tensor:
        return layer_norm(x, weights[f"{tower}.{name}.weight"], weights[f"{tower}.{name}.bias"])

    x = rows_KEJMw.movedim(1, 2)
    # Tokens are independent: (K, J, M, h, E, w / h), so that the clients attend to each other.
    q, k, v = (
        part.unflatten(-1, (heads, -1)).permute(0, 1, 3, 4, 2, 5)
        for part in layer(x, "in_proj").chunk(3, dim=-1)
    )
    seen = (known_KE > 0)[:, None, None, None, None]
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    x = norm(x + layer(mixed.permute(0, 1, 4, 2, 3, 5).flatten(-2), "out_proj"), "norm1")
    x = norm(x + layer(layer(x, "ffn1").relu(), "ffn2"), "norm2")
    return _mean(x, known_KE)


def _mean(x_KJEMw: Tensor, known_KE: Tensor) -> Tensor:
    """Mean over the clients that count (K, J, M, w)."""
    share_KE = known_KE / known_KE.sum(1, keepdim=True)
    return torch.einsum("kjemw,ke->kjmw", x_KJEMw, share_KE)
