"""TOFA: Gaussian classes whose global posterior is each client's prior, fused with weighted texts.

Source: TOFA: Training-Free One-Shot Federated Adaptation for Vision-Language Models (Zhang, Han,
Feng, Zhang, Li, Jiang, Lin, Chen, AAAI 2026, arXiv 2511.16423); there is no public code.
RECONSTRUCTED from descriptions of the paper: image features of class c are N(w_c, Sigma) with a
normal-inverse-Wishart prior; the server's posterior from summed statistics, to the power alpha, is
the prior of each client; sentences about a class are scored by how well they tell its images from
others; and the two predictions are weighted image by image by their confidence.

Equations, all inferred: a client uploads means over its images, the share p_c of each class, the
class sums m_c = mean(y_c x) and G = mean(x x^T). The server averages them by images. With the mean
feature a_c of the sentences about class c, each moved by the difference between the mean image and
the mean sentence, the posterior expectations are

    w_c   = (kappa a_c + m_c) / (kappa + p_c)              kappa = prior / C
    S     = G - sum_c (m_c w_c^T + w_c m_c^T - p_c w_c w_c^T)
              + kappa sum_c (w_c - a_c)(w_c - a_c)^T
    Sigma = (S + shrinkage tr(S) / D I) / (1 + shrinkage)

A client's w_c and S have the same form, with its own moments, and the server's w_c as a_c, weighted
by kappa_c = alpha (kappa + p_c); its Sigma is (S + alpha Sigma) / (1 + alpha), with the server's on
the right. Images are classified by x^T Sigma^-1 w_c - w_c^T Sigma^-1 w_c / 2. Sentence e of class c
has the score and the weight

    score_ce = e . (m_c / p_c - (m - m_c) / (1 - p_c))
    weight_ce = softmax_e(exp(logit_scale) score_ce)

from the global moments (equal weights where the class has no image), and a text feature is the
weighted mean. With p_v and p_t, the probabilities of both, the result is

    p = lambda p_v + (1 - lambda) p_t             lambda = sigmoid(log(max_c p_v / max_c p_t))

What is shared: G as its upper triangle, the m_c and the p_c, once: `federation.rounds=1
federation.fraction=1`. What is kept: the client's own moments. The global model is the server's
posterior. Because strengths are relative to the means, `prior` is in images of an average class,
and at alpha = 1 the server's posterior weighs as much as all of a client's images.

How we differ: the paper generates sentences by a language model on each client; ours are those of
`data.descriptions`, the same for all clients, or the templates. Its scores are said to resemble a
divergence; ours need no upload of their own. As with AFL, class sums reveal more than prompts do,
and a single client's upload should be masked by secure aggregation or noisy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.fields import option
from fedprompt.config.search import log_range
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import ClientData, Method, MethodConfig, Task, Tensors
from fedprompt.methods.parts.losses import cosine_logits
from fedprompt.methods.parts.moments import moments, nonnegative, symmetric
from fedprompt.methods.parts.sentences import described

NAMES = ("gram", "targets", "shares")


@dataclass(frozen=True)
class TOFAConfig(MethodConfig):
    """Defaults are ours, since the paper's could not be read."""

    lr_space = None
    reveals_classes = True

    prior: float = option(
        0.1,
        "weight of the sentences, in images of an average class",
        gt=0,
        search=log_range(1e-3, 10),
    )
    shrinkage: float = option(
        0.1, "weight of a spherical covariance", gt=0, search=log_range(1e-3, 10)
    )
    alpha: float = option(
        1.0, "weight of the server's posterior on a client", gt=0, search=log_range(1e-2, 100)
    )


class Posterior(NamedTuple):
    """The classes of one model, float64: texts, and Gaussians unless there is no image at all.

    Attributes:
        texts_CD: the weighted mean features of the sentences.
        means_CD: w_c.
        sigma_DD: Sigma.
        weight_C: kappa + p_c, by which the server's counts as a client's prior.
    """

    texts_CD: Tensor
    means_CD: Tensor | None = None
    sigma_DD: Tensor = torch.empty(0)
    weight_C: Tensor = torch.empty(0)


