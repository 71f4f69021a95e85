"""FedGalLoP: a twin of its loss, its prediction and its score; scales and dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.errors import UserError
from fedprompt.methods.base import uploaded_numbers
from tests.support import twins
from tests.support.twins import K

SCALES = [1, 3, 9]
SMALL = {"context_tokens": 2, "context_init": None, "scales": SCALES}


def cosines(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(a[None], b, dim=-1)


def local_cosines(regions: Tensor, weights: Tensor, prompts: list[Tensor]) -> Tensor:
    """One image: by scale and class, the mean of the best regions (S, C)."""
    every = [torch.stack([cosines(weights @ r, classes) for r in regions]) for classes in prompts]
    return torch.stack(
        [
            found.sort(0, descending=True).values[:k].mean(0)
            for found, k in zip(every, SCALES, strict=True)
        ]
    )


def test_twin(clip: FrozenCLIP) -> None:
    method: Any = twins.build(clip, "fedgallop", **SMALL)
    shared, private = twins.tensors(method)
    batch = twins.batch(clip, local=True)
    encoded = method.encode(shared, private)
    terms = method.loss_terms(shared, private, encoded, batch)
    assert list(terms) == ["ce", "local"]
    leaves = [shared["ctx"], private["local"], private["projection"]]
    ours = torch.autograd.grad(sum(t.sum() for t in terms.values()), leaves)
    with torch.no_grad():
        logits, novelty = (
            method.logits(encoded, batch.inputs),
            method.novelty(encoded, batch.inputs),
        )
    drawn = batch.uniform((twins.B, 4), "dropout")
    total = torch.zeros(())
    for k in range(K):
        of_images = [twins.class_features(clip, c) for c in shared["ctx"][k]]
        of_regions = [twins.class_features(clip, c) for c in private["local"][k]]
        ce, local = [], []
        for i in range(int(batch.mask_KB[k].sum())):
            image, regions = batch.inputs.features[k, i], batch.inputs.local[k, i]
            label = batch.labels_KB[k, i]
            every = torch.stack([cosines(image, classes) for classes in of_images])
            # A dropout of 0.75 keeps one of four prompts.
            one = every[int(drawn[k, i].argmin())]
            ce.append(F.cross_entropy(clip.logit_scale * one, label))
            scales = local_cosines(regions, private["projection"][k], of_regions)
            local.append(
                torch.stack([F.cross_entropy(clip.logit_scale * s, label) for s in scales]).mean()
            )
            both = clip.logit_scale * (every.mean(0) + scales.mean(0)) / 2
            twins.close(logits[k, i], both.detach(), "logits")
            by_region = torch.stack(
                [
                    torch.stack(
                        [cosines(private["projection"][k] @ r, c) for c in of_regions]
                    ).mean(0)
                    for r in regions
                ]
            )
            score = every.mean(0).softmax(0).max() + by_region.softmax(1).max()
            twins.close(novelty[k, i], -score.detach(), "GL-MCM")
        twins.close(terms["ce"][k], torch.stack(ce).mean(), "ce")
        twins.close(terms["local"][k], torch.stack(local).mean(), "local")
        total = total + torch.stack(ce).mean() + torch.stack(local).mean()
    for found, expected in zip(ours, torch.autograd.grad(total, leaves), strict=True):
        twins.close(found, expected, "gradient")


def test_prompts_start_alike_and_differ_after_a_step(clip: FrozenCLIP) -> None:
    method: Any = twins.build(clip, "fedgallop")
    start = method.init_shared(1)["ctx"]
    assert start.shape[0] == 4
    assert torch.equal(start[0], start[3])
    private = {n: t[None].expand(K, *t.shape).clone().requires_grad_()
               for n, t in method.init_private(1, 0).items()}  # fmt: skip
    shared = {"ctx": start[None].expand(K, *start.shape).clone().requires_grad_()}
    batch = twins.batch(clip, local=True)
    ce = twins.loss_of(method, shared, private, batch)["ce"]
    (gradient,) = torch.autograd.grad(ce.sum(), [shared["ctx"]])
    assert not torch.allclose(gradient[0, 0], gradient[0, 1])


def test_the_global_model_is_the_global_prompts(clip: FrozenCLIP) -> None:
    method: Any = twins.build(clip, "fedgallop", **SMALL)
    shared = {"ctx": twins.tensors(method)[0]["ctx"][:1]}
    inputs = twins.batch(clip).inputs[0].of_one()
    with torch.no_grad():
        encoded = method.encode(shared, None)
        expected = torch.stack(
            [inputs.features[0] @ twins.class_features(clip, c).T for c in shared["ctx"][0]]
        ).mean(0)
        twins.close(method.logits(encoded, inputs)[0], clip.logit_scale * expected)


@pytest.mark.parametrize(("prompts", "dropout", "kept"), [(1, 0.9, 1), (4, 0.75, 1), (4, 0.5, 2)])
def test_how_many_prompts_an_image_keeps(
    clip: FrozenCLIP, prompts: int, dropout: float, kept: int
) -> None:
    method: Any = twins.build(clip, "fedgallop", global_prompts=prompts, dropout=dropout)
    assert method.kept == kept


def test_upload_on_vit_b16() -> None:
    method = twins.build(shape_only_clip("ViT-B-16"), "fedgallop")
    assert uploaded_numbers(method) == 4 * 4 * 512


@pytest.mark.parametrize("options", [{"scales": []}, {"scales": [0]}, {"dropout": 1.0}])
def test_bad_options(clip: FrozenCLIP, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        twins.build(clip, "fedgallop", **options)
