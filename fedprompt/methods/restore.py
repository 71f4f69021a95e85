"""RESTORE: MaPLe whose prompts shift both towers alike, with calibrators behind them.

Source: RESTORE: Towards Feature Shift for Vision-Language Prompt Learning (Yang, Zhang, Yang, Gao,
Qin, Li, Sun, Yang, Gu, arXiv 2403.06136). With P_j the text prompts of layer j, V_j = F_j(P_j) the
visual ones and s(P) = ||P^T P||_F, the size of the shift that prompts cause,

    L  = CE + lambda sum over layers j > 0 of (s(P_j) / s(P_j at the start) - s(V_j) / s(V_j at the
         start))^2
    t' = t + r_t FFN_t(LN(t)),    v' = v + r_v FFN_v(LN(v)),    FFN: D -> 4 D, QuickGELU, -> D

on features t, v that are not normalised; cosine logits. The ratios r are not learned: once, after a
third of the training, they grow by 0.02 and 0.005 times the mean shift over the layers j > 0.
Checked against the authors' `trainers/maple_fsa.py` (4c64a17).

`sharing` is MaPLe's option, with `factors` as default; `calibrators: private` stay with the client,
and the global model has none. Upload on ViT-B/16: 3,555,072 numbers, 7,756,544 with `calibrators:
shared`, whose global model has the ratios of the config. A client takes its own shift at the end of
its first round after a third of all rounds, and keeps it.

The shift is a statistic of drift: clients report `text_shift` and `visual_shift`, means over the
round, which become `statistics` in `metrics.jsonl` and a figure of the report. With `shift_space:
feature` they are the mean lengths of t - t0 and v - v0, normalised features against the frozen
CLIP's before calibration, and the term is lambda times the squared difference of the two. The paper
speaks of this shift and its code measures the prompts; the form of the term is inferred.

How we differ: we use float32 where the code rounds prompts to half precision. The code's first
epoch has the rate 1e-5, and its loader leaves out the last partial batch of an epoch; ours does
neither (docs/concepts.md, "Local training"). The paper tunes r and lambda for each data set: r_v
0.01 to 0.15, r_t 0.05 or 0.1, lambda 1 (0.5 for DTD).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.fields import option
from fedprompt.config.search import Range, log_range
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import Batch, RoundInfo, Task, Tensors
from fedprompt.methods.maple import MaPLe, MaPLeConfig, visual_prompts
from fedprompt.methods.parts.linear import layer_norm, linear, linear_start
from fedprompt.methods.parts.losses import cosine_logits, cross_entropy, masked_mean

TEXT, VISUAL = "text_calibrator", "visual_calibrator"
GROWTH = {TEXT: 0.02, VISUAL: 0.005}
"""How much a ratio grows for each unit of shift; in the authors' code."""


@dataclass(frozen=True)
class RestoreConfig(MaPLeConfig):
    """Defaults: MaPLe's, and the ratios and the weight of the authors' `train.py`."""

    sharing: Literal["text", "factors", "materialised"] = option("factors", "what is averaged")
    calibrators: Literal["private", "shared"] = option(
        "private", "whether calibrators are averaged too"
    )
    text_ratio: float = option(
        0.1, "r_t, weight of the text calibrator, before it grows", ge=0, search=Range(0.01, 0.15)
    )
    visual_ratio: float = option(
        0.1, "r_v, weight of the image calibrator, before it grows", ge=0, search=Range(0.01, 0.15)
    )
    shift_weight: float = option(
        1.0, "weight of the difference between both shifts (lambda)", ge=0,
        search=log_range(0.1, 10),
    )  # fmt: skip
    shift_space: Literal["prompt", "feature"] = option(
        "prompt", "where the shift is measured: prompts as in the code, or features"
    )


