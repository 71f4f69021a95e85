"""PromptKD: visual prompts that imitate a larger teacher on images without labels.

Source: PromptKD: Unsupervised Prompt Distillation for Vision-Language Models (Li, Li, Fu, Zhang,
Wang, Chen, Yang, CVPR 2024, arXiv 2403.02781). The teacher is a larger CLIP; u are its image
features and w_c its class features. The student has M visual prompts in each of the first J image
layers, a projector g into the teacher's space, and no text tower:

    z = exp(logit_scale) cos(g(f), w_c),    z_T = exp(teacher's logit_scale) cos(u, w_c)
    L = weight tau^2 KL(softmax z_T / tau || softmax z / tau) / (B C)

f is the prompted image feature, not normalised; g = Linear, norm, ReLU, Linear. Checked against the
authors' `trainers/promptkd.py` (ec244f7), whose weight is 1000 (200 for Aircraft, Flowers102, DTD).

`teacher` names a backbone config, such as openai_vit_l14. Every client holds it: it sees each of
the client's images once per view, and its features are cached as the backbone's are; nothing of it
is sent. The server needs no images and no part of the teacher but its text tower, for w_c. By
default the teacher is the backbone itself without prompts, which serves to try out the method. No
label is used, so clients without labels train as well.

Shared are prompts and projector, 1,013,760 numbers for ViT-B/16 with a ViT-L/14 teacher, 27,648 of
them prompts; with `projector: private` the prompts alone, and there is no global model.

How we differ: the norm is a layer norm where the code has a batch norm: the mean of the clients'
running statistics would describe nobody's images. The teacher is zero-shot, with the data set's
templates; the paper first trains PromptSRC on it. The paper's numbers are
TRANSDUCTIVE: its students see unlabelled images of all classes, the new ones included. Ours see
the training images of their clients, so the two must not be compared. `kl_norm: batchmean` leaves
out the division by C, which makes the weight depend on the number of classes. We use float32 where
the code rounds prompts to half precision. The code's first epoch has the rate 1e-5, and its loader
leaves out the last partial batch of an epoch; ours does neither (docs/concepts.md, "Local
training").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.vision_tower import VisionTower
from fedprompt.config.fields import option
from fedprompt.config.search import log_range
from fedprompt.data.features.inputs import Inputs
from fedprompt.data.sections import available
from fedprompt.errors import UserError, did_you_mean
from fedprompt.methods.base import Batch, Method, MethodConfig, Task, Tensors
from fedprompt.methods.parts.deep_prompts import layers_within
from fedprompt.methods.parts.linear import layer_norm, linear, linear_start
from fedprompt.methods.parts.losses import cosine_logits, masked_mean
from fedprompt.rng import normal


@dataclass(frozen=True)
class PromptKDConfig(MethodConfig):
    """Defaults: the authors' base-to-new setting, 4 tokens in 9 layers, weight 1000."""

    teacher: str | None = option(
        None, "backbone config of the teacher, e.g. openai_vit_l14; null = the backbone itself"
    )
    visual_tokens: int = option(4, "visual tokens per layer", ge=1)
    visual_depth: int = option(9, "image layers with prompts, the first counts", ge=1)
    init_std: float = option(0.02, "standard deviation of the prompts' start", gt=0)
    kd_weight: float = option(
        1000.0, "weight of the distillation", gt=0, search=log_range(100, 2000)
    )
    temperature: float = option(1.0, "temperature tau of both distributions", gt=0)
    kl_norm: Literal["numel", "batchmean"] = option(
        "numel", "divide the divergence by images x classes, or by images"
    )
    projector: Literal["shared", "private"] = option("shared", "whether projectors are averaged")

    @property
    def companions(self) -> tuple[str, ...]:
        """The teacher."""
        return () if self.teacher is None else (self.teacher,)

    @property
    def learns_without_labels(self) -> bool:
        """No label is ever used."""
        return True

    def check(self) -> None:
        """Refuse a teacher that is no backbone config."""
        if self.teacher is not None and self.teacher not in available("backbone"):
            raise UserError(
                f"method.teacher is '{self.teacher}', which is no backbone config."
                f"{did_you_mean(self.teacher, available('backbone'))}"
            )


