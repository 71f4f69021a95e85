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
from fedprompt.experiment.validate import validate
from fedprompt.methods.base import ClientData, Tensors, stack, uploaded_numbers
from tests.support import twins
from tests.support.builders import batch_of

PEERS, N = 3, 2
OPTIONS: dict[str, Any] = {"peers": PEERS, "validation_images": 3, "alpha": 1.004, "beta": 0.4}


def data_of(clip: FrozenCLIP) -> list[ClientData]:
    """Two clients, one of them with fewer images than are kept to judge peers on."""
    inputs = twins.pictures(clip, N, 5)
    labels = torch.tensor([[0, 1, 5, 1, 2], [2, 4, 2, 0, 3]])
    return [ClientData(0, inputs[0], labels[0]), ClientData(1, inputs[1][:2], labels[1][:2])]


def filled(method: Any, clip: FrozenCLIP) -> list[Tensors]:
    return [
        method.init_private_from_data(method.init_private(1, d.client), d, 1) for d in data_of(clip)
    ]


def twin_loss(
    clip: FrozenCLIP, task: Tensor, weight: Tensor, bias: Tensor, private: Tensors
) -> Tensor:
    """Loss of P_t and one P_d on the images that a client judges with; loops, all positions."""
    real = private["val.mask"] > 0
    visual = torch.stack([weight @ token + bias for token in task])
    texts = twins.plain_text(clip, "a photo of a", [task])
    images = twins.plain_images(clip, private["val.pixels"][real], [visual])
    return F.cross_entropy(clip.logit_scale * images @ texts.T, private["val.labels"][real].long())


def test_the_map_of_the_task_prompt_is_the_image_prompt(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "dp2fl", **OPTIONS)
    data = data_of(clip)[0]
    shared = {n: t[None].requires_grad_() for n, t in method.init_shared(1).items()}
    private = stack(filled(method, clip)[:1])
    batch = batch_of(data.inputs.of_one(), data.labels_N[None])
    encoded = method.encode(shared, private)
    loss_terms = method.loss_terms(shared, private, encoded, batch)
    leaves = {f"shared.{n}": t for n, t in shared.items()}
    ours = method.gradients(loss_terms, leaves, batch)
    task, weight, bias = shared["text"][0, 0], shared["weight"][0, 0], shared["bias"][0, 0]
    assert data.inputs.pixels is not None
    images = twins.plain_images(clip, data.inputs.pixels, [task @ weight.T + bias])
    logits = clip.logit_scale * images @ twins.plain_text(clip, "a photo of a", [task]).T
    twins.close(method.logits(encoded, batch.inputs)[0], logits)
    loss = F.cross_entropy(logits, data.labels_N)
    torch.testing.assert_close(loss_terms["ce"][0], loss, rtol=1e-4, atol=0)
    for found, other in zip(
        ours.values(), torch.autograd.grad(loss, list(leaves.values())), strict=True
    ):
        assert found is not None
        twins.close(found, other)


def test_a_few_own_images_are_kept_and_padded(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "dp2fl", **OPTIONS)
    for private, data in zip(filled(method, clip), data_of(clip), strict=True):
        count = min(3, len(data))
        assert private["val.mask"].tolist() == [1.0] * count + [0.0] * (3 - count)
        assert data.inputs.pixels is not None
        for kept, label in zip(private["val.pixels"][:count], private["val.labels"], strict=False):
            same = [i for i, p in enumerate(data.inputs.pixels) if torch.equal(p, kept)]
            assert len(same) == 1
            assert data.labels_N[same[0]] == label


