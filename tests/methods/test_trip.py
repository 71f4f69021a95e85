"""TRIP: a twin of the mixture and of both losses; the capacities of training and of tests."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.methods.base import Batch, uploaded_numbers
from tests.support import twins
from tests.support.twins import B, K

OPTIONS = {"experts": 3, "context_tokens": 2, "alpha": 0.7}


def routed(clip: FrozenCLIP) -> Batch:
    """A batch whose images have different weights in training and in tests."""
    batch = twins.batch(clip)
    routing = twins.draw(K, B, 2, 3, seed=4).softmax(-1)
    return replace(batch, inputs=replace(batch.inputs, routing=routing))


def test_twin(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "trip", **OPTIONS)
    shared, batch = twins.tensors(method)[0], routed(clip)
    terms = twins.loss_of(method, shared, {}, batch)
    ours = twins.applied_gradients(method, shared, batch)["experts"]
    in_tests = method.logits(method.encode(shared, None), batch.inputs)
    frozen = twins.template_features(clip)
    assert batch.inputs.routing is not None
    for k in range(K):
        experts = shared["experts"][k].detach().requires_grad_()
        images, labels = twins.images_of(batch, k)
        weights = batch.inputs.routing[k][batch.mask_KB[k]]

        def logits(of: int, weights=weights, experts=experts, images=images) -> torch.Tensor:  # type: ignore[no-untyped-def]
            rows = []
            for image, weight in zip(images, weights[:, of], strict=True):
                context = sum(w * v for w, v in zip(weight, experts, strict=True))
                rows.append(clip.logit_scale * twins.class_features(clip, context) @ image)
            return torch.stack(rows)

        expected = logits(0)
        ce = F.cross_entropy(expected, labels)
        teacher = F.softmax(clip.logit_scale * images @ frozen.T, dim=-1)
        soft = -0.7 * (teacher * F.log_softmax(expected, dim=-1)).sum(1).mean()
        twins.close(terms["ce"][k], ce, "ce")
        twins.close(terms["distillation"][k], soft, "distillation")
        twins.close(ours[k], torch.autograd.grad(ce + soft, experts)[0], "gradient")
        twins.close(in_tests[k][batch.mask_KB[k]], logits(1), "in tests")


def test_experts_start_apart(clip: FrozenCLIP) -> None:
    experts = twins.build(clip, "trip").init_shared(1)["experts"]
    assert len({tuple(e.flatten().tolist()) for e in experts}) == 8


def test_upload_on_vit_b16() -> None:
    assert uploaded_numbers(twins.build(shape_only_clip("ViT-B-16"), "trip")) == 65_536
