"""CTP and TFT: twin that attends token by token; what the start is; the upload."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.methods.base import Tensors, uploaded_numbers
from tests.support import twins
from tests.support.builders import CLASS_NAMES
from tests.support.twins import K


def twin_attention(own: Tensors, name: str, query: Tensor, tokens: Tensor) -> Tensor:
    """Attn(q, X) (D,) of one query, by a loop over the tokens."""
    q, k, v = (own[f"{name}.{part}.weight"] for part in "qkv")
    scores = [((q @ query) @ (k @ x) / math.sqrt(len(query))).exp() for x in tokens]
    return sum(s * (v @ x) for s, x in zip(scores, tokens, strict=True)) / sum(scores)


def twin_logits(clip: FrozenCLIP, own: Tensors, images: Tensor, patches_BPD: Tensor) -> Tensor:
    """Logits (n, C) of one client, one image and one class after the other."""
    start, rows = twins.template_features(clip), []
    for image, patches in zip(images, patches_BPD, strict=True):
        texts = []
        for name, fixed in zip(CLASS_NAMES, start, strict=True):
            seen = twin_attention(own, "ctp", fixed, patches)
            hidden = torch.relu(own["linear1.weight"] @ seen + own["linear1.bias"])
            shift = own["linear2.weight"] @ hidden + own["linear2.bias"]
            texts.append(twins.text_feature(clip, own["ctx"] + shift, name))
        tuned = image + twin_attention(own, "tft", image, torch.stack(texts))
        tuned = tuned / tuned.norm()
        rows.append(torch.stack([clip.logit_scale * tuned @ text for text in texts]))
    return torch.stack(rows)


def test_twin(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "ctp_tft")
    shared, batch = twins.tensors(method, 0.2)[0], twins.batch(clip, patches=True)
    encoded = method.encode(shared, {})
    logits, loss_terms = (
        method.logits(encoded, batch.inputs),
        method.loss_terms(shared, {}, encoded, batch),
    )
    ours = twins.applied_gradients(method, shared, batch)
    assert ours.keys() == shared.keys()
    for k in range(K):
        own = {n: t[k].detach().requires_grad_() for n, t in shared.items()}
        images, labels = twins.images_of(batch, k)
        patches = batch.inputs.patches[k][batch.mask_KB[k]]
        expected = twin_logits(clip, own, images, patches)
        twins.close(logits[k][batch.mask_KB[k]], expected, "logits")
        loss = F.cross_entropy(expected, labels)
        twins.close(loss_terms["ce"][k], loss, "loss")
        for n, theirs in zip(own, torch.autograd.grad(loss, list(own.values())), strict=True):
            twins.close(ours[n][k], theirs, n)


def test_a_fresh_model_leaves_image_features_as_they_are(clip: FrozenCLIP) -> None:
    """At the start only CTP acts: its logits are cosines with CLIP's own features."""
    method = twins.build(clip, "ctp_tft")
    own, batch = method.init_shared(1), twins.batch(clip, patches=True)
    logits = method.logits({n: t[None] for n, t in own.items()}, batch.inputs)
    assert not own["tft.v.weight"].any()
    image, patches = batch.inputs.features[1, 0], batch.inputs.patches[1, 0]
    seen = twin_attention(own, "ctp", twins.template_features(clip)[2], patches)
    hidden = torch.relu(own["linear1.weight"] @ seen + own["linear1.bias"])
    context = own["ctx"] + own["linear2.weight"] @ hidden + own["linear2.bias"]
    text = twins.text_feature(clip, context, CLASS_NAMES[2])
    twins.close(logits[1, 0, 2], clip.logit_scale * image @ text)


def test_clients_do_not_touch_each_other(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "ctp_tft")
    twins.assert_clients_alone_agree(
        method, *twins.tensors(method), twins.batch(clip, patches=True)
    )


def test_upload_on_vit_b16() -> None:
    """CoCoOp's numbers and six matrices of 512 x 512."""
    method = twins.build(shape_only_clip("ViT-B-16"), "ctp_tft")
    assert uploaded_numbers(method) == 35_360 + 6 * 512**2 == 1_608_224
