"""TFUP-T against its two losses written client by client; the memory is TFUP's (test_tfup.py)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import UNLABELLED, Batch, ClientData, Method, Tensors, stack
from tests.support import twins
from tests.support.builders import CLASS_NAMES, batch_of

C, K, B, N = len(CLASS_NAMES), 2, 6, 40
MASK = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
OPTIONS = {"text_mix": 0.4, "image_mix": 0.3, "alpha": 2.0, "beta": 0.7, "confidence": 0.3}
"""Confidence 0.3, which some images reach and others do not."""


@pytest.fixture
def method(clip: FrozenCLIP) -> Method:
    return twins.build(clip, "tfup_t", **OPTIONS)


@pytest.fixture
def private(clip: FrozenCLIP, method: Method) -> list[Tensors]:
    own = []
    for k in range(K):
        features = Inputs(twins.features(1, N - 20 * k, clip.embed_dim, seed=20 + k)[0])
        data = ClientData(k, features, torch.full((len(features),), UNLABELLED))
        own.append(method.init_private_from_data(method.init_private(1, k), data, seed=1))
    return own


@pytest.fixture
def shared(method: Method) -> Tensors:
    """Another residual and adapter on each client."""
    start = {n: torch.stack([t] * K) for n, t in method.init_shared(1).items()}
    noise = {n: twins.features(*t.shape[:2], t.shape[2], seed=len(n)) for n, t in start.items()}
    return {n: (t + 0.3 * noise[n]).requires_grad_() for n, t in start.items()}


def step(clip: FrozenCLIP, server_round: int) -> Batch:
    """Of ten rounds; the first two are warm-up."""
    batch = batch_of(
        Inputs(twins.features(K, B, clip.embed_dim, seed=5)),
        torch.zeros(K, B, dtype=torch.long),
        MASK,
        server_round=server_round,
    )
    unknown = torch.full((K, B), UNLABELLED)
    second = twins.features(K, B, clip.embed_dim, seed=6)
    return replace(batch, labels_KB=unknown, second_KBD=second)


def answer(clip: FrozenCLIP, shared: Tensors, k: int, features_ND: Tensor) -> tuple[Tensor, ...]:
    """Logits, v' and t' of one client."""
    text = F.normalize(clip.encode_text_raw([f"a photo of a {c}." for c in CLASS_NAMES]), dim=-1)
    t_CD = F.normalize(0.6 * text + 0.4 * shared["residual"][k], dim=-1)
    down, up = shared["adapter.down.weight"][k], shared["adapter.up.weight"][k]
    adapted = F.relu(F.linear(F.relu(F.linear(features_ND, down)), up))
    v_ND = F.normalize(0.7 * features_ND + 0.3 * adapted, dim=-1)
    return clip.model.logit_scale.exp() * v_ND @ t_CD.T, v_ND, t_CD


def recalled(memory: Tensors, logits_NC: Tensor, v_ND: Tensor, t_CD: Tensor) -> Tensor:
    """The logits with the memory's votes."""
    keys, owners = memory["keys"], memory["owners"].long() - 1
    p, q = (10 * v_ND @ t_CD.T).softmax(-1), (10 * keys @ t_CD.T).softmax(-1)
    kl = (p[:, None] * (p[:, None] / q).log()).sum(-1)
    low, high = kl.min(1, keepdim=True).values, kl.max(1, keepdim=True).values
    affinity = (v_ND @ keys.T) * 2 * (1 - (kl - low) / (high - low))
    return logits_NC + 2.0 * (-0.7 * (1 - affinity)).exp() @ F.one_hot(owners, C).float()


def twin(clip: FrozenCLIP, shared: Tensors, own: Tensors, batch: Batch, k: int) -> list[Tensor]:
    """`ce` and `marginal` of one client after the warm-up."""
    rows = batch.mask_KB[k]
    strong = answer(clip, shared, k, batch.inputs.features[k][rows])[0]
    assert batch.second_KBD is not None
    with torch.no_grad():
        weak = recalled(own, *answer(clip, shared, k, batch.second_KBD[k][rows]))
    sure, label = weak.softmax(-1).max(-1)
    learned = sure > 0.3
    assert learned.any()
    mean = strong.softmax(-1).mean(0)
    return [
        F.cross_entropy(strong[learned], label[learned]),
        0.3 * (mean * (mean + 1e-6).log()).sum(),
    ]


def compare(ours: Tensors, theirs: dict[str, list[Tensor]], shared: Tensors) -> None:
    """Values of the terms, and gradients of their sum."""
    for name, values in theirs.items():
        twins.close(ours[name], torch.stack(values), name)
    leaves = list(shared.values())
    mine = torch.autograd.grad(torch.stack(list(ours.values())).sum(), leaves)
    other = torch.autograd.grad(
        torch.stack([x for values in theirs.values() for x in values]).sum(), leaves
    )
    for name, one, another in zip(shared, mine, other, strict=True):
        twins.close(one, another, name)


def test_later_rounds_have_the_twins_losses_and_gradients(
    clip: FrozenCLIP, method: Method, private: list[Tensors], shared: Tensors
) -> None:
    batch = step(clip, 3)
    ours = method.loss_terms(shared, stack(private), method.encode(shared, None), batch)
    both = [twin(clip, shared, own, batch, k) for k, own in enumerate(private)]
    compare(ours, {"ce": [x for x, _ in both], "marginal": [x for _, x in both]}, shared)


def test_the_warm_up_has_the_twins_loss_and_gradients(
    clip: FrozenCLIP, method: Method, private: list[Tensors], shared: Tensors
) -> None:
    """Its pseudo-labels are those of TFUP's logits, not the classes of the selection."""
    ours = method.loss_terms(shared, stack(private), method.encode(shared, None), step(clip, 2))
    assert not ours.pop("marginal").any()
    losses = []
    zero = {n: torch.zeros_like(t) for n, t in shared.items()}
    for k, own in enumerate(private):
        labels = recalled(own, *answer(clip, zero, k, own["refined"])).argmax(-1)
        assert torch.equal(labels, own["refined_owners"].long() - 1)
        losses.append(F.cross_entropy(answer(clip, shared, k, own["refined"])[0], labels))
    compare(ours, {"ce": losses}, shared)


def test_predictions_leave_the_memory_out(
    clip: FrozenCLIP, method: Method, private: list[Tensors], shared: Tensors
) -> None:
    features = twins.features(K, B, clip.embed_dim)
    ours = method.logits(method.encode(shared, stack(private)), Inputs(features))
    for k in range(K):
        twins.close(ours[k], answer(clip, shared, k, features[k])[0])
