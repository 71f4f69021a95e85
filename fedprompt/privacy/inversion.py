"""What a client's update reveals: attacks by a curious server, or by anybody else who sees it.

The evaluation protocols run these attacks on the server at the end of a simulated run. The attacker
knows the method, the frozen CLIP, the prompts that were sent and the server's own test images. It
does not know private tensors and uses their initial values instead. All attacks use
`train_clients`, so they work for any method.

Shape suffixes: P numbers of all shared tensors, C classes, N candidates, D joint embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import nnls
from torch import Tensor

from fedprompt.config.schema import TrainingConfig
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import ClientData, Tensors, stack
from fedprompt.privacy.local_noise import protected
from fedprompt.rng import generator
from fedprompt.scoring import encode_personal, logits_of
from fedprompt.training import train_clients
from fedprompt.workspace import Workspace

Floats = NDArray[np.float64]
AT_ONCE = 32
"""Largest number of imagined clients that are trained in one call; it bounds the memory."""
SPREAD, RIDGE = 0.3, 1e-2
"""Noise on imagined features, relative to a feature's length, and the ridge, relative to the mean
squared change. Both were chosen on three clients of the embedded images."""


@dataclass(frozen=True)
class Attacker:
    """An attacker that sees one client's update.

    Args:
        workspace: the server's test images, CLIP and method.
        client: id of the client under attack.
        received: shared tensors that the client was sent, by name.
    """

    workspace: Workspace
    client: int
    received: Tensors

    def losses(self, uploaded: Tensors, inputs: Inputs, labels_N: Tensor) -> Floats:
        """Cross-entropy of images under prompts that the attacker knows, for membership attacks.

        Args:
            uploaded: the client's shared tensors after training.
            inputs: N images.
            labels_N: their classes.

        Returns:
            One loss per image, (N,).
        """
        method = self.workspace.method
        shared = self.received | uploaded
        with torch.no_grad():
            # The global model needs no private tensors, which the attacker does not know.
            if method.has_global:
                encoded = method.encode(stack([shared], method.clip.device), None)
            else:
                encoded = encode_personal(method, [shared], [self._private()])
            logits_NC = torch.cat(list(logits_of(method, encoded, inputs)))
        return F.cross_entropy(logits_NC, labels_N, reduction="none").double().numpy()

    def change(self, uploaded: Tensors) -> Floats:
        """The change of the shared tensors by an update, as one row (P,)."""
        # One fixed order of names, so that all rows have the same columns.
        names = sorted(self.workspace.shared_shapes)
        parts = [(uploaded[n].double() - self.received[n].double()).flatten() for n in names]
        return torch.cat(parts).numpy()

    def imagined(self, data: Sequence[tuple[Inputs, Tensor]]) -> Floats:
        """The changes that one step of plain SGD would make.

        Args:
            data: N sets of images and labels; one step is imagined on each of them.

        Returns:
            One row of changes per set, (N, P).
        """
        config = self.workspace.config
        rows = []
        for first in range(0, len(data), AT_ONCE):
            sets = data[first : first + AT_ONCE]
            results = train_clients(
                self.workspace.method,
                [self.received] * len(sets),
                [self._private()] * len(sets),
                [ClientData(self.client, inputs, labels) for inputs, labels in sets],
                # The batch holds the largest set, so that each set is trained in exactly one step.
                one_step(config.training, max(len(labels) for _, labels in sets)),
                seed=config.seed,
                server_round=max(1, config.federation.rounds),
                rounds=config.federation.rounds,
            )
            rows += [self.change(r.shared) for r in results]
        return np.stack(rows)

    def class_shares(self, uploaded: Tensors) -> Floats:
        """A guess of the client's class mix from its update.

        The change is decomposed into the changes that a step on the server's images of each class
        would make, with non-negative weights (least squares). After label inference from gradients
        in iDLG (Zhao, Mopuri and Bilen, 2020, arXiv 2001.02610); the decomposition is ours.

        Args:
            uploaded: the client's shared tensors after training.

        Returns:
            The guessed share of images of every class, (C,), sum 1; uniform if nothing fits.
        """
        inputs, labels_N = self.workspace.server_test()
        classes = len(self.workspace.task.class_names)
        # A class without images on the server cannot be imagined; its share is guessed as 0.
        known = [c for c in range(classes) if bool((labels_N == c).any())]
        parts = [(inputs[labels_N == c], labels_N[labels_N == c]) for c in known]
        weights, _ = nnls(self.imagined(parts).T, self.change(uploaded))
        shares_C = np.zeros(classes)
        shares_C[known] = weights
        total = shares_C.sum()
        return shares_C / total if total > 0 else np.full(classes, 1 / classes)

    def feature(
        self, uploaded: Tensors, label: int, candidates: int, noise: float
    ) -> Floats | None:
        """A guess of the image feature behind an update of one step on one image.

        Inversion by a learned decoder: the attacker imagines the updates of features near those of
        its own images of the class, and fits the linear map from updates back to features. After
        Deep Leakage from Gradients (Zhu, Liu and Han, NeurIPS 2019, arXiv 1906.08935), for features
        instead of pixels; the decoder is ours.

        Args:
            uploaded: the client's shared tensors after the step.
            label: class of the image.
            candidates: number of features whose updates are imagined.
            noise: standard deviation of the noise that the client has added to its update.

        Returns:
            The feature, (D,), or None if the attacker has no images of the class.
        """
        known_ND = self.own_features(label)
        if not len(known_ND):
            return None
        draw = generator(self.workspace.config.seed, "candidates", self.client)
        index_N = draw.integers(len(known_ND), size=candidates)
        noise_ND = draw.standard_normal((candidates, known_ND.shape[1]))
        # Divided by sqrt(D), the noise has length SPREAD on average, whatever D is.
        spread = SPREAD * noise_ND / np.sqrt(known_ND.shape[1])
        features_ND = F.normalize(torch.from_numpy(known_ND[index_N] + spread).float(), dim=-1)
        label_1 = torch.tensor([label])
        rows_NP = self.imagined([(Inputs(f[None]), label_1) for f in features_ND])
        return decoded(rows_NP, features_ND.double().numpy(), self.change(uploaded), noise)

    def own_features(self, label: int) -> Floats:
        """Features of the server's own images of a class, (n, D)."""
        inputs, labels_N = self.workspace.server_test()
        return inputs.features[labels_N == label].double().numpy()

    def _private(self) -> Tensors:
        return self.workspace.method.init_private(self.workspace.config.seed, self.client)


