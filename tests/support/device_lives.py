"""The life of a method on any device, small enough to be lived by every method in every test run.

Two clients train two rounds. Between the rounds everything that a run folder keeps (the server's
tensors, private tensors, momentum) outlives the method, which is built again, as after a resume.
Then every kind of model is scored. `live` returns what came of it and what it cost the device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.layer_statistics import StatisticsEncoder
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import ClientData, Method, Task, Tensors
from fedprompt.scoring import encode_personal, logits_of, model_of, score_global, score_personal
from tests.support import twins
from tests.support.builders import random_clip
from tests.support.method_contract import Server, first_private, train
from tests.support.simulated_device import SimulatedDevice

TASK = Task(("river", "dense residential", "harbor"))
SIZES = (5, 6)
"""Images of the two clients: with batches of 2, both take three steps, the first with padding."""
TOWERS: dict[str, Any] = {
    "vision_cfg": {"width": 32, "head_width": 16, "layers": 2, "patch_size": 16},
    "text_cfg": {"width": 32, "heads": 2, "layers": 2},
}


@dataclass(frozen=True)
class Cost:
    """What some part of a round costs the device.

    Attributes:
        launches: kernels, by operation.
        uploads: copies to the device, by line.
        downloads: copies to the host, by line.
        waits: waits of the host, by operation and line.
    """

    launches: Counter[str]
    uploads: Counter[str]
    downloads: Counter[str]
    waits: Counter[str]

    def __sub__(self, other: Cost) -> Cost:
        """The cost of what happened between two moments."""
        return Cost(
            self.launches - other.launches,
            self.uploads - other.uploads,
            self.downloads - other.downloads,
            self.waits - other.waits,
        )

    @classmethod
    def until_now(cls, device: SimulatedDevice) -> Cost:
        return cls(
            Counter(device.launches),
            Counter(device.uploads),
            Counter(device.downloads),
            Counter(device.waits),
        )


@dataclass
class Life:
    """What came of a life.

    Attributes:
        values: every tensor that left the device, and scores and losses as tensors.
        steps: the cost of the last local step of each round, if the life was lived on a device.
        rounds: the cost of each round's local training.
    """

    values: Tensors = field(default_factory=dict)
    steps: list[Cost] = field(default_factory=list)
    rounds: list[Cost] = field(default_factory=list)


def clip_on(device: str, **towers: Any) -> FrozenCLIP:
    """The same random CLIP on any device, with text and image towers of two narrow layers."""
    clip = random_clip(**{**TOWERS, **towers})
    if device == "cpu":
        return clip
    return FrozenCLIP(
        clip.model, clip.tokenizer, name="random", weights_hash="seed 0", device=device
    )


def images(clip: FrozenCLIP, count: int) -> Inputs:
    """Random images with everything that a method may need, on the CPU."""
    draws = torch.Generator().manual_seed(count)

    def vectors(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, clip.embed_dim, generator=draws), dim=-1)

    size = clip.model.visual.image_size
    pixels = torch.randint(256, (count, 3, *size), generator=draws, dtype=torch.uint8)
    norms = 1 + torch.rand(count, generator=draws)
    features, patches, local = vectors(count), vectors(count, 4), vectors(count, 4)
    routing = torch.rand(count, 2, 8, generator=draws).softmax(-1)
    mean_std = clip.mean_std.cpu()
    # Drawn last, so that the other columns stay as they are.
    # Means are centred, as a tower's are: a common offset would be most of every gradient.
    statistics = torch.randn(count, *StatisticsEncoder(clip).shape, generator=draws)
    statistics[:, :, 1] = statistics[:, :, 1].abs()
    rest = {"routing": routing, "statistics": statistics}
    return Inputs(features, patches, pixels, mean_std, norms, local, **rest)


def clients(clip: FrozenCLIP, needs: Iterable[str]) -> list[ClientData]:
    """Both clients' images, with the columns that a method needs and no others."""
    data = []
    for client, size in enumerate(SIZES):
        all_of_them = images(clip, size)
        inputs = Inputs(
            all_of_them.features,
            all_of_them.patches if "patches" in needs else None,
            all_of_them.pixels if "pixels" in needs else None,
            all_of_them.mean_std,
            all_of_them.norms,
            all_of_them.local if "local" in needs else None,
            routing=all_of_them.routing if "routing" in needs else None,
            statistics=all_of_them.statistics if "statistics" in needs else None,
        )
        data.append(ClientData(client, inputs, torch.arange(size) % len(TASK.class_names)))
    return data


def live(
    name: str, clip: FrozenCLIP, device: SimulatedDevice | None = None, **options: Any
) -> Life:
    """Live the life of a method.

    Args:
        name: the method's name.
        clip: the backbone, on any device.
        device: counts the costs, if `clip` is on it.
        options: config keys of the method.
    """
    life = Life()
    method = twins.build(clip, name, TASK, **options)
    data = clients(clip, method.needs | method.needs_to_train)
    server, private = Server(method, data), first_private(method, data)
    momentum: list[Tensors] = [{} for _ in data]
    for server_round in (1, 2) if method.trainable else ():
        method = twins.build(clip, name, TASK, **options)
        moments = _moments_of_steps(method, device)
        before = device and Cost.until_now(device)
        results = train(
            method,
            data,
            server.send(server_round, data),
            private,
            server_round,
            momentum,
            batch_size=2,
            # CoOp's rate. A larger one would amplify float rounding on these random weights.
            lr=0.002,
            momentum_state="keep" if method.config.keeps_momentum else "reset",
        )
        if device and before:
            life.rounds.append(Cost.until_now(device) - before)
            if moments:  # a method that trains nothing takes no steps
                # The first step may fill caches that serve the whole round.
                life.steps.append(moments[2] - moments[1])
        server.collect(server_round, results)
        private, momentum = [r.private for r in results], [r.momentum for r in results]
        for r in results:
            values = {**r.shared, **r.private, **r.momentum, "losses": _numbers(r.losses.values())}
            life.values |= {f"{server_round}/{r.client}/{n}": t for n, t in values.items()}
    _score(life, method, server, private, data)
    return life


def _score(
    life: Life, method: Method, server: Server, private: list[Tensors], data: list[ClientData]
) -> None:
    sent, tests = server.send(3, data), [(d.inputs, d.labels_N) for d in data]
    own, common = score_personal(method, sent, private, tests, tests[0])
    life.values["personal losses"] = _numbers(s.loss_sum for s in (*own, *(common or ())))
    if method.has_global:
        shared = {n: torch.as_tensor(a) for n, a in server.shared.items()}
        score = score_global(method, shared, *tests[1])
        assert score is not None
        life.values["global loss"] = _numbers([score.loss_sum])
    model = model_of(encode_personal(method, sent, private), 1)
    life.values["logits"] = torch.cat(list(logits_of(method, model, data[1].inputs)))


def _moments_of_steps(method: Method, device: SimulatedDevice | None) -> list[Cost]:
    """Note the costs so far at the beginning of every local step, which is a call of `encode`."""
    moments: list[Cost] = []
    encode = method.encode

    def noted(shared: Tensors, private: Tensors | None) -> Tensors:
        if device is not None:
            moments.append(Cost.until_now(device))
        return encode(shared, private)

    method.encode = noted  # type: ignore[method-assign]
    return moments


def _numbers(values: Iterable[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)
