"""FedAPT: one meta prompt, a fixed key per domain, and a network that tells the domain of an image.

Source: Federated Adaptive Prompt Tuning for Multi-Domain Collaborative Learning (Su, Yang, Li, Xue,
AAAI 2024, arXiv 2211.07864); public code leondada/FedAPT. P (C, M, d) is the class-specific meta
prompt, K_i (M, d) the key of domain i, from U[0, 1) and never trained, v the image feature before
it is normalised and Q (D, D_v) the network:

    client of domain i:  prompt = P (1 + K_i)        L = CE(class) + CE(Q v, i)
    global model:        w = softmax(standardised(Q v) / tau)
                         prompt(x) = P (1 + sum_i w_i K_i)

Standardised means: minus the mean and divided by the standard deviation over the domains. Shared: P
and Q, C M d + D D_v numbers; all clients count the same. Private: only which domain a client has
(`parts/domains.py`), which is its number and not trained. Keys follow from the config, are the same
in all runs and never sent.

The global model has a text of its own for each image, as CoCoOp: N images cost N x C text
sequences. In tests, a client that knows its domain uses its own key, which costs C; the paper tests
the global model on all domains.

How we differ: the code trains in half precision; ours in float32. Its option `--learning_rate` has
no effect, because the optimiser is always given 0.01, which is the paper's rate too; weight decay
is 1e-5 there. `domains` must be told: the code counts the folders that it reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.text_tower import TextTower
from fedprompt.config.fields import option
from fedprompt.config.search import log_range
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import UNIFORM_AVERAGE, Batch, Method, Task, Tensors
from fedprompt.methods.parts.adapters import raw_features
from fedprompt.methods.parts.domains import DOMAIN, domain_cross_entropy, own_domain
from fedprompt.methods.parts.linear import linear, linear_start
from fedprompt.methods.parts.losses import cosine_logits, cross_entropy, per_image_logits
from fedprompt.methods.parts.prompts import POSITIONS_AT_ONCE, RandomPromptConfig
from fedprompt.rng import normal, uniform


@dataclass(frozen=True)
class FedAPTConfig(RandomPromptConfig):
    """Defaults of the code."""

    supports_image_noise = True
    default_strategy = UNIFORM_AVERAGE

    context_tokens: int = option(24, "context tokens M", ge=1)
    domains: int = option(4, "domains D; client k has number k modulo D", ge=2)
    tau: float = option(
        0.01, "temperature of the weights; towards 0, one key", gt=0, search=log_range(0.005, 1)
    )


class FedAPT(Method):
    """`ctx` (C, M, d) and `query.weight` (D, D_v) are shared; `domain` (D,) is private."""

    name = "fedapt"
    source = "Su et al., AAAI 2024"
    Config = FedAPTConfig
    frozen = frozenset({f"private.{DOMAIN}"})
    no_transfer_reason = "each context belongs to the class that it was trained for"
    images_at_once = 256

    def __init__(self, config: FedAPTConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg, self.domains = config, config.domains
        tokens, width = config.context_tokens, clip.text.width
        self.tower = TextTower(clip, task.class_names, tokens, class_specific=True)
        # Of one seed for all runs: server, clients and later readers need the same keys.
        keys_DMd = uniform((config.domains, tokens, width), 0, "fedapt", "keys")
        self.keys_DMd = keys_DMd.to(clip.device)
        self.prompts_at_once = max(1, POSITIONS_AT_ONCE // self.tower.positions)

    def init_shared(self, seed: int) -> Tensors:
        """`ctx` from N(0, init_std^2), and `query.weight` as torch.nn.Linear starts."""
        shape = (len(self.task.class_names), *self.keys_DMd.shape[1:])
        query = linear_start(
            "query", self.cfg.domains, self.clip.embed_dim, seed, "init", "shared", bias=False
        )
        return {"ctx": normal(shape, self.cfg.init_std, seed, "init", "shared"), **query}

    def init_private(self, seed: int, client: int) -> Tensors:
        """`domain` (D,), which is not trained."""
        return {DOMAIN: own_domain(client, self.cfg.domains)}

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """Class features (K, C, D_v) of the clients' own keys, or the global model's tensors."""
        if private is None:
            return dict(shared)
        return {"classes": self._classes(shared["ctx"], private[DOMAIN])}

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Cosine logits (K, B, C); in the global model each image has its own class features."""
        if "classes" in encoded:
            return cosine_logits(self.clip, inputs.features, encoded["classes"])
        weights_KBD = self._weights(encoded, inputs)
        parts = weights_KBD.split(self.prompts_at_once, dim=1)
        context = encoded["ctx"][:, None]
        classes_KBCD = torch.cat([self._classes(context, part) for part in parts], dim=1)
        return per_image_logits(self.clip, inputs.features, classes_KBCD)

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        """`ce` and `domain` (K,)."""
        domains_KBD = linear(raw_features(batch.inputs), shared["query.weight"])
        return {
            "ce": cross_entropy(self.logits(encoded, batch.inputs), batch),
            "domain": domain_cross_entropy(domains_KBD, private[DOMAIN], batch),
        }

    def class_embeddings(self, encoded: Tensors) -> Tensor | None:
        """The class features of a client's own key; None for the global model."""
        return encoded["classes"][0] if "classes" in encoded else None

    def _classes(self, context: Tensor, weights: Tensor) -> Tensor:
        """Class features (..., C, D_v) of contexts (..., C, M, d) and weights of keys (..., D)."""
        keys = torch.einsum("...i,imd->...md", weights, self.keys_DMd)
        return F.normalize(self.tower(context * (1 + keys[..., None, :, :])), dim=-1)

    def _weights(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Weights of the keys (K, B, D)."""
        scores_KBD = linear(raw_features(inputs), encoded["query.weight"])
        centred_KBD = scores_KBD - scores_KBD.mean(-1, keepdim=True)
        # torch's standard deviation divides by D - 1, as in the code.
        standard_KBD = centred_KBD / scores_KBD.std(-1, keepdim=True)
        return (standard_KBD / self.cfg.tau).softmax(-1)
