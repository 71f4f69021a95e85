"""AD-CLIP: prompts made of the styles of a source and a target domain, with unlabelled clients.

Source: AD-CLIP: Adapting Domains in Prompt Space Using CLIP (Singha, Pal, Jha, Banerjee, ICCV
workshop OOD-CV 2023, arXiv 2308.05659; code mainaksingha01/AD-CLIP at c82d861). No context is
learned freely. With mu_l, sigma_l the mean and standard deviation of the image tower's tokens
behind layer l of L, w wide, s_l = (mu_l + sigma_l) / 2, and of a source and a target image

    prompt = [P_1(s_1^src) ... P_L(s_L^src)] [P_1(s_1^tgt) ... P_L(s_L^tgt)] [q q q q] [class]
    q = W [ I_l(mu_l) ]_l + b                       of the source's image, or of the target's
    L = CE(source) + KL(T^src || T^tgt) + 0.1 MSE(P(s^src), Q(s^src)) + 0.01 H(target)

P_l: Linear(w, w / 3), Linear(w / 3, d); I_l: Linear(w, d); Q_l: Linear(w, w / 2), ReLU,
Linear(w / 2, d), of each layer; W, b: Linear(L, 1). T are the class features of both prompts; the
divergence is that of their softmax over classes, per entry of the features, summed over entries and
averaged over images. Defaults are those of the code. Read in the code: the mapping Q learns from P
and P from Q; no prediction reads Q.

In a federation [I] clients with labels are sources, and those without are targets
(`partition.unlabelled_clients`). Nobody holds a pair of images, so the mean statistics of each
domain (L x 2 x w) are exchanged: clients upload those of their own images, and an image is paired
with the mean of the other domain. Until a domain has been seen, the image's own statistics take
that place. The global model reads images as the target's; a personal model as of its client's
domain. The ratio of two averages is the mean over all images of a domain, under any strategy that
averages by images.

All networks are shared, 14,575,117 numbers on ViT-B/16, with the statistics 14,611,983; `target`,
whether a client has no labels, is private. Statistics of images come from the feature cache, in the
pass that gives the features. N images cost N x C texts, twice as many in training.

How we differ, besides: without any unlabelled client the divergence is 0, and this is a conditional
prompt learner. The code's networks for ViT-L/14 have w / 2 and 5 w / 8 hidden units. Its optimiser
is Adam at 0.01, with batches of 16 images of each domain. Faults that are not reproduced: the
entropy takes probabilities that are L2-normalised over the batch; Q reads averages of neighbouring
entries of [mu; sigma] where P reads those of mu and sigma; the epoch that is best on test images is
reported. The four tokens q are equal, and b has no effect (the text tower's layer norms
take it out); we keep both.

Suffixes: K clients, B images, C classes, D joint embedding, M tokens, d text width, L layers and w
width of the image tower.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.layer_statistics import StatisticsEncoder
from fedprompt.config.fields import option
from fedprompt.config.search import Range, log_range
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import (
    UNLABELLED,
    Batch,
    ClientData,
    Method,
    MethodConfig,
    Task,
    Tensors,
)
from fedprompt.methods.parts.layerwise import (
    content,
    layerwise,
    layerwise_start,
    over_layers,
    style,
)
from fedprompt.methods.parts.linear import linear_start
from fedprompt.methods.parts.losses import labelled_cross_entropy, masked_mean, per_image_logits
from fedprompt.methods.parts.prompts import PromptSource

SOURCE, TARGET = 0, 1


@dataclass(frozen=True)
class ADCLIPConfig(MethodConfig):
    """Defaults: the code's."""

    learns_without_labels = True

    content_tokens: int = option(4, "tokens with the content of the image", ge=1)
    align_weight: float = option(
        1.0, "weight of the divergence of both domains' class features",
        ge=0, search=log_range(0.01, 10),
    )  # fmt: skip
    style_weight: float = option(
        0.1, "weight of the style mapping", ge=0, search=log_range(0.01, 1)
    )
    entropy_weight: float = option(
        0.01, "weight of the entropy of unlabelled images", ge=0, search=log_range(0.001, 1)
    )

    @property
    def lr_space(self) -> Range | None:
        """Around the code's 0.01, with Adam."""
        return log_range(0.0002, 0.1)


