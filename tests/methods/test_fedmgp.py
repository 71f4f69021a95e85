from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.errors import UserError
from fedprompt.experiment.validate import validate
from fedprompt.methods.base import Batch, Tensors, uploaded_numbers
from tests.support import twins
from tests.support.builders import batch_of, random_clip

K, B, G, S = 2, 4, 3, 2
OPTIONS: dict[str, Any] = {"groups": G, "uploaded_groups": S}
SLOTS = {"slots.text": [[2, 0], [1, 2]], "slots.visual": [[0, 1], [2, 1]]}


def states(method: Any) -> tuple[Tensors, Tensors]:
    """Two clients whose shared groups stand in places of their own."""
    shared = twins.moved(method.init_shared(1), K, 3)
    start = method.init_private(1, 0)
    private = twins.moved({n: start[n] for n in ("text", "visual")}, K, 4)
    return shared, private | {n: torch.tensor(v).float() for n, v in SLOTS.items()}


def batch(clip: FrozenCLIP) -> Batch:
    mask = torch.ones(K, B, dtype=torch.bool)
    mask[1, 3:] = False
    labels = torch.tensor([[0, 1, 5, 1], [2, 4, 2, 0]])
    return batch_of(twins.pictures(clip, K, B), labels, mask)


def groups_of(kind: str, shared: Tensors, private: Tensors, k: int) -> list[Tensor]:
    """A client's G prompts, the shared ones put into their places."""
    groups = list(private[kind][k].unbind())
    for rank, place in enumerate(SLOTS[f"slots.{kind}"][k]):
        groups[place] = shared[kind][k, rank]
    return groups


def twin(clip: FrozenCLIP, shared: Tensors, private: Tensors, data: Batch, k: int) -> Any:
    """Text and image features of each group, for the real images of one client."""
    real = data.mask_KB[k]
    assert data.inputs.pixels is not None
    pixels = data.inputs.pixels[k][real]
    texts = [
        twins.plain_text(clip, "a photo of a", [p]) for p in groups_of("text", shared, private, k)
    ]
    images = [
        twins.plain_images(clip, pixels, [v]) for v in groups_of("visual", shared, private, k)
    ]
    return texts, images, data.labels_KB[k][real]


def alike(form: str, a: Tensor, b: Tensor) -> Tensor:
    if form == "cosine":
        return F.cosine_similarity(a, b, dim=0)
    if form == "l1":
        return -(a - b).abs().sum() / len(a)
    return -torch.sqrt(((a - b) ** 2).sum() + 1e-8)


def diversity(form: str, features: list[Tensor]) -> Tensor:
    """Mean over rows of the mean over pairs of groups."""
    total: Any = 0
    rows, pairs = len(features[0]), list(itertools.combinations(range(len(features)), 2))
    for row in range(rows):
        for i, j in pairs:
            total = total + alike(form, features[i][row], features[j][row])
    return total / (rows * len(pairs))


@pytest.mark.parametrize(("form", "weight"), [("cosine", 1.0), ("l1", -1.0), ("l2", 0.5)])
def test_terms_logits_and_gradients_by_hand(clip: FrozenCLIP, form: str, weight: float) -> None:
    method = twins.build(clip, "fedmgp", **OPTIONS, diversity=form, diversity_weight=weight)
    shared, private = states(method)
    data = batch(clip)
    encoded = method.encode(shared, private)
    loss_terms = method.loss_terms(shared, private, encoded, data)
    logits = method.logits(encoded, data.inputs)
    leaves = {f"shared.{n}": t for n, t in shared.items()}
    leaves |= {f"private.{n}": private[n] for n in ("text", "visual")}
    ours = method.gradients(loss_terms, leaves, data)
    losses = []
    for k in range(K):
        texts, images, labels = twin(clip, shared, private, data, k)
        by_group = [clip.logit_scale * v @ t.T for v, t in zip(images, texts, strict=True)]
        twins.close(logits[k][data.mask_KB[k]], sum(by_group) / G)
        ce = sum(F.cross_entropy(z, labels) for z in by_group) / G
        apart = weight * (diversity(form, texts) + diversity(form, images)) / 2
        torch.testing.assert_close(loss_terms["ce"][k], ce, rtol=1e-4, atol=0)
        torch.testing.assert_close(loss_terms["diversity"][k], apart, rtol=1e-4, atol=0)
        losses.append(ce + apart)
    theirs = torch.autograd.grad(sum(losses), list(leaves.values()))
    for (_, found), other in zip(ours.items(), theirs, strict=True):
        assert found is not None
        twins.close(found, other)
    for k in range(K):  # what stands in a shared group's place is not trained
        gradient = ours["private.text"]
        assert gradient is not None
        for place in range(G):
            assert gradient[k, place].any() == (place not in SLOTS["slots.text"][k])


def test_with_the_released_weights_minimising_pulls_groups_together(clip: FrozenCLIP) -> None:
    """The public loss takes |negative term|; ours with weight -1 is that, and 1 is its opposite."""
    released = twins.build(clip, "fedmgp", **OPTIONS, diversity="l1", diversity_weight=-1.0)
    paper = twins.build(clip, "fedmgp", **OPTIONS)
    shared, private = states(paper)
    data = batch(clip)
    for method, towards in ((released, True), (paper, False)):
        encoded = method.encode(shared, private)
        term = method.loss_terms(shared, private, encoded, data)["diversity"].sum()
        (gradient,) = torch.autograd.grad(term, private["visual"])
        stepped = {**private, "visual": private["visual"] - 0.1 * F.normalize(gradient, dim=-1)}
        for k in range(K):
            with torch.no_grad():
                before = -diversity("l2", twin(clip, shared, private, data, k)[1])
                after = -diversity("l2", twin(clip, shared, stepped, data, k)[1])
            assert (after < before) == towards


