"""PLAN against plain torch modules: the aggregators, and both kinds of rounds."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.errors import UserError
from fedprompt.experiment.workspaces import open_workspace
from fedprompt.federation.server_app import Federation
from fedprompt.methods.base import Batch, Method, Tensors, uploaded_numbers
from fedprompt.methods.plan import aggregate, aggregator_start
from fedprompt.simulation.inline_grid import InlineGrid
from tests.support import twins
from tests.support.builders import batch_of, small_config

OPTIONS = {
    "text_tokens": 2, "visual_tokens": 2, "text_depth": 2, "visual_depth": 2,
    "peers": 3, "heads": 2,
}  # fmt: skip
CLIENTS = 2
DATA = {"images_per_class": 4, "domains": ["delta"]}


def plain_aggregate(
    weights: Tensors, tower: str, prompts: list[list[Tensor]], heads: int
) -> list[Tensor]:
    """The global prompts [layer] (M, w) of prompts [client][layer] (M, w), by torch's modules."""
    made = []
    for layer in range(len(prompts[0])):
        own = {n.removeprefix(f"{tower}."): t for n, t in weights.items()}
        x = torch.stack([of_client[layer] for of_client in prompts])
        width = x.shape[-1]
        attention = nn.MultiheadAttention(width, heads)
        parts = {
            "in_proj_weight": own["in_proj.weight"][layer],
            "in_proj_bias": own["in_proj.bias"][layer],
            "out_proj.weight": own["out_proj.weight"][layer],
            "out_proj.bias": own["out_proj.bias"][layer],
        }
        added = torch.func.functional_call(attention, parts, (x, x, x))[0]
        x = F.layer_norm(x + added, (width,), own["norm1.weight"], own["norm1.bias"])
        hidden = F.relu(F.linear(x, own["ffn1.weight"][layer], own["ffn1.bias"][layer]))
        x = x + F.linear(hidden, own["ffn2.weight"][layer], own["ffn2.bias"][layer])
        x = F.layer_norm(x, (width,), own["norm2.weight"], own["norm2.bias"])
        made.append(x.mean(0))
    return made


def test_aggregator_is_that_of_torch_modules() -> None:
    start = aggregator_start("text", 3, 8, seed=1)
    weights = {
        n: t + 0.1 * twins.draw(2, *t.shape, seed=i) for i, (n, t) in enumerate(start.items())
    }
    leaves = {n: t.clone().requires_grad_() for n, t in weights.items()}
    rows = twins.draw(2, 4, 3, 5, 8)
    known = torch.tensor([[1.0, 0, 1, 1], [0, 1, 0, 0]])
    ours = aggregate("text", leaves, rows, known, 2)
    direction = twins.draw(2, 3, 5, 8, seed=9)
    found = torch.autograd.grad((ours * direction).sum(), list(leaves.values()))
    for k in range(2):
        own = {n: t[k].clone().requires_grad_() for n, t in weights.items()}
        prompts = [[*rows[k, e]] for e in range(4) if known[k, e]]
        theirs = torch.stack(plain_aggregate(own, "text", prompts, 2))
        twins.close(ours[k], theirs, "global prompts")
        gradients = torch.autograd.grad((theirs * direction[k]).sum(), list(own.values()))
        for name, mine, plain in zip(own, found, gradients, strict=True):
            twins.close(mine[k], plain, name)


def given(clip: FrozenCLIP, server_round: int, **options: object) -> tuple[Method, Tensors, Batch]:
    """The method, leaves of two clients with two peers known, and pictures."""
    method = twins.build(clip, "plan", **OPTIONS | options)
    shared = twins.moved(method.init_shared(1), CLIENTS, 5)
    extras = {
        n: twins.draw(1, *t.shape, seed=len(n)).expand(CLIENTS, *t.shape)
        for n, t in method.init_extras(1).items()
    }
    extras["peers.known"] = torch.tensor([[1.0, 1, 0]]).expand(CLIENTS, -1)
    inputs = twins.pictures(clip, CLIENTS, 3)
    labels = torch.tensor([[0, 1, 2], [3, 4, 5]])
    received = {n: t.detach() for n, t in shared.items()} | extras
    batch = batch_of(inputs, labels, received=received, server_round=server_round)
    return method, {**shared, **extras}, batch


def plain_logits(
    clip: FrozenCLIP, text: list[Tensor], visual: list[Tensor], pixels: Tensor
) -> Tensor:
    prefix = " ".join(["X"] * len(text[0]))
    return (
        clip.logit_scale
        * twins.plain_images(clip, pixels, visual)
        @ twins.plain_text(clip, prefix, text).T
    )


def global_prompts(shared: Tensors, k: int, tower: str, mean: bool = False) -> list[Tensor]:
    rows = shared[f"peers.{tower}"][k]
    peers = [[*rows[e]] for e in range(2)]
    if mean:
        return [torch.stack(layer).mean(0) for layer in zip(*peers, strict=True)]
    own = {n: t[k] for n, t in shared.items() if n.startswith(f"{tower}.")}
    return plain_aggregate(own, tower, peers, 2)


