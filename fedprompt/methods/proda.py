"""ProDA: many contexts, whose class features form a Gaussian distribution.

Source: Prompt Distribution Learning (Lu et al., CVPR 2022, arXiv 2205.03340). P contexts give each
class P feature vectors t_c^p, of mean m_c and spread a_c^p = t_c^p - m_c. The expected loss over
Gaussian class features is bounded by a cross-entropy with larger logits,

    z_ic = s <v_i, m_c> + (s^2 / 2) sum_d v_id^2 (1 / (P + 1)) sum_p (a_yd^p - a_cd^p)^2,

with y the label of image i and s = exp(logit_scale). In training, P counts only the contexts of the
step; covariances between dimensions d are dropped. A second term keeps contexts apart: the mean
|cosine| between their text features without any class name, `[SOS][context].`, times
`orthogonality`. Prediction uses s <v, m_c> over all P contexts, where m_c is not normalised again.

RECONSTRUCTED: the authors announced their code, but their repository contains only a README. The
formulae are those of three public ports, which agree exactly (one is FLIP's,
`flcore/models/clip/ProDA.py`); so are 32 contexts of 16 tokens, a quarter with the class name in
front, a quarter with it in the middle, the rest with it at the end. A step takes the next 4 of a
random order of the 32, and the orthogonality of all of them. The weight is 0.1 in one port and 1 in
FLIP's.

How we differ: all clients of a round take the contexts in the same order, drawn again each round,
so that clients with the same number of steps have trained the same ones. FLIP's port builds no
prompt with the name in front or in the middle. Another port omits the orthogonality from its loss
and does not turn the underscores of class names into spaces.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from fedprompt.methods.base import Batch, Method, Task, Tensors
from fedprompt.methods.parts.labels import one_hot
from fedprompt.methods.parts.losses import cosine_logits, cross_entropy
from fedprompt.methods.parts.prompts import PromptSource, RandomPromptConfig
from fedprompt.rng import generator


@dataclass(frozen=True)
class ProDAConfig(RandomPromptConfig):
    """Defaults: 32 contexts of 16 tokens, 4 of them per step."""

    supports_image_noise = True

    contexts: int = option(32, "contexts P", ge=1)
    contexts_per_step: int = option(4, "contexts that a step trains", ge=1)
    context_tokens: int = option(16, "tokens M of each context", ge=1)
    orthogonality: float = option(
        0.1, "weight of the contexts' orthogonality", ge=0, search=log_range(0.01, 1)
    )

    def check(self) -> None:
        """A round of steps takes every context once."""
        if self.contexts % self.contexts_per_step:
            raise UserError(
                f"'contexts' is {self.contexts}; it must be a multiple of contexts_per_step, "
                f"{self.contexts_per_step}."
            )


class ProDA(Method):
    """P shared contexts; nothing private."""

    name = "proda"
    source = "Lu et al., CVPR 2022 (reconstructed)"
    Config = ProDAConfig

    def __init__(self, config: ProDAConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config
        tokens, quarter = config.context_tokens, config.contexts // 4
        self.prompts = {
            position: PromptSource(clip, task, tokens, position=position, init_std=config.init_std)
            for position in ("end", "middle", "front")
        }
        # The rest of a division by 4 also gets the name at the end.
        at_the_end = config.contexts - 2 * quarter
        self.positions = ["front"] * quarter + ["middle"] * quarter + ["end"] * at_the_end
        # `[SOS][context].` without a class name, for the orthogonality.
        pairs_PP = ~torch.eye(config.contexts, dtype=torch.bool)
        # As indices: with a mask, the host would wait for the number of its entries.
        self.pairs_R = pairs_PP.flatten().nonzero().flatten().to(clip.device)
        self.nameless = TextTower(clip, [""], tokens)

    def init_shared(self, seed: int) -> Tensors:
        """`ctx` (P, M, d)."""
        starts = [
            self.prompts[position].start(seed, "init", "shared", p)
            for p, position in enumerate(self.positions)
        ]
        return {"ctx": torch.stack(starts)}

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """The mean class features (K, C, D) over all contexts.

        In training, `loss_terms` needs only a few contexts: they are passed on without being
        encoded, and `logits` computes the means when it is called.
        """
        context_KPMd = shared["ctx"]
        # Only leaves of training require a gradient.
        return {"ctx": context_KPMd} if context_KPMd.requires_grad else self._means(context_KPMd)

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Logits (K, B, C) of the mean class features."""
        means = encoded if "classes" in encoded else self._means(encoded["ctx"])
        return cosine_logits(self.clip, inputs.features, means["classes"])

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        """The bound's cross-entropy `ce` for this step's contexts, and `orthogonality` of all."""
        features_KPCD = self._features(shared["ctx"], self.step_contexts(batch))
        loss_terms = {"ce": cross_entropy(self._bound(features_KPCD, batch), batch)}
        count = self.cfg.contexts
        if count > 1:
            nameless_KPD = F.normalize(self.nameless(shared["ctx"])[..., 0, :], dim=-1)
            cosine_KPP = nameless_KPD @ nameless_KPD.transpose(-1, -2)
            # The diagonal is each context with itself, whose cosine is always 1.
            cosine_KR = cosine_KPP.flatten(1).index_select(1, self.pairs_R)
            loss_terms["orthogonality"] = self.cfg.orthogonality * cosine_KR.abs().mean(-1)
        return loss_terms

    def step_contexts(self, batch: Batch) -> list[int]:
        """The contexts that this step trains: the next ones of the round's random order."""
        size = self.cfg.contexts_per_step
        # Once all contexts have had their turn, the next turn draws a new order. The key holds no
        # client, so all clients of a round take the same contexts.
        turn, part = divmod(batch.step, self.cfg.contexts // size)
        draw = generator(batch.round_info.seed, "contexts", batch.round_info.server_round, turn)
        order: list[int] = draw.permutation(self.cfg.contexts).tolist()
        return order[part * size : (part + 1) * size]

    def _means(self, context_KPMd: Tensor) -> Tensors:
        features_KPCD = self._features(context_KPMd, range(self.cfg.contexts))
        return {"classes": features_KPCD.mean(1)}

    def _features(self, context_KPMd: Tensor, contexts: Sequence[int]) -> Tensor:
        """Class features (K, len(contexts), C, D) of some contexts, grouped by class position.

        Each position has its own text tower, so the result is not in the order of `contexts`;
        means over contexts do not depend on the order.
        """
        features = []
        for position, prompts in self.prompts.items():
            indices = [p for p in contexts if self.positions[p] == position]
            if indices:
                # Views: a list of indices would be copied to the device in every step.
                some_KPMd = torch.stack([context_KPMd[:, p] for p in indices], dim=1)
                classes_NCD = prompts.classes_of_many(some_KPMd.flatten(0, 1))
                features.append(classes_NCD.unflatten(0, some_KPMd.shape[:2]))
        return torch.cat(features, dim=1)

    def _bound(self, features_KPCD: Tensor, batch: Batch) -> Tensor:
        """The enlarged logits z_ic (K, B, C) whose cross-entropy bounds the expected loss.

        The square (a_yd - a_cd)^2 is expanded into three products, so that no tensor (K, B, C, D)
        is needed.
        """
        scale, count = self.clip.logit_scale, features_KPCD.shape[1]
        images_KBD = batch.inputs.features
        mean_KCD = features_KPCD.mean(1)
        # a_c^p = t_c^p - m_c.
        spread_KPCD = features_KPCD - mean_KCD[:, None]
        squares_KBD = images_KBD.square()
        # sum_d v_id^2 sum_p (a_cd^p)^2 for every class c, the label's own class included.
        variance_KBC = squares_KBD @ spread_KPCD.square().sum(1).transpose(-1, -2)
        label_KBC = one_hot(batch.labels_KB, mean_KCD)
        # The mixed product sum_d v_id^2 sum_p a_yd^p a_cd^p.
        own_KPBD = (label_KBC[:, None] @ spread_KPCD) * squares_KBD[:, None]
        shared_KBC = (own_KPBD @ spread_KPCD.transpose(-1, -2)).sum(1)
        own_KB1 = (variance_KBC * label_KBC).sum(-1, keepdim=True)
        # Divided by P + 1, with P the contexts of this step.
        between_KBC = (own_KB1 + variance_KBC - 2 * shared_KBC) / (count + 1)
        return cosine_logits(self.clip, images_KBD, mean_KCD) + scale**2 / 2 * between_KBC
