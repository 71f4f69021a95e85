"""PLOT against an independent twin: plain text pass, one image and class at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.data.features.inputs import Inputs
from fedprompt.errors import UserError
from fedprompt.methods.base import uploaded_numbers
from tests.methods.parts.test_optimal_transport import plain_plan
from tests.support import twins
from tests.support.builders import CLASS_NAMES
from tests.support.twins import B, K

OPTIONS = {"prompts": 3, "context_tokens": 2}


def twin_logits(
    clip: FrozenCLIP,
    contexts: list[Tensor],
    patches_BPD: Tensor,
    *,
    eps: float = 0.1,
    threshold: float = 0.01,
    gamma: float | None = None,
) -> Tensor:
    """Logits (B, C) of one client; the plans come from loops over plain floats."""
    texts = [twins.class_features(clip, context) for context in contexts]
    cosines = [
        [[[patch @ text[c] for patch in image] for text in texts] for c in range(len(CLASS_NAMES))]
        for image in patches_BPD
    ]
    numbers = [[[[s.item() for s in n] for n in c] for c in image] for image in cosines]
    plans = plain_plan(numbers, eps, threshold, 100, gamma)
    rows = []
    for image, plan in zip(cosines, plans, strict=True):
        sums = [
            sum(
                mass * similar
                for masses, similars in zip(t, s, strict=True)
                for mass, similar in zip(masses, similars, strict=True)
            )
            for t, s in zip(plan, image, strict=True)
        ]
        rows.append(torch.stack([torch.as_tensor(s) for s in sums]))
    return clip.logit_scale * torch.stack(rows)


@pytest.mark.parametrize("k", range(K))
def test_logits_loss_and_gradients_are_the_twins(clip: FrozenCLIP, k: int) -> None:
    method = twins.build(clip, "plot", **OPTIONS)
    shared, private = twins.tensors(method)
    data = twins.one_client(twins.batch(clip, patches=True), k)
    s = twins.row(shared, k)
    contexts = [c.detach().clone().requires_grad_() for c in shared["ctx"][k]]
    expected = twin_logits(clip, contexts, data.inputs.patches[0])
    twins.close(method.logits(method.encode(s, {}), data.inputs)[0], expected)
    loss = F.cross_entropy(expected, data.labels_KB[0])
    loss_terms = twins.loss_of(method, s, private, data)
    assert list(loss_terms) == ["ce"]
    assert loss_terms["ce"].item() == pytest.approx(loss.item(), rel=1e-4)
    twins.close(
        twins.gradients(loss_terms, twins.leaves(s))[0][0],
        torch.stack(list(torch.autograd.grad(loss, contexts))),
    )


def test_clients_do_not_touch_each_other(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "plot", **OPTIONS)
    twins.assert_clients_alone_agree(
        method, *twins.tensors(method), twins.batch(clip, patches=True)
    )


def spread_prompts(clip: FrozenCLIP) -> dict[str, Tensor]:
    """Class features far apart, for which the iteration is slow: (K, 3, C, D)."""
    draw = torch.Generator().manual_seed(0)
    shape = (K, 3, len(CLASS_NAMES), clip.embed_dim)
    return {"prompts": F.normalize(torch.randn(shape, generator=draw), dim=-1)}


@pytest.mark.parametrize("name", ["plot", "fedotp"])
@pytest.mark.parametrize("threshold", [0.3, 0.1, 0.03, 0.01])
def test_padding_in_a_batch_does_not_delay_the_stop(
    clip: FrozenCLIP, name: str, threshold: float
) -> None:
    method = twins.build(clip, name, context_tokens=2, eps=0.5, threshold=threshold)
    data, encoded = twins.batch(clip, patches=True), spread_prompts(clip)
    data.inputs.patches[~data.mask_KB] *= 4  # costs of which it would be slower still
    together = method.loss_terms({}, {}, encoded, data)["ce"]
    for k in range(K):
        own = {"prompts": encoded["prompts"][k : k + 1]}
        alone = method.loss_terms({}, {}, own, twins.one_client(data, k))["ce"]
        assert together[k].item() == pytest.approx(alone.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["plot", "fedotp"])
@pytest.mark.parametrize("threshold", [0.3, 0.1, 0.03, 0.01])
def test_zeros_that_fill_up_a_test_set_do_not_hasten_the_stop(
    clip: FrozenCLIP, name: str, threshold: float
) -> None:
    method = twins.build(clip, name, context_tokens=2, eps=0.5, threshold=threshold)
    images, encoded = twins.batch(clip, patches=True).inputs, spread_prompts(clip)
    padded = Inputs(
        torch.cat([images.features, torch.zeros_like(images.features)], dim=1),
        torch.cat([images.patches, torch.zeros_like(images.patches)], dim=1),
    )
    twins.close(method.logits(encoded, padded)[:, :B], method.logits(encoded, images), rtol=1e-5)


def test_one_prompt_is_the_mean_over_patches(clip: FrozenCLIP) -> None:
    """All mass of every patch goes to the only prompt: the logits are those of the mean patch."""
    method = twins.build(clip, "plot", prompts=1, context_tokens=2)
    shared = twins.tensors(method)[0]
    data = twins.batch(clip, patches=True)
    expected = torch.einsum(
        "kbpd,kcd->kbc",
        data.inputs.patches / data.inputs.patches.shape[2],
        torch.stack([twins.class_features(clip, c[0]) for c in shared["ctx"]]),
    )
    twins.close(method.logits(method.encode(shared, {}), data.inputs), clip.logit_scale * expected)


def test_shares_every_prompt_and_keeps_nothing() -> None:
    method = twins.build(shape_only_clip("ViT-B-16"), "plot")
    assert uploaded_numbers(method) == 4 * 16 * 512
    assert method.init_private(0, 0) == {}
    start = method.init_shared(0)["ctx"]
    assert not torch.equal(start[0], start[1])
    assert method.needs == {"features", "patches"}
    assert method.class_embeddings({"prompts": start}) is None


@pytest.mark.parametrize("options", [{"prompts": 0}, {"eps": 0.001}, {"gamma": 0.5}])
def test_meaningless_choices_are_refused(clip: FrozenCLIP, options: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        twins.build(clip, "plot", **options)
