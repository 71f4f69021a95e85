"""FedDDA: a shared and a private context around the class name, gated adapters on the image.

Source: Federated Disentangled Tuning with Textual Prior Decoupling and Visual Dynamic Adaptation
(Yang et al., ICML 2025; public code: MoratalYang/FedDDA, from which all of this is read). With G
the shared and P the private context, f the un-normalised image feature:

    text      [SOS][G] {class} with a style of [P].[EOS]
    A(f)      ReLU(W_up ReLU(W_down f)), D -> D/4 -> D, no biases; one private, one shared
    g(f)      softmax(W_g f), three weights
    f'        g_0 f + g_1 A_private(f) + g_2 A_shared(f)
    logits    exp(logit_scale) cos(f', t_c),  loss = cross-entropy

G and the shared adapter are averaged (8,192 + 131,072 numbers at 16 tokens and D = 512); P, the
private adapter and the gate stay on the client. All clients start from the same values, as in the
public code.

The text is a context of 2 M tokens with the class name in the middle, so it takes the text tower's
plain path, which is exact: with learned tokens behind the name, only [SOS][G] is a common prefix.

How we differ: the public code sizes the adapters by the width of the text tower, we by that of the
image feature, which is the same on every ViT-B. Like that code, we have no model of the shared
tensors alone: they are half a sentence, and an adapter without the gate that mixes its output.
Momentum starts at zero in each round in both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.fields import option
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import Method, Task, Tensors
from fedprompt.methods.parts.adapters import bottleneck, bottleneck_start, raw_features
from fedprompt.methods.parts.linear import linear, linear_start
from fedprompt.methods.parts.losses import cosine_logits
from fedprompt.methods.parts.prompts import PromptSource, RandomPromptConfig


@dataclass(frozen=True)
class FedDDAConfig(RandomPromptConfig):
    """Defaults: the public code's."""

    supports_image_noise = True

    context_tokens: int = option(16, "tokens of each context", ge=1)
    style: str = option("with a style of", "words between the class name and the private context")
    reduction: int = option(4, "adapters: width divided by this is hidden", ge=1)


class FedDDA(Method):
    """`ctx` and an adapter in both containers; the private one also holds `gate.weight` (3, D)."""

    name = "feddda"
    source = "Yang et al., ICML 2025"
    Config = FedDDAConfig
    has_global = False  # the shared tensors alone are half a sentence

    def __init__(self, config: FedDDAConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config
        self.context = PromptSource.of(config, clip, task)
        # "{class} with a style of" stands between the contexts as if it were the class name.
        names = tuple(f"{name} {config.style}".strip() for name in task.class_names)
        self.sentence = PromptSource(
            clip, replace(task, class_names=names), 2 * config.context_tokens, position="middle"
        )

    def init_shared(self, seed: int) -> Tensors:
        """`ctx` (M, d) and the shared adapter."""
        return self._start(seed, "shared")

    def init_private(self, seed: int, client: int) -> Tensors:
        """`ctx` (M, d), the private adapter and the gate; the same for all clients."""
        gate = linear_start("gate", 3, self.clip.embed_dim, seed, "init", "private", bias=False)
        return self._start(seed, "private") | gate

    def _start(self, seed: int, container: str) -> Tensors:
        key = (seed, "init", container)
        adapter = bottleneck_start(self.clip.embed_dim, self.cfg.reduction, *key)
        return {"ctx": self.context.start(*key), **adapter}

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """Class features (K, C, D) of the whole sentences, and both adapters as they are."""
        assert private is not None, "feddda has no global model"
        ours, theirs = private["ctx"], shared["ctx"]
        # `middle` splits the context in two halves: G in front of the name, P behind it.
        whole_KMd = torch.cat([theirs.expand(len(ours), -1, -1), ours], dim=-2)
        return (
            # Prefixes keep both adapters apart: their tensors have the same names.
            {"classes": self.sentence.classes(whole_KMd)}
            | {f"shared.{n}": t for n, t in shared.items() if n != "ctx"}
            | {f"private.{n}": t for n, t in private.items() if n != "ctx"}
        )

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Cosine logits (K, B, C) of the gated features f'.

        Except for the gate, which sees the un-normalised feature f, mixing L2-normalised features
        gives the same direction (`bottleneck`).
        """
        v_KBD = inputs.features
        shared, private = (_of(encoded, kind) for kind in ("shared", "private"))
        gate_KB3 = linear(raw_features(inputs), private["gate.weight"]).softmax(-1)
        # f' = g_0 f + g_1 A_private(f) + g_2 A_shared(f).
        mixed_KBD = (
            gate_KB3[..., 0:1] * v_KBD
            + gate_KB3[..., 1:2] * bottleneck(v_KBD, private)
            + gate_KB3[..., 2:3] * bottleneck(v_KBD, shared)
        )
        return cosine_logits(self.clip, F.normalize(mixed_KBD, dim=-1), encoded["classes"])

    def class_embeddings(self, encoded: Tensors) -> Tensor | None:
        """None: adapters change the image features."""
        return None


def _of(encoded: Tensors, container: str) -> Tensors:
    """The tensors of one container, under their own names."""
    prefix = f"{container}."
    return {n.removeprefix(prefix): t for n, t in encoded.items() if n.startswith(prefix)}
