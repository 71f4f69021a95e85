"""FedMGP: groups of paired text and visual prompts, of which a sampled few are averaged.

Source: FedMGP: Personalized Federated Learning with Multi-Group Text-Visual Prompts (Bo et al.,
NeurIPS 2025, arXiv 2511.00480); public code https://github.com/weihao-bo/FedMGP. Each client has G
groups of a text prompt P_g and a visual prompt V_g; with f_g, t_gc the normalised features:

    z_g = s * f_g . t_gc        L = mean_g CE(z_g) + weight * diversity        predict mean_g z_g

Diversity is the mean over text and image features of the mean over pairs of groups (and over
classes or images) of their cosine, or of minus their L1 (per number) or L2 distance.

At the end of a round a client samples S groups without replacement, text and visual separately,
with probabilities softmax(max_r cos(group, global group r) / temperature); in the first round
uniformly. The r-th sampled group is uploaded as r-th global group, 5,120 numbers on ViT-B/16, and
averaged with equal weights. The average then replaces the sampled group in the client's model and
is trained further. The other groups stay on the client. The global model is the S global groups.
The first tokens of the start words are learned, the others stay in the text (MaPLe's convention).

How we differ: the public loss takes the absolute value of a negative diversity term, and its cosine
form is 1 - cos, so in every form minimising it pulls groups together; ours pushes them apart, as
the paper says. The released config's loss is `diversity=l1 diversity_weight=-1`. A client that
joins late starts with the global groups in its first S places; in the public code it starts from
the initial values. A client that was not sampled for some rounds continues from the newest global
groups; in the public code it continues from those of its own last round. Text and visual choices
share their random numbers, as there.

The released code averages visual prompts, but stores them under the name `visual.VPT`, which its
model does not have (`image_encoder.VPT`), and its loader skips unknown names. So no client ever
receives an average or its own visual prompts back: whoever trains continues with those of the
client before it. Ours are stored, averaged and sent back as the paper says. One optimiser serves
all clients and rounds there; our momentum starts at zero in each round (docs/concepts.md, "Momentum
between rounds").

Shape suffixes: K clients, G groups, S sampled groups, M tokens, B images, C classes, D joint
embedding, w width of a tower.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.vision_tower import VisionTower
from fedprompt.config.fields import option
from fedprompt.config.search import log_range
from fedprompt.data.features.inputs import Inputs
from fedprompt.errors import UserError
from fedprompt.methods.base import (
    UNIFORM_AVERAGE,
    Batch,
    Method,
    MethodConfig,
    RoundInfo,
    Task,
    Tensors,
)
from fedprompt.methods.parts.deep_prompts import split_words
from fedprompt.methods.parts.losses import cosine_logits, cross_entropy, masked_mean
from fedprompt.methods.parts.prompts import PromptSource
from fedprompt.rng import normal

KINDS = ("text", "visual")


@dataclass(frozen=True)
class FedMGPConfig(MethodConfig):
    """Defaults: the public config, but for the form of diversity (the paper's)."""

    default_strategy = UNIFORM_AVERAGE

    groups: int = option(5, "groups G", ge=1)
    uploaded_groups: int = option(2, "groups S that are sampled and averaged", ge=1)
    text_tokens: int = option(2, "tokens of a text prompt", ge=1)
    visual_tokens: int = option(2, "tokens of a visual prompt", ge=1)
    context_init: str | None = option("a photo of a", "start words; those after the tokens stay")
    word_noise: float = option(0.01, "standard deviation added to start words, by group", ge=0)
    init_std: float = option(0.02, "standard deviation of random starts", gt=0)
    temperature: float = option(1.0, "temperature of the sampling", gt=0, search=log_range(0.1, 5))
    diversity: Literal["cosine", "l1", "l2"] = option("cosine", "what makes groups differ")
    diversity_weight: float = option(
        1.0, "its weight; negative pulls groups together", search=log_range(0.05, 5)
    )

    def check(self) -> None:
        """Refuse to upload more groups than there are."""
        if self.uploaded_groups > self.groups:
            raise UserError(f"'uploaded_groups' is {self.uploaded_groups} of {self.groups} groups.")


class FedMGP(Method):
    """`text` and `visual`: all groups private, the sampled ones shared."""

    name = "fedmgp"
    source = "Bo et al., NeurIPS 2025"
    Config = FedMGPConfig
    needs = frozenset({"features", "pixels"})
    frozen = frozenset({"private.slots.text", "private.slots.visual"})
    images_at_once = 256

    def __init__(self, config: FedMGPConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config
        self.vision = VisionTower(clip)
        words, rest = config.context_init, ""
        if words:
            words, rest = split_words(clip, words, config.text_tokens)
        names = tuple(f"{rest} {name}".strip() for name in task.class_names)
        self.prompts = PromptSource(
            clip, Task(names), config.text_tokens, init_text=words, init_std=config.init_std
        )

    def init_shared(self, seed: int) -> Tensors:
        """`text` (S, M, w) and `visual` (S, M, w): the first S groups."""
        # Cloned, so that shared and private tensors never share memory.
        return {n: t[: self.cfg.uploaded_groups].clone() for n, t in self._start(seed).items()}

    def init_private(self, seed: int, client: int) -> Tensors:
        """`text` and `visual` (G, M, w), the same for all, and `slots.` (S,) of the shared ones."""
        slots = torch.arange(float(self.cfg.uploaded_groups))
        return self._start(seed) | {f"slots.{kind}": slots.clone() for kind in KINDS}

    def _start(self, seed: int) -> Tensors:
        texts, visuals = [], []
        for g in range(self.cfg.groups):
            text = self.prompts.start(seed, "init", "text", g)
            if self.prompts.init_text:
                text = text + normal(
                    tuple(text.shape), self.cfg.word_noise, seed, "init", "words", g
                )
            texts.append(text)
            shape = (self.cfg.visual_tokens, self.vision.width)
            visuals.append(normal(shape, self.cfg.init_std, seed, "init", "visual", g))
        return {"text": torch.stack(texts), "visual": torch.stack(visuals)}

    def end_round(
        self, shared: Tensors, private: Tensors, round_info: RoundInfo
    ) -> tuple[Tensors, Tensors]:
        """Sample the groups to upload; the client stores all of its groups."""
        stored, uploaded = dict(private), {}
        for kind in KINDS:
            groups_KGMw = _placed(kind, shared, private)
            # Compared with the global groups as received, not as trained since.
            slots_KS = self._sample(groups_KGMw, round_info.received[kind], round_info)
            uploaded[kind] = groups_KGMw.gather(1, _index(slots_KS, groups_KGMw))
            stored |= {kind: groups_KGMw, f"slots.{kind}": slots_KS.to(groups_KGMw)}
        return shared | uploaded, stored

    def _sample(self, groups_KGMw: Tensor, global_KSMw: Tensor, round_info: RoundInfo) -> Tensor:
        """Indices (K, S) of the sampled groups, in the order in which they are drawn.

        The S largest of scores plus Gumbel noise are distributed as S draws without replacement
        from the softmax of the scores.

        Args:
            groups_KGMw: all groups of each client.
            global_KSMw: the global groups that were received.
            round_info: the round, which keys the draw.
        """
        scores_KG = self.similarities(groups_KGMw, global_KSMw) / self.cfg.temperature
        if round_info.server_round == 1:
            scores_KG = torch.zeros_like(scores_KG)
        # Text and visual choices share this draw, as in the public code. U[0, 1) contains 0, whose
        # logarithm is not finite.
        draw_KG = round_info.uniform((self.cfg.groups,), "groups").clamp(min=1e-20)
        keys_KG = scores_KG - (-draw_KG.log()).log()
        return keys_KG.topk(self.cfg.uploaded_groups, dim=-1).indices

    @staticmethod
    def similarities(groups_KGMw: Tensor, global_KSMw: Tensor) -> Tensor:
        """Cosine (K, G) of each group with the most similar global group."""
        groups, references = (F.normalize(t.flatten(2), dim=-1) for t in (groups_KGMw, global_KSMw))
        return (groups @ references.transpose(-1, -2)).amax(-1)

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """`texts` (K, G, C, D) and `visual` (K, G, M, w); the global model's G is S."""
        groups = (
            {kind: shared[kind] for kind in KINDS}
            if private is None
            else {kind: _placed(kind, shared, private) for kind in KINDS}
        )
        return {"texts": self.prompts.classes(groups["text"]), "visual": groups["visual"]}

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """The mean of the groups' logits (K, B, C)."""
        return torch.stack(self._of_groups(encoded, inputs)[0]).mean(0)

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        """`ce`, the mean over groups, and `diversity`, each (K,) and weighted."""
        # L = mean_g CE(z_g): the loss of each group, not of the mean of their logits.
        logits, images = self._of_groups(encoded, batch.inputs)
        loss_terms = {"ce": torch.stack([cross_entropy(z_KBC, batch) for z_KBC in logits]).mean(0)}
        if self.cfg.groups > 1 and self.cfg.diversity_weight != 0:
            texts_K = _pairwise(self.cfg.diversity, list(encoded["texts"].unbind(1))).mean(-1)
            images_K = masked_mean(_pairwise(self.cfg.diversity, images), batch.mask_KB)
            loss_terms["diversity"] = self.cfg.diversity_weight * (texts_K + images_K) / 2
        return loss_terms

    def _of_groups(self, encoded: Tensors, inputs: Inputs) -> tuple[list[Tensor], list[Tensor]]:
        """Each group's logits (K, B, C) and normalised image features (K, B, D)."""
        assert inputs.pixels is not None
        logits, images = [], []
        # Each group has its own pass through the image tower; image g meets text g only.
        for text_KCD, visual_KMw in zip(
            encoded["texts"].unbind(1), encoded["visual"].unbind(1), strict=True
        ):
            image_KBD = F.normalize(self.vision(inputs.pixels, visual_KMw), dim=-1)
            images.append(image_KBD)
            logits.append(cosine_logits(self.clip, image_KBD, text_KCD))
        return logits, images


def _placed(kind: str, shared: Tensors, private: Tensors) -> Tensor:
    """A client's groups (K, G, M, w), with the shared ones in their slots.

    Args:
        kind: `text` or `visual`.
        shared: shared tensors, (K, ...) or (1, ...).
        private: private tensors, (K, ...).
    """
    groups_KGMw, slots_KS = private[kind], private[f"slots.{kind}"].long()
    index = _index(slots_KS, groups_KGMw)
    return groups_KGMw.scatter(1, index, shared[kind].expand(index.shape))


def _index(slots_KS: Tensor, groups_KGMw: Tensor) -> Tensor:
    """`slots` as an index (K, S, M, w) into the groups."""
    return slots_KS[:, :, None, None].expand(-1, -1, *groups_KGMw.shape[2:])


def _pairwise(form: str, groups: list[Tensor]) -> Tensor:
    """Similarity of groups of normalised features (K, N, D): mean over pairs, (K, N)."""
    pairs = []
    for a, b in combinations(groups, 2):
        if form == "cosine":
            pairs.append((a * b).sum(-1))
        elif form == "l1":
            pairs.append(-(a - b).abs().mean(-1))
        else:
            # The gradient of the square root is not finite at 0, where two groups agree.
            pairs.append(-((a - b).square().sum(-1) + 1e-8).sqrt())
    return torch.stack(pairs).mean(0)
