"""Backdoors: attackers whose prompts give every image with their trigger the target class.

Source: BadPromptFL: A Novel Backdoor Threat to Prompt-based Federated Learning in Multimodal Models
(Zhang, Zhao, Wang, Wang, arXiv 2508.08040): malicious clients train a trigger and the shared prompt
together, so that cos(f(x + t), text(target)) wins and accuracy on images without the trigger stays.
Only the abstract was available; the details are reconstructed.

In every round an attacker

1. improves its own trigger t by `attack.steps` steps on its images, against the global model that
   it has received (`fedprompt/evaluation/triggers.py`);
2. puts t on a share `attack.poison` of its images of other classes, drawn anew in each round, and
   gives these the target's label;
3. trains as an honest client does, on these images and its others. It claims as many images as it
   has, and sends `attack.scale` times its change.

The trigger is stored on the attacker's side, beside its private tensors. How we differ: the paper
takes both steps together. Here they alternate once per round, so that a method trains by its own
loop, whatever its loss and its private tensors are. Methods that read patches or local features of
an image are refused, since those of triggered images would have to be computed in every round.

How often the backdoor works is measured by the attackers themselves, each with its own trigger, on
the server's test images of other classes and on the global model: an honest client does not know a
trigger, and neither does the server. A trigger alone also fools prompts without a backdoor, as a
universal adversarial perturbation: how often is shown by a run with `attack.scale=1e-6`, in which
attackers train triggers, but hardly change the prompts.

Suffixes: N images of the data set, H and W pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from flwr.app import Message, MetricRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from fedprompt.data.features.rows import Rows
from fedprompt.errors import UserError
from fedprompt.evaluation.perturbations import ATTACKABLE, features_of_pixels
from fedprompt.evaluation.triggers import classes_of_pixels, trained_trigger, triggered
from fedprompt.federation import client_app
from fedprompt.federation.received import received
from fedprompt.federation.scores import BACKDOOR_COUNTS
from fedprompt.messages import METRICS
from fedprompt.methods.base import Method, Tensors
from fedprompt.rng import generator
from fedprompt.scoring import encode_global
from fedprompt.workspace import Workspace

TRIGGER = "attack/trigger"
"""Name under which an attacker stores its trigger. With the `/`, it is no tensor of the method."""
STEP = 0.25
"""A step of the trigger, in units of `attack.eps`; small enough to settle over the rounds."""


def check(workspace: Workspace) -> None:
    """Refuse a method or a data set for which a backdoor has no meaning.

    Args:
        workspace: the server's workspace.

    Raises:
        UserError: it names what is missing.
    """
    method, attack = workspace.method, workspace.config.attack
    classes = len(workspace.dataset.class_names)
    if attack.target >= classes:
        raise UserError(
            f"config: attack.target is {attack.target}, but the data set has {classes} classes, "
            f"numbered from 0 to {classes - 1}."
        )
    if reason := _unsuited(method):
        raise UserError(
            f"config: attack.kind=backdoor does not suit method '{method.name}': {reason}."
        )


def _unsuited(method: Method) -> str:
    """Why a method cannot have a backdoor here; empty if it can."""
    if not method.has_global:
        return "it has no global model that all clients use"
    if not method.init_shared(0):
        return "it shares no prompts that an attacker could change"
    if method.fixed_global:
        return "its global model is the same whatever clients share"
    if others := (method.needs | method.needs_to_train) - ATTACKABLE - {"second_view"}:
        return f"it reads {', '.join(sorted(others))} of an image, which are not recomputed"
    return ""


def poisoned(
    workspace: Workspace,
    clients: Sequence[int],
    messages: Sequence[Message],
    stored: Mapping[int, Tensors],
) -> tuple[Workspace, dict[int, Tensors]]:
    """The workspace on which attackers train, and their new triggers.

    Args:
        workspace: the honest workspace, which is not changed.
        clients: ids of the attackers of a block.
        messages: the messages of the server that they train from.
        stored: what they have stored before, by client id.

    Returns:
        A workspace that differs in images and labels of these clients, and what each of them has
        to store beside its private tensors. A baseline that a backdoor does not suit trains
        honestly.
    """
    if _unsuited(workspace.method):
        return workspace, {}
    attack, dataset = workspace.config.attack, workspace.dataset
    kept: dict[int, Tensors] = {}
    index: list[int] = []
    images: list[Tensor] = []
    for client, message in zip(clients, messages, strict=True):
        train = workspace.partition.train(client)
        # An image of the target class needs no trigger.
        others = train[dataset.labels_N[train] != attack.target]
        if not len(others):
            continue
        pixels = _pixels(workspace, others)
        before = stored.get(client, {}).get(TRIGGER)
        trigger = _next_trigger(workspace, client, message, pixels, before)
        kept[client] = {TRIGGER: trigger}
        key = workspace.config.seed, "poison", client_app.server_round(message), client
        chosen = generator(*key).permutation(len(others))[: round(attack.poison * len(others))]
        index += others[chosen].tolist()
        images.append(triggered(pixels[torch.from_numpy(chosen)], trigger))
    if not index:
        return workspace, kept
    return _with_images(workspace, np.array(index), torch.cat(images), attack.target), kept


def _pixels(workspace: Workspace, index: NDArray[np.int64]) -> Tensor:
    """Images as the image tower sees them, (N, 3, H, W), with pixels from 0 to 1."""
    pixels = workspace.views[0].rows(index, {"pixels"}).pixels
    assert pixels is not None, "the feature tables of a run with a backdoor have pixels"
    return pixels.float() / 255


def _next_trigger(
    workspace: Workspace,
    client: int,
    message: Message,
    pixels_N3HW: Tensor,
    before: Tensor | None,
) -> Tensor:
    """An attacker's trigger (3, H, W), improved on its images of other classes."""
    config, attack, device = workspace.config, workspace.config.attack, workspace.clip.device
    server_round, size = client_app.server_round(message), config.training.batch_size

    def batches() -> Iterator[Tensor]:
        for step in range(attack.steps):
            draw = generator(config.seed, "trigger", server_round, client, step)
            rows = draw.permutation(len(pixels_N3HW))[:size]
            yield pixels_N3HW[torch.from_numpy(rows)].to(device)

    start = torch.zeros_like(pixels_N3HW[0]) if before is None else before
    eps = attack.eps / 255
    return trained_trigger(
        workspace.method,
        global_model(workspace, message),
        batches(),
        start.to(device),
        attack.target,
        eps,
        STEP * eps,
    ).cpu()


