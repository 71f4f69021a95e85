"""DP-FPL: a shared and a private context that are added, with noise on their gradients.

Source: Privacy-Preserving Personalized Federated Prompt Learning for Multimodal Large Language
Models (Tran et al., ICLR 2025, arXiv 2501.13904; public code: linhhtran/DP-FPL, from which the
formulae are read). G is the shared context (M, d), L the private one, g the gradient of the
cross-entropy for their sum; L is factorised again at every step:

    p = G + L,   L = U V + R                       prompt; U (M, r), V (r, d)
    U = orth(L V_0), V = orth(L^T U)^T             one power iteration, V_0 ~ N(0, 1)
    g_U = clip(g V^T) + n,  g_V = clip(U^T g) + n  Frobenius norm at most `clip_norm`
    g_L = (g_U V + U g_V + U U^T g_U V) / 10       what moves L
    g_G = clip(g)                                  what moves G
    n ~ N(0, std^2),  std = sqrt(T ln(1 / delta)) / epsilon * clip_norm / B

T is the number of rounds, B that of images in the step. U, V and R are not stored and R is never
dropped, so the prompt is G + L for every rank; the rank affects only the gradient of L.

WHAT IS NOT THE PAPER'S. There, the server averages the clients' g_G after every batch, adds noise
of std / N for N clients and steps. Here a client steps G itself and weights are averaged once a
round. `shared_noise: clients` puts noise of std / sqrt(N) on each client's g_G, so the mean over N
clients has the server's std / N; with one local step per round, plain SGD and uniform weights a
round is then the paper's step. With more steps the noise passes through local training, which the
paper does not analyse; and one client's reply is protected less than the mean of N. `none` leaves
the shared part to a differentially private strategy, `local` gives it the private part's std.

WHAT EPSILON GUARANTEES. The formula is the public code's. It clips the mean gradient of a batch,
not each image's, so clip_norm / B is not what one image can change, and it counts rounds where
noise is added at every batch: epsilon is a scale of noise, NO guarantee. Nor do we give one.
Private tensors never leave the client in any case.

How we differ: the public code adds U U^T g_U V; to be g's projection on the factors' tangent space
the sign has to be minus (Yu et al., ICML 2021, arXiv 2106.09352) and nothing divided by 10.
`local_gradient: projection` does so; the default is the code's. In the public loop the initial
weights are loaded again before every batch of round 1, so only the last batch of that round counts
(and the momentum of the others). A single optimiser serves all clients in turn, so that its
momentum mixes them; ours is each client's own and starts at zero in each round. B is the number of
a step's images, so a partial batch gets more noise; in the public code it is the size of the
largest batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.fields import option
from fedprompt.config.search import log_range
from fedprompt.data.features.inputs import Inputs
from fedprompt.errors import UserError
from fedprompt.methods.base import UNIFORM_AVERAGE, Batch, Method, Task, Tensors
from fedprompt.methods.parts.losses import cosine_logits
from fedprompt.methods.parts.prompts import PromptSource, RandomPromptConfig


@dataclass(frozen=True)
class DPFPLConfig(RandomPromptConfig):
    """Defaults: the public code's, but noise is off by default.

    One version of that code has no noise either; in another, and in its README, epsilon is 0.4. The
    paper's values are 0.1 to 0.4.
    """

    default_strategy = UNIFORM_AVERAGE

    rank: int = option(8, "rank r of the private context's gradient", ge=1)
    epsilon: float | None = option(None, "scale of the noise; null = no clipping, no noise", gt=0)
    delta: float = option(1e-5, "delta of the noise's formula", gt=0, lt=1)
    clip_norm: float = option(10.0, "largest norm of a gradient", gt=0, search=log_range(0.1, 50))
    shared_noise: Literal["clients", "local", "none"] = option(
        "clients", "noise on the shared part"
    )
    clients: int = option(10, "shared_noise=clients: replies that are averaged", ge=1)
    local_gradient: Literal["public_code", "projection"] = option("public_code", "form of g_L")

    def check(self) -> None:
        """U has orthonormal columns, so there cannot be more of them than tokens."""
        if self.rank > self.context_tokens:
            raise UserError(
                f"rank {self.rank} is larger than context_tokens, {self.context_tokens}."
            )


class DPFPL(Method):
    """`ctx` (M, d) of both containers; the prompt is their sum."""

    name = "dp_fpl"
    source = "Tran et al., ICLR 2025"
    Config = DPFPLConfig

    def __init__(self, config: DPFPLConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config
        self.prompts = PromptSource.of(config, clip, task)

    def init_shared(self, seed: int) -> Tensors:
        """`ctx` (M, d), G."""
        return {"ctx": self.prompts.start(seed, "init", "shared")}

    def init_private(self, seed: int, client: int) -> Tensors:
        """`ctx` (M, d), L; all clients start from the same draw, as in the public code."""
        return {"ctx": self.prompts.start(seed, "init", "private")}

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """Class features (K, C, D) of G + L, or of G alone."""
        context = shared["ctx"] if private is None else shared["ctx"] + private["ctx"]
        return {"classes": self.prompts.classes(context)}

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Cosine logits (K, B, C)."""
        return cosine_logits(self.clip, inputs.features, encoded["classes"])

    def gradients(
        self, loss_terms: dict[str, Tensor], leaves: Tensors, batch: Batch
    ) -> dict[str, Tensor | None]:
        """g_G and g_L: clipped and noisy, g_L by way of the factors."""
        gradients = super().gradients(loss_terms, leaves, batch)
        # p = G + L, so both leaves have the same gradient g.
        g_KMd = gradients["private.ctx"]
        assert g_KMd is not None
        # U and V are constants of this step: no gradient passes through the factorisation.
        private_KMd = leaves["private.ctx"].detach()
        start_Kdr = batch.normal((private_KMd.shape[-1], self.cfg.rank), "dp_fpl", "power")
        u_KMr, v_Krd = factorise(private_KMd, start_Kdr)
        # g_U = clip(g V^T) + n and g_V = clip(U^T g) + n.
        gu_KMr = self._private_noise(g_KMd @ v_Krd.transpose(-1, -2), batch, "u")
        gv_Krd = self._private_noise(u_KMr.transpose(-1, -2) @ g_KMd, batch, "v")
        # g_U V, then g_U V + U g_V, then U U^T g_U V.
        left_KMd = gu_KMr @ v_Krd
        sides_KMd = left_KMd + u_KMr @ gv_Krd
        both_KMd = u_KMr @ (u_KMr.transpose(-1, -2) @ left_KMd)
        if self.cfg.local_gradient == "projection":
            gradients["private.ctx"] = sides_KMd - both_KMd
        else:
            gradients["private.ctx"] = (sides_KMd + both_KMd) / 10
        # g_G is made of the raw g and gets noise of its own.
        gradients["shared.ctx"] = self._shared_noise(g_KMd, batch)
        return gradients

    def noise_std(self, batch: Batch) -> Tensor:
        """std of each client's noise (K,): sqrt(T ln(1 / delta)) / epsilon * clip_norm / B."""
        assert self.cfg.epsilon is not None
        # T is the number of rounds, not of steps, as in the public code.
        spent = math.sqrt(batch.round_info.rounds * math.log(1 / self.cfg.delta)) / self.cfg.epsilon
        # B counts the real images of each client, so a partial batch gets more noise.
        return spent * self.cfg.clip_norm / batch.mask_KB.sum(-1)

    def _private_noise(self, gradient_K: Tensor, batch: Batch, factor: str) -> Tensor:
        if self.cfg.epsilon is None:
            return gradient_K
        return self._noisy(gradient_K, self.noise_std(batch), batch, factor)

    def _shared_noise(self, gradient_KMd: Tensor, batch: Batch) -> Tensor:
        if self.cfg.epsilon is None:
            return gradient_KMd
        if self.cfg.shared_noise == "none":
            return clipped(gradient_KMd, self.cfg.clip_norm)
        std_K = self.noise_std(batch)
        if self.cfg.shared_noise == "clients":
            # The mean of N independent draws with std / sqrt(N) has the server's std / N.
            std_K = std_K / math.sqrt(self.cfg.clients)
        return self._noisy(gradient_KMd, std_K, batch, "shared")

    def _noisy(self, gradient_K: Tensor, std_K: Tensor, batch: Batch, name: str) -> Tensor:
        # The name of the part is in the key: draws of U, V and G must be independent.
        noise_K = batch.normal(tuple(gradient_K.shape[1:]), "dp_fpl", name)
        return clipped(gradient_K, self.cfg.clip_norm) + std_K[:, None, None] * noise_K


