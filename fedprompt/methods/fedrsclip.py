"""FedRSCLIP: shared and private prompts with two alignment constraints.

Source: FedRSCLIP: Federated Learning for Remote Sensing Scene Classification Using Vision-Language
Models (arXiv 2501.02461; IEEE GRSM 2025).

RECONSTRUCTED FROM THE ABSTRACT. Only the abstract and secondary summaries were readable to us. They
say: CLIP is frozen; Shared Prompts carry global knowledge and are aggregated, Private Prompts adapt
to a client and stay; a Dual Prompt Alignment Constraint (DPA) keeps the two semantically coherent;
a Cross-Modal Feature Alignment Constraint (CMFA) aligns text and image features; as few as 2,048
numbers are transmitted (4 tokens x 512 on ViT-B). Composition, the forms of both constraints and
all weights are our choices and are config keys; never read them as the paper's.

    L = CE + dpa_weight * DPA + cmfa_weight * CMFA

How prompts compose (`composition`), S shared and P private, g the text tower, t = g/|g|:
    two_branch  t = (1 - theta) t(S) + theta t(P)        (PromptFolio's mix, arXiv 2409.19610)
    concat      t = t([S][P])
    sum         t = t(S + P)                             (FedPGP's form, arXiv 2405.09771)
The global model is t(S) alone. `prompts` selects shared, private or both for ablations.

The default weights were chosen on the embedded scenes with seeds of their own (11 and 12), between
personal accuracy, which falls with them, and global accuracy, which rises with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedprompt.clip import FrozenCLIP
from fedprompt.errors import UserError
from fedprompt.methods.base import (
    Batch,
    Method,
    PromptSource,
    Task,
    Tensors,
    cosine_logits,
    cross_entropy,
    masked_mean,
)
from fedprompt.options import option


@dataclass(frozen=True)
class FedRSCLIPConfig:
    """Every open choice of the reconstruction; see the module's docstring."""

    name: str = option("fedrsclip", "method name")
    prompts: Literal["both", "shared", "private"] = option("both", "which prompts exist")
    shared_tokens: int = option(4, "shared context tokens (4 x 512 = 2,048 numbers)", ge=1)
    private_tokens: int = option(4, "private context tokens", ge=1)
    composition: Literal["two_branch", "concat", "sum"] = option("two_branch", "how they join")
    theta: float = option(0.5, "two_branch: weight of the private branch", ge=0, le=1)
    dpa: Literal["none", "cosine", "mse", "kl", "contrastive"] = option("cosine", "DPA's form")
    dpa_weight: float = option(0.5, "weight of DPA (lambda_1)", ge=0)
    dpa_stop_gradient: bool = option(False, "DPA moves the private side only")
    dpa_temperature: float = option(0.07, "contrastive DPA: temperature", gt=0)
    cmfa: Literal["none", "cosine", "contrastive"] = option("contrastive", "CMFA's form")
    cmfa_weight: float = option(0.25, "weight of CMFA (lambda_2)", ge=0)
    cmfa_branch: Literal["both", "shared", "private"] = option("both", "prompts CMFA acts on")
    cmfa_temperature: float | None = option(None, "null = CLIP's own, 1 / exp(logit_scale)", gt=0)
    context_init: str | None = option(None, "words that both prompts start from")
    init_std: float = option(0.02, "standard deviation of the random start", gt=0)

    def check(self) -> None:
        """Refuse combinations that have no meaning."""
        if self.prompts != "both" and self.dpa != "none":
            raise UserError("'dpa' aligns two prompts: with prompts=shared|private set dpa=none.")
        if self.prompts != "both" and self.cmfa != "none":
            if self.cmfa_branch not in ("both", self.prompts):
                raise UserError(f"cmfa_branch '{self.cmfa_branch}' does not exist here.")
        same = self.shared_tokens == self.private_tokens
        if self.prompts == "both" and not same:
            if self.composition == "sum":
                raise UserError("composition 'sum' needs shared_tokens equal to private_tokens.")
            if self.dpa == "mse":
                raise UserError("dpa 'mse' needs shared_tokens equal to private_tokens.")