class PromptKD(Method):
    """`visual` (J, M, w); the projector's `up`, `norm` and `down`, `.weight` and `.bias` each."""

    name = "promptkd"
    source = "Li et al., CVPR 2024"
    Config = PromptKDConfig
    needs = frozenset({"features", "pixels"})
    needs_to_train = frozenset({"teacher"})
    images_at_once = 256

    def __init__(self, config: PromptKDConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config
        self.has_global = config.projector == "shared"
        self.vision = VisionTower(clip)
        if config.teacher is not None:
            self.teacher = clip.companion(config.teacher)
        teacher = self.teacher or clip
        self.teacher_scale = teacher.logit_scale
        classes_CT = teacher.zero_shot_classifier(task.class_names, task.templates)
        self.classes_1CT = classes_CT[None].to(clip.device)

    def init_shared(self, seed: int) -> Tensors:
        """`visual` from N(0, init_std^2), and the projector unless it is private."""
        depth = layers_within("image", self.cfg.visual_depth, self.vision.layers)
        shape = (depth, self.cfg.visual_tokens, self.vision.width)
        visual = normal(shape, self.cfg.init_std, seed, "init", "shared", "visual")
        return {"visual": visual} | (self._projector(seed) if self.has_global else {})

    def init_private(self, seed: int, client: int) -> Tensors:
        """The projector if it is private: the same draw for all clients."""
        return {} if self.has_global else self._projector(seed)

    def _projector(self, seed: int) -> Tensors:
        inputs, outputs = self.clip.embed_dim, self.classes_1CT.shape[-1]
        return {
            **linear_start("up", outputs, inputs, seed, "init", "projector"),
            "norm.weight": torch.ones(outputs),
            "norm.bias": torch.zeros(outputs),
            **linear_start("down", outputs, outputs, seed, "init", "projector"),
        }

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """The teacher's `classes` (1, C, T), and all tensors as they are."""
        return {"classes": self.classes_1CT, **shared, **(private or {})}

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Cosine logits (K, B, C) of projected image features and the teacher's classes."""
        assert inputs.pixels is not None
        raw_KBD = self.vision.raw(inputs.pixels, encoded["visual"])
        hidden_KBT = linear(raw_KBD, encoded["up.weight"], encoded["up.bias"])
        hidden_KBT = layer_norm(hidden_KBT, encoded["norm.weight"], encoded["norm.bias"]).relu()
        out_KBT = linear(hidden_KBT, encoded["down.weight"], encoded["down.bias"])
        return cosine_logits(self.clip, F.normalize(out_KBT, dim=-1), encoded["classes"])

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        """The weighted divergence `kd` alone: without labels there is no cross-entropy."""
        logits_KBC, tau = self.logits(encoded, batch.inputs), self.cfg.temperature
        features_KBT = batch.inputs.features if self.teacher is None else batch.inputs.teacher
        assert features_KBT is not None
        cosines_KBC = features_KBT @ self.classes_1CT.transpose(-1, -2)
        log_q = (self.teacher_scale * cosines_KBC / tau).log_softmax(-1)
        log_p = (logits_KBC / tau).log_softmax(-1)
        kl_K = masked_mean((log_q.exp() * (log_q - log_p)).sum(-1), batch.mask_KB)
        classes = logits_KBC.shape[-1] if self.cfg.kl_norm == "numel" else 1
        return {"kd": self.cfg.kd_weight * tau**2 * kl_K / classes}

    def class_embeddings(self, encoded: Tensors) -> Tensor | None:
        """None: prompts and the projector change the image features."""
        return None
