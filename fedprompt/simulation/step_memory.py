"""How much memory a client needs in training and in evaluation, in bytes.

A grid asks before it forms blocks of clients, and a run before it starts. What a method keeps for
its gradient depends on its towers, class names, prompts, adapters and transport plans; instead of a
formula for each, one step's forward pass is run on a few images, and the tensors that it makes are
counted (`runtime/allocations.py`). Tensors that are only saved for the backward pass are counted
and dropped at once, so the trial itself needs far less than a step. The estimate of a step is

    tensors   shared + extras + private, each as received and at the start of the round, and for
              each trained tensor the final value, the leaf, its gradient, the optimiser's state
              (one momentum with SGD, two moments with Adam) and one temporary of the update; in
              DP-SGD (`privacy.image_noise`) also an image's gradients, their sum and the noise
    inputs    the client's training images in all views, as they are stored (features, patches,
              bytes of pixels), once as read and once joined with those of the block; and a batch
              of them, pixels as floats
    kept      saved by `encode` + by `loss_terms` for one image + (batch - 1) x what each further
              image adds: text and image towers, logits, plans, memories
    working   temporaries: those of the forward pass, or four tensors as large as its largest,
              which cover the backward pass of a layer, or what the backward pass computes again
              for one part of a long class list (`checkpointed`); whichever are more

and that of an evaluation, which keeps nothing for a gradient,

    tensors   shared + extras + private, as received and stacked
    inputs    the client's test images
    encoded   the result of `encode`, and the temporaries of computing it
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.text_sequences import observer_of_recomputed
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import Batch, Method, RoundInfo, Tensors, stack
from fedprompt.runtime.allocations import Allocations
from fedprompt.runtime.device_memory import give_back, is_shortage
from fedprompt.workspace import Workspace

log = logging.getLogger("fedprompt.memory")

UPDATE_COPIES = {"sgd": 6, "adam": 7, "adamw": 7}
"""Copies of a trained tensor by optimiser: start, leaf, final value, gradient, state, temporary."""
NOISE_COPIES = 6
"""Further copies in DP-SGD: an image's gradient, clipped, the sum, and noise, also in float64."""


@dataclass(frozen=True)
class StepMemory:
    """Estimated bytes of one client; see the module's docstring.

    Attributes:
        tensors: prompts and optimiser state in training.
        inputs: training images.
        kept_by_prompts: kept for the gradient whatever the number of images.
        kept_by_images: kept for the gradient by the images of a batch.
        working: temporaries of a training step.
        evaluation: all of an evaluation.
    """

    tensors: float
    inputs: float
    kept_by_prompts: float
    kept_by_images: float
    working: float
    evaluation: float

    @property
    def training(self) -> float:
        """All of a training step."""
        return (
            self.tensors + self.inputs + self.kept_by_prompts + self.kept_by_images + self.working
        )


@dataclass(frozen=True)
class _Weight:
    """What a part of a forward pass makes, in bytes.

    Attributes:
        kept: its results, and what is saved for the backward pass.
        temporary: what existed besides at the same time.
        largest: the largest single tensor.
    """

    kept: float
    temporary: float
    largest: float

    def grown(self, other: _Weight, steps: int) -> _Weight:
        """Extrapolate to `steps` steps from this one, of which `other` is the first."""
        return _Weight(
            self.kept + steps * (other.kept - self.kept),
            self.temporary + steps * max(0, other.temporary - self.temporary),
            self.largest + steps * max(0, other.largest - self.largest),
        )

    @property
    def working(self) -> float:
        """Temporaries of forward and backward pass, whichever are larger."""
        return max(self.temporary, 4 * self.largest)


