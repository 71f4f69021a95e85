"""FedSEPT against a plain model with torch's attention, client by client."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.methods.base import Method, Task, Tensors, stack, uploaded_numbers
from tests.support import twins
from tests.support.builders import CLASS_NAMES

K, E = twins.K, 3
OPTIONS = {"experts": E, "rank": 4, "context_tokens": 3, "diversity": 2.0, "init_std": 0.3}


def states(method: Method) -> tuple[Tensors, Tensors]:
    """Tensors of clients that differ, with gradients."""
    shared = stack([method.init_shared(seed) for seed in range(K)])
    private = stack([method.init_private(seed, seed) for seed in range(K)])
    private = {
        n: t + 0.1 * twins.draw(*t.shape, seed=i) for i, (n, t) in enumerate(private.items())
    }
    return (
        {n: t.requires_grad_() for n, t in shared.items()},
        {n: t.detach().requires_grad_() for n, t in private.items()},
    )


def mixture(router: Tensors, features: Tensor) -> Tensor:
    """The router as torch's attention over one token, with a query and keys of any values."""
    width = features.shape[-1]
    weight = torch.cat([twins.draw(2 * width, width), router["router.value.weight"]])
    bias = torch.cat([twins.draw(2 * width), router["router.value.bias"]])
    # Over a batch axis of the images, each a sequence of one token.
    out, _ = F.multi_head_attention_forward(
        twins.draw(1, len(features), width), features[None], features[None], width, 2,
        weight, bias, None, None, False, 0.0,
        router["router.out.weight"], router["router.out.bias"], need_weights=False,
    )  # fmt: skip
    norm = F.layer_norm(out[0], (width,), router["router.norm.weight"], router["router.norm.bias"])
    scores = norm @ router["router.head.weight"].T + router["router.head.bias"]
    return scores.softmax(-1)


def twin_logits(
    method: Method, clip: FrozenCLIP, shared: Tensors, private: Tensors, features: Tensor, k: int
) -> Tensor:
    weights = mixture({n: t[k] for n, t in private.items()}, features)
    logits = torch.zeros(len(features), len(CLASS_NAMES))
    for e in range(E):
        context = shared["experts"][k, e] @ method.basis_rd + private["residual"][k]  # type: ignore[attr-defined]
        classes = twins.class_features(clip, context)
        logits = logits + weights[:, e : e + 1] * clip.logit_scale * features @ classes.T
    return logits


def test_logits_losses_and_gradients(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "fedsept", **OPTIONS)
    shared, private = states(method)
    data = twins.batch(clip)
    encoded = method.encode(shared, private)
    logits = method.logits(encoded, data.inputs)
    terms = method.loss_terms(shared, private, encoded, data)
    leaves = {f"shared.{n}": t for n, t in shared.items()}
    leaves |= {f"private.{n}": t for n, t in private.items()}
    ours = method.gradients(terms, leaves, data)
    losses = []
    for k in range(K):
        expected = twin_logits(method, clip, shared, private, data.inputs.features[k], k)
        twins.close(logits[k], expected, f"client {k}")
        features, labels = twins.images_of(data, k)
        ce = F.cross_entropy(twin_logits(method, clip, shared, private, features, k), labels)
        factors = shared["experts"][k]
        similar = [
            F.cosine_similarity(factors[i].flatten(), factors[j].flatten(), dim=0) ** 2
            for i in range(E)
            for j in range(E)
            if i != j
        ]
        diversity = OPTIONS["diversity"] * torch.stack(similar).mean()
        twins.close(terms["ce"][k], ce)
        twins.close(terms["diversity"][k], diversity)
        losses.append(ce + diversity)
    theirs = torch.autograd.grad(sum(losses), list(leaves.values()))  # type: ignore[arg-type]
    for (name, found), other in zip(ours.items(), theirs, strict=True):
        assert found is not None
        twins.close(found, other, name)


def test_the_global_model_weighs_all_experts_equally(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "fedsept", **OPTIONS)
    shared = stack([method.init_shared(1)])
    data = twins.batch(clip)
    ours = method.logits(method.encode(shared, None), data.inputs)[0]
    each = [
        clip.logit_scale
        * data.inputs.features[0]
        @ twins.class_features(clip, shared["experts"][0, e] @ method.basis_rd).T  # type: ignore[attr-defined]
        for e in range(E)
    ]
    twins.close(ours, torch.stack(each).mean(0))


def test_one_expert_needs_no_router(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "fedsept", **{**OPTIONS, "experts": 1})
    assert list(method.init_private(1, 0)) == ["residual"]
    shared, private = stack([method.init_shared(1)]), stack([method.init_private(1, 0)])
    encoded = method.encode(shared, private)
    assert list(method.loss_terms(shared, private, encoded, twins.batch(clip))) == ["ce"]


@pytest.mark.parametrize(("experts", "rank", "numbers"), [(4, 16, 1024), (2, 8, 256)])
def test_upload_at_vit_b_16(experts: int, rank: int, numbers: int) -> None:
    names = tuple(f"class {c}" for c in range(10))
    clip = shape_only_clip("ViT-B-16")
    method = twins.build(clip, "fedsept", task=Task(names), experts=experts, rank=rank)
    assert uploaded_numbers(method) == numbers
