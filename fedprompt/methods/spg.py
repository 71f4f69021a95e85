"""SPG: a generator turns image features and noise into a context, learned against a discriminator.

Source: Soft Prompt Generation for Domain Generalization (Bai, Zhang, Zhou, Luan, Chen, ECCV 2024,
arXiv 2404.19286; code renytek13/Soft-Prompt-Generation). Each domain has a prompt label p, CoOp's
context for its images. A conditional GAN with least squares learns to write such contexts:

    L_D = mean (D(p, v) - 1)^2 + mean D(G(z, v), v)^2           L_G = mean (D(G(z, v), v) - 1)^2
    G: [z; v] -> 128 -> 256 -> 512 -> 1024 -> M d, tanh         D: [p; v] -> 512 -> 512 -> 512 -> 1

v is an image's feature, z noise of 100 numbers; LeakyReLU of slope 0.2, He's start, and dropout of
0.4 in two layers of D. Prediction uses G(z, v) as the context of the image.

In a federation [I] a client is a domain. G is shared and averaged: 2,871,168 numbers on ViT-B/16.
The prompt label and D (1,837,057 numbers) are private; the label is what a client of PromptFL would
upload. Text passes through the fast tower, one prompt per client in training, one per image in
prediction.

How we differ:
- The paper learns all labels first (50 epochs) and then the GAN (70). Here a step trains both, so
  that every upload is of use; the label is a constant for the GAN. The gradient of G is taken
  before D's step, not after it, and both see the same images in one step.
- G has layer norms where the paper has batch norms: no statistics of a client's batches exist that
  could be shared, and one image has a context of its own. The numbers of parameters are equal. (The
  code passes 0.8 as the batch norm's eps, probably meant as its momentum.)
- Prediction in the paper is random, since z is drawn anew for each image. Here the contexts of
  `draws` fixed z are averaged. The code tests with batches of one image: for a larger batch it
  would take the context of the first image for all.
- tanh bounds the context by 1, while the entries of CLIP's token embeddings are about 0.01. `bound`
  scales it; 1 is the paper's.
- Each tensor's gradient is clipped at a norm of its own, as in the code, without which SGD
  diverges. The code has further limits for biases (5e-8 in G, 0.5 in D), for D's first and last
  layers (5), and for PACS. It chooses the best epoch on validation images (`evaluation.select`).
  Its warm-up is not done (docs/concepts.md, "Local training").

Suffixes: K clients, B images, C classes, D joint embedding, M tokens, d text width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.fields import option
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import Batch, Method, Task, Tensors
from fedprompt.methods.parts.linear import layer_norm, linear, linear_start, uniform_start
from fedprompt.methods.parts.losses import (
    cosine_logits,
    cross_entropy,
    masked_mean,
    per_image_logits,
)
from fedprompt.methods.parts.prompts import PromptConfig, PromptSource
from fedprompt.rng import normal

WIDTHS = (128, 256, 512, 1024)
"""Hidden layers of the generator; all but the first are normalised."""
JUDGE = 512
"""Width of the discriminator's three hidden layers."""
SLOPE = 0.2


@dataclass(frozen=True)
class SPGConfig(PromptConfig):
    """Defaults: the code's; its optimiser is AdamW at 0.002 or 0.0002, with weight decay 1e-4."""

    context_tokens: int = option(4, "context tokens M", ge=1)
    context_init: str | None = option("a photo of a", "words from which prompt labels start")
    latent: int = option(100, "numbers of noise z", ge=1)
    dropout: float = option(0.4, "dropout in the discriminator", ge=0, lt=1)
    clip_generator: float = option(
        0.005, "largest norm of the gradient of each tensor of the generator", gt=0
    )
    clip_discriminator: float = option(
        0.05, "largest norm of the gradient of each tensor of the discriminator", gt=0
    )
    bound: float = option(1.0, "largest entry of a generated context", gt=0)
    draws: int = option(10, "draws of z whose contexts are averaged in prediction", ge=1)


