"""FedMVP: visual prompts that each image's patches read from sentences about the classes.

Source: FedMVP: Federated Multimodal Visual Prompt Tuning for Vision-Language Models (Singha, Roy,
Mehrotra, Jha, Abdar, Banerjee, Ricci, ICCV 2025, arXiv 2504.20860; code mainaksingha01/FedMVP). E
are the image's patches at the tower's input, with positions; a the L2-normalised features of all
sentences (attributes) of all classes, A = Linear(D, w)(a):

    x = MHA(LN(E), LN(A), A)        x = x + Linear(4 w, w)(GEGLU(Linear(w, 8 w)(LN(x))))
    prompts = averages of M equal parts of x over patches, at the tower's input
    logits_c = exp(logit_scale) mean over c's sentences of cos(f_prompted, a)
    L = CE + alpha (1 - cos(f_prompted(x), f(x')))

with M = 4, 4 heads, alpha = 10, x' another view of the image and f the frozen feature. Defaults are
those of the code.

All of the network, the paper's PromptFormer, is shared: 9,845,760 numbers on ViT-B/16; nothing is
private. Sentences come from `data.descriptions`, which all clients know; without it the templates
stand in. The network takes any class list, so it serves new classes with their sentences. Each
image has prompts of its own, so the image tower runs forward and backward; f(x') is in the feature
cache.

How we differ: x' is another view of `data.views`, the code's a random mirror image; with one view,
x' is x. Clients count by images, the code's equally (`strategy.weights=uniform`). The code trains
in half precision; its recipe is SGD at 0.003 with weight decay 1e-5 and batches of 128. Left out is
the low-rank update of queries, keys and values, which a client of the code switches on once its
loss is below 0.5: its numbers are averaged, but the server never switches it on, so that no
evaluation reads it.

Faults of the code that are not reproduced: the update stands behind the loop over batches, so that
a round is one step, on the last batch; sentences are cut after 77 characters where 77 tokens were
meant; the image tower that `forward` calls is never assigned, and a module that is imported is not
in the repository, so that it does not run as published.

Suffixes: K clients, B images, P patches, T sentences, C classes, D joint embedding, w tower width,
h heads, M prompts of an image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.vision_tower import VisionTower
from fedprompt.config.fields import option
from fedprompt.config.search import log_range
from fedprompt.data.features.inputs import Inputs
from fedprompt.errors import UserError
from fedprompt.methods.base import Batch, Method, MethodConfig, Task, Tensors
from fedprompt.methods.parts.linear import layer_norm, linear, linear_start, uniform_start
from fedprompt.methods.parts.losses import cosine_logits, cross_entropy, masked_mean
from fedprompt.methods.parts.sentences import described

NORMS = ("norm_q", "norm_k", "norm_ff")


@dataclass(frozen=True)
class FedMVPConfig(MethodConfig):
    """Defaults: the code's."""

    visual_tokens: int = option(4, "visual prompts M of an image", ge=1)
    heads: int = option(4, "heads of the attention", ge=1)
    widening: int = option(4, "hidden width of the feed-forward network, in tower widths", ge=1)
    consistency_weight: float = option(
        10.0, "weight of the consistency with the frozen CLIP (alpha)",
        ge=0, search=log_range(0.1, 30),
    )  # fmt: skip


