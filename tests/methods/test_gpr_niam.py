"""GPR-NIAM against the masked pass of open_clip's own blocks, and its server written with loops."""

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
from fedprompt.experiment.workspaces import ResourceCache, open_workspace
from fedprompt.federation.server_app import Federation
from fedprompt.methods.base import UNLABELLED, ClientData, Method, Task, Tensors, uploaded_numbers
from fedprompt.methods.gpr_niam import GPRNIAM
from fedprompt.rng import generator
from fedprompt.simulation.inline_grid import InlineGrid
from tests.support import twins
from tests.support.builders import CLASS_NAMES, small_config
from tests.support.isolated_text import isolated_features
from tests.support.secure_rounds import ON

C, M, P = len(CLASS_NAMES), 3, 2
OPTIONS: dict[str, Any] = {"context_tokens": M, "reweight": 0.6, "prototypes": P}
SERVER = {"server_epochs": 2, "server_lr": 0.5, "server_batch_size": 4}
RESOURCES = ResourceCache()


def classes(clip: FrozenCLIP, context: Tensor) -> Tensor:
    texts = [f"a photo of a {name}." for name in CLASS_NAMES]
    return F.normalize(isolated_features(clip, texts, context, OPTIONS["reweight"]), dim=-1)


@pytest.mark.parametrize("own", [True, False])
def test_loss_and_gradients_are_those_of_the_plain_pass(clip: FrozenCLIP, own: bool) -> None:
    """Each client's classes compete alone, or all classes do."""
    method = twins.build(clip, "gpr_niam", own_classes=own, **OPTIONS)
    shared, private = twins.tensors(method, noise=0.3)
    data = twins.batch(clip)
    loss = twins.loss_of(method, shared, private, data)["ce"]
    (gradient,) = twins.gradients({"ce": loss}, [shared["ctx"]])
    for k in range(twins.K):
        context = shared["ctx"][k].detach().clone().requires_grad_()
        features, labels = twins.images_of(data, k)
        present = sorted(set(data.labels_KB[k].tolist())) if own else list(range(C))
        logits = clip.logit_scale * features @ classes(clip, context)[present].T
        mapped = torch.tensor([present.index(y) for y in labels.tolist()])
        plain = F.cross_entropy(logits, mapped)
        twins.close(loss[k], plain)
        twins.close(gradient[k], torch.autograd.grad(plain, context)[0])


def client(clip: FrozenCLIP) -> ClientData:
    """Twelve images of the first class, one of the second, three of the third, two unknown."""
    labels = torch.tensor([0] * 12 + [1] + [2] * 3 + [UNLABELLED] * 2)
    return ClientData(7, Inputs(twins.features(1, len(labels), clip.embed_dim, seed=2)[0]), labels)


def own_prototypes(method: Method, data: ClientData, seed: int = 1) -> Tensor:
    private = method.init_private_from_data(method.init_private(1, data.client), data, seed)
    return private["own.prototypes"]


def test_prototypes_are_weighted_means_and_noisy_ones_of_few_images(clip: FrozenCLIP) -> None:
    method, data = twins.build(clip, "gpr_niam", **OPTIONS), client(clip)
    found = own_prototypes(method, data)
    many = data.inputs.features[:12]
    for p in range(P):
        weights = torch.linalg.lstsq(many.T, found[0, p]).solution
        assert weights.min() >= 0
        twins.close(weights.sum(), torch.tensor(1.0))
        assert weights.std() > 0.01, "the weights are random"
    assert not torch.equal(found[0, 0], found[0, 1])
    for c, rows in ((1, slice(12, 13)), (2, slice(13, 16))):
        mean = data.inputs.features[rows].mean(0)
        relative = (found[c, 0] - mean) / mean.abs()
        assert 0.002 < relative.std() < 0.03
        assert not found[c, 1:].any()
    assert not found[3:].any()
    assert torch.equal(found, own_prototypes(method, data))
    assert not torch.equal(found, own_prototypes(method, data, seed=2))