class SPG(Method):
    """The generator `g.*` is shared; `label` (M, d) and the discriminator `d.*` are private."""

    name = "spg"
    source = "Bai et al., ECCV 2024"
    Config = SPGConfig
    images_at_once = 256

    def __init__(self, config: SPGConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config
        self.prompts = PromptSource.of(config, clip, task)
        self.size = config.context_tokens * clip.text.width
        # The same for all images, clients and runs, so that prediction is not random.
        fixed_SZ = normal((config.draws, config.latent), 1.0, 0, "spg", "prediction")
        self.fixed_SZ = fixed_SZ.to(clip.device)

    def init_shared(self, seed: int) -> Tensors:
        """`g.0` ... `g.4`, linear layers, and `g.norm1` ... `g.norm3`."""
        start: Tensors = {}
        inputs = self.cfg.latent + self.clip.embed_dim
        for i, outputs in enumerate((*WIDTHS, self.size)):
            start |= _he_start(f"g.{i}", outputs, inputs, seed, "init", "shared")
            if 0 < i < len(WIDTHS):
                start[f"g.norm{i}.weight"] = torch.ones(outputs)
                start[f"g.norm{i}.bias"] = torch.zeros(outputs)
            inputs = outputs
        return start

    def init_private(self, seed: int, client: int) -> Tensors:
        """`label` (M, d) and `d.0` ... `d.3`, the same for all clients."""
        start, inputs = {"label": self.prompts.start(seed, "init", "label")}, self.size
        inputs += self.clip.embed_dim
        for i, outputs in enumerate((JUDGE, JUDGE, JUDGE, 1)):
            start |= _he_start(f"d.{i}", outputs, inputs, seed, "init", "discriminator")
            inputs = outputs
        return start

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """The generator: nothing else is the same for all images."""
        return dict(shared)

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Cosine logits (K, B, C) with each image's mean context."""
        v_KBD = inputs.features
        many_KBSD = v_KBD[:, :, None].expand(-1, -1, self.cfg.draws, -1)
        z_KBSZ = self.fixed_SZ.expand(*many_KBSD.shape[:3], -1)
        context_KBMd = self.generate(encoded, z_KBSZ, many_KBSD).mean(2)
        classes_KBCD = self.prompts.classes_per_image(context_KBMd)
        return per_image_logits(self.clip, v_KBD, classes_KBCD)

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        """`ce` of the prompt label, and the GAN's `discriminator` and `generator`."""
        v_KBD = batch.inputs.features
        classes_KCD = self.prompts.classes(private["label"])
        ce_K = cross_entropy(cosine_logits(self.clip, v_KBD, classes_KCD), batch)
        z_KBZ = batch.normal((v_KBD.shape[1], self.cfg.latent), "z")
        made_KBMd = self.generate(shared, z_KBZ, v_KBD)
        label_KBMd = private["label"].detach()[:, None].expand_as(made_KBMd)
        # Each of both sides is a constant for the other's loss.
        fixed = {n: t.detach() for n, t in private.items()}
        # One draw for all dropout of a step: two layers of D, in each of its three uses.
        # Images first: those of a client get the same draws however far its batch is padded.
        drawn_KB32J = batch.uniform((v_KBD.shape[1], 3, 2, JUDGE), "dropout")
        kept = ((drawn_KB32J >= self.cfg.dropout) / (1 - self.cfg.dropout)).permute(0, 2, 3, 1, 4)
        real_KB = self._judge(private, label_KBMd, v_KBD, kept[:, 0])
        fake_KB = self._judge(private, made_KBMd.detach(), v_KBD, kept[:, 1])
        passed_KB = self._judge(fixed, made_KBMd, v_KBD, kept[:, 2])
        mask_KB = batch.mask_KB
        return {
            "ce": ce_K,
            "discriminator": masked_mean((real_KB - 1) ** 2 + fake_KB**2, mask_KB),
            "generator": masked_mean((passed_KB - 1) ** 2, mask_KB),
        }

    def gradients(
        self, loss_terms: dict[str, Tensor], leaves: Tensors, batch: Batch
    ) -> dict[str, Tensor | None]:
        """Gradients of both sides, each tensor's clipped at a norm of its own."""
        gradients = super().gradients(loss_terms, leaves, batch)
        limits = {"shared.g": self.cfg.clip_generator, "private.d": self.cfg.clip_discriminator}
        for start, limit in limits.items():
            found = {
                n: g for n, g in gradients.items() if g is not None and n.startswith(f"{start}.")
            }
            norms_TK = torch.stack(
                [torch.linalg.vector_norm(g.flatten(1), dim=1) for g in found.values()]
            )
            # The small number is that of `clip_grad_norm_`.
            for (name, g), scale_K in zip(
                found.items(), (limit / (norms_TK + 1e-6)).clamp(max=1.0), strict=True
            ):
                gradients[name] = g * scale_K.view(-1, *[1] * (g.dim() - 1))
        return gradients

    def generate(self, generator: Tensors, z: Tensor, features: Tensor) -> Tensor:
        """The contexts (K, ..., M, d) of noise (K, ..., Z) and image features (K, ..., D)."""
        x = torch.cat([z, features], dim=-1)
        for i in range(len(WIDTHS)):
            x = linear(x, generator[f"g.{i}.weight"], generator[f"g.{i}.bias"])
            if i:
                norm = f"g.norm{i}"
                x = layer_norm(x, generator[f"{norm}.weight"], generator[f"{norm}.bias"])
            x = F.leaky_relu(x, SLOPE)
        last = len(WIDTHS)
        x = linear(x, generator[f"g.{last}.weight"], generator[f"g.{last}.bias"])
        context: Tensor = x.tanh().unflatten(-1, (self.cfg.context_tokens, -1))
        return self.cfg.bound * context

    def _judge(
        self, judge: Tensors, context_KBMd: Tensor, features_KBD: Tensor, kept_K2BH: Tensor
    ) -> Tensor:
        """D's verdicts (K, B): 1 for a prompt label, 0 for a generated context.

        `kept_K2BH` multiplies the two layers that have dropout.
        """
        x = torch.cat([context_KBMd.flatten(2), features_KBD], dim=-1)
        for i in range(3):
            x = linear(x, judge[f"d.{i}.weight"], judge[f"d.{i}.bias"])
            if i:
                x = x * kept_K2BH[:, i - 1]
            x = F.leaky_relu(x, SLOPE)
        return linear(x, judge["d.3.weight"], judge["d.3.bias"])[..., 0]


def _he_start(name: str, outputs: int, inputs: int, seed: int, *purpose: str | int) -> Tensors:
    """A linear layer with He's uniform weights; its bias starts as torch's."""
    bound, key = math.sqrt(6 / inputs), (*purpose, name, "weight")
    start = linear_start(name, outputs, inputs, seed, *purpose)
    return {**start, f"{name}.weight": uniform_start((outputs, inputs), bound, seed, *key)}
