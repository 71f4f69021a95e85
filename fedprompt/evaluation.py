"""Accuracy of global and personal models on cached features.

Shape suffixes: K clients, B images, D joint embedding, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.methods.base import Method, Tensors, stack

IMAGES_AT_ONCE = 4096


@dataclass(frozen=True)
class Score:
    """Counts on a test set, so that scores add up exactly."""

    correct: int
    tested: int
    loss_sum: float

    @property
    def accuracy(self) -> float | None:
        """Share of correct predictions, or None without test images."""
        return self.correct / self.tested if self.tested else None


@dataclass(frozen=True)
class Personal:
    """Accuracy over clients with test images (fractions). `std` is the population's (divide by n).

    `worst` is the lowest client, `p10` the 10th percentile (linear interpolation), `accuracy` the
    list by client, None where a client has no test images.
    """

    mean: float
    std: float
    worst: float
    p10: float
    clients_tested: int
    accuracy: list[float | None]

    def to_json(self) -> dict[str, object]:
        """Plain values for a metrics line."""
        return asdict(self)


def personal_statistics(accuracy: Sequence[float | None]) -> Personal | None:
    """Statistics over the clients that have test images; None when none has."""
    known = np.array([a for a in accuracy if a is not None], dtype=np.float64)
    if known.size == 0:
        return None
    return Personal(
        mean=float(known.mean()),
        std=float(known.std()),
        worst=float(known.min()),
        p10=float(np.percentile(known, 10)),
        clients_tested=int(known.size),
        accuracy=list(accuracy),
    )


@torch.no_grad()
def score_global(
    method: Method, shared: Tensors, features_ND: Tensor, labels_N: Tensor
) -> Score | None:
    """The shared prompts alone on a test set; None for methods without a global model."""
    if not method.has_global:
        return None
    device = method.clip.device
    encoded = method.encode({n: v[None].to(device) for n, v in shared.items()}, None)
    return _score(method, encoded, features_ND, labels_N)[0]


@torch.no_grad()
def score_personal(
    method: Method,
    shared: Sequence[Tensors],
    private: Sequence[Tensors],
    tests: Sequence[tuple[Tensor, Tensor]],
    common: tuple[Tensor, Tensor] | None = None,
) -> tuple[list[Score], list[Score] | None]:
    """Each client's shared + private prompts on its own test images, and on a common test set.

    Args:
        method: the method.
        shared: per client, without a client axis.
        private: per client, without a client axis.
        tests: per client, L2-normalised features (n, D) and labels (n,); n may be 0.
        common: optional features and labels that every client's model is tested on.

    Returns:
        Scores by client on their own images, and on the common ones (None without them). The
        prompts of all clients are encoded once.
    """
    device = method.clip.device
    encoded = method.encode(stack(list(shared), device), stack(list(private), device))
    own = []
    for k, (features_ND, labels_N) in enumerate(tests):
        one = {n: v[k : k + 1] if v.shape[0] > 1 else v for n, v in encoded.items()}
        own.append(_score(method, one, features_ND, labels_N)[0])
    if common is None:
        return own, None
    everyone = _score(method, encoded, *common)
    return own, everyone if len(everyone) == len(tests) else everyone * len(tests)


def _score(method: Method, encoded: Tensors, features_ND: Tensor, labels_N: Tensor) -> list[Score]:
    """Scores of K encoded models on one test set, a bounded number of logits at a time."""
    clients = max(v.shape[0] for v in encoded.values())
    device = method.clip.device
    correct_K = torch.zeros(clients, dtype=torch.int64, device=device)
    loss_K = torch.zeros(clients, dtype=torch.float64, device=device)
    at_once = max(1, IMAGES_AT_ONCE // clients)
    for first in range(0, len(labels_N), at_once):
        labels_B = labels_N[first : first + at_once].to(device)
        features_1BD = features_ND[first : first + at_once].to(device)[None]
        logits_KBC = method.logits(encoded, features_1BD).float()
        targets_KB = labels_B.expand(logits_KBC.shape[:2])
        correct_K += (logits_KBC.argmax(-1) == targets_KB).sum(-1)
        losses = F.cross_entropy(logits_KBC.flatten(0, 1), targets_KB.flatten(), reduction="none")
        loss_K += losses.view(logits_KBC.shape[:2]).double().sum(-1)
    counts, sums = correct_K.tolist(), loss_K.tolist()
    return [
        Score(int(c), len(labels_N), float(s) if math.isfinite(s) else math.inf)
        for c, s in zip(counts, sums, strict=True)
    ]
