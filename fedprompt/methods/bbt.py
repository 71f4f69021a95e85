"""BBT: a prompt tuned by forward passes alone, for clients that may query CLIP but not open it.

Sources: Black-Box Tuning for Language-Model-as-a-Service (Sun, Shao, Qian, Huang, Qiu, ICML 2022,
arXiv 2201.03514) for the prompt, a point z of few dimensions in a random linear subspace; Evolution
Strategies as a Scalable Alternative to Reinforcement Learning (Salimans et al., 2017, arXiv
1703.03864) for the search. With a fixed matrix A of draws from N(0, 1) and start words v_0,

    v = v_0 + A z / sqrt(d),     z of d = 500 numbers, zero at the start

and a step estimates the gradient of the cross-entropy L from pairs of queries at random directions
e_1 .. e_P from N(0, I):

    g = (1 / P) sum_p e_p (L(z + sigma e_p) - L(z - sigma e_p)) / (2 sigma)

which the optimiser applies as if it were a gradient. Reconstructed from the papers; no public code
was run. Shared is z, 500 numbers per upload whatever the prompt's length; A and v_0 are the same
everywhere and never sent.

How we differ: the first paper tunes language models on one machine with CMA-ES, of populations of
20. Its covariance, d^2 numbers, and its step size would be a state that outlives a client's step
and has no meaning after the server's average; an evolution strategy has none, and each of its steps
asks 2 P = 20 queries as well, on a batch. There A is scaled by the model's word embeddings and z is
of the order of one; here z has the units of a context, so that usual learning rates suit it.
`sigma` is ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.fields import option
from fedprompt.config.search import log_range
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import Batch, Method, Task, Tensors
from fedprompt.methods.parts.losses import cosine_logits
from fedprompt.methods.parts.prompts import PromptConfig, PromptSource
from fedprompt.rng import normal


@dataclass(frozen=True)
class BBTConfig(PromptConfig):
    """Defaults: the paper's 500 dimensions and 20 queries; start words and sizes are ours."""

    context_tokens: int = option(4, "context tokens M", ge=1)
    context_init: str | None = option(
        "a photo of a", "words to start from, e.g. 'a photo of a'; null = random"
    )
    dimensions: int = option(500, "numbers that are learned (d)", ge=1)
    pairs: int = option(10, "pairs of queries per step (P)", ge=1)
    sigma: float = option(
        0.05, "standard deviation of a query's change of the context", gt=0,
        search=log_range(0.002, 0.2),
    )  # fmt: skip


class BBT(Method):
    """`z` (d,) is shared; nothing is private."""

    name = "bbt"
    source = "Sun et al., ICML 2022 (reconstructed)"
    Config = BBTConfig

    def __init__(self, config: BBTConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config
        self.prompts = PromptSource.of(config, clip, task)
        # Of one seed for all runs: server, clients and later readers of `z` need the same matrix.
        self.start_Md = self.prompts.start(0, "black box", "start").to(clip.device)
        shape = (config.dimensions, self.start_Md.numel())
        std = 1 / math.sqrt(config.dimensions)
        self.projection = normal(shape, std, 0, "black box", "projection").to(clip.device)

    def init_shared(self, seed: int) -> Tensors:
        """`z` (d,), zeros."""
        return {"z": torch.zeros(self.cfg.dimensions)}

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """Class features (K, C, D), without a graph: nothing is differentiated."""
        return {"classes": self.prompts.classes(self._contexts(shared["z"].detach()))}

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Cosine logits (K, B, C)."""
        return cosine_logits(self.clip, inputs.features, encoded["classes"])

    @torch.no_grad()
    def gradients(
        self, loss_terms: dict[str, Tensor], leaves: Tensors, batch: Batch
    ) -> dict[str, Tensor | None]:
        """The estimate g (K, d) from 2 P queries; other leaves, of a wrapper, have none."""
        del loss_terms
        z_Kd, sigma = leaves["shared.z"], self.cfg.sigma
        directions_KPd = batch.normal((self.cfg.pairs, self.cfg.dimensions), "directions")
        steps_KQd = sigma * torch.cat([directions_KPd, -directions_KPd], dim=1)
        contexts = self._contexts(z_Kd[:, None] + steps_KQd).flatten(0, 1)
        classes_KQCD = self.prompts.classes_of_many(contexts).unflatten(0, steps_KQd.shape[:2])
        features_K1BD = batch.inputs.features[:, None]
        logits_KQBC = cosine_logits(self.clip, features_K1BD, classes_KQCD)
        up_KP, down_KP = _losses(logits_KQBC, batch).chunk(2, dim=1)
        slope_KP = (up_KP - down_KP) / (2 * sigma)
        estimate_Kd = (slope_KP[..., None] * directions_KPd).mean(1)
        return {name: estimate_Kd if name == "shared.z" else None for name in leaves}

    def _contexts(self, z: Tensor) -> Tensor:
        """Contexts (..., M, d) of points (..., d)."""
        change: Tensor = (z @ self.projection).unflatten(-1, self.start_Md.shape)
        return self.start_Md + change


def _losses(logits_KQBC: Tensor, batch: Batch) -> Tensor:
    """The mean cross-entropy (K, Q) of each query over the client's images."""
    labels_KQB = batch.labels_KB[:, None].expand(logits_KQBC.shape[:3])
    loss_N = F.cross_entropy(logits_KQBC.flatten(0, 2), labels_KQB.flatten(), reduction="none")
    weight_K1B = batch.mask_KB[:, None].to(loss_N.dtype)
    return (loss_N.view(labels_KQB.shape) * weight_K1B).sum(-1) / weight_K1B.sum(-1)