def test_peers_are_judged_and_mixed_by_hand(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "dp2fl", **OPTIONS)
    start = method.init_shared(1)
    noise = torch.Generator().manual_seed(2)

    def other(t: Tensor, by: float) -> Tensor:
        return t + by * torch.randn(t.shape, generator=noise)

    private = filled(method, clip)
    for k, p in enumerate(private):
        private[k] = p | {
            "own.weight": other(start["weight"], 0.1),
            "own.bias": other(start["bias"], 0.1),
            "own.valid": torch.ones(1),
        }
    peers = [{n: other(start[n], 0.6) for n in ("weight", "bias")} for _ in range(N * PEERS)]
    sent = stack(
        [
            {
                "peers.weight": torch.stack([p["weight"] for p in peers[k * PEERS :][:PEERS]]),
                "peers.bias": torch.stack([p["bias"] for p in peers[k * PEERS :][:PEERS]]),
                "peers.known": torch.tensor([1.0, 1.0, float(k)]),
            }
            for k in range(N)
        ]
    )
    shared = stack([start] * N)
    labels = torch.zeros(N, 1, dtype=torch.long)
    round_info = batch_of(torch.zeros(N, 1, 4), labels, received=shared | sent).round_info
    mixed, kept = method.start_round(shared, stack(private), round_info)
    assert not kept["own.valid"].any()
    verdicts = []
    for k in range(N):
        own = (private[k]["own.weight"], private[k]["own.bias"])
        limit = 1.004 * float(twin_loss(clip, start["text"][0], own[0][0], own[1][0], private[k]))
        weights = {}
        for e in range(PEERS):
            w, b = sent["peers.weight"][k, e], sent["peers.bias"][k, e]
            loss = float(twin_loss(clip, start["text"][0], w[0], b[0], private[k]))
            if not sent["peers.known"][k, e]:
                continue
            let_in = loss < limit
            verdicts.append(let_in)
            if let_in:
                weights[e] = 1 / loss
        total = sum(weights.values())
        for n, mine in zip(("weight", "bias"), own, strict=True):
            expected = mine
            if weights:
                mean = sum(v / total * sent[f"peers.{n}"][k, e] for e, v in weights.items())
                expected = 0.6 * mine + 0.4 * mean
            torch.testing.assert_close(mixed[n][k], expected, rtol=1e-4, atol=1e-6)
        assert torch.equal(mixed["text"][k], start["text"])
    assert True in verdicts
    assert False in verdicts


def test_only_peers_that_exist_are_judged_and_a_common_prompt_is_encoded_once(
    clip: FrozenCLIP,
) -> None:
    method = twins.build(clip, "dp2fl", **OPTIONS)
    start = method.init_shared(1)
    private = stack([p | {"own.valid": torch.ones(1)} for p in filled(method, clip)])
    extras = stack([method.init_extras(1)] * N)
    shared = stack([start] * N)

    def positions(known: Tensor) -> int:
        sent = shared | extras | {"peers.known": known}
        info = batch_of(torch.zeros(N, 1, 4), torch.zeros(N, 1).long(), received=sent).round_info
        before = clip.positions_encoded
        method.start_round(shared, private, info)
        return clip.positions_encoded - before

    assert positions(torch.zeros(N, PEERS)) == 0
    # Client 1 alone has a peer: the common text, and its images under its own P_d and the peer's.
    image = 1 + method.vision.patches + method.config.context_tokens
    known = torch.zeros(N, PEERS)
    known[1, 2] = 1
    assert positions(known) == method.text.source.tower.positions + 2 * 3 * image


def test_a_client_keeps_its_own_map_and_a_new_one_takes_the_average(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "dp2fl", **OPTIONS)
    data, private = data_of(clip), filled(method, clip)
    received = method.init_shared(1) | method.init_extras(1)
    results = twins.train(method, [received] * N, private, data, twins.config(lr=0.01), 1)
    average = {n: torch.stack([r.shared[n] for r in results]).mean(0) for n in results[0].shared}
    assert set(average) == {"text", "weight", "bias"}
    shared = stack([average | method.init_extras(1)])
    inputs = Inputs(data[0].inputs.features[None], None, data[0].inputs.pixels[None])  # type: ignore[index]
    mine = method.logits(method.encode(shared, stack([results[0].private])), inputs)
    trained = {**average, "weight": results[0].shared["weight"], "bias": results[0].shared["bias"]}
    general = method.logits(method.encode(stack([trained]), None), inputs)
    torch.testing.assert_close(mine, general)
    newcomer = method.logits(method.encode(shared, stack([private[0]])), inputs)
    common = method.logits(method.encode(stack([average]), None), inputs)
    torch.testing.assert_close(newcomer, common)
    assert not torch.allclose(mine, newcomer, atol=1e-4)


def test_sizes_and_rule() -> None:
    method = twins.build(shape_only_clip("ViT-B-16"), "dp2fl")
    assert uploaded_numbers(method) == 2 * 512 + 768 * 512 + 768
    made = validate({"method": {"name": "dp2fl"}})
    assert made.strategy.name == "nearest_peers"
    with pytest.raises(UserError, match="must be 'factors'"):
        validate({"method": {"name": "dp2fl", "sharing": "text"}})
    with pytest.raises(UserError, match="nearest_peers"):
        validate({"method": {"name": "dp2fl"}, "strategy": {"name": "fedavg"}})
