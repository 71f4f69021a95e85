"""A trigger: one bounded change of pixels that draws every image to a target class.

Source: BadPromptFL: A Novel Backdoor Threat to Prompt-based Federated Learning in Multimodal Models
(Zhang, Zhao, Wang, Wang, arXiv 2508.08040), of which only the abstract was available, so the
details are reconstructed: the trigger t minimises

    mean over images x of CE(logits(clamp(x + t, 0, 1)), target),        |t|_inf <= eps,

by steps against the sign of its gradient, as in PGD (Madry et al., ICLR 2018). The gradient passes
through the frozen image tower and the method's logits, which are cosines with the learned class
prompts for most methods.

Shape suffixes: B images, H and W pixels, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.evaluation.perturbations import logits_of_pixels
from fedprompt.methods.base import Method, Tensors


def triggered(pixels_B3HW: Tensor, trigger_3HW: Tensor) -> Tensor:
    """Images with the trigger, (B, 3, H, W), with pixels from 0 to 1 in steps of 1 / 255."""
    # An image file has bytes, so a change below half a step does not survive.
    return ((pixels_B3HW + trigger_3HW).clamp(0, 1) * 255).round() / 255


def trigger_gradient(
    method: Method, encoded: Tensors, pixels_B3HW: Tensor, trigger_3HW: Tensor, target: int
) -> Tensor:
    """The gradient (3, H, W) of the trigger's loss.

    Args:
        method: a method that reads nothing but what is in `perturbations.ATTACKABLE`.
        encoded: its model, with client axis 1.
        pixels_B3HW: the images, with pixels from 0 to 1.
        trigger_3HW: the trigger.
        target: the class that triggered images are to get.
    """
    trigger = trigger_3HW.detach().clone().requires_grad_()
    with torch.enable_grad():
        logits_BC = logits_of_pixels(method, encoded, (pixels_B3HW + trigger).clamp(0, 1))
        target_B = torch.full((len(logits_BC),), target, device=logits_BC.device)
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits_BC, target_B), trigger)
    return gradient


def trained_trigger(
    method: Method,
    encoded: Tensors,
    batches: Iterable[Tensor],
    trigger_3HW: Tensor,
    target: int,
    eps: float,
    step: float,
) -> Tensor:
    """The trigger (3, H, W) after one step on each batch of images.

    Args:
        method: as in `trigger_gradient`.
        encoded: likewise.
        batches: images (B, 3, H, W) of each step, with pixels from 0 to 1.
        trigger_3HW: the trigger before the first step.
        target: the class that triggered images are to get.
        eps: largest change of a pixel.
        step: change of a pixel in one step.
    """
    for pixels_B3HW in batches:
        gradient = trigger_gradient(method, encoded, pixels_B3HW, trigger_3HW, target)
        trigger_3HW = (trigger_3HW - step * gradient.sign()).clamp(-eps, eps)
    return trigger_3HW


@torch.no_grad()
def classes_of_pixels(method: Method, encoded: Tensors, pixels_B3HW: Tensor) -> Tensor:
    """The classes (B,) that a model gives to images, on the CPU.

    Args:
        method: as in `trigger_gradient`.
        encoded: likewise.
        pixels_B3HW: the images, with pixels from 0 to 1.
    """
    parts = pixels_B3HW.split(method.clip.image_batch)
    device = method.clip.device
    return torch.cat(
        [logits_of_pixels(method, encoded, part.to(device)).argmax(-1).cpu() for part in parts]
    )
