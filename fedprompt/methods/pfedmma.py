"""pFedMMA: adapters in the top layers of both towers, with one projection that both share.

Sources: pFedMMA: Personalized Federated Fine-Tuning with Multi-Modal Adapter for Vision-Language
Models (Ghiasvand et al., ICLR 2026, arXiv 2507.05394); the adapter is MMA's (Yang et al., CVPR
2024). In each of the top L layers f of a tower, with LN the first layer norm of that layer,

    A(z) = W_u relu(W_s relu(W_d LN(z) + b_d) + b_s) + b_u,    f(z) <- f(z) + alpha A(z).

W_s (r x r) is the same for image and text and is what the server averages; W_d and W_u belong to a
tower and stay with the client. Frozen text "a photo of a {}.", cosine logits, cross-entropy.

Checked against the public code (trainers/pFedMMA.py and federated_main.py of sajjad-ucsb/pFedMMA;
the towers' hook, clip/model.py, is stored only in ZjjConan/Multi-Modal-Adapter): biases everywhere,
a ReLU after W_s too, He's normal start by the number of outputs with zero biases, the same for all
clients, average by the number of images. `gradient_scale: mma` is that code's backward pass, which
the published formula leaves out: the adapters' own gradients are those of alpha = 1 (1/alpha times
the true ones), while the gradient that reaches lower layers is the true one; `exact` is the plain
gradient.

How we differ: the public code counts layers from below, 5 to 12 in both towers; we count the top 8,
which is the same in ViT-B but not in ViT-L/14's 24 image layers. In evaluation the public model
keeps the text features of the first client that it evaluates for all clients and rounds, and the
best round is reported; ours encodes each client's own text. Clients that are not sampled do not
train. There is no global model: without W_d and W_u the shared projection has no meaning. One
optimiser serves all clients and rounds there, so that momentum passes from client to client; ours
starts at zero in each round (docs/concepts.md, "Momentum between rounds").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.text_tower import TextTower
from fedprompt.backbone.vision_tower import Adapt, VisionTower
from fedprompt.config.fields import option
from fedprompt.config.search import log_range
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import Method, MethodConfig, Task, Tensors
from fedprompt.methods.parts.deep_prompts import layers_within
from fedprompt.methods.parts.linear import linear
from fedprompt.methods.parts.losses import cosine_logits
from fedprompt.rng import normal


@dataclass(frozen=True)
class PFedMMAConfig(MethodConfig):
    """Defaults: the authors' code (layers 5 to 12 of ViT-B, r = 32, alpha = 0.001)."""

    layers: int = option(8, "top layers L of both towers with adapters, at most the tower's", ge=1)
    rank: int = option(32, "width r of the bottleneck", ge=1)
    scale: float = option(
        0.001, "alpha, the weight of an adapter's output", gt=0, search=log_range(0.0001, 0.1)
    )
    words: str = option("a photo of a", "frozen words before a class name")
    gradient_scale: Literal["mma", "exact"] = option("mma", "gradients of the adapters")


