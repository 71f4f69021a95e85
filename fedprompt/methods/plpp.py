"""PLPP: any text-prompt method, whose prompts are kept close to words by a perplexity loss.

Source: PLPP: Prompt Learning with Perplexity Is Self-Distillation for Vision-Language Models (Liu,
Fang, Wu, Zheng, Hu, Yuan, AAAI 2025, arXiv 2412.15277).

RECONSTRUCTED FROM THE ABSTRACT. It says: a plug-in loss; the cosines of the prompt with the rows of
the embedding layer give labels; a language-model head that is not trained, behind the text encoder,
gives word probabilities; labels are soft and over the k largest values only; perplexity and
inverted perplexity together are a mutual self-distillation. Our form, for each context token v_i
with output h_i of the text encoder at its position and E the token embeddings, over the k tokens
whose embeddings have the largest cosine with v_i:

    q_i = softmax cos(v_i, E),     p_i = softmax h_i . E,     each over these k tokens
    L = L_base + lambda mean_i (CE(sg(q_i), p_i) + CE(sg(p_i), q_i)),     CE(a, b) = -sum a log b

sg stops the gradient, so that each side is the other's fixed target; h_i is the output of the last
layer norm, and the head is the embedding matrix itself. k, lambda and sg are our choices: the
paper's were not readable to us. REVIEWERS OF AN EARLIER VERSION OBJECTED that CLIP's text encoder
is no language model, so that p_i is no word probability, and that the gains are within noise.

Nothing is added to what the base shares. The states h_i do not depend on class names, because
CLIP's text attention is causal: they cost one more pass over M + 1 positions per context. Text
towers that are not causal are refused, and so are methods without a shared tensor `ctx` of context
tokens; other prompts (private ones, deep ones) are not regularised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.text_tokens import tokenise
from fedprompt.config.fields import option
from fedprompt.config.search import Range, log_range
from fedprompt.errors import UserError
from fedprompt.methods.base import Batch, Task, Tensors
from fedprompt.methods.parts.nested import Parts
from fedprompt.methods.parts.wrapper import BASE, WrappedMethod, WrapperConfig

CONTEXT = "ctx"
"""The base's shared tensor that is regularised."""


@dataclass(frozen=True)
class PLPPConfig(WrapperConfig):
    """Weight and number of tokens: ours, because the paper's were not readable."""

    ppl_weight: float = option(
        0.1, "weight of both perplexity losses (lambda)", ge=0, search=log_range(0.001, 1)
    )
    top_k: int = option(5, "tokens k over which labels are spread", ge=1, search=Range(1, 20))


class PLPP(WrappedMethod):
    """The base with two more loss terms, `ppl` and `inverted_ppl`."""

    name = "plpp"
    source = "Liu et al., AAAI 2025 (reconstructed from the abstract)"
    Config = PLPPConfig
    term_names: ClassVar[tuple[str, ...]] = ("ppl", "inverted_ppl")

    def __init__(self, config: PLPPConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config
        parts = clip.text
        if not parts.causal:
            raise UserError(
                f"method plpp reads the prompt's own states, but the text tower of {clip.name} is "
                "not causal, so they would depend on the class name; take another backbone."
            )
        shape = self.base.init_shared(0)[CONTEXT].shape if CONTEXT in self.learned else ()
        if len(shape) < 2 or shape[-1] != parts.width:
            raise UserError(
                f"method plpp regularises the shared context 'ctx', which method.base "
                f"'{config.base}' does not learn; choose one with text prompts, e.g. promptfl."
            )
        words: Any = parts.token_embedding.weight
        self.words_Vd: Tensor = words.detach().float()
        self.unit_words_dV = F.normalize(self.words_Vd, dim=-1).T
        if config.top_k > len(self.words_Vd):
            raise UserError(
                f"method.top_k is above the {len(self.words_Vd)} tokens of {clip.name}."
            )
        tokens = tokenise(clip, task.class_names[:1], 0)
        before_F = tokens.ids_CL[0, : tokens.first].to(clip.device)
        self.before_Fd = parts.token_embedding(before_F).detach().float()

    def extra_loss_terms(self, shared: Parts, private: Parts, batch: Batch) -> Tensors:
        """`ppl` and `inverted_ppl` (K,), weighted; means over all context tokens of a client."""
        context = shared[BASE][CONTEXT]
        # Several contexts per client, as PLOT has, and those of classes are only more of them.
        context_NMd = context.reshape(-1, *context.shape[-2:])
        with torch.no_grad():
            cosine_NMV = F.normalize(context_NMd, dim=-1) @ self.unit_words_dV
            nearest_NMk = cosine_NMV.topk(self.cfg.top_k, dim=-1).indices
        words_NMkd = self.words_Vd[nearest_NMk]
        log_q = F.cosine_similarity(context_NMd[:, :, None], words_NMkd, dim=-1).log_softmax(-1)
        state_NMd = self.states(context_NMd)
        log_p = torch.einsum("nmd,nmkd->nmk", state_NMd, words_NMkd).log_softmax(-1)
        weight = self.cfg.ppl_weight
        return {
            "ppl": weight * _cross_entropy(log_q, log_p).reshape(len(context), -1).mean(-1),
            "inverted_ppl": weight
            * _cross_entropy(log_p, log_q).reshape(len(context), -1).mean(-1),
        }

    def states(self, context_NMd: Tensor) -> Tensor:
        """h (N, M, d): outputs of the last layer norm at the positions of the context."""
        parts = self.clip.text
        x = torch.cat([self.before_Fd.expand(len(context_NMd), -1, -1), context_NMd], dim=1)
        length = x.shape[1]
        self.clip.positions_encoded += len(x) * length
        x = x + parts.positional_embedding_Ld[:length]
        assert parts.attn_mask_LL is not None
        mask = parts.attn_mask_LL[:length, :length].to(x)
        with self.clip.autocast():
            for block in parts.blocks:
                x = block(x, attn_mask=mask)
        states_NMd: Tensor = parts.ln_final(x)[:, len(self.before_Fd) :].float()
        return states_NMd


def _cross_entropy(log_target: Tensor, log_p: Tensor) -> Tensor:
    """CE(sg(target), p) of every context token: (N, M)."""
    return -(log_target.detach().exp() * log_p).sum(-1)
