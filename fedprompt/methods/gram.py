"""GRAM: a start for prompts, and a rule for their gradients, that are learned across clients.

Source: Gradient-Regulated Meta-Prompt Learning for Generalizable Vision-Language Models (Li, Gao,
Wei, Tang, Zhang, Li, Ji, Tian, Chua, Zhuang, ICCV 2023, arXiv 2303.06571).

RECONSTRUCTED FROM THE ABSTRACT. It says: the start of a soft prompt and a lightweight function that
regulates gradients are meta-learned together; tasks are clusters of image-text pairs; the framework
goes around any prompt method. Our form, with theta the learned tensors of the method `base`:

    g(x) = a * x + b                                 element by element; a = 1, b = 0 at the start
    theta' = theta - alpha g(grad L_support(theta))
    minimise L_query(theta')   over theta, a and b

First order, as in FOMAML (Finn et al., ICML 2017): grad L_support counts as a constant, so that

    d/d theta = G,     d/d a = -alpha G * grad L_support,     d/d b = -alpha G,     G = grad L_query

In the federation a client is a task. Every batch is an episode: its first half is the support set,
its second half the query set (the order within a batch is random); a single image is both. theta, a
and b are shared, three times the base's numbers; private tensors of the base stay. What a client
returns is its training's change, -lr times the sum of its meta-gradients with plain SGD, and the
strategy `meta_prompt` adds the clients' mean change, all tasks alike, at a rate for theta and one
for a and b.

How we differ: in the paper the query set is of another domain cluster than the support set, which
no client has; here both are the client's, and other domains enter by the mean over clients. Its
clustering of unlabelled pairs is left out. alpha is our choice. The global model, and a client's
personal one, use theta without an inner step: fine-tuning on new images starts from it. The
optimiser's weight decay acts on a and b as on theta.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.fields import option
from fedprompt.config.search import log_range
from fedprompt.errors import UserError
from fedprompt.methods.base import Batch, Task, Tensors
from fedprompt.methods.parts.wrapper import BASE, WrappedMethod, WrapperConfig

SCALE, SHIFT = "scale", "shift"
"""The parts of the shared container that hold a and b."""


@dataclass(frozen=True)
class GRAMConfig(WrapperConfig):
    """The inner step's rate: ours, because the paper's was not readable."""

    default_strategy = MappingProxyType({"name": "meta_prompt"})

    inner_lr: float = option(
        0.01, "rate of the inner step (alpha)", gt=0, search=log_range(0.001, 1)
    )

    def check(self) -> None:
        """Refuse a base whose own strategy would be lost."""
        super().check()
        strategy = self.base_config().default_strategy["name"]
        if strategy != "fedavg":
            raise UserError(
                f"method gram averages over tasks, but method '{self.base}' needs the strategy "
                f"'{strategy}'; choose another method.base."
            )


class GRAM(WrappedMethod):
    """The base's tensors theta, and `regulator.scale.*` (a) and `regulator.shift.*` (b)."""

    name = "gram"
    source = "Li et al., ICCV 2023 (reconstructed from the abstract)"
    Config = GRAMConfig

    def __init__(self, config: GRAMConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        for part in (SCALE, SHIFT):
            self.shared_layout = self.shared_layout.with_part(
                part, self.learned, f"regulator.{part}."
            )

    def init_shared(self, seed: int) -> Tensors:
        """The base's tensors; a is 1 and b is 0, so that the inner step is the plain one."""
        shared = self.base.init_shared(seed)
        return self.shared_layout.flatten(
            {
                BASE: shared,
                SCALE: {n: torch.ones_like(shared[n]) for n in self.learned},
                SHIFT: {n: torch.zeros_like(shared[n]) for n in self.learned},
            }
        )

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        """The base's terms (K,) on the query images, after the inner step."""
        parts, own = self.shared_layout.nest(shared), self.private_layout.nest(private)[BASE]
        theta, batch = parts[BASE], self.base_batch(batch)
        support_KB, query_KB = episode(batch.mask_KB)
        support = replace(batch, mask_KB=support_KB)
        terms = self.base.loss_terms(theta, own, encoded, support)
        # Clients are independent, so the gradient of their sum is each client's own. It carries no
        # graph: that is the first-order approximation.
        minimised = [t.sum() for n, t in terms.items() if n not in self.base.measured]
        total = torch.stack(minimised).sum()
        found = torch.autograd.grad(total, [theta[n] for n in self.learned], allow_unused=True)
        moved = dict(theta)
        for n, gradient in zip(self.learned, found, strict=True):
            x = torch.zeros_like(theta[n]) if gradient is None else gradient
            regulated = parts[SCALE][n] * x + parts[SHIFT][n]
            moved[n] = theta[n] - self.config.inner_lr * regulated
        query = replace(batch, mask_KB=query_KB)
        return self.base.loss_terms(moved, own, self.base.encode(moved, own), query)


def episode(mask_KB: Tensor) -> tuple[Tensor, Tensor]:
    """Divide each client's images of a batch into support and query set.

    Args:
        mask_KB: which rows are images.

    Returns:
        Two masks (K, B): the first half of the images, rounded down, and the others. A single image
        is in both.
    """
    place_KB = mask_KB.cumsum(-1)
    half_K1 = mask_KB.sum(-1, keepdim=True) // 2
    first_KB = mask_KB & (place_KB <= half_K1.clamp(min=1))
    return first_KB, mask_KB & (place_KB > half_K1)