class TOFA(Method):
    """`gram` (D (D + 1) / 2,), `targets` (C, D) and `shares` (C,): shared, and own."""

    name = "tofa"
    source = "Zhang et al., AAAI 2026"
    Config = TOFAConfig
    no_transfer_reason = "its Gaussians are those of the classes of the training images"
    reads_descriptions = True
    frozen = frozenset({f"shared.{n}" for n in NAMES} | {f"private.own.{n}" for n in NAMES})

    def __init__(self, config: TOFAConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config
        self.texts = [own_SD.cpu().double() for own_SD in described(clip, task)]

    def init_shared(self, seed: int) -> Tensors:
        """Zeros, as of no image."""
        width, classes = self.clip.embed_dim, len(self.task.class_names)
        return {
            "gram": torch.zeros(width * (width + 1) // 2),
            "targets": torch.zeros(classes, width),
            "shares": torch.zeros(classes),
        }

    def init_private(self, seed: int, client: int) -> Tensors:
        """The same tensors, of the client's own images."""
        return {f"own.{n}": t for n, t in self.init_shared(seed).items()}

    def init_private_from_data(self, private: Tensors, data: ClientData, seed: int) -> Tensors:
        """The client's own moments."""
        return {f"own.{n}": t for n, t in self.shared_from_data(data).items()}

    def shared_from_data(self, data: ClientData) -> Tensors:
        """The moments of the client's images in all their views."""
        own = moments(data, len(self.task.class_names))
        return {n: t.float() for n, t in zip(NAMES, own, strict=True)}

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """Gaussians as `weights` (K, C, D) and `bias` (K, C), and texts as `classes` (K, C, D)."""
        # Where all clients hold the same, the server's part is computed once for all of them.
        servers = [self._server(_row(shared, k)) for k in range(len(shared["shares"]))]
        if private is None:
            found = [_classifier(server) for server in servers]
        else:
            owned = {n: private[f"own.{n}"] for n in NAMES}
            found = [
                _classifier(self._client(servers[k if len(servers) > 1 else 0], _row(owned, k)))
                for k in range(len(owned["shares"]))
            ]
        device = self.clip.device
        weights, bias, classes = (
            torch.stack(parts).float().to(device) for parts in zip(*found, strict=True)
        )
        return {"weights": weights, "bias": bias, "classes": F.normalize(classes, dim=-1)}

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """log p, (K, B, C)."""
        v_KBD = inputs.features
        visual_KBC = v_KBD @ encoded["weights"].transpose(-1, -2) + encoded["bias"][:, None]
        visual_KBC = visual_KBC.log_softmax(-1)
        text_KBC = cosine_logits(self.clip, v_KBD, encoded["classes"]).log_softmax(-1)
        ratio_KB1 = visual_KBC.amax(-1, keepdim=True) - text_KBC.amax(-1, keepdim=True)
        return torch.logaddexp(
            F.logsigmoid(ratio_KB1) + visual_KBC, F.logsigmoid(-ratio_KB1) + text_KBC
        )

    def class_embeddings(self, encoded: Tensors) -> Tensor | None:
        """None: the logits are no products with image features."""
        return None

    def _server(self, common: dict[str, Tensor]) -> Posterior:
        """The server's posterior from the averaged moments."""
        classes_CD = self._text(common)
        if not common["shares"].sum() > 0:
            return Posterior(classes_CD)
        count, width = classes_CD.shape
        mean_D = common["targets"].sum(0) / common["shares"].sum()
        prior_CD = classes_CD - classes_CD.mean(0) + mean_D
        kappa_C = torch.full((count,), self.cfg.prior / count, dtype=torch.float64)
        means_CD, scatter_DD = posterior(common, prior_CD, kappa_C)
        # Noise may have made the trace negative.
        spread = self.cfg.shrinkage * max(float(scatter_DD.trace()) / width, 1e-6)
        identity_DD = torch.eye(width, dtype=torch.float64)
        sigma_DD = nonnegative(scatter_DD, spread / 2) + spread * identity_DD
        sigma_DD = sigma_DD / (1 + self.cfg.shrinkage)
        weight_C = (kappa_C + common["shares"]).clamp(min=self.cfg.prior / count)
        return Posterior(classes_CD, means_CD, sigma_DD, weight_C)

    def _client(self, server: Posterior, own: dict[str, Tensor]) -> Posterior:
        """A client's posterior, with the server's to the power alpha as its prior."""
        if server.means_CD is None or not own["shares"].sum() > 0:
            return server
        alpha = self.cfg.alpha
        means_CD, scatter_DD = posterior(own, server.means_CD, alpha * server.weight_C)
        sigma_DD = (scatter_DD + alpha * server.sigma_DD) / (1 + alpha)
        return server._replace(means_CD=means_CD, sigma_DD=sigma_DD)

    def _text(self, common: dict[str, Tensor]) -> Tensor:
        """The weighted mean feature (C, D) of each class's sentences."""
        share_C, sums_CD = common["shares"], common["targets"]
        all_D, all_ = sums_CD.sum(0), float(share_C.sum())
        features = []
        for c, texts_SD in enumerate(self.texts):
            share = float(share_C[c])
            score_S = torch.zeros(len(texts_SD), dtype=torch.float64)
            if 0 < share < all_:
                apart_D = sums_CD[c] / share - (all_D - sums_CD[c]) / (all_ - share)
                score_S = self.clip.logit_scale * texts_SD @ apart_D
            features.append(score_S.softmax(0) @ texts_SD)
        return torch.stack(features)


def _classifier(of: Posterior) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (C, D) and bias (C,) of one model's Gaussians, and its text features (C, D)."""
    if of.means_CD is None:
        # Without any image, p_v is uniform.
        return torch.zeros_like(of.texts_CD), torch.zeros(len(of.texts_CD)), of.texts_CD
    weights_CD = torch.linalg.solve(of.sigma_DD, of.means_CD.T).T
    return weights_CD, -(weights_CD * of.means_CD).sum(-1) / 2, of.texts_CD


def posterior(of: dict[str, Tensor], prior_CD: Tensor, kappa_C: Tensor) -> tuple[Tensor, Tensor]:
    """w_c and S of the module's docstring, from moments and a prior.

    Args:
        of: the moments `gram` (T,), `targets` (C, D) and `shares` (C,), float64.
        prior_CD: a_c.
        kappa_C: the prior's weight for each class, above 0.

    Returns:
        w (C, D) and S (D, D).
    """
    share_C1, sums_CD, kappa_C1 = of["shares"][:, None], of["targets"], kappa_C[:, None]
    means_CD = (kappa_C1 * prior_CD + sums_CD) / (kappa_C1 + share_C1)
    crossed_DD = sums_CD.T @ means_CD
    scatter_DD = symmetric(of["gram"], len(crossed_DD)) - crossed_DD - crossed_DD.T
    scatter_DD = scatter_DD + means_CD.T @ (share_C1 * means_CD)
    moved_CD = means_CD - prior_CD
    return means_CD, scatter_DD + moved_CD.T @ (kappa_C1 * moved_CD)


def _row(tensors: Tensors, k: int) -> dict[str, Tensor]:
    """Client k's tensors in float64 on the CPU."""
    row = {n: tensors[n][k].cpu().double() for n in NAMES}
    # Noise may have made shares negative, and kappa + p_c would then no longer be a weight.
    return row | {"shares": row["shares"].clamp(min=0)}
