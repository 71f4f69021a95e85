"""CoPL: twin that attends patch by patch; tokens move differently; what it needs and uploads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.methods.base import Tensors, uploaded_numbers
from tests.support import twins
from tests.support.twins import K


def twin_contexts(own: Tensors, patches_BPD: Tensor) -> list[Tensor]:
    """The context (M, d) of each image, by loops over tokens and patches."""
    found = []
    for patches in patches_BPD:
        tokens = []
        for patch in patches:
            hidden = torch.relu(own["linear1.weight"] @ patch + own["linear1.bias"])
            tokens.append(own["linear2.weight"] @ hidden + own["linear2.bias"])
        rows = []
        for word in own["ctx"]:
            weights = torch.stack([(word @ token).exp() for token in tokens])
            moves = [w * token for w, token in zip(weights / weights.sum(), tokens, strict=True)]
            rows.append(word + torch.stack(moves).sum(0))
        found.append(torch.stack(rows))
    return found


def test_twin(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "copl")
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
        contexts = twin_contexts(own, batch.inputs.patches[k][batch.mask_KB[k]])
        assert float((contexts[0] - own["ctx"]).detach().std(0).max()) > 0.01
        expected = clip.logit_scale * torch.stack(
            [
                twins.class_features(clip, context) @ image
                for context, image in zip(contexts, images, strict=True)
            ]
        )
        twins.close(logits[k][batch.mask_KB[k]], expected, "logits")
        loss = F.cross_entropy(expected, labels)
        twins.close(loss_terms["ce"][k], loss, "loss")
        for n, theirs in zip(own, torch.autograd.grad(loss, list(own.values())), strict=True):
            twins.close(ours[n][k], theirs, n)


def test_clients_do_not_touch_each_other(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "copl")
    twins.assert_clients_alone_agree(
        method, *twins.tensors(method), twins.batch(clip, patches=True)
    )


def test_upload_on_vit_b16() -> None:
    """As CoCoOp's: 4 x 512 tokens, 512 x 32 + 32 and 32 x 512 + 512 of the network."""
    assert uploaded_numbers(twins.build(shape_only_clip("ViT-B-16"), "copl")) == 35_360
