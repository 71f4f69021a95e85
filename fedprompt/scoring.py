"""Accuracy of global and personal models.

Shape suffixes: K clients, B images, N images of a test set, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import Method, Tensors, stack


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
    list that all of these are made from, in the order given.
    """

    mean: float
    std: float
    worst: float
    p10: float
    clients_tested: int
    accuracy: list[float]

    def to_json(self) -> dict[str, object]:
        """Plain values for a metrics line."""
        return asdict(self)


def personal_statistics(accuracy: Sequence[float]) -> Personal | None:
    """Statistics over clients that have test images, each counted once; None without any."""
    known = np.array(accuracy, dtype=np.float64)
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
    method: Method, shared: Tensors, inputs_N: Inputs, labels_N: Tensor
) -> Score | None:
    """The shared prompts alone on a test set; None for methods without a global model."""
    if not method.has_global:
        return None
    return _score(method, encode_global(method, shared), inputs_N, labels_N)[0]


@torch.no_grad()
def encode_global(method: Method, shared: Tensors) -> Tensors:
    """The encoded model of the shared prompts alone, client axis 1; the method has a global one."""
    device = method.clip.device
    return method.encode({n: v[None].to(device) for n, v in shared.items()}, None)


@torch.no_grad()
def encode_personal(
    method: Method, shared: Sequence[Tensors], private: Sequence[Tensors]
) -> Tensors:
    """The encoded models of K clients; client axis 1 where all of them have the same model.

    Shared prompts that are the same for all clients are encoded once for all.
    """
    device, models = method.clip.device, list(shared)
    if all(_equal(other, models[0]) for other in models[1:]):
        models = models[:1]
    return method.encode(stack(models, device), stack(list(private), device))


def model_of(encoded: Tensors, client: int) -> Tensors:
    """One of K encoded models, client axis 1; what all clients have in common stays as it is."""
    return {n: v if v.shape[0] == 1 else v[client : client + 1] for n, v in encoded.items()}


@torch.no_grad()
def score_models(
    method: Method, encoded: Tensors, clients: int, inputs_N: Inputs, labels_N: Tensor
) -> list[Score]:
    """Scores of the encoded models of `clients` clients on one common test set."""
    scores = _score(method, encoded, inputs_N, labels_N)
    return scores if len(scores) == clients else scores * clients


@torch.no_grad()
def logits_of(method: Method, encoded: Tensors, inputs_N: Inputs) -> Iterator[Tensor]:
    """Logits (B, C) of one encoded model, float32 on the CPU, a bounded number of images a time."""
    at_once = _at_once(method)
    for first in range(0, len(inputs_N), at_once):
        some = inputs_N[first : first + at_once].of_one().on(method.clip.device)
        yield method.logits(encoded, some)[0].float().cpu()


@torch.no_grad()
def score_personal(
    method: Method,
    shared: Sequence[Tensors],
    private: Sequence[Tensors],
    tests: Sequence[tuple[Inputs, Tensor]],
    common: tuple[Inputs, Tensor] | None = None,
) -> tuple[list[Score], list[Score] | None]:
    """Each client's shared + private prompts on its own test images, and on a common test set.

    Args:
        method: the method.
        shared: per client, without a client axis.
        private: per client, without a client axis.
        tests: per client, images (n, ...) and labels (n,); n may be 0.
        common: optional images and labels that every client's model is tested on.

    Returns:
        Scores by client on their own images, and on the common ones (None without them). Prompts
        are encoded once, and shared ones that are the same for all clients once for all.
    """
    encoded = encode_personal(method, shared, private)
    own = _score_each(method, encoded, tests)
    return own, None if common is None else score_models(method, encoded, len(tests), *common)


def _equal(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[n]) for n, t in a.items())


