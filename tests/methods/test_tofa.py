"""TOFA's posteriors, weights of sentences and fusion against sums over single images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import ClientData, Method, Task, Tensors, stack, uploaded_numbers
from tests.support import twins
from tests.support.builders import CLASS_NAMES

C, B = len(CLASS_NAMES), 6
OPTIONS = {"prior": 0.5, "shrinkage": 0.2, "alpha": 0.7}
TASK = Task(
    CLASS_NAMES, descriptions=tuple((c, (f"{c} from above.", f"many a {c}!")) for c in CLASS_NAMES)
)


def clients(clip: FrozenCLIP) -> list[ClientData]:
    """Two clients with unequal numbers of images; nobody has one of the last class."""
    data = []
    for k, number in enumerate((40, 13)):
        features = twins.features(1, number, clip.embed_dim, seed=k)[0] + 0.1
        labels = torch.from_numpy(np.random.default_rng(k).integers(0, C - 1, number))
        data.append(ClientData(k, Inputs(F.normalize(features, dim=-1)), labels))
    return data


def average(method: Method, data: list[ClientData]) -> Tensors:
    """What the server has after a round of FedAvg, (1, ...)."""
    sent = [method.shared_from_data(d) for d in data]
    total = sum(map(len, data))
    return {
        n: sum(len(d) / total * s[n] for d, s in zip(data, sent, strict=True))[None]  # type: ignore[index]
        for n in sent[0]
    }


def texts(clip: FrozenCLIP) -> list[Tensor]:
    return [
        F.normalize(clip.encode_text_raw(list(own)), dim=-1).double() for own in TASK.sentences()
    ]


def described(data: list[ClientData], clip: FrozenCLIP) -> Tensor:
    """The weighted mean feature of each class's sentences."""
    x, y = (
        torch.cat([d.inputs.features for d in data]).double(),
        torch.cat([d.labels_N for d in data]),
    )
    features = []
    for c, sentences in enumerate(texts(clip)):
        weights = torch.ones(len(sentences)).double() / len(sentences)
        if (y == c).any():
            scores = sentences @ (x[y == c].mean(0) - x[y != c].mean(0))
            weights = (clip.logit_scale * scores).softmax(0)
        features.append((weights[:, None] * sentences).sum(0))
    return torch.stack(features)


def moved(x: Tensor, y: Tensor, prior: Tensor, kappa: list[float]) -> tuple[Tensor, Tensor]:
    """Means and scatter of images that each weigh 1 / N, and of kappa_c images at the prior."""
    means, scatter = [], torch.zeros(x.shape[1], x.shape[1]).double()
    for c in range(C):
        points, weights = [prior[c]], [kappa[c]]
        for v, label in zip(x, y, strict=True):
            if label == c:
                points.append(v)
                weights.append(1 / len(x))
        mean = sum(w * v for w, v in zip(weights, points, strict=True)) / sum(weights)
        means.append(mean)
        for w, v in zip(weights, points, strict=True):
            scatter += w * torch.outer(v - mean, v - mean)
    return torch.stack(means), scatter


def gaussians(
    data: list[ClientData], own: ClientData | None, clip: FrozenCLIP
) -> tuple[Tensor, Tensor]:
    x, y = (
        torch.cat([d.inputs.features for d in data]).double(),
        torch.cat([d.labels_N for d in data]),
    )
    text = described(data, clip)
    start = text - text.mean(0) + x.mean(0)
    kappa = [OPTIONS["prior"] / C] * C
    means, scatter = moved(x, y, start, kappa)
    round_ = OPTIONS["shrinkage"] * scatter.trace() / len(scatter) * torch.eye(len(scatter))
    sigma = (scatter + round_) / (1 + OPTIONS["shrinkage"])
    if own is not None:
        alpha = OPTIONS["alpha"]
        kappa = [alpha * (kappa[c] + float((y == c).double().mean())) for c in range(C)]
        means, scatter = moved(own.inputs.features.double(), own.labels_N, means, kappa)
        sigma = (scatter + alpha * sigma) / (1 + alpha)
    return means, sigma