def clipped(gradient_Kab: Tensor, limit: float) -> Tensor:
    """Each client's matrix, scaled down to Frobenius norm `limit` where its norm is larger."""
    # Clamping the norm from below gives a factor of 1 within the limit, and never divides by zero.
    norm_K11 = gradient_Kab.norm(dim=(-2, -1), keepdim=True)
    shorter: Tensor = gradient_Kab * (limit / norm_K11.clamp(min=limit))
    return shorter


def factorise(matrix_KMd: Tensor, start_Kdr: Tensor) -> tuple[Tensor, Tensor]:
    """U (K, M, r) and V (K, r, d) after one power iteration from `start`; both orthonormal.

    Columns are orthonormalised one after the other (Gram-Schmidt), as in the public code.
    """
    u_KMr = _orthonormal(matrix_KMd @ start_Kdr)
    v_Kdr = _orthonormal(matrix_KMd.transpose(-1, -2) @ u_KMr)
    return u_KMr, v_Kdr.transpose(-1, -2)


def _orthonormal(matrix_Kar: Tensor) -> Tensor:
    """Gram-Schmidt over the r columns: each unit column is projected out of those after it."""
    columns: list[Tensor] = []
    rest_Kar = matrix_Kar
    for _ in range(matrix_Kar.shape[-1]):
        unit_Ka1 = rest_Kar[..., :1] / rest_Kar[..., :1].norm(dim=-2, keepdim=True)
        columns.append(unit_Ka1)
        rest_Kar = rest_Kar[..., 1:]
        rest_Kar = rest_Kar - (unit_Ka1 * rest_Kar).sum(-2, keepdim=True) * unit_Ka1
    return torch.cat(columns, dim=-1)