def _score(method: Method, encoded: Tensors, inputs_N: Inputs, labels_N: Tensor) -> list[Score]:
    """Scores of K encoded models on one test set, a bounded number of logits at a time."""
    clients = max(v.shape[0] for v in encoded.values())
    correct_K = np.zeros(clients, dtype=np.int64)
    loss_K = np.zeros(clients)
    at_once = max(1, _at_once(method) // clients)
    for first in range(0, len(labels_N), at_once):
        part = slice(first, first + at_once)
        hits_KB, losses_KB = _outcomes(
            method, encoded, inputs_N[part].of_one(), labels_N[part][None]
        )
        correct_K += hits_KB.sum(-1)
        loss_K += losses_KB.sum(-1)
    return [_as_score(c, len(labels_N), s) for c, s in zip(correct_K, loss_K, strict=True)]


def _score_each(
    method: Method, encoded: Tensors, tests: Sequence[tuple[Inputs, Tensor]]
) -> list[Score]:
    """Scores of every client's model on that client's own test set, as few products as pay."""
    if all(v.shape[0] == 1 for v in encoded.values()):
        return _score_one_model(method, encoded, tests)
    scores = [Score(0, 0, 0.0)] * len(tests)
    for clients in _similar_sizes([len(labels) for _, labels in tests], _at_once(method)):
        rows = torch.tensor(clients)
        chosen = {n: v if v.shape[0] == 1 else v[rows] for n, v in encoded.items()}
        inputs_KB = Inputs.padded([tests[k][0] for k in clients])
        labels_KB = pad_sequence([tests[k][1] for k in clients], batch_first=True)
        hits_KB, losses_KB = _in_parts(method, chosen, inputs_KB, labels_KB)
        for row, k in enumerate(clients):
            n = len(tests[k][1])
            scores[k] = _as_score(hits_KB[row, :n].sum(), n, losses_KB[row, :n].sum())
    return scores


def _score_one_model(
    method: Method, encoded: Tensors, tests: Sequence[tuple[Inputs, Tensor]]
) -> list[Score]:
    """Scores of one and the same model on every client's test set: one product over all images."""
    sizes = [len(labels) for _, labels in tests]
    inputs_N = Inputs.cat([inputs for inputs, _ in tests])
    labels_N = torch.cat([labels for _, labels in tests])
    hits, losses = [np.zeros(0, dtype=bool)], [np.zeros(0)]
    at_once = _at_once(method)
    for first in range(0, len(labels_N), at_once):
        part = slice(first, first + at_once)
        hits_1B, losses_1B = _outcomes(
            method, encoded, inputs_N[part].of_one(), labels_N[part][None]
        )
        hits.append(hits_1B[0])
        losses.append(losses_1B[0])
    ends = np.cumsum(sizes)[:-1]
    by_client = zip(
        np.split(np.concatenate(hits), ends), np.split(np.concatenate(losses), ends), strict=True
    )
    return [_as_score(h.sum(), len(h), s.sum()) for h, s in by_client]


def _at_once(method: Method) -> int:
    """Images whose logits are computed at once; pixels take the room of a batch of features."""
    bound = method.clip.image_batch if "pixels" in method.needs else method.images_at_once
    return min(bound, method.images_at_once)


def _similar_sizes(sizes: Sequence[int], at_once: int) -> list[list[int]]:
    """Clients with test images in groups that padding to one length at most doubles."""
    order = sorted((k for k, n in enumerate(sizes) if n), key=lambda k: (-sizes[k], k))
    groups: list[list[int]] = []
    for k in order:
        longest = sizes[groups[-1][0]] if groups else 0
        fits = groups and (len(groups[-1]) + 1) * longest <= max(at_once, longest)
        if fits and 2 * sizes[k] >= longest:
            groups[-1].append(k)
        else:
            groups.append([k])
    return groups


def _in_parts(
    method: Method, encoded: Tensors, inputs_KB: Inputs, labels_KB: Tensor
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """`_outcomes`, a bounded number of each client's images at a time."""
    at_once = max(1, _at_once(method) // len(inputs_KB))
    parts = [
        _outcomes(
            method,
            encoded,
            inputs_KB[:, first : first + at_once],
            labels_KB[:, first : first + at_once],
        )
        for first in range(0, labels_KB.shape[1], at_once)
    ]
    hits, losses = zip(*parts, strict=True)
    return np.concatenate(hits, axis=1), np.concatenate(losses, axis=1)


def _outcomes(
    method: Method, encoded: Tensors, inputs_KB: Inputs, labels_KB: Tensor
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Whether each image is classified correctly, and its cross-entropy: both (K, B)."""
    device = method.clip.device
    logits_KBC = method.logits(encoded, inputs_KB.on(device)).float()
    targets_KB = labels_KB.to(device).expand(logits_KBC.shape[:2])
    hits_KB = logits_KBC.argmax(-1) == targets_KB
    losses = F.cross_entropy(logits_KBC.flatten(0, 1), targets_KB.flatten(), reduction="none")
    return hits_KB.cpu().numpy(), losses.view_as(hits_KB).double().cpu().numpy()


def _as_score(correct: np.integer[Any], tested: int, loss_sum: np.floating[Any]) -> Score:
    loss = float(loss_sum)
    return Score(int(correct), tested, loss if math.isfinite(loss) else math.inf)
