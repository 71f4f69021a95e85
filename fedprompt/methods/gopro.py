"""GOPro: style and content of an image shift the context, in the same way for its views.

Source: GOPro: Generate and Optimize Prompts in CLIP using Self-Supervised Learning (Singha, Jha,
Banerjee, BMVC 2023, arXiv 2308.11605; code mainaksingha01/GOPro at e284586). With mu_l and sigma_l
the mean and standard deviation of the image tower's tokens behind layer l of L, w wide,

    v_m(x) = v_m + W [ (S_l((mu_l + sigma_l) / 2) + C_l(mu_l)) / 2 ]_l + b      for m = 1 ... M
    L = CE(x) + MSE(T(x), T(x')) + MSE(T(x), T(x'')) + 0.1 NT-Xent(g(f(x)), g(f(x')))

S_l, C_l: Linear(w, d) of every layer; W, b: Linear(L, 1); T(x): the class features with x's
context; f: the frozen image feature; g: Linear(D, D) and batch norm, used by the loss alone; the
temperature of NT-Xent is 0.1. Defaults are those of the code.

All is shared, 9,715,213 numbers on ViT-B/16; with `projectors: private`, v_m alone (2,048), and the
global model has no shift. Batch norm takes the statistics of the step's own images of the client;
since g is for training only, nothing running has to be kept or averaged. Statistics of all views
are in the feature cache, from the pass that gives the features. Like CoCoOp, N images cost N x C
texts, and twice as many in training.

How we differ: x' and x'' are MoCo v3's view and AugMix's in the paper. Ours is one further view of
`data.views`, so the two terms are one of weight 2. With one view, x' is x, and the term is 0.
Batches of one image have no negatives. The code's first epoch has the rate 1e-5, and its loader
leaves out the last partial batch of an epoch; ours does neither (docs/concepts.md, "Local
training").

Faults of the code that are not reproduced: its AugMix function returns inside its loop, so that all
images of a batch are compared with views of the first; augmentations are applied to normalised
pixels, which are cast to bytes and wrap around; MoCo's view is normalised with ImageNet's
statistics. Its CoCoOp network (35,360 numbers) is created and never used. All M tokens get the same
shift, and b has no effect (the text tower's layer norms take it out); we keep both.

Suffixes: K clients, B images, C classes, D joint embedding, M tokens, d text width, L layers and w
width of the image tower.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.layer_statistics import StatisticsEncoder
from fedprompt.config.fields import option
from fedprompt.config.search import log_range
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import Batch, Method, Task, Tensors
from fedprompt.methods.parts.layerwise import (
    content,
    layerwise,
    layerwise_start,
    over_layers,
    style,
)
from fedprompt.methods.parts.linear import linear, linear_start
from fedprompt.methods.parts.losses import cross_entropy, masked_mean, per_image_logits
from fedprompt.methods.parts.normalised import normalised
from fedprompt.methods.parts.prompts import PromptConfig, PromptSource


@dataclass(frozen=True)
class GOProConfig(PromptConfig):
    """Defaults: the code's."""

    context_tokens: int = option(4, "context tokens M", ge=1)
    context_init: str | None = option("a photo of a", "words to start from; null = random")
    projectors: Literal["shared", "private"] = option("shared", "whether networks are averaged too")
    # Two terms of weight 1 in the paper.
    semantic_weight: float = option(
        2.0, "weight of equal class features for two views of an image",
        ge=0, search=log_range(0.2, 200),
    )  # fmt: skip
    contrast_weight: float = option(
        0.1, "weight of the contrast of image features", ge=0, search=log_range(0.01, 1)
    )
    temperature: float = option(0.1, "temperature of the contrast", gt=0)


