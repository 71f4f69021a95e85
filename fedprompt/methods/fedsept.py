"""FedSEPT: prompt experts in a public subspace, a private residual and a private router.

Source: Towards Privacy-Preserving Federated Prompt Tuning under Data Heterogeneity: A
Subspace-Decomposed Expert Approach (ACM MM 2026; public code yuCoryx/FedSEPT at d2fc0a4, from which
the formulae are read). With a public basis B_0 (r, d), which is drawn once and never trained, the
context of expert e and its class features are

    ctx_e = A_e B_0 + R        t_ec = normalise(f(ctx_e, c))

and the router weighs the experts for each image v:

    h = LN(W_o (W_v v + b_v) + b_o)        pi = softmax(W_h h + b_h)
    logits_c = exp(logit_scale) sum_e pi_e v . t_ec
    L = CE + lambda_div mean_{e != e'} cos(A_e, A_e')^2

What is shared: the A_e, (E, M, r), averaged: 1,024 numbers at the defaults. What is kept: R, which
starts at zero, and the router. The global model has no residual and weighs all experts equally.

How we differ: the router of the public code is an attention with a learned query over tokens, of
which there is one, the image feature. A softmax over one token is 1, so that the query and the keys
have no effect and no gradient; what remains are the lines above. In training the code also drops
the attention of a head, and with it a part of h, with probability 0.1; we do not. B_0 is drawn from
a seed that all runs share, so that every reader of A knows it; the code draws it from the run's.
The router starts from one draw on all clients. The README speaks of lambda_gate, which no line of
the code has. From the default start, contexts near zero, the residual learns what the experts do
not: on the embedded scenes the global model's test loss does not fall within eight rounds, while
from `init_std=0.2` it does (tests/methods/test_learning.py). By default the code clips the gradient
of each image with respect to the A_e and adds noise to it, while R and the router are trained
without: since the gradients of A_e depend on R, what is uploaded is not differentially private.
`privacy.image_noise` adds noise to the gradients of all of them together.
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
from fedprompt.methods.parts.linear import layer_norm, linear, linear_start, uniform_start
from fedprompt.methods.parts.losses import cross_entropy, mixed_logits
from fedprompt.methods.parts.prompts import PromptSource, RandomPromptConfig
from fedprompt.rng import normal

ROUTER = "router."


@dataclass(frozen=True)
class FedSEPTConfig(RandomPromptConfig):
    """Defaults: the public code's."""

    supports_image_noise = True

    experts: int = option(4, "prompt experts E", ge=1)
    rank: int = option(16, "rank r of the public basis", ge=1)
    diversity: float = option(
        10.0,
        "weight of the experts' squared cosines (lambda_div)",
        ge=0,
        search=log_range(0.1, 100),
    )


class FedSEPT(Method):
    """`experts` (E, M, r) is shared; `residual` (M, d) and the router are private."""

    name = "fedsept"
    source = "FedSEPT, ACM MM 2026"
    Config = FedSEPTConfig
    images_at_once = 1024

    def __init__(self, config: FedSEPTConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config
        self.prompts = PromptSource.of(config, clip, task)
        # Of one seed for all runs: clients, the server and later readers need the same basis.
        shape = (config.rank, clip.text.width)
        self.basis_rd = normal(shape, config.init_std, 0, "fedsept", "basis").to(clip.device)

    def init_shared(self, seed: int) -> Tensors:
        """`experts` (E, M, r)."""
        shape = (self.cfg.experts, self.cfg.context_tokens, self.cfg.rank)
        return {"experts": normal(shape, self.cfg.init_std, seed, "init", "shared")}

    def init_private(self, seed: int, client: int) -> Tensors:
        """`residual` (M, d), zeros; the router's layers, the same for all clients."""
        width = self.clip.embed_dim
        residual = torch.zeros(self.cfg.context_tokens, self.clip.text.width)
        if self.cfg.experts == 1:
            return {"residual": residual}
        key = (seed, "init", "router")
        return {
            "residual": residual,
            # As torch's attention starts the three projections together.
            f"{ROUTER}value.weight": uniform_start(
                (width, width), math.sqrt(6 / (4 * width)), *key, "value"
            ),
            f"{ROUTER}value.bias": torch.zeros(width),
            **linear_start(f"{ROUTER}out", width, width, *key, bias=False),
            f"{ROUTER}out.bias": torch.zeros(width),
            f"{ROUTER}norm.weight": torch.ones(width),
            f"{ROUTER}norm.bias": torch.zeros(width),
            f"{ROUTER}head.weight": normal((self.cfg.experts, width), 0.01, *key, "head"),
            f"{ROUTER}head.bias": torch.zeros(self.cfg.experts),
        }

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """`experts`: class features (K, E, C, D); and the router, if there is one."""
        context_KEMd = shared["experts"] @ self.basis_rd
        if private is None:
            return {"experts": self.prompts.classes(context_KEMd)}
        context_KEMd = context_KEMd + private["residual"][:, None]
        router = {n: t for n, t in private.items() if n.startswith(ROUTER)}
        return {"experts": self.prompts.classes(context_KEMd), **router}

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Cosine logits (K, B, C), mixed by the router's weights for each image."""
        v_KBD = inputs.features
        if f"{ROUTER}head.weight" in encoded:
            weight_KBE = self._weights(encoded, v_KBD)
        else:
            weight_KBE = v_KBD.new_full((1, 1, self.cfg.experts), 1 / self.cfg.experts)
        return mixed_logits(self.clip, v_KBD, encoded["experts"], weight_KBE)

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        """Cross-entropy `ce`, and `diversity`, the experts' squared cosines."""
        terms = {"ce": cross_entropy(self.logits(encoded, batch.inputs), batch)}
        if self.cfg.experts > 1:
            flat_KEn = F.normalize(shared["experts"].flatten(2), dim=-1)
            square_KEE = (flat_KEn @ flat_KEn.transpose(-1, -2)).square()
            others = self.cfg.experts * (self.cfg.experts - 1)
            off_K = square_KEE.sum((-2, -1)) - square_KEE.diagonal(dim1=-2, dim2=-1).sum(-1)
            terms["diversity"] = self.cfg.diversity * off_K / others
        return terms

    def _weights(self, router: Tensors, v_KBD: Tensor) -> Tensor:
        """pi (K, B, E)."""
        layers = {n.removeprefix(ROUTER): t for n, t in router.items()}
        value = linear(v_KBD, layers["value.weight"], layers["value.bias"])
        route = linear(value, layers["out.weight"], layers["out.bias"])
        route = layer_norm(route, layers["norm.weight"], layers["norm.bias"])
        return linear(route, layers["head.weight"], layers["head.bias"]).softmax(-1)

    def class_embeddings(self, encoded: Tensors) -> Tensor | None:
        """The mean of the experts (C, D) without a router; None with one."""
        if f"{ROUTER}head.weight" in encoded:
            return None
        mean_CD: Tensor = encoded["experts"][0].mean(0)
        return mean_CD
