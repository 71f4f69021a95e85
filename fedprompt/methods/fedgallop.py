"""FedGalLoP: shared prompts of whole images, and private ones of an image's few best regions.

Sources: GalLoP: Learning Global and Local Prompts for Vision-Language Models (Lafon, Ramzi,
Rambour, Audebert, Thome, ECCV 2024, arXiv 2407.01400) for the method; FOCoOp (Liao et al., ICML
2025, arXiv 2506.16218; code PengyangZhou/FOCoOp, commit f30f6f3) for the federation, of which it is
a baseline. With g_n the class features of G global prompts, l_s those of one local prompt per scale
k_s, and h(r_p) = W r_p / |W r_p| the features of regions,

    global_c = mean_n cos(v, g_nc),      local_cs = mean of the k_s largest cos(h(r_p), l_sc),
    L = CE(scale mean of a random part of the global cosines) + mean_s CE(scale local_s),

where each image keeps (1 - dropout) G global prompts, at least one: "prompt dropout", which makes
prompts differ that start alike. Predicted is scale (global + mean_s local_s) / 2. Global prompts
are shared, 8,192 numbers for 4 of 4 tokens of 512; local prompts and W, which starts as the
identity, are private. The global model is the global prompts alone. A model's novelty is minus
GL-MCM of its own cosines, the score of the paper, which the `ood` protocol reports as "novelty
head": the largest softmax probability, at temperature 1, of the global cosines plus that of any
region under the mean local prompt.

Defaults are the paper's (4 global prompts, dropout 0.75) and those of both codes (4 tokens from "a
photo of a", k = 5, 10, 15, 20); the federated code has one global prompt, for which its dropout of
0.9 means nothing.

TRAPS of the federated code, which are not reproduced: the prompts of an image are drawn with
replacement, so two that are kept may be one; the entropies of LoCoOp's `top_k` and `lambda_local`
are passed on and never read.

How we differ: W acts on the regions' features in the joint space, which are cached, and not before
CLIP's own projection. A scale that exceeds the number of regions counts all of them. In training,
all global prompts are encoded; GalLoP's `prompts_batch_size` encodes some, to save memory.

Suffixes: K clients, B images, P regions, C classes, G global prompts, S scales, D joint embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.fields import option
from fedprompt.config.search import Range
from fedprompt.data.features.inputs import Inputs
from fedprompt.errors import UserError
from fedprompt.methods.base import Batch, Method, Task, Tensors
from fedprompt.methods.parts.losses import cross_entropy
from fedprompt.methods.parts.prompts import PromptConfig, PromptSource


@dataclass(frozen=True)
class FedGalLoPConfig(PromptConfig):
    """Defaults: the paper's and both codes'."""

    context_tokens: int = option(4, "context tokens M of each prompt", ge=1)
    context_init: str | None = option("a photo of a", "words that all prompts start from")
    global_prompts: int = option(4, "shared prompts G", ge=1)
    scales: list[int] = option([5, 10, 15, 20], "regions k of each local prompt")
    dropout: float = option(
        0.75, "share of the global prompts that an image leaves out", ge=0, lt=1,
        search=Range(0.0, 0.9),
    )  # fmt: skip

    def check(self) -> None:
        """Refuse scales without a region, or none at all."""
        if not self.scales or min(self.scales) < 1:
            raise UserError(f"'scales' is {self.scales}; it must list numbers of at least 1.")


class FedGalLoP(Method):
    """`ctx` (G, M, d) is shared; `local` (S, M, d) and `projection` (D, D) are private."""

    name = "fedgallop"
    source = "Lafon et al., ECCV 2024; Liao et al., ICML 2025 (baseline)"
    Config = FedGalLoPConfig
    needs = frozenset({"features", "local"})
    images_at_once = 128
    """The cosines of 100 classes, 4 prompts and 196 regions take 314 kB per image."""

    def __init__(self, config: FedGalLoPConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config
        self.prompts = PromptSource.of(config, clip, task)
        self.kept = max(1, config.global_prompts - int(config.dropout * config.global_prompts))

    def _starts(self, count: int, seed: int, purpose: str) -> Tensor:
        # With a random start, every prompt has a draw of its own.
        return torch.stack([self.prompts.start(seed, "init", purpose, n) for n in range(count)])

    def init_shared(self, seed: int) -> Tensors:
        """`ctx` (G, M, d)."""
        return {"ctx": self._starts(self.cfg.global_prompts, seed, "shared")}

    def init_private(self, seed: int, client: int) -> Tensors:
        """`local` (S, M, d) and `projection` (D, D); all clients start from the same ones."""
        return {
            "local": self._starts(len(self.cfg.scales), seed, "private"),
            "projection": torch.eye(self.clip.embed_dim),
        }

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """`prompts` (K, G, C, D); of a client also `local` (K, S, C, D) and `projection`."""
        encoded = {"prompts": self.prompts.classes(shared["ctx"])}
        if private is not None:
            encoded["local"] = self.prompts.classes(private["local"])
            encoded["projection"] = private["projection"]
        return encoded

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Logits (K, B, C) of global and local cosines together."""
        cosines_KBC = self._global(encoded, inputs).mean(2)
        if "local" in encoded:
            local_KBSC = self._best(self._regions(encoded, inputs))
            cosines_KBC = (cosines_KBC + local_KBSC.mean(2)) / 2
        return self.clip.logit_scale * cosines_KBC

    def novelty(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Minus GL-MCM (K, B), or minus MCM without local prompts."""
        score_KB = self._global(encoded, inputs).mean(2).softmax(-1).amax(-1)
        if "local" in encoded:
            regions_KBPC = self._regions(encoded, inputs).mean(3)
            score_KB = score_KB + regions_KBPC.softmax(-1).amax((-2, -1))
        return -score_KB

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        """`ce` of some global prompts per image, and `local`, the mean over scales."""
        scale, cosines_KBGC = self.clip.logit_scale, self._global(encoded, batch.inputs)
        # Images first: those of a client get the same draws however far its batch is padded.
        drawn_KBG = batch.uniform(tuple(cosines_KBGC.shape[1:3]), "dropout")
        kept_KBG = drawn_KBG.argsort(-1).argsort(-1) < self.kept
        logits_KBC = scale * (cosines_KBGC * kept_KBG[..., None]).sum(2) / self.kept
        local_KBSC = self._best(self._regions(encoded, batch.inputs))
        per_scale = [cross_entropy(scale * one_KBC, batch) for one_KBC in local_KBSC.unbind(2)]
        return {
            "ce": cross_entropy(logits_KBC, batch),
            "local": torch.stack(per_scale).mean(0),
        }

    def _global(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Cosines of whole images and global prompts, (K, B, G, C)."""
        return torch.einsum("kbd,kgcd->kbgc", inputs.features, encoded["prompts"])

    def _regions(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Cosines of projected regions and local prompts, (K, B, P, S, C)."""
        assert inputs.local is not None
        regions_KBPD = torch.einsum("kbpd,ked->kbpe", inputs.local, encoded["projection"])
        regions_KBPD = F.normalize(regions_KBPD, dim=-1)
        return torch.einsum("kbpd,kscd->kbpsc", regions_KBPD, encoded["local"])

    def _best(self, cosines_KBPSC: Tensor) -> Tensor:
        """For each scale, the mean of its k largest cosines of a class, (K, B, S, C)."""
        found = []
        for s, k in enumerate(self.cfg.scales):
            of_scale_KBPC = cosines_KBPSC[:, :, :, s]
            best = of_scale_KBPC.topk(min(k, of_scale_KBPC.shape[2]), dim=2).values
            found.append(best.mean(2))
        return torch.stack(found, dim=2)
