"""ReBaPL: any prompt method, sampled from its posterior in cycles that repel each other.

Source: ReBaPL: Repulsive Bayesian Prompt Learning (Bendou, Ezzahir, Montesuma, Mahuas,
Shevchenko, Gartrell, 2025; code SigmaNova/ReBaPL, where the paper lies as well). Cyclical SGHMC in
C cycles, with momentum 1 - eta and a rate alpha_t that falls as a cosine in every cycle; after a
share beta of the cycle, noise is added (eq. 16):

    theta <- theta + r + xi F
    r <- (1 - eta) r - alpha_t grad U + sqrt(2 (eta - gamma) alpha_t) e        e ~ N(0, 1)
    F = -grad V,    V(theta, theta') = 1 / (d(U, U')^2 + eps)                          eq. 17

theta' is what the previous cycle ended with, and d is the distance (MMD with an RBF kernel, eq. 13,
or Wasserstein, eq. 14) between what the two say about a reference batch. Prediction is the mean of
the probabilities of the C samples. The defaults are those of the paper's table 8 for MaPLe.

In a federation [I]: a unit of time is a round. The server keeps what each cycle ends with
(`strategies/posterior_samples.py`) and sends it along; a client's reference batch is the batch
that it trains on, so reference images stay where they are and none is encoded twice. Uploads are
those of the base; messages to a client are C times as large. All trained tensors receive noise; in
the ensemble, private ones keep their present values.

How the terms of eq. 16 are computed with SGD of momentum m = 1 - eta:
- The noise is a part of the gradient, so it enters the momentum: r = -lr v. U is the sum over the
  client's N images and the loss is their mean, so alpha_t = lr / N, and the gradient of the mean
  receives sqrt(2 (eta - gamma) temperature / (N lr)) e. At `temperature` 1 a client samples its own
  posterior. The public code adds sqrt(2 lr m) / N * 100 e to its momentum; 0.002 is about that for
  160 images at the rate 0.002. The mean over clients has less noise than each of them.
- The repulsion is a loss term xi (1 - m) / lr V: what one step pushes is xi F in total, spread over
  the steps that follow. The code adds grad V to the gradient, with xi = 0.75 (and 1 / (d + eps)).

Further differences, named: u is the row of an image's cosines with all classes, because image
features do not depend on a text prompt; the code takes the base's text features or image features,
and as its distance by default a mean squared error, not the paper's MMD. beta is not in the paper's
table; 0.4 is the code's last three of five epochs. eps is not in the paper. The code's is 1e-6: a
cycle starts where the previous one ended, and near it the force reaches 0.65 xi eps^-1.5, which
throws the prompts far away in a few steps; ours is 0.1. The code averages logits, not
probabilities.
MMRL, its AdamW burn-in, and several samples per cycle are not offered.

Suffixes: K clients, B images, C classes, S finished samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.cycles import Place, place_of
from fedprompt.config.fields import option
from fedprompt.config.search import log_range
from fedprompt.data.features.inputs import Inputs
from fedprompt.errors import UserError
from fedprompt.methods.base import Batch, RoundInfo, Task, Tensors
from fedprompt.methods.parts.nested import Parts
from fedprompt.methods.parts.remembered import Remembered
from fedprompt.methods.parts.wrapper import BASE, WrappedMethod, WrapperConfig, add

SAMPLES, KNOWN = "samples", "known"
"""The part of the extras that holds the samples, and its tensor that tells which rows there are."""
REPULSION = "repulsion"


@dataclass(frozen=True)
class ReBaPLConfig(WrapperConfig):
    """Defaults: the paper's table 8 for MaPLe; temperature and epsilon are ours."""

    supported_strategies = frozenset({"posterior_samples"})
    needs_sgd = True

    cycles: int = option(3, "cycles C in a run; each gives one sample of the ensemble", ge=2)
    exploration: float = option(0.4, "share beta of a cycle after which noise is added", ge=0, le=1)
    temperature: float = option(
        0.002, "temperature of the noise; 1 samples a client's posterior, 0 adds none",
        ge=0, search=log_range(1e-4, 1),
    )  # fmt: skip
    noise_estimate: float = option(
        0.0, "noise gamma that the stochastic gradient has already; it is subtracted from eta", ge=0
    )
    repulsion: float = option(
        0.001, "strength xi of the repulsion", ge=0, search=log_range(1e-4, 0.1)
    )
    distance: Literal["mmd", "wasserstein"] = option(
        "mmd", "distance between two cycles' outputs; wasserstein makes a GPU wait in every step"
    )
    bandwidth: float = option(1.0, "mmd: bandwidth of the kernel", gt=0)
    epsilon: float = option(0.1, "epsilon in the repulsive potential", gt=0)

    @property
    def lr_cycles(self) -> int:
        """One run of the cosine per cycle."""
        return self.cycles

    @property
    def default_strategy(self) -> Mapping[str, Any]:
        """The base's weights of clients, and one sample per cycle."""
        return {**self._base().default_strategy, "name": "posterior_samples"}

    def check(self) -> None:
        """Refuse a base whose own strategy would be lost."""
        super().check()
        strategy = self.base_config().default_strategy["name"]
        if strategy != "fedavg":
            raise UserError(
                f"rebapl keeps samples of averaged prompts, but method '{self.base}' needs the "
                f"strategy '{strategy}'; choose another method.base."
            )


