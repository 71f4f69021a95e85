"""The frozen CLIP: images and texts to features, without gradients to any weight.

One `FrozenCLIP` serves all clients of a process. The data pipeline uses `preprocess` and
`encode_images` to fill the feature cache before the first round; methods use `text` and
`logit_scale` in every training step, through `TextTower`.

Shape suffixes: B images, C classes, D joint embedding.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.timm_model import TimmModel
from open_clip.tokenizer import HFTokenizer, SigLipTokenizer
from PIL import Image
from torch import Tensor

from fedprompt.backbone.compression import AS_TRAINED, Compression
from fedprompt.backbone.fingerprint import digest
from fedprompt.backbone.frozen_layer import FrozenLayer
from fedprompt.backbone.hard_text import packed_features
from fedprompt.backbone.text_parts import text_parts
from fedprompt.backbone.text_pass import HuggingFacePass
from fedprompt.backbone.token_rows import end_of_text, token_rows
from fedprompt.errors import UserError

SMALLEST_BATCH = 8
"""Matrix products of very few rows take other kernels, with other last bits. With PyTorch 2.14 on a
CPU, batches of 7 to 256 images gave equal bits, and those of 1 to 5 images gave others. The cache
finds features by the content of images, whichever batch they were encoded in."""


class FrozenCLIP:
    """A CLIP model in evaluation mode, without gradients to its weights.

    Args:
        model: the open_clip model; it is moved to `device` and frozen in place.
        tokenizer: texts -> token ids (len(texts), L); takes `context_length=L`.
        name: the model's name, e.g. `ViT-B-16`.
        weights_hash: identifies weights and architecture; it becomes part of `fingerprint`.
        device: a PyTorch device.
        precision: `float32`; `tf32`, which `use_precision` sets for the process; or `bf16` for
            matrix products in bfloat16.
        image_batch: images to encode in one call when features are cached.
        compression: how the weights of `model` are kept.

    Attributes:
        name: the model's name.
        compression: how its weights are kept.
        fingerprint: differs whenever image features may differ (weights, architecture, precision).
        preprocess: PIL image -> (3, H, W) float32, the model's own evaluation transform.
        preprocess_fingerprint: differs whenever `preprocess` does.
        mean_std: (2, 3), mean and deviation by which `preprocess` normalises its pixels at the end.
        logit_scale: exp(logit_scale), about 100 for OpenAI's models.
        text: the pieces of the text tower that prompts pass through.
        embed_dim: D.
        companions: further frozen models that methods read beside this one, by the name of their
            backbone config.
        others: backbones of clients that differ from this one, if they have been opened, by the
            text of their configs.
        positions_encoded: how many positions text and image towers have sent through the model so
            far; a run derives its cost figures from it.

    Raises:
        UserError: learned prompts cannot pass through the model's text tower.
    """

    def __init__(
        self,
        model: CLIP | CustomTextCLIP | CoCa,
        tokenizer: Callable[..., Tensor],
        *,
        name: str,
        weights_hash: str,
        device: str = "cpu",
        precision: str = "float32",
        image_batch: int = 64,
        compression: Compression = AS_TRAINED,
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
        self.preprocess_fingerprint = digest(json.dumps(preprocess_cfg, sort_keys=True))
        self.compression = compression
        kept = f"|{compression}" if compression else ""
        self.fingerprint = digest(f"{name}|{weights_hash}|{precision}{kept}")
        self.logit_scale = float(model.logit_scale.exp())
        self.text = text_parts(model)
        self.companions: dict[str, FrozenCLIP] = {}
        self.others: dict[str, FrozenCLIP] = {}
        self.positions_encoded = 0
        # open_clip's settings state D in several places, and some towers change it, so it is read
        # from an encoded text.
        self.embed_dim = int(self.encode_text_raw(["a"]).shape[-1])

    def companion(self, name: str) -> FrozenCLIP:
        """The further frozen model that was opened beside this one.

        Raises:
            UserError: it has not been opened.
        """
        if name not in self.companions:
            raise UserError(f"backbone '{name}' has not been opened beside {self.name}.")
        return self.companions[name]

    @property
    def libraries(self) -> frozenset[str]:
        """Those of `runtime.OPTIONAL_LIBRARIES` that the towers or the tokenizer come from."""
        hugging_face = isinstance(self.tokenizer, HFTokenizer | SigLipTokenizer)
        used = {
            "timm": isinstance(self.model.visual, TimmModel),
            "transformers": hugging_face or isinstance(self.text.own_pass, HuggingFacePass),
        }
        return frozenset(name for name, uses in used.items() if uses)

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """bfloat16 autocast when `precision` is `bf16`; otherwise nothing."""
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
        """The image tower's blocks as plain tensors; only for towers that `VisionTower` accepts."""
        visual: Any = self.model.visual
        return self._as_layers(visual.transformer.resblocks)

    def _as_layers(self, blocks: Iterable[Any]) -> tuple[FrozenLayer, ...]:
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        return tuple(FrozenLayer.of(block, dtype) for block in blocks)

    @torch.no_grad()
    def encode_images(self, images_B3HW: Tensor) -> Tensor:
        """Encode images as features (B, D), float32 on the CPU, not normalised.

        Batches of fewer than `SMALLEST_BATCH` images are filled up, so that the last bits of an
        image's features do not tell in which batch it was encoded.
        """
        count = len(images_B3HW)
        more = min(SMALLEST_BATCH, self.image_batch) - count
        if more > 0:
            images_B3HW = torch.cat([images_B3HW, images_B3HW[:1].expand(more, -1, -1, -1)])
        with self.autocast():
            features_BD: Tensor = self.model.encode_image(
                # CoCa's models would normalise them otherwise.
                images_B3HW.to(self.device),
                normalize=False,
            )
        return features_BD[:count].float().cpu()

    @torch.no_grad()
    def encode_text_raw(self, texts: Sequence[str]) -> Tensor:
        """Encode hand-written prompts as open_clip's features (len(texts), D), not normalised.

        Raises:
            UserError: a text is longer than the text tower, or contains a special token.
        """
        return self._encode_rows(token_rows(self.tokenizer, self.text, texts, self.name))

    def _encode_rows(self, ids_TL: Tensor) -> Tensor:
        with self.autocast():
            features: Tensor = self.model.encode_text(ids_TL.to(self.device), normalize=False)
        return features.float()

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Encode hand-written prompts that begin alike, as `encode_text_raw` but packed.

        The features are equal up to the order of sums, at a small part of the cost.

        Raises:
            UserError: a text is longer than the text tower, or contains a special token.
        """
        ids_TL = token_rows(self.tokenizer, self.text, texts, self.name)
        ends_T = end_of_text(self.text, ids_TL)
        if not self.text.packable:
            if self.text.pad_id is not None:
                # Towers of Hugging Face read texts of any length; nobody sees the padding.
                ids_TL = ids_TL[:, : int(ends_T.max()) + 1]
            self.positions_encoded += ids_TL.numel()
            return self._encode_rows(ids_TL)
        features_TD, positions = packed_features(self.text, self.text_layers, ids_TL, ends_T)
        self.positions_encoded += positions
        return features_TD

    def zero_shot_classifier(self, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Compute class features of hand-written prompts: the normalised mean over templates.

        Source: CLIP (Radford et al., ICML 2021), section 3.1.4, prompt ensembling in the
        embedding space.

        Args:
            class_names: C names; underscores count as spaces, as in learned prompts.
            templates: texts with `{}` in place of the class name.

        Returns:
            (C, D), float32, L2-normalised.

        Raises:
            UserError: a prompt is longer than the text tower, or contains a special token.
        """
        names = [name.replace("_", " ") for name in class_names]
        per_template = [
            F.normalize(self.encode_texts([t.format(name) for name in names]), dim=-1)
            for t in templates
        ]
        return F.normalize(torch.stack(per_template).mean(0), dim=-1)
