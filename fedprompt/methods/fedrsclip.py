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

How prompts compose (`composition`), with S shared, P private, g the text tower and t = g/|g|:
    two_branch  t = (1 - theta) t(S) + theta t(P)        (PromptFolio's mix, arXiv 2409.19610)
    concat      t = t([S][P])
    sum         t = t(S + P)                             (FedPGP's form, arXiv 2405.09771)
    attention   t = t(S + softmax(S P^T / sqrt(d)) P)    (`parts/composition.py`)
The global model is t(S) alone. `prompts` selects shared, private or both for ablations.

The abstract says that CMFA aligns "text and image prompts". Both readings are available:
    visual: none     no image prompts; CMFA aligns text with the frozen image features (default)
    visual: shared | private | both
                     learned tokens after the image's patches, S' aggregated, P' private; v = v/|v|
                     is then the feature of the image under them, in prediction and in CMFA
With `both` they compose as the text prompts do: v = (1 - theta) v(S') + theta v(P') from two passes
(each text branch is then paired with its own v in DPA's `kl` and in CMFA), v([S'][P']), v(S' + P'),
or by attention layer by layer; DPA is then the mean of its text and its image part. With one kind
there is one v. The global model uses v(S'), or the frozen features where no image prompts are
shared.

CMFA's cosine form is also the alignment term of DualPrompt (`dualprompt_rs`), which federates
remote-sensing scenes with a weight of 0.5. That is a precedent, and no evidence of what
FedRSCLIP uses.

The default weights were chosen on the embedded scenes with separate seeds (11 and 12), as a
compromise between personal accuracy, which falls with them, and global accuracy, which rises.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.vision_tower import VisionTower
from fedprompt.config.fields import option
from fedprompt.config.search import Range, log_range
from fedprompt.data.features.inputs import Inputs
from fedprompt.errors import UserError
from fedprompt.methods.base import Batch, Method, MethodConfig, Task, Tensors
from fedprompt.methods.parts.alignment import (
    divergence,
    image_text_contrast,
    image_text_distance,
    pair_contrast,
    pair_distance,
)
from fedprompt.methods.parts.composition import attended
from fedprompt.methods.parts.contrast import mean_image_text_contrast
from fedprompt.methods.parts.deep_prompts import layers_within
from fedprompt.methods.parts.losses import cosine_logits, cross_entropy
from fedprompt.methods.parts.prompts import PromptSource
from fedprompt.rng import normal


@dataclass(frozen=True)
class FedRSCLIPConfig(MethodConfig):
    """Every open choice of the reconstruction; see the module's docstring."""

    prompts: Literal["both", "shared", "private"] = option("both", "which prompts exist")
    shared_tokens: int = option(4, "shared context tokens (4 x 512 = 2,048 numbers)", ge=1)
    private_tokens: int = option(4, "private context tokens", ge=1)
    composition: Literal["two_branch", "concat", "sum", "attention"] = option(
        "two_branch", "how they join"
    )
    theta: float = option(
        0.5, "two_branch: weight of the private branch", ge=0, le=1, search=Range(0.1, 0.9)
    )
    dpa: Literal["none", "cosine", "mse", "kl", "contrastive"] = option("cosine", "DPA's form")
    dpa_weight: float = option(0.5, "weight of DPA (lambda_1)", ge=0, search=log_range(0.01, 2))
    dpa_stop_gradient: bool = option(False, "DPA moves the private side only")
    dpa_temperature: float = option(0.07, "contrastive DPA: temperature", gt=0)
    cmfa: Literal["none", "cosine", "contrastive"] = option("contrastive", "CMFA's form")
    cmfa_weight: float = option(0.25, "weight of CMFA (lambda_2)", ge=0, search=log_range(0.01, 2))
    cmfa_branch: Literal["both", "shared", "private"] = option("both", "prompts CMFA acts on")
    cmfa_temperature: float | None = option(None, "null = CLIP's own, 1 / exp(logit_scale)", gt=0)
    visual: Literal["none", "shared", "private", "both"] = option("none", "which image prompts")
    visual_tokens: int = option(4, "image tokens of each kind, per layer", ge=1)
    visual_depth: int = option(1, "image layers with prompts, the first counts", ge=1)
    context_init: str | None = option(None, "words that both prompts start from")
    init_std: float = option(0.02, "standard deviation of the random start", gt=0)

    @property
    def supports_image_noise(self) -> bool:
        """Unless CMFA contrasts the images of a batch, or there are prompts in the image tower."""
        return self.cmfa != "contrastive" and self.visual == "none"

    def check(self) -> None:
        """Refuse combinations without a meaning."""
        # Both constraints compare two prompts; a sum or a squared difference needs equal shapes.
        if self.prompts != "both" and self.dpa != "none":
            raise UserError("'dpa' aligns two prompts: with prompts=shared|private set dpa=none.")
        if self.prompts != "both" and self.cmfa != "none":
            if self.cmfa_branch not in ("both", self.prompts):
                raise UserError(f"cmfa_branch '{self.cmfa_branch}' does not exist here.")
        same = self.shared_tokens == self.private_tokens
        if self.prompts == "both" and not same:
            if self.composition == "sum":
                raise UserError("composition 'sum' needs shared_tokens equal to private_tokens.")
            if self.dpa == "mse" and self.composition != "attention":
                raise UserError("dpa 'mse' needs shared_tokens equal to private_tokens.")
        if self.prompts == "private" and self.visual in ("shared", "both"):
            raise UserError("prompts=private shares no text prompt: set visual=none or private.")


class FedRSCLIP(Method):
    """Dual prompts: `ctx` of the shared container is aggregated, `ctx` of the private one stays.

    The same holds for `visual` (J, M, w), J layers of M image tokens, where the config asks for it.
    """

    name = "fedrsclip"
    source = "arXiv 2501.02461 (reconstructed from the abstract)"
    Config = FedRSCLIPConfig

    @classmethod
    def needs_of(cls, config: FedRSCLIPConfig) -> frozenset[str]:
        """Pixels if there are prompts in the image tower."""
        return frozenset({"features", "pixels"}) if config.visual != "none" else cls.needs

    def __init__(self, config: FedRSCLIPConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        self.cfg = config
        self.has_global = config.prompts != "private"

        def source(tokens: int) -> PromptSource:
            return PromptSource(
                clip, task, tokens, init_text=config.context_init, init_std=config.init_std
            )

        self.shared_prompts = source(config.shared_tokens)
        self.private_prompts = source(config.private_tokens)
        if config.composition == "concat":
            # [S][P] is one context of both lengths, so it needs a tower with room for it. It never
            # starts a prompt, so it gets no start words.
            tokens = config.shared_tokens + config.private_tokens
            self.joint_prompts = PromptSource(clip, task, tokens)
        self.needs = self.needs_of(config)
        if config.visual != "none":
            self.vision = VisionTower(clip)
            self.images_at_once = 256

    def init_shared(self, seed: int) -> Tensors:
        """`ctx` (shared_tokens, d), and `visual` where image prompts are shared."""
        if self.cfg.prompts == "private":
            return {}
        start = {"ctx": self.shared_prompts.start(seed, "init", "shared")}
        if self.cfg.visual in ("shared", "both"):
            start["visual"] = self._visual_start(seed, "shared")
        return start

    def init_private(self, seed: int, client: int) -> Tensors:
        """`ctx` (private_tokens, d) and `visual`, a draw per client; zeros where they are added."""
        start = {}
        if self.cfg.prompts != "shared":
            start["ctx"] = self.private_prompts.start(seed, "init", "private", client)
            if self.cfg.prompts == "both" and self.cfg.composition == "sum":
                # P is a residual of S, so the client's first model is the shared one.
                start["ctx"] = torch.zeros_like(start["ctx"])
        if self.cfg.visual in ("private", "both"):
            start["visual"] = self._visual_start(seed, "private", client)
            if self.cfg.visual == "both" and self.cfg.composition == "sum":
                start["visual"] = torch.zeros_like(start["visual"])
        return start

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """Class features `classes` for prediction, `shared` and `private` for the constraints.

        Each is (K, C, D), of normalised features. A branch that neither prediction nor a constraint
        needs is left out. Image prompts (K, J, M, w) are `visual` if one pass through the image
        tower is enough, else `visual_shared` and `visual_private`.
        """
        return self._encode_text(shared, private) | self._compose_visual(shared, private)

    def _encode_text(self, shared: Tensors, private: Tensors | None) -> Tensors:
        if private is None or self.cfg.prompts == "shared":
            classes = self.shared_prompts.classes(shared["ctx"])
            return {"classes": classes, "shared": classes}
        if self.cfg.prompts == "private":
            classes = self.private_prompts.classes(private["ctx"])
            return {"classes": classes, "private": classes}
        s, p = shared["ctx"], private["ctx"]
        if self.cfg.composition == "two_branch":
            s_KCD, p_KCD = self._branches(s, p)
            # t = (1 - theta) t(S) + theta t(P), which is not normalised again (PromptFolio's mix).
            mixed = self._mixed(s_KCD, p_KCD)
            return {"classes": mixed, "shared": s_KCD, "private": p_KCD}
        # Evaluation only predicts, so the branches' passes through the text tower are saved there.
        needed = torch.is_grad_enabled() and self._needs_branches()
        if self._adds:
            # t(S + P) takes the part of the private branch: P alone is a residual, not a prompt.
            joint = self.shared_prompts.classes(self._added(s, p))
            encoded = {"classes": joint, "private": joint}
            return encoded | ({"shared": self.shared_prompts.classes(s)} if needed else {})
        joint = self.joint_prompts.classes(torch.cat([s.expand(len(p), -1, -1), p], dim=-2))
        if not needed:
            return {"classes": joint}
        s_KCD, p_KCD = self._branches(s, p)
        return {"classes": joint, "shared": s_KCD, "private": p_KCD}

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Cosine logits (K, B, C) of the composed prompts."""
        images_KBD = self._images(encoded, inputs)["images"]
        return cosine_logits(self.clip, images_KBD, encoded["classes"])

    def loss_terms(
        self, shared: Tensors, private: Tensors, encoded: Tensors, batch: Batch
    ) -> dict[str, Tensor]:
        """`ce`, `dpa` and `cmfa`, each (K,) and already weighted."""
        images = self._images(encoded, batch.inputs)
        logits_KBC = cosine_logits(self.clip, images["images"], encoded["classes"])
        loss_terms = {"ce": cross_entropy(logits_KBC, batch)}
        # A term of weight zero is left out: it would cost time and change nothing.
        if self.cfg.dpa != "none" and self.cfg.dpa_weight > 0:
            loss_terms["dpa"] = self.cfg.dpa_weight * self._dpa(
                shared, private, encoded, images, batch
            )
        if self.cfg.cmfa != "none" and self.cfg.cmfa_weight > 0:
            loss_terms["cmfa"] = self.cfg.cmfa_weight * self._cmfa(encoded, images, batch)
        return loss_terms

    def class_embeddings(self, encoded: Tensors) -> Tensor | None:
        """None if prompts change the image features."""
        prompted = any(name.startswith("visual") for name in encoded)
        return None if prompted else super().class_embeddings(encoded)

    def _branches(self, s_KMd: Tensor, p_KMd: Tensor) -> tuple[Tensor, Tensor]:
        """Class features of both prompts, in one pass if they are equally long."""
        # The shared contexts may have a client axis of 1, so the result is divided at their length.
        if s_KMd.shape[-2] == p_KMd.shape[-2]:
            both = self.shared_prompts.classes(torch.cat([s_KMd, p_KMd]))
            s_KCD, p_KCD = both.split([len(s_KMd), len(p_KMd)])
            return s_KCD, p_KCD
        return self.shared_prompts.classes(s_KMd), self.private_prompts.classes(p_KMd)

    @property
    def _adds(self) -> bool:
        """Whether the private prompt is a residual of the shared one."""
        return self.cfg.composition in ("sum", "attention")

    def _added(self, s: Tensor, p: Tensor) -> Tensor:
        """The shared prompt with its residual, (..., M, d)."""
        return attended(s, p) if self.cfg.composition == "attention" else s + p

    def _mixed(self, s: Tensor, p: Tensor) -> Tensor:
        """(1 - theta) s + theta p; a single kernel on GPUs, other last bits."""
        theta = self.cfg.theta
        if s.device.type == "cpu" or s.shape != p.shape:
            return (1 - theta) * s + theta * p
        return torch.lerp(s, p, theta)

    def _needs_branches(self) -> bool:
        # `mse` compares the prompts themselves, not their class features.
        return self.cfg.dpa not in ("none", "mse") or self.cfg.cmfa != "none"

    def _visual_start(self, seed: int, *purpose: str | int) -> Tensor:
        depth = layers_within("image", self.cfg.visual_depth, self.vision.layers)
        shape = (depth, self.cfg.visual_tokens, self.vision.width)
        return normal(shape, self.cfg.init_std, seed, "init", *purpose, "visual")

    def _compose_visual(self, shared: Tensors, private: Tensors | None) -> Tensors:
        s, p = shared.get("visual"), (private or {}).get("visual")
        if s is None or p is None:
            only = p if s is None else s
            return {} if only is None else {"visual": only}
        if self.cfg.composition == "two_branch":
            return {"visual_shared": s, "visual_private": p}
        if self._adds:
            return {"visual": self._added(s, p)}
        return {"visual": torch.cat([s.expand(len(p), -1, -1, -1), p], dim=-2)}

    def _images(self, encoded: Tensors, inputs: Inputs) -> Tensors:
        """Image features (K, B, D): `images` for prediction; after two passes also both branches.

        The branches are called `shared` and `private`, like the text branches that they meet.
        """

        def prompted(name: str) -> Tensor:
            assert inputs.pixels is not None
            return self.vision.features(inputs.pixels, encoded[name])

        if "visual_shared" in encoded:
            s_KBD, p_KBD = prompted("visual_shared"), prompted("visual_private")
            mixed = (1 - self.cfg.theta) * s_KBD + self.cfg.theta * p_KBD
            return {"images": mixed, "shared": s_KBD, "private": p_KBD}
        return {"images": prompted("visual") if "visual" in encoded else inputs.features}

    def _dpa(
        self, shared: Tensors, private: Tensors, encoded: Tensors, images: Tensors, batch: Batch
    ) -> Tensor:
        """Dual Prompt Alignment (K,), reconstructed; 0 where both prompts agree.

        cosine       1 - mean_c cos(t_c(S), t_c(P)); for images 1 - mean_i cos(v_i(S'), v_i(P'))
        mse          mean over tokens and dimensions of (S - P)^2 (P itself where it is a residual);
                     likewise of the image prompts
        kl           mean over images of KL(p(.|x, S) || p(.|x, P))
        contrastive  symmetric InfoNCE over classes, positives (t_c(S), t_c(P)); for images over the
                     batch, positives (v_i(S'), v_i(P'))
        """
        if self.cfg.dpa == "mse":
            both = [n for n in ("ctx", "visual") if n in shared and n in private]
            return _mean([self._prompt_distance(shared[n], private[n]) for n in both])
        if self.cfg.dpa == "kl":
            s_KBC, p_KBC = (
                cosine_logits(self.clip, images.get(b, images["images"]), encoded[b])
                for b in ("shared", "private")
            )
            return divergence(self._fixed(s_KBC), p_KBC, batch.mask_KB)
        pairs: list[tuple[Tensor, Tensor, Tensor | None]]
        pairs = [(self._fixed(encoded["shared"]), encoded["private"], None)]
        if "shared" in images:
            pairs.append((self._fixed(images["shared"]), images["private"], batch.mask_KB))
        if self.cfg.dpa == "cosine":
            return _mean([pair_distance(*pair) for pair in pairs])
        return _mean([pair_contrast(*pair, self.cfg.dpa_temperature) for pair in pairs])

    def _prompt_distance(self, s: Tensor, p: Tensor) -> Tensor:
        """Mean squared difference (K,) of prompts (K, ..., M, d); of a residual, its square."""
        s = self._fixed(s)
        if self.cfg.composition == "attention":
            difference = self._added(s, p) - s
        else:
            difference = p if self.cfg.composition == "sum" else s - p
        return difference.square().flatten(1).mean(-1)

    def _fixed(self, shared_side: Tensor) -> Tensor:
        # Detached, the shared prompt is a target and DPA moves the private prompt only.
        return shared_side.detach() if self.cfg.dpa_stop_gradient else shared_side

    def _cmfa(self, encoded: Tensors, images: Tensors, batch: Batch) -> Tensor:
        """Cross-Modal Feature Alignment (K,), reconstructed; the mean over the chosen branches.

        cosine       1 - mean_i cos(v_i, t_{y_i})
        contrastive  symmetric InfoNCE over the batch, all pairs of one class positives
        """
        branches = (
            ("shared", "private") if self.cfg.cmfa_branch == "both" else (self.cfg.cmfa_branch,)
        )
        present = [b for b in branches if b in encoded]
        temperature = self.cfg.cmfa_temperature or 1 / self.clip.logit_scale
        # After one pass through the image tower both branches share its features.
        one_pass = not any(b in images for b in present)
        if self.cfg.cmfa == "contrastive" and one_pass and self.clip.device.type != "cpu":
            classes = [encoded[b] for b in present]
            return mean_image_text_contrast(images["images"], classes, batch, temperature)
        losses = []
        for branch in present:
            images_KBD = images.get(branch, images["images"])
            if self.cfg.cmfa == "cosine":
                losses.append(image_text_distance(images_KBD, encoded[branch], batch))
            else:
                losses.append(image_text_contrast(images_KBD, encoded[branch], batch, temperature))
        return _mean(losses)


def _mean(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).mean(0)
