"""Accuracy and loss of global and personal models.

The server scores the global model here, and the clients' side scores personal models in blocks of K
clients. Scoring has two steps: a method's `encode` runs the class prompts through the text tower
once per model, then `logits` is called for batches of images of bounded size.

What is common to all clients is computed once per process: with a workspace's `memo`, equal shared
tensors are encoded once, and the logits of one model on the server's images are computed once,
however many blocks of clients and protocols ask for them. Only models without private tensors are
remembered (see `Memo`).

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

from fedprompt.backbone.memo import Memo
from fedprompt.config.multi_label import MultiLabelConfig
from fedprompt.data.features.inputs import Inputs
from fedprompt.files.tensors import checksum
from fedprompt.methods.base import Method, Tensors, stack
from fedprompt.methods.parts.label_sets import label_set_loss
from fedprompt.statistics import f1_scores, mean_average_precision, sample_std


@dataclass(frozen=True)
class Score:
    """The result of a model on a test set.

    Counts are stored instead of an accuracy because counts can be added without rounding.

    Attributes:
        correct: number of correctly classified images; 0 in the multi-label task.
        tested: number of images.
        loss_sum: sum of their cross-entropies; infinity if it is not finite.
        unanswered: number of images for which the model's best logit is not finite, as from prompts
            that have diverged. They count as wrong; by `argmax`, each would be of class 0.
        precision: in the multi-label task, the mean average precision (mAP); else None.
        micro_f1: in the multi-label task, F1 over all images and labels, where a label is given at
            a probability of 1/2; else None.
        macro_f1: likewise, the mean over labels.
    """

    correct: int
    tested: int
    loss_sum: float
    unanswered: int = 0
    precision: float | None = None
    micro_f1: float | None = None
    macro_f1: float | None = None

    @property
    def accuracy(self) -> float | None:
        """Fraction of correct predictions, or mAP; None if there are no test images."""
        if self.precision is not None:
            return self.precision
        return self.correct / self.tested if self.tested else None

    @property
    def credit(self) -> int | float:
        """`accuracy` times `tested`, which clients report: the number of correct predictions."""
        return self.correct if self.precision is None else self.precision * self.tested


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
    method: Method,
    shared: Tensors,
    inputs_N: Inputs,
    labels_N: Tensor,
    memo: Memo | None = None,
) -> Score | None:
    """Score the shared prompts alone on a test set.

    Args:
        method: the method, for the class names of the test set.
        shared: shared tensors, without a client axis.
        inputs_N: the test images (N, ...).
        labels_N: their class indices (N,).
        memo: remembers the model and its logits, for images that live as long as the memo.

    Returns:
        The score, or None if the method has no global model.
    """
    if not method.has_global:
        return None
    return _score(method, encode_global(method, shared, memo), inputs_N, labels_N, memo)[0]


@torch.no_grad()
def encode_global(method: Method, shared: Tensors, memo: Memo | None = None) -> Tensors:
    """Encode the shared prompts alone, as a model with client axis 1.

    Args:
        method: a method that has a global model.
        shared: shared tensors, without a client axis.
        memo: remembers the result.

    Returns:
        The result of `method.encode` (1, ...), on the device of the backbone.
    """

    def encode() -> Tensors:
        return method.encode(stack([shared], method.clip.device), None)

    return encode() if memo is None else memo.recall((method, checksum(shared)), encode)


@torch.no_grad()
def encode_personal(
    method: Method,
    shared: Sequence[Tensors],
    private: Sequence[Tensors],
    memo: Memo | None = None,
) -> Tensors:
    """Encode the models of K clients.

    Shared prompts that are equal on all clients are encoded only once, which saves K - 1 passes of
    the class prompts through the text tower for methods without private prompts.

    Args:
        method: the method.
        shared: per client, its shared tensors, without a client axis.
        private: per client, its private tensors, without a client axis.
        memo: remembers the result if all clients have the same model, for which the global model
            is encoded as well. A model with private tensors is not remembered.

    Returns:
        Encoded tensors with client axis K, or 1 where all clients have the same tensor.
    """
    # Clients receive equal tensors from most strategies. Comparing them costs far less than
    # encoding the class prompts K times.
    device, models = method.clip.device, list(shared)
    if all(_equal(other, models[0]) for other in models[1:]):
        models = models[:1]

    def encode() -> Tensors:
        return method.encode(stack(models, device), stack(list(private), device))

    if memo is None or len(models) > 1 or any(private):
        return encode()
    # Without private tensors, `encode` returns the global model, bit for bit.
    return memo.recall((method, checksum(models[0])), encode)


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
    method: Method,
    encoded: Tensors,
    clients: int,
    inputs_N: Inputs,
    labels_N: Tensor,
    memo: Memo | None = None,
) -> list[Score]:
    """Score encoded models on one common test set.

    Args:
        method: the method.
        encoded: encoded models, with client axis `clients` or 1.
        clients: number of clients K.
        inputs_N: the test images (N, ...).
        labels_N: their class indices (N,).
        memo: remembers the logits, as in `logits_of`.

    Returns:
        One score per client.
    """
    # A single model for all clients is scored once, and its score is repeated.
    scores = _score(method, encoded, inputs_N, labels_N, memo)
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
    if method.task.multi_label is not None:
        # No sum over images: each client's labels are ranked among themselves.
        return [_score(method, model_of(encoded, k), *test)[0] for k, test in enumerate(tests)]
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
def logits_of(
    method: Method, encoded: Tensors, inputs_N: Inputs, memo: Memo | None = None
) -> Iterator[Tensor]:
    """Compute the logits of one encoded model, batch by batch.

    Args:
        method: the method.
        encoded: one encoded model, with client axis 1.
        inputs_N: images (N, ...).
        memo: remembers the logits. It may be given only for a model without private tensors, and
            for images that live as long as the memo, such as the server's.

    Yields:
        Logits (B, C) of consecutive batches of bounded size, as float32 on the CPU.
    """
    for logits_1BC in _logits(method, encoded, inputs_N, 1, memo):
        yield logits_1BC[0].cpu()


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


def _score(
    method: Method,
    encoded: Tensors,
    inputs_N: Inputs,
    labels_N: Tensor,
    memo: Memo | None = None,
) -> list[Score]:
    """Scores of K encoded models on one test set, a bounded number of images at a time."""
    clients = max(v.shape[0] for v in encoded.values())
    if method.task.multi_label is not None:
        parts = [z_KBC.cpu() for z_KBC in _logits(method, encoded, inputs_N, clients, memo)]
        if not parts:
            return [Score(0, 0, 0.0)] * clients
        return [_of_sets(z_NC, labels_N, method.task.multi_label) for z_NC in torch.cat(parts, 1)]
    correct_K, unanswered_K = np.zeros((2, clients), dtype=np.int64)
    loss_K = np.zeros(clients)
    first = 0
    for logits_KBC in _logits(method, encoded, inputs_N, clients, memo):
        last = first + logits_KBC.shape[1]
        hits_KB, losses_KB = _judged(logits_KBC, labels_N[None, first:last])
        correct_K += hits_KB.sum(-1)
        unanswered_K += np.isnan(losses_KB).sum(-1)
        loss_K += losses_KB.sum(-1)
        first = last
    return [
        Score(int(correct), len(labels_N), _or_infinity(loss), int(unanswered))
        for correct, loss, unanswered in zip(correct_K, loss_K, unanswered_K, strict=True)
    ]


@torch.no_grad()
def _logits(
    method: Method, encoded: Tensors, inputs_N: Inputs, clients: int, memo: Memo | None = None
) -> Iterator[Tensor]:
    """Logits (K, B, C) of K encoded models, float32, for consecutive batches of bounded size."""
    # Every image is scored by all K models in one call, so K divides the batch.
    batch_size = max(1, _batch_size(method) // clients)

    def compute() -> Iterator[Tensor]:
        for first in range(0, len(inputs_N), batch_size):
            batch = inputs_N[first : first + batch_size].of_one().on(method.clip.device)
            # Argmax and loss are taken in float32, whatever the precision of the backbone.
            yield method.label_logits(encoded, batch).float()

    # Logits that no memo holds are not gathered either: only one batch is in memory.
    gathered = 4 * len(inputs_N) * len(method.task.class_names)
    if memo is None or clients > 1 or not 0 < gathered <= memo.max_bytes:
        yield from compute()
        return
    # The tensors of one model are the same objects, since the memo holds them as well.
    key = (method, inputs_N, *encoded.values())
    known = memo.recall(key, lambda: {"logits": torch.cat(list(compute()), dim=1)})
    # In the batches in which they were computed, so that the sums of losses keep their order.
    yield from known["logits"].split(batch_size, dim=1)


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
    """The outcomes of one batch, see `_judged`."""
    # Argmax and loss are taken in float32, whatever the precision of the backbone.
    return _judged(method.logits(encoded, inputs_KB.on(method.clip.device)).float(), labels_KB)


def _judged(logits_KBC: Tensor, labels_KB: Tensor) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Whether each image is classified correctly, and its cross-entropy: both (K, B).

    The cross-entropy is NaN if and only if the best logit is not finite; such an image is wrong.
    """
    targets_KB = labels_KB.to(logits_KBC.device).expand(logits_KBC.shape[:2])
    hits_KB = logits_KBC.argmax(-1) == targets_KB
    losses = F.cross_entropy(logits_KBC.flatten(0, 1), targets_KB.flatten(), reduction="none")
    losses_KB = losses.view_as(hits_KB)
    # `argmax` takes NaN for the largest number, so without this all images would be of class 0.
    hits_KB &= ~losses_KB.isnan()
    return hits_KB.cpu().numpy(), losses_KB.cpu().double().numpy()


