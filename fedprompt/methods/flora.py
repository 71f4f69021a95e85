"""FLORA: FedPGP's prompt with an orthogonal low-rank term, and FedCLIP's attention on images.

Source: FLORA: Better Balance Between Generalization and Personalization in Multi-Modal Federated
Prompt Learning (public code wingslyz/FLORA, from which the formulae are read; no paper was found,
and it is not FLoRA, arXiv 2404.15182, which is `method=lora`). A client's context is sigma + U V,
with U (M, b) and V (b, d) kept (B and A in the code); sigma and the attention are averaged. With T
the class features, T(0) those of "X X .. name." and v' = softmax(W_2 relu(W_1 v + b_1) + b_2) * v,

    L = CE(v', sigma + U V) + mu L_con + w_o |U U^T - I| + w_2 |V|         Frobenius norms
    L_con = mean over classes of -log( exp(p / tau) / (exp(p / tau) + exp(n / tau)) )
    p = cos(T(0), T(sigma)),  n = cos(T(0), T(sigma + U V))

so that, unlike in FedPGP, the personal prompt is pushed away from the un-tuned text. The global
model is sigma with the attention.

THE PUBLIC CODE CANNOT RUN: its model returns six values in training, and the trainer unpacks five.
Also there, and not reproduced: the attention is never averaged (the loop looks for it in lists that
stay empty), so that the one that a client has trained is passed on to the next; U and V are started
orthogonal by a QR decomposition that is overwritten by N(0, 0.02^2) at once (ours is the latter); a
third context `ctx_local` is encoded and decayed, and enters nothing; two prompts by default, whose
logits are 2 C wide with labels among the first C; one optimiser for all clients. `'B' and 'A' in
name` is true for A alone, so that only V is decayed: here too, as U has a penalty of its own.

U U^T is (M, M) of rank b, so it cannot be the identity for b < M: the penalty stays above
w_o sqrt(M - b). `gram: columns` asks for U^T U = I, orthonormal columns, as the text of the project
says; the default is the code's `rows`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.config.fields import option
from fedprompt.config.search import log_range
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import Batch, Tensors
from fedprompt.methods.fedpgp import FedPGP, FedPGPConfig
from fedprompt.methods.parts.adapters import attended, attention_start
from fedprompt.methods.parts.losses import cosine_logits, cross_entropy


@dataclass(frozen=True)
class FLORAConfig(FedPGPConfig):
    """Defaults: the public code's."""

    supports_image_noise = True

    mu: float = option(1.0, "weight of the contrast", ge=0, search=log_range(0.05, 5))
    orthogonality: float = option(
        0.1, "weight w_o of U's distance from orthogonality", ge=0, search=log_range(0.01, 1)
    )
    gram: Literal["rows", "columns"] = option("rows", "what is to be orthonormal in U")
    decay: float = option(0.01, "weight w_2 of the norm of V", ge=0, search=log_range(0.001, 0.1))


class FLORA(FedPGP):
    """`sigma` and the layers of `attention` are shared; `U` and `V` are private."""

    name = "flora"
    source = "wingslyz/FLORA (public code)"
    Config = FLORAConfig
    cfg: FLORAConfig

    def init_shared(self, seed: int) -> Tensors:
        """`sigma` (M, d), and both layers of the attention as torch.nn.Linear starts them."""
        return super().init_shared(seed) | attention_start(self.clip.embed_dim, seed)

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """`classes` (K, C, D), and the attention's layers as they are."""
        attention = {n: t for n, t in shared.items() if n.startswith("attention.")}
        return super().encode(shared, private) | attention

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Cosine logits (K, B, C) of the attended features."""
        return cosine_logits(self.clip, attended(encoded, inputs, F.relu), encoded["classes"])

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        """`ce`, `contrast`, `orthogonality` and `decay`, each (K,)."""
        terms = {"ce": cross_entropy(self.logits(encoded, batch.inputs), batch)}
        if self.cfg.mu > 0:
            sigma_KCD = self.prompts.classes(shared["sigma"])
            # n - p of both cosines with T(0).
            gap_KC = (self.untuned_CD * (encoded["classes"] - sigma_KCD)).sum(-1)
            terms["contrast"] = self.cfg.mu * F.softplus(gap_KC / self.cfg.temperature).mean(-1)
        u_KMb = private["U"]
        left = u_KMb if self.cfg.gram == "rows" else u_KMb.transpose(-1, -2)
        gram = left @ left.transpose(-1, -2)
        identity = torch.eye(gram.shape[-1], device=gram.device)
        terms["orthogonality"] = self.cfg.orthogonality * (gram - identity).norm(dim=(-2, -1))
        terms["decay"] = self.cfg.decay * private["V"].norm(dim=(-2, -1))
        return terms

    def class_embeddings(self, encoded: Tensors) -> Tensor | None:
        """None: the attention changes the image features."""
        return None