class ADCLIP(Method):
    """Networks `style`, `content`, `mix` and `map`, and both domains' `styles`, are shared."""

    name = "adclip"
    source = "Singha et al., ICCV workshops 2023"
    Config = ADCLIPConfig
    needs = frozenset({"features", "statistics"})
    frozen = frozenset({"shared.styles", "shared.seen", "private.target"})
    images_at_once = 256

    def __init__(self, config: ADCLIPConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config
        self.layers, _, self.width = StatisticsEncoder(clip).shape
        self.prompts = PromptSource(clip, task, 2 * self.layers + config.content_tokens)

    def init_shared(self, seed: int) -> Tensors:
        """The networks; `styles` (2, L, 2, w) and `seen` (2,) of source and target, zeros."""
        text, layers, width = self.clip.text.width, self.layers, self.width
        key = (seed, "init", "shared")
        third, half = max(1, width // 3), max(1, width // 2)
        return {
            **layerwise_start("style.0", layers, third, width, *key),
            **layerwise_start("style.1", layers, text, third, *key),
            **layerwise_start("content", layers, text, width, *key),
            **linear_start("mix", 1, layers, *key),
            **layerwise_start("map.0", layers, half, width, *key),
            **layerwise_start("map.1", layers, text, half, *key),
            "styles": torch.zeros(2, layers, 2, width),
            "seen": torch.zeros(2),
        }

    def init_private(self, seed: int, client: int) -> Tensors:
        """`target`, 1 for a client without labels."""
        return {"target": torch.zeros(1)}

    def init_private_from_data(self, private: Tensors, data: ClientData, seed: int) -> Tensors:
        """Whether the client's images are the target's."""
        return {"target": torch.full((1,), float((data.labels_N == UNLABELLED).all()))}

    def shared_from_data(self, data: ClientData) -> Tensors:
        """For source and target, the sum of the client's statistics there and their number.

        Both are divided by the number of the client's images.
        """
        statistics_NL2w = data.plain().statistics
        assert statistics_NL2w is not None
        unlabelled_N = data.labels_N.cpu() == UNLABELLED
        share_2N = torch.stack([~unlabelled_N, unlabelled_N]).double() / len(data)
        styles = torch.einsum("sn,nlmw->slmw", share_2N, statistics_NL2w.cpu().double())
        return {"styles": styles.float(), "seen": share_2N.sum(-1).float()}

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """All tensors as they are: nothing else is the same for all images."""
        return {**shared, **(private or {})}

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Cosine logits (K, B, C), each image with its own class features."""
        own = inputs.statistics
        assert own is not None
        # The global model reads images as the target's.
        seen_K = encoded["seen"][:, TARGET]
        target_K1 = encoded.get("target", torch.ones_like(seen_K)[:, None]) > 0
        source, target = self._paired(encoded, own, target_K1)
        return per_image_logits(
            self.clip, inputs.features, self._classes(encoded, source, target, own)
        )

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        """`ce` of labelled images, `align`, `style`, and `entropy` of unlabelled images."""
        own, labelled_KB = batch.inputs.statistics, batch.labelled_KB
        assert own is not None
        source, target = self._paired(encoded, own, ~labelled_KB)
        # The prompts of both domains pass through the text tower together.
        both_KBCD = self._classes(
            encoded,
            torch.cat([source, source], dim=1),
            torch.cat([target, target], dim=1),
            torch.cat([source, target], dim=1),
        )
        source_KBCD, target_KBCD = both_KBCD.chunk(2, dim=1)
        classes_KBCD = torch.where(labelled_KB[..., None, None], source_KBCD, target_KBCD)
        logits_KBC = per_image_logits(self.clip, batch.inputs.features, classes_KBCD)
        log_p = logits_KBC.log_softmax(-1)
        entropy_KB = -(log_p.exp() * log_p).sum(-1)
        log_s, log_t = (x.log_softmax(-2) for x in (source_KBCD, target_KBCD))
        apart_KB = (log_t.exp() * (log_t - log_s)).sum((-1, -2))
        mapped = layerwise(layerwise(style(source), encoded, "map.0").relu(), encoded, "map.1")
        gap_KB = (self._style(encoded, source) - mapped).square().mean((-1, -2))
        unlabelled_KB = batch.mask_KB & ~labelled_KB
        return {
            "ce": labelled_cross_entropy(logits_KBC, batch),
            "align": self.cfg.align_weight * masked_mean(apart_KB, batch.mask_KB),
            "style": self.cfg.style_weight * _mean_of_some(gap_KB, labelled_KB),
            "entropy": self.cfg.entropy_weight * _mean_of_some(entropy_KB, unlabelled_KB),
        }

    def _paired(self, encoded: Tensors, own: Tensor, target_KB: Tensor) -> tuple[Tensor, Tensor]:
        """Statistics (K, B, L, 2, w) of the source and of the target that an image stands for.

        An image stands for its own domain, the domain's mean for the other one.

        Args:
            encoded: the domains' `styles` and `seen`.
            own: the image's statistics.
            target_KB: whether images are the target's; an axis of 1 broadcasts.
        """
        styles_K2, seen_K2 = encoded["styles"], encoded["seen"]
        is_target = target_KB[..., None, None, None]

        def of(domain: int, here: Tensor) -> Tensor:
            seen_K = seen_K2[:, domain, None, None, None, None]
            # Where a domain has not been seen, 0 / 0 is avoided, and the result is not used.
            mean = styles_K2[:, None, domain] / seen_K.clamp(min=1e-30)
            return torch.where(here | (seen_K <= 0), own, mean)

        return of(SOURCE, ~is_target), of(TARGET, is_target)

    def _style(self, encoded: Tensors, statistics: Tensor) -> Tensor:
        """The style tokens (K, B, L, d)."""
        return layerwise(layerwise(style(statistics), encoded, "style.0"), encoded, "style.1")

    def _classes(self, encoded: Tensors, source: Tensor, target: Tensor, own: Tensor) -> Tensor:
        """L2-normalised class features (K, B, C, D) of prompts with the content of `own`."""
        # Clients may differ in whose domain an image is, and in nothing else.
        own = own.expand(source.shape[0], *own.shape[1:])
        content_KBLd = layerwise(content(own), encoded, "content")
        content_KBd = over_layers(content_KBLd, encoded, "mix")
        context_KBMd = torch.cat(
            [
                self._style(encoded, source),
                self._style(encoded, target),
                content_KBd[:, :, None].expand(-1, -1, self.cfg.content_tokens, -1),
            ],
            dim=2,
        )
        return self.prompts.classes_per_image(context_KBMd)


def _mean_of_some(values_KB: Tensor, chosen_KB: Tensor) -> Tensor:
    """The mean (K,) over the chosen images; 0 where there are none."""
    weight_KB = chosen_KB.to(values_KB.dtype)
    return (values_KB * weight_KB).sum(-1) / weight_KB.sum(-1).clamp(min=1)
