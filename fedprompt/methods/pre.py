"""PRE: a context that is learned through a small encoder, which never leaves the client.

Source: PRE: Vision-Language Prompt Learning with Reparameterization Encoder (Anh Pham Thi Minh, An
Duc Nguyen, Tzimiropoulos, 2023, arXiv 2309.07760; code minhanh151/PRE). A bidirectional LSTM of one
layer reads the M tokens v of the context and adds to each:

    ctx(v, theta) = v + LSTM_theta(v)

and ctx is used as CoOp's context. Checked against `trainers/pre.py` with `ENCODER LSTM1`, `RESIDUAL
True` and `SEPARATE False`.

The encoder sees no data, so ctx is all that prediction needs: it is shared, 2,048 numbers for 4
tokens of 512 instead of 1,579,008 with the encoder (`sharing: encoder`). v and theta stay on the
client. After averaging, the client's own ctx(v, theta) is not the shared one, so training goes on
from

    ctx = shared + (ctx(v, theta) - anchor),     anchor = ctx(v, theta) at the end of the last visit

Then training starts exactly at the received context and moves it by what its encoder learns. The
offset shared - anchor is constant during a round. Outside training the difference is zero, so a
client's personal model is the shared context, as PromptFL's is. The method is ours in this respect:
the paper is not federated.

How we differ: the code's other encoders are left out; its transformer needs a name that is not
defined, and its shared encoder fails for a single token. Class-specific contexts are not offered.
Its first epoch has the rate 1e-5, and its loader leaves out the last partial batch of an epoch;
ours does neither (docs/concepts.md, "Local training").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.fields import option
from fedprompt.errors import UserError
from fedprompt.methods.base import RoundInfo, Task, Tensors
from fedprompt.methods.parts.recurrent import lstm, lstm_start
from fedprompt.methods.promptfl import PromptFL, PromptFLConfig

ENCODER = "lstm"


@dataclass(frozen=True)
class PREConfig(PromptFLConfig):
    """Defaults: the code's `vit_b16_ep50_ctxv1`, 4 context tokens "a photo of a"."""

    supports_image_noise = True

    context_tokens: int = option(4, "context tokens M", ge=1)
    context_init: str | None = option("a photo of a", "words to start from; null = random")
    sharing: Literal["folded", "encoder"] = option(
        "folded", "folded: the encoder's output is averaged; encoder: the encoder itself"
    )


class PRE(PromptFL):
    """`ctx` (M, d) is shared; `raw` (M, d) and the encoder are private."""

    name = "pre"
    source = "Minh et al., 2023"
    Config = PREConfig

    def __init__(self, config: PREConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        if clip.text.width % 2:
            raise UserError(
                f"method pre needs a text tower of even width, half for each direction; that of "
                f"{clip.name} has {clip.text.width}."
            )
        self.folded = config.sharing == "folded"
        # The optimiser moves the encoder; what is uploaded follows from it in `end_round`.
        self.frozen = frozenset({"shared.ctx", "private.anchor"} if self.folded else set())

    def _encoder(self, seed: int) -> Tensors:
        """`raw` (M, d) and the LSTM, without a client axis: the same for all clients."""
        width = self.clip.text.width
        weights = lstm_start(ENCODER, width, width // 2, seed, "init", "encoder")
        return {"raw": self.prompts.start(seed, "init", "shared"), **weights}

    def _start(self, seed: int) -> Tensor:
        encoder = self._encoder(seed)
        return fold({n: t[None] for n, t in encoder.items()})[0]

    def init_shared(self, seed: int) -> Tensors:
        """`ctx` (M, d), or `raw` (M, d) and the LSTM with `sharing: encoder`."""
        return {"ctx": self._start(seed)} if self.folded else self._encoder(seed)

    def init_private(self, seed: int, client: int) -> Tensors:
        """`raw` (M, d), the LSTM and `anchor` (M, d), all the same for all clients."""
        return {**self._encoder(seed), "anchor": self._start(seed)} if self.folded else {}

    def end_round(
        self, shared: Tensors, private: Tensors, round_info: RoundInfo
    ) -> tuple[Tensors, Tensors]:
        """Fold what the encoder has learned into the context."""
        if not self.folded:
            return shared, private
        folded_KMd = fold(private)
        context_KMd = shared["ctx"] + folded_KMd - private["anchor"]
        return {"ctx": context_KMd}, {**private, "anchor": folded_KMd}

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """Class features (K, C, D)."""
        if not self.folded:
            context_KMd = fold(shared)
        elif private is None:
            context_KMd = shared["ctx"]
        else:
            context_KMd = shared["ctx"] + fold(private) - private["anchor"]
        return {"classes": self.prompts.classes(context_KMd)}


def fold(tensors: Tensors) -> Tensor:
    """ctx(v, theta) = v + LSTM_theta(v): (K, M, d)."""
    return tensors["raw"] + lstm(tensors["raw"], tensors, ENCODER)
