"""BBT: twin of the estimate, query by query; that nothing is differentiated; its upload."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.errors import UserError
from fedprompt.methods.base import uploaded_numbers
from fedprompt.rng import normal
from tests.support import twins
from tests.support.twins import K

SMALL: dict[str, Any] = {"dimensions": 5, "pairs": 3, "sigma": 0.3}


def test_twin(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "bbt", **SMALL)
    shared, batch = twins.tensors(method, 0.3)[0], twins.batch(clip, step=2)
    terms = twins.loss_of(method, shared, {}, batch)
    assert not terms["ce"].requires_grad
    ours = twins.applied_gradients(method, shared, batch)["z"]
    embedding = clip.model.token_embedding
    words = clip.tokenizer(["a photo of a"])[0, 1:5]
    start = embedding(words).detach()
    matrix = normal((5, start.numel()), 1.0, 0, "black box", "projection")

    def loss(z: torch.Tensor, k: int) -> torch.Tensor:
        context = start + ((z @ matrix) / 5**0.5).view_as(start)
        images, labels = twins.images_of(batch, k)
        logits = clip.logit_scale * images @ twins.class_features(clip, context).T
        return F.cross_entropy(logits, labels)

    for k in range(K):
        z = shared["z"].detach()[k]
        twins.close(terms["ce"][k], loss(z, k).detach(), "ce")
        directions = normal((3, 5), 1.0, 1, "directions", 2, 1, k)
        estimate = torch.zeros(5)
        for e in directions:
            estimate += e * (loss(z + 0.3 * e, k) - loss(z - 0.3 * e, k)).detach() / (2 * 0.3) / 3
        twins.close(ours[k], estimate, "estimate")


def test_many_small_queries_give_the_gradient(clip: FrozenCLIP) -> None:
    options = {**SMALL, "pairs": 2000, "sigma": 0.003, "dimensions": 3}
    method: Any = twins.build(clip, "bbt", **options)
    batch = twins.batch(clip)
    z = torch.zeros(K, 3, requires_grad=True)
    found = method.gradients({}, {"shared.z": z}, batch)["shared.z"]
    classes = method.prompts.classes(method._contexts(z))
    terms = method.logits({"classes": classes}, batch.inputs)
    losses = [
        F.cross_entropy(terms[k][batch.mask_KB[k]], batch.labels_KB[k][batch.mask_KB[k]])
        for k in range(K)
    ]
    (true,) = torch.autograd.grad(torch.stack(losses).sum(), z)
    for k in range(K):
        assert F.cosine_similarity(found[k], true[k], dim=0) > 0.99


def test_upload_on_vit_b16() -> None:
    assert uploaded_numbers(twins.build(shape_only_clip("ViT-B-16"), "bbt")) == 500


@pytest.mark.parametrize("options", [{"sigma": 0}, {"pairs": 0}, {"dimensions": 0}])
def test_bad_options(clip: FrozenCLIP, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        twins.build(clip, "bbt", **options)
