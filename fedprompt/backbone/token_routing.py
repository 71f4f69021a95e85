"""Routing of an image's tokens to experts, without parameters: the share of tokens of each expert.

Source: Token-Level Prompt Mixture with Parameter-Free Routing for Federated Domain Generalization
(TRIP; Gong et al., 2025, arXiv 2504.21063); code GongShuai8210/TRIP, whose
`generate_weights_multi.py` is followed. It reads the frozen image tower alone, so that an image is
routed once, into the feature cache, before the first round:

1. The tokens of the last layer, the class token among them and before `ln_post`, are clustered by
   k-means with limited capacities. A token wants the cluster with the smallest distance plus price;
   the nearest ones are admitted until the cluster is full, and the others belong to no cluster. A
   price rises by 0.0001 per token above the capacity, and falls below it.
2. Clusters are matched one-to-one with fixed orthogonal keys, one per expert, so that the sum of
   cosines between centroids and keys is largest.
3. An expert's weight is its cluster's share of the tokens that belong to a cluster.

How we differ: the first centroids are the same positions in every image, drawn once, where the code
draws other ones for each; so a row depends on the image's content alone. We compute in float32
where the code computes in half precision, and for all images of a batch at once. With more experts
than tokens, the experts that match no cluster have the weight zero.

Shape suffixes: B images, P tokens, W tower width, Q clusters, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.patch_features import is_plain
from fedprompt.rng import generator, normal

PASSES, STEP, TOLERANCE = 100, 1e-4, 1e-4
"""Passes of k-means at most, change of a price per token, and the mean shift that ends it."""
RoutingEncoder = Callable[[Tensor], Tensor]
"""From preprocessed images (B, 3, H, W) to weights (B, 2, E) in training and in tests, on the CPU.
"""


@dataclass(frozen=True)
class TokenRouting:
    """The numbers of a routing.

    Attributes:
        experts: E.
        capacity: room of a cluster in training, in equal shares of the tokens.
        test_capacity: the same in tests.
    """

    experts: int
    capacity: float
    test_capacity: float

    @property
    def view(self) -> str:
        """A name that contains every number."""
        return f"routing{self.experts}-{self.capacity:g}-{self.test_capacity:g}"


def routing_encoder(clip: FrozenCLIP, routing: TokenRouting) -> RoutingEncoder | None:
    """Return an encoder of images into the weights of experts.

    The result is None if the image tower is not open_clip's plain vision transformer.
    """
    visual: Any = clip.model.visual
    if not (isinstance(visual, VisionTransformer) and is_plain(visual)):
        return None
    positions, width = visual.positional_embedding.shape
    keys_EW = orthogonal_keys(routing.experts, width).to(clip.device)
    order = generator(0, "token routing", "start").permutation(positions)
    start_Q = torch.from_numpy(order[: routing.experts]).to(clip.device)

    @torch.no_grad()
    def encode(images_B3HW: Tensor) -> Tensor:
        with clip.autocast():
            tokens_BPW = visual.transformer(visual._embeds(images_B3HW.to(clip.device)))
        tokens_BPW = tokens_BPW.float()
        weights = [
            expert_weights(*clusters(tokens_BPW, start_Q, capacity), keys_EW)
            for capacity in (routing.capacity, routing.test_capacity)
        ]
        return torch.stack(weights, dim=1).cpu()

    return encode


def orthogonal_keys(experts: int, width: int) -> Tensor:
    """The fixed keys (E, W), orthonormal rows, or orthonormal columns if E is more than W."""
    tall = normal((max(experts, width), min(experts, width)), 1.0, 0, "token routing", "keys")
    q, _ = torch.linalg.qr(tall)
    keys_EW: Tensor = q.T if experts < width else q
    return keys_EW.contiguous()


def clusters(tokens_BPW: Tensor, start_Q: Tensor, capacity: float) -> tuple[Tensor, Tensor]:
    """Cluster the tokens of each image by k-means with limited capacities.

    Args:
        tokens_BPW: the tokens.
        start_Q: positions of the tokens that are the first centroids; at most P.
        capacity: the room of a cluster, in equal shares of the tokens.

    Returns:
        Centroids (B, Q, W) and how many tokens belong to each cluster (B, Q).
    """
    tokens, count = tokens_BPW.shape[1], len(start_Q)
    room_Q = torch.full((count,), int(tokens // count * capacity), device=tokens_BPW.device)
    room_Q[: tokens % count] += 1
    centroids_BQW = tokens_BPW[:, start_Q]
    price_BQ = tokens_BPW.new_zeros(len(tokens_BPW), count)
    sizes_BQ = price_BQ
    moving_B = torch.ones(len(tokens_BPW), dtype=torch.bool, device=tokens_BPW.device)
    for _ in range(PASSES):
        distance_BPQ = torch.cdist(tokens_BPW, centroids_BQW)
        taken_BPQ = _admitted(distance_BPQ + price_BQ[:, None], room_Q).to(tokens_BPW.dtype)
        found_BQ = taken_BPQ.sum(1)
        sizes_BQ = torch.where(moving_B[:, None], found_BQ, sizes_BQ)
        means_BQW = taken_BPQ.transpose(1, 2) @ tokens_BPW / found_BQ.clamp(min=1)[..., None]
        # An empty cluster begins again at the token that is farthest from all centroids.
        farthest_B = distance_BPQ.amin(-1).argmax(-1)
        lonely_BW = tokens_BPW[torch.arange(len(tokens_BPW), device=farthest_B.device), farthest_B]
        empty_BQ = found_BQ == 0
        new_BQW = torch.where(empty_BQ[..., None], lonely_BW[:, None], means_BQW)
        price_BQ = torch.where(empty_BQ, 0, price_BQ + STEP * (found_BQ - room_Q))
        # An image that has come to rest keeps the centroids that its tokens were assigned to.
        shift_B = (new_BQW - centroids_BQW).norm(dim=-1).mean(-1)
        moving_B = moving_B & (shift_B >= TOLERANCE)
        if not bool(moving_B.any()):
            break
        centroids_BQW = torch.where(moving_B[:, None, None], new_BQW, centroids_BQW)
    return centroids_BQW, sizes_BQ


def expert_weights(centroids_BQW: Tensor, sizes_BQ: Tensor, keys_EW: Tensor) -> Tensor:
    """Each expert's share of the tokens (B, E), by the best one-to-one match of the clusters."""
    # Third party, and slow to import where nothing is routed.
    from scipy.optimize import linear_sum_assignment

    similar_BQE = F.normalize(centroids_BQW, dim=-1) @ F.normalize(keys_EW, dim=-1).T
    share_BQ = sizes_BQ / sizes_BQ.sum(-1, keepdim=True)
    weights_BE = share_BQ.new_zeros(len(share_BQ), len(keys_EW))
    for b, similar_QE in enumerate(similar_BQE.cpu().numpy()):
        cluster, expert = linear_sum_assignment(similar_QE, maximize=True)
        weights_BE[b, expert] = share_BQ[b, cluster]
    return weights_BE


def _admitted(cost_BPQ: Tensor, room_Q: Tensor) -> Tensor:
    """Which token belongs to which cluster: the cheapest that want it, as far as there is room."""
    cost_BP, wanted_BP = cost_BPQ.min(-1)
    order_BP = cost_BP.argsort(dim=-1, stable=True)
    wants_BPQ = F.one_hot(wanted_BP.gather(1, order_BP), len(room_Q))
    admitted_BPQ = (wants_BPQ > 0) & (wants_BPQ.cumsum(1) <= room_Q)
    back = order_BP[..., None].expand_as(admitted_BPQ)
    return torch.zeros_like(admitted_BPQ).scatter(1, back, admitted_BPQ)
