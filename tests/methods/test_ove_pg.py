"""OVE-PG: the Polya-Gamma mean by its series, a twin image by image, draws, the global prior."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.errors import UserError
from fedprompt.methods.base import Batch, uploaded_numbers
from fedprompt.methods.ove_pg import polya_gamma_mean
from tests.support import twins
from tests.support.builders import batch_of
from tests.support.twins import K


@pytest.mark.parametrize("c", [0.0, 1e-4, 0.5, 2.0, -2.0, -4.0, 30.0])
def test_polya_gamma_mean(c: float) -> None:
    """PG(1, c) is a sum of Gamma(1, 1) / ((k - 1/2)^2 + c^2 / (4 pi^2)) / (2 pi^2) over k."""
    terms = [1 / ((k - 0.5) ** 2 + c * c / (4 * math.pi**2)) for k in range(1, 200_001)]
    ours = polya_gamma_mean(torch.tensor([c], dtype=torch.float64))
    assert ours.item() == pytest.approx(math.fsum(terms) / (2 * math.pi**2), abs=1e-6)
    assert polya_gamma_mean(torch.tensor([2.0])).item() == pytest.approx(0.1904, abs=1e-4)


def with_received(batch: Batch, ctx: Tensor) -> Batch:
    return batch_of(batch.inputs, batch.labels_KB, batch.mask_KB, received={"ctx": ctx})


@pytest.mark.parametrize(("prior", "samples"), [("zero_shot", 1), ("global", 2)])
def test_twin(clip: FrozenCLIP, prior: str, samples: int) -> None:
    method = twins.build(clip, "ove_pg", prior=prior, samples=samples, alpha=0.7, prior_weight=0.3)
    shared = twins.tensors(method)[0]
    received = shared["ctx"].detach() + 0.05 * twins.draw(*shared["ctx"].shape, seed=5)
    batch = with_received(twins.batch(clip), received)
    terms = twins.loss_of(method, shared, {}, batch)
    ours = twins.applied_gradients(method, shared, batch)["ctx"]
    draws = [batch.normal((5, 6), "ove_pg", s) for s in range(samples)]
    for k in range(K):
        context = shared["ctx"][k].detach().requires_grad_()
        images, labels = twins.images_of(batch, k)
        fixed = twins.template_features(clip)
        if prior == "global":
            fixed = twins.class_features(clip, received[k]).detach()
        z = clip.logit_scale * images @ twins.class_features(clip, context).T
        z0 = clip.logit_scale * images @ fixed.T
        likelihood, distance = [], []
        for i, y in enumerate(labels.tolist()):
            for eps in draws:
                total = torch.zeros(())
                for c in set(range(6)) - {y}:
                    psi0 = float(z0[i, y] - z0[i, c])
                    omega = math.tanh(psi0 / 2) / (2 * psi0)
                    sigma = 1 / (omega + 0.7)
                    mu = sigma * (0.7 * (z[i, y] - z[i, c]) + 0.5)
                    drawn = mu + math.sqrt(sigma) * eps[k, i, c]
                    total = total - torch.log(1 / (1 + torch.exp(-drawn)))
                likelihood.append(total)
            distance.append(((z0[i] - z[i]) ** 2).mean())
        ce, pull = torch.stack(likelihood).mean(), 0.3 * torch.stack(distance).mean()
        twins.close(terms["ce"][k], ce, "ce")
        twins.close(terms["prior"][k], pull, "prior")
        (theirs,) = torch.autograd.grad(ce + pull, [context])
        twins.close(ours[k], theirs, "gradient")


def test_draws_are_keyed_by_client_and_step(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "ove_pg")
    shared = twins.tensors(method)[0]
    first, again, later = (
        twins.loss_of(method, shared, {}, twins.batch(clip, step=step))["ce"] for step in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, later)


def test_upload_on_vit_b16() -> None:
    assert uploaded_numbers(twins.build(shape_only_clip("ViT-B-16"), "ove_pg")) == 2_048


@pytest.mark.parametrize("options", [{"alpha": 0}, {"samples": 0}, {"prior": "x"}])
def test_bad_options(clip: FrozenCLIP, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        twins.build(clip, "ove_pg", **options)