def uploaded_by(
    workspace: Workspace, client: int, received: Tensors, private: Tensors, *, image: int | None
) -> Tensors:
    """The shared tensors that a client would upload after one more round, noise included.

    Args:
        workspace: the client's data, CLIP and method.
        client: the client's id.
        received: shared tensors from which it trains.
        private: its private tensors.
        image: index of a training image; the round is then one step of plain SGD on that image. If
            None, it is a usual round.

    Returns:
        The tensors by name, float32, in the shapes of `received`.
    """
    config, data = workspace.config, workspace.train_data(client)
    # The learning rate of the last rounds is nearly zero, so that of the first one is used.
    training: TrainingConfig = replace(config.training, schedule="constant")
    if image is not None:
        data = ClientData(client, data.inputs[[image]], data.labels_N[[image]])
        training = one_step(training, 1)
    (result,) = train_clients(
        workspace.method, [received], [private], [data], training,
        seed=config.seed, server_round=max(1, config.federation.rounds),
        rounds=config.federation.rounds, privacy=config.privacy,
    )  # fmt: skip
    if not config.privacy.noise:
        return result.shared
    return protected(received, result.shared, config.privacy, server_round=0, client=client)


def one_step(config: TrainingConfig, images: int) -> TrainingConfig:
    """Training options for one step of plain SGD on one batch of all images."""
    return replace(
        config, optimizer="sgd", momentum=0.0, weight_decay=0.0, schedule="constant",
        local_epochs=1, batch_size=images,
    )  # fmt: skip


def decoded(rows_NP: Floats, features_ND: Floats, row_P: Floats, noise: float) -> Floats:
    """Ridge regression from changes to features, fitted on N pairs and applied to one change.

    Args:
        rows_NP: changes.
        features_ND: features that belong to them.
        row_P: the change whose feature is asked for.
        noise: standard deviation of the noise in `row_P`.

    Returns:
        The feature, (D,).
    """
    # Centred, because the ridge penalty must not shrink the mean feature.
    mean_P, mean_D = rows_NP.mean(0), features_ND.mean(0)
    centred_NP = rows_NP - mean_P
    gram_NN = centred_NP @ centred_NP.T
    # Only `row_P` is noisy. A ridge of N noise^2 is the fit to pairs that are all as noisy.
    ridge = max(RIDGE * float(np.trace(gram_NN)) / len(gram_NN), len(gram_NN) * noise**2)
    weights_ND = np.linalg.solve(gram_NN + ridge * np.eye(len(gram_NN)), features_ND - mean_D)
    return np.asarray(mean_D + (row_P - mean_P) @ centred_NP.T @ weights_ND)


def cosine(a: Floats, b: Floats) -> float:
    """Cosine of two vectors; 0 if one of them is zero."""
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / length if length > 0 else 0.0
