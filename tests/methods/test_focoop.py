"""FOCoOp: a twin of the worst noise and of its loss, gamma, and what is shared and kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.errors import UserError
from fedprompt.methods.base import Batch, uploaded_numbers
from tests.support import twins
from tests.support.twins import K

SMALL = {"context_tokens": 2, "negatives": 7}


def unit(gradient: Tensor) -> Tensor:
    """Every row at length 1."""
    return torch.stack([row / (row.norm() + 1e-8) for row in gradient])


def twin(
    scale: float, images: Tensor, labels: Tensor, u: Tensor, o: Tensor, starts: list[Tensor],
    steps: int,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """One client's loss in the first step, and both noises."""

    def parts(xi_u: Tensor, xi_o: Tensor, fixed: bool) -> tuple[Tensor, Tensor]:
        classes = (u.detach() if fixed else u) + xi_u
        words = (o.detach() if fixed else o) + xi_o
        ce, detection = [], []
        for image, label in zip(images, labels, strict=True):
            of_words = scale * (words @ image)
            every = torch.cat([scale * (classes @ image), of_words])
            ce.append(-every.log_softmax(0)[label])
            detection.append(of_words.logsumexp(0) - of_words.mean())
        return torch.stack(ce), torch.stack(detection)

    xi_u, xi_o = starts
    none = torch.zeros_like(xi_o)
    for _ in range(steps):
        xi_u = xi_u.detach().requires_grad_()
        objective = parts(xi_u, none, True)[0].mean() - 10 * xi_u.norm(dim=1).mean()
        xi_u = xi_u.detach() + unit(torch.autograd.grad(objective, xi_u)[0])
    for _ in range(steps):
        xi_o = xi_o.detach().requires_grad_()
        ce, detection = parts(xi_u, xi_o, True)
        xi_o = xi_o.detach() + unit(torch.autograd.grad((ce + detection).mean(), xi_o)[0])
    ce, detection = parts(xi_u, xi_o, False)
    sizes = [xi_u.abs().mean(), xi_o.abs().mean()]
    gammas = [10 - 0.005 * (10 - size) for size in sizes]
    each = ce + 0.5 * detection - gammas[0] * sizes[0] - gammas[1] * sizes[1]
    return 0.1 * gammas[1] * torch.logsumexp(each / (0.1 * gammas[1]), 0), [xi_u, xi_o]


def starts_of(batch: Batch, classes: Tensor, words: Tensor) -> list[Tensor]:
    return [
        1e-4 * batch.uniform(tuple(t.shape[1:]), purpose)
        for t, purpose in ((classes, "classes"), (words, "words"))
    ]


def test_twin(clip: FrozenCLIP) -> None:
    method: Any = twins.build(clip, "focoop", **SMALL)
    shared, private = twins.tensors(method)
    batch = twins.batch(clip)
    encoded = method.encode(shared, private)
    starts = starts_of(batch, encoded["classes"], encoded["negatives"])
    loss_K = method.loss_terms(shared, private, encoded, batch)["ce"]
    gamma_K = torch.full((K,), 10.0)
    noise = method.worst_noise(encoded["classes"], encoded["negatives"], starts, gamma_K, batch)
    leaves = [shared["ctx_global"], shared["ctx_ood"], private["ctx_local"]]
    ours = torch.autograd.grad(loss_K.sum(), leaves, retain_graph=True)
    losses = []
    for k in range(K):
        images, labels = twins.images_of(batch, k)
        u, o = encoded["classes"][k], encoded["negatives"][k]
        loss, (xi_u, xi_o) = twin(
            clip.logit_scale, images, labels, u, o, [start[k] for start in starts], 4
        )
        twins.close(noise[0][k], xi_u, "noise of classes")
        twins.close(noise[1][k], xi_o, "noise of words")
        twins.close(loss_K[k], loss, "loss")
        losses.append(loss)
    theirs = torch.autograd.grad(torch.stack(losses).sum(), leaves)
    for found, expected in zip(ours, theirs, strict=True):
        twins.close(found, expected, "gradient")


def test_class_features_are_those_of_mixed_contexts(clip: FrozenCLIP) -> None:
    method: Any = twins.build(clip, "focoop", **SMALL)
    shared, private = twins.tensors(method)
    with torch.no_grad():
        encoded = method.encode(shared, private)
        alone = method.encode(shared, None)
        mixed = 0.8 * private["ctx_local"][1, 4] + 0.2 * shared["ctx_global"][1, 4]
        expected = twins.class_features(clip, mixed)[4]
        twins.close(encoded["classes"][1, 4], expected, "client")
        of_global = twins.class_features(clip, shared["ctx_global"][0, 2])[2]
        twins.close(alone["classes"][0, 2], of_global, "global")
    assert torch.equal(encoded["negatives"], alone["negatives"])


def test_novelty_is_the_probability_of_the_words(clip: FrozenCLIP) -> None:
    method: Any = twins.build(clip, "focoop", **SMALL)
    shared, private = twins.tensors(method)
    inputs = twins.batch(clip).inputs
    with torch.no_grad():
        encoded = method.encode(shared, private)
        every = torch.cat([encoded["classes"], encoded["negatives"]], 1)
        p = (clip.logit_scale * inputs.features @ every.transpose(1, 2)).softmax(-1)
        twins.close(method.novelty(encoded, inputs), 1 - p[..., :6].sum(-1))


def test_gamma_falls_with_a_client_s_steps_and_never_reaches_zero(clip: FrozenCLIP) -> None:
    method: Any = twins.build(clip, "focoop", **SMALL)
    found = method._gamma(2.0, torch.tensor([0.0, 10.0, 10_000.0]))
    assert found.tolist() == pytest.approx([10.0, 10 - 10 * 0.005 * 8, 1e-3])
    shared, private = twins.tensors(method)
    batch = twins.batch(clip)
    after = method.end_round(shared, private, batch.round_info)[1]
    assert torch.equal(after["steps"][:, 0], batch.round_info.steps_K.float())
    late = {**private, "steps": torch.full((K, 1), 1e6)}
    assert bool(twins.loss_of(method, shared, late, batch)["ce"].isfinite().all())


def test_local_contexts_start_as_the_global_ones_and_words_do_not(clip: FrozenCLIP) -> None:
    method: Any = twins.build(clip, "focoop", **SMALL)
    shared, private = method.init_shared(3), method.init_private(3, 5)
    assert torch.equal(shared["ctx_global"], private["ctx_local"])
    assert len(set(method.words)) == 7
    assert (
        F.cosine_similarity(shared["ctx_ood"][0].flatten(), shared["ctx_ood"][1].flatten(), 0) < 1
    )


def test_upload_on_vit_b16() -> None:
    method = twins.build(shape_only_clip("ViT-B-16"), "focoop")
    assert uploaded_numbers(method) == (6 + 100) * 16 * 512


def test_more_words_than_the_list_has(clip: FrozenCLIP) -> None:
    with pytest.raises(UserError, match="negatives"):
        twins.build(clip, "focoop", negatives=5000)
