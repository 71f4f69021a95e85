"""FedPHA: a global prompt of fixed length, and local prompts whose lengths differ by client.

Source: FedPHA: Federated Prompt Learning for Heterogeneous Client Adaptation (Fang et al., ICML
2025; code CYFang6/FedPHA, trainers GL_SVDMSE and GL_SVDMSE_HE, checked in two forks of it). G (M,
d) is averaged; L (m_k, d) stays. G = U S V^T; V_2 are the right singular vectors without the first
floor(M (1 - ratio)), and L' = L V_2 V_2^T. With t the L2-normalised class features of a prompt,

    loss = CE(t(L)) + CE(t(G)) + pull_weight * mean over classes and D of (t(L) - t(L'))^2
           + push_weight * mean over classes of max(0, alpha - |t_c(L) - t_c(G)|)

Predictions are the local prompt's; the global model is the global prompt alone. Gradients flow
through everything, the singular vectors too, as in the public code, which detaches nothing.

Only M singular vectors exist in the code's thin decomposition, so V_2 V_2^T also removes what lies
outside the span of G, which is most of L. The default, `projection: row_space`, does the same;
`complement` keeps that part and removes the first vectors only, as the code's name for the
operation, null space, suggests.

Defaults are those of the public code: M = 16, ratio 0.8, alpha 1, weights 1. `local_tokens` is
assigned to clients in turn: client k has local_tokens[k modulo its length] tokens. `ctx` is padded
with zeros to the longest length, and the padding stays zero; `length` is the number of real rows.

How we differ: if lengths are unequal, the public code uses the end-of-text positions of the longest
prompt for all of them, and so reads a shorter prompt's feature too late, by the difference of
lengths; we read each at its own position. All clients start from the first rows of one draw, as in
GL_SVDMSE (GL_SVDMSE_HE draws each client's). A start from words fails in the code, so it is not
offered. The code decomposes G in float32, we G G^T = U S^2 U^T in float64. Momentum starts at zero
in each round in both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.fields import option
from fedprompt.config.search import Range, log_range
from fedprompt.data.features.inputs import Inputs
from fedprompt.errors import UserError
from fedprompt.methods.base import Batch, Method, MethodConfig, Task, Tensors
from fedprompt.methods.parts.losses import cosine_logits, cross_entropy
from fedprompt.methods.parts.prompts import PromptSource
from fedprompt.methods.parts.remembered import Remembered
from fedprompt.runtime.transfer import moved

Projection = Literal["row_space", "complement"]


@dataclass(frozen=True)
class FedPHAConfig(MethodConfig):
    """Defaults: the public code's."""

    supports_image_noise = True
    needs_float64 = True  # the decomposition

    shared_tokens: int = option(16, "context tokens M of the global prompt", ge=1)
    local_tokens: list[int] = option([16], "tokens of local prompts, dealt to clients in turn")
    ratio: float = option(
        0.8, "share of singular vectors kept in the projection", gt=0, le=1, search=Range(0.1, 0.95)
    )
    projection: Projection = option("row_space", "what is kept besides: nothing, or the rest")
    alpha: float = option(1.0, "push: distance beyond which prompts are not pushed", ge=0)
    pull_weight: float = option(
        1.0, "weight of the pull to the projected prompt", ge=0, search=log_range(0.05, 5)
    )
    push_weight: float = option(
        1.0, "weight of the push from the global prompt", ge=0, search=log_range(0.05, 5)
    )
    init_std: float = option(0.02, "standard deviation of the random start", gt=0)

    def check(self) -> None:
        """Refuse lengths below 1."""
        if not self.local_tokens or min(self.local_tokens) < 1:
            raise UserError("local_tokens must be a list of whole numbers of at least 1.")


class _Groups(NamedTuple):
    """Clients by the lengths of their prompts.

    Attributes:
        rows: each length, and the rows of the clients that have it.
        place: where each client stands among these rows.
    """

    rows: list[tuple[int, Tensor]]
    place: Tensor


