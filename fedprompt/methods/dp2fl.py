"""DP2FL: a shared task prompt for text, and a private map from it to an image prompt.

Source: DP2FL: Dual Prompt Personalized Federated Learning in Foundation Models (Chang, Shi, Zhao,
Chen, Ma, Scientific Reports 15:28026, 2025, arXiv 2504.16357). No public code was found, and of the
paper only the abstract and a summary of the method were readable to us. They say:

    text input [T, P_t], image input [I, P_i], P_i = F(P_t; P_d)

P_t is the global task prompt. P_d, the data prompt, is the set of parameters of the map F; a client
computes its own from those of "positive" clients and of "retained negative" ones, whose loss on its
data is below alpha times its own; a global model serves new data and new clients. alpha 1.2, beta
0.2, MaPLe's code base, learning rate 0.035, 5 local epochs, batch 4, 10 clients, 10 rounds.

RECONSTRUCTED, with config keys for the numbers: F is MaPLe's linear layer, at the input only. Let
l_j be the loss of peer j's P_d on a few of the client's own training images under the received P_t,
and l that of the client's own P_d. Before a round the client sets

    P_d <- (1 - beta) P_d + beta * sum_j w_j P_d^j,     w_j ~ 1 / l_j for peers with l_j < alpha * l

and then trains P_t and P_d together. A client that has no P_d yet starts from the average of all
clients' data prompts; that average, with P_t, is also the global model. The strategy
`nearest_peers` sends the data prompts of the E nearest clients, or of all if there are fewer.

MISSING: the paper's server weights clients' P_t by the losses of every client on every other
client's validation set; here they are weighted by numbers of training images. The paper's
validation images are held out of training; here they are training images, stored as private
tensors.

PRIVACY: other clients see a client's P_d as it was trained, and a client is sent E of them in every
exchange (394,000 numbers each on ViT-B/16).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.fields import option
from fedprompt.config.search import Range, log_range
from fedprompt.data.features.inputs import Inputs
from fedprompt.errors import UserError
from fedprompt.methods.base import ClientData, RoundInfo, Task, Tensors
from fedprompt.methods.maple import MaPLe, MaPLeConfig, visual_prompts
from fedprompt.methods.parts import local_copy as local_copy
from fedprompt.methods.parts.losses import masked_mean
from fedprompt.rng import generator

FACTORS = ("weight", "bias")
"""Names of P_d's tensors."""


@dataclass(frozen=True)
class DP2FLConfig(MaPLeConfig):
    """alpha and beta of the paper; the rest is our reading of it."""

    default_strategy = MappingProxyType({"name": "nearest_peers"})
    supported_strategies = frozenset({"nearest_peers"})

    sharing: Literal["text", "factors", "materialised"] = option("factors", "always 'factors'")
    depth: int = option(1, "layers with prompts; 1 = at the input only", ge=1)
    peers: int = option(9, "other clients whose data prompts a client is sent", ge=1)
    alpha: float = option(
        1.2,
        "peers whose loss is below alpha times the own one are used",
        gt=0,
        search=log_range(0.1, 5),
    )
    beta: float = option(
        0.2, "share of the peers in a data prompt", ge=0, le=1, search=Range(0.05, 1.0)
    )
    validation_images: int = option(4, "own images on which peers' prompts are evaluated", ge=1)

    def check(self) -> None:
        """Refuse to upload anything but P_t and P_d."""
        if self.sharing != "factors":
            raise UserError("'sharing' must be 'factors': peers are sent each other's P_d.")


