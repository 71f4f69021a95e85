"""Test-time adaptation: a model goes on learning from test images, without labels or training data.

Three rules, each for any method that is trained by gradients. `tent` and `tpt` move the trained
tensors of the method, and `vdp` leaves them as they are and moves the pixels:

- `tent`, after Tent: Fully Test-Time Adaptation by Entropy Minimization (Wang et al., ICLR 2021,
  arXiv 2006.10726): each batch of the stream takes steps of Adam on the mean entropy of its
  answers, from the tensors that the last batch left. How we differ: Tent moves normalisation
  layers, and answers before the step; here prompts move, and the answers are those after it.
- `tpt`, after Test-Time Prompt Tuning (Shu et al., NeurIPS 2022, arXiv 2209.07511): for every
  image anew, steps of AdamW on the entropy of the mean answer over those of its views that are
  answered with the lowest entropies. The views are those of `data.views`, where the paper draws 63.
- `vdp`, after Decorate the Newcomers: Visual Domain Prompt for Continual Test Time Adaptation (Gan
  et al., AAAI 2023, arXiv 2212.04145), of which only the abstract could be read, so that all but
  these sentences is RECONSTRUCTED: x' = x + omega + psi, with a prompt omega for all domains and
  psi for the present one, in the normalised pixels that enter the tower; a teacher, the moving
  average of both, whose most probable classes are targets of a cross-entropy (its probabilities
  would have no gradient as long as student and teacher agree); a penalty that keeps important
  entries of omega, sum F (omega - omega_0)^2 with F the running mean of squared gradients and
  omega_0 the teacher's; and a new psi when the teacher's mean confidence falls by more than
  `confidence_drop` below its running mean, which says that the domain has changed.

Shape suffixes: K models, B images of a batch, V views, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.fields import option
from fedprompt.data.features.inputs import Inputs
from fedprompt.evaluation.perturbations import inputs_of_pixels
from fedprompt.methods.base import Method, Tensors

WEIGHT_DECAY = 0.01  # AdamW's default, which TPT's code leaves as it is


@dataclass(frozen=True)
class AdaptationOptions:
    """Defaults: one step per batch, with TPT's learning rate and share of views."""

    rule: Literal["tent", "tpt", "vdp"] = option("tent", "how the model adapts")
    lr: float | None = option(
        None, "learning rate; null = 0.001 (tent), 0.005 (tpt), 0.01 (vdp)", gt=0
    )
    steps: int = option(1, "steps per batch, or per image (tpt)", ge=1)
    batch_size: int = option(32, "images that arrive together", ge=1)
    confident: float = option(
        0.1, "tpt: share of an image's views whose answers count, at least one", gt=0, le=1
    )
    teacher_decay: float = option(0.99, "vdp: decay of the teacher's moving average", ge=0, lt=1)
    homeostasis: float = option(1.0, "vdp: weight of the penalty on omega", ge=0)
    confidence_drop: float = option(
        0.2, "vdp: fall of the teacher's confidence at which psi starts again", gt=0
    )

    @property
    def rate(self) -> float:
        """The learning rate."""
        return self.lr or {"tent": 0.001, "tpt": 0.005, "vdp": 0.01}[self.rule]


def trained(method: Method, shared: Tensors, private: Tensors) -> Tensors:
    """The tensors of one model that training moves, as `shared.ctx`.

    Args:
        method: the method.
        shared: shared tensors, without a client axis.
        private: private tensors, without a client axis; empty for the global model.
    """
    both = {f"shared.{n}": t for n, t in shared.items()}
    both |= {f"private.{n}": t for n, t in private.items()}
    return {n: t for n, t in both.items() if n not in method.frozen}


class Prompted:
    """One model whose trained tensors can be replaced.

    Args:
        method: the method.
        shared: shared tensors, without a client axis.
        private: private tensors, or None for the global model.
    """

    def __init__(self, method: Method, shared: Tensors, private: Tensors | None) -> None:
        device = method.clip.device
        self.method = method
        self.shared = {n: t.to(device) for n, t in shared.items()}
        self.private = None if private is None else {n: t.to(device) for n, t in private.items()}
        self.start = trained(method, self.shared, self.private or {})

    def encode(self, moved: Tensors, models: int) -> Tensors:
        """Encoded models (K, ...) with these tensors (K, ...) in place of the trained ones."""

        def whole(kind: str, tensors: Tensors) -> Tensors:
            return {
                n: moved[f"{kind}.{n}"] if f"{kind}.{n}" in moved else t.expand(models, *t.shape)
                for n, t in tensors.items()
            }

        private = None if self.private is None else whole("private", self.private)
        return self.method.encode(whole("shared", self.shared), private)

    def logits(self, moved: Tensors, inputs: Inputs) -> Tensor:
        """Logits (K, B, C) of images (K, B, ...)."""
        models = len(inputs.features)
        return self.method.logits(self.encode(moved, models), inputs).float()


def entropy(logits: Tensor) -> Tensor:
    """Entropy (...) of answers (..., C)."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def marginal_entropy(logits_KVC: Tensor, confident: float) -> Tensor:
    """TPT's loss (K,): the entropy of the mean answer over the views of lowest entropy."""
    kept = max(1, int(confident * logits_KVC.shape[1]))
    best_KV = entropy(logits_KVC).argsort(dim=-1, stable=True)[:, :kept]
    rows = best_KV[..., None].expand(-1, -1, logits_KVC.shape[-1])
    mean_KC = logits_KVC.softmax(-1).gather(1, rows).mean(1)
    return -(mean_KC * mean_KC.clamp_min(1e-12).log()).sum(-1)


