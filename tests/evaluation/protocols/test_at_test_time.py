"""Test-time adaptation: twins of the rules, streams, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.data.features.inputs import Inputs
from fedprompt.errors import UserError
from fedprompt.evaluation.adaptation import (
    AdaptationOptions,
    Prompted,
    VisualDomainPrompt,
    marginal_entropy,
    tent,
    tpt,
    trained,
)
from fedprompt.evaluation.protocols.at_test_time import AtTestTime, AtTestTimeOptions
from fedprompt.methods.base import Method
from fedprompt.scoring import encode_global
from fedprompt.workspace import Workspace
from tests.support import twins
from tests.support.protocol_runs import summary_of

LR = 0.05


def features(clip: FrozenCLIP, images: int, seed: int) -> Inputs:
    return Inputs(twins.features(1, images, clip.embed_dim, seed=seed)[0])


def answer(clip: FrozenCLIP, context: Tensor, images: Tensor) -> Tensor:
    return clip.logit_scale * images @ twins.class_features(clip, context).T


def adam(context: Tensor, gradient: Tensor, state: list[Any], decay: float = 0.0) -> Tensor:
    """One step of Adam (or AdamW) by its formula."""
    state[0] = 0.9 * state[0] + 0.1 * gradient
    state[1] = 0.999 * state[1] + 0.001 * gradient**2
    state[2] += 1
    first, second = state[0] / (1 - 0.9 ** state[2]), state[1] / (1 - 0.999 ** state[2])
    return context * (1 - LR * decay) - LR * first / (second.sqrt() + 1e-8)


@pytest.fixture
def method(clip: FrozenCLIP) -> Method:
    return twins.build(clip, "promptfl", context_tokens=2)


def test_tent_goes_on_from_batch_to_batch(clip: FrozenCLIP, method: Method) -> None:
    start = method.init_shared(1)
    batches = [features(clip, n, seed=n) for n in (5, 3)]
    options = AdaptationOptions(lr=LR, steps=2)
    ours = tent(Prompted(method, start, None), batches, options)
    context, state = start["ctx"], [torch.zeros(()), torch.zeros(()), 0]
    for batch, found in zip(batches, ours, strict=True):
        for _ in range(2):
            leaf = context.detach().requires_grad_()
            p = answer(clip, leaf, batch.features).softmax(-1)
            (gradient,) = torch.autograd.grad(-(p * p.log()).sum(-1).mean(), leaf)
            context = adam(context, gradient, state)
        twins.close(found, answer(clip, context, batch.features))
    assert torch.equal(start["ctx"], method.init_shared(1)["ctx"]), "the start has not moved"


def test_tpt_adapts_every_image_alone(clip: FrozenCLIP, method: Method) -> None:
    start, options = method.init_shared(1), AdaptationOptions(rule="tpt", lr=LR, confident=0.5)
    views = [features(clip, 3, seed=v) for v in range(4)]
    (ours,) = tpt(Prompted(method, start, None), [views], options)
    for i in range(3):
        leaf = start["ctx"].clone().requires_grad_()
        p = answer(clip, leaf, torch.stack([view.features[i] for view in views])).softmax(-1)
        entropy = -(p * p.log()).sum(-1).detach()
        mean = p[sorted(range(4), key=lambda v: float(entropy[v]))[:2]].mean(0)
        (gradient,) = torch.autograd.grad(-(mean * mean.log()).sum(), leaf)
        context = adam(start["ctx"], gradient, [torch.zeros(()), torch.zeros(()), 0], 0.01)
        twins.close(ours[i], answer(clip, context, views[0].features[i : i + 1])[0])
    few = marginal_entropy(torch.randn(2, 3, 4), 0.01)
    assert few.shape == (2,)
    assert torch.isfinite(few).all()


def test_only_trained_tensors_move(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "prompt_bank", pairs=2)
    names = trained(method, method.init_shared(1), {})
    assert set(names) == {"shared.ctx", "shared.bias.0", "shared.bias.1"}


def test_vdp_follows_its_teacher_and_notices_a_new_domain(clip: FrozenCLIP, method: Method) -> None:
    options = AdaptationOptions(rule="vdp", lr=0.1, teacher_decay=0.5, confidence_drop=0.3)
    prompt = VisualDomainPrompt(clip, options)
    encoded = encode_global(method, method.init_shared(1))
    pixels = twins.pictures(clip, 1, 4).pixels
    assert pixels is not None
    nothing = torch.zeros_like(pixels[0, 0], requires_grad=True)
    seen = clip.model.encode_image(pixels[0] + nothing)  # type: ignore[operator]
    inputs = Inputs(torch.nn.functional.normalize(seen, dim=-1))
    logits = method.logits(encoded, inputs.of_one())[0]
    loss = torch.nn.functional.cross_entropy(logits, logits.argmax(-1))
    (gradient,) = torch.autograd.grad(loss, nothing)
    answers = prompt.answer(method, encoded, pixels[0])
    omega, psi = prompt.student["omega"].detach(), prompt.student["psi"].detach()
    # Both prompts see the same gradient in the first step, and the penalty none.
    assert torch.equal(omega, psi)
    twins.close(psi, -0.1 * gradient / (gradient.abs() + 1e-8))
    twins.close(prompt.teacher["psi"], 0.5 * psi)
    twins.close(prompt.importance, 0.5 * gradient**2)
    inputs = Inputs(torch.nn.functional.normalize(clip.encode_images(pixels[0] + 2 * psi), dim=-1))
    twins.close(answers, method.logits(encoded, inputs.of_one())[0])
    prompt.confidence = 2.0
    prompt.answer(method, encoded, pixels[0])
    assert prompt.changes == 1
    assert not torch.equal(prompt.student["psi"], prompt.student["omega"])


@pytest.mark.parametrize("order", ["shuffled", "by_class"])
def test_streams(make_workspace: Callable[..., Workspace], order: Any) -> None:
    workspace = make_workspace(protocols=["at_test_time"])
    protocol = AtTestTime(AtTestTimeOptions(order=order), workspace.config)
    index = workspace.partition.server_test
    labels_N = workspace.dataset.labels_N[index]
    stream = protocol._stream(workspace, index, labels_N, 7, "server")
    assert len(set(stream.tolist())) == 7
    assert np.array_equal(labels_N[stream], np.sort(labels_N[stream])) == (order == "by_class")
    again = protocol._stream(workspace, index, labels_N, 7, "server")
    assert np.array_equal(stream, again)


def test_without_adaptation_it_is_the_model_as_it_was_trained(runs: Callable[..., Path]) -> None:
    images = {"images": 10**6, "client_images": 10**6, "lr": 1e-12}
    summary = summary_of(runs("at_test_time", protocol_options={"at_test_time": images}))
    rows = {row["model"]: row for row in summary["protocols"]["at_test_time"]["rows"]}
    assert rows["global"]["before"] == summary["global"]["accuracy"]
    assert rows["zero-shot"]["before"] == summary["zero_shot"]["accuracy"]
    for row in (rows["global"], rows["personal"]):
        assert row["after"] == row["before"], "a step of no length changes no answer"


@pytest.mark.parametrize(
    ("method", "options", "named"),
    [
        ("zero_shot", {}, "zero_shot"),
        ("copl", {"rule": "vdp"}, "rule=vdp"),
        ("promptfl", {"rule": "tpt"}, r"data\.views"),
    ],
)
def test_what_cannot_adapt_is_refused(
    make_workspace: Callable[..., Workspace], method: str, options: Any, named: str
) -> None:
    workspace = make_workspace()
    cls = twins.method_class(method)
    workspace.method = cls(cls.Config(), workspace.clip, workspace.task)
    protocol = AtTestTime(replace(AtTestTimeOptions(), **options), workspace.config)
    with pytest.raises(UserError, match=named):
        protocol.open(workspace)
