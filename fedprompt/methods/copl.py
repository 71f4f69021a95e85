"""CoPL: the context attends to the patches of an image, each of its tokens in its own way.

Source: CoPL: Contextual Prompt Learning for Vision-Language Understanding (Goswami, Karanam,
Udhayanan, Joseph, Srinivasan, AAAI 2024, arXiv 2307.00910).

RECONSTRUCTED FROM THE ABSTRACT AND A SUMMARY. They say: local features of the image take the place
of CoCoOp's global feature; a light network makes a conditional token of every patch; each token of
the prompt is weighted by its semantic affinity with the patches. The form is our inference. With
p_i the L2-normalised feature of patch i and h CoCoOp's Meta-Net (`cocoop.py`),

    a_mi = softmax over i of v_m . h(p_i),     v_m(x) = v_m + sum_i a_mi h(p_i)

so that the M tokens move differently, where CoCoOp shifts all of them by the same h(x). Logits are
those of the global feature, as in CoCoOp; the loss is the cross-entropy.

Patches are the output tokens of the frozen tower (`backbone.patch_features`), which come from the
feature cache. In the federation v and h are shared, 35,360 numbers on ViT-B/16, as CoCoOp's;
nothing is private. The schedule is CoCoOp's too, and so is the cost: N images are N x C texts.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import Tensors
from fedprompt.methods.cocoop import CoCoOp, CoCoOpConfig


@dataclass(frozen=True)
class CoPLConfig(CoCoOpConfig):
    """Defaults: CoCoOp's, of which the paper says that it follows them (recalled, not read)."""

    supports_image_noise = True


class CoPL(CoCoOp):
    """Context and network are shared; nothing is private."""

    name = "copl"
    source = "Goswami et al., AAAI 2024 (reconstructed from the abstract)"
    Config = CoPLConfig
    needs = frozenset({"features", "patches"})

    def contexts(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """The context of every image, (K, B, M, d)."""
        assert inputs.patches is not None
        token_KBPd = self.meta_net(encoded, inputs.patches)
        context_K1Md = encoded["ctx"][:, None]
        share_KBMP = (context_K1Md @ token_KBPd.transpose(-1, -2)).softmax(-1)
        return context_K1Md + share_KBMP @ token_KBPd
