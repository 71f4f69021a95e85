"""Class-specific contexts: twin, class shares, and the masked average by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.schema import TrainingConfig
from fedprompt.data.features.inputs import Inputs
from fedprompt.errors import UserError
from fedprompt.federation.registry import strategy_class
from fedprompt.federation.screening import Update
from fedprompt.training import ClientData, train_clients
from tests.support import twins
from tests.support.builders import CLASS_NAMES
from tests.support.twins import K


@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_twin(clip: FrozenCLIP, position: str) -> None:
    """Each class's own context in front of its name, as CoOp's CSC: logits, loss, gradients."""
    method = twins.build(clip, "coop_csc", context_tokens=4, class_position=position)
    shared, batch = twins.tensors(method)[0], twins.batch(clip)
    encoded = method.encode(shared, {})
    logits, loss_terms = (
        method.logits(encoded, batch.inputs),
        method.loss_terms(shared, {}, encoded, batch),
    )
    ours = twins.applied_gradients(method, shared, batch)
    assert ours.keys() == {"ctx"}
    for k in range(K):
        context = shared["ctx"][k].detach().requires_grad_()
        pairs = zip(context, CLASS_NAMES, strict=True)
        classes = torch.stack(
            [twins.text_feature(clip, own, name, position) for own, name in pairs]
        )
        images, labels = twins.images_of(batch, k)
        expected = clip.model.logit_scale.exp() * images @ classes.T
        twins.close(logits[k][batch.mask_KB[k]], expected, "logits")
        loss = F.cross_entropy(expected, labels)
        twins.close(loss_terms["ce"][k], loss, "loss")
        (theirs,) = torch.autograd.grad(loss, [context])
        twins.close(ours["ctx"][k], theirs, "gradient")


def test_starts(clip: FrozenCLIP) -> None:
    random = twins.build(clip, "coop_csc", context_tokens=4).init_shared(1)
    assert random["ctx"].shape == (6, 4, clip.text.width)
    assert not torch.equal(random["ctx"][0], random["ctx"][1])
    assert not random["class_shares"].any()
    words = twins.build(clip, "coop_csc", context_tokens=4, context_init="a photo of a")
    contexts = words.init_shared(1)["ctx"]
    assert all(torch.equal(own, contexts[0]) for own in contexts)
    with pytest.raises(UserError, match="context_init"):
        twins.build(clip, "coop_csc", context_init="a photo of a").init_shared(1)


def test_training_leaves_the_class_shares(clip: FrozenCLIP) -> None:
    """Two images of class 1, one of class 3, nothing else: shares 2/3 and 1/3; never trained."""
    method = twins.build(clip, "coop_csc", context_tokens=2)
    shared = method.init_shared(1)
    features = F.normalize(torch.randn(3, clip.embed_dim, generator=torch.Generator()), dim=-1)
    data = ClientData(0, Inputs(features), torch.tensor([1, 3, 1]))
    (result,) = train_clients(
        method, [shared], [{}], [data], TrainingConfig(lr=0.1), seed=1, server_round=1, rounds=1
    )
    assert result.shared["class_shares"].tolist() == pytest.approx([0, 2 / 3, 0, 1 / 3, 0, 0])
    assert not torch.equal(result.shared["ctx"], shared["ctx"])


def test_it_says_why_it_knows_no_new_classes(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "coop_csc")
    assert method.no_transfer_reason is not None
    assert "class" in method.no_transfer_reason
    assert dict(method.config.default_strategy) == {"name": "per_class"}


# The server's rule


def make(shapes: dict[str, tuple[int, ...]]) -> Any:
    cls = strategy_class("per_class")
    return cls(cls.Config(), shapes=shapes, seed=1)


SHAPES = {"ctx": (3, 1, 2), "class_shares": (3,)}


def update(client: int, value: float, shares: list[float], examples: int) -> Update:
    ctx = np.full((3, 1, 2), value, dtype=np.float32)
    ctx += np.arange(3, dtype=np.float32)[:, None, None]
    arrays = {"ctx": ctx, "class_shares": np.array(shares, dtype=np.float32)}
    return Update(client, arrays, examples)


def test_masked_average_by_hand() -> None:
    """Class 0: 6 and 4 images; class 1: the first client only; class 2: nobody has it."""
    start = {"ctx": np.full((3, 1, 2), -7, np.float32), "class_shares": np.ones(3, np.float32)}
    replies = [update(0, 1.0, [0.6, 0.4, 0], 10), update(1, 2.0, [1, 0, 0], 4)]
    after = make(SHAPES).aggregate(1, start, replies)
    assert after["ctx"][0].ravel().tolist() == pytest.approx([1.4, 1.4])
    assert after["ctx"][1].ravel().tolist() == [2.0, 2.0]
    assert after["ctx"][2].ravel().tolist() == [-7.0, -7.0]
    assert after["ctx"].dtype == np.float32
    assert after["class_shares"].tolist() == [0, 0, 0], "nobody is told another's histogram"
    assert start["ctx"].max() == -7, "the last round's tensors are not touched"


def test_shares_are_counts_in_the_end() -> None:
    """A third of three images is one image, whatever float32 makes of it."""
    start = {"ctx": np.zeros((3, 1, 2), np.float32), "class_shares": np.zeros(3, np.float32)}
    replies = [update(0, 0.0, [1 / 3, 2 / 3, 0], 3), update(1, 1.0, [1, 0, 0], 1)]
    after = make(SHAPES).aggregate(1, start, replies)
    assert after["ctx"][0, 0, 0] == 0.5


def test_no_share_counts_for_more_than_all_images_or_less_than_none() -> None:
    start = {"ctx": np.zeros((3, 1, 2), np.float32), "class_shares": np.zeros(3, np.float32)}
    replies = [update(0, 0.0, [99, -5, 0], 5), update(1, 1.0, [1, 1, 0], 5)]
    after = make(SHAPES).aggregate(1, start, replies)
    assert after["ctx"][:2, 0, 0].tolist() == pytest.approx([0.5, 2.0])


def test_methods_without_class_rows_are_refused() -> None:
    with pytest.raises(UserError, match="class_shares"):
        make({"ctx": (4, 8)})
    with pytest.raises(UserError, match="one row per class"):
        make({"ctx": (4, 8), "class_shares": (6,)})
