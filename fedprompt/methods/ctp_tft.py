"""CTP and TFT: class-aware prompts from the image, and image features that attend to the classes.

Source: Task-Oriented Multi-Modal Mutual Learning for Vision-Language Models (Long, Zhao, Yuan, Tan,
Liu, Zhou, Wang, Wang, ICCV 2023, arXiv 2303.17169).

RECONSTRUCTED FROM THE ABSTRACT AND A SUMMARY. They say: CoCoOp shifts the prompts of all classes
alike, which blurs them; a class-aware text prompt (CTP) enriches each class's prompt with what the
image shows of that class; text-guided feature tuning (TFT) lets the image attend to the classes; a
contrastive loss aligns the two. With t0_c CLIP's feature of class c, p_i the patches of the image,
v its feature, h CoCoOp's Meta-Net (`cocoop.py`) and g the text tower, our form is

    Attn(q, X)  = sum_x softmax over x of ((Q q) . (K x) / sqrt(D)) V x
    ctx_cm      = ctx_m + h(Attn_ctp(t0_c, {p_i})),     t_c = g(ctx_c)
    v'          = v + Attn_tft(v, {t_c}),               logits = exp(logit_scale) cos(v', t_c)

and the loss is the cross-entropy, which is the contrastive loss of an image with all classes.

The form of the attention is our choice: one head, no biases, no output layer. V of TFT starts at
zero, so that training starts from CLIP's own image features.

In the federation everything is shared, 1,608,224 numbers on ViT-B/16: two attentions of 3 D^2 each,
the context and the Meta-Net (35,360). Nothing is private. Patches are the output tokens of the
frozen tower (`backbone.patch_features`), from the feature cache. The fast text tower cannot share
prefixes here, because every image gives every class a context of its own: N images are N x C texts,
and the paper's schedule is CoCoOp's, with batches of one image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.text_tower import TextTower
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import Task, Tensors
from fedprompt.methods.cocoop import CoCoOp, CoCoOpConfig
from fedprompt.methods.parts.linear import linear, linear_start


@dataclass(frozen=True)
class CTPTFTConfig(CoCoOpConfig):
    """Defaults: CoCoOp's; those of the paper were not readable to us."""

    supports_image_noise = True


class CTPTFT(CoCoOp):
    """Context, Meta-Net and both attentions are shared; nothing is private."""

    name = "ctp_tft"
    source = "Long et al., ICCV 2023 (reconstructed from the abstract)"
    Config = CTPTFTConfig
    needs = frozenset({"features", "patches"})
    images_at_once = 64

    def __init__(self, config: CTPTFTConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.start_CD = clip.zero_shot_classifier(task.class_names, task.templates)
        self.tower = TextTower(clip, task.class_names, config.context_tokens, class_specific=True)

    def init_shared(self, seed: int) -> Tensors:
        """CoCoOp's tensors, and `q`, `k`, `v` (D, D) of `ctp` and `tft`."""
        width = self.clip.embed_dim
        start = super().init_shared(seed)
        for name in ("ctp.q", "ctp.k", "ctp.v", "tft.q", "tft.k"):
            start |= linear_start(name, width, width, seed, "init", "shared", bias=False)
        return {**start, "tft.v.weight": torch.zeros(width, width)}

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Cosine logits (K, B, C), each image with its own class features and its own v'."""
        assert inputs.patches is not None
        v_KBD = inputs.features
        seen_KBCD = _attend(encoded, "ctp", self.start_CD[None, None], inputs.patches)
        context_KBCMd = (
            encoded["ctx"][:, None, None] + self.meta_net(encoded, seen_KBCD)[:, :, :, None]
        )
        text_KBCD = F.normalize(self.tower(context_KBCMd), dim=-1)
        tuned_KBD = v_KBD + _attend(encoded, "tft", v_KBD[:, :, None], text_KBCD)[:, :, 0]
        v_KBD = F.normalize(tuned_KBD, dim=-1)
        return self.clip.logit_scale * torch.einsum("kbd,kbcd->kbc", v_KBD, text_KBCD)


def _attend(tensors: Tensors, name: str, query_KBQD: Tensor, tokens_KBTD: Tensor) -> Tensor:
    """Attn(q, X) of every image: (K, B, Q, D)."""
    q, k, v = (
        linear(x, tensors[f"{name}.{part}.weight"])
        for part, x in (("q", query_KBQD), ("k", tokens_KBTD), ("v", tokens_KBTD))
    )
    share_KBQT = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    return share_KBQT @ v
