"""Transport plans: closed forms of small problems, and a twin in plain loops of Python floats."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.methods.parts.optimal_transport import Transport, real_images

K, B, C, N, P, D = 3, 4, 2, 3, 5, 8


def plain_plan(
    cosines: list[list[list[list[float]]]],
    eps: float,
    threshold: float,
    max_iterations: int,
    gamma: float | None,
) -> list[list[list[list[float]]]]:
    """The plan of one client's images: [image][class][prompt][patch] -> the same."""
    kernels = [[[[math.exp(-(1 - s) / eps) for s in q] for q in c] for c in b] for b in cosines]
    problems = [k for image in kernels for k in image]
    prompts, patches = len(problems[0]), len(problems[0][0])
    rows = [[1.0] * patches for _ in problems]
    columns = [[1.0] * prompts for _ in problems]
    for _ in range(max_iterations):
        changes: list[float] = []
        for i, kernel in enumerate(problems):
            old_rows, old_columns = rows[i], columns[i]
            sums = [
                sum(kernel[n][p] * old_columns[n] for n in range(prompts)) for p in range(patches)
            ]
            rows[i] = [1 / patches / s for s in sums]
            if gamma is not None:
                rows[i] = [min(r, 1.0) for r in rows[i]]
            mass = (1 if gamma is None else gamma) / prompts
            columns[i] = [
                mass / sum(kernel[n][p] * rows[i][p] for p in range(patches))
                for n in range(prompts)
            ]
            new, old = (rows[i], old_rows) if gamma is None else (columns[i], old_columns)
            changes += [abs(a - b) for a, b in zip(new, old, strict=True)]
        if sum(changes) / len(changes) < threshold:
            break
    plans = [
        [
            [rows[i][p] * kernel[n][p] * columns[i][n] for p in range(patches)]
            for n in range(prompts)
        ]
        for i, kernel in enumerate(problems)
    ]
    classes = len(kernels[0])
    return [plans[b * classes : (b + 1) * classes] for b in range(len(kernels))]


