"""One local training step: the text part alone, and the whole step.

Ours trains a block of as many clients as the grid would choose, on cached image features; its time
is divided by their number. The reference trains one client: its images pass through the image tower
and the class prompts through all 77 positions of the text tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.bench.backbones import encode_all, random_images
from fedprompt.bench.class_lists import class_names
from fedprompt.bench.compare import (
    Measured,
    Row,
    clock,
    interleave,
    max_rel_diff,
    require_equal,
    row,
)
from fedprompt.bench.counting import count_gflop
from fedprompt.bench.output import TIMES, Column, Output
from fedprompt.bench.reference import ReferenceClient, ReferenceCoOp, reference_local_training
from fedprompt.bench.workload import (
    Sizes,
    make_workspace,
    random_features,
    reference_clients,
    reference_model,
)
from fedprompt.methods.parts.prompts import PromptSource
from fedprompt.rng import normal
from fedprompt.runtime.device_memory import free_memory
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.training import train_clients
from fedprompt.workspace import Workspace

MOST_CLIENTS = 64
CHECKED = 2
"""Number of clients that the reference trains too, one per repeat."""
COLUMNS: tuple[Column, ...] = (
    *TIMES[:-1],
    ("counted", "counted_ratio", ".1f"),
    ("share of saving", "share_of_saving", ".0%"),
    ("clients", "clients", "d"),
    ("alone s", "ours_alone_s", ".4g"),
    ("paid back", "paid_back_steps", ".2f"),
    ("MB", "peak_mb", ".0f"),
    ("ref. MB", "reference_peak_mb", ".0f"),
)


@dataclass(frozen=True)
class StepOptions:
    """What `bench step` measures."""

    classes: Sequence[int] = (10, 45, 50, 100, 345)
    context: Sequence[int] = (4, 16)
    batch: int = 8
    repeats: int = 3
    budget_s: float = 30.0


class StepCase:
    """One class list and context length, with both implementations ready to run.

    Ours trains `clients` clients together; the reference trains the first `checked` of them in
    turn, so that the comparison does not rest on one client.

    Args:
        clip: the frozen backbone.
        classes: number of classes.
        context: number of context tokens.
        batch: images of a client, all in one step.
        images_N3HW: at least `CHECKED * batch` images.
    """

    def __init__(
        self, clip: FrozenCLIP, classes: int, context: int, batch: int, images_N3HW: Tensor
    ) -> None:
        encoded_ND = encode_all(clip, images_N3HW[: CHECKED * batch])
        sizes = Sizes(MOST_CLIENTS, batch)
        features_ND = random_features(sizes.images, clip.embed_dim)
        features_ND[: len(encoded_ND)] = encoded_ND
        self.workspace: Workspace = make_workspace(
            clip,
            class_names(classes),
            sizes,
            features_ND,
            method={"name": "promptfl", "context_tokens": context},
            training={"batch_size": batch},
        )
        # As many clients together as a simulation would train on this machine.
        self.clients = InlineGrid(self.workspace).clients_per_block(MOST_CLIENTS)
        self.checked = min(CHECKED, self.clients)
        self.start = self.workspace.method.init_shared(self.workspace.config.seed)["ctx"]
        self.model: ReferenceCoOp = reference_model(self.workspace)
        self.reference: list[ReferenceClient] = reference_clients(
            self.workspace, images_N3HW, range(CHECKED)
        )
        self.prompts: PromptSource = self.workspace.method.prompts  # type: ignore[attr-defined]
        shape = (MOST_CLIENTS, *self.start.shape)
        contexts_KMd = self.start + normal(shape, 0.002, 0, "bench", "contexts")
        self.contexts_KMd = contexts_KMd.to(clip.device)
        # Random weights: a plain sum of features would hide errors that cancel out.
        weight_CD = normal((classes, clip.embed_dim), 1.0, 0, "bench", "weight")
        self.weight_CD = weight_CD.to(clip.device)

    # The text part: class features of contexts, and the gradient of the contexts

    def our_text(self, clients: int) -> dict[str, Tensor]:
        """Features (K, C, D) and gradients (K, M, d) of K contexts."""
        context_KMd = self.contexts_KMd[:clients].clone().requires_grad_()
        features_KCD = self.prompts.classes(context_KMd)
        (features_KCD * self.weight_CD).sum().backward()
        assert context_KMd.grad is not None
        return {"features": features_KCD.detach(), "gradient": context_KMd.grad}

    def reference_text(self, client: int) -> dict[str, Tensor]:
        """Features (C, D) and gradient (M, d) of one client's context."""
        self._set_context(self.contexts_KMd[client])
        features_CD = self.model.class_features()
        (features_CD * self.weight_CD).sum().backward()
        assert self.model.context.grad is not None
        return {"features": features_CD.detach(), "gradient": self.model.context.grad.clone()}

    # The whole step

    def our_step(self, clients: int) -> dict[str, Tensor]:
        """Losses (K,) and gradients (K, M, d) of K clients' first step."""
        workspace, config = self.workspace, self.workspace.config
        results = train_clients(
            workspace.method,
            [{"ctx": self.start}] * clients,
            [{}] * clients,
            [workspace.train_data(c) for c in range(clients)],
            config.training,
            seed=config.seed,
            server_round=1,
            rounds=1,
        )
        # One step of gradient descent: the gradient is the movement divided by the learning rate.
        moved_KMd = torch.stack([self.start - r.shared["ctx"] for r in results])
        losses = torch.tensor([r.losses["loss"] for r in results])
        return {"loss": losses, "gradient": moved_KMd / config.training.lr}

    def reference_step(self, client: int) -> dict[str, Tensor]:
        """Loss and gradient (M, d) of one client's first step."""
        config = self.workspace.config
        self._set_context(self.start)
        loss = reference_local_training(
            self.model,
            self.reference[client],
            config.training,
            seed=config.seed,
            server_round=1,
            rounds=1,
        )
        gradient = (self.start - self.model.context.detach().cpu()) / config.training.lr
        return {"loss": torch.tensor(loss), "gradient": gradient}

    def _set_context(self, context_Md: Tensor) -> None:
        """Start the reference from this context, without an earlier gradient."""
        with torch.no_grad():
            self.model.context.copy_(context_Md)
        self.model.context.grad = None

    def reference_bytes(self) -> int:
        """Estimated memory of a reference step.

        Autograd keeps about 20 floats per element of a hidden state.
        """
        parts = self.workspace.clip.text
        rows = len(self.workspace.task.class_names) * parts.context_length * len(parts.blocks)
        return rows * parts.width * 20 * 4