def refined(clip: FrozenCLIP, context: Tensor, uploads: list[Tensor]) -> Tensor:
    """The server's SGD, with prototypes one after the other in a list."""
    pool = [(row, c) for own in uploads for c in range(C) for row in own[c] if row.any()]
    context = context.clone().requires_grad_()
    for epoch in range(SERVER["server_epochs"]):  # type: ignore[call-overload]
        order = generator(1, "refine", 3, epoch).permutation(len(pool))
        for at in range(0, len(pool), 4):
            some = [pool[i] for i in order[at : at + 4]]
            features = torch.stack([row for row, _ in some])
            logits = clip.logit_scale * features @ classes(clip, context).T
            loss = F.cross_entropy(logits, torch.tensor([c for _, c in some]))
            (gradient,) = torch.autograd.grad(loss, context)
            context.data -= 0.5 * (gradient + 0.001 * context.data)
    return context.detach()


def test_the_server_trains_on_the_prototypes_of_all_clients(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "gpr_niam", **OPTIONS, **SERVER)
    start = method.init_shared(1)
    first = own_prototypes(method, client(clip))
    uploads = [first, 0.9 * first.flip(0)]
    sent: list[Tensors] = [{**start, "prototypes": own} for own in uploads]
    ours = method.refine(start, sent, seed=1, server_round=3)
    assert torch.equal(ours["prototypes"], start["prototypes"])
    expected = refined(clip, start["ctx"], uploads)
    twins.close(ours["ctx"] - start["ctx"], expected - start["ctx"], rtol=1e-3)
    nothing = method.refine(start, [start], seed=1, server_round=3)
    assert torch.equal(nothing["ctx"], start["ctx"]), "without prototypes there is nothing to do"


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_federation_refines_what_the_strategy_has_averaged(
    wrapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, and within FedProx."""
    calls: list[tuple[Tensors, list[Tensors], Tensors]] = []
    refine = GPRNIAM.refine

    def spying(self: GPRNIAM, shared: Tensors, uploads: list[Tensors], **keys: int) -> Tensors:
        calls.append((shared, uploads, refine(self, shared, uploads, **keys)))
        return calls[-1][2]

    monkeypatch.setattr(GPRNIAM, "refine", spying)
    options = {"context_tokens": 2, "server_lr": 0.1}
    method = {"name": "gpr_niam", **options}
    if wrapped:
        method = {"name": "fedprox", "base": "gpr_niam", "options": options}
    config = small_config(
        method=method, partition={"clients": 3}, strategy={"name": "fedavg", "weights": "uniform"}
    )
    workspace = open_workspace(config, resources=RESOURCES)
    federation = Federation(workspace, InlineGrid(workspace))
    federation.join()
    federation.train_round(1)
    ((shared, uploads, after),) = calls
    assert len(uploads) == 3
    assert any(upload["prototypes"].any() for upload in uploads)
    twins.close(shared["ctx"], torch.stack([upload["ctx"] for upload in uploads]).mean(0))
    assert not torch.equal(after["ctx"], shared["ctx"])
    assert torch.equal(federation.shared["ctx"], after["ctx"])


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"secure_aggregation": ON}, "secure_aggregation"),
        (
            {"clock": {"enabled": True}, "asynchronous": {"enabled": True, "buffer": 2}},
            r"asynchronous\.enabled",
        ),
        ({"strategy": {"name": "median"}}, "strategy fedavg"),
        ({"method": {"name": "gpr_niam", "template": "a photo"}}, "template 'a photo'"),
    ],
)
def test_what_the_server_cannot_refine_is_refused(sections: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        small_config(**{"method": {"name": "gpr_niam"}, **sections})


@pytest.mark.parametrize("count", [10, 65])
def test_upload_at_vit_b_16(count: int) -> None:
    names = tuple(f"class {c}" for c in range(count))
    method = twins.build(shape_only_clip("ViT-B-16"), "gpr_niam", task=Task(names))
    assert uploaded_numbers(method) == 10 * 512 + count * 5 * 512
