"""FOCoOp: prompts of classes and of other words, trained against the worst change of both.

Source: FOCoOp: Enhancing Out-of-Distribution Robustness in Federated Prompt Learning for
Vision-Language Models (Liao et al., ICML 2025, arXiv 2506.16218; code PengyangZhou/FOCoOp, commit
f30f6f3). Every class has a context, (1 - a) local + a global, and E words that are far from all
class names (`fedprompt.backbone.negative_words`) have contexts of their own. With u the features of
the C class names, o those of the E words, and logits over all C + E columns:

1. xi_u starts in [0, 1e-4) and takes `ascent_steps` steps along the gradient, whose rows have
   length 1, of CE(u + xi_u, o) - gamma_1 mean_c |xi_u,c|; then xi_o along that of
   CE(u + xi_u, o + xi_o) + D.
2. Per image, l = CE + 0.5 D - gamma_1 r_1 - gamma_2 r_2 at u + xi_u and o + xi_o, where
   D = logsumexp(o-logits) - mean(o-logits) and r is the mean of |xi|, and the loss is
   tau gamma_2 logsumexp_images(l / (tau gamma_2)).
3. After each step, gamma <- min(gamma_0, max(0, gamma - beta (rho - r))).

The server (`unbalanced_transport`) matches all clients' words with the mean of their global
contexts. Shared are the contexts of classes and words, private are the local contexts, which start
as the global ones. The global model is a = 1, which the paper does not evaluate. A model's novelty
is the probability of the words, which the `ood` protocol reports as "novelty head".

Defaults are those of the code. Checked against its `loss.py`: equal loss, gradients and noise for
equal starts of the noise. As there, the noise of the words is not held back: the penalty in step 1
is that of xi_u, a constant; and the loss keeps the constant log B of a sum over images.

TRAPS of the code, which are not reproduced: `prompttype` is `unified` by default, which makes
local, global and word contexts ONE tensor; `csc`, `dro` and `uot` are off by default, so the
published method needs flags that nothing states, and `type=bool` takes "False" for true; once
gamma_2 is 0, after 200 steps, its loss is not a number. Our gamma_2 is at least 0.001.

How we differ: gamma is computed as gamma_0 - t beta (rho - r) with the number t of a client's steps
and the present r, where the code adds up r step by step: r is at most steps / sqrt(D), about 2 % of
rho. The words come from our own list and not from WordNet. Clients weigh by images, not batches.
The code stops the ascent early when a step changes nothing; ours always takes all steps.

Suffixes: K clients, B images, C classes, E words, D joint embedding, M tokens, d text width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.negative_words import candidates
from fedprompt.backbone.text_tower import TextTower
from fedprompt.config.fields import option
from fedprompt.config.search import Range, log_range
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import Batch, Method, RoundInfo, Task, Tensors
from fedprompt.methods.parts.losses import cosine_logits, cross_entropy
from fedprompt.methods.parts.negatives import COUNT, chosen_words, joint_logits, share_of_negatives
from fedprompt.methods.parts.prompts import RandomPromptConfig
from fedprompt.rng import normal

START = 1e-4
"""The noise starts between 0 and this."""
LEAST_GAMMA = 1e-3


@dataclass(frozen=True)
class FOCoOpConfig(RandomPromptConfig):
    """Defaults: the code's, with the flags of the published method."""

    default_strategy = MappingProxyType({"name": "unbalanced_transport"})

    negatives: int = option(100, "words E that name no class", ge=1)
    global_share: float = option(
        0.2, "share a of the global context in a client's", ge=0, le=1, search=Range(0.1, 0.9)
    )
    ascent_steps: int = option(4, "steps that the noise of features takes", ge=0)
    strength: float = option(1.0, "length of such a step", gt=0)
    gamma: float = option(10.0, "gamma_0, weight of the noise's size at the start", gt=0)
    gamma_rate: float = option(0.005, "beta, rate of gamma", ge=0)
    budget: float = option(10.0, "rho, size of the noise that gamma aims at", ge=0)
    tau: float = option(
        0.1, "temperature of the worst image, in units of gamma_2", gt=0, search=log_range(0.01, 1)
    )
    detection_weight: float = option(
        0.5, "weight of D, which spreads images over the words", ge=0, search=log_range(0.05, 2)
    )


