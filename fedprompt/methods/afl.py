"""AFL: ridge regression on frozen image features, in closed form and in one round.

Source: AFL: A Single-Round Analytic Approach for Federated Learning with Pre-trained Models (He,
Tong, Fang, Sun, Zeng, Li, Chen, Zhuang, CVPR 2025, arXiv 2405.16240; public code:
ZHUANGHP/Analytic-federated-learning). Read in the code: client k computes C_k = X_k^T X_k + gamma I
and W_k = C_k^-1 X_k^T Y_k in double precision, Y one-hot; the server merges the W_k pairwise by
absolute aggregation, and takes the K gamma I out in the end.

Equations: with N images of all clients, of which n_k are client k's, the client uploads means

    G_k = X_k^T X_k / n_k      B_k = Y_k^T X_k / n_k

the server averages them by images, and whoever needs the classifier solves

    W = B (G + ridge I)^-1     G = sum_k (n_k / N) G_k     B = sum_k (n_k / N) B_k

which is ridge regression on the images of all clients together, with a penalty of ridge N, whatever
the partition, the number of clients and their order.

What is shared: G as its upper triangle and B, each as a float32 tensor and what that leaves of
float64 (`parts/float_pairs.py`); together as many bytes as float64 has. What is kept: nothing, or
with `personal` the client's own G_k and B_k.

How we differ, and why [I]: sums instead of the pairwise merge, which gives the same W up to
rounding and needs neither an inverse per client nor the removal of gamma; only the sums reach the
server, so secure aggregation hides single clients. Means instead of sums, because every strategy
that averages by images then gives the right result, and because the Frobenius norms of G_k and B_k
are at most 1 whatever n_k is: clipping at sqrt(2) changes nothing, and noise has a known scale. The
public code solves without a penalty in the end, which needs more images than feature dimensions;
ours is `ridge`, and the limit of small values is theirs. `personal` = mu is ours as well: client k
solves with mu G_k + (1 - mu) G and mu B_k + (1 - mu) B. Features are L2-normalised and logits are
multiplied by CLIP's scale, which changes no prediction.

Nothing is trained, so a run takes one round: `federation.rounds=1 federation.fraction=1`. Every
round is computed anew from its participants; with a fraction, the last round's participants are all
that counts. B holds the sum of the features of each class, and G all second moments: with few
images this reveals more than a prompt does, and a single client's upload should be masked (secure
aggregation) or noisy.

Noise, of three kinds. `privacy.image_noise` protects each image: a client adds noise to G_k and B_k
before it sends them (`noisy_from_data`), which is the smaller the more images it has. Noise that
hides a client as a whole (`privacy.noise`, or strategy dp_fedavg) needs many clients, and clients
count the same whatever their images; `precision=single` then saves half of the upload, and keeps
noise off the remainders. In each case G may have negative eigenvalues, which are set to 0 before
the solution, and `ridge` has to be the larger the stronger the noise is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.fields import option
from fedprompt.config.search import log_range
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import ClientData, Method, MethodConfig, Task, Tensors
from fedprompt.methods.parts.float_pairs import joined, split
from fedprompt.methods.parts.losses import cosine_logits
from fedprompt.methods.parts.moments import moments, nonnegative, symmetric

GRAM, TARGETS = "gram", "targets"


@dataclass(frozen=True)
class AFLConfig(MethodConfig):
    """`ridge` is ours: the paper has no penalty in the end."""

    supports_image_noise = True
    lr_space = None
    reveals_classes = True

    ridge: float = option(
        1e-3, "penalty, per training image of all clients", gt=0, search=log_range(1e-6, 1)
    )
    personal: float = option(
        0.0, "mu: share of a client's own images in its personal model", ge=0, lt=1
    )
    precision: Literal["double", "single"] = option(
        "double", "double also sends what float32 leaves of float64"
    )

    @property
    def default_strategy(self) -> Mapping[str, Any]:
        """FedAvg, in double precision where the tensors are."""
        return {"name": "fedavg" if self.precision == "single" else "exact_mean"}


class AFL(Method):
    """`gram` (D (D + 1) / 2,) and `targets` (C, D) are shared, and what float32 leaves of them."""

    name = "afl"
    source = "He et al., CVPR 2025"
    Config = AFLConfig
    no_transfer_reason = "the classifier has a row for each class of the training images"

    def __init__(self, config: AFLConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config
        self.frozen = frozenset(f"shared.{n}" for n in self.init_shared(0)) | frozenset(
            f"private.{n}" for n in self.init_private(0, 0)
        )

    def init_shared(self, seed: int) -> Tensors:
        """Zeros: without an image, every class has the logit 0."""
        width = self.clip.embed_dim
        return self._sent(
            torch.zeros(width * (width + 1) // 2), torch.zeros(len(self.task.class_names), width)
        )

    def init_private(self, seed: int, client: int) -> Tensors:
        """The same tensors again, where a client has a model of its own."""
        shared = self.init_shared(seed) if self.cfg.personal else {}
        return {f"own.{n}": t for n, t in shared.items()}

    def init_private_from_data(self, private: Tensors, data: ClientData, seed: int) -> Tensors:
        """The client's own moments."""
        own = self.shared_from_data(data) if private else {}
        return {f"own.{n}": t for n, t in own.items()}

    def shared_from_data(self, data: ClientData) -> Tensors:
        """G_k and B_k of the client's images in all their views."""
        own = moments(data, len(self.task.class_names))
        return self._sent(own.gram_T, own.targets_CD)

    def noisy_from_data(
        self, data: ClientData, noise: Callable[[tuple[int, ...]], Tensor]
    ) -> Tensors:
        """G_k and B_k with noise; one image x changes the pair by sqrt(2) / n_k.

        The Frobenius norms of x x^T and y x^T are 1. That of a symmetric matrix counts what is
        above its diagonal twice, and so it needs less noise there, by the root of 2.
        """
        own = moments(data, len(self.task.class_names))
        sensitivity = math.sqrt(2) / len(data)
        gram_noise_T = noise(tuple(own.gram_T.shape))
        rows, columns = torch.triu_indices(*2 * [own.targets_CD.shape[1]])
        gram_noise_T = torch.where(rows == columns, gram_noise_T, gram_noise_T / math.sqrt(2))
        return self._sent(
            own.gram_T + sensitivity * gram_noise_T,
            own.targets_CD + sensitivity * noise(tuple(own.targets_CD.shape)),
        )

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """The classifier W (K, C, D), solved in float64 on the CPU."""
        gram_KT, targets_KCD = (joined(shared, n) for n in (GRAM, TARGETS))
        if private:
            mu = self.cfg.personal
            gram_KT = mu * joined(private, f"own.{GRAM}") + (1 - mu) * gram_KT
            targets_KCD = mu * joined(private, f"own.{TARGETS}") + (1 - mu) * targets_KCD
        solved_KCD = torch.stack(
            [
                ridge_solution(gram_T, targets_CD, self.cfg.ridge)
                for gram_T, targets_CD in zip(gram_KT, targets_KCD, strict=True)
            ]
        )
        return {"classes": solved_KCD.float().to(self.clip.device)}

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """CLIP's scale times v . w_c, (K, B, C)."""
        return cosine_logits(self.clip, inputs.features, encoded["classes"])

    def _sent(self, gram_T: Tensor, targets_CD: Tensor) -> Tensors:
        double = self.cfg.precision == "double"
        return split(GRAM, gram_T, rest=double) | split(TARGETS, targets_CD, rest=double)


def ridge_solution(gram_T: Tensor, targets_CD: Tensor, ridge: float) -> Tensor:
    """W = B (G + ridge I)^-1 for one model, float64.

    Args:
        gram_T: the upper triangle of G, row by row, (D (D + 1) / 2,), float64.
        targets_CD: B, float64.
        ridge: the penalty, above 0.

    Returns:
        W (C, D).
    """
    gram_DD = nonnegative(symmetric(gram_T, targets_CD.shape[1]), ridge / 2)
    identity_DD = torch.eye(len(gram_DD), dtype=gram_DD.dtype)
    factor_DD = torch.linalg.cholesky(gram_DD + ridge * identity_DD)
    return torch.cholesky_solve(targets_CD.T, factor_DD).T