class FedPHA(Method):
    """`ctx` of the shared container is averaged; the private `ctx` has `length` real rows."""

    name = "fedpha"
    source = "Fang et al., ICML 2025"
    Config = FedPHAConfig
    frozen = frozenset({"private.length"})
    no_graph_reason = "clients are grouped by the lengths of their private prompts"

    def __init__(self, config: FedPHAConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config
        # One text tower per length, since the positions of names and end-of-text depend on it.
        self.sources = {
            tokens: PromptSource(clip, task, tokens, init_std=config.init_std)
            for tokens in {config.shared_tokens, *config.local_tokens}
        }
        self.shared_prompts = self.sources[config.shared_tokens]
        self.longest = self.sources[max(config.local_tokens)]
        self._groups = Remembered[_Groups]()

    def init_shared(self, seed: int) -> Tensors:
        """`ctx` (M, d), the global prompt."""
        return {"ctx": self.shared_prompts.start(seed, "init", "shared")}

    def init_private(self, seed: int, client: int) -> Tensors:
        """`ctx` (longest, d), zeros behind the client's own `length` () rows."""
        length = self.cfg.local_tokens[client % len(self.cfg.local_tokens)]
        # One draw for all lengths: a shorter prompt is the beginning of a longer one. The draw is a
        # fresh tensor, so it may be changed in place.
        ctx = self.longest.start(seed, "init", "private")
        ctx[length:] = 0
        return {"ctx": ctx, "length": torch.tensor(float(length))}

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """`classes` (K, C, D): of the local prompts, or of the global one without private."""
        if private is None:
            return {"classes": self.shared_prompts.classes(shared["ctx"])}
        return {"classes": self._local_classes(private["ctx"], private["length"])}

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Cosine logits (K, B, C)."""
        return cosine_logits(self.clip, inputs.features, encoded["classes"])

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        """`ce`, `ce_global`, `pull` and `push`, each (K,) and already weighted."""
        cfg, local_KCD = self.cfg, encoded["classes"]
        # CE(t(L)) + CE(t(G)); predictions are L's, so `ce` is the first term.
        loss_terms = {"ce": cross_entropy(self.logits(encoded, batch.inputs), batch)}
        global_KCD = self.shared_prompts.classes(shared["ctx"])
        logits_KBC = cosine_logits(self.clip, batch.inputs.features, global_KCD)
        loss_terms["ce_global"] = cross_entropy(logits_KBC, batch)
        if cfg.pull_weight > 0:
            # Not detached, as in the public code: the gradient also reaches G by its singular
            # vectors.
            projected = project(private["ctx"], shared["ctx"], cfg.ratio, cfg.projection)
            projected_KCD = self._local_classes(projected, private["length"])
            pull_K = (local_KCD - projected_KCD).square().mean((-1, -2))
            loss_terms["pull"] = cfg.pull_weight * pull_K
        if cfg.push_weight > 0:
            distance_KC = torch.linalg.vector_norm(local_KCD - global_KCD, dim=-1)
            loss_terms["push"] = cfg.push_weight * F.relu(cfg.alpha - distance_KC).mean(-1)
        return loss_terms

    def _local_classes(self, ctx_KLd: Tensor, length_K: Tensor) -> Tensor:
        """Class features (K, C, D) of prompts of unequal lengths; equal lengths share a pass."""
        groups = self._groups((length_K,), lambda: _groups(length_K))
        # Rows behind the length are cut off, so they get no gradient and stay zero.
        features = [
            self.sources[length].classes(ctx_KLd[rows, :length]) for length, rows in groups.rows
        ]
        return torch.cat(features)[groups.place]


def _groups(length_K: Tensor) -> _Groups:
    """The clients of each length."""
    lengths, device = [int(n) for n in length_K.tolist()], length_K.device
    order: list[int] = []
    rows: list[tuple[int, Tensor]] = []
    for length in sorted(set(lengths)):
        same = [k for k, n in enumerate(lengths) if n == length]
        rows.append((length, torch.tensor(same)))
        order += same
    # The inverse permutation returns the features to the order of the client axis.
    place = sorted(range(len(order)), key=order.__getitem__)
    place_K, *rows_of = moved([torch.tensor(place), *(r for _, r in rows)], device)
    return _Groups([(n, r) for (n, _), r in zip(rows, rows_of, strict=True)], place_K)


def project(local_KLd: Tensor, global_KMd: Tensor, ratio: float, onto: Projection) -> Tensor:
    """L' = L V_2 V_2^T, V_2 the right singular vectors of G without the first floor(M (1 - ratio)).

    With G G^T = U S^2 U^T, the right singular vectors are G^T U / S. Rows of zeros stay zero.

    Args:
        local_KLd: local prompts L.
        global_KMd: global prompts G.
        ratio: share of G's singular vectors that the projection keeps.
        onto: `complement` also keeps what lies outside the span of G's rows.

    Returns:
        Projected prompts (K, L, d), in the dtype of `local_KLd`.
    """
    # G G^T squares the singular values, which float32 would resolve too coarsely.
    g_KMd, l_KLd = global_KMd.double(), local_KLd.double()
    cut = int(global_KMd.shape[-2] * (1 - ratio))
    square_KM, u_KMM = torch.linalg.eigh(g_KMd @ g_KMd.transpose(-1, -2))  # ascending
    rest = square_KM.shape[-1] - cut
    # `eigh` sorts in ascending order, so the first singular vectors are the last columns. The
    # complement is what remains after these are removed; otherwise all others are kept.
    columns = slice(rest, None) if onto == "complement" else slice(0, rest)
    # Keeps S away from zero where G has less than full rank; the bound itself is a constant.
    square_KM = torch.maximum(square_KM, 1e-12 * square_KM[:, -1:].detach())
    scale = square_KM[:, None, columns].rsqrt()
    v_KdR = g_KMd.transpose(-1, -2) @ u_KMM[..., columns] * scale
    part_KLd = l_KLd @ v_KdR @ v_KdR.transpose(-1, -2)
    projected_KLd: Tensor = l_KLd - part_KLd if onto == "complement" else part_KLd
    return projected_KLd.to(local_KLd)
