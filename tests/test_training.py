"""Block training against the usual client: one batch, one torch optimiser at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.bench.reference import ReferenceClient, ReferenceCoOp, reference_local_training
from fedprompt.config.schema import TrainingConfig
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import Batch, ClientData, Method, RoundInfo, Task, Tensors
from fedprompt.methods.registry import method_class
from fedprompt.optimizer import build_optimizer, clip_gradients
from fedprompt.rng import generator
from fedprompt.training import LocalResult, learning_rate, train_clients
from tests.support.builders import CLASS_NAMES

SIZES = (5, 40, 17, 1, 40, 32)
TASK = Task(CLASS_NAMES)
SGD = TrainingConfig(optimizer="sgd", lr=0.05, momentum=0.9, weight_decay=0.01, batch_size=16)
ADAMW = TrainingConfig(optimizer="adamw", lr=0.01, weight_decay=0.1, batch_size=16)


def clients(clip: FrozenCLIP, sizes: Sequence[int] = SIZES) -> list[ClientData]:
    data = []
    for k, n in enumerate(sizes):
        draw = generator(0, "client", k)
        features = torch.from_numpy(draw.standard_normal((n, clip.embed_dim))).float()
        labels = torch.from_numpy(draw.integers(0, len(CLASS_NAMES), n))
        data.append(ClientData(k, Inputs(F.normalize(features, dim=-1)), labels))
    return data


def build(clip: FrozenCLIP, name: str, **options: object) -> Method:
    cls = method_class(name)
    return cls(cls.Config(**options), clip, TASK)


def train(
    method: Method, data: Sequence[ClientData], config: TrainingConfig, server_round: int = 2
) -> list[LocalResult]:
    shared = method.init_shared(1)
    return train_clients(
        method,
        [shared for _ in data],
        [method.init_private(1, d.client) for d in data],
        data,
        config,
        seed=1,
        server_round=server_round,
        rounds=5,
    )


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize(
    "config", [SGD, ADAMW, replace(SGD, clip_grad_norm=0.02)], ids=["sgd", "adamw", "clipped"]
)
def test_block_equals_the_reference_client(clip: FrozenCLIP, config: TrainingConfig) -> None:
    """Against images, 77 positions and one batch after the other, as CoOp's public code trains."""
    config = TrainingConfig(**{**vars(config), "local_epochs": 2})
    method = build(clip, "promptfl", context_tokens=4)
    data, usual = [], []
    for one in clients(clip):
        draw = generator(0, "images", one.client)
        images = torch.from_numpy(draw.standard_normal((len(one), 3, 32, 32))).float()
        features = F.normalize(clip.encode_images(images), dim=-1)
        data.append(ClientData(one.client, Inputs(features), one.labels_N))
        usual.append(ReferenceClient(one.client, images, one.labels_N, images[:0], images[:0]))
    start = method.init_shared(1)["ctx"]
    for result, client in zip(train(method, data, config), usual, strict=True):
        model = ReferenceCoOp(clip, CLASS_NAMES, start)
        loss = reference_local_training(model, client, config, seed=1, server_round=2, rounds=5)
        assert relative(result.shared["ctx"], model.context.detach()) < 1e-4
        assert result.losses["loss"] == pytest.approx(loss, rel=1e-4)
        assert result.num_examples == len(client.train_labels)


CLIPPED = replace(SGD, clip_grad_norm=0.02)


@pytest.mark.parametrize("config", [CLIPPED, replace(ADAMW, clip_grad_norm=0.02)])
def test_clipping_equals_that_of_torch_on_one_client_at_a_time(
    clip: FrozenCLIP, config: TrainingConfig
) -> None:
    """Two tensors per client, so that the norm is one over both, and clients of unequal size."""
    method = build(clip, "fedrsclip")
    data = clients(clip, (40, 5, 17))
    clipped = 0
    for result, one in zip(train(method, data, config), data, strict=True):
        leaves = {
            "shared.ctx": method.init_shared(1)["ctx"][None].requires_grad_(),
            "private.ctx": method.init_private(1, one.client)["ctx"][None].requires_grad_(),
        }
        optimizer = build_optimizer(config, leaves, learning_rate(config, 2, 5), method.lr_scale)
        received = {n: t[None] for n, t in method.init_shared(1).items()}
        info = RoundInfo(
            clients=(one.client,), seed=1, server_round=2, rounds=5, lr=0.0, received=received,
            steps_K=torch.tensor([math.ceil(len(one) / 16)]),
            class_counts_KC=torch.bincount(one.labels_N, minlength=len(CLASS_NAMES))[None],
            momentum=0.9,
        )  # fmt: skip
        order = generator(1, "shuffle", 2, one.client, 0).permutation(len(one))
        for step, first in enumerate(range(0, len(one), 16)):
            rows = torch.from_numpy(order[first : first + 16])[None]
            batch = Batch(
                one.inputs[rows], one.labels_N[rows], torch.ones_like(rows).bool(), info, step
            )
            shared, private = {"ctx": leaves["shared.ctx"]}, {"ctx": leaves["private.ctx"]}
            terms = method.loss_terms(shared, private, method.encode(shared, private), batch)
            optimizer.zero_grad()
            torch.stack(list(terms.values())).sum().backward()
            norm = torch.nn.utils.clip_grad_norm_(leaves.values(), 0.02)
            clipped += bool(norm > 0.02)
            optimizer.step()
        assert relative(result.shared["ctx"], leaves["shared.ctx"][0].detach()) < 1e-5
        assert relative(result.private["ctx"], leaves["private.ctx"][0].detach()) < 1e-5
    assert clipped, "the limit was reached"


