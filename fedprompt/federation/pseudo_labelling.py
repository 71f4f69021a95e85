"""The messages by which clients without labels agree on pseudo-labels, on both sides.

The rule is in `fedprompt.data.partition.pseudo_labels`. At the start of a phase, the server sends
the clients without labels an evaluation message with `LABELLING`. They guess the classes of their
images, store the guesses beside their private tensors and reply with counts by class. Until the
next phase, every training message has the totals of these counts in its settings, from which a
client computes its quotas and so the images that it trains on.

The server keeps no state between runs. A resumed run asks again, and clients answer from what they
have stored; clients that have not answered yet are asked again in the next round.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import torch
from flwr.app import ConfigRecord
from torch import Tensor

from fedprompt.data.partition.pseudo_labels import (
    GUESSES,
    PHASE,
    Guesses,
    Totals,
    Whole,
    images_chosen,
)
from fedprompt.errors import UserError
from fedprompt.federation.screening import Row
from fedprompt.messages import MAX_EXAMPLES, Ranges
from fedprompt.methods.base import Tensors
from fedprompt.scoring import encode_personal, logits_of
from fedprompt.workspace import Workspace

LABELLING = "labelling"
"""Key in the settings of an evaluation message: the phase, from 1, for which clients without labels
guess the classes of their training images, instead of being tested."""
TOTALS = "pseudo-labels"
"""Key in the settings of a training message: phase, images, clients and `sure_C` of `Totals`."""


# The clients' side


def guess_labels(
    workspace: Workspace,
    clients: Sequence[int],
    shared: Sequence[Tensors],
    private: Sequence[Tensors],
    stored: Mapping[int, Tensors],
    phase: int,
) -> tuple[list[Row], dict[int, Tensors]]:
    """Guess the classes of clients' images, and count them.

    Args:
        workspace: this process's data, CLIP and method.
        clients: client ids.
        shared: what the server has sent to each of them.
        private: each client's private tensors.
        stored: what the clients have stored, by client id.
        phase: the phase, from 1.

    Returns:
        Each client's counts by class, as in `count_ranges_of`, and what clients are to store, by
        client id.
    """
    rows: list[Row] = []
    changed = {}
    classes = len(workspace.task.class_names)
    for client, received, own in zip(clients, shared, private, strict=True):
        kept = stored.get(client, {})
        # A message that comes again, after the server was interrupted, finds its answer.
        guesses = stored_guesses(kept, phase)
        if guesses is None:
            logits_NC = _logits(workspace, client, received, own, zero_shot=phase == 1)
            share = workspace.config.partition.unsure_share
            guesses = Guesses.of(logits_NC.double().cpu().numpy(), share)
            changed[client] = kept | {
                GUESSES: torch.from_numpy(guesses.table()),
                PHASE: torch.tensor([float(phase)]),
            }
        sure_C, guessed_C = guesses.counts(classes)
        row: Row = {f"guessed-{c}": int(n) for c, n in enumerate(guessed_C)}
        rows.append(row | {f"sure-{c}": int(n) for c, n in enumerate(sure_C)})
    return rows, changed


def _logits(
    workspace: Workspace, client: int, shared: Tensors, private: Tensors, *, zero_shot: bool
) -> Tensor:
    """Logits (N, C) of a client's training images; zero-shot CLIP's before anything is trained."""
    train, method = workspace.partition.train(client), workspace.method
    if zero_shot:
        clip, task = workspace.clip, workspace.task
        classes_CD = clip.zero_shot_classifier(task.class_names, task.templates)
        features_ND = workspace.views[0].rows(train, {"features"}).features
        return clip.logit_scale * (features_ND.to(classes_CD) @ classes_CD.T)
    encoded = encode_personal(method, [shared], [private])
    return torch.cat(list(logits_of(method, encoded, workspace.views[0].rows(train, method.needs))))


def stored_guesses(stored: Tensors, phase: int) -> Guesses | None:
    """A client's guesses of a phase; None if it has none."""
    if PHASE not in stored or int(stored[PHASE]) != phase:
        return None
    return Guesses.read(stored[GUESSES].numpy())