class ReBaPL(WrappedMethod):
    """The base with noise and repulsion in training, and an ensemble in evaluation."""

    name = "rebapl"
    source = "Bendou et al., 2025"
    Config = ReBaPLConfig
    term_names = (REPULSION,)

    def __init__(self, config: ReBaPLConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config
        self.shared_layout = self.shared_layout.with_part(
            SAMPLES, [*self.learned, KNOWN], f"{SAMPLES}."
        )
        self._earlier: list[Remembered[Tensors]] = [Remembered() for _ in range(config.cycles - 1)]
        """Remembers each sample's encoding for a round."""

    def init_extras(self, seed: int) -> Tensors:
        """The base's, and room for the samples of all cycles but the last."""
        rows = self.cfg.cycles - 1
        shared = self.base.init_shared(seed)
        samples = {n: torch.zeros(rows, *shared[n].shape) for n in self.learned}
        return self.shared_layout.flatten(
            {BASE: self.base.init_extras(seed), SAMPLES: {**samples, KNOWN: torch.zeros(rows)}}
        )

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """The base's encoding; in evaluation also that of each finished sample.

        Those of sample s are called `samples.s/<name>`, and `samples.known` (K, S) says which
        clients have it.
        """
        encoded = super().encode(shared, private)
        s = self.shared_layout.nest(shared)
        # Only leaves of training require a gradient; training is about the present state alone.
        if not s[SAMPLES] or any(t.requires_grad for t in shared.values()):
            return encoded
        p = None if private is None else self.private_layout.nest(private)[BASE]
        known_KS = s[SAMPLES][KNOWN]
        rows = [row for row in range(known_KS.shape[1]) if bool(known_KS[:, row].any())]
        for number, row in enumerate(rows):
            for name, tensor in self.base.encode(self._sample(s, row), p).items():
                encoded[_of_sample(number, name)] = tensor
        return {**encoded, f"{SAMPLES}.{KNOWN}": known_KS[:, rows]} if rows else encoded

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """The base's logits (K, B, C), or the logarithms of the ensemble's mean probabilities."""
        known_KS = encoded.get(f"{SAMPLES}.{KNOWN}")
        if known_KS is None:
            return self.base.logits(encoded, inputs)
        names = [n for n in encoded if not n.startswith(f"{SAMPLES}.")]
        models = [{n: encoded[n] for n in names}]
        for number in range(known_KS.shape[1]):
            models.append({n: encoded[_of_sample(number, n)] for n in names})
        each_MKBC = torch.stack([self.base.logits(m, inputs).log_softmax(-1) for m in models])
        # The present state is the sample of the present cycle.
        weight_KM = torch.cat([torch.ones_like(known_KS[:, :1]), known_KS], dim=1)
        share_MK11 = (weight_KM / weight_KM.sum(1, keepdim=True)).T[..., None, None]
        return torch.logsumexp(each_MKBC + share_MK11.log(), dim=0)

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        """The base's terms, and `repulsion`, which is zero in the first cycle."""
        terms = super().loss_terms(shared, private, encoded, batch)
        info = batch.round_info
        row = self._place(info).cycle - 1
        if row < 0 or self.cfg.repulsion == 0:
            return {**terms, REPULSION: torch.zeros_like(terms["ce"].detach())}
        s, p = self.shared_layout.nest(shared), self.private_layout.nest(private)
        # Without private tensors, the sample is the same model in every step of a round.
        fixed = [t for n, t in s[BASE].items() if n not in self.learned]
        with torch.no_grad():
            before = self._earlier[row](
                (*s[SAMPLES].values(), *fixed, *p[BASE].values()),
                lambda: self.base.encode(self._sample(s, row), p[BASE]),
            )
            before_KBC = self.base.logits(before, batch.inputs) / self.clip.logit_scale
        now_KBC = self.base.logits(encoded, batch.inputs) / self.clip.logit_scale
        distance = squared_mmd if self.cfg.distance == "mmd" else squared_wasserstein
        square_K = distance(now_KBC, before_KBC, batch.mask_KB, self.cfg.bandwidth)
        # Eq. 17 without its value at d = 0, so that the term is 0 there and never above.
        potential_K = 1 / (square_K + self.cfg.epsilon) - 1 / self.cfg.epsilon
        scale = self.cfg.repulsion * (1 - info.momentum) / info.lr
        return {**terms, REPULSION: scale * s[SAMPLES][KNOWN][:, row] * potential_K}

    def gradients(
        self, loss_terms: dict[str, Tensor], leaves: Tensors, batch: Batch
    ) -> dict[str, Tensor | None]:
        """The base's gradients, with repulsion and noise."""
        info = batch.round_info
        push: tuple[Tensor | None, ...] = (None,) * len(leaves)
        repulsion_K = loss_terms[REPULSION]
        if repulsion_K.requires_grad:
            # First, because both share `encoded`, and the base's backward pass frees its graph.
            push = torch.autograd.grad(
                repulsion_K.sum(), list(leaves.values()), retain_graph=True, allow_unused=True
            )
        terms = {n: t for n, t in loss_terms.items() if n != REPULSION}
        gradients = self.base.gradients(terms, leaves, self.base_batch(batch))
        gradients = {n: add(gradients[n], more) for n, more in zip(leaves, push, strict=True)}
        # eta - gamma; without momentum, eta is 1 and the dynamics are Langevin's.
        friction = max(0.0, 1 - info.momentum - self.cfg.noise_estimate)
        level = 2 * friction * self.cfg.temperature
        if self._place(info).share < self.cfg.exploration or level == 0:
            return gradients
        images_K = info.class_counts_KC.sum(1)
        for name, gradient in gradients.items():
            if gradient is not None:
                lr = info.lr * self.lr_scale.get(name, 1.0)
                std_K = (level / (images_K * lr)).sqrt()
                drawn = batch.normal(tuple(gradient.shape[1:]), "sghmc", name)
                by_client = std_K.reshape(-1, *[1] * (gradient.dim() - 1))
                gradients[name] = gradient + by_client * drawn
        return gradients

    def class_embeddings(self, encoded: Tensors) -> Tensor | None:
        """The base's, while there is a single sample; no vectors stand for an ensemble."""
        several = f"{SAMPLES}.{KNOWN}" in encoded
        return None if several else self.base.class_embeddings(encoded)

    def _place(self, info: RoundInfo) -> Place:
        return place_of(info.server_round, info.rounds, self.cfg.cycles)

    def _sample(self, shared: Parts, row: int) -> Tensors:
        """The base's shared tensors (K, ...) of a finished cycle."""
        return {**shared[BASE], **{n: shared[SAMPLES][n][:, row] for n in self.learned}}


def _of_sample(number: int, name: str) -> str:
    return f"{SAMPLES}.{number}/{name}"


def squared_mmd(a_KBC: Tensor, b_KBC: Tensor, mask_KB: Tensor, bandwidth: float) -> Tensor:
    """Squared maximum mean discrepancy (K,), eq. 13, with the kernel exp(-|x - y|^2 / (2 h^2)).

    Args:
        a_KBC: rows of one sample of rows per client.
        b_KBC: rows of the other one.
        mask_KB: which rows count, in both.
        bandwidth: h.
    """
    weight_KB = mask_KB / mask_KB.sum(1, keepdim=True)

    def mean(x: Tensor, y: Tensor) -> Tensor:
        # Of the kernel minus 1: in the difference below, the ones cancel before they are rounded.
        kernel_KBB = torch.expm1(-_squares(x, y) / (2 * bandwidth**2))
        return (weight_KB[:, :, None] * kernel_KBB * weight_KB[:, None]).sum((1, 2))

    return mean(a_KBC, a_KBC) + mean(b_KBC, b_KBC) - 2 * mean(a_KBC, b_KBC)


def squared_wasserstein(a_KBC: Tensor, b_KBC: Tensor, mask_KB: Tensor, _: float) -> Tensor:
    """Squared 2-Wasserstein distance (K,), eq. 14; the plan is a constant for the gradient.

    The arguments are those of `squared_mmd`. Both samples have equally many rows of equal mass, so
    that an optimal plan is an assignment.
    """
    # Third party, and slow to import for methods that do not need it.
    from scipy.optimize import linear_sum_assignment

    cost_KBB = _squares(a_KBC, b_KBC)
    found, real = cost_KBB.detach().cpu().numpy(), mask_KB.cpu().numpy()
    plan_KBB = torch.zeros(cost_KBB.shape)
    for k, rows in enumerate(real):
        (index,) = rows.nonzero()
        first, second = linear_sum_assignment(found[k][index][:, index])
        plan_KBB[k, index[first], index[second]] = 1 / len(index)
    return (plan_KBB.to(cost_KBB.device) * cost_KBB).sum((1, 2))


def _squares(x_KBC: Tensor, y_KBC: Tensor) -> Tensor:
    """Squared distances (K, B, B) between rows; `y` may not need a gradient."""
    # Rows lie close together and far from zero, where the products would cancel.
    centre_K1C = y_KBC.detach().mean(1, keepdim=True)
    x_KBC, y_KBC = x_KBC - centre_K1C, y_KBC - centre_K1C
    products_KBB = x_KBC @ y_KBC.transpose(1, 2)
    x_KB1, y_K1B = x_KBC.square().sum(-1, keepdim=True), y_KBC.square().sum(-1)[:, None]
    return (x_KB1 + y_K1B - 2 * products_KBB).clamp(min=0)