def bench_step(clip: FrozenCLIP, options: StepOptions, out: Output) -> None:
    """Measure all cases; a case whose reference does not fit into memory is skipped with a note.

    Args:
        clip: the frozen backbone.
        options: what to measure.
        out: where rows and notes go.

    Raises:
        MismatchError: a loss, feature or gradient of ours differs from the reference's.
    """
    images_N3HW = random_images(clip, CHECKED * options.batch, seed=0)
    image_s = _seconds_per_image(clip, images_N3HW)
    for context in options.context:
        for classes in options.classes:
            case = StepCase(clip, classes, context, options.batch, images_N3HW)
            if case.reference_bytes() > 0.9 * free_memory(clip.device):
                needed = case.reference_bytes() / 1e9
                out.note(f"skipped: {classes} classes, the reference needs about {needed:.0f} GB.")
                continue
            out.progress(f"{classes} classes, {context} context tokens: text part")
            out.add(_compare(case, "text", f"text C={classes} M={context}", options))
            out.progress(f"{classes} classes, {context} context tokens: whole step")
            line = _compare(case, "step", f"step C={classes} M={context}", options)
            saved = line["reference_s"] - line["ours_s"]
            line |= {"image_s": image_s, "paid_back_steps": options.batch * image_s / saved}
            out.add(line)
    out.table(COLUMNS)
    out.note(
        f"Encoding a batch of {options.batch} images takes {options.batch * image_s:.2f} s, once. "
        "'Paid back' is the number of training steps that save as much time."
    )


def _compare(case: StepCase, part: str, name: str, options: StepOptions) -> Row:
    ours = case.our_text if part == "text" else case.our_step
    reference = case.reference_text if part == "text" else case.reference_step
    differences = []

    def check(repeat: int, results: dict[str, Any]) -> None:
        client = repeat % case.checked
        for path in ("ours", "alone"):
            if path == "ours" or client == 0:
                mine = {n: v[client] for n, v in results[path].items()}
                differences.append(max_rel_diff(mine, results["reference"]))
        require_equal(name, max(differences))

    gflop = {
        "ours_gflop": count_gflop(lambda: ours(case.clients)) / case.clients,
        "reference_gflop": count_gflop(lambda: reference(0)),
    }
    measured = interleave(
        {
            "ours": lambda _: ours(case.clients),
            "alone": lambda _: ours(1),
            "reference": lambda repeat: reference(repeat % case.checked),
        },
        repeats=options.repeats,
        budget_s=options.budget_s,
        warm_up=("ours", "alone"),
        check=check,
    )
    return _row(name, case, measured, gflop, max(differences))


def _row(
    name: str,
    case: StepCase,
    measured: dict[str, Measured],
    gflop: dict[str, float],
    difference: float,
) -> Row:
    line = row(
        name,
        measured["ours"],
        measured["reference"],
        divide=case.clients,
        difference=difference,
        clients=case.clients,
        classes=len(case.workspace.task.class_names),
        ours_alone_s=measured["alone"].best,
        alone_ratio=measured["reference"].best / measured["alone"].best,
        **gflop,
    )
    counted = gflop["reference_gflop"] / gflop["ours_gflop"]
    return line | {"counted_ratio": counted, "share_of_saving": line["ratio"] / counted}


def _seconds_per_image(clip: FrozenCLIP, images_N3HW: Tensor) -> float:
    encode_all(clip, images_N3HW[:1])  # warm-up
    began = clock()
    encode_all(clip, images_N3HW)
    return (clock() - began) / len(images_N3HW)
