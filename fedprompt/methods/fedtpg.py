"""FedTPG: a shared network generates the context from the names of the classes.

Source: Federated Text-driven Prompt Generation for Vision-Language Models (Qiu et al., ICLR 2024,
arXiv 2310.06123). Learned queries Q attend to CLIP's features T of the bare class names. With LN a
layer norm and [a, g] the halves of a linear layer's output:

    P = Attention(LN(Q), LN'(T), LN'(T)),    context = P + W_2 (a * GELU(g)),  [a, g] = W_1 LN''(P)

One context for all classes, `[SOS][context][class].`; cross-entropy. The server averages the whole
generator with equal weights. Facts checked against the authors' `model/prompt_net.py`,
`model/FedTPG.py` and `federated/server.py` (AGPL; nothing is copied): 4 heads, no residual around
the attention, biases everywhere, no self-attention blocks after it (their `DEPTH` = 0).

Numbers: 4,206,080 on ViT-B/16. FedMGP's table says 4,208.1 thousand, which is this plus another
4 x 512.

How we differ: there, a client's classes (those that the network reads and those of the
cross-entropy) are those of its own data; here all clients know all class names, as in every other
method. The generator runs in float32, not in half precision. Each client there owns one optimiser,
whose momentum lasts from round to round (`training.momentum_state: keep`); by default ours starts
at zero in each round.
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
from fedprompt.errors import UserError
from fedprompt.methods.base import UNIFORM_AVERAGE, Method, Task, Tensors
from fedprompt.methods.parts.linear import layer_norm, linear, linear_start
from fedprompt.methods.parts.losses import cosine_logits
from fedprompt.methods.parts.prompts import PromptSource, RandomPromptConfig
from fedprompt.rng import uniform


@dataclass(frozen=True)
class FedTPGConfig(RandomPromptConfig):
    """Defaults: the paper's 4 context tokens, 4 heads, feed-forward layer of width 4 d."""

    supports_image_noise = True
    default_strategy = UNIFORM_AVERAGE

    context_tokens: int = option(4, "context tokens M that the generator produces", ge=1)
    heads: int = option(4, "attention heads", ge=1)
    expansion: int = option(4, "width of the feed-forward layer, as a multiple of d", ge=1)
    init_std: float = option(0.02, "standard deviation of the queries' random start", gt=0)


class FedTPG(Method):
    """The generator is shared; nothing is private."""

    name = "fedtpg"
    source = "Qiu et al., ICLR 2024"
    Config = FedTPGConfig

    def __init__(self, config: FedTPGConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config
        self.width = clip.text.width
        if self.width % config.heads:
            raise UserError(
                f"method fedtpg: heads is {config.heads}, which does not divide the text width "
                f"{self.width} of {clip.name}."
            )
        self.prompts = PromptSource.of(config, clip, task)
        names = [name.replace("_", " ") for name in task.class_names]
        # T is frozen and depends on the class list only, so it is encoded once.
        self.names_CD = F.normalize(clip.encode_texts(names), dim=-1)

    def init_shared(self, seed: int) -> Tensors:
        """The generator, as torch's modules start.

        `queries` (M, d); `q` (d, d), `k`, `v` (d, D) and `out` (d, d) of the attention; `up`
        (2 * expansion * d, d) and `down` (d, expansion * d) after it; three layer norms.
        """
        d, hidden, key = self.width, self.cfg.expansion * self.width, (seed, "init", "shared")
        start = {"queries": self.prompts.start(*key)}
        # Xavier's bound; torch's attention has one matrix for all three where widths are equal.
        outputs = 3 * d if self.clip.embed_dim == d else d
        for name, inputs in (("q", d), ("k", self.clip.embed_dim), ("v", self.clip.embed_dim)):
            bound = math.sqrt(6 / (outputs + inputs))
            start[f"{name}.weight"] = bound * (2 * uniform((d, inputs), *key, name) - 1)
            start[f"{name}.bias"] = torch.zeros(d)
        # torch's attention starts all of its biases at zero, that of `out` included.
        start |= linear_start("out", d, d, *key, bias=False) | {"out.bias": torch.zeros(d)}
        start |= linear_start("up", 2 * hidden, d, *key)
        start |= linear_start("down", d, hidden, *key)
        widths = {"norm_queries": d, "norm_names": self.clip.embed_dim, "norm_up": d}
        for name, width in widths.items():
            start |= {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}
        return start

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """Class features (K, C, D) of the generated contexts."""
        return {"classes": self.prompts.classes(self.context(shared))}

    def context(self, shared: Tensors) -> Tensor:
        """The contexts (K, M, d) of K generators."""
        attended_KMd = self._attend(shared)
        # context = P + W_2 (a * GELU(g)), [a, g] = W_1 LN''(P).
        normed = layer_norm(attended_KMd, shared["norm_up.weight"], shared["norm_up.bias"])
        value, gate = linear(normed, shared["up.weight"], shared["up.bias"]).chunk(2, dim=-1)
        return attended_KMd + linear(
            value * F.gelu(gate), shared["down.weight"], shared["down.bias"]
        )

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Cosine logits (K, B, C)."""
        return cosine_logits(self.clip, inputs.features, encoded["classes"])

    def _attend(self, shared: Tensors) -> Tensor:
        """P = Attention(LN(Q), LN'(T), LN'(T)), without a residual: (K, M, d)."""

        def norm(name: str, x: Tensor) -> Tensor:
            return layer_norm(x, shared[f"{name}.weight"], shared[f"{name}.bias"])

        def by_head(name: str, x: Tensor) -> Tensor:
            """(K, M or C, ...) -> (K, heads, M or C, d / heads)."""
            projected = linear(x, shared[f"{name}.weight"], shared[f"{name}.bias"])
            return torch.stack(projected.chunk(self.cfg.heads, dim=-1), dim=1)

        queries = norm("norm_queries", shared["queries"])
        # T is the same for all clients, but every client has a layer norm of its own.
        names = norm("norm_names", self.names_CD.expand(len(queries), -1, -1))
        attended: Tensor = F.scaled_dot_product_attention(
            by_head("q", queries), by_head("k", names), by_head("v", names)
        )
        return linear(
            attended.transpose(1, 2).flatten(-2), shared["out.weight"], shared["out.bias"]
        )