def features(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Patches (K, B, P, D) and prompts (K, N, C, D)."""
    draw = torch.Generator().manual_seed(seed)
    patches = F.normalize(torch.randn(K, B, P, D, generator=draw), dim=-1)
    return patches, F.normalize(torch.randn(K, N, C, D, generator=draw), dim=-1)


def cosines(patches: Tensor, prompts: Tensor) -> Tensor:
    return torch.einsum("kbpd,kncd->kbcnp", patches, prompts)


CASES = [
    pytest.param(0.1, 0.01, 100, None, id="plot"),
    pytest.param(0.1, 1e-3, 100, 0.8, id="fedotp"),
    pytest.param(0.1, 1e-3, 100, 1.0, id="fedotp-all-mass"),
    pytest.param(0.5, 1e-6, 100, None, id="soft-tight"),
    pytest.param(0.5, 1e-6, 100, 0.5, id="soft-tight-half"),
    pytest.param(0.1, 1e-9, 3, 0.8, id="three-iterations"),
    pytest.param(0.01, 1e-3, 100, 0.8, id="few-shot-eps"),
]


@pytest.mark.parametrize(("eps", "threshold", "most", "gamma"), CASES)
def test_plan_is_that_of_plain_loops_over_each_clients_real_images(
    eps: float, threshold: float, most: int, gamma: float | None
) -> None:
    patches, prompts = features()
    similar = cosines(patches, prompts)
    real = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    ours = Transport(eps, threshold, most, gamma).plan(similar, real)
    for k in range(K):
        count = int(real[k].sum())
        rows = similar[k, :count].double().tolist()
        twin = torch.tensor(plain_plan(rows, eps, threshold, most, gamma))
        torch.testing.assert_close(ours[k, :count], twin.float(), rtol=1e-4, atol=1e-7)


def plan_of(cosine_NP: Tensor, gamma: float | None, eps: float = 1.0) -> Tensor:
    problem = Transport(eps, 1e-9, 1000, gamma)
    plan: Tensor = problem.plan(cosine_NP[None, None, None], torch.ones(1, 1, dtype=torch.bool))
    return plan[0, 0, 0]


def test_balanced_plan_of_two_by_two_by_hand() -> None:
    """Marginals 1/2 leave one number t; t^2 / (1/2 - t)^2 = k11 k22 / (k12 k21) = 4 -> t = 1/3."""
    kernel = torch.tensor([[1.0, 0.5], [0.25, 0.5]])
    third, sixth = 1 / 3, 1 / 6
    expected = torch.tensor([[third, sixth], [sixth, third]])
    assert torch.allclose(plan_of(1 + kernel.log(), None), expected, atol=1e-6)


def test_partial_plan_of_one_prompt_by_hand() -> None:
    """Mass goes where the kernel is (3 : 1) up to the cap of 1/2 per patch, then to the other."""
    cosine = 1 + torch.tensor([[0.75, 0.25]]).log()
    assert torch.allclose(plan_of(cosine, 0.4), torch.tensor([[0.3, 0.1]]), atol=1e-6)
    assert torch.allclose(plan_of(cosine, 0.8), torch.tensor([[0.5, 0.3]]), atol=1e-5)
    assert torch.allclose(plan_of(cosine, 1.0), torch.tensor([[0.5, 0.5]]), atol=1e-4)


@pytest.mark.parametrize("gamma", [None, 0.3, 0.8])
def test_marginals(gamma: float | None) -> None:
    patches, prompts = features()
    plan = Transport(0.3, 1e-9, 2000, gamma).plan(
        cosines(patches, prompts), torch.ones(K, B, dtype=torch.bool)
    )
    mass = 1.0 if gamma is None else gamma
    columns = plan.sum(-1)
    torch.testing.assert_close(columns, torch.full_like(columns, mass / N), rtol=1e-4, atol=1e-6)
    rows = plan.sum(-2)
    if gamma is None:
        torch.testing.assert_close(rows, torch.full_like(rows, 1 / P), rtol=1e-4, atol=1e-6)
    else:
        assert float(rows.max()) <= 1 / P + 1e-5
        assert float(rows.min()) < 1 / P - 1e-3


@pytest.mark.parametrize("gamma", [None, 0.8])
def test_other_clients_and_padding_do_not_change_a_plan(gamma: float | None) -> None:
    """Client 0 converges more slowly than the others; client 1's last images are junk."""
    patches, prompts = features(1)
    real = torch.tensor([[True] * B, [True, True, False, False], [True] * B])
    prompts[0] *= 3  # wide costs: slow to converge
    patches[1, 2:] *= 3
    problem = Transport(0.1, 0.1, 100, gamma)
    similar = cosines(patches, prompts)
    together = problem.plan(similar, real)
    for k, count in enumerate((B, 2, B)):
        alone = problem.plan(similar[k : k + 1, :count], real[k : k + 1, :count])
        torch.testing.assert_close(together[k, :count], alone[0], rtol=1e-5, atol=1e-8)
    unmasked = problem.plan(similar, torch.ones_like(real))
    assert not torch.allclose(unmasked[1, :2], together[1, :2], rtol=1e-5, atol=1e-8)


def test_a_client_without_real_images_ends_the_iteration() -> None:
    patches, prompts = features()
    patches[1] = 0
    real = real_images(patches)
    assert real.tolist() == [[True] * B, [False] * B, [True] * B]
    similarity = Transport(0.1, 1e-3, 100, 0.8).similarity(patches, prompts, real)
    assert torch.isfinite(similarity).all()


def test_small_eps_is_solved_without_underflow() -> None:
    """exp(-2 / 0.01) is no float32; opposite patches and prompts still have a plan."""
    draw = torch.Generator().manual_seed(0)
    prompts = F.normalize(torch.randn(1, N, C, D, generator=draw), dim=-1)
    patches = -prompts[:, :, 0].expand(1, N, D)[:, None]
    plan = Transport(0.01, 1e-3, 100, 0.8).plan(
        cosines(patches, prompts), torch.ones(1, 1, dtype=torch.bool)
    )
    assert torch.isfinite(plan).all()
    assert float(plan.sum()) == pytest.approx(0.8 * C, rel=1e-3)


def test_gradients_pass_through_cosines_and_not_through_the_plan() -> None:
    patches, prompts = features()
    prompts.requires_grad_()
    problem, real = Transport(0.1, 0.01, 100), torch.ones(K, B, dtype=torch.bool)
    problem.similarity(patches, prompts, real).sum().backward()
    plan = problem.plan(cosines(patches, prompts.detach()), real)
    expected = torch.einsum("kbcnp,kbpd->kncd", plan, patches)
    assert prompts.grad is not None
    torch.testing.assert_close(prompts.grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("wide", ["patches", "prompts"])
def test_a_client_axis_of_one_is_for_all(wide: str) -> None:
    patches, prompts = features()
    problem, real = Transport(0.1, 1e-3, 100, 0.8), torch.ones(1, B, dtype=torch.bool)
    few = {
        "patches": (patches, prompts[:1], torch.ones(K, B, dtype=torch.bool)),
        "prompts": (patches[:1], prompts, real),
    }[wide]
    many = problem.similarity(*few)
    assert many.shape == (K, B, C)
    for k in range(K):
        a = patches[k : k + 1] if wide == "patches" else patches[:1]
        b = prompts[k : k + 1] if wide == "prompts" else prompts[:1]
        torch.testing.assert_close(many[k], problem.similarity(a, b, real)[0], rtol=1e-5, atol=1e-6)