class DP2FL(MaPLe):
    """MaPLe whose factors are averaged for new clients; others continue from their own."""

    name = "dp2fl"
    source = "Chang et al., Sci. Rep. 2025 (reconstructed)"
    Config = DP2FLConfig
    frozen = local_copy.names(FACTORS) | {f"private.val.{n}" for n in ("pixels", "labels", "mask")}
    images_at_once = 256

    def __init__(self, config: DP2FLConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config

    def init_private(self, seed: int, client: int) -> Tensors:
        """The client's P_d, and `val.pixels` (V, 3, H, W), `val.labels` and `val.mask` (V,)."""
        factors = {n: self.init_shared(seed)[n] for n in FACTORS}
        count, (height, width) = self.cfg.validation_images, self.vision.visual.image_size
        return local_copy.start(factors) | {
            "val.pixels": torch.zeros(count, 3, height, width),
            "val.labels": torch.zeros(count),
            "val.mask": torch.zeros(count),
        }

    def init_extras(self, seed: int) -> Tensors:
        """`peers.weight`, `peers.bias` (E, ...) and `peers.known` (E,)."""
        shared, peers = self.init_shared(seed), self.cfg.peers
        rows = {f"peers.{n}": torch.zeros(peers, *shared[n].shape) for n in FACTORS}
        return {**rows, "peers.known": torch.zeros(peers)}

    def init_private_from_data(self, private: Tensors, data: ClientData, seed: int) -> Tensors:
        """Store a few of the client's own images, on which peers' data prompts are evaluated."""
        draw = generator(seed, "validation images", data.client)
        count = min(self.cfg.validation_images, len(data))
        rows = torch.from_numpy(draw.permutation(len(data))[:count])
        # `on` also turns cached bytes into normalised floats; private tensors are float32.
        pixels = data.plain()[rows].on(torch.device("cpu")).pixels
        assert pixels is not None
        # Clones, because a method must not modify its arguments.
        filled = {n: t.clone() for n, t in private.items()}
        filled["val.pixels"][:count] = pixels
        filled["val.labels"][:count] = data.labels_N[rows].float()
        filled["val.mask"][:count] = 1
        return filled

    def start_round(
        self, shared: Tensors, private: Tensors, round_info: RoundInfo
    ) -> tuple[Tensors, Tensors]:
        """Mix P_d from the client's own and its peers', or take the average if it has none yet."""
        current = local_copy.model(shared, private)
        weights_KE = self.peer_weights(current, private, round_info)
        mixed = dict(shared)
        for n in FACTORS:
            peers_KE = round_info.received[f"peers.{n}"]
            mean = torch.einsum("ke,ke...->k...", weights_KE, peers_KE)
            some_K = weights_KE.sum(-1) > 0
            # P_d <- (1 - beta) P_d + beta * sum_j w_j P_d^j; without a qualified peer the mean is
            # zero, and blending it in would shrink P_d.
            blend = (1 - self.cfg.beta) * current[n] + self.cfg.beta * mean
            mixed[n] = local_copy.where(some_K, blend, current[n])
        return mixed, local_copy.for_training(private)

    @torch.no_grad()
    def peer_weights(self, current: Tensors, private: Tensors, round_info: RoundInfo) -> Tensor:
        """Weights w_j of the peers' data prompts.

        Args:
            current: the client's model, P_t and P_d, (K, ...).
            private: the stored private tensors with the validation images, (K, ...).
            round_info: the round; `received` holds the peers' data prompts.

        Returns:
            Weights (K, E); rows sum to 1, or to 0 if no peer qualifies.
        """
        # A client compares only if it has images to judge with and a P_d of its own.
        able_K1 = (private["val.mask"].sum(-1, keepdim=True) > 0) & (private[local_copy.VALID] > 0)
        known_KE = (round_info.received["peers.known"] > 0) & able_K1
        losses_KE = torch.zeros(known_KE.shape, device=known_KE.device)
        judges = known_KE.any(-1).nonzero().flatten()
        if not len(judges):
            return losses_KE
        # All P_d are judged under the same P_t, which the server usually sends to all clients: each
        # distinct one is encoded once.
        distinct, which_K = torch.unique(current["text"], dim=0, return_inverse=True)
        classes_KCD = self.text.classes(distinct)[which_K]

        def judge(factors: Tensors, clients: Tensor) -> Tensor:
            rows = {n: t[clients] for n, t in {"text": current["text"], **factors}.items()}
            encoded = {"classes": classes_KCD[clients], "visual": visual_prompts(rows, rows)}
            return self._loss(encoded, {n: t[clients] for n, t in private.items()})

        own_K = losses_KE.new_zeros(len(known_KE))
        own_K[judges] = judge({n: current[n] for n in FACTORS}, judges)
        peers = {n: round_info.received[f"peers.{n}"] for n in FACTORS}
        for e in range(self.cfg.peers):
            clients = known_KE[:, e].nonzero().flatten()
            if len(clients):
                losses_KE[clients, e] = judge({n: t[:, e] for n, t in peers.items()}, clients)
        # "Retained" peers: l_j < alpha * l.
        qualified = known_KE & (losses_KE < self.cfg.alpha * own_K[:, None])
        # w_j ~ 1 / l_j; the clamps prevent a division by zero for a perfect peer or an empty row.
        inverse_KE = torch.where(qualified, 1 / losses_KE.clamp(min=1e-8), 0.0)
        return inverse_KE / inverse_KE.sum(-1, keepdim=True).clamp(min=1e-30)

    def _loss(self, encoded: Tensors, private: Tensors) -> Tensor:
        """Mean cross-entropy (K,) of encoded models on the clients' validation images."""
        pixels_KV = private["val.pixels"]
        # The image tower reads the pixels; the cached features are not used, so zeros fill in.
        inputs = Inputs(
            pixels_KV.new_zeros(*pixels_KV.shape[:2], self.clip.embed_dim), None, pixels_KV
        )
        logits_KVC = self.logits(encoded, inputs)
        # Labels are stored as floats, like all tensors of a method.
        labels_KV = private["val.labels"].long()
        loss = F.cross_entropy(logits_KVC.flatten(0, 1), labels_KV.flatten(), reduction="none")
        return masked_mean(loss.view_as(labels_KV), private["val.mask"])

    def end_round(
        self, shared: Tensors, private: Tensors, round_info: RoundInfo
    ) -> tuple[Tensors, Tensors]:
        """P_t and P_d are uploaded; P_d is also stored."""
        return shared, local_copy.after_training(private, shared)

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """`classes` (K, C, D) and `visual` (K, 1, M, w), by the client's own P_d if it has one."""
        return super().encode(
            shared if private is None else local_copy.model(shared, private), None
        )
