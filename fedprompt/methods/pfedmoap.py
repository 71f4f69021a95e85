"""pFedMoAP: other clients' prompts as frozen experts, mixed by a private attention gate.

Source: Mixture of Experts Made Personalized: Federated Prompt Learning for Vision-Language Models
(Luo, Chen, Wu, ICLR 2025, arXiv 2410.10114); public code https://github.com/ljaiverson/pFedMoAP.
With the client's own prompt P, the prompts of its E nearest peers, v the image feature, t class
features and r(.) every (D / d)-th of D numbers:

    q = W_q r(v)     k_e, u_e = W_k r(t_e), W_v r(t_e)     e = own, peer 1 .. peer E
    m_c = W_o [softmax_e(scaling * q_h . k_ech) u_ech]_h     heads h, class c
    logits_c = s * (lambda * v . t_c(P) + r(v) . m_c)        loss: cross-entropy

Shared: the prompt, averaged, and shown to peers by the strategy `nearest_peers`. Private: the gate.
In a client's first round only its prompt is trained; the gate is used from the second round on. A
client predicts with the prompt that it trained last, not with the average.

PRIVACY: other clients see a client's prompt as it was trained, before any averaging, and secure
aggregation is impossible. Each client is sent E more prompts in every exchange.

How we differ: every client's gate starts from the same draw and is private from then on. In the
public code's loop, the gate of a client that has not trained yet continues from the client that
trained before it, and a client that joins in a later round still holds that client's experts.
There, clients train one after the other and may be sent a prompt of the same round; here, all
experts are from earlier rounds. Predictions use the experts that are sent after the round. The
paper's experts are the nearest peers, and so are ours; the public loop never passes its option
`sparse_selection` on, so its experts are random peers. Dropout is off: the public attention is
configured with 0.1 and never applies it.

Rates: in the public code the gate's is 0.01 throughout. The prompt's starts at 0.002 and is a
cosine over the local epochs of one round; one scheduler serves all clients and rounds, so the rate
falls and rises again, and the very first epoch has 1e-5. Ours is `training.schedule` for both, the
gate's `gate_lr_scale` times as high. Each of the code's two optimisers serves all clients and
rounds, so that momentum passes from client to client; ours starts at zero in each round
(docs/concepts.md, "Momentum between rounds").
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.fields import option
from fedprompt.config.search import Range, log_range
from fedprompt.data.features.inputs import Inputs
from fedprompt.errors import UserError
from fedprompt.methods.base import Batch, Method, RoundInfo, Task, Tensors
from fedprompt.methods.parts import local_copy as local_copy
from fedprompt.methods.parts.linear import linear, linear_start
from fedprompt.methods.parts.losses import cosine_logits, cross_entropy
from fedprompt.methods.parts.prompts import PromptConfig, PromptSource
from fedprompt.methods.parts.remembered import Remembered

PARTS = ("q", "k", "v", "o")
"""The gate's projections, W_q, W_k, W_v, W_o."""


@dataclass(frozen=True)
class PFedMoAPConfig(PromptConfig):
    """Defaults of the public code."""

    default_strategy = MappingProxyType({"name": "nearest_peers"})
    supported_strategies = frozenset({"nearest_peers"})

    experts: int = option(10, "experts, the client's own among them", ge=2)
    lam: float = option(
        0.5, "weight lambda of the own prompt's logits", ge=0, search=Range(0.1, 0.9)
    )
    gate_heads: int = option(8, "heads of the gate", ge=1)
    gate_width: int = option(128, "numbers d of a feature that the gate sees; at most all", ge=1)
    scaling: float = option(10.0, "factor of the gate's attention scores", gt=0)
    gate_lr_scale: float = option(
        5.0, "learning rate of the gate, times training.lr", gt=0, search=log_range(0.5, 20)
    )
    dropout: float = option(0.0, "dropout of attention weights in training", ge=0, lt=1)


