"""FedPGP: a global prompt, adapted by a private low-rank term, kept close to CLIP by a contrast.

Source: Harmonizing Generalization and Personalization in Federated Prompt Learning (Cui et al.,
ICML 2024, arXiv 2405.09771; code TianyuCuiOvO/FedPGP). A client's prompt is sigma + U V: sigma (M,
d) is averaged, U (M, b) and V (b, d) stay. With T the L2-normalised class features,

    L = CE(sigma + U V) + mu * L_con
    L_con = mean over classes of -log( exp(p / tau) / (exp(p / tau) + exp(n / tau)) )
    p = cos(T(0), T(sigma)),  n = cos(T(sigma), T(sigma + U V))

T(0) are the features of the un-tuned text "X X .. name.", with one X per context token; they never
change and are computed once. The contrast keeps sigma close to CLIP and the personal prompt away
from sigma; gradients flow into both sides of n. The global model is sigma alone, which the paper
does not evaluate.

Defaults are those of the base-to-new script: b = 8, mu = 0.5 (4 and 1 on the command line), tau =
0.5. All clients start from the same U and V, as in the public code.

How we differ: the script asks for two prompts, which makes the code's logits 2 C wide with labels
among the first C; we have one prompt, the code's own default. The code also encodes U V alone and
does not use it; we do not. A start from words fails in the code, so it is not offered. The public
code's first round trains all clients whatever the fraction; ours samples them. One optimiser serves
all clients and rounds there, so that momentum passes from client to client; ours starts at zero in
each round (docs/concepts.md, "Momentum between rounds"). `composition: attention` is an alternative
of ours, in which every token of sigma attends to the rows of U V (`parts/composition.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.fields import option
from fedprompt.config.search import log_range
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import Batch, Method, Task, Tensors
from fedprompt.methods.parts.composition import attended
from fedprompt.methods.parts.losses import cosine_logits
from fedprompt.methods.parts.prompts import PromptSource, RandomPromptConfig
from fedprompt.rng import normal


@dataclass(frozen=True)
class FedPGPConfig(RandomPromptConfig):
    """Defaults: the public base-to-new script's."""

    supports_image_noise = True

    bottleneck: int = option(8, "rank b of the private term", ge=1)
    mu: float = option(0.5, "weight of the contrast", ge=0, search=log_range(0.05, 5))
    temperature: float = option(
        0.5, "temperature tau of the contrast", gt=0, search=log_range(0.1, 2)
    )
    composition: Literal["sum", "attention"] = option("sum", "how sigma and U V join")
    init_std: float = option(0.02, "standard deviation of sigma's, U's and V's start", gt=0)


class FedPGP(Method):
    """`sigma` is shared; `U` and `V` are private."""

    name = "fedpgp"
    source = "Cui et al., ICML 2024"
    Config = FedPGPConfig
    multi_label = True

    def __init__(self, config: FedPGPConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config
        self.prompts = PromptSource.of(config, clip, task)

    def init_shared(self, seed: int) -> Tensors:
        """`sigma` (M, d)."""
        return {"sigma": self.prompts.start(seed, "init", "shared")}

    def init_private(self, seed: int, client: int) -> Tensors:
        """`U` (M, b) and `V` (b, d), the same for all clients."""
        cfg, width = self.cfg, self.clip.text.width
        shapes = {"U": (cfg.context_tokens, cfg.bottleneck), "V": (cfg.bottleneck, width)}
        return {n: normal(s, cfg.init_std, seed, "init", "private", n) for n, s in shapes.items()}

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """`classes` (K, C, D): of sigma + U V, or of sigma alone without private tensors."""
        context = shared["sigma"]
        if private is not None:
            # p_k = sigma + U V; a client axis of 1 of sigma broadcasts.
            own_KMd = private["U"] @ private["V"]
            crosses = self.cfg.composition == "attention"
            context = attended(context, own_KMd) if crosses else context + own_KMd
        return {"classes": self.prompts.classes(context)}

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Cosine logits (K, B, C)."""
        return cosine_logits(self.clip, inputs.features, encoded["classes"])

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        """`ce` and `contrast`, each (K,)."""
        loss_terms = self.label_loss(self.logits(encoded, batch.inputs), batch)
        if self.cfg.mu > 0:
            # The contrast costs another pass through the text tower, for sigma alone.
            loss_terms["contrast"] = self.cfg.mu * self._contrast(
                shared["sigma"], encoded["classes"]
            )
        return loss_terms

    def _contrast(self, sigma_KMd: Tensor, personal_KCD: Tensor) -> Tensor:
        """L_con (K,); -log(e^a / (e^a + e^b)) = softplus(b - a)."""
        # Nothing is detached: as in the public code, n also moves sigma and the personal prompt.
        sigma_KCD = self.prompts.classes(sigma_KMd)
        positive_KC = (self.untuned_CD * sigma_KCD).sum(-1)
        negative_KC = (sigma_KCD * personal_KCD).sum(-1)
        return F.softplus((negative_KC - positive_KC) / self.cfg.temperature).mean(-1)

    @cached_property
    def untuned_CD(self) -> Tensor:
        """T(0): class features of "X X .. name.", L2-normalised, constant."""
        tower = self.prompts.tower
        # The placeholders' ids, which are the same for all classes, so the first class serves.
        ids_M = tower.token_ids_CL[0, tower.first : tower.first + self.cfg.context_tokens]
        with torch.no_grad():
            context = self.clip.text.token_embedding(ids_M.to(self.clip.device)).float()
            return self.prompts.classes(context)
