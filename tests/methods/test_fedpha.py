"""FedPHA against an independent twin: thin decompositions of one client at a time."""

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
from fedprompt.methods.fedpha import project
from tests.support import twins
from tests.support.builders import CLASS_NAMES
from tests.support.twins import K

OPTIONS: dict[str, Any] = {"shared_tokens": 4, "local_tokens": [2, 5, 3], "ratio": 0.7}


def twin_projection(local: Tensor, shared: Tensor, ratio: float) -> Tensor:
    """L V_2 V_2^T by a thin decomposition of G, as the public code has it."""
    _, sizes, v_t = torch.linalg.svd(shared, full_matrices=False)
    v_2 = v_t.T[:, int(len(sizes) * (1 - ratio)) :]
    return local @ (v_2 @ v_2.T)


def private_tensors(method: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """As `tensors`, padding rows zero again."""
    shared, private = twins.tensors(method, noise=0.02)
    ctx = private["ctx"].detach().clone()
    for k, length in enumerate(private["length"].tolist()):
        ctx[k, int(length) :] = 0
    private["ctx"] = ctx.requires_grad_()
    return shared, private


@pytest.mark.parametrize("k", range(K))
def test_logits_terms_and_gradients_are_the_twins(clip: FrozenCLIP, k: int) -> None:
    method = twins.build(clip, "fedpha", alpha=1.5, pull_weight=3.0, push_weight=0.5, **OPTIONS)
    shared, private = private_tensors(method)
    data = twins.one_client(twins.batch(clip), k)
    s, p = twins.row(shared, k), twins.row(private, k)
    length = (2, 5, 3)[k]
    assert int(private["length"][k]) == length
    g = shared["ctx"].detach()[k].clone().requires_grad_()
    local = private["ctx"].detach()[k, :length].clone().requires_grad_()
    t_local, t_global = twins.class_features(clip, local), twins.class_features(clip, g)
    t_projected = twins.class_features(clip, twin_projection(local, g, 0.7))
    images, labels = data.inputs.features[0], data.labels_KB[0]
    expected = clip.logit_scale * images @ t_local.T
    twins.close(method.logits(method.encode(s, p), data.inputs)[0], expected)
    pushed = [F.relu(1.5 - (t_local[c] - t_global[c]).norm()) for c in range(len(CLASS_NAMES))]
    expected_terms = {
        "ce": F.cross_entropy(expected, labels),
        "ce_global": F.cross_entropy(clip.logit_scale * images @ t_global.T, labels),
        "pull": 3.0 * F.mse_loss(t_local, t_projected),
        "push": 0.5 * torch.stack(pushed).mean(),
    }
    assert all(v.item() > 0 for v in pushed)
    loss_terms = twins.loss_of(method, s, p, data)
    assert list(loss_terms) == list(expected_terms)
    for name, value in expected_terms.items():
        assert loss_terms[name].item() == pytest.approx(value.item(), rel=1e-4)
        ours = torch.autograd.grad(
            loss_terms[name].sum(), [s["ctx"], p["ctx"]], retain_graph=True, allow_unused=True
        )
        theirs = torch.autograd.grad(value, [g, local], retain_graph=True, allow_unused=True)
        for our, their, rows in zip(ours, theirs, (4, length), strict=True):
            assert (our is None) == (their is None)
            if our is not None:
                twins.close(our[0, :rows], their)
                assert not our[0, rows:].any()


@pytest.mark.parametrize(("tokens", "ratio"), [(16, 0.8), (10, 0.8), (4, 1.0), (3, 0.1)])
def test_projection_and_its_gradients_are_the_thin_decompositions(
    tokens: int, ratio: float
) -> None:
    draw = torch.Generator().manual_seed(tokens)
    shared, local = (0.02 * torch.randn(2, n, 64, generator=draw) for n in (tokens, 5))
    weight = torch.randn(2, 5, 64, generator=draw)
    ours = (shared.clone().requires_grad_(), local.clone().requires_grad_())
    projected = project(ours[1], ours[0], ratio, "row_space")
    found = torch.autograd.grad((projected * weight).sum(), ours)
    for k in range(2):
        g, x = (t[k].double().requires_grad_() for t in (shared, local))
        twin = twin_projection(x, g, ratio)
        twins.close(projected[k], twin.float())
        theirs = torch.autograd.grad((twin * weight[k]).sum(), (g, x))
        for mine, other in zip(found, theirs, strict=True):
            twins.close(mine[k], other.float())


def test_projection_by_hand() -> None:
    """G's rows are 3, 2 and 1 times unit vectors: ratio 2/3 drops the first and keeps two."""
    shared = torch.tensor([[[0.0, 2, 0, 0], [3, 0, 0, 0], [0, 0, 1, 0]]])
    local = torch.tensor([[[5.0, 6, 7, 8], [0, 0, 0, 0]]])
    row_space = project(local, shared, 0.66, "row_space")
    assert torch.allclose(row_space, torch.tensor([[[0.0, 6, 7, 0], [0, 0, 0, 0]]]))
    complement = project(local, shared, 0.66, "complement")
    assert torch.allclose(complement, torch.tensor([[[0.0, 6, 7, 8], [0, 0, 0, 0]]]))
    assert torch.allclose(project(local, shared, 1.0, "complement"), local)


def test_the_first_vectors_dropped_are_counted_as_the_public_code_does() -> None:
    """int(16 * (1 - 0.8)) = 3; int(10 * (1 - 0.8)) = 1, as 1 - 0.8 < 0.2 in binary."""
    draw = torch.Generator().manual_seed(0)
    for tokens, dropped in ((16, 3), (10, 1)):
        shared = torch.randn(1, tokens, 32, generator=draw)
        kept = project(torch.eye(32)[None], shared, 0.8, "row_space")
        assert round(float(kept.diagonal(dim1=1, dim2=2).sum())) == tokens - dropped


def test_clients_of_unequal_lengths_do_not_touch_each_other(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "fedpha", **OPTIONS)
    twins.assert_clients_alone_agree(method, *private_tensors(method), twins.batch(clip))


def test_rows_behind_a_clients_length_change_nothing(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "fedpha", **OPTIONS)
    _, private = private_tensors(method)
    junk = private["ctx"].detach().clone()
    junk[0, 2:] = 9.0
    ours = method.encode({}, {"ctx": junk, "length": private["length"]})["classes"]
    twins.close(ours, method.encode({}, private)["classes"], rtol=1e-6)


def test_order_of_lengths_is_the_clients(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "fedpha", **OPTIONS)
    _, private = private_tensors(method)
    classes = method.encode({}, private)["classes"]
    for k, length in enumerate((2, 5, 3)):
        twins.close(classes[k], twins.class_features(clip, private["ctx"][k, :length]))


def test_lengths_are_dealt_in_turn_and_never_trained(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "fedpha", **OPTIONS)
    starts = [method.init_private(0, client) for client in range(5)]
    assert [int(s["length"]) for s in starts] == [2, 5, 3, 2, 5]
    assert all(s["ctx"].shape == (5, clip.text.width) for s in starts)
    assert not starts[0]["ctx"][2:].any()
    assert torch.equal(starts[0]["ctx"][:2], starts[1]["ctx"][:2])
    assert method.frozen == {"private.length"}


def test_global_model_is_the_global_prompt(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "fedpha", **OPTIONS)
    ctx = private_tensors(method)[0]["ctx"][:1]
    twins.close(method.encode({"ctx": ctx}, None)["classes"][0], twins.class_features(clip, ctx[0]))
    assert uploaded_numbers(twins.build(shape_only_clip("ViT-B-16"), "fedpha")) == 16 * 512


@pytest.mark.parametrize(
    "options",
    [{"local_tokens": []}, {"local_tokens": [4, 0]}, {"local_tokens": ["a"]}, {"ratio": 0.0}],
)
def test_meaningless_choices_are_refused(clip: FrozenCLIP, options: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        twins.build(clip, "fedpha", **options)


def test_terms_with_weight_zero_are_left_out(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "fedpha", pull_weight=0.0, push_weight=0.0, **OPTIONS)
    loss_terms = twins.loss_of(method, *private_tensors(method), twins.batch(clip))
    assert list(loss_terms) == ["ce", "ce_global"]
