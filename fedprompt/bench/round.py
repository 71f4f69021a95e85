"""A whole experiment: image features, rounds of training, evaluation after every round.

A small job is `complete`: both implementations run it to the end, and prompts, losses and scores
must agree. A large job is `extrapolated`, because the reference would take many hours: pieces of
both implementations are measured and multiplied by exact counts, which the row contains.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.bench.backbones import encode_all, random_clip, random_images
from fedprompt.bench.compare import MismatchError, Row, interleave, max_rel_diff, require_equal, row
from fedprompt.bench.counting import count_gflop
from fedprompt.bench.job import Job, counted, total
from fedprompt.bench.output import TIMES, Column, Output
from fedprompt.bench.pieces import ReferencePieces, extrapolated
from fedprompt.bench.reference import reference_federation
from fedprompt.bench.workload import reference_clients, reference_model
from fedprompt.federation.server_app import Federation
from fedprompt.simulation.inline_grid import InlineGrid

COLUMNS: tuple[Column, ...] = (
    *TIMES[:4],
    ("max rel. diff", "max_rel_diff", ".1e"),
    ("counted", "counted_ratio", ".1f"),
    ("share of saving", "share_of_saving", ".0%"),
    ("measured", "kind", ""),
    ("MB", "peak_mb", ".0f"),
    ("ref. MB", "reference_peak_mb", ".0f"),
)


@dataclass(frozen=True)
class Outcome:
    """The result of an experiment.

    Attributes:
        moved_Md: the final context minus the initial one.
        losses: training and test losses of all rounds.
        correct: by round, correct answers on the server's test set and on each client's.
    """

    moved_Md: Tensor
    losses: Tensor
    correct: list[list[int]]

    def tensors(self) -> dict[str, Tensor]:
        """What must agree with the reference up to rounding."""
        return {"moved": self.moved_Md, "losses": self.losses}


def run_ours(job: Job, clip: FrozenCLIP, images_N3HW: Tensor) -> Outcome:
    """Encode the images, then run the rounds on the inline grid as `fedprompt run` does.

    Args:
        job: the experiment.
        clip: the frozen backbone.
        images_N3HW: preprocessed images of all clients and of the server.

    Returns:
        The final context, the losses and the numbers of correct answers.
    """
    workspace = job.workspace(clip, encode_all(clip, images_N3HW))
    grid = InlineGrid(workspace)
    federation = Federation(workspace, grid)
    start = federation.shared["ctx"]
    federation.join()
    losses, correct = [], []
    for server_round in range(job.rounds + 1):
        if server_round > 0:
            losses.append(federation.train_round(server_round)["train"]["loss"])
        line = federation.evaluate(server_round)
        losses.append(line["global"]["loss"])
        # Counts of correct answers can be compared exactly, accuracies cannot.
        personal = [round(a * job.sizes.test) for a in line["personal"]["accuracy"]]
        correct.append([round(line["global"]["accuracy"] * job.sizes.server_test), *personal])
    grid.close()
    return Outcome(federation.shared["ctx"] - start, torch.tensor(losses), correct)


def run_reference(job: Job, clip: FrozenCLIP, images_N3HW: Tensor) -> Outcome:
    """Run the same experiment with the reference, which encodes the images at every step.

    The arguments and the result are those of `run_ours`.
    """
    workspace = job.workspace(clip)
    model = reference_model(workspace)
    start = model.context.detach().clone()
    test = torch.tensor(workspace.partition.server_test)
    rounds = reference_federation(
        model,
        reference_clients(workspace, images_N3HW),
        (images_N3HW[test], torch.from_numpy(workspace.dataset.labels_N)[test]),
        workspace.config.training,
        seed=workspace.config.seed,
        rounds=job.rounds,
        test_batch=job.test_batch,
    )
    losses, correct = [], []
    for done in rounds:
        if done.losses:
            # All clients have equally many images, so the plain mean is the weighted one.
            losses.append(sum(done.losses) / len(done.losses))
        losses.append(done.global_score.loss_sum / done.global_score.tested)
        correct.append([s.correct for s in (done.global_score, *done.personal_scores)])
    return Outcome((model.context.detach() - start).cpu(), torch.tensor(losses), correct)


def complete(clip: FrozenCLIP, job: Job, repeats: int) -> Row:
    """A row for a job that both implementations run from images to final scores.

    Args:
        clip: the frozen backbone.
        job: the experiment.
        repeats: number of repeats.

    Raises:
        MismatchError: prompts, losses or any score differ.
    """
    name = f"{clip.name}, {job.title}"
    images_N3HW = random_images(clip, job.sizes.images, seed=0)
    differences = []

    def check(repeat: int, results: dict[str, Any]) -> None:
        ours, reference = results["ours"], results["reference"]
        gap = max_rel_diff(ours.tensors(), reference.tensors())
        differences.append(gap)
        require_equal(name, gap)
        if ours.correct != reference.correct:
            raise MismatchError(f"{name}: the numbers of correct answers differ.")

    measured = interleave(
        {
            "ours": lambda _: run_ours(job, clip, images_N3HW),
            "reference": lambda _: run_reference(job, clip, images_N3HW),
        },
        repeats=repeats,
        check=check,
    )
    line = row(name, measured["ours"], measured["reference"], difference=max(differences))
    reference = ReferencePieces(job.workspace(clip), images_N3HW)
    ours_gflop = count_gflop(lambda: run_ours(job, clip, images_N3HW))
    counts = job.reference_counts()
    gflop = {p: count_gflop(partial(reference.run, p)) for p in counts}
    return line | counted(line["ratio"], ours_gflop, total(counts, gflop)) | {"kind": "complete"}


def bench_round(
    backbone: str,
    jobs: list[Job],
    repeats: int,
    out: Output,
    small: tuple[str, Job] | None,
    device: str = "cpu",
) -> None:
    """Measure one small job completely, and extrapolate large ones.

    Args:
        backbone: architecture of the large jobs.
        jobs: the large jobs.
        repeats: number of repeats.
        out: where rows and notes go.
        small: architecture and job of the complete row; None leaves it out.
        device: the device of the backbones.

    Raises:
        MismatchError: results differ from the reference's.
    """
    if small is not None:
        out.progress(f"both implementations to the end: {small[0]}, {small[1].title}")
        out.add(complete(random_clip(small[0], device=device), small[1], repeats))
    clip = random_clip(backbone, device=device)
    for job in jobs:
        out.progress(f"pieces of both implementations: {backbone}, {job.title}")
        out.add(extrapolated(clip, job, repeats))
    out.table(COLUMNS)
    for line in out.rows:
        if line["kind"] == "extrapolated":
            out.note(f"{line['case']}: extrapolated from measured pieces,")
            for piece in line["pieces"]:
                seconds, times = piece["seconds"], piece["times"]
                out.note(f"  {piece['piece']}: {seconds:.4g} s x {times:g}")
