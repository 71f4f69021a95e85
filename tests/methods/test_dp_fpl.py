"""DP-FPL: the prompt, the power iteration and the noise, each written a second time."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.errors import UserError
from fedprompt.methods.base import Batch, Tensors, uploaded_numbers
from fedprompt.methods.dp_fpl import DPFPL, clipped, factorise
from fedprompt.rng import generator
from tests.support import twins
from tests.support.builders import batch_of

K, B, M, R = 2, 5, 6, 3
LABELS = torch.tensor([[0, 1, 1, 5, 2], [3, 3, 4, 0, 1]])


def method_of(clip: FrozenCLIP, **options: Any) -> DPFPL:
    method = twins.build(clip, "dp_fpl", **({"context_tokens": M, "rank": R} | options))
    assert isinstance(method, DPFPL)
    return method


def named(shared: Tensors, private: Tensors) -> Tensors:
    return {"shared.ctx": shared["ctx"], "private.ctx": private["ctx"]}


def batch_for(clip: FrozenCLIP, **where: int) -> Batch:
    return batch_of(twins.features(K, B, clip.embed_dim), LABELS, **where)


def gradients(
    method: DPFPL, shared: Tensors, private: Tensors, batch: Batch
) -> tuple[Tensor, Tensor]:
    loss_terms = method.loss_terms(shared, private, method.encode(shared, private), batch)
    found = method.gradients(loss_terms, named(shared, private), batch)
    ours, own = found["shared.ctx"], found["private.ctx"]
    assert ours is not None
    assert own is not None
    return ours, own


def gram_schmidt(matrix: Tensor) -> Tensor:
    """In place, column by column, as the public code and PowerSGD's do."""
    matrix = matrix.clone()
    for i in range(matrix.shape[1]):
        matrix[:, i] /= matrix[:, i].norm()
        for j in range(i + 1, matrix.shape[1]):
            matrix[:, j] -= (matrix[:, i] @ matrix[:, j]) * matrix[:, i]
    return matrix


def drawn(shape: tuple[int, ...], name: str, client: int, server_round: int, step: int) -> Tensor:
    """The draw of seed 1 for one purpose, client, round and step."""
    source = generator(1, "dp_fpl", name, step, server_round, client)
    return torch.from_numpy(source.standard_normal(shape, dtype="float32"))


def cut(gradient: Tensor, limit: float) -> Tensor:
    norm = float(gradient.norm())
    return gradient * (limit / norm) if norm > limit else gradient


def twin(
    clip: FrozenCLIP, shared: Tensor, own: Tensor, k: int, batch: Batch, options: Any
) -> SimpleNamespace:
    """One client's step: U, V, R as leaves of the prompt, their gradients, and what is made of
    them."""
    d = shared.shape[-1]
    v0 = drawn((d, R), "power", k, batch.round_info.server_round, batch.step)
    u = gram_schmidt(own @ v0)
    v = gram_schmidt(own.T @ u).T
    residual = own - u @ v
    u, v = u.requires_grad_(), v.requires_grad_()
    g = shared.clone().requires_grad_()
    scale = clip.model.logit_scale.exp()
    logits = scale * batch.inputs.features[k] @ twins.class_features(clip, g + u @ v + residual).T
    loss = F.cross_entropy(logits, LABELS[k])
    grad_g, grad_u, grad_v = torch.autograd.grad(loss, [g, u, v])
    if options.epsilon is not None:
        std = math.sqrt(10 * math.log(1 / 1e-5)) / options.epsilon * options.clip_norm / B
        place = (k, batch.round_info.server_round, batch.step)
        grad_g, grad_u, grad_v = (cut(x, options.clip_norm) for x in (grad_g, grad_u, grad_v))
        grad_u = grad_u + std * drawn((M, R), "u", *place)
        grad_v = grad_v + std * drawn((R, d), "v", *place)
        grad_g = grad_g + std / math.sqrt(options.clients) * drawn((M, d), "shared", *place)
    left = grad_u @ v
    sides, both = left + u @ grad_v, u @ (u.T @ left)
    full = (sides + both) / 10 if options.form == "public_code" else sides - both
    return SimpleNamespace(logits=logits, loss=loss, g=grad_g, own=full.detach())


