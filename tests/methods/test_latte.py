"""Latte against its memory, its prototypes and its logits written with loops."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import (
    UNLABELLED,
    ClientData,
    Method,
    Task,
    Tensors,
    stack,
    uploaded_numbers,
)
from tests.support import twins
from tests.support.builders import CLASS_NAMES

C, K, B, PEERS = len(CLASS_NAMES), 2, 5, 3
OPTIONS = {"shots": 4, "peers": PEERS, "alpha": 0.7, "beta": 5.0, "gamma": 2.0}


def clients(clip: FrozenCLIP) -> list[ClientData]:
    """Two clients without labels, the second without an image of most classes."""
    features = twins.features(1, 60, clip.embed_dim, seed=3)[0]
    parts = features, features[:3].clone()
    return [
        ClientData(k, Inputs(f), torch.full((len(f),), UNLABELLED)) for k, f in enumerate(parts)
    ]


def text(clip: FrozenCLIP) -> Tensor:
    return F.normalize(clip.encode_text_raw([f"a photo of a {c}." for c in CLASS_NAMES]), dim=-1)


def entropy(feature: Tensor, clip: FrozenCLIP) -> float:
    p = (clip.logit_scale * text(clip).double() @ feature.double()).softmax(-1).tolist()
    return -sum(q * math.log(q) for q in p if q) / math.log(C)


def memory(features_ND: Tensor, clip: FrozenCLIP) -> list[list[tuple[float, Tensor]]]:
    """Entropies and features of each class, filled by one image after the other."""
    kept: list[list[tuple[float, Tensor]]] = [[] for _ in range(C)]
    for v in features_ND:
        place = kept[int((text(clip) @ v).argmax())]
        place.append((entropy(v, clip), v))
        place.sort(key=lambda entry: entry[0])
        del place[OPTIONS["shots"] :]  # type: ignore[misc]
    return kept


def prototype(rows: list[tuple[float, Tensor]], width: int) -> Tensor:
    summed = torch.zeros(width)
    for h, f in rows:
        summed = summed + math.exp(-OPTIONS["gamma"] * h) * f
    return summed / max(float(summed.norm()), 1e-12)


def twin(v: Tensor, rows: list[tuple[float, Tensor]]) -> float:
    """v . w_c of one image and one class."""
    summed = torch.zeros_like(v)
    for h, f in sorted(rows, key=lambda row: row[0])[: OPTIONS["shots"]]:  # type: ignore[misc]
        closeness = OPTIONS["beta"] * (float(v @ f) - 1)
        summed = summed + math.exp(closeness) * math.exp(-OPTIONS["gamma"] * h) * f
    return 0.0 if summed.norm() <= 1e-3 else float(v @ (summed / summed.norm()))


def filled(method: Method, clip: FrozenCLIP) -> list[Tensors]:
    start = method.init_private(1, 0)
    return [method.init_private_from_data(start, d, seed=1) for d in clients(clip)]


def test_a_memory_holds_the_most_certain_images_of_each_class(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "latte", **OPTIONS)
    for data, ours in zip(clients(clip), filled(method, clip), strict=True):
        expected = memory(data.inputs.features, clip)
        assert torch.equal(ours["keys"], torch.stack([f for rows in expected for _, f in rows]))
        assert ours["owners"].tolist() == [c + 1.0 for c, rows in enumerate(expected) for _ in rows]
        twins.close(ours["entropy"], torch.tensor([h for rows in expected for h, _ in rows]))


def test_what_is_uploaded_is_one_prototype_per_class(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "latte", **OPTIONS)
    for data in clients(clip):
        sent = method.shared_from_data(data)
        expected = [prototype(rows, clip.embed_dim) for rows in memory(data.inputs.features, clip)]
        twins.close(sent["prototypes"], torch.stack(expected))
        twins.close(sent["entropy"], torch.tensor([entropy(p, clip) for p in expected]))
    few = [c for c in range(C) if not sent["prototypes"][c].any()]
    assert few, "the second client has no image of some classes"
    twins.close(sent["entropy"][few], torch.ones(len(few)), rtol=1e-6)


def test_logits_are_clips_and_those_of_the_memory_and_the_peers(clip: FrozenCLIP) -> None:
    """Also for the client whose memory is padded to the length of the other's."""
    method = twins.build(clip, "latte", **OPTIONS)
    features = twins.features(K, B, clip.embed_dim, seed=4)
    peers = {
        "peers.prototypes": twins.features(K * PEERS, C, clip.embed_dim, seed=5).unflatten(
            0, (K, PEERS)
        ),
        "peers.entropy": twins.draw(K, PEERS, C, seed=6).abs().clamp(max=1),
    }
    encoded = method.encode(peers, stack(filled(method, clip)))
    ours = method.logits(encoded, Inputs(features))
    zero_shot = method.logits(method.encode({}, None), Inputs(features))
    expected = torch.zeros(K, B, C)
    for k, data in enumerate(clients(clip)):
        own = memory(data.inputs.features, clip)
        for c in range(C):
            others = [
                (float(peers["peers.entropy"][k, e, c]), peers["peers.prototypes"][k, e, c])
                for e in range(PEERS)
            ]
            for b, v in enumerate(features[k]):
                expected[k, b, c] = OPTIONS["alpha"] * clip.logit_scale * twin(v, own[c] + others)
    twins.close(ours - zero_shot, expected)


def test_a_client_without_images_and_peers_answers_as_zero_shot(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "latte", **OPTIONS)
    empty = ClientData(0, Inputs(torch.zeros(0, clip.embed_dim)), torch.zeros(0).long())
    private = method.init_private_from_data(method.init_private(1, 0), empty, seed=1)
    features = Inputs(twins.features(1, B, clip.embed_dim))
    encoded = method.encode(stack([method.init_extras(1)]), stack([private]))
    zero_shot = method.logits(method.encode({}, None), features)
    assert torch.equal(method.logits(encoded, features), zero_shot)
    assert not method.shared_from_data(empty)["prototypes"].any()


@pytest.mark.parametrize("classes", [10, 65])
def test_upload_at_vit_b_16(classes: int) -> None:
    names = tuple(f"class {c}" for c in range(classes))
    clip = shape_only_clip("ViT-B-16")
    assert uploaded_numbers(twins.build(clip, "latte", task=Task(names))) == classes * 513
