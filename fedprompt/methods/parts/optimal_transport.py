"""Entropic optimal transport between an image's patches and a class's prompts.

PLOT and FedOTP compute their logits with it, in training and in evaluation.

Sources: PLOT (Chen et al., ICLR 2023, arXiv 2210.01253) for the balanced problem, solved by
Sinkhorn's algorithm (Cuturi, NeurIPS 2013, arXiv 1306.0895); FedOTP (Li et al., CVPR 2024, arXiv
2403.00041) for the unbalanced one, solved by Dykstra's algorithm (Benamou et al., SIAM J. Sci.
Comput. 2015, arXiv 1412.5154). Each pair of an image and a class is a separate problem: cost
1 - cos, kernel exp(-cost / eps), P patches of mass 1/P each, N prompts with equal shares of the
transported mass.

    balanced    all patches are carried: rows of the plan sum to 1/P, columns to 1/N
    partial     a mass gamma <= 1 is carried: rows sum to 1/P at most, columns to gamma/N

The plan is a constant for the gradient, as in both papers' code.

When to stop: both papers' code iterates all problems of a batch together and stops when the mean
change of one scaling vector falls below a threshold. Here the mean is taken for each client
separately, over its real images, classes and entries, so neither other clients nor padding affect
it. It follows that an image's plan depends, within the threshold, on the images of the same client
that are solved together with it.

Shape suffixes: K clients, B images, C classes, N prompts, P patches, D joint embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT32_EPS = 1 / 40
"""Costs reach 2; below this eps, exp(-2 / eps) is too close to the smallest float32, and float64
is used."""
TESTED_EVERY = 10
"""Iterations between two tests of whether all clients have stopped."""
SMALLEST_EPS = 1 / 300
"""Below this eps, exp(-2 / eps) is too close to the smallest float64."""


@dataclass(frozen=True)
class Transport:
    """A kind of transport problem and when its iteration stops.

    Attributes:
        eps: weight of the entropy, at least `SMALLEST_EPS`.
        threshold: mean change of the scaling vector below which a client's iteration stops.
        max_iterations: number of iterations after which it stops in any case.
        gamma: transported mass, in (0, 1]; None for the balanced problem.
    """

    eps: float
    threshold: float
    max_iterations: int
    gamma: float | None = None

    def similarity(self, patches_KBPD: Tensor, prompts_KNCD: Tensor, real_KB: Tensor) -> Tensor:
        """Sum over patches and prompts of plan times cosine, for each image and class.

        Args:
            patches_KBPD: L2-normalised patch features; a client axis of 1 broadcasts, here and in
                `prompts_KNCD`.
            prompts_KNCD: L2-normalised class features of each prompt.
            real_KB: false on images that are padding; these have no influence on when the
                iteration stops.

        Returns:
            Similarities (K, B, C), in [-1, 1].
        """
        cosine_KBCNP = _cosines(patches_KBPD, prompts_KNCD)
        # `plan` runs without a graph, so the gradient passes through the cosines alone.
        plan_KBCNP = self.plan(cosine_KBCNP, real_KB)
        return (plan_KBCNP * cosine_KBCNP).sum((-1, -2))

    @torch.no_grad()
    def plan(self, cosine_KBCNP: Tensor, real_KB: Tensor) -> Tensor:
        """Mass carried between each patch and prompt: (K, B, C, N, P)."""
        wide = cosine_KBCNP if self.eps >= FLOAT32_EPS else cosine_KBCNP.double()
        # (cos - 1) / eps is -cost / eps. Every iteration reads the kernel twice in matrix products,
        # so the permuted layout of the cosines is made contiguous once.
        kernel_KBCNP = ((wide - 1) / self.eps).exp_().contiguous()
        solve = _balanced if self.gamma is None else _partial
        rows_KBCP, columns_KBCN = solve(self, kernel_KBCNP, real_KB)
        plan_KBCNP: Tensor = kernel_KBCNP * rows_KBCP[..., None, :] * columns_KBCN[..., None]
        return plan_KBCNP.to(cosine_KBCNP)


def real_images(patches_KBPD: Tensor) -> Tensor:
    """Which images are not zero padding: (K, B)."""
    # The patches of a real image have norm 1, so its first patch is not zero.
    real_KB: Tensor = patches_KBPD[:, :, 0].any(-1)
    return real_KB


def _cosines(patches_KBPD: Tensor, prompts_KNCD: Tensor) -> Tensor:
    """Cosines of all patches and prompts: (K, B, C, N, P)."""
    b, p = patches_KBPD.shape[1:3]
    n, c = prompts_KNCD.shape[1:3]
    # One matrix product per client; the axes are separated afterwards.
    flat: Tensor = patches_KBPD.flatten(1, 2) @ prompts_KNCD.flatten(1, 2).transpose(-1, -2)
    return flat.view(-1, b, p, n, c).permute(0, 1, 4, 3, 2)


def _balanced(problem: Transport, kernel_KBCNP: Tensor, real_KB: Tensor) -> tuple[Tensor, Tensor]:
    """Sinkhorn: scale rows, then columns, to their marginals; the rows' change is watched."""
    n, p = kernel_KBCNP.shape[-2:]

    def step(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        new = 1 / p / _over_prompts(kernel_KBCNP, columns)
        return new, 1 / n / _over_patches(kernel_KBCNP, new), new - rows

    return _iterate(problem, kernel_KBCNP, real_KB, step)


def _partial(problem: Transport, kernel_KBCNP: Tensor, real_KB: Tensor) -> tuple[Tensor, Tensor]:
    """Dykstra: cap rows at 1/P, scale columns to gamma/N; the columns' change is watched."""
    assert problem.gamma is not None
    n, p = kernel_KBCNP.shape[-2:]
    mass = problem.gamma / n

    def step(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # A scaling above 1 would fill a row up to its cap of 1/P, but rows may carry less.
        capped = (1 / p / _over_prompts(kernel_KBCNP, columns)).clamp(max=1)
        new = mass / _over_patches(kernel_KBCNP, capped)
        return capped, new, new - columns

    return _iterate(problem, kernel_KBCNP, real_KB, step)


Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""Rows (K, B, C, P) and columns (K, B, C, N) -> the updated two, and the watched change."""


def _iterate(
    problem: Transport, kernel_KBCNP: Tensor, real_KB: Tensor, step: Step
) -> tuple[Tensor, Tensor]:
    """Scalings of rows and columns, starting from ones.

    A client that has stopped keeps its values, so its plan does not depend on slower clients.
    """
    k, b, c, n, p = kernel_KBCNP.shape
    rows = kernel_KBCNP.new_ones(k, b, c, p)
    columns = kernel_KBCNP.new_ones(k, b, c, n)
    weight_KB = _share_of_each_image(real_KB.expand(k, b), rows.dtype)
    active_K = torch.ones(k, dtype=torch.bool, device=rows.device)
    for iteration in range(problem.max_iterations):
        new_rows, new_columns, change = step(rows, columns)
        moving = active_K[:, None, None, None]
        rows = torch.where(moving, new_rows, rows)
        columns = torch.where(moving, new_columns, columns)
        change_K = (change.abs_().mean((-1, -2)) * weight_KB).sum(-1)
        active_K = active_K & ~(change_K < problem.threshold)
        # The host would wait for the device after every iteration. A few more iterations change
        # nothing, since every client that has stopped keeps its values.
        if (iteration + 1) % TESTED_EVERY == 0 and not active_K.any():
            break
    return rows, columns


def _share_of_each_image(real_KB: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights of a mean over a client's real images; zeros where it has none."""
    weight_KB = real_KB.to(dtype)
    # A client without real images gets a mean change of zero and stops at once, instead of 0 / 0.
    return weight_KB / weight_KB.sum(-1, keepdim=True).clamp(min=1)


def _over_prompts(kernel_KBCNP: Tensor, columns_KBCN: Tensor) -> Tensor:
    """Kernel times column scalings, summed over prompts: (K, B, C, P)."""
    return (columns_KBCN[..., None, :] @ kernel_KBCNP)[..., 0, :]


def _over_patches(kernel_KBCNP: Tensor, rows_KBCP: Tensor) -> Tensor:
    """Kernel times row scalings, summed over patches: (K, B, C, N)."""
    return (kernel_KBCNP @ rows_KBCP[..., None])[..., 0]