@pytest.mark.parametrize("epsilon", [None, 0.4])
@pytest.mark.parametrize("form", ["public_code", "projection"])
def test_logits_loss_and_gradients(clip: FrozenCLIP, epsilon: float | None, form: str) -> None:
    options = SimpleNamespace(epsilon=epsilon, form=form, clip_norm=0.05, clients=7)
    method = method_of(clip, epsilon=epsilon, local_gradient=form, clip_norm=0.05, clients=7)
    shared, private = twins.tensors(method, 0.01, K)
    batch = batch_for(clip, server_round=3, step=2)
    logits = method.logits(method.encode(shared, private), batch.inputs)
    loss_terms = method.loss_terms(shared, private, method.encode(shared, private), batch)
    ours, own = gradients(method, shared, private, batch)
    for k in range(K):
        expected = twin(
            clip, shared["ctx"][k].detach(), private["ctx"][k].detach(), k, batch, options
        )
        twins.close(logits[k], expected.logits)
        assert loss_terms["ce"][k].item() == pytest.approx(expected.loss.item(), rel=1e-4)
        twins.close(ours[k], expected.g, rtol=2e-4)
        twins.close(own[k], expected.own, rtol=2e-4)


def test_projection_is_the_gradients_projection_on_the_factors_tangent_space(
    clip: FrozenCLIP,
) -> None:
    """P_U g + g P_V - P_U g P_V: applied twice it changes nothing; the public code's form does."""
    batch = batch_for(clip)
    shared, private = twins.tensors(method_of(clip), 0.01, K)
    whole = torch.autograd.grad(
        method_of(clip)
        .loss_terms(shared, private, method_of(clip).encode(shared, private), batch)["ce"]
        .sum(),
        private["ctx"],
    )[0]
    start = batch.normal((private["ctx"].shape[-1], R), "dp_fpl", "power")
    u, v = factorise(private["ctx"].detach(), start)
    p_u, p_v = u @ u.mT, v.mT @ v
    expected = p_u @ whole + whole @ p_v - p_u @ whole @ p_v
    _, own = gradients(method_of(clip, local_gradient="projection"), shared, private, batch)
    twins.close(own, expected, rtol=1e-3)
    twins.close(p_u @ own + own @ p_v - p_u @ own @ p_v, own, rtol=1e-3)


def test_factors_are_orthonormal_and_find_a_low_rank_matrix() -> None:
    """A matrix of rank R lies in the spaces that one power iteration finds."""
    matrix = twins.draw(K, M, R, seed=1) @ twins.draw(K, R, 40, seed=2)
    u, v = factorise(matrix, twins.draw(K, 40, R, seed=3))
    eye = torch.eye(R).expand(K, -1, -1)
    assert torch.allclose(u.mT @ u, eye, atol=1e-4)
    assert torch.allclose(v @ v.mT, eye, atol=1e-4)
    twins.close(u @ (u.mT @ matrix), matrix, rtol=1e-3)
    twins.close(matrix @ v.mT @ v, matrix, rtol=1e-3)


def test_clipping_is_per_client_and_never_lengthens() -> None:
    gradient = twins.draw(2, 3, 4) * torch.tensor([0.01, 9.0])[:, None, None]
    short = clipped(gradient, 1.0)
    assert torch.equal(short[0], gradient[0])
    assert short[1].norm().item() == pytest.approx(1.0, rel=1e-5)
    assert torch.allclose(short[1] / short[1].norm(), gradient[1] / gradient[1].norm())
    assert not clipped(torch.zeros(1, 2, 2), 1.0).any()


def test_std_is_the_formula_by_hand(clip: FrozenCLIP) -> None:
    """T = 10 rounds, epsilon 0.4, delta 1e-5, norm 10, 5 and 2 images."""
    method = method_of(clip, epsilon=0.4)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    batch = batch_of(twins.features(K, B, clip.embed_dim), LABELS, mask)
    sigma = math.sqrt(10 * 11.512925464970229) / 0.4
    assert method.noise_std(batch).tolist() == pytest.approx([sigma * 2, sigma * 5], rel=1e-6)