class PFedMoAP(Method):
    """A shared prompt, frozen experts that the server sends, and a private gate."""

    name = "pfedmoap"
    source = "Luo et al., ICLR 2025"
    Config = PFedMoAPConfig
    no_graph_reason = "whether gates are in use decides how a step computes"
    images_at_once = 512

    def __init__(self, config: PFedMoAPConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config
        self.prompts = PromptSource.of(config, clip, task)
        self.width = min(config.gate_width, clip.embed_dim)
        self.stride = clip.embed_dim // self.width
        if clip.embed_dim % self.width or self.width % config.gate_heads:
            raise UserError(
                f"pfedmoap: gate_width {self.width} must divide {clip.name}'s {clip.embed_dim} "
                f"features and be a multiple of gate_heads {config.gate_heads}."
            )
        self.frozen = local_copy.names(["ctx"]) | {"private.visits"}
        self.lr_scale = {
            f"private.gate.{part}.{kind}": config.gate_lr_scale
            for part in PARTS
            for kind in ("weight", "bias")
        }
        # Both hold for all steps of a round.
        self._in_use, self._features = Remembered[bool](), Remembered[Tensor]()

    def init_shared(self, seed: int) -> Tensors:
        """`ctx` (M, d)."""
        return {"ctx": self.prompts.start(seed, "init", "shared")}

    def init_private(self, seed: int, client: int) -> Tensors:
        """`gate.q|k|v|o.weight|bias`, the same start for all; `visits` (1,); the own copy."""
        gate: Tensors = {}
        for part in PARTS:
            gate |= linear_start(f"gate.{part}", self.width, self.width, seed, "init", "private")
        return gate | {"visits": torch.zeros(1)} | local_copy.start(self.init_shared(seed))

    def init_extras(self, seed: int) -> Tensors:
        """`peers.ctx` (E, M, d) and `peers.known` (E,)."""
        peers = self.cfg.experts - 1
        shape = (peers, self.cfg.context_tokens, self.clip.text.width)
        return {"peers.ctx": torch.zeros(shape), "peers.known": torch.zeros(peers)}

    def start_round(
        self, shared: Tensors, private: Tensors, round_info: RoundInfo
    ) -> tuple[Tensors, Tensors]:
        """Start training from the average, and count the client's rounds."""
        return shared, local_copy.for_training(private) | {"visits": private["visits"] + 1}

    def at_rest(self, private: Tensors, round_info: RoundInfo) -> Tensors:
        """The gate, on clients that do not use it in this round."""
        unused_K = ~self._gated(private, round_info.received["peers.known"])[:, 0]
        return dict.fromkeys(self.lr_scale, unused_K)

    def end_round(
        self, shared: Tensors, private: Tensors, round_info: RoundInfo
    ) -> tuple[Tensors, Tensors]:
        """The trained prompt is uploaded, and stored for predictions."""
        return shared, local_copy.after_training(private, shared)

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """`classes` (K, C, D), and the gate's inputs if the gate of any client is in use.

        These are `experts` (K, C, E + 1, d), the client's own first, `known` (K, E + 1), `gated`
        (K, 1) and the weights of the gates.
        """
        if private is None:
            return {"classes": self.prompts.classes(shared["ctx"])}
        classes_KCD = self.prompts.classes(local_copy.model(shared, private)["ctx"])
        known_KE = shared["peers.known"].expand(len(private["visits"]), -1)
        gated_K1 = self._gated(private, known_KE)
        asked = (private["visits"], shared["peers.known"])
        if not self._in_use(asked, lambda: bool(gated_K1.any())):
            return {"classes": classes_KCD}
        peers_KECd = self._experts(shared["peers.ctx"]).expand(len(known_KE), -1, -1, -1)
        # r(t): the client's own expert carries a gradient to its prompt, the peers' do not.
        own_K1Cd = classes_KCD[:, None, :, :: self.stride]
        own_K1Cd = own_K1Cd.expand(len(known_KE), -1, -1, -1)
        return {
            "classes": classes_KCD,
            "experts": torch.cat([own_K1Cd, peers_KECd], dim=1).transpose(1, 2),
            "known": torch.cat([torch.ones_like(known_KE[:, :1]), known_KE], dim=1),
            "gated": gated_K1,
            **{n: t for n, t in private.items() if n.startswith("gate.")},
        }

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Logits (K, B, C) of the own prompt, with the mixture's where the gate is in use."""
        return self._logits(encoded, inputs, None)

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        """Cross-entropy `ce` (K,), with dropout of attention weights if it is switched on."""
        keep = None
        if self.cfg.dropout > 0 and "experts" in encoded:
            classes, experts = encoded["experts"].shape[1:3]
            shape = (batch.labels_KB.shape[1], classes, self.cfg.gate_heads, experts)
            draw = batch.uniform(shape, "gate dropout")
            # Scaled as in torch's dropout, so that the expected weights stay the same.
            keep = (draw >= self.cfg.dropout) / (1 - self.cfg.dropout)
        return {"ce": cross_entropy(self._logits(encoded, batch.inputs, keep), batch)}

    def class_embeddings(self, encoded: Tensors) -> Tensor | None:
        """The class features (C, D) of the client's own prompt; None if the gate is used."""
        return None if "experts" in encoded else encoded["classes"][0]

    @staticmethod
    def _gated(private: Tensors, known_KE: Tensor) -> Tensor:
        """Which clients use their gate (K, 1): from the second visit on, if a peer is known."""
        return (private["visits"] > 1) & (known_KE > 0).any(-1, keepdim=True)

    def _logits(self, encoded: Tensors, inputs: Inputs, keep: Tensor | None) -> Tensor:
        own_KBC = cosine_logits(self.clip, inputs.features, encoded["classes"])
        if "experts" not in encoded:
            return own_KBC
        mixture_KBC = self.clip.logit_scale * self._mixture(encoded, inputs.features, keep)
        # s * (lambda * v . t_c(P) + r(v) . m_c); clients without a gate have the prompt's logits.
        both_KBC = self.cfg.lam * own_KBC + mixture_KBC
        return torch.where(encoded["gated"][..., None], both_KBC, own_KBC)

    def _mixture(self, encoded: Tensors, features_KBD: Tensor, keep: Tensor | None) -> Tensor:
        """Products (K, B, C) of images with the mixed class features.

        r(v) . (W_o x + b) is computed as (W_o^T r(v)) . x + r(v) . b, so no mixed feature of an
        image and class is ever laid out.
        """
        # Axes of the products: k clients, b images, c classes, n experts, h heads, e width of one.
        image_KBd = features_KBD[..., :: self.stride]
        heads = (self.cfg.gate_heads, -1)
        q_KBhe = self._project(encoded, "q", image_KBd).unflatten(-1, heads)
        k_KCEhe = self._project(encoded, "k", encoded["experts"]).unflatten(-1, heads)
        v_KCEhe = self._project(encoded, "v", encoded["experts"]).unflatten(-1, heads)
        # W_o^T r(v), see above.
        back_KBhe = (image_KBd @ encoded["gate.o.weight"]).unflatten(-1, heads)
        scores = self.cfg.scaling * torch.einsum("kbhe,kcnhe->kbchn", q_KBhe, k_KCEhe)
        unknown = (encoded["known"] == 0)[:, None, None, None]
        # The client's own expert is always known, so no row consists of minus infinity alone.
        weights = scores.masked_fill(unknown, float("-inf")).softmax(-1)
        if keep is not None:
            weights = weights * keep
        values = torch.einsum("kbhe,kcnhe->kbchn", back_KBhe, v_KCEhe)
        bias_KB = (image_KBd * encoded["gate.o.bias"][:, None]).sum(-1)
        return (weights * values).sum((-1, -2)) + bias_KB[..., None]

    @staticmethod
    def _project(encoded: Tensors, part: str, x: Tensor) -> Tensor:
        return linear(x, encoded[f"gate.{part}.weight"], encoded[f"gate.{part}.bias"])

    @torch.no_grad()
    def _experts(self, peers_KEMd: Tensor) -> Tensor:
        """The peers' class features as the gate sees them, r(t_e): (K, E, C, d).

        Peers do not change during a round, so the last result is reused in all of its steps.
        """

        def encoded() -> Tensor:
            return self.prompts.classes(peers_KEMd)[..., :: self.stride].contiguous()

        return self._features((peers_KEMd,), encoded)