class PFedMMA(Method):
    """Shared: `weight` (L, r, r), `bias` (L, r) of W_s. Private: both towers' W_d and W_u.

    Private names are `text.down.weight` (L, r, d), `text.down.bias`, `text.up.weight` (L, d, r),
    `text.up.bias`, and the same with `visual`.
    """

    name = "pfedmma"
    source = "Ghiasvand et al., ICLR 2026"
    Config = PFedMMAConfig
    has_global = False  # the shared projections mean nothing without the private ones
    needs = frozenset({"features", "pixels"})
    images_at_once = 256

    def __init__(self, config: PFedMMAConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        clip.text.check_adapters(clip.name)
        self.vision = VisionTower(clip)
        self.vision.check_adapters()
        # No learned tokens: the words "a photo of a" are a part of every class name.
        self.text = TextTower(clip, [f"{config.words} {c}".strip() for c in task.class_names], 0)
        self.depth = {"text": len(clip.text.blocks), "visual": self.vision.layers}
        # Both towers share W_s layer by layer, so they have equally many layers with adapters.
        self.layers = layers_within("text and image", config.layers, min(self.depth.values()))
        self.width = {"text": clip.text.width, "visual": self.vision.width}

    def init_shared(self, seed: int) -> Tensors:
        """W_s of all layers."""
        rank = self.config.rank
        return self._start("", (rank, rank), seed, "shared")

    def init_private(self, seed: int, client: int) -> Tensors:
        """W_d and W_u of both towers; all clients start from the same draw."""
        rank = self.config.rank
        start: Tensors = {}
        for tower, width in self.width.items():
            start |= self._start(f"{tower}.down.", (rank, width), seed, tower, "down")
            start |= self._start(f"{tower}.up.", (width, rank), seed, tower, "up")
        return start

    def _start(
        self, name: str, shape: tuple[int, int], seed: int, *purpose: str
    ) -> dict[str, Tensor]:
        """He's normal start by the number of outputs, and zero biases, for all L layers.

        Args:
            name: prefix of the tensors' names.
            shape: (outputs, inputs) of one layer.
            seed: seed of the run.
            purpose: keys the draw, together with `seed`.
        """
        std = math.sqrt(2 / shape[0])
        weight = normal((self.layers, *shape), std, seed, "init", *purpose)
        return {f"{name}weight": weight, f"{name}bias": torch.zeros(self.layers, shape[0])}

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """`classes` (K, C, D), and the tensors that the image adapters need."""
        assert private is not None, "pfedmma has no global model"
        adapters = {**shared, **private}
        # An empty context with a client axis of 1; the adapters turn it into K clients.
        nothing_1Md = torch.zeros(1, 0, self.clip.text.width, device=self.clip.device)
        clients = len(adapters["text.up.bias"])
        adapt = self._adapt("text", adapters)
        classes_KCD = self.text(nothing_1Md, adapt=adapt, clients=clients)
        visual = {n: t for n, t in adapters.items() if not n.startswith("text.")}
        return {"classes": F.normalize(classes_KCD, dim=-1), **visual}

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Cosine logits (K, B, C) of the adapted image and text features."""
        assert inputs.pixels is not None
        images_KBD = self.vision(inputs.pixels, adapt=self._adapt("visual", encoded))
        return cosine_logits(self.clip, F.normalize(images_KBD, dim=-1), encoded["classes"])

    def class_embeddings(self, encoded: Tensors) -> Tensor | None:
        """None: adapters change the image features."""
        return None

    def _adapt(self, tower: str, adapters: Tensors) -> Adapt:
        """alpha A(z) for the top layers of a tower."""
        first, alpha = self.depth[tower] - self.layers, self.config.scale
        # In `mma` the two factors below are alpha on the way into the adapter and 1/alpha on the
        # way out: they cancel for lower layers, and the adapter's own weights see 1/alpha alone.
        factor = alpha if self.config.gradient_scale == "mma" else 1.0

        def project(name: str, j: int, x_K: Tensor) -> Tensor:
            weight_KLoi, bias_KLo = adapters[f"{name}weight"], adapters[f"{name}bias"]
            return linear(x_K, weight_KLoi[:, j], bias_KLo[:, j])

        def adapt(layer: int, block: Any, z_K: Tensor) -> Tensor | None:
            j = layer - first
            if j < 0:
                return None  # layers below the top L have no adapter
            # A(z) of the module's docstring: W_d, then W_s of both towers, then W_u.
            y_K = block.ln_1(_scaled_gradient(z_K, factor))
            y_K = project(f"{tower}.down.", j, y_K).relu()
            y_K = project("", j, y_K).relu()
            return _scaled_gradient(alpha * project(f"{tower}.up.", j, y_K), 1 / factor)

        return adapt


def _scaled_gradient(x: Tensor, factor: float) -> Tensor:
    """`x`, whose gradient is multiplied by `factor` on its way back."""
    out: Tensor = _ScaledGradient.apply(x, factor)
    return out


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # One gradient per input of `forward`; the factor has none.
        return grad * ctx.factor, None