@pytest.mark.parametrize(
    ("shared_noise", "factor"), [("clients", 1 / 4), ("local", 1.0), ("none", 0.0)]
)
def test_noise_on_the_shared_gradient_has_its_std(
    clip: FrozenCLIP, shared_noise: str, factor: float
) -> None:
    """Measured over 300 steps of 6 x 64 numbers; `clients` divides by sqrt(16)."""
    method = method_of(clip, epsilon=0.4, shared_noise=shared_noise, clients=16)
    shared, private = twins.tensors(method, 0.01, K)
    batch = batch_for(clip)
    loss_terms = method.loss_terms(shared, private, method.encode(shared, private), batch)
    (clean,) = torch.autograd.grad(loss_terms["ce"].sum(), shared["ctx"])
    clean = clipped(clean, 10.0)
    noise = torch.stack(
        [method._shared_noise(clean, batch_for(clip, step=s)) - clean for s in range(300)]
    )
    std = float(method.noise_std(batch)[0])
    assert float(noise.std()) == pytest.approx(factor * std, rel=0.01, abs=1e-6)
    assert abs(float(noise.mean())) < 0.01 * std


def test_noise_depends_on_client_round_and_step_and_not_on_the_block(clip: FrozenCLIP) -> None:
    method = method_of(clip, epsilon=0.4)
    shared, private = twins.tensors(method, 0.01, K)
    together = gradients(method, shared, private, batch_for(clip))
    alone_batch = batch_of(twins.features(K, B, clip.embed_dim)[1:], LABELS[1:], first=1)
    s, p = ({"ctx": t["ctx"][1:]} for t in (shared, private))
    alone = gradients(method, s, p, alone_batch)
    for a, b in zip(together, alone, strict=True):
        twins.close(a[1:], b)
    for other in ({"server_round": 2}, {"step": 1}, {"first": 5}):
        changed = gradients(method, shared, private, batch_for(clip, **other))
        for a, b in zip(together, changed, strict=True):
            assert float((a - b).abs().max()) > 0.1 * float(a.abs().max())


def test_one_step_of_all_clients_is_the_papers_server_step(clip: FrozenCLIP) -> None:
    """Mean of G - lr g_G over N clients: G - lr (mean of clipped gradients + noise of std / N)."""
    n, lr = 40, 0.1
    method = method_of(clip, epsilon=0.4, clients=n)
    quiet = method_of(clip, epsilon=1e9, clients=n)
    shared, private = twins.tensors(method, 0.01, n)
    shared = {"ctx": shared["ctx"].detach()[:1].repeat(n, 1, 1).requires_grad_()}
    labels = torch.arange(n * B).reshape(n, B) % 6
    batch = batch_of(twins.features(n, B, clip.embed_dim), labels)
    noisy, clean = (gradients(m, shared, private, batch)[0] for m in (method, quiet))
    twins.close(clean, clipped(_exact(quiet, shared, private, batch), 10.0))
    averaged = (shared["ctx"].detach() - lr * noisy).mean(0)
    server = shared["ctx"].detach()[0] - lr * clean.mean(0)
    noise = (server - averaged) / lr
    expected = float(method.noise_std(batch)[0]) / n
    assert float(noise.std()) == pytest.approx(expected, rel=0.1)  # 384 numbers


def _exact(method: DPFPL, shared: Tensors, private: Tensors, batch: Batch) -> Tensor:
    ce = method.loss_terms(shared, private, method.encode(shared, private), batch)["ce"]
    return torch.autograd.grad(ce.sum(), shared["ctx"])[0]


def test_the_prompt_does_not_depend_on_the_rank_and_g_alone_is_the_global_model(
    clip: FrozenCLIP,
) -> None:
    low, high = method_of(clip, rank=1), method_of(clip, rank=M)
    shared, private = twins.tensors(low, 0.01, K)
    assert torch.equal(
        low.encode(shared, private)["classes"], high.encode(shared, private)["classes"]
    )
    alone = low.encode({"ctx": shared["ctx"][:1]}, None)["classes"][0]
    twins.close(alone, twins.class_features(clip, shared["ctx"][0]))
    assert uploaded_numbers(low) == M * shared["ctx"].shape[-1]
    assert dict(low.config.default_strategy)["weights"] == "uniform"


@pytest.mark.parametrize(
    "options", [{"rank": M + 1}, {"epsilon": 0.0}, {"delta": 1.0}, {"shared_noise": "server"}]
)
def test_meaningless_choices_are_refused(clip: FrozenCLIP, options: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        method_of(clip, **options)
