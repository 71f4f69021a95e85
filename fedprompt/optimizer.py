"""The local optimiser of a block of clients, and the momentum that a client may keep.

Local training (`fedprompt/training.py`) builds a new optimiser for every block and round. SGD's
momentum therefore starts at zero in each round (`training.momentum_state: reset`), unless every
client keeps its own until its next round (`keep`). A momentum that is kept is as private as the
private tensors and is stored beside them; it is never part of a reply.

Source of `keep`: the public code of FedTPG (Qiu et al., ICLR 2024), where each client owns one
optimiser for the whole run. Many public loops have one optimiser for all clients instead, so that a
client continues with the momentum of the client that trained before it. That is not offered: it
passes one client's gradients on to another (docs/concepts.md, "Momentum between rounds").

Shape suffixes: K clients, A clients that are still training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedprompt.config.schema import TrainingConfig
from fedprompt.methods.base import Tensors, stack

MOMENTUM = "momentum_buffer"
"""The name of the momentum in the state of torch's SGD."""
STORED = "momentum/"
"""What precedes the name of a momentum in a store. No method's tensor has a slash in its name."""
State = list[dict[str, Tensor]]
"""What an optimiser knows about each of its parameters, in their order."""


def build_optimizer(
    config: TrainingConfig, leaves: Tensors, lr: float, lr_scale: Mapping[str, float]
) -> torch.optim.Optimizer:
    """Create the optimiser, with one parameter group per learning rate.

    Args:
        config: the optimiser's name and its settings.
        leaves: the trained tensors (A, ...).
        lr: the round's learning rate.
        lr_scale: factors of the learning rate by name of the tensor; 1 for all others.
    """
    by_lr: dict[float, list[Tensor]] = {}
    for name, leaf in leaves.items():
        by_lr.setdefault(lr * lr_scale.get(name, 1.0), []).append(leaf)
    groups = [{"params": of_one_lr, "lr": rate} for rate, of_one_lr in by_lr.items()]
    # One kernel updates all tensors of a group. On CPUs nothing would be gained, and the last bits
    # would differ.
    fused = any(leaf.device.type != "cpu" for leaf in leaves.values())
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            groups,
            lr=lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            fused=fused or None,
        )
    adam = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    first, second = config.betas
    return adam(
        groups,
        lr=lr,
        betas=(first, second),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=fused or None,
    )


def fusable(gradient: Tensor | None) -> Tensor | None:
    """A gradient as a fused step takes it: laid out as its tensor. CPUs take any layout."""
    if gradient is None or gradient.device.type == "cpu":
        return gradient
    return gradient.contiguous()


def clip_gradients(
    gradients: Mapping[str, Tensor | None], max_norm: float, at_rest: Tensors
) -> dict[str, Tensor | None]:
    """Scale down the gradients of clients whose norm is too large, each client by its own.

    The same as `torch.nn.utils.clip_grad_norm_` on the tensors of one client after the other.

    Args:
        gradients: the gradient (A, ...) of each trained tensor, None where there is none.
        max_norm: the largest Euclidean norm of all gradients of a client together.
        at_rest: by tensor, the clients (A or more,) that do not train it; their gradients of it
            are not applied and do not count.

    Returns:
        Gradients by the same names. A norm that is not finite makes its client's gradients NaN.
    """
    norms_A = [
        torch.linalg.vector_norm(g.flatten(1), dim=1)
        if name not in at_rest
        else torch.linalg.vector_norm(g.flatten(1), dim=1).masked_fill(at_rest[name][: len(g)], 0)
        for name, g in gradients.items()
        if g is not None
    ]
    if not norms_A:
        return dict(gradients)
    norm_A = torch.linalg.vector_norm(torch.stack(norms_A), dim=0)
    # The small number is that of `clip_grad_norm_`.
    scale_A = (max_norm / (norm_A + 1e-6)).clamp(max=1.0)
    return {
        name: None if g is None else g * scale_A.view(-1, *[1] * (g.dim() - 1))
        for name, g in gradients.items()
    }


def restore(
    optimizer: torch.optim.Optimizer, leaves: Sequence[Tensor], state: State | None, active: int
) -> None:
    """Give a new optimiser the state of the clients that are still training.

    Args:
        optimizer: the new optimiser.
        leaves: its parameters (A, ...).
        state: the state of each parameter before, or None if there is none.
        active: the number A of clients still training.
    """
    if state is None:
        return
    for leaf, leaf_state in zip(leaves, state, strict=True):
        optimizer.state[leaf] = {
            # Momentum and moments have a client axis. Adam's step counter is a 0-d tensor that all
            # clients share, as they have taken the same number of steps so far.
            n: v[:active].clone() if torch.is_tensor(v) and v.dim() > 0 else v
            for n, v in leaf_state.items()
        }


def keeps_momentum(config: TrainingConfig) -> bool:
    """Whether there is a momentum, and clients keep it until their next round."""
    return config.momentum_state == "keep" and config.optimizer == "sgd" and config.momentum > 0


def stored_momentum(stored: Sequence[Tensors]) -> Tensors:
    """The momentum that a block's clients have stored.

    Args:
        stored: per client, its momentum by name of the tensor, without a client axis; empty before
            the client's first training.

    Returns:
        The momentum by the same names, (K, ...); zeros where a client has none. Empty if none has.
    """
    known = {name: t for own in stored for name, t in own.items()}
    complete = [{n: own.get(n, torch.zeros_like(t)) for n, t in known.items()} for own in stored]
    return stack(complete) if known else {}


def kept_momentum(trained: Tensors, stored_K: Tensors) -> Tensors:
    """The momentum of a block's clients at the start of a round.

    Args:
        trained: the tensors that will be trained, (K, ...).
        stored_K: what `stored_momentum` returned, on the device of `trained`.

    Returns:
        The momentum of each tensor, (K, ...); zeros where no client has any.
    """
    return {
        n: _padded(stored_K[n], t) if n in stored_K else torch.zeros_like(t)
        for n, t in trained.items()
    }


def _padded(momentum_K: Tensor, trained_K: Tensor) -> Tensor:
    """Pad with zeros to the shape of a tensor whose longest client has no momentum yet."""
    if momentum_K.shape == trained_K.shape:
        return momentum_K
    padded_K = torch.zeros_like(trained_K)
    padded_K[:, : momentum_K.shape[1]] = momentum_K
    return padded_K


def with_momentum(private: Tensors, momentum: Tensors) -> Tensors:
    """What a client stores: its private tensors and its momentum, in one container."""
    return private | {f"{STORED}{name}": t for name, t in momentum.items()}


def without_momentum(stored: Tensors) -> tuple[Tensors, Tensors]:
    """The private tensors and the momentum that a client has stored; see `with_momentum`."""
    # What a client knows of its labels (`queries.OF_LABELS`) is no tensor of the method.
    private = {n: t for n, t in stored.items() if "/" not in n}
    momentum = {n.removeprefix(STORED): t for n, t in stored.items() if n.startswith(STORED)}
    return private, momentum
