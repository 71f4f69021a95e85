"""TFUP against its cache and its weights written with loops."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.data.features.inputs import Inputs
from fedprompt.errors import UserError
from fedprompt.methods.base import UNLABELLED, ClientData, Tensors, stack
from fedprompt.methods.parts.pseudo_memory import confident
from tests.support import twins
from tests.support.builders import CLASS_NAMES

C, K, B, N = len(CLASS_NAMES), 2, 5, 40


def clients(clip: FrozenCLIP) -> list[ClientData]:
    """Two clients without labels, the second with fewer images than a class may keep."""
    unknown = torch.full((N,), UNLABELLED)
    features = [twins.features(1, n, clip.embed_dim, seed=10 + n)[0] for n in (N, 7)]
    return [ClientData(k, Inputs(f), unknown[: len(f)]) for k, f in enumerate(features)]


def text(clip: FrozenCLIP) -> Tensor:
    return F.normalize(clip.encode_text_raw([f"a photo of a {c}." for c in CLASS_NAMES]), dim=-1)


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def answers(features_ND: Tensor, text_CD: Tensor) -> list[list[float]]:
    rows: list[list[float]] = (10 * features_ND.double() @ text_CD.double().T).softmax(-1).tolist()
    return rows


def chosen(features_ND: Tensor, text_CD: Tensor, shots: int) -> list[list[int]]:
    """The images that each class keeps."""
    p = answers(features_ND, text_CD)
    kept = []
    for c in range(C):
        top = sorted(range(len(p)), key=lambda i: -p[i][c])[: 2 * shots]
        kept.append(sorted(top, key=lambda i: sum(kl(p[i], p[j]) for j in top))[:shots])
    return kept


def twin(features_BD: Tensor, keys: list[Tensor], text_CD: Tensor, alpha: float) -> Tensor:
    """Logits without the zero-shot part, image by image and row by row; beta is 1."""
    rows = [key for of_class in keys for key in of_class]
    own, others = answers(features_BD, text_CD), answers(torch.stack(rows), text_CD)
    result = torch.zeros(len(features_BD), C)
    for b, v in enumerate(features_BD):
        divergence = [kl(own[b], q) for q in others]
        mean = sum(divergence) / len(divergence)
        # The public code standardises first.
        scores = [(d - mean) / torch.tensor(divergence).std() for d in divergence]
        scale = max(scores) - min(scores)
        for m, key in enumerate(rows):
            similar = 2 * (1 - (scores[m] - min(scores)) / scale)
            c = m // len(keys[0])
            result[b, c] += alpha * math.exp(-(1 - float(v @ key) * float(similar)))
    return result


@pytest.fixture
def filled(clip: FrozenCLIP) -> list[Tensors]:
    method = twins.build(clip, "tfup")
    start = method.init_private(1, 0)
    return [method.init_private_from_data(start, d, seed=1) for d in clients(clip)]


def test_the_memory_has_the_twins_images(clip: FrozenCLIP, filled: list[Tensors]) -> None:
    for data, memory, shots in zip(clients(clip), filled, (9, 7), strict=True):
        features_ND = data.inputs.features
        expected = [features_ND[i] for kept in chosen(features_ND, text(clip), 9) for i in kept]
        assert torch.equal(memory["keys"], torch.stack(expected))
        assert memory["owners"].tolist() == [c + 1.0 for c in range(C) for _ in range(shots)]


@pytest.mark.parametrize(("images", "shots"), [(40, 9), (6 * 40, 12), (6 * 100, 16)])
def test_a_class_keeps_a_share_within_limits(clip: FrozenCLIP, images: int, shots: int) -> None:
    method = twins.build(clip, "tfup")
    features = twins.features(1, images, clip.embed_dim)[0]
    data = ClientData(0, Inputs(features), torch.full((images,), UNLABELLED))
    memory = method.init_private_from_data(method.init_private(1, 0), data, seed=1)
    assert len(memory["keys"]) == C * shots


def test_logits_are_clips_and_the_memorys(clip: FrozenCLIP, filled: list[Tensors]) -> None:
    """Also for the client whose memory is padded to the length of the other's."""
    method = twins.build(clip, "tfup", alpha=2.0)
    features = twins.features(K, B, clip.embed_dim)
    ours = method.logits(method.encode({}, stack(filled)), Inputs(features))
    zero_shot = method.logits(method.encode({}, None), Inputs(features))
    for k, memory in enumerate(filled):
        keys = list(memory["keys"].view(C, -1, clip.embed_dim))
        twins.close(ours[k] - zero_shot[k], twin(features[k], keys, text(clip), 2.0))


def test_a_client_without_images_answers_as_zero_shot(clip: FrozenCLIP) -> None:
    """Alone, and beside one with a memory."""
    method = twins.build(clip, "tfup")
    empty, full = method.init_private(1, 0), method.init_private(1, 1)
    full = method.init_private_from_data(full, clients(clip)[0], seed=1)
    features = Inputs(twins.features(2, B, clip.embed_dim))
    zero_shot = method.logits(method.encode({}, None), features)
    for private in ([empty, empty], [empty, full]):
        ours = method.logits(method.encode({}, stack(private)), features)
        assert torch.equal(ours[0], zero_shot[0])


def test_equal_rows_are_as_similar_as_can_be(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "tfup", alpha=1.0)
    key = twins.features(1, 1, clip.embed_dim)[0]
    memory = {"keys": key[None], "owners": torch.ones(1, 1)}
    own = Inputs(key[None])
    votes = method.logits(method.encode({}, memory), own) - method.logits(
        method.encode({}, None), own
    )
    twins.close(votes[0, 0, 0], torch.tensor(math.e))


def test_ties_are_kept_in_their_order(clip: FrozenCLIP) -> None:
    feature = twins.features(1, 1, clip.embed_dim)[0]
    rows, classes = confident(feature.expand(8, -1), text(clip), 3)
    assert rows.tolist() == [0, 1, 2] * C
    assert classes.tolist() == [c for c in range(C) for _ in range(3)]


def test_limits_that_exclude_each_other_are_refused(clip: FrozenCLIP) -> None:
    with pytest.raises(UserError, match="fewest"):
        twins.build(clip, "tfup", fewest=20)