def global_model(workspace: Workspace, message: Message) -> Tensors:
    """The global model in a message of the server, with client axis 1."""
    shared = received(workspace, message)
    prompts = {n: t for n, t in shared.items() if n not in workspace.extras_shapes}
    return encode_global(workspace.method, prompts)


@torch.no_grad()
def _with_images(
    workspace: Workspace, index: NDArray[np.int64], pixels: Tensor, target: int
) -> Workspace:
    """A shallow copy of the workspace in which some images and their labels are replaced.

    Args:
        workspace: the honest workspace.
        index: the images' numbers in the data set, each at most once.
        pixels: their new pixels, from 0 to 1.
        target: their new label.
    """
    features = features_of_pixels(workspace.clip, pixels).numpy()
    as_bytes = (pixels * 255).round().to(torch.uint8).numpy()
    labels_N = workspace.dataset.labels_N.copy()
    labels_N[index] = target
    changed = copy.copy(workspace)
    changed.dataset = replace(workspace.dataset, labels_N=labels_N)
    # All views of a triggered image are the same: a crop would cut the trigger.
    changed.views = tuple(
        replace(
            view,
            features_ND=Replaced(view.features_ND, index, features),
            pixels_N3HW=None
            if view.pixels_N3HW is None
            else Replaced(view.pixels_N3HW, index, as_bytes),
        )
        for view in workspace.views
    )
    return changed


@dataclass(frozen=True, eq=False)
class Replaced:
    """A column of a feature table in which some rows are others.

    Attributes:
        column: the column.
        index: numbers of the rows that are replaced, each at most once.
        new: what they are replaced by, in the order of `index`.
    """

    column: Rows
    index: NDArray[np.int64]
    new: NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of rows, and the shape of one row."""
        return self.column.shape

    @property
    def dtype(self) -> Any:
        """NumPy type of the numbers."""
        return self.column.dtype

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, rows: NDArray[np.int64], /) -> NDArray[Any]:
        found = np.array(self.column[rows])
        order = np.argsort(self.index)
        place = np.flatnonzero(np.isin(rows, self.index))
        found[place] = self.new[order[np.searchsorted(self.index, rows[place], sorter=order)]]
        return found


def measured(
    workspace: Workspace,
    clients: Sequence[int],
    messages: Sequence[Message],
    stored: Mapping[int, Tensors],
) -> list[Message]:
    """Reply with how often each attacker's backdoor works on the global model.

    Args:
        workspace: the honest workspace.
        clients: ids of the attackers of a block.
        messages: the server's messages.
        stored: what the attackers have stored, by client id.

    Returns:
        Replies with the counts `BACKDOOR_COUNTS`, zeros from an attacker without a trigger.
    """
    attack, dataset = workspace.config.attack, workspace.dataset
    test = workspace.partition.server_test
    others = test[dataset.labels_N[test] != attack.target]
    if len(others) > attack.images:
        # Evenly spread, because test images may be sorted by class.
        others = others[np.linspace(0, len(others) - 1, attack.images).round().astype(np.int64)]
    found = {client: stored.get(client, {}).get(TRIGGER) for client in clients}
    pixels, clean = torch.zeros(0), 0
    if len(others) and any(trigger is not None for trigger in found.values()):
        # Attackers of a round have all received the same global model.
        model = global_model(workspace, messages[0])
        pixels = _pixels(workspace, others)
        clean = int((classes_of_pixels(workspace.method, model, pixels) == attack.target).sum())
    replies = []
    for client, message in zip(clients, messages, strict=True):
        trigger, counts = found[client], (0, 0, 0)
        if trigger is not None and len(others):
            classes = classes_of_pixels(workspace.method, model, triggered(pixels, trigger))
            counts = len(others), int((classes == attack.target).sum()), clean
        metrics = MetricRecord(dict(zip(BACKDOOR_COUNTS, counts, strict=True)))
        replies.append(Message(RecordDict({METRICS: metrics}), reply_to=message))
    return replies