class FOCoOp(Method):
    """`ctx_global` (C, M, d) and `ctx_ood` (E, M, d) are shared; `ctx_local` is private."""

    name = "focoop"
    source = "Liao et al., ICML 2025"
    Config = FOCoOpConfig
    frozen = frozenset({"private.steps"})
    no_transfer_reason = "a context belongs to the class that it was trained for"

    def __init__(self, config: FOCoOpConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config
        candidates(task.class_names, config.negatives, COUNT)
        self.of_classes = self._tower(task.class_names)

    def _tower(self, names: tuple[str, ...]) -> TextTower:
        return TextTower(self.clip, names, self.cfg.context_tokens, class_specific=True)

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The E words."""
        return chosen_words(self.clip, self.task.class_names, self.cfg.negatives)

    @cached_property
    def of_words(self) -> TextTower:
        """The tower of the words."""
        return self._tower(self.words)

    def _start(self, prompts: int, seed: int, purpose: str) -> Tensor:
        shape = (prompts, self.cfg.context_tokens, self.clip.text.width)
        return normal(shape, self.cfg.init_std, seed, "init", purpose)

    def init_shared(self, seed: int) -> Tensors:
        """`ctx_global` (C, M, d) and `ctx_ood` (E, M, d)."""
        return {
            "ctx_global": self._start(len(self.task.class_names), seed, "shared"),
            "ctx_ood": self._start(self.cfg.negatives, seed, "words"),
        }

    def init_private(self, seed: int, client: int) -> Tensors:
        """`ctx_local` (C, M, d), which starts as the global one, and the number of `steps` (1,)."""
        start = self._start(len(self.task.class_names), seed, "shared")
        return {"ctx_local": start, "steps": torch.zeros(1)}

    def end_round(
        self, shared: Tensors, private: Tensors, round_info: RoundInfo
    ) -> tuple[Tensors, Tensors]:
        """Count the client's steps, by which gamma falls."""
        taken_K1 = round_info.steps_K[:, None].to(private["steps"])
        return shared, {**private, "steps": private["steps"] + taken_K1}

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """`classes` (K, C, D) and `negatives` (K, E, D)."""
        context = shared["ctx_global"]
        if private is not None:
            part = self.cfg.global_share
            context = (1 - part) * private["ctx_local"] + part * context
        return {
            "classes": F.normalize(self.of_classes(context), dim=-1),
            "negatives": F.normalize(self.of_words(shared["ctx_ood"]), dim=-1),
        }

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Cosine logits (K, B, C) of the class names."""
        return cosine_logits(self.clip, inputs.features, encoded["classes"])

    def novelty(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """The probability of the words, (K, B)."""
        return share_of_negatives(
            self.clip, inputs.features, encoded["classes"], encoded["negatives"]
        )

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        """`ce`: the loss of the worst noise takes the place of the cross-entropy."""
        classes_KCD, negatives_KED = encoded["classes"], encoded["negatives"]
        starts = [
            START * batch.uniform(tuple(features.shape[1:]), purpose)
            for features, purpose in ((classes_KCD, "classes"), (negatives_KED, "words"))
        ]
        taken_K = private["steps"][:, 0] + batch.step
        noise = self.worst_noise(classes_KCD, negatives_KED, starts, self._gamma(0, taken_K), batch)
        sizes = [xi.abs().mean((1, 2)) for xi in noise]
        gammas = [self._gamma(size_K, taken_K + 1) for size_K in sizes]
        return {"ce": self.robust_loss(classes_KCD, negatives_KED, noise, gammas, batch)}

    def worst_noise(
        self,
        classes_KCD: Tensor,
        negatives_KED: Tensor,
        starts: list[Tensor],
        gamma_K: Tensor,
        batch: Batch,
    ) -> list[Tensor]:
        """Noise of the class features and of the words', by gradient ascent; no gradient passes.

        Args:
            classes_KCD: features of the class names.
            negatives_KED: features of the words.
            starts: from where both noises start, (K, C, D) and (K, E, D).
            gamma_K: gamma_1, which holds back the noise of the classes.
            batch: images and labels.
        """
        u, o = classes_KCD.detach(), negatives_KED.detach()

        def of_classes(xi_KCD: Tensor) -> Tensor:
            logits = joint_logits(self.clip, batch.inputs.features, u + xi_KCD, o)
            size_K: Tensor = torch.linalg.vector_norm(xi_KCD, dim=-1).mean(-1)
            return cross_entropy(logits, batch) - gamma_K * size_K

        xi_u = self._ascend(of_classes, starts[0])

        def of_words(xi_KED: Tensor) -> Tensor:
            logits = joint_logits(self.clip, batch.inputs.features, u + xi_u, o + xi_KED)
            weight_KB = batch.mask_KB.to(logits.dtype)
            spread_KB = _spread(logits[..., u.shape[1] :])
            mean_K = (spread_KB * weight_KB).sum(-1) / weight_KB.sum(-1)
            return cross_entropy(logits, batch) + mean_K

        return [xi_u, self._ascend(of_words, starts[1])]

    def _ascend(self, objective: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
        """Steps of fixed length along an objective's gradient; rows move independently."""
        xi: Tensor = start
        for _ in range(self.cfg.ascent_steps):
            with torch.enable_grad():
                xi = xi.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(objective(xi).sum(), [xi])
            length = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)
            xi = xi + self.cfg.strength * gradient / (length + 1e-8)
        return xi.detach()

    def robust_loss(
        self,
        classes_KCD: Tensor,
        negatives_KED: Tensor,
        noise: list[Tensor],
        gammas: list[Tensor],
        batch: Batch,
    ) -> Tensor:
        """The loss (K,) at given noise.

        Args:
            classes_KCD: features of the class names.
            negatives_KED: features of the words.
            noise: what is added to both.
            gammas: gamma_1 and gamma_2 (K,), after the step.
            batch: images and labels.
        """
        logits_KBN = joint_logits(
            self.clip, batch.inputs.features, classes_KCD + noise[0], negatives_KED + noise[1]
        )
        ce_KB = F.cross_entropy(
            logits_KBN.flatten(0, 1), batch.labels_KB.flatten(), reduction="none"
        ).view_as(batch.mask_KB)
        spread_KB = _spread(logits_KBN[..., classes_KCD.shape[1] :])
        loss_KB = ce_KB + self.cfg.detection_weight * spread_KB
        for xi, gamma_K in zip(noise, gammas, strict=True):
            loss_KB = loss_KB - (gamma_K * xi.abs().mean((1, 2)))[:, None]
        scale_K1 = self.cfg.tau * gammas[1][:, None]
        # Padding has no part in the sum: exp(-inf) is 0.
        exponent_KB = (loss_KB / scale_K1).masked_fill(~batch.mask_KB, -torch.inf)
        return scale_K1[:, 0] * exponent_KB.logsumexp(-1)

    def _gamma(self, size_K: Tensor | float, steps_K: Tensor) -> Tensor:
        """gamma (K,) after so many steps of noise of this mean size."""
        cfg = self.cfg
        fallen_K = cfg.gamma_rate * steps_K * (cfg.budget - size_K)
        return (cfg.gamma - fallen_K).clamp(min(LEAST_GAMMA, cfg.gamma), cfg.gamma)


def _spread(logits_KBE: Tensor) -> Tensor:
    """D (K, B): how far the words' logits are from equal ones, plus log E."""
    return logits_KBE.logsumexp(-1) - logits_KBE.mean(-1)
