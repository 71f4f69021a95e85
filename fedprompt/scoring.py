"""Accuracy and loss of global and personal models.

The server scores the global model here, and the clients' side scores personal models in blocks of K
clients. Scoring has two steps: a method's `encode` runs the class prompts through the text tower
once per model, then `logits` is called for batches of images of bounded size.

Shape suffixes: K clients, B images of a batch, N images of a test set, C classes.
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
from fedprompt.statistics import sample_std


@dataclass(frozen=True)
class Score:
    """The result of a model on a test set.

    Counts are stored instead of an accuracy because counts can be added without rounding.

    Attributes:
        correct: number of correctly classified images.
        tested: number of images.
        loss_sum: sum of their cross-entropies; infinity if it is not finite.
        unanswered: number of images for which the model's best logit is not finite, as from prompts
            that have diverged. They count as wrong; by `argmax`, each would be of class 0.
    """

    correct: int
    tested: int
    loss_sum: float
    unanswered: int = 0

    @property
    def accuracy(self) -> float | None:
        """Fraction of correct predictions, or None if there are no test images."""
        return self.correct / self.tested if self.tested else None


@dataclass(frozen=True)
class Personal:
    """Statistics of personal accuracies, as fractions.

    Every client with test images counts once, however many images it has.

    Attributes:
        mean: mean over clients.
        std: sample standard deviation over clients, None for a single client.
        worst: the lowest accuracy.
        p10: the 10th percentile, linearly interpolated.
        clients_tested: number of clients with test images.
        accuracy: the accuracies, in the order given.
    """

    mean: float
    std: float | None
    worst: float
    p10: float
    clients_tested: int
    accuracy: list[float]

    def to_json(self) -> dict[str, object]:
        """Plain values for a metrics line."""
        return asdict(self)


def personal_statistics(accuracy: Sequence[float]) -> Personal | None:
    """Compute statistics over clients; None if no client has test images.

    Args:
        accuracy: one accuracy per client with test images, as fractions.
    """
    known = np.array(accuracy, dtype=np.float64)
    if known.size == 0:
        return None
    return Personal(
        mean=float(known.mean()),
        std=sample_std(accuracy),
        worst=float(known.min()),
        p10=float(np.percentile(known, 10)),
        clients_tested=int(known.size),
        accuracy=list(accuracy),
    )


@torch.no_grad()
def score_global(
    method: Method, shared: Tensors, inputs_N: Inputs, labels_N: Tensor
) -> Score | None:
    """Score the shared prompts alone on a test set.

    Args:
        method: the method, for the class names of the test set.
        shared: shared tensors, without a client axis.
        inputs_N: the test images (N, ...).
        labels_N: their class indices (N,).

    Returns:
        The score, or None if the method has no global model.
    """
    if not method.has_global:
        return None
    return _score(method, encode_global(method, shared), inputs_N, labels_N)[0]


@torch.no_grad()
def encode_global(method: Method, shared: Tensors) -> Tensors:
    """Encode the shared prompts alone, as a model with client axis 1.

    Args:
        method: a method that has a global model.
        shared: shared tensors, without a client axis.

    Returns:
        The result of `method.encode` (1, ...), on the device of the backbone.
    """
    device = method.clip.device
    return method.encode({n: v[None].to(device) for n, v in shared.items()}, None)


@torch.no_grad()
def encode_personal(
    method: Method, shared: Sequence[Tensors], private: Sequence[Tensors]
) -> Tensors:
    """Encode the models of K clients.

    Shared prompts that are equal on all clients are encoded only once, which saves K - 1 passes of
    the class prompts through the text tower for methods without private prompts.

    Args:
        method: the method.
        shared: per client, its shared tensors, without a client axis.
        private: per client, its private tensors, without a client axis.

    Returns:
        Encoded tensors with client axis K, or 1 where all clients have the same tensor.
    """
    # Clients receive equal tensors from most strategies. Comparing them costs far less than
    # encoding the class prompts K times.
    device, models = method.clip.device, list(shared)
    if all(_equal(other, models[0]) for other in models[1:]):
        models = models[:1]
    return method.encode(stack(models, device), stack(list(private), device))


def model_of(encoded: Tensors, client: int) -> Tensors:
    """Select one of K encoded models.

    Args:
        encoded: encoded models, with client axis K, or 1 where all clients have the same tensor.
        client: the position of the model, 0 .. K - 1.

    Returns:
        The model with client axis 1. Its tensors are views.
    """
    return {n: v if v.shape[0] == 1 else v[client : client + 1] for n, v in encoded.items()}


@torch.no_grad()
def score_models(
    method: Method, encoded: Tensors, clients: int, inputs_N: Inputs, labels_N: Tensor
) -> list[Score]:
    """Score encoded models on one common test set.

    Args:
        method: the method.
        encoded: encoded models, with client axis `clients` or 1.
        clients: number of clients K.
        inputs_N: the test images (N, ...).
        labels_N: their class indices (N,).

    Returns:
        One score per client.
    """
    # A single model for all clients is scored once, and its score is repeated.
    scores = _score(method, encoded, inputs_N, labels_N)
    return scores if len(scores) == clients else scores * clients


@torch.no_grad()
def score_each(
    method: Method, encoded: Tensors, tests: Sequence[tuple[Inputs, Tensor]]
) -> list[Score]:
    """Score every client's encoded model on that client's own images, in few batched products.

    Args:
        method: the method.
        encoded: encoded models, with client axis K or 1.
        tests: per client, images (n, ...) and labels (n,); n may be 0.

    Returns:
        One score per client.
    """
    if all(v.shape[0] == 1 for v in encoded.values()):
        return _score_one_model(method, encoded, tests)
    # Clients without test images are in no group and keep this score.
    scores = [Score(0, 0, 0.0)] * len(tests)
    for clients in _similar_sizes([len(labels) for _, labels in tests], _batch_size(method)):
        rows = torch.tensor(clients)
        models = {n: v if v.shape[0] == 1 else v[rows] for n, v in encoded.items()}
        inputs_KB = Inputs.padded([tests[k][0] for k in clients])
        labels_KB = pad_sequence([tests[k][1] for k in clients], batch_first=True)
        hits_KB, losses_KB = _in_parts(method, models, inputs_KB, labels_KB)
        for row, k in enumerate(clients):
            n = len(tests[k][1])
            # Rows from n on are padding.
            scores[k] = _as_score(hits_KB[row, :n], losses_KB[row, :n])
    return scores


@torch.no_grad()
def logits_of(method: Method, encoded: Tensors, inputs_N: Inputs) -> Iterator[Tensor]:
    """Compute the logits of one encoded model, batch by batch.

    Args:
        method: the method.
        encoded: one encoded model, with client axis 1.
        inputs_N: images (N, ...).

    Yields:
        Logits (B, C) of consecutive batches of bounded size, as float32 on the CPU.
    """
    batch_size = _batch_size(method)
    for first in range(0, len(inputs_N), batch_size):
        batch = inputs_N[first : first + batch_size].of_one().on(method.clip.device)
        yield method.logits(encoded, batch)[0].float().cpu()


@torch.no_grad()
def score_personal(
    method: Method,
    shared: Sequence[Tensors],
    private: Sequence[Tensors],
    tests: Sequence[tuple[Inputs, Tensor]],
    common: tuple[Inputs, Tensor] | None = None,
) -> tuple[list[Score], list[Score] | None]:
    """Score each client's shared and private prompts on its own test images.

    Args:
        method: the method.
        shared: per client, its shared tensors, without a client axis.
        private: per client, its private tensors, without a client axis.
        tests: per client, images (n, ...) and labels (n,); n may be 0.
        common: images (N, ...) and labels (N,) on which every client's model is tested as well, or
            None.

    Returns:
        One score per client on its own images, and one per client on the common images (None
        without `common`). Each model is encoded only once for both.
    """
    encoded = encode_personal(method, shared, private)
    on_tests = score_each(method, encoded, tests)
    return on_tests, None if common is None else score_models(method, encoded, len(tests), *common)


def _equal(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[n]) for n, t in a.items())


def _score(method: Method, encoded: Tensors, inputs_N: Inputs, labels_N: Tensor) -> list[Score]:
    """Scores of K encoded models on one test set, a bounded number of images at a time."""
    clients = max(v.shape[0] for v in encoded.values())
    correct_K, unanswered_K = np.zeros((2, clients), dtype=np.int64)
    loss_K = np.zeros(clients)
    # Every image is scored by all K models in one call, so K divides the batch.
    batch_size = max(1, _batch_size(method) // clients)
    for first in range(0, len(labels_N), batch_size):
        part = slice(first, first + batch_size)
        hits_KB, losses_KB = _outcomes(
            method, encoded, inputs_N[part].of_one(), labels_N[part][None]
        )
        correct_K += hits_KB.sum(-1)
        unanswered_K += np.isnan(losses_KB).sum(-1)
        loss_K += losses_KB.sum(-1)
    return [
        Score(int(correct), len(labels_N), _or_infinity(loss), int(unanswered))
        for correct, loss, unanswered in zip(correct_K, loss_K, unanswered_K, strict=True)
    ]


def _score_one_model(
    method: Method, encoded: Tensors, tests: Sequence[tuple[Inputs, Tensor]]
) -> list[Score]:
    """Scores of one common model on every client's test set.

    The images of all clients are concatenated, so nothing is padded, and the outcomes are split
    among the clients again.
    """
    sizes = [len(labels) for _, labels in tests]
    inputs_N = Inputs.cat([inputs for inputs, _ in tests])
    labels_N = torch.cat([labels for _, labels in tests])
    # `np.concatenate` needs at least one array, and no client may have test images.
    hits, losses = [np.zeros(0, dtype=bool)], [np.zeros(0)]
    batch_size = _batch_size(method)
    for first in range(0, len(labels_N), batch_size):
        part = slice(first, first + batch_size)
        hits_1B, losses_1B = _outcomes(
            method, encoded, inputs_N[part].of_one(), labels_N[part][None]
        )
        hits.append(hits_1B[0])
        losses.append(losses_1B[0])
    ends = np.cumsum(sizes)[:-1]
    by_client = zip(
        np.split(np.concatenate(hits), ends), np.split(np.concatenate(losses), ends), strict=True
    )
    return [_as_score(h, s) for h, s in by_client]


def _batch_size(method: Method) -> int:
    """The largest number of images in one call of `logits`.

    For methods that read pixels, `logits` runs the image tower, whose activations need far more
    memory per image than a product with class features; `image_batch` bounds that.
    """
    bound = method.clip.image_batch if "pixels" in method.needs else method.images_at_once
    return min(bound, method.images_at_once)


def _similar_sizes(sizes: Sequence[int], batch_size: int) -> list[list[int]]:
    """Group clients by number of test images, so that padding at most doubles a group.

    Clients without test images are in no group.
    """
    order = sorted((k for k, n in enumerate(sizes) if n), key=lambda k: (-sizes[k], k))
    groups: list[list[int]] = []
    for k in order:
        longest = sizes[groups[-1][0]] if groups else 0
        # A client with more images than a batch still gets a group; `_in_parts` splits it.
        fits = groups and (len(groups[-1]) + 1) * longest <= max(batch_size, longest)
        if fits and 2 * sizes[k] >= longest:
            groups[-1].append(k)
        else:
            groups.append([k])
    return groups


def _in_parts(
    method: Method, encoded: Tensors, inputs_KB: Inputs, labels_KB: Tensor
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Call `_outcomes` for batches of bounded size along the image axis."""
    batch_size = max(1, _batch_size(method) // len(inputs_KB))
    parts = [
        _outcomes(
            method,
            encoded,
            inputs_KB[:, first : first + batch_size],
            labels_KB[:, first : first + batch_size],
        )
        for first in range(0, labels_KB.shape[1], batch_size)
    ]
    hits, losses = zip(*parts, strict=True)
    return np.concatenate(hits, axis=1), np.concatenate(losses, axis=1)


def _outcomes(
    method: Method, encoded: Tensors, inputs_KB: Inputs, labels_KB: Tensor
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Whether each image is classified correctly, and its cross-entropy: both (K, B).

    The cross-entropy is NaN if and only if the best logit is not finite; such an image is wrong.
    """
    device = method.clip.device
    # Argmax and loss are taken in float32, whatever the precision of the backbone.
    logits_KBC = method.logits(encoded, inputs_KB.on(device)).float()
    targets_KB = labels_KB.to(device).expand(logits_KBC.shape[:2])
    hits_KB = logits_KBC.argmax(-1) == targets_KB
    losses = F.cross_entropy(logits_KBC.flatten(0, 1), targets_KB.flatten(), reduction="none")
    losses_KB = losses.view_as(hits_KB)
    # `argmax` takes NaN for the largest number, so without this all images would be of class 0.
    hits_KB &= ~losses_KB.isnan()
    return hits_KB.cpu().numpy(), losses_KB.double().cpu().numpy()


def _as_score(hits_B: NDArray[np.bool_], losses_B: NDArray[np.float64]) -> Score:
    """The score of one model from the outcomes of its images (B,)."""
    unanswered = int(np.isnan(losses_B).sum())
    return Score(int(hits_B.sum()), len(hits_B), _or_infinity(losses_B.sum()), unanswered)


def _or_infinity(loss_sum: np.floating[Any]) -> float:
    loss = float(loss_sum)
    return loss if math.isfinite(loss) else math.inf
