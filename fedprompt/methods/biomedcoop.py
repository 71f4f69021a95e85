"""BiomedCoOp: CoOp that stays close to what a language model writes about the classes.

Source: BiomedCoOp: Learning to Prompt for Biomedical Vision-Language Models (Koleilat,
Asgariandehkordi, Rivaz, Xiao, CVPR 2025, arXiv 2411.15232). Each class c has N sentences with
features d_ic. With d_c their normalised mean, and S the sentences left after pruning,

    L = CE + lambda_1 mean over classes and components of (t_c - d_c)^2
           + lambda_2 KL(softmax z0 || softmax z) / (B C),    z0 = exp(logit_scale) v . d_c(S)

d_c(S) is the normalised mean over S. Sentence i of all classes has the score s_i, the mean over the
batch of its largest logit; S = {i : |s_i - mean s| <= tau std s}. Checked against the authors'
`trainers/BiomedCoOp/biomedcoop_clip.py` (7ceb5a8).

The paper prunes by the robust score (s_i - median) / MAD. Its code forms that score and then
standardises it once more, which cancels the first step: what is left is the rule above
(`pruning: z_score`, the published results). `pruning: mad` is |s_i - median| <= tau MAD, as the
paper means it.

Shared is the context, 2,048 numbers for 4 tokens of 512; nothing is private. Sentences come from
`data.descriptions`, which all clients know; without them the templates stand in. How we differ: the
means and the pruning are over each client's own images. `kl_norm: batchmean` leaves out the
division by C, which makes the term's weight depend on the number of classes. If a single sentence
is left, there is nothing to prune. The code's first epoch has the rate 1e-5, and its loader leaves
out the last partial batch of an epoch; ours does neither (docs/concepts.md, "Local training").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.fields import option
from fedprompt.config.search import Range, log_range
from fedprompt.methods.base import Batch, Task, Tensors
from fedprompt.methods.parts.losses import cosine_logits, cross_entropy, masked_mean
from fedprompt.methods.parts.sentences import sentence_features
from fedprompt.methods.promptfl import PromptFL, PromptFLConfig


@dataclass(frozen=True)
class BiomedCoOpConfig(PromptFLConfig):
    """Defaults: those of the code's `train.py`; its configs tune both weights per data set."""

    context_tokens: int = option(4, "context tokens M", ge=1)
    context_init: str | None = option("a photo of a", "words to start from; null = random")
    mean_weight: float = option(
        1.0, "weight of the distance to the sentences' mean (lambda_1)",
        ge=0, search=log_range(0.25, 20),
    )  # fmt: skip
    kl_weight: float = option(
        1.0, "weight of the divergence from the pruned sentences (lambda_2)",
        ge=0, search=log_range(0.25, 20),
    )  # fmt: skip
    # With at least 1, one sentence always passes.
    tau: float = option(1.5, "spread beyond which a sentence is pruned", ge=1, search=Range(1, 3))
    pruning: Literal["z_score", "mad", "none"] = option(
        "z_score", "z_score: as the code computes; mad: as the paper means; none: keep all"
    )
    kl_norm: Literal["numel", "batchmean"] = option(
        "numel", "divide the divergence by images x classes, or by images"
    )


class BiomedCoOp(PromptFL):
    """One shared context that stays close to sentences about the classes; nothing is private."""

    name = "biomedcoop"
    source = "Koleilat et al., CVPR 2025"
    Config = BiomedCoOpConfig
    reads_descriptions = True

    def __init__(self, config: BiomedCoOpConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config
        self.sentences_NCD = sentence_features(clip, task, self.name)
        self.mean_CD = F.normalize(self.sentences_NCD.mean(0), dim=-1)

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        """Cross-entropy `ce`, and the weighted terms `mean` and `kl`."""
        logits_KBC = self.logits(encoded, batch.inputs)
        distance_K = (encoded["classes"] - self.mean_CD).square().mean((-2, -1))
        teacher_KBC = cosine_logits(self.clip, batch.inputs.features, self._selected(batch))
        log_q, log_p = teacher_KBC.log_softmax(-1), logits_KBC.log_softmax(-1)
        kl_K = masked_mean((log_q.exp() * (log_q - log_p)).sum(-1), batch.mask_KB)
        classes = logits_KBC.shape[-1] if self.cfg.kl_norm == "numel" else 1
        return {
            "ce": cross_entropy(logits_KBC, batch),
            "mean": self.cfg.mean_weight * distance_K,
            "kl": self.cfg.kl_weight * kl_K / classes,
        }

    def _selected(self, batch: Batch) -> Tensor:
        """d_c(S) of each client (K, C, D)."""
        v_KBD = batch.inputs.features
        best_KBN = torch.einsum("kbd,ncd->kbnc", v_KBD, self.sentences_NCD).amax(-1)
        scores_KN = self.clip.logit_scale * masked_mean(
            best_KBN.transpose(1, 2), batch.mask_KB[:, None].expand(-1, best_KBN.shape[2], -1)
        )
        keep_KN = kept(scores_KN, self.cfg.tau, self.cfg.pruning).to(scores_KN.dtype)
        mean_KCD = torch.einsum("kn,ncd->kcd", keep_KN, self.sentences_NCD)
        return F.normalize(mean_KCD, dim=-1)


def kept(scores_KN: Tensor, tau: float, pruning: str) -> Tensor:
    """Which of N sentences each client keeps, (K, N): at least one.

    Args:
        scores_KN: s_i.
        tau: how many spreads a score may lie from the centre; at least 1.
        pruning: `z_score`, `mad` or `none`.
    """
    if pruning == "none" or scores_KN.shape[-1] == 1:
        return torch.ones_like(scores_KN, dtype=torch.bool)
    if pruning == "z_score":
        centre, spread = scores_KN.mean(-1, keepdim=True), scores_KN.std(-1, keepdim=True)
    else:
        centre = scores_KN.median(-1, keepdim=True).values
        spread = (scores_KN - centre).abs().median(-1, keepdim=True).values
    return (scores_KN - centre).abs() <= tau * spread