def tent(model: Prompted, batches: Sequence[Inputs], options: AdaptationOptions) -> list[Tensor]:
    """Answers to a stream by one model that adapts from batch to batch.

    Args:
        model: the model at its start.
        batches: images (B, ...) of each batch.
        options: steps and learning rate.

    Returns:
        Logits (B, C) of each batch, after its steps.
    """
    moved = {n: t[None].clone().requires_grad_() for n, t in model.start.items()}
    optimizer = torch.optim.Adam(moved.values(), lr=options.rate)
    answers = []
    for batch in batches:
        inputs = batch.of_one().on(model.method.clip.device)

        def loss(inputs: Inputs = inputs) -> Tensor:
            return entropy(model.logits(moved, inputs)).mean()

        _descend(optimizer, moved, options.steps, loss)
        with torch.no_grad():
            answers.append(model.logits(moved, inputs)[0].cpu())
    return answers


def tpt(
    model: Prompted, batches: Sequence[Sequence[Inputs]], options: AdaptationOptions
) -> list[Tensor]:
    """Answers to images, for each of which the model adapts anew to its views.

    Args:
        model: the model at its start.
        batches: per batch, images (B, ...) of every view; view 0 is the image itself.
        options: steps, learning rate and share of views.

    Returns:
        Logits (B, C) of each batch; they do not depend on the other images of the batch.
    """
    answers = []
    for views in batches:
        images = len(views[0])
        # Every image has a model of its own: its row of the client axis.
        stacked = Inputs.cat([view.of_one() for view in views]).swapped()
        inputs = stacked.on(model.method.clip.device)
        moved = {
            n: t.expand(images, *t.shape).clone().requires_grad_() for n, t in model.start.items()
        }
        optimizer = torch.optim.AdamW(moved.values(), lr=options.rate, weight_decay=WEIGHT_DECAY)

        def loss(moved: Tensors = moved, inputs: Inputs = inputs) -> Tensor:
            return marginal_entropy(model.logits(moved, inputs), options.confident).sum()

        _descend(optimizer, moved, options.steps, loss)
        with torch.no_grad():
            answers.append(model.logits(moved, inputs[:, :1])[:, 0].cpu())
    return answers


def _descend(
    optimizer: torch.optim.Optimizer, moved: Tensors, steps: int, loss: Callable[[], Tensor]
) -> None:
    for _ in range(steps):
        with torch.enable_grad():
            found = torch.autograd.grad(loss(), list(moved.values()), allow_unused=True)
        for leaf, gradient in zip(moved.values(), found, strict=True):
            leaf.grad = gradient
        optimizer.step()


@dataclass
class VisualDomainPrompt:
    """The state of `vdp` on one device: both prompts, their teacher, and what it knows of domains.

    Attributes:
        shape: of an image that enters the tower, (3, H, W).
        changes: how often the domain has changed.
    """

    clip: FrozenCLIP
    options: AdaptationOptions
    changes: int = 0
    student: Tensors = field(init=False)
    teacher: Tensors = field(init=False)
    importance: Tensor = field(init=False)
    optimizer: torch.optim.Adam = field(init=False)
    confidence: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        size = self.clip.model.visual.image_size
        nothing = torch.zeros(3, *size, device=self.clip.device)
        self.student = {n: nothing.clone().requires_grad_() for n in ("omega", "psi")}
        self.teacher = {n: nothing.clone() for n in self.student}
        self.importance = nothing.clone()
        self.optimizer = torch.optim.Adam(self.student.values(), lr=self.options.rate)

    def answer(self, method: Method, encoded: Tensors, pixels_B3HW: Tensor) -> Tensor:
        """Adapt to a batch, and classify it.

        Args:
            method: a method that reads nothing but features and pixels of an image.
            encoded: its model, with client axis 1.
            pixels_B3HW: normalised pixels, on the device of the backbone.

        Returns:
            Logits (B, C) of the student after its steps.
        """

        def logits(prompts: Tensors) -> Tensor:
            prompted = pixels_B3HW + prompts["omega"] + prompts["psi"]
            inputs = inputs_of_pixels(method, prompted)
            return method.logits(encoded, inputs.of_one())[0].float()

        options, decay = self.options, self.options.teacher_decay
        for _ in range(options.steps):
            with torch.no_grad():
                sure_B, target_B = logits(self.teacher).softmax(-1).max(-1)
                self._notice(float(sure_B.mean()))
            with torch.enable_grad():
                ce = F.cross_entropy(logits(self.student), target_B)
                kept = self.importance * (self.student["omega"] - self.teacher["omega"]) ** 2
                of_omega, of_psi = torch.autograd.grad(
                    ce + options.homeostasis * kept.sum(), list(self.student.values())
                )
            with torch.no_grad():
                self.importance.lerp_(of_omega**2, 1 - decay)
                self.student["omega"].grad, self.student["psi"].grad = of_omega, of_psi
                self.optimizer.step()
                for n, t in self.teacher.items():
                    t.lerp_(self.student[n], 1 - decay)
        with torch.no_grad():
            return logits(self.student).cpu()

    def _notice(self, confidence: float) -> None:
        """Start psi again if the teacher has suddenly become less confident."""
        known, drop = self.confidence, self.options.confidence_drop
        if known is not None and confidence < known - drop:
            self.changes += 1
            for held in (self.student, self.teacher):
                held["psi"].detach().zero_()
            self.optimizer.state.pop(self.student["psi"], None)
            self.confidence = None
        if self.confidence is None:
            self.confidence = confidence
        self.confidence = 0.9 * self.confidence + 0.1 * confidence
