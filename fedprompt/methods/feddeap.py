"""FedDEAP: a global and a local half of the context, tied to fixed directions of class and domain.

Source: FedDEAP: Adaptive Dual-Prompt Tuning for Multi-Domain Federated Learning (Zheng, Yeung, Xia,
Ju, Tang, Qiu, Rajapakse, ACM MM 2025, arXiv 2510.18837); public code zyb98/FedDEAP. G and L
(C, M, d) are the global and the local context, v image features before they are normalised, m their
mean over a batch, t the class features of [G, L m] before they are normalised. S and D are networks
512-256-512 with a ReLU, E_s (D_v, C) and E_d (D_v, number of domains) fixed bases whose columns
form a simplex (equiangular tight frames), and norm(x) E are logits:

    G, S, D learn:  CE(v, t) + CE(S(v) E_s, class) + CE(D(v) E_d, domain)
                    + lambda CE(S(t) E_s, class)
    L learns:       CE(v, t) + sigma CE(D(t) E_d, domain)

Shared: G, S, D; all clients count the same. Private: L, which domain a client has
(`parts/domains.py`), and the mean of its training features. The bases follow from the config, are
the same in all runs and never sent. There is no global model: without L half of the context is
missing, and the code tests clients only.

How we differ: in the code, S and D see the text features under `no_grad`, so that the terms of
lambda and sigma are numbers without any gradient, and nothing ties the prompts to the bases; here
they train the prompts, through networks that these terms do not train, which learn from images, as
is their purpose. The code's m is that of the batch in tests as well, so that a prediction depends
on the other images; here m is the batch's in training and the client's mean in tests. L m takes d
numbers of m: on ViT-B d and D_v are equal, elsewhere m is interpolated to d numbers, which is ours.
Its images of PACS and Office are normalised with the numbers of ImageNet; ours with CLIP's. Both
steps of a batch start from the same values; the code moves G, S and D first, and L by a gradient of
the values before.
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
from fedprompt.errors import UserError
from fedprompt.methods.base import UNIFORM_AVERAGE, Batch, ClientData, Method, Task, Tensors
from fedprompt.methods.parts.adapters import raw_features
from fedprompt.methods.parts.domains import DOMAIN, domain_cross_entropy, own_domain
from fedprompt.methods.parts.linear import linear, linear_start
from fedprompt.methods.parts.losses import cosine_logits, cross_entropy
from fedprompt.methods.parts.prompts import RandomPromptConfig
from fedprompt.rng import normal

SEMANTIC, DOMAINS = "semantic", "domains"
"""Prefixes of the two networks' tensors."""


@dataclass(frozen=True)
class FedDEAPConfig(RandomPromptConfig):
    """Defaults of the code: 16 + 16 tokens, lambda = sigma = 1."""

    default_strategy = UNIFORM_AVERAGE

    context_tokens: int = option(16, "tokens M of each half of the context", ge=1)
    domains: int = option(4, "domains; client k has number k modulo them", ge=2)
    hidden: int = option(256, "width of the networks' hidden layer", ge=1)
    class_weight: float = option(
        1.0, "weight lambda of the classes of text features", ge=0, search=log_range(0.1, 5)
    )
    domain_weight: float = option(
        1.0, "weight sigma of the domain of text features", ge=0, search=log_range(0.1, 5)
    )


