"""What a method is given to work on: the task, a client's images, the round and a batch.

Local training (`fedprompt/training.py`) builds these values on the client and passes them to the
members of `Method`. They are read-only: a method returns new tensors instead of changing them.

Shape suffixes: K clients, N images of one client, B images of a batch, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fedprompt.config.multi_label import MultiLabelConfig
from fedprompt.data.dataset import UNLABELLED
from fedprompt.data.descriptions import Descriptions, plain
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.parts.draws import Draw, StepDraws
from fedprompt.rng import normal, uniform

Tensors = dict[str, Tensor]
"""Named tensors, for example the shared or the private prompts of a client."""


@dataclass(frozen=True)
class Task:
    """The classification task.

    Attributes:
        class_names: names in label order; underscores are read as spaces.
        templates: sentences for zero-shot CLIP, each with one `{}` for the class name.
        descriptions: sentences about classes, of `data.descriptions`; there may be none, and there
            may be some of other classes.
        multi_label: the loss where an image may have several of the classes, as labels; None where
            it has one.
    """

    class_names: tuple[str, ...]
    templates: tuple[str, ...] = ("a photo of a {}.",)
    descriptions: Descriptions = ()
    multi_label: MultiLabelConfig | None = None

    def sentences(self) -> tuple[tuple[str, ...], ...]:
        """The sentences of each class, in label order.

        A class without descriptions has the templates with its name in them.
        """
        described = dict(self.descriptions)
        return tuple(
            described.get(name) or tuple(template.format(name) for template in self.templates)
            for name in map(plain, self.class_names)
        )


@dataclass(frozen=True)
class ClientData:
    """The training images of one client.

    Attributes:
        client: the client's id.
        inputs: features, patches or pixels of `views * n` images. Row `v * n + i` is view v of
            image i; training draws one view per image and epoch.
        labels_N: class index of each of the n images; `UNLABELLED` where it is not known, which
            only methods whose config says `learns_without_labels` ever see. In the multi-label
            task (n, C), 1 for the labels that an image has and 0 for the others.
        views: number of views per image; view 0 is not augmented.
    """

    client: int
    inputs: Inputs
    labels_N: Tensor
    views: int = 1

    def __len__(self) -> int:
        """Number of images n, without their augmented views."""
        return len(self.labels_N)

    def plain(self) -> Inputs:
        """The n images without augmentation."""
        return self.inputs[: len(self)]


@dataclass(frozen=True)
class RoundInfo:
    """What K clients know about the round in which they train.

    Attributes:
        clients: ids of the K clients, in the order of the client axis.
        seed: the seed of the run.
        server_round: the current round, counted from 1 to `rounds`.
        rounds: number of rounds of the run.
        lr: learning rate of this round, before the factors of `Method.lr_scale`.
        received: the shared tensors and the extras (`Method.init_extras`), (K, ...), as the server
            sent them. They do not change while the clients train.
        steps_K: number of local steps that each client makes in this round.
        class_counts_KC: number of labelled training images of each client and class.
        momentum: momentum of SGD; 0 with any other optimiser.
        ahead: makes the draws of many local steps at once; None draws them step by step. The
            numbers are the same.
    """

    clients: tuple[int, ...]
    seed: int
    server_round: int
    rounds: int
    lr: float
    received: Tensors
    steps_K: Tensor
    class_counts_KC: Tensor
    momentum: float = 0.0
    ahead: StepDraws | None = field(default=None, compare=False)

    def normal(self, shape: tuple[int, ...], *purpose: str | int) -> Tensor:
        """Draws (K, *shape) from N(0, 1), keyed by purpose, round and client.

        Args:
            shape: shape of one client's draw.
            purpose: what the draw is for; different purposes give independent draws.
        """
        key = (*purpose, self.server_round)
        # One draw per client id, so that a client's numbers do not depend on who trains beside it.
        return self._rows([standard_normal(shape, self.seed, *key, c) for c in self.clients])

    def uniform(self, shape: tuple[int, ...], *purpose: str | int) -> Tensor:
        """Draws (K, *shape) from U[0, 1), keyed as in `normal`."""
        key = (*purpose, self.server_round)
        return self._rows([uniform(shape, self.seed, *key, c) for c in self.clients])

    def first(self, clients: int) -> RoundInfo:
        """The same round for the first `clients` clients only.

        Training orders clients by their number of steps and drops those that have finished, so the
        clients that are still training are always the first ones.
        """
        return replace(
            self,
            clients=self.clients[:clients],
            received={n: t[:clients] for n, t in self.received.items()},
            steps_K=self.steps_K[:clients],
            class_counts_KC=self.class_counts_KC[:clients],
        )

    def _rows(self, rows: list[Tensor]) -> Tensor:
        # Draws are made on the CPU, where they are the same whatever device trains.
        return torch.stack(rows).to(self.steps_K.device)


@dataclass(frozen=True)
class Batch:
    """The images of one local step of K clients.

    Attributes:
        inputs: features, patches or pixels, (K, B, ...).
        labels_KB: class index of each image; `UNLABELLED` where it is not known, which only methods
            whose config says `learns_without_labels` ever see. In the multi-label task (K, B, C),
            which `Method.label_loss` reads.
        mask_KB: false where a client has fewer than B images and the row is padding.
        round_info: the round that the step belongs to.
        step: the step's index within the round, from 0.
        second_KBD: frozen features of another view of each image, drawn as the first view is, for
            methods with `second_view` in `needs_to_train`. None for others.
        second_statistics: `inputs.statistics` of that other view, for methods that need both.
    """

    inputs: Inputs
    labels_KB: Tensor
    mask_KB: Tensor
    round_info: RoundInfo
    step: int
    second_KBD: Tensor | None = None
    second_statistics: Tensor | None = None

    @property
    def labelled_KB(self) -> Tensor:
        """Which rows are images with a label, neither unlabelled ones nor padding."""
        return self.mask_KB & (self.labels_KB != UNLABELLED)

    def image(self, column: int) -> Batch:
        """The step with one image of each client; a row of padding is then an image as well."""
        one = slice(column, column + 1)
        second, statistics = self.second_KBD, self.second_statistics
        return replace(
            self,
            inputs=self.inputs[:, one],
            labels_KB=self.labels_KB[:, one],
            mask_KB=torch.ones_like(self.mask_KB[:, one]),
            second_KBD=None if second is None else second[:, one],
            second_statistics=None if statistics is None else statistics[:, one],
        )

    def normal(self, shape: tuple[int, ...], *purpose: str | int) -> Tensor:
        """Like `RoundInfo.normal`, but with different draws in every step."""
        # The step's index is part of the key, so a repeated step repeats its draws.
        if self.round_info.ahead is None:
            return self.round_info.normal(shape, *purpose, self.step)
        return self._ahead(standard_normal, shape, purpose)

    def uniform(self, shape: tuple[int, ...], *purpose: str | int) -> Tensor:
        """Like `RoundInfo.uniform`, but with different draws in every step."""
        if self.round_info.ahead is None:
            return self.round_info.uniform(shape, *purpose, self.step)
        return self._ahead(uniform, shape, purpose)

    def _ahead(self, draw: Draw, shape: tuple[int, ...], purpose: tuple[str | int, ...]) -> Tensor:
        info = self.round_info
        assert info.ahead is not None
        rows_K = info.ahead.rows(draw, shape, info.seed, purpose, info.server_round, self.step)
        return rows_K[: len(info.clients)]


def standard_normal(shape: tuple[int, ...], seed: int, *purpose: str | int) -> Tensor:
    """Draw a float32 tensor from N(0, 1) for one purpose, on the CPU."""
    return normal(shape, 1.0, seed, *purpose)


def stack(items: list[Tensors], device: torch.device | str = "cpu") -> Tensors:
    """Stack the named tensors of K clients along a leading client axis, on `device`.

    Private tensors may have a first axis as long as the client has images; shorter ones are padded
    with zeros at the end.
    """
    return {k: _stacked([item[k] for item in items]).to(device) for k in items[0]}


def row_of(stacked: Tensor, row: int, own: Tensor) -> Tensor:
    """Take a client's tensor out of a stack (K, ...), without the padding of `stack`.

    Args:
        stacked: the stack.
        row: the client's place in it.
        own: the tensor that the client had in the stack; it tells the shape.

    Returns:
        A copy.
    """
    value = stacked[row]
    return (value if value.shape == own.shape else value[: len(own)]).clone()


def _stacked(rows: list[Tensor]) -> Tensor:
    if len({row.shape for row in rows}) == 1:
        return torch.stack(rows)
    return pad_sequence(rows, batch_first=True)