class FedMVP(Method):
    """The PromptFormer is shared: `text`, `qkv`, `out`, `up`, `down` and three norms."""

    name = "fedmvp"
    source = "Singha et al., ICCV 2025"
    Config = FedMVPConfig
    needs = frozenset({"features", "pixels"})
    needs_to_train = frozenset({"second_view"})
    reads_descriptions = True
    images_at_once = 256

    def __init__(self, config: FedMVPConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config
        self.vision = VisionTower(clip)
        if self.vision.width % config.heads or config.visual_tokens > self.vision.patches:
            raise UserError(
                f"method {self.name}: the image tower of {clip.name} is {self.vision.width} wide "
                f"with {self.vision.patches} patches; 'heads' ({config.heads}) must divide its "
                f"width, and 'visual_tokens' ({config.visual_tokens}) be at most its patches."
            )
        # Adaptive pooling as a product: its own gradient has no fixed order on GPUs.
        each_PP = torch.eye(self.vision.patches)
        self.parts_MP = F.adaptive_avg_pool1d(each_PP, config.visual_tokens).T.to(clip.device)
        texts = described(clip, task)
        self.texts_1TD = torch.cat(texts)[None]
        # The mean of cosines is the product with the mean, which is not normalised again.
        self.classes_1CD = torch.stack([own_SD.mean(0) for own_SD in texts])[None]

    def init_shared(self, seed: int) -> Tensors:
        """The network, each layer as torch's own starts."""
        width, joint = self.vision.width, self.clip.embed_dim
        hidden, key = self.cfg.widening * width, (seed, "init", "shared")
        start = {
            **linear_start("text", width, joint, *key),
            # Xavier's bound for three square matrices in one.
            "qkv.weight": uniform_start((3 * width, width), math.sqrt(1.5 / width), *key, "qkv"),
            "qkv.bias": torch.zeros(3 * width),
            **linear_start("out", width, width, *key),
            "out.bias": torch.zeros(width),
            **linear_start("up", 2 * hidden, width, *key),
            **linear_start("down", width, hidden, *key),
        }
        for norm in NORMS:
            start[f"{norm}.weight"], start[f"{norm}.bias"] = torch.ones(width), torch.zeros(width)
        return start

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """`classes` (1, C, D), the sentences' `keys` and `values` (K, T, w), and the network."""
        text_KTw = linear(self.texts_1TD, shared["text.weight"], shared["text.bias"])
        _, key_w, value_w = _thirds(shared)
        keys = linear(_normed(text_KTw, shared, "norm_k"), *key_w)
        return {
            "classes": self.classes_1CD,
            "keys": keys,
            "values": linear(text_KTw, *value_w),
            **shared,
        }

    def prompts(self, encoded: Tensors, pixels: Tensor) -> Tensor:
        """The visual prompts (K, B, M, w) of each image."""
        patch_KBPw = self.vision.patch_embeddings(pixels)
        query_w = _thirds(encoded)[0]
        query = linear(_normed(patch_KBPw, encoded, "norm_q"), *query_w)
        images, patches = query.shape[1:3]
        parts = (query.flatten(1, 2), encoded["keys"], encoded["values"])
        q, k, v = (x.unflatten(-1, (self.cfg.heads, -1)).transpose(1, 2) for x in parts)
        # In its plain form: fused kernels add in an order that may differ from run to run.
        share_KhNT = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        mixed_KNw = (share_KhNT @ v).transpose(1, 2).flatten(2)
        x = linear(mixed_KNw, encoded["out.weight"], encoded["out.bias"])
        hidden = linear(_normed(x, encoded, "norm_ff"), encoded["up.weight"], encoded["up.bias"])
        kept, gate = hidden.chunk(2, dim=-1)
        x = x + linear(kept * F.gelu(gate), encoded["down.weight"], encoded["down.bias"])
        pooled_KBMw: Tensor = self.parts_MP @ x.unflatten(1, (images, patches))
        return pooled_KBMw

    def images(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """L2-normalised features (K, B, D), each image under its own prompts."""
        assert inputs.pixels is not None
        prompts_KBMw = self.prompts(encoded, inputs.pixels)
        return self.vision.under_own_prompts(inputs.pixels, prompts_KBMw)

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Mean cosine logits (K, B, C) with the sentences of each class."""
        return cosine_logits(self.clip, self.images(encoded, inputs), encoded["classes"])

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        """Cross-entropy `ce`, and the weighted distance `consistency`."""
        images_KBD = self.images(encoded, batch.inputs)
        frozen_KBD = batch.inputs.features if batch.second_KBD is None else batch.second_KBD
        apart_KB = 1 - (images_KBD * frozen_KBD).sum(-1)
        logits_KBC = cosine_logits(self.clip, images_KBD, encoded["classes"])
        return {
            "ce": cross_entropy(logits_KBC, batch),
            "consistency": self.cfg.consistency_weight * masked_mean(apart_KB, batch.mask_KB),
        }

    def class_embeddings(self, encoded: Tensors) -> Tensor | None:
        """None: prompts change the image features."""
        return None


def _normed(x: Tensor, tensors: Tensors, name: str) -> Tensor:
    return layer_norm(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])


def _thirds(tensors: Tensors) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of queries, keys and values."""
    weights, biases = tensors["qkv.weight"].chunk(3, dim=1), tensors["qkv.bias"].chunk(3, dim=1)
    return list(zip(weights, biases, strict=True))