class FedDEAP(Method):
    """`ctx` (C, M, d) and two networks are shared; `ctx`, `domain` and `mean` are private."""

    name = "feddeap"
    source = "Zheng et al., ACM MM 2025"
    Config = FedDEAPConfig
    has_global = False
    frozen = frozenset({f"private.{DOMAIN}", "private.mean"})
    no_transfer_reason = "each context belongs to the class that it was trained for"

    def __init__(self, config: FedDEAPConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg, self.domains = config, config.domains
        classes, width = len(task.class_names), clip.embed_dim
        for what, count in (("classes", classes), ("domains", config.domains)):
            if count > width:
                raise UserError(
                    f"feddeap: {count} {what} have no frame among the {width} numbers of a feature "
                    f"of {clip.name}; there can be at most {width}."
                )
        self.tower = TextTower(
            clip, task.class_names, 2 * config.context_tokens, class_specific=True
        )
        self.class_frame = frame(width, classes, "classes").to(clip.device)
        self.domain_frame = frame(width, config.domains, "domains").to(clip.device)

    def init_shared(self, seed: int) -> Tensors:
        """`ctx` from N(0, init_std^2), and the networks as torch.nn.Linear starts."""
        outer, inner = self.clip.embed_dim, self.cfg.hidden
        shared = {"ctx": self._context(seed, "shared")}
        for net in (SEMANTIC, DOMAINS):
            shared |= linear_start(f"{net}.linear1", inner, outer, seed, "init", "shared")
            shared |= linear_start(f"{net}.linear2", outer, inner, seed, "init", "shared")
        return shared

    def init_private(self, seed: int, client: int) -> Tensors:
        """`ctx` (C, M, d), the same for all clients; `domain` and `mean`, which are not trained."""
        return {
            "ctx": self._context(seed, "private"),
            DOMAIN: own_domain(client, self.cfg.domains),
            "mean": torch.zeros(self.clip.embed_dim),
        }

    def init_private_from_data(self, private: Tensors, data: ClientData, seed: int) -> Tensors:
        """`mean`: the mean of the client's training features, before they are normalised."""
        return {**private, "mean": raw_features(data.plain()).mean(0)}

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """Class features (K, C, D_v) with the clients' mean features.

        In training, which alone has leaves that require a gradient, class features depend on the
        batch, and there is nothing to encode.
        """
        assert private is not None
        if any(t.requires_grad for t in (*shared.values(), *private.values())):
            return {}
        return {"classes": F.normalize(self._texts(shared, private, private["mean"]), dim=-1)}

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Cosine logits (K, B, C)."""
        return cosine_logits(self.clip, inputs.features, encoded["classes"])

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        """`ce`, `semantic` and `domain` of images, `text_semantic` and `text_domain`, each (K,)."""
        raw_KBD = raw_features(batch.inputs)
        share_KB = batch.mask_KB / batch.mask_KB.sum(1, keepdim=True)
        texts_KCD = self._texts(shared, private, (share_KB[..., None] * raw_KBD).sum(1))
        classes = {"classes": F.normalize(texts_KCD, dim=-1)}
        fixed = {n: t.detach() for n, t in shared.items()}
        own_KD = private[DOMAIN]
        of_class_KCC = self._scores(fixed, SEMANTIC, texts_KCD, self.class_frame)
        of_domain_KCD = self._scores(fixed, DOMAINS, texts_KCD, self.domain_frame)
        text_semantic_K = -of_class_KCC.log_softmax(-1).diagonal(dim1=-2, dim2=-1).mean(-1)
        text_domain_K = -(of_domain_KCD.log_softmax(-1) * own_KD[:, None]).sum(-1).mean(-1)
        semantic_KBC = self._scores(shared, SEMANTIC, raw_KBD, self.class_frame)
        domain_KBD = self._scores(shared, DOMAINS, raw_KBD, self.domain_frame)
        return {
            "ce": cross_entropy(self.logits(classes, batch.inputs), batch),
            "semantic": cross_entropy(semantic_KBC, batch),
            "domain": domain_cross_entropy(domain_KBD, own_KD, batch),
            "text_semantic": self.cfg.class_weight * text_semantic_K,
            "text_domain": self.cfg.domain_weight * text_domain_K,
        }

    def gradients(
        self, loss_terms: dict[str, Tensor], leaves: Tensors, batch: Batch
    ) -> dict[str, Tensor | None]:
        """Those of all terms but `text_domain` for shared tensors, but `text_semantic` for L."""
        local = {n: t for n, t in leaves.items() if n.startswith("private.")}
        common = {n: t for n, t in leaves.items() if n not in local}
        found: dict[str, Tensor | None] = {}
        for some, other in ((common, "text_domain"), (local, "text_semantic")):
            terms = [t for n, t in loss_terms.items() if n != other]
            ones = [torch.ones_like(t) for t in terms]
            # The first of the two passes must leave the graph to the second.
            gradients = torch.autograd.grad(
                terms, list(some.values()), ones, retain_graph=some is common, allow_unused=True
            )
            found |= dict(zip(some, gradients, strict=True))
        return {name: found[name] for name in leaves}

    def _context(self, seed: int, whose: str) -> Tensor:
        shape = (len(self.task.class_names), self.cfg.context_tokens, self.clip.text.width)
        return normal(shape, self.cfg.init_std, seed, "init", whose)

    def _texts(self, shared: Tensors, private: Tensors, mean_KD: Tensor) -> Tensor:
        """Class features (K, C, D_v) of [G, L m], not normalised."""
        width = self.clip.text.width
        if mean_KD.shape[-1] != width:
            mean_KD = F.interpolate(mean_KD[:, None], width, mode="linear")[:, 0]
        local_KCMd = private["ctx"] * mean_KD[:, None, None]
        clients = max(len(shared["ctx"]), len(local_KCMd))
        halves = [t.expand(clients, -1, -1, -1) for t in (shared["ctx"], local_KCMd)]
        return self.tower(torch.cat(halves, dim=2))

    @staticmethod
    def _scores(tensors: Tensors, net: str, x_KND: Tensor, frame_DF: Tensor) -> Tensor:
        """Cosines (K, N, F) of a network's outputs with the columns of a frame."""
        first, second = (f"{net}.linear{i}" for i in (1, 2))
        hidden = F.relu(linear(x_KND, tensors[f"{first}.weight"], tensors[f"{first}.bias"]))
        out = linear(hidden, tensors[f"{second}.weight"], tensors[f"{second}.bias"])
        return F.normalize(out, dim=-1) @ frame_DF


def frame(width: int, count: int, what: str) -> Tensor:
    """A simplex equiangular tight frame (width, count): unit columns at equal, obtuse angles.

    Args:
        width: dimensions; at least `count`.
        count: columns.
        what: what the columns stand for; it keys the draw.
    """
    basis, _ = torch.linalg.qr(normal((width, count), 1.0, 0, "feddeap", what))
    centred = basis - basis.mean(dim=1, keepdim=True)
    return F.normalize(centred, dim=0)
