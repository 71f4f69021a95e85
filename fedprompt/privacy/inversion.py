"""What a client's update gives away: attacks that a curious server, or anybody else, can mount.

The attacker knows the method, the frozen CLIP, the prompts that were sent and the server's own test
images; private tensors are as at the start to it. All is done with `train_clients`, so it works for
any method.

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
"""Imagined clients trained in one call: bounds the memory."""
SPREAD, RIDGE = 0.3, 1e-2
"""Noise on imagined features, in lengths of a feature; ridge in mean squared changes. Chosen on
three clients of the embedded images."""


@dataclass(frozen=True)
class Attacker:
    """Who looks at one client's update: what was sent, and what the attacker can work out."""

    workspace: Workspace
    client: int
    received: Tensors

    def losses(self, uploaded: Tensors, inputs: Inputs, labels_N: Tensor) -> Floats:
        """Cross-entropy (N,) of images under prompts that the attacker holds."""
        method = self.workspace.method
        shared = self.received | uploaded
        with torch.no_grad():
            if method.has_global:
                encoded = method.encode(stack([shared], method.clip.device), None)
            else:
                encoded = encode_personal(method, [shared], [self._private()])
            logits_NC = torch.cat(list(logits_of(method, encoded, inputs)))
        return F.cross_entropy(logits_NC, labels_N, reduction="none").double().numpy()

    def change(self, uploaded: Tensors) -> Floats:
        """What an update changes, as one row (P,)."""
        names = sorted(self.workspace.shared_shapes)
        parts = [(uploaded[n].double() - self.received[n].double()).flatten() for n in names]
        return torch.cat(parts).numpy()

    def imagined(self, data: Sequence[tuple[Inputs, Tensor]]) -> Floats:
        """What one step of plain SGD on each set of images would change: (N, P)."""
        config = self.workspace.config
        rows = []
        for first in range(0, len(data), AT_ONCE):
            some = data[first : first + AT_ONCE]
            results = train_clients(
                self.workspace.method,
                [self.received] * len(some),
                [self._private()] * len(some),
                [ClientData(self.client, inputs, labels) for inputs, labels in some],
                one_step(config.training, max(len(labels) for _, labels in some)),
                seed=config.seed,
                server_round=max(1, config.federation.rounds),
                rounds=config.federation.rounds,
            )
            rows += [self.change(r.shared) for r in results]
        return np.stack(rows)

    def class_shares(self, uploaded: Tensors) -> Floats:
        """The client's share of images of every class (C,), guessed from its update.

        The change is taken apart into what a step on the server's images of each class would
        change, with weights >= 0 (least squares); their shares are the guess, uniform where nothing
        fits. In the spirit of label inference from gradients: iDLG (Zhao, Mopuri and Bilen, 2020,
        arXiv 2001.02610); the decomposition is ours.
        """
        inputs, labels_N = self.workspace.server_test()
        classes = len(self.workspace.task.class_names)
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
        """The image feature (D,) behind an update of one step on one image of class `label`.

        Inversion by a learned decoder: the attacker imagines updates of `candidates` features
        around those of its own images of the class, and solves for the linear map back (ridge
        regression, `noise` the standard deviation of what was added to the update). In the spirit
        of Deep Leakage from Gradients (Zhu, Liu and Han, NeurIPS 2019, arXiv 1906.08935), for
        features in place of pixels; the decoder is ours. None without images of the class.
        """
        own_ND = self.own_features(label)
        if not len(own_ND):
            return None
        draw = generator(self.workspace.config.seed, "candidates", self.client)
        chosen = draw.integers(len(own_ND), size=candidates)
        noise_ND = draw.standard_normal((candidates, own_ND.shape[1]))
        spread = SPREAD * noise_ND / np.sqrt(own_ND.shape[1])
        features_ND = F.normalize(torch.from_numpy(own_ND[chosen] + spread).float(), dim=-1)
        label_1 = torch.tensor([label])
        rows_NP = self.imagined([(Inputs(f[None]), label_1) for f in features_ND])
        return decoded(rows_NP, features_ND.double().numpy(), self.change(uploaded), noise)

    def own_features(self, label: int) -> Floats:
        """Features (n, D) of the server's own images of a class."""
        inputs, labels_N = self.workspace.server_test()
        return inputs.features[labels_N == label].double().numpy()

    def _private(self) -> Tensors:
        return self.workspace.method.init_private(self.workspace.config.seed, self.client)


def uploaded_by(
    workspace: Workspace, client: int, received: Tensors, private: Tensors, *, image: int | None
) -> Tensors:
    """What a client would upload after one more round from `received`, noise included.

    The round has the first round's learning rate, for the last one's is next to nothing. With
    `image`, it is one step of plain SGD on that one of the client's training images.
    """
    config, data = workspace.config, workspace.train_data(client)
    training: TrainingConfig = replace(config.training, schedule="constant")
    if image is not None:
        data = ClientData(client, data.inputs[[image]], data.labels_N[[image]])
        training = one_step(training, 1)
    (result,) = train_clients(
        workspace.method, [received], [private], [data], training,
        seed=config.seed, server_round=max(1, config.federation.rounds),
        rounds=config.federation.rounds,
    )  # fmt: skip
    if not config.privacy.noise:
        return result.shared
    return protected(received, result.shared, config.privacy, server_round=0, client=client)


def one_step(config: TrainingConfig, images: int) -> TrainingConfig:
    """One step of plain SGD on all images at once."""
    return replace(
        config, optimizer="sgd", momentum=0.0, weight_decay=0.0, schedule="constant",
        local_epochs=1, batch_size=images,
    )  # fmt: skip


def decoded(rows_NP: Floats, features_ND: Floats, row_P: Floats, noise: float) -> Floats:
    """Ridge regression from changes to features, fitted on N pairs and applied to one: (D,)."""
    mean_P, mean_D = rows_NP.mean(0), features_ND.mean(0)
    centred_NP = rows_NP - mean_P
    gram_NN = centred_NP @ centred_NP.T
    # Noise in the row alone acts as N noise^2 on the ridge: as if every pair had been seen with it.
    ridge = max(RIDGE * float(np.trace(gram_NN)) / len(gram_NN), len(gram_NN) * noise**2)
    weights_ND = np.linalg.solve(gram_NN + ridge * np.eye(len(gram_NN)), features_ND - mean_D)
    return np.asarray(mean_D + (row_P - mean_P) @ centred_NP.T @ weights_ND)


def cosine(a: Floats, b: Floats) -> float:
    """Cosine of two vectors; 0 where one of them is 0."""
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / length if length > 0 else 0.0