def pseudo_labels(
    workspace: Workspace, client: int, settings: ConfigRecord, stored: Tensors
) -> Tensor | None:
    """The pseudo-labels on which a client trains.

    Args:
        workspace: this process's data, CLIP and method.
        client: the client's id.
        settings: of a training message.
        stored: what the client has stored.

    Returns:
        A label for each of its training images, `UNLABELLED` for those that it leaves out; None if
        it has labels, or is not to train without.

    Raises:
        UserError: the client has not guessed in this phase, or the totals are not of these classes.
    """
    if client not in workspace.partition.unlabelled or TOTALS not in settings:
        return None
    totals = _totals_of(settings, len(workspace.task.class_names))
    guesses = stored_guesses(stored, totals.phase)
    if guesses is None:
        raise UserError(
            f"client {client} has no pseudo-labels of phase {totals.phase}, since it was not there "
            "when it began."
        )
    sure_C, _ = guesses.counts(len(totals.sure_C))
    return torch.from_numpy(guesses.chosen(totals.quota(sure_C)))


def _totals_of(settings: ConfigRecord, classes: int) -> Totals:
    values = settings[TOTALS]
    if isinstance(values, list) and len(values) == 3 + classes:
        phase, images, clients, *sure_C = (x for x in values if isinstance(x, int) and x >= 0)
        if len(sure_C) == classes and clients:
            return Totals(phase, tuple(sure_C), images, clients)
    raise UserError(
        f"the server sent totals of pseudo-labels that are not those of {classes} classes; server "
        "and client must run the same experiment."
    )


# The server's side


def count_ranges_of(classes: int) -> Ranges:
    """What clients report: images by guessed class, and how many of these guesses are sure."""
    guessed: dict[str, tuple[float, float | str]] = {
        f"guessed-{c}": (0, MAX_EXAMPLES) for c in range(classes)
    }
    return guessed | {f"sure-{c}": (0, f"guessed-{c}") for c in range(classes)}


class PseudoLabels:
    """What the server knows of the pseudo-labels of the present phase.

    Args:
        classes: number of classes C.

    Attributes:
        phase: the phase, from 1; 0 before the first.
        totals: the sums over all clients that have answered; None if none has.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.phase = 0
        self.totals: Totals | None = None
        self._counts: dict[int, tuple[Whole, Whole]] = {}

    def waiting(self, phase: int, clients: Collection[int]) -> list[int]:
        """Those of some clients that have not answered in a phase; a new one forgets the last."""
        if phase != self.phase:
            self.phase, self.totals, self._counts = phase, None, {}
        return sorted(set(clients) - set(self._counts))

    def add(self, rows: Mapping[int, Row], images: Callable[[int], int]) -> dict[int, str]:
        """Take answers.

        Args:
            rows: checked counts by client id.
            images: the number of a client's training images.

        Returns:
            Why answers do not count, by client id.
        """
        faults = {}
        for client, row in rows.items():
            sure_C, guessed_C = (
                np.array([int(row[f"{kind}-{c}"]) for c in range(self.classes)], dtype=np.int64)
                for kind in ("sure", "guessed")
            )
            # More images than it has would leave the others no quota.
            if guessed_C.sum() != images(client):
                faults[client] = f"counts {guessed_C.sum()} training images of {images(client)}"
            else:
                self._counts[client] = sure_C, guessed_C
        if self._counts:
            sure_C, guessed_C = np.sum(list(self._counts.values()), axis=0)
            of_all = int(guessed_C.sum())
            self.totals = Totals(self.phase, tuple(sure_C.tolist()), of_all, len(self._counts))
        return faults

    def settings(self) -> dict[str, list[int]]:
        """What training messages say about the phase."""
        totals = self.totals
        if totals is None:
            return {}
        return {TOTALS: [totals.phase, totals.images, totals.clients, *totals.sure_C]}

    def images_of(self, client: int) -> int:
        """The number of images that a client without labels trains on; 1 if it is not known."""
        if self.totals is None or client not in self._counts:
            return 1
        sure_C, guessed_C = self._counts[client]
        return images_chosen(self.totals.quota(sure_C), guessed_C)

    def line(self) -> dict[str, int]:
        """The entry of the round's line in `metrics.jsonl`."""
        return {
            "phase": self.phase,
            "clients": len(self._counts),
            "sure": sum(self.totals.sure_C) if self.totals else 0,
            "chosen": sum(self.images_of(client) for client in self._counts),
        }