class FedRSCLIP(Method):
    """Dual prompts: `ctx` of the shared container is aggregated, `ctx` of the private one stays."""

    name = "fedrsclip"
    source = "arXiv 2501.02461 (reconstructed from the abstract)"
    Config = FedRSCLIPConfig

    def __init__(self, config: FedRSCLIPConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config

        def source(tokens: int) -> PromptSource:
            return PromptSource(
                clip, task, tokens, init_text=config.context_init, init_std=config.init_std
            )

        self.shared_prompts = source(config.shared_tokens)
        self.private_prompts = source(config.private_tokens)
        if config.composition == "concat":
            tokens = config.shared_tokens + config.private_tokens
            self.joint_prompts = PromptSource(clip, task, tokens)

    def init_shared(self, seed: int) -> Tensors:
        """`ctx` (shared_tokens, d)."""
        if self.cfg.prompts == "private":
            return {}
        return {"ctx": self.shared_prompts.start(seed, "init", "shared")}

    def init_private(self, seed: int, client: int) -> Tensors:
        """`ctx` (private_tokens, d), drawn anew for every client; zero where it is a residual."""
        if self.cfg.prompts == "shared":
            return {}
        start = self.private_prompts.start(seed, "init", "private", client)
        is_residual = self.cfg.composition == "sum" and self.cfg.prompts == "both"
        return {"ctx": torch.zeros_like(start) if is_residual else start}

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """Normalised class features: `classes` to predict with, `shared` and `private` to align.

        Each (K, C, D). A branch that neither prediction nor a constraint needs is left out.
        """
        if private is None or self.cfg.prompts == "shared":
            classes = self.shared_prompts.classes(shared["ctx"])
            return {"classes": classes, "shared": classes}
        if self.cfg.prompts == "private":
            classes = self.private_prompts.classes(private["ctx"])
            return {"classes": classes, "private": classes}
        s, p = shared["ctx"], private["ctx"]
        if self.cfg.composition == "two_branch":
            s_KCD, p_KCD = self._branches(s, p)
            mixed = (1 - self.cfg.theta) * s_KCD + self.cfg.theta * p_KCD
            return {"classes": mixed, "shared": s_KCD, "private": p_KCD}
        needed = torch.is_grad_enabled() and self._needs_branches()
        if self.cfg.composition == "sum":
            joint = self.shared_prompts.classes(s + p)
            encoded = {"classes": joint, "private": joint}
            return encoded | ({"shared": self.shared_prompts.classes(s)} if needed else {})
        joint = self.joint_prompts.classes(torch.cat([s.expand(len(p), -1, -1), p], dim=-2))
        if not needed:
            return {"classes": joint}
        s_KCD, p_KCD = self._branches(s, p)
        return {"classes": joint, "shared": s_KCD, "private": p_KCD}

    def logits(self, encoded: Tensors, features_KBD: Tensor) -> Tensor:
        """Cosine logits (K, B, C) of the composed prompts."""
        return cosine_logits(self.clip, features_KBD, encoded["classes"])

    def terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        """`ce`, `dpa` and `cmfa`, each (K,) and already weighted."""
        terms = {"ce": cross_entropy(self.logits(encoded, batch.features_KBD), batch)}
        if self.cfg.dpa != "none" and self.cfg.dpa_weight > 0:
            dpa_K = self._dpa(shared["ctx"], private["ctx"], encoded, batch)
            terms["dpa"] = self.cfg.dpa_weight * dpa_K
        if self.cfg.cmfa != "none" and self.cfg.cmfa_weight > 0:
            terms["cmfa"] = self.cfg.cmfa_weight * self._cmfa(encoded, batch)
        return terms

    def _branches(self, s_KMd: Tensor, p_KMd: Tensor) -> tuple[Tensor, Tensor]:
        """Class features of both prompts, in one pass where their lengths allow."""
        if s_KMd.shape[-2] == p_KMd.shape[-2]:
            both = self.shared_prompts.classes(torch.cat([s_KMd, p_KMd]))
            return both[: len(s_KMd)], both[len(s_KMd) :]
        return self.shared_prompts.classes(s_KMd), self.private_prompts.classes(p_KMd)

    def _needs_branches(self) -> bool:
        return self.cfg.dpa not in ("none", "mse") or self.cfg.cmfa != "none"

    def _dpa(self, s_KMd: Tensor, p_KMd: Tensor, encoded: Tensors, batch: Batch) -> Tensor:
        """Dual Prompt Alignment (K,), reconstructed; 0 where both prompts agree.

        cosine       1 - mean_c cos(t_c(S), t_c(P))
        mse          mean over tokens and dimensions of (S - P)^2 (P itself where it is a residual)
        kl           mean over images of KL(p(.|x, S) || p(.|x, P))
        contrastive  symmetric InfoNCE over classes, positives (t_c(S), t_c(P))
        """
        stop = self.cfg.dpa_stop_gradient
        if self.cfg.dpa == "mse":
            if self.cfg.composition == "sum":
                return p_KMd.square().mean(dim=(-1, -2))
            return ((s_KMd.detach() if stop else s_KMd) - p_KMd).square().mean(dim=(-1, -2))
        s_KCD = encoded["shared"].detach() if stop else encoded["shared"]
        p_KCD = encoded["private"]
        if self.cfg.dpa == "cosine":
            return 1 - (s_KCD * p_KCD).sum(-1).mean(-1)
        if self.cfg.dpa == "kl":
            log_s = cosine_logits(self.clip, batch.features_KBD, s_KCD).log_softmax(-1)
            log_p = cosine_logits(self.clip, batch.features_KBD, p_KCD).log_softmax(-1)
            kl_KB = (log_s.exp() * (log_s - log_p)).sum(-1)
            return masked_mean(kl_KB, batch.mask_KB)
        similarity_KCC = s_KCD @ p_KCD.transpose(-1, -2) / self.cfg.dpa_temperature
        there = similarity_KCC.log_softmax(-1).diagonal(dim1=-2, dim2=-1).mean(-1)
        back = similarity_KCC.log_softmax(-2).diagonal(dim1=-2, dim2=-1).mean(-1)
        return -(there + back) / 2

    def _cmfa(self, encoded: Tensors, batch: Batch) -> Tensor:
        """Cross-Modal Feature Alignment (K,), reconstructed; the mean over the chosen branches.

        cosine       1 - mean_i cos(v_i, t_{y_i})
        contrastive  symmetric InfoNCE over the batch's image-text pairs, where all pairs of one
                     class are positives of each other (a plain diagonal would push images away
                     from their own class's text whenever a class repeats in the batch)
        """
        wanted = (
            ("shared", "private") if self.cfg.cmfa_branch == "both" else (self.cfg.cmfa_branch,)
        )
        present = [encoded[b] for b in wanted if b in encoded]
        form = self._cmfa_cosine if self.cfg.cmfa == "cosine" else self._cmfa_contrastive
        losses = [form(classes_KCD, batch) for classes_KCD in present]
        return torch.stack(losses).mean(0)

    def _cmfa_cosine(self, classes_KCD: Tensor, batch: Batch) -> Tensor:
        own_KBD = _class_of_each_image(classes_KCD, batch)
        return 1 - masked_mean((batch.features_KBD * own_KBD).sum(-1), batch.mask_KB)

    def _cmfa_contrastive(self, classes_KCD: Tensor, batch: Batch) -> Tensor:
        temperature = self.cfg.cmfa_temperature or 1 / self.clip.logit_scale
        texts_KBD = _class_of_each_image(classes_KCD, batch)
        logits_KBB = batch.features_KBD @ texts_KBD.transpose(-1, -2) / temperature
        real_KBB = batch.mask_KB[:, :, None] & batch.mask_KB[:, None, :]
        same_KBB = (batch.labels_KB[:, :, None] == batch.labels_KB[:, None, :]) & real_KBB
        image_to_text = _multi_positive(logits_KBB, same_KBB, batch.mask_KB)
        text_to_image = _multi_positive(logits_KBB.transpose(-1, -2), same_KBB, batch.mask_KB)
        return (image_to_text + text_to_image) / 2


def _class_of_each_image(classes_KCD: Tensor, batch: Batch) -> Tensor:
    """Class features of each image's own class: (K, B, D)."""
    index = batch.labels_KB[..., None].expand(-1, -1, classes_KCD.shape[-1])
    return classes_KCD.gather(1, index)


def _multi_positive(logits_KBB: Tensor, same_KBB: Tensor, mask_KB: Tensor) -> Tensor:
    """Mean over anchors of the mean over positives of -log softmax (SupCon's outer form): (K,)."""
    blocked = logits_KBB.masked_fill(~mask_KB[:, None, :], float("-inf"))
    log_p = blocked.log_softmax(-1).masked_fill(~same_KBB, 0.0)
    positives_KB = same_KBB.sum(-1).clamp(min=1)
    return masked_mean(-log_p.sum(-1) / positives_KB, mask_KB)