def twin(v: Tensor, data: list[ClientData], own: ClientData | None, clip: FrozenCLIP) -> Tensor:
    """log p of some images (B, C)."""
    means, sigma = gaussians(data, own, clip)
    inverse = torch.linalg.inv(sigma)
    rows = []
    for x in v.double():
        visual = torch.stack([-(x - w) @ inverse @ (x - w) / 2 for w in means]).softmax(0)
        words = (clip.logit_scale * F.normalize(described(data, clip), dim=-1) @ x).softmax(0)
        share = visual.max() / (visual.max() + words.max())
        rows.append((share * visual + (1 - share) * words).log())
    return torch.stack(rows).float()


@pytest.fixture
def method(clip: FrozenCLIP) -> Method:
    return twins.build(clip, "tofa", TASK, **OPTIONS)


def test_global_and_personal_models_are_those_of_single_images(
    clip: FrozenCLIP, method: Method
) -> None:
    data = clients(clip)
    shared = average(method, data)
    inputs = Inputs(twins.features(1, B, clip.embed_dim, seed=9))
    ours = method.logits(method.encode(shared, None), inputs)[0]
    twins.close(ours, twin(inputs.features[0], data, None, clip))
    start = method.init_private(1, 0)
    private = stack([method.init_private_from_data(start, d, seed=1) for d in data])
    personal = method.logits(method.encode(shared, private), inputs)
    for k, own in enumerate(data):
        twins.close(personal[k], twin(inputs.features[0], data, own, clip))
    assert not torch.allclose(personal[0], ours, atol=0.1)


def test_the_global_model_does_not_depend_on_the_partition(
    clip: FrozenCLIP, method: Method
) -> None:
    data = clients(clip)
    together = ClientData(
        0,
        Inputs(torch.cat([d.inputs.features for d in data])),
        torch.cat([d.labels_N for d in data]),
    )
    for name, tensor in average(method, [together]).items():
        twins.close(average(method, data)[name], tensor, name, rtol=1e-6)


def test_without_an_image_it_predicts_as_the_sentences_do(clip: FrozenCLIP, method: Method) -> None:
    inputs = Inputs(twins.features(1, B, clip.embed_dim))
    none = stack([method.init_shared(1)])
    mean = F.normalize(torch.stack([t.mean(0) for t in texts(clip)]), dim=-1).float()
    ours = method.logits(method.encode(none, stack([method.init_private(1, 0)])), inputs)[0]
    assert torch.equal(ours.argmax(-1), (inputs.features[0] @ mean.T).argmax(-1))


def test_noisy_moments_still_give_probabilities(clip: FrozenCLIP, method: Method) -> None:
    noisy = {
        n: t + 0.3 * twins.draw(*t.shape, seed=i)
        for i, (n, t) in enumerate(average(method, clients(clip)).items())
    }
    inputs = Inputs(twins.features(1, B, clip.embed_dim))
    log_p = method.logits(method.encode(noisy, None), inputs)
    twins.close(log_p.exp().sum(-1), torch.ones(1, B))


def test_a_negative_share_is_that_of_a_class_without_images(
    clip: FrozenCLIP, method: Method
) -> None:
    shared = average(method, clients(clip))
    inputs = Inputs(twins.features(1, B, clip.embed_dim))
    expected = method.logits(method.encode(shared, None), inputs)
    noisy = shared["shares"].clone()
    assert noisy[0, -1] == 0
    noisy[0, -1] = -0.5
    assert torch.equal(
        method.logits(method.encode({**shared, "shares": noisy}, None), inputs), expected
    )


def test_upload_at_vit_b_16() -> None:
    names = tuple(f"class {c}" for c in range(10))
    clip = shape_only_clip("ViT-B-16")
    uploaded = uploaded_numbers(twins.build(clip, "tofa", task=Task(names)))
    assert uploaded == 512 * 513 // 2 + 10 * 513