def test_a_limit_that_is_never_reached_changes_no_bit(clip: FrozenCLIP) -> None:
    method, data = build(clip, "fedrsclip"), clients(clip, (17, 5))
    bounded = train(method, data, replace(SGD, clip_grad_norm=1e6))
    for a, b in zip(bounded, train(method, data, SGD), strict=True):
        assert torch.equal(a.shared["ctx"], b.shared["ctx"])
        assert torch.equal(a.private["ctx"], b.private["ctx"])


def test_one_client_is_clipped_and_the_other_is_not() -> None:
    """Norms 5 and 0.5 over two tensors; a tensor at rest and a missing gradient do not count."""
    gradients = {
        "a": torch.tensor([[3.0], [0.3]]),
        "b": torch.tensor([[[4.0]], [[0.4]]]),
        "c": torch.tensor([[100.0], [0.0]]),
        "d": None,
    }
    clipped = clip_gradients(gradients, 1.0, {"c": torch.tensor([True, False])})
    assert clipped["a"] is not None
    assert clipped["b"] is not None
    assert clipped["a"].flatten().tolist() == pytest.approx([0.6, 0.3], rel=1e-6)
    assert clipped["b"].flatten().tolist() == pytest.approx([0.8, 0.4], rel=1e-6)
    assert clipped["d"] is None


@pytest.mark.parametrize("name", ["prograd", "scaffold"])
def test_what_a_method_makes_of_gradients_is_clipped(clip: FrozenCLIP, name: str) -> None:
    """With plain SGD, no step is longer than the learning rate times the limit."""
    method, data = build(clip, name), clients(clip, (40,))
    config = TrainingConfig(
        lr=0.5, momentum=0.0, weight_decay=0.0, schedule="constant", clip_grad_norm=1e-3
    )
    (result,) = train(method, data, config)
    moved = result.shared["ctx"] - method.init_shared(1)["ctx"]
    assert 0 < float(moved.norm()) <= 2 * 0.5 * 1e-3 * 1.001


@pytest.mark.parametrize("config", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_block_equals_one_client_at_a_time(clip: FrozenCLIP, config: TrainingConfig) -> None:
    method = build(clip, "fedrsclip")
    data = clients(clip)
    together = train(method, data, config)
    for k, one in enumerate(data):
        (alone,) = train(method, [one], config)
        for ours, theirs in (
            (together[k].shared, alone.shared),
            (together[k].private, alone.private),
        ):
            assert relative(ours["ctx"], theirs["ctx"]) < 1e-5
        for term, value in alone.losses.items():
            assert together[k].losses[term] == pytest.approx(value, rel=1e-5)


def test_results_do_not_depend_on_the_order_of_clients(clip: FrozenCLIP) -> None:
    method = build(clip, "fedrsclip")
    data = clients(clip, (40, 17, 5))
    forward = {r.client: r for r in train(method, data, SGD)}
    for result in train(method, data[::-1], SGD):
        assert torch.equal(result.shared["ctx"], forward[result.client].shared["ctx"])


def test_the_same_call_gives_the_same_bits(clip: FrozenCLIP) -> None:
    method = build(clip, "fedrsclip")
    first, second = train(method, clients(clip), SGD), train(method, clients(clip), SGD)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.shared["ctx"], b.shared["ctx"])
        assert torch.equal(a.private["ctx"], b.private["ctx"])


def test_rounds_shuffle_differently(clip: FrozenCLIP) -> None:
    method = build(clip, "promptfl", context_tokens=4)
    config = TrainingConfig(lr=0.05, batch_size=8, schedule="constant")
    data = clients(clip, (40,))
    a, b = train(method, data, config, 1)[0], train(method, data, config, 2)[0]
    assert not torch.equal(a.shared["ctx"], b.shared["ctx"])


def test_a_client_smaller_than_a_batch_trains(clip: FrozenCLIP) -> None:
    """CoOp's `drop_last=True` would train nothing here."""
    method = build(clip, "promptfl", context_tokens=4)
    (result,) = train(method, clients(clip, (3,)), SGD)
    assert not torch.equal(result.shared["ctx"], method.init_shared(1)["ctx"])


def test_private_tensors_differ_between_clients_and_inputs_stay(clip: FrozenCLIP) -> None:
    method = build(clip, "coop_local", context_tokens=4)
    start: Tensors = method.init_private(1, 0)
    kept = start["ctx"].clone()
    data = clients(clip, (20, 20))
    results = train_clients(
        method, [{}, {}], [start, start], data, SGD, seed=1, server_round=1, rounds=1
    )
    assert torch.equal(start["ctx"], kept)
    assert not torch.equal(results[0].private["ctx"], results[1].private["ctx"])


def test_cosine_falls_over_rounds_and_is_not_restarted() -> None:
    config = TrainingConfig(lr=0.002)
    assert learning_rate(config, 1, 50) == 0.002
    assert learning_rate(config, 26, 50) == pytest.approx(0.001)
    last = 0.002 * 0.5 * (1 + math.cos(math.pi * 49 / 50))
    assert learning_rate(config, 50, 50) == pytest.approx(last)
    assert last < 2.1e-6
    assert learning_rate(TrainingConfig(lr=0.002, schedule="constant"), 50, 50) == 0.002
