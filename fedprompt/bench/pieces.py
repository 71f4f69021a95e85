"""Jobs that would take the reference too long: measured pieces of both, times exact counts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.bench.backbones import encode_all, random_images
from fedprompt.bench.compare import Measured, Row, interleave, max_rel_diff, require_equal, row
from fedprompt.bench.counting import count_gflop
from fedprompt.bench.job import Counts, Job, Piece, counted, total
from fedprompt.bench.reference import ReferenceClient, reference_evaluate, reference_local_training
from fedprompt.bench.workload import random_features, reference_model
from fedprompt.federation.server_app import Federation
from fedprompt.methods.base import ClientData
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.training import train_clients
from fedprompt.workspace import Workspace


class ReferencePieces:
    """Runs one copy, training step or test batch of the reference at a time."""

    def __init__(self, workspace: Workspace, images_N3HW: Tensor) -> None:
        self.workspace, self.images_N3HW = workspace, images_N3HW
        self.labels_N = torch.from_numpy(workspace.dataset.labels_N)
        self.model = reference_model(workspace)

    def run(self, piece: Piece) -> None:
        """Do one piece of work, on the first images."""
        kind, images = piece.what, piece.images
        if kind == "copy":
            copy.deepcopy(self.model)
        elif kind == "step":
            self.train(images)
        else:
            rows = slice(images)
            reference_evaluate(self.model, self.images_N3HW[rows], self.labels_N[rows], images)

    def train(self, images: int) -> dict[str, Tensor]:
        """Train client 0 on its first `images` images; returns its loss and context's movement."""
        config = self.workspace.config
        none = self.images_N3HW[:0], self.labels_N[:0]
        client = ReferenceClient(0, self.images_N3HW[:images], self.labels_N[:images], *none)
        before = self.model.context.detach().clone()
        loss = reference_local_training(
            self.model,
            client,
            config.training,
            seed=config.seed,
            server_round=1,
            rounds=config.federation.rounds,
        )
        moved = self.model.context.detach() - before
        # Every piece starts from the same context, so that repeats measure the same work.
        with torch.no_grad():
            self.model.context.copy_(before)
        return {"loss": torch.tensor(loss), "moved": moved}


def train_ours(workspace: Workspace, images: int) -> dict[str, Tensor]:
    """As `ReferencePieces.train`, with our implementation and cached features."""
    config, start = workspace.config, workspace.method.init_shared(workspace.config.seed)
    data = workspace.train_data(0)
    (result,) = train_clients(
        workspace.method,
        [start],
        [{}],
        [ClientData(0, data.inputs[:images], data.labels_N[:images])],
        config.training,
        seed=config.seed,
        server_round=1,
        rounds=config.federation.rounds,
    )
    loss = torch.tensor(result.losses["loss"])
    return {"loss": loss, "moved": result.shared["ctx"] - start["ctx"]}


class OurPieces:
    """Encodes one batch, runs one round on the inline grid, or evaluates once at a time."""

    def __init__(self, workspace: Workspace, images_N3HW: Tensor) -> None:
        self.workspace, self.images_N3HW = workspace, images_N3HW
        self.federation = Federation(workspace, InlineGrid(workspace))
        self.federation.join()
        self.rounds = 0

    def run(self, piece: Piece) -> None:
        """Do one piece of work."""
        if piece.what == "encoding":
            encode_all(self.workspace.clip, self.images_N3HW)
        elif piece.what == "round":
            last = self.workspace.config.federation.rounds
            # After the last round of the schedule it is repeated; its cost is the same.
            self.rounds = min(self.rounds + 1, last)
            self.federation.train_round(self.rounds)
            self.federation.evaluate(self.rounds)
        else:
            self.federation.evaluate(0)


def extrapolated(clip: FrozenCLIP, job: Job, repeats: int) -> Row:
    """A row for a job that is computed from measured pieces.

    Args:
        clip: the frozen backbone.
        job: the experiment.
        repeats: number of repeats of every piece.

    Raises:
        MismatchError: a step's loss or gradient differs from the reference's.
    """
    name = f"{clip.name}, {job.title}"
    # Only as many images as the largest batch needs; the other features are random.
    most = max(p.images for p in job.reference_counts())
    images_N3HW = random_images(clip, max(most, 2 * job.batch), seed=0)
    features_ND = random_features(job.sizes.images, clip.embed_dim)
    # Real features only for the images on which both implementations are compared.
    features_ND[: job.batch] = encode_all(clip, images_N3HW[: job.batch])
    workspace = job.workspace(clip, features_ND)
    reference = ReferencePieces(workspace, images_N3HW)
    ours = OurPieces(workspace, images_N3HW[: 2 * job.batch])
    step = min(job.batch, job.sizes.train)
    difference = max_rel_diff(train_ours(workspace, step), reference.train(step))
    require_equal(name, difference)
    runners: dict[str, OurPieces | ReferencePieces] = {"ours": ours, "reference": reference}
    counts = job.our_counts() | job.reference_counts()

    def job_of(piece: Piece) -> Callable[[int], None]:
        return lambda _: runners[piece.path].run(piece)

    measured = interleave({p.name: job_of(p) for p in counts}, repeats=repeats)
    gflop = {p: count_gflop(partial(job_of(p), 0)) for p in counts}
    line = row(
        name,
        _sum(job.our_counts(), measured),
        _sum(job.reference_counts(), measured),
        difference=difference,
    )
    ours_gflop = total(job.our_counts(), gflop)
    reference_gflop = total(job.reference_counts(), gflop)
    return (
        line
        | counted(line["ratio"], ours_gflop, reference_gflop)
        | {
            "kind": "extrapolated",
            "pieces": [
                {"piece": p.name, "seconds": measured[p.name].best, "times": times}
                for p, times in counts.items()
            ],
        }
    )


def _sum(counts: Counts, measured: Mapping[str, Measured]) -> Measured:
    """One implementation's whole job: exact counts times the best seconds of each piece."""
    seconds = total(counts, {p: measured[p.name].best for p in counts})
    return Measured(None, max(measured[p.name].peak_mb or 0.0 for p in counts), [seconds])
