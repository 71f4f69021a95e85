"""PRE: torch's own LSTM as the twin; what is uploaded; local training goes on where it was sent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.errors import UserError
from fedprompt.methods.base import Tensors, uploaded_numbers
from tests.support import twins
from tests.support.twins import K


def twin_fold(own: Tensors) -> Tensor:
    """v + LSTM(v) by torch's module."""
    width = own["raw"].shape[-1]
    module = torch.nn.LSTM(width, width // 2, batch_first=True, bidirectional=True)
    weights = {n.removeprefix("lstm."): t for n, t in own.items() if n.startswith("lstm.")}
    assert {n: t.shape for n, t in weights.items()} == {
        n: p.shape for n, p in module.named_parameters()
    }
    found: Tensor = torch.func.functional_call(module, weights, (own["raw"][None],))[0][0]
    return found + own["raw"]


@pytest.mark.parametrize("sharing", ["folded", "encoder"])
def test_twin(clip: FrozenCLIP, sharing: str) -> None:
    method = twins.build(clip, "pre", sharing=sharing)
    shared, private = twins.tensors(method, 0.1)
    batch = twins.batch(clip)
    if sharing == "folded":
        shared["ctx"] = shared["ctx"] + 0.1 * twins.draw(*shared["ctx"].shape, seed=7)
    encoded = method.encode(shared, private)
    logits = method.logits(encoded, batch.inputs)
    loss = method.loss_terms(shared, private, encoded, batch)["ce"]
    leaf_of = {n: t for n, t in (shared | private).items() if t.requires_grad}
    assert len(leaf_of) == 9, "the raw context and four tensors per direction"
    ours = torch.autograd.grad(loss.sum(), list(leaf_of.values()))
    for k in range(K):
        own = {n: t[k].detach().requires_grad_() for n, t in leaf_of.items()}
        context = twin_fold(own)
        if sharing == "folded":
            context = context + shared["ctx"][k] - private["anchor"][k]
        images, labels = twins.images_of(batch, k)
        expected = clip.logit_scale * images @ twins.class_features(clip, context).T
        twins.close(logits[k][batch.mask_KB[k]], expected, "logits")
        theirs = torch.autograd.grad(F.cross_entropy(expected, labels), list(own.values()))
        for n, a, b in zip(own, ours, theirs, strict=True):
            twins.close(a[k], b, n)


def test_clients_do_not_touch_each_other(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "pre")
    twins.assert_clients_alone_agree(method, *twins.tensors(method), twins.batch(clip))


def test_training_starts_at_the_received_context_and_uploads_where_it_ends(
    clip: FrozenCLIP,
) -> None:
    """In round 2 the average is not what the client uploaded, and its encoder has moved."""
    method = twins.build(clip, "pre")
    data, training = twins.clients(clip), twins.config(weight_decay=0.5)
    start = [method.init_private(1, k) for k in range(3)]
    first = twins.train(method, [method.init_shared(1)] * 3, start, data, training, 1)
    mean = {"ctx": torch.stack([r.shared["ctx"] for r in first]).mean(0)}
    assert not torch.allclose(mean["ctx"], first[0].shared["ctx"], atol=1e-3)
    for result in first:
        kept = {n: t[None] for n, t in result.private.items()}
        assert not torch.equal(result.private["lstm.weight_hh_l0"], start[0]["lstm.weight_hh_l0"])
        before = method.encode({"ctx": mean["ctx"][None]}, kept)["classes"][0]
        twins.close(before, twins.class_features(clip, mean["ctx"]))
        own = {n: t for n, t in result.private.items() if n != "anchor"}
        twins.close(result.private["anchor"], twin_fold(own), "anchor")
        # What was uploaded is where the encoder ended: at first, received and anchor are the same.
        twins.close(result.shared["ctx"], twin_fold(own), "upload")
    second = twins.train(method, [mean] * 3, [r.private for r in first], data, training, 2)
    for old, new in zip(first, second, strict=True):
        moved = new.private["anchor"] - old.private["anchor"]
        twins.near(new.shared["ctx"], mean["ctx"] + moved, mean["ctx"])


def test_uploads_on_vit_b16() -> None:
    clip = shape_only_clip("ViT-B-16")
    assert uploaded_numbers(twins.build(clip, "pre")) == 2_048
    assert uploaded_numbers(twins.build(clip, "pre", sharing="encoder")) == 1_579_008


def test_what_is_trained_must_be_shared_for_a_wrapper(clip: FrozenCLIP) -> None:
    with pytest.raises(UserError, match="pre"):
        twins.build(clip, "fedprox", base="pre")
    method: Any = twins.build(clip, "fedprox", base="pre", options={"sharing": "encoder"})
    assert "raw" in method.learned