@pytest.mark.parametrize("server_round", [1, 3])
def test_odd_rounds_train_prompts_alone_towards_a_teacher(
    clip: FrozenCLIP, server_round: int
) -> None:
    method, shared, batch = given(clip, server_round, distill_weight=0.7)
    terms = twins.loss_of(method, shared, {}, batch)
    gradients = twins.applied_gradients(method, shared, batch)
    assert set(gradients) == {"text", "visual"}
    for k in range(CLIENTS):
        text, visual = (shared[n][k].detach().requires_grad_() for n in ("text", "visual"))
        assert batch.inputs.pixels is not None
        pixels = batch.inputs.pixels[k]
        logits = plain_logits(clip, [*text], [*visual], pixels)
        with torch.no_grad():
            if server_round == 1:
                frozen = twins.template_features(clip)
                teacher = clip.logit_scale * batch.inputs.features[k] @ frozen.T
            else:
                both = (global_prompts(shared, k, tower) for tower in ("text", "visual"))
                teacher = plain_logits(clip, *both, pixels)
        ce = F.cross_entropy(logits, batch.labels_KB[k])
        soft = -0.7 * (teacher.softmax(-1) * logits.log_softmax(-1)).sum(1).mean()
        twins.close(terms["ce"][k], ce, "ce")
        twins.close(terms["distillation"][k], soft, "distillation")
        for name, theirs in zip(
            ("text", "visual"), torch.autograd.grad(ce + soft, (text, visual)), strict=True
        ):
            twins.close(gradients[name][k], theirs, name)


@pytest.mark.parametrize("text_aggregator", ["attention", "mean"])
def test_even_rounds_train_aggregators_alone(clip: FrozenCLIP, text_aggregator: str) -> None:
    method, shared, batch = given(clip, 2, text_aggregator=text_aggregator)
    mean = text_aggregator == "mean"
    terms = twins.loss_of(method, shared, {}, batch)
    gradients = twins.applied_gradients(method, shared, batch)
    assert not {"text", "visual"} & set(gradients)
    assert any(n.startswith("text.") for n in gradients) != mean
    assert terms["distillation"].tolist() == [0, 0]
    evaluated = {n: t.detach() for n, t in shared.items()}
    logits_KBC = method.logits(method.encode(evaluated, {}), batch.inputs)
    for k in range(CLIENTS):
        leaves = {n: shared[n][k].detach().requires_grad_() for n in gradients}
        own = {**shared, **{n: {k: t} for n, t in leaves.items()}}
        text = global_prompts(own, k, "text", mean)  # type: ignore[arg-type]
        visual = global_prompts(own, k, "visual")  # type: ignore[arg-type]
        assert batch.inputs.pixels is not None
        logits = plain_logits(clip, text, visual, batch.inputs.pixels[k])
        ce = F.cross_entropy(logits, batch.labels_KB[k])
        twins.close(logits_KBC[k], logits.detach(), "logits")
        twins.close(terms["ce"][k], ce, "ce")
        for (name, _), theirs in zip(
            leaves.items(), torch.autograd.grad(ce, list(leaves.values())), strict=True
        ):
            twins.close(gradients[name][k], theirs, name)


def test_prompts_and_aggregators_take_turns_in_a_federation() -> None:
    config = small_config(
        method={"name": "plan", **OPTIONS, "peers": 2, "heads": 8},
        strategy={"name": "auto"},
        data=DATA,
        partition={"clients": 2, "alpha": 10.0},
        training={"lr": 0.01},
    )
    workspace = open_workspace(config)
    federation = Federation(workspace, InlineGrid(workspace))
    federation.join()
    states = [dict(federation.shared)]
    for server_round in (1, 2, 3):
        federation.train_round(server_round)
        states.append(dict(federation.shared))
    moved = [
        {n for n in workspace.shared_shapes if not torch.equal(a[n], b[n])}
        for a, b in pairwise(states)
    ]
    prompts = {"text", "visual"}
    assert moved[0] == moved[2] == prompts
    assert not moved[1] & prompts
    assert "visual.in_proj.weight" in moved[1]
    assert states[-1]["peers.known"].tolist() == [1, 1]
    # The average is nobody's: each client trains on from its own.
    own = states[-1]["peers.text"]
    assert not torch.equal(own[0], own[1])
    torch.testing.assert_close(states[-1]["text"], own.mean(0))


def test_refusals(clip: FrozenCLIP) -> None:
    with pytest.raises(UserError, match="heads=7"):
        twins.build(clip, "plan", heads=7)
    config = small_config(
        method={"name": "plan", **OPTIONS, "peers": 1, "heads": 8},
        strategy={"name": "auto"},
        data=DATA,
        partition={"clients": 2, "alpha": 10.0},
    )
    workspace = open_workspace(config)
    federation = Federation(workspace, InlineGrid(workspace))
    with pytest.raises(UserError, match=r"method\.peers=2"):
        federation.join()


def test_upload_on_vit_b16() -> None:
    assert uploaded_numbers(twins.build(shape_only_clip("ViT-B-16"), "plan")) == 82_024_448
