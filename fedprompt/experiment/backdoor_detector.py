"""Training of SABRE-FL's detector, which tells embeddings of triggered images from clean ones.

Source: SABRE-FL (Khan, Chandio, Anwar, ICLR 2026, arXiv 2506.22506), reconstructed; the strategy
`sabre_fl` says how it is used. The images are the server's test images of an experiment, which
should have other images than the federation that the detector is for. For each of some target
classes a trigger is trained against zero-shot CLIP, on half of the images; the other half measures
the detector. It is a logistic regression on normalised embeddings with an L2 penalty.

Suffixes: N embeddings, D joint embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import rankdata
from torch import Tensor

from fedprompt.evaluation.perturbations import features_of_pixels, open_pixels
from fedprompt.evaluation.triggers import trained_trigger, triggered
from fedprompt.methods.registry import zero_shot
from fedprompt.rng import generator
from fedprompt.scoring import encode_global
from fedprompt.workspace import Workspace

PENALTY = 1e-3
"""Weight of the squared norm of the detector's weights."""
BATCH = 32
"""Images in a step of a trigger."""


@dataclass(frozen=True)
class Detector:
    """A trained detector.

    Attributes:
        weight_D: its weights.
        bias: its bias.
        auc: probability that a triggered image scores higher than a clean one, on images and
            triggers that it was not trained on.
    """

    weight_D: NDArray[np.float64]
    bias: float
    auc: float


def train_detector(workspace: Workspace, *, targets: int, images: int, steps: int) -> Detector:
    """Train a detector on the server's test images.

    Args:
        workspace: an experiment's workspace; its `attack.eps` bounds the triggers.
        targets: number of target classes, evenly spread; each has a trigger of its own.
        images: number of images, evenly spread.
        steps: steps of each trigger.
    """
    method = zero_shot(workspace.clip, workspace.task)
    model, seed = encode_global(method, {}), workspace.config.seed
    eps = workspace.config.attack.eps / 255
    test = workspace.partition.server_test
    index = test[_spread(len(test), images)]
    pixels = open_pixels(workspace.clip, workspace.dataset, index.tolist())
    halves = pixels[::2], pixels[1::2]
    found: list[tuple[list[Tensor], list[Tensor]]] = [([], []), ([], [])]
    for number, target in enumerate(_spread(len(workspace.task.class_names), targets).tolist()):
        draws = (generator(seed, "detector", target, step) for step in range(steps))
        batches = [
            halves[0][torch.from_numpy(draw.permutation(len(halves[0]))[:BATCH])] for draw in draws
        ]
        start = torch.zeros_like(pixels[0])
        trigger = trained_trigger(method, model, batches, start, target, eps, 2.5 * eps / steps)
        # Triggers alternate between the halves, so that the measured ones are new as well.
        clean, bad = found[number % 2]
        half = halves[number % 2]
        clean.append(_embedded(workspace, half))
        bad.append(_embedded(workspace, triggered(half, trigger)))
    (clean, bad), (new_clean, new_bad) = found
    weight_D, bias = logistic_regression(torch.cat(clean).numpy(), torch.cat(bad).numpy())
    scores = [torch.cat(part).double().numpy() @ weight_D for part in (new_clean, new_bad)]
    return Detector(weight_D, bias, separation(*scores))


def logistic_regression(
    clean_ND: NDArray[Any], bad_ND: NDArray[Any], penalty: float = PENALTY
) -> tuple[NDArray[np.float64], float]:
    """Fit weights (D,) and a bias: mean cross-entropy plus `penalty` times the squared weights.

    Args:
        clean_ND: embeddings with label 0.
        bad_ND: embeddings with label 1.
        penalty: weight of the squared norm.
    """
    rows_ND = np.concatenate([clean_ND, bad_ND]).astype(np.float64)
    sign_N = np.repeat([-1.0, 1.0], [len(clean_ND), len(bad_ND)])

    def loss(both: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        margin_N = sign_N * (rows_ND @ both[:-1] + both[-1])
        pull_N = -sign_N * expit(-margin_N) / len(rows_ND)
        value = np.logaddexp(0, -margin_N).mean() + penalty * (both[:-1] ** 2).sum()
        return float(value), np.append(rows_ND.T @ pull_N + 2 * penalty * both[:-1], pull_N.sum())

    found = minimize(loss, np.zeros(rows_ND.shape[1] + 1), jac=True, method="L-BFGS-B").x
    return found[:-1], float(found[-1])


def separation(clean_N: NDArray[Any], bad_N: NDArray[Any]) -> float:
    """The probability that a score of `bad_N` is above one of `clean_N`; ties count half."""
    ranks_N = rankdata(np.concatenate([clean_N, bad_N]))[len(clean_N) :]
    return float((ranks_N.mean() - (len(bad_N) + 1) / 2) / len(clean_N))


def _spread(count: int, wanted: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(np.int64))


def _embedded(workspace: Workspace, pixels: Tensor) -> Tensor:
    features = features_of_pixels(workspace.clip, pixels)
    return torch.nn.functional.normalize(features, dim=-1)