class Restore(MaPLe):
    """MaPLe's tensors, two calibrators, and the private `shift` (2,) and `start` (2, J - 1).

    A calibrator has `.norm`, `.up` and `.down`, each with `.weight` and `.bias`. `shift` is that of
    text and images which the ratios have grown by, 0 before; `start` are the shifts of all deep
    layers at the start of the run.
    """

    name = "restore"
    source = "Yang et al., arXiv 2024"
    Config = RestoreConfig
    measured = frozenset({"text_shift", "visual_shift"})

    def __init__(self, config: RestoreConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config
        self.frozen = self.frozen | {"private.shift", "private.start"}

    @cached_property
    def frozen_classes(self) -> Tensor:
        """t0 (C, D); only the feature space needs it."""
        return self.clip.zero_shot_classifier(self.task.class_names, self.task.templates)

    def init_shared(self, seed: int) -> Tensors:
        """MaPLe's, with `calibrators: shared` also the calibrators."""
        more = self._calibrators(seed) if self.cfg.calibrators == "shared" else {}
        return super().init_shared(seed) | more

    def init_private(self, seed: int, client: int) -> Tensors:
        """MaPLe's, `shift`, `start`, and with `calibrators: private` the calibrators."""
        more = self._calibrators(seed) if self.cfg.calibrators == "private" else {}
        text = {"text": self.text.start(seed, "init", "shared")}
        start = torch.stack(
            [_sizes(t)[1:] for t in (text["text"], visual_prompts(text, self._start_factors(seed)))]
        )
        private = super().init_private(seed, client)
        return private | more | {"shift": torch.zeros(2), "start": start}

    def _calibrators(self, seed: int) -> Tensors:
        width = self.clip.embed_dim
        start: Tensors = {}
        for name in (TEXT, VISUAL):
            start |= {f"{name}.norm.weight": torch.ones(width)}
            start |= {f"{name}.norm.bias": torch.zeros(width)}
            start |= linear_start(f"{name}.up", 4 * width, width, seed, "init")
            start |= linear_start(f"{name}.down", width, 4 * width, seed, "init")
        return start

    def start_round(
        self, shared: Tensors, private: Tensors, round_info: RoundInfo
    ) -> tuple[Tensors, Tensors]:
        """MaPLe's; the frozen class features are ready before the first step needs them."""
        if self.cfg.shift_space == "feature":
            self.frozen_classes  # noqa: B018 - computed on its first use
        return super().start_round(shared, private, round_info)

    def end_round(
        self, shared: Tensors, private: Tensors, round_info: RoundInfo
    ) -> tuple[Tensors, Tensors]:
        """MaPLe's; the ratios grow at the end of the first round after a third of the run."""
        if round_info.server_round > round_info.rounds // 3:
            visual = self.visual(shared, private)["visual"]
            shift_K2 = torch.stack([_shift(shared["text"]), _shift(visual)], dim=-1)
            grown_K2 = torch.where(private["shift"] == 0, shift_K2, private["shift"])
            private = private | {"shift": grown_K2}
        return super().end_round(shared, private, round_info)

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """`classes` and `prompted` (K, C, D), after and before calibration, and `visual`.

        Also the image calibrator and `shift`, if the model has them.
        """
        tensors, raw_KCD = shared | (private or {}), self.text.raw(shared["text"])
        encoded = {
            "classes": F.normalize(self._calibrated(raw_KCD, tensors, TEXT), dim=-1),
            "prompted": F.normalize(raw_KCD, dim=-1),
        }
        more = {n: t for n, t in tensors.items() if n.startswith(VISUAL) or n == "shift"}
        return encoded | self.visual(shared, private) | more

    def images(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """L2-normalised image features (K, B, D) behind the calibrator, if there is one."""
        if "visual" not in encoded:
            return inputs.features  # the global model of `sharing: text`
        raw_KBD = self._prompted(encoded, inputs)
        return F.normalize(self._calibrated(raw_KBD, encoded, VISUAL), dim=-1)

    def class_embeddings(self, encoded: Tensors) -> Tensor | None:
        """None if prompts or a calibrator change the image features."""
        return None if "visual" in encoded else super().class_embeddings(encoded)

    def _prompted(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Image features (K, B, D) under prompts, before calibration, not normalised."""
        assert inputs.pixels is not None
        return self.vision.raw(inputs.pixels, encoded["visual"])

    def _calibrated(self, features: Tensor, tensors: Tensors, name: str) -> Tensor:
        """f + r FFN(LN(f)) of features (K, ..., D) that are not normalised."""
        if f"{name}.up.weight" not in tensors:
            return features  # the global model, if calibrators are private
        normed = layer_norm(features, tensors[f"{name}.norm.weight"], tensors[f"{name}.norm.bias"])
        hidden = linear(normed, tensors[f"{name}.up.weight"], tensors[f"{name}.up.bias"])
        hidden = hidden * torch.sigmoid(1.702 * hidden)  # QuickGELU
        out = linear(hidden, tensors[f"{name}.down.weight"], tensors[f"{name}.down.bias"])
        return features + self._ratio(tensors, name) * out

    def _ratio(self, tensors: Tensors, name: str) -> Tensor | float:
        """r_t or r_v; (K, 1, 1) where clients know their shift."""
        base = self.cfg.text_ratio if name == TEXT else self.cfg.visual_ratio
        if "shift" not in tensors:
            return base
        own_K = tensors["shift"][:, 0 if name == TEXT else 1]
        return base + GROWTH[name] * own_K[:, None, None]

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        """`ce`, the weighted term `shift`, and the measured `text_shift` and `visual_shift`."""
        raw_KBD = self._prompted(encoded, batch.inputs)
        images_KBD = F.normalize(self._calibrated(raw_KBD, encoded, VISUAL), dim=-1)
        if self.cfg.shift_space == "prompt":
            text_K, visual_K = _shift(shared["text"]), _shift(encoded["visual"])
            start_K2j = private["start"]
            text_Kj = _sizes(shared["text"])[:, 1:] / start_K2j[:, 0]
            visual_Kj = _sizes(encoded["visual"])[:, 1:] / start_K2j[:, 1]
            apart_K = (text_Kj - visual_Kj).square().sum(-1)
        else:
            text_K = (encoded["prompted"] - self.frozen_classes).norm(dim=-1).mean(-1)
            visual_KB = (F.normalize(raw_KBD, dim=-1) - batch.inputs.features).norm(dim=-1)
            visual_K = masked_mean(visual_KB, batch.mask_KB)
            apart_K = (text_K - visual_K).square()
        return {
            "ce": cross_entropy(cosine_logits(self.clip, images_KBD, encoded["classes"]), batch),
            "shift": self.cfg.shift_weight * apart_K,
            "text_shift": text_K.detach(),
            "visual_shift": visual_K.detach(),
        }


def _sizes(prompts_JM_: Tensor) -> Tensor:
    """||P_j^T P_j||_F of every layer (..., J), by the smaller matrix P_j P_j^T of equal norm."""
    gram = prompts_JM_ @ prompts_JM_.transpose(-1, -2)
    return gram.square().sum((-2, -1)).sqrt()


def _shift(prompts_KJM_: Tensor) -> Tensor:
    """The mean shift (K,) of the layers after the first; 0 if there are none."""
    deep = prompts_KJM_.shape[1] - 1
    return _sizes(prompts_KJM_)[:, 1:].sum(-1) / max(deep, 1)