class GOPro(Method):
    """`ctx` is shared; `style`, `content`, `mix`, `g` and `g_norm` are shared or private."""

    name = "gopro"
    source = "Singha et al., BMVC 2023"
    Config = GOProConfig
    needs = frozenset({"features", "statistics"})
    needs_to_train = frozenset({"second_view"})
    images_at_once = 256

    def __init__(self, config: GOProConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config
        self.prompts = PromptSource.of(config, clip, task)
        self.layers, _, self.width = StatisticsEncoder(clip).shape

    def init_shared(self, seed: int) -> Tensors:
        """`ctx` (M, d), and the networks unless they are private."""
        ctx = {"ctx": self.prompts.start(seed, "init", "shared")}
        return ctx | (self._networks(seed) if self.cfg.projectors == "shared" else {})

    def init_private(self, seed: int, client: int) -> Tensors:
        """The networks if they are private: the same draw for all clients."""
        return self._networks(seed) if self.cfg.projectors == "private" else {}

    def _networks(self, seed: int) -> Tensors:
        joint, text = self.clip.embed_dim, self.clip.text.width
        key = (seed, "init", "networks")
        return {
            **layerwise_start("style", self.layers, text, self.width, *key),
            **layerwise_start("content", self.layers, text, self.width, *key),
            **linear_start("mix", 1, self.layers, *key),
            **linear_start("g", joint, joint, *key),
            "g_norm.weight": torch.ones(joint),
            "g_norm.bias": torch.zeros(joint),
        }

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """All tensors as they are: nothing else is the same for all images."""
        return {**shared, **(private or {})}

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Cosine logits (K, B, C), each image with its own class features."""
        return per_image_logits(
            self.clip, inputs.features, self._classes(encoded, inputs.statistics)
        )

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        """Cross-entropy `ce`, and the weighted terms `semantic` and `contrast`."""
        own, v_KBD, mask_KB = batch.inputs, batch.inputs.features, batch.mask_KB
        assert own.statistics is not None
        other = own.statistics if batch.second_statistics is None else batch.second_statistics
        other_KBD = v_KBD if batch.second_KBD is None else batch.second_KBD
        # Both views' prompts pass through the text tower together.
        both_KBCD = self._classes(encoded, torch.cat([own.statistics, other], dim=1))
        classes_KBCD, others_KBCD = both_KBCD.chunk(2, dim=1)
        apart_KB = (classes_KBCD - others_KBCD).square().mean((-1, -2))
        seen, further = (self._projected(encoded, x, mask_KB) for x in (v_KBD, other_KBD))
        contrast_K = nt_xent(seen, further, mask_KB, self.cfg.temperature)
        return {
            "ce": cross_entropy(per_image_logits(self.clip, v_KBD, classes_KBCD), batch),
            "semantic": self.cfg.semantic_weight * masked_mean(apart_KB, mask_KB),
            "contrast": self.cfg.contrast_weight * contrast_K,
        }

    def _classes(self, encoded: Tensors, statistics: Tensor | None) -> Tensor:
        """L2-normalised class features (K, B, C, D) of each image; B is 1 without networks."""
        context_KBMd = encoded["ctx"][:, None]
        if "mix.weight" in encoded:
            assert statistics is not None
            style_KBLd = layerwise(style(statistics), encoded, "style")
            content_KBLd = layerwise(content(statistics), encoded, "content")
            shift_KBd = over_layers((style_KBLd + content_KBLd) / 2, encoded, "mix")
            context_KBMd = context_KBMd + shift_KBd[:, :, None]
        return self.prompts.classes_per_image(context_KBMd)

    def _projected(self, encoded: Tensors, v_KBD: Tensor, mask_KB: Tensor) -> Tensor:
        """g of image features, L2-normalised: (K, B, D)."""
        out_KBD = linear(v_KBD, encoded["g.weight"], encoded["g.bias"])
        normed = batch_norm(out_KBD, mask_KB, encoded["g_norm.weight"], encoded["g_norm.bias"])
        return normalised(normed)


def batch_norm(
    x_KBD: Tensor, mask_KB: Tensor, weight_KD: Tensor, bias_KD: Tensor, eps: float = 1e-5
) -> Tensor:
    """Batch norm (K, B, D) in training: statistics of each client's own images of the batch."""
    share_KB1 = (mask_KB / mask_KB.sum(-1, keepdim=True))[..., None]
    centred = x_KBD - (x_KBD * share_KB1).sum(1, keepdim=True)
    variance_K1D = (centred.square() * share_KB1).sum(1, keepdim=True)
    return centred * (variance_K1D + eps).rsqrt() * weight_KD[:, None] + bias_KD[:, None]


def nt_xent(one_KBD: Tensor, other_KBD: Tensor, mask_KB: Tensor, temperature: float) -> Tensor:
    """SimCLR's loss (K,) of two views of each image, L2-normalised.

    The positive of a view is the other view of its image; all views of other images are negatives.
    """
    views_KVD = torch.cat([one_KBD, other_KBD], dim=1)
    images = one_KBD.shape[1]
    real_KV = mask_KB.repeat(1, 2)
    itself_VV = torch.eye(2 * images, dtype=torch.bool, device=views_KVD.device)
    hidden_KVV = itself_VV | ~real_KV[:, None]
    logits_KVV = views_KVD @ views_KVD.transpose(-1, -2) / temperature
    # A finite number: a padded row may have no column left, and 0 times infinity is no number.
    logits_KVV = logits_KVV.masked_fill(hidden_KVV, torch.finfo(logits_KVV.dtype).min / 2)
    # Row v has its positive `images` columns further, in a circle.
    loss_KV = -logits_KVV.log_softmax(-1).roll(-images, -1).diagonal(dim1=-2, dim2=-1)
    return masked_mean(loss_KV, real_KV)