def _of_sets(z_NC: Tensor, targets_NC: Tensor, options: MultiLabelConfig) -> Score:
    """The score of one model on images with several labels each."""
    loss_N = label_set_loss(z_NC, targets_NC, options)
    unanswered_N = ~z_NC.isfinite().all(-1)
    # An image without an answer comes last for every label.
    scores_NC = z_NC.double().masked_fill(unanswered_N[:, None], -math.inf).numpy()
    has_NC = targets_NC.numpy() > 0.5
    precision = mean_average_precision(scores_NC, has_NC)
    assert precision is not None, "every image has a label"
    micro, macro = f1_scores(scores_NC > 0, has_NC)
    return Score(
        correct=0,
        tested=len(targets_NC),
        loss_sum=_or_infinity(np.float64(loss_N.double().sum().item())),
        unanswered=int(unanswered_N.sum()),
        precision=precision,
        micro_f1=micro,
        macro_f1=macro,
    )


def _as_score(hits_B: NDArray[np.bool_], losses_B: NDArray[np.float64]) -> Score:
    """The score of one model from the outcomes of its images (B,)."""
    unanswered = int(np.isnan(losses_B).sum())
    return Score(int(hits_B.sum()), len(hits_B), _or_infinity(losses_B.sum()), unanswered)


def _or_infinity(loss_sum: np.floating[Any]) -> float:
    loss = float(loss_sum)
    return loss if math.isfinite(loss) else math.inf