def test_sampling_probabilities(clip: FrozenCLIP) -> None:
    """Pairs come as often as the softmax says, then the softmax of those that are left."""
    method = twins.build(clip, "fedmgp", **OPTIONS, temperature=0.4)
    draw = torch.Generator().manual_seed(1)
    groups = torch.randn(1, G, 2, 8, generator=draw)
    received = torch.randn(1, S, 2, 8, generator=draw)
    similarity = []
    for g in range(G):
        a = groups[0, g].flatten()
        similarity.append(max(float(a @ r / (a.norm() * r.norm())) for r in received[0].flatten(1)))
    torch.testing.assert_close(method.similarities(groups, received)[0], torch.tensor(similarity))
    weight = np.exp(np.array(similarity) / 0.4)
    clients = 20000
    round_info = batch_of(
        torch.zeros(clients, 1, 4), torch.zeros(clients, 1, dtype=torch.long), server_round=2
    ).round_info
    chosen = method._sample(groups.expand(clients, -1, -1, -1), received, round_info)
    for i, j in itertools.permutations(range(G), 2):
        p = weight[i] / weight.sum() * weight[j] / (weight.sum() - weight[i])
        seen = float(((chosen[:, 0] == i) & (chosen[:, 1] == j)).float().mean())
        assert abs(seen - p) < 5 * np.sqrt(p * (1 - p) / clients), (i, j, seen, p)
    first = batch_of(
        torch.zeros(clients, 1, 4), torch.zeros(clients, 1, dtype=torch.long)
    ).round_info
    even = method._sample(groups.expand(clients, -1, -1, -1), received, first)
    for i, j in itertools.permutations(range(G), 2):
        seen = float(((even[:, 0] == i) & (even[:, 1] == j)).float().mean())
        assert abs(seen - 1 / 6) < 5 * np.sqrt(5 / 36 / clients)


def test_a_round_uploads_what_was_sampled_and_keeps_all_groups(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "fedmgp", **OPTIONS)
    shared, private = states(method)
    received = {n: t.detach() + 1 for n, t in shared.items()}
    round_info = batch_of(
        twins.pictures(clip, K, B), torch.zeros(K, B, dtype=torch.long), received=received
    ).round_info
    sent, kept = method.end_round(shared, private, round_info)
    assert torch.equal(kept["slots.text"], kept["slots.visual"]), "one draw in the first round"
    for kind in ("text", "visual"):
        for k in range(K):
            groups = groups_of(kind, shared, private, k)
            places = kept[f"slots.{kind}"][k].long().tolist()
            assert len(set(places)) == S
            assert torch.equal(kept[kind][k], torch.stack(groups))
            assert torch.equal(sent[kind][k], torch.stack([groups[i] for i in places]))
    average = {n: t.mean(0, keepdim=True) for n, t in sent.items()}
    encoded = method.encode(average, kept)
    for k in range(K):
        for rank, place in enumerate(kept["slots.visual"][k].long().tolist()):
            assert torch.equal(encoded["visual"][k, place], average["visual"][0, rank])


def test_the_global_model_is_the_shared_groups(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "fedmgp", **OPTIONS)
    shared = {n: t[:1] for n, t in states(method)[0].items()}
    data = batch(clip)
    assert data.inputs.pixels is not None
    logits = method.logits(method.encode(shared, None), data.inputs[:1])
    assert method.class_embeddings(method.encode(shared, None)) is None
    expected: Any = 0
    for s in range(S):
        images = twins.plain_images(clip, data.inputs.pixels[0], [shared["visual"][0, s]])
        texts = twins.plain_text(clip, "a photo of a", [shared["text"][0, s]])
        expected = expected + clip.logit_scale * images @ texts.T / S
    twins.close(logits[0], expected)


def test_sizes_and_starts_of_the_paper() -> None:
    clip = shape_only_clip("ViT-B-16")
    method = twins.build(clip, "fedmgp")
    assert uploaded_numbers(method) == 5120
    private = method.init_private(1, 0)
    assert sum(private[n].numel() for n in ("text", "visual")) == 12800
    words = (
        clip.text.token_embedding(clip.tokenizer(["a photo of a"]))[0, 1:3].detach().float().cpu()
    )
    noise = private["text"] - words
    assert 0.008 < float(noise.std()) < 0.012
    assert not torch.equal(private["text"][0], private["text"][1])
    assert 0.018 < float(private["visual"].std()) < 0.022
    assert torch.equal(private["text"], method.init_private(1, 7)["text"])
    assert torch.equal(method.init_shared(1)["visual"], private["visual"][:2])
    made = validate({"method": {"name": "fedmgp"}})
    assert made.strategy.weights == "uniform"


def test_more_uploaded_than_there_are_is_refused() -> None:
    with pytest.raises(UserError, match="6 of 5 groups"):
        validate({"method": {"name": "fedmgp", "uploaded_groups": 6}})
    with pytest.raises(UserError, match="cannot be split after 9"):
        twins.build(random_clip(), "fedmgp", text_tokens=9)