class _Scales(Allocations):
    """Counts what exists or has been saved for a backward pass; drops what is only saved."""

    def __init__(self) -> None:
        super().__init__()
        self._saved: dict[int, int] = {}
        self._dropped = 0
        self._largest = 0
        self.recomputed = 0.0
        self._hooks: Any = saved_tensors_hooks(self._save, self._cannot)

    @property
    def held(self) -> int:
        """Bytes that a real pass would hold now."""
        return self.now + self._dropped

    def added(self, size: int) -> None:
        """Count new bytes beside those that a real pass would still hold."""
        self.now += size
        self.peak = max(self.peak, self.held)
        self._largest = max(self._largest, size)

    def begin(self) -> int:
        """Start a part of the pass; returns the bytes held before it."""
        self.peak, self._largest = self.held, 0
        return self.held

    def weigh(self, before: int) -> _Weight:
        """The part of the pass since `begin`, while its results exist."""
        return _Weight(self.held - before, self.peak - self.held, self._largest)

    def again(self, call: Callable[[], Tensor]) -> None:
        """Weigh what the backward pass will compute again: one part; the others are as large."""
        if self.recomputed:
            return
        peak, largest, dropped = self.peak, self._largest, self._dropped
        token = observer_of_recomputed.set(None)  # a part may have parts of its own
        before = self.begin()
        out = call()
        weight = self.weigh(before)
        del out
        observer_of_recomputed.reset(token)
        self.peak, self._largest, self._dropped = peak, largest, dropped
        self.recomputed = weight.kept + weight.working

    def __enter__(self) -> Self:
        super().__enter__()
        self._hooks.__enter__()
        self._token = observer_of_recomputed.set(self.again)
        return self

    def __exit__(self, *error: object) -> None:
        observer_of_recomputed.reset(self._token)
        self._hooks.__exit__(*error)
        super().__exit__(*error)

    def _save(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        # Weights are saved too, since the gradient of a product needs them; they exist anyway.
        if self._known.get(storage._cdata):
            self._saved[storage._cdata] = storage.nbytes()

    def _cannot(self, saved: object) -> Tensor:
        raise RuntimeError("the forward pass was run for its memory alone")

    def _forget(self, key: int, size: int) -> None:
        super()._forget(key, size)
        self._dropped += self._saved.pop(key, 0)


_KNOWN: WeakKeyDictionary[FrozenCLIP, dict[object, StepMemory | None]] = WeakKeyDictionary()
"""Estimates of earlier runs in this process; in a sweep most runs differ in their seed only."""


def step_memory(workspace: Workspace) -> StepMemory | None:
    """Estimate the memory of the client with the most images.

    Args:
        workspace: data, CLIP and method.

    Returns:
        The estimate; infinite where even the trial did not fit into the memory. None if the
        workspace has no images, or the method does not get through the trial: then its clients
        will not get through a round either, and say why.
    """
    clients = range(workspace.num_clients)
    train = [len(workspace.partition.train(client)) for client in clients]
    tests = max(len(workspace.partition.test(client)) for client in clients)
    if not workspace.views or not any(train):
        return None
    largest, config = int(np.argmax(train)), workspace.config
    known = _KNOWN.setdefault(workspace.clip, {})
    sizes = (train[largest], tests, len(workspace.views))
    settings = (config.method, config.training, config.privacy)
    key = (repr(settings), workspace.task, sizes)
    if key not in known:
        known[key] = _tried(workspace, largest, tests)
    return known[key]


def _tried(workspace: Workspace, client: int, tests: int) -> StepMemory | None:
    clip = workspace.clip
    counted = clip.positions_encoded
    try:
        return _estimate(workspace, client, tests)
    except Exception as error:  # whatever a method may raise
        if not is_shortage(error):
            log.debug("no estimate of the memory", exc_info=True)
            return None
    finally:
        # The trial is no work of the run.
        clip.positions_encoded = counted
    # Out of the handler, whose traceback would keep the trial's tensors.
    give_back()
    return StepMemory(0, 0, math.inf, 0, 0, math.inf)


def _estimate(workspace: Workspace, client: int, tests: int) -> StepMemory:
    method, training = workspace.method, workspace.config.training
    train = workspace.partition.train(client)
    shared = method.init_shared(workspace.config.seed)
    extras = method.init_extras(workspace.config.seed)
    private = workspace.start_private(client)
    images = workspace.views[0].rows(np.resize(train, 2))  # the client's only one twice
    image = images[:1]
    first, second, encoding, recomputed = _trial(method, shared, extras, private, images)
    privacy = workspace.config.privacy
    batch = min(training.batch_size, len(train))
    if privacy.image_noise and privacy.image_sampling == "poisson":
        # Batches of this many images on average; a larger one than twice as many is very rare.
        batch = min(2 * batch, len(train))
    head, per_image = first.grown(second, batch - 1), second.kept - first.kept
    stored = _bytes(_parts(image))
    named = {f"shared.{n}": v for n, v in shared.items()}
    named |= {f"private.{n}": v for n, v in private.items()}
    trained = [v for n, v in named.items() if n not in method.frozen]
    received = _bytes([*shared.values(), *extras.values(), *private.values()])
    copies = UPDATE_COPIES[training.optimizer]
    if privacy.image_noise:
        copies += NOISE_COPIES
    evaluated = _evaluated(method, shared | extras, private)
    return StepMemory(
        tensors=2 * received + copies * _bytes(trained),
        inputs=2 * stored * len(train) * len(workspace.views) + _batch_bytes(image, stored) * batch,
        kept_by_prompts=encoding.kept + first.kept - per_image,
        # In DP-SGD, one image after the other.
        kept_by_images=per_image if privacy.image_noise else batch * per_image,
        working=max(encoding.working, head.working, recomputed),
        evaluation=2 * received + 2 * stored * tests + evaluated,
    )


def _trial(
    method: Method, shared: Tensors, extras: Tensors, private: Tensors, images: Inputs
) -> tuple[_Weight, _Weight, _Weight, float]:
    """Run a step's forward pass on one image and on two.

    Returns:
        What `loss_terms` makes for one image and for two, what `encode` makes, and the bytes of
        what the backward pass computes again at one time.
    """
    device = method.clip.device
    round_info = RoundInfo(
        clients=(0,),
        seed=0,
        server_round=1,
        rounds=1,
        lr=0.0,
        received=stack([shared | extras], device),
        steps_K=torch.ones(1, dtype=torch.int64, device=device),
        class_counts_KC=torch.ones(
            1, len(method.task.class_names), dtype=torch.int64, device=device
        ),
    )
    shared_K, private_K = method.start_round(
        stack([shared], device), stack([private], device), round_info
    )
    shared_K = _leaves("shared", shared_K, method) | stack([extras], device)
    private_K = _leaves("private", private_K, method)
    heads = []
    with torch.enable_grad(), _Scales() as scales:
        before = scales.begin()
        encoded = method.encode(shared_K, private_K)
        encoding = scales.weigh(before)
        for count in (1, 2):
            inputs = images[:count].of_one().on(device)
            labels = torch.zeros(1, count, dtype=torch.int64, device=device)
            mask = torch.ones_like(labels, dtype=torch.bool)
            if method.task.multi_label is not None:
                labels = torch.zeros(1, count, len(method.task.class_names), device=device)
            batch = Batch(inputs, labels, mask, round_info, 0)
            before = scales.begin()
            terms = method.loss_terms(shared_K, private_K, encoded, batch)
            heads.append(scales.weigh(before))
            del terms
    return heads[0], heads[1], encoding, scales.recomputed


@torch.no_grad()
def _evaluated(method: Method, shared: Tensors, private: Tensors) -> float:
    """Bytes of one client's encoded model, and of what encoding it needs."""
    device = method.clip.device
    with _Scales() as scales:
        encoded = method.encode(stack([shared], device), stack([private], device))
        peak = scales.peak
        del encoded
    return peak


def _leaves(container: str, tensors: Tensors, method: Method) -> Tensors:
    return {
        n: v if f"{container}.{n}" in method.frozen else v.detach().clone().requires_grad_()
        for n, v in tensors.items()
    }


def _parts(inputs: Inputs) -> list[Tensor]:
    return [part for name, part in inputs.columns().items() if name != "mean_std"]


def _batch_bytes(image: Inputs, stored: int) -> int:
    """Bytes of an image of a batch: as gathered, and its pixels twice as floats."""
    floats = 0 if image.pixels is None else 4 * image.pixels.numel()
    return stored + 2 * floats


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
