"""The frozen CLIP that every client holds: the only module that knows open_clip.

Shape suffixes: B images, C classes, D joint embedding, d text width, L text positions.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.timm_model import TimmModel
from PIL import Image
from torch import Tensor, nn

from fedprompt.backbone.frozen_layer import FrozenLayer
from fedprompt.errors import UserError


@dataclass(frozen=True)
class TextParts:
    """The pieces of a text tower that prompts are threaded through.

    `causal` says that a position sees only earlier ones; `pools_at_end` that the feature is read
    at the end-of-text token. The shared-prefix evaluation needs both.
    """

    token_embedding: nn.Embedding
    positional_embedding_Ld: Tensor
    blocks: Sequence[Any]
    ln_final: nn.Module
    projection: Tensor | nn.Module | None
    attn_mask_LL: Tensor | None
    heads: int
    width: int
    context_length: int
    pool_type: str
    eos_id: int | None
    causal: bool
    pools_at_end: bool
    plain_blocks: bool


class FrozenCLIP:
    """A CLIP model in eval mode without gradients to its weights.

    Attributes:
        name: the model's name, e.g. `ViT-B-16`.
        fingerprint: changes when image features may change (weights, architecture, precision).
        preprocess: PIL image -> (3, H, W) float32, the model's own evaluation transform.
        preprocess_fingerprint: changes when `preprocess` does.
        mean_std: (2, 3), what `preprocess` normalises its pixels with at the end.
        logit_scale: exp(logit_scale), about 100 for OpenAI's models.
        positions_encoded: running count of text positions that text towers have sent through it.
    """

    def __init__(
        self,
        model: CLIP | CustomTextCLIP,
        tokenizer: Callable[..., Tensor],
        *,
        name: str,
        weights_hash: str,
        device: str = "cpu",
        precision: str = "float32",
        image_batch: int = 64,
    ) -> None:
        self.model = model.to(device).eval().requires_grad_(False)
        self.name = name
        self.tokenizer = tokenizer
        self.device = torch.device(device)
        self.precision = precision
        self.image_batch = image_batch
        preprocess_cfg = open_clip.model.get_model_preprocess_cfg(model)
        complete = open_clip.transform.PreprocessCfg(**preprocess_cfg)
        self.preprocess: Callable[[Image.Image], Tensor] = open_clip.transform.image_transform_v2(
            complete, is_train=False
        )
        self.mean_std = torch.tensor([complete.mean, complete.std], dtype=torch.float32)
        self.preprocess_fingerprint = _digest(json.dumps(preprocess_cfg, sort_keys=True))
        self.fingerprint = _digest(f"{name}|{weights_hash}|{precision}")
        self.logit_scale = float(model.logit_scale.exp())
        self.text = _text_parts(model)
        self.positions_encoded = 0
        self.embed_dim = int(self.encode_text_raw(["a"]).shape[-1])

    @property
    def needs_timm(self) -> bool:
        """Whether the image tower is one of timm's."""
        return isinstance(self.model.visual, TimmModel)

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """bfloat16 autocast where `precision` is `bf16`; nothing otherwise."""
        if self.precision == "bf16":
            with torch.autocast(self.device.type, torch.bfloat16):
                yield
        else:
            yield

    @cached_property
    def text_layers(self) -> tuple[FrozenLayer, ...]:
        """The text tower's blocks as plain tensors; only for towers with `plain_blocks`."""
        return self._as_layers(self.text.blocks)

    @cached_property
    def image_layers(self) -> tuple[FrozenLayer, ...]:
        """The image tower's blocks as plain tensors; only for towers that `VisionTower` takes."""
        visual: Any = self.model.visual
        return self._as_layers(visual.transformer.resblocks)

    def _as_layers(self, blocks: Iterable[Any]) -> tuple[FrozenLayer, ...]:
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        return tuple(FrozenLayer.of(block, dtype) for block in blocks)

    @torch.no_grad()
    def encode_images(self, images_B3HW: Tensor) -> Tensor:
        """Image features (B, D), float32 on the CPU, not normalised."""
        with self.autocast():
            features_BD: Tensor = self.model.encode_image(images_B3HW.to(self.device))
        return features_BD.float().cpu()

    @torch.no_grad()
    def encode_text_raw(self, texts: Sequence[str]) -> Tensor:
        """open_clip's own `encode_text` of hard prompts: (len(texts), D) float32."""
        tokens = self.tokenizer(list(texts)).to(self.device)
        with self.autocast():
            features: Tensor = self.model.encode_text(tokens)
        return features.float()

    def zero_shot_classifier(self, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Class features (C, D), L2-normalised: the normalised mean over templates.

        Underscores in names count as spaces, as in learned prompts.

        Source: CLIP (Radford et al., ICML 2021), section 3.1.4, prompt ensembling in the
        embedding space.
        """
        names = [name.replace("_", " ") for name in class_names]
        per_template = [
            F.normalize(self.encode_text_raw([t.format(name) for name in names]), dim=-1)
            for t in templates
        ]
        return F.normalize(torch.stack(per_template).mean(0), dim=-1)


_NO_PROMPTS = (
    "backbone: prompts cannot be threaded through the text tower of {}; choose a model with "
    "open_clip's own text transformer."
)


def _text_parts(model: CLIP | CustomTextCLIP) -> TextParts:
    text = getattr(model, "text", model)
    unsupported = (
        not hasattr(text, "transformer")
        or not hasattr(text.transformer, "resblocks")
        or getattr(text, "cls_emb", None) is not None
        or getattr(text, "use_pad_mask", False)
    )
    if unsupported:
        raise UserError(_NO_PROMPTS.format(f"this model ({type(text).__name__})"))
    blocks = text.transformer.resblocks
    # CLIP flattens its text tower into itself and renames this one.
    pool_type: str = getattr(text, "text_pool_type" if text is model else "pool_type")
    mask = text.attn_mask
    return TextParts(
        token_embedding=text.token_embedding,
        positional_embedding_Ld=text.positional_embedding,
        blocks=blocks,
        ln_final=text.ln_final,
        projection=text.text_projection,
        attn_mask_LL=mask,
        heads=blocks[0].attn.num_heads,
        width=text.positional_embedding.shape[-1],
        context_length=text.context_length,
        pool_type=pool_type,
        eos_id=getattr(text, "text_eos_id", getattr(text, "eos_id", None)),
        causal=mask is not None,
        pools_at_end=pool_type in ("argmax", "eos"),
        plain_blocks=all(FrozenLayer.supports(b) for b in blocks),
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
