"""FedRSCLIP in every composition and constraint, and hand-computed values of its terms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.config.fields import build
from fedprompt.errors import UserError
from fedprompt.methods.base import Batch, Method, Task, Tensors, stack, uploaded_numbers
from fedprompt.methods.registry import method_class
from fedprompt.rng import generator
from tests.support import twins
from tests.support.builders import CLASS_NAMES, batch_of

TASK = Task(CLASS_NAMES)
K, B = 3, 7

FEDRSCLIP_CELLS: list[dict[str, Any]] = [
    {"composition": c, "dpa": d, "cmfa": m}
    for c in ("two_branch", "concat", "sum")
    for d, m in (
        ("none", "none"),
        ("cosine", "none"),
        ("mse", "cosine"),
        ("kl", "contrastive"),
        ("contrastive", "contrastive"),
    )
]
FEDRSCLIP_CELLS += [
    {"prompts": p, "dpa": "none", "cmfa": m}
    for p in ("shared", "private")
    for m in ("none", "cosine")
]
FEDRSCLIP_CELLS += [{"private_tokens": 2}, {"private_tokens": 2, "composition": "concat"}]
FEDRSCLIP_CELLS += [{"composition": "attention"}]
FEDRSCLIP_CELLS += [{"private_tokens": 2, "composition": "attention", "dpa": "mse"}]


def build_method(clip: FrozenCLIP, name: str, **options: Any) -> Method:
    cls = method_class(name)
    return cls(build(cls.Config, {"name": name, **options}, "method"), clip, TASK)


def every_cell() -> list[Any]:
    """Every composition with several constraints."""
    return [pytest.param(o, id="-".join(str(v) for v in o.values())) for o in FEDRSCLIP_CELLS]


def batch(clip: FrozenCLIP, clients: int = K) -> Batch:
    draw = generator(0, "method batch")
    features = torch.from_numpy(draw.standard_normal((clients, B, clip.embed_dim))).float()
    labels = torch.from_numpy(draw.integers(0, 3, (clients, B)))  # classes repeat in a batch
    mask = torch.ones(clients, B, dtype=torch.bool)
    mask[1, 4:] = False
    return batch_of(F.normalize(features, dim=-1), labels, mask)


def prompts(method: Method, clients: int = K) -> tuple[Tensors, Tensors]:
    """Different shared and private tensors for every client, as leaves."""
    shared = stack([method.init_shared(k) for k in range(clients)])
    private = stack([method.init_private(1, k) for k in range(clients)])
    for tensors in (shared, private):
        for n, t in tensors.items():
            tensors[n] = (t + 0.01 * torch.randn(t.shape, generator=_seeded(n))).requires_grad_()
    return shared, private


def _seeded(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(len(name))


def rows(tensors: Tensors, k: int) -> Tensors:
    return {n: t.detach()[k : k + 1].requires_grad_() for n, t in tensors.items()}


@pytest.mark.parametrize("options", every_cell())
class TestContract:
    def test_shapes_and_finite_terms(self, clip: FrozenCLIP, options: dict[str, Any]) -> None:
        method, data = build_method(clip, "fedrsclip", **options), batch(clip)
        shared, private = prompts(method)
        encoded = method.encode(shared, private)
        logits = method.logits(encoded, data.inputs)
        assert logits.shape == (K, B, len(CLASS_NAMES))
        loss_terms = method.loss_terms(shared, private, encoded, data)
        for value in loss_terms.values():
            assert value.shape == (K,)
            assert torch.isfinite(value).all()

    def test_gradients_reach_every_prompt_and_no_weight(
        self, clip: FrozenCLIP, options: dict[str, Any]
    ) -> None:
        method, data = build_method(clip, "fedrsclip", **options), batch(clip)
        shared, private = prompts(method)
        leaves = [*shared.values(), *private.values()]
        assert bool(leaves) == method.trainable
        if not leaves:
            return
        loss_terms = method.loss_terms(shared, private, method.encode(shared, private), data)
        torch.stack(list(loss_terms.values())).sum().backward()
        for leaf in leaves:
            assert leaf.grad is not None
            assert torch.isfinite(leaf.grad).all()
            assert (leaf.grad.flatten(1).abs().amax(1) > 0).all()
        assert all(p.grad is None for p in clip.model.parameters())

    def test_clients_do_not_touch_each_other(
        self, clip: FrozenCLIP, options: dict[str, Any]
    ) -> None:
        """K clients at once have the losses and gradients of each client alone."""
        method, data = build_method(clip, "fedrsclip", **options), batch(clip)
        shared, private = prompts(method)
        together = method.loss_terms(shared, private, method.encode(shared, private), data)
        leaves = [*shared.values(), *private.values()]
        gradients = _gradients(together, leaves)
        for k in range(K):
            s, p = rows(shared, k), rows(private, k)
            one = batch_of(
                data.inputs.features[k : k + 1], data.labels_KB[k : k + 1], data.mask_KB[k : k + 1]
            )
            alone = method.loss_terms(s, p, method.encode(s, p), one)
            for term, value in alone.items():
                assert together[term][k].item() == pytest.approx(
                    value[0].item(), rel=1e-4, abs=1e-6
                )
            for ours, theirs in zip(
                gradients, _gradients(alone, [*s.values(), *p.values()]), strict=True
            ):
                scale = float(theirs.abs().max())
                assert (ours[k] - theirs[0]).abs().max() <= 1e-4 * scale + 1e-8

    def test_padding_changes_nothing(self, clip: FrozenCLIP, options: dict[str, Any]) -> None:
        method, data = build_method(clip, "fedrsclip", **options), batch(clip)
        shared, private = prompts(method)
        s, p = rows(shared, 1), rows(private, 1)
        padded = batch_of(data.inputs.features[1:2], data.labels_KB[1:2], data.mask_KB[1:2])
        cut = batch_of(
            data.inputs.features[1:2, :4], data.labels_KB[1:2, :4], data.mask_KB[1:2, :4]
        )
        with_padding = method.loss_terms(s, p, method.encode(s, p), padded)
        without = method.loss_terms(s, p, method.encode(s, p), cut)
        for term, value in without.items():
            assert with_padding[term].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6)

    def test_global_model_or_none(self, clip: FrozenCLIP, options: dict[str, Any]) -> None:
        method = build_method(clip, "fedrsclip", **options)
        if not method.has_global:
            return
        encoded = method.encode({n: t[None] for n, t in method.init_shared(1).items()}, None)
        inputs = batch(clip).inputs[:1]
        assert method.logits(encoded, inputs).shape == (1, B, len(CLASS_NAMES))

    def test_starts_are_seeded(self, clip: FrozenCLIP, options: dict[str, Any]) -> None:
        method = build_method(clip, "fedrsclip", **options)
        for tensors in (method.init_shared, lambda s: method.init_private(s, 2)):
            for n, value in tensors(1).items():
                assert value.dtype == torch.float32
                assert torch.equal(value, tensors(1)[n])
                if value.any():
                    assert not torch.equal(value, tensors(2)[n])


def _gradients(loss_terms: dict[str, Tensor], leaves: list[Tensor]) -> list[Tensor]:
    if not leaves:
        return []
    return list(torch.autograd.grad(torch.stack(list(loss_terms.values())).sum(), leaves))


def test_default_upload_of_fedrsclip_is_exactly_2048_numbers() -> None:
    """Four shared tokens of width 512 on ViT-B/16, as the paper's abstract material says."""
    method = build_method(shape_only_clip("ViT-B-16"), "fedrsclip")
    assert uploaded_numbers(method) == 4 * 512 == 2048
    assert {n: tuple(t.shape) for n, t in method.init_shared(1).items()} == {"ctx": (4, 512)}
    assert {n: tuple(t.shape) for n, t in method.init_private(1, 0).items()} == {"ctx": (4, 512)}


def test_private_starts_differ_between_clients_and_coop_local_starts_do_not(
    clip: FrozenCLIP,
) -> None:
    dual = build_method(clip, "fedrsclip")
    assert not torch.equal(dual.init_private(1, 0)["ctx"], dual.init_private(1, 1)["ctx"])
    alone = build_method(clip, "coop_local")
    assert torch.equal(alone.init_private(1, 0)["ctx"], alone.init_private(1, 1)["ctx"])


def test_compositions_by_hand(clip: FrozenCLIP) -> None:
    s, p = prompts(build_method(clip, "fedrsclip"))

    def classes(context: Tensor) -> Tensor:
        source = build_method(clip, "promptfl", context_tokens=context.shape[-2])
        return source.encode({"ctx": context}, {})["classes"]

    def ours(**options: Any) -> Tensor:
        return build_method(clip, "fedrsclip", **options).encode(s, p)["classes"]

    mixed = 0.7 * classes(s["ctx"]) + 0.3 * classes(p["ctx"])
    assert torch.allclose(ours(theta=0.3), mixed, atol=1e-5)
    joined = classes(torch.cat([s["ctx"], p["ctx"]], dim=1))
    assert torch.allclose(ours(composition="concat"), joined, atol=1e-5)
    added = classes(s["ctx"] + p["ctx"])
    assert torch.allclose(ours(composition="sum"), added, atol=1e-5)
    found = [
        classes(twins.cross_attended(own_s, own_p)[None])
        for own_s, own_p in zip(s["ctx"], p["ctx"], strict=True)
    ]
    assert torch.allclose(ours(composition="attention"), torch.cat(found), atol=1e-5)


def test_dpa_forms_by_hand(clip: FrozenCLIP) -> None:
    data = batch(clip)
    s, p = prompts(build_method(clip, "fedrsclip"))
    plain = build_method(clip, "promptfl", context_tokens=4)
    t_s = plain.encode({"ctx": s["ctx"]}, {})["classes"]
    t_p = plain.encode({"ctx": p["ctx"]}, {})["classes"]

    def dpa(form: str, **options: Any) -> Tensor:
        method = build_method(clip, "fedrsclip", dpa=form, dpa_weight=1.0, cmfa="none", **options)
        return method.loss_terms(s, p, method.encode(s, p), data)["dpa"]

    for k in range(K):
        cosines = [
            float(F.cosine_similarity(a, b, dim=0)) for a, b in zip(t_s[k], t_p[k], strict=True)
        ]
        assert dpa("cosine")[k].item() == pytest.approx(1 - sum(cosines) / 6, abs=1e-5)
        squares = ((s["ctx"][k] - p["ctx"][k]) ** 2).mean()
        assert dpa("mse")[k].item() == pytest.approx(squares.item(), rel=1e-5)
        kl = 0.0
        real = int(data.mask_KB[k].sum())
        for i in range(real):
            q_s = (clip.logit_scale * data.inputs.features[k, i] @ t_s[k].T).softmax(-1)
            q_p = (clip.logit_scale * data.inputs.features[k, i] @ t_p[k].T).softmax(-1)
            kl += float((q_s * (q_s / q_p).log()).sum()) / real
        assert dpa("kl")[k].item() == pytest.approx(kl, rel=1e-3)
        nce = 0.0
        for c in range(6):
            row = [math.exp(float(t_s[k, c] @ t_p[k, j]) / 0.07) for j in range(6)]
            column = [math.exp(float(t_s[k, j] @ t_p[k, c]) / 0.07) for j in range(6)]
            nce -= (math.log(row[c] / sum(row)) + math.log(row[c] / sum(column))) / 12
        assert dpa("contrastive")[k].item() == pytest.approx(nce, rel=1e-4)
    assert torch.allclose(dpa("cosine", dpa_stop_gradient=True), dpa("cosine"))


def test_dpa_stop_gradient_moves_only_the_private_prompt(clip: FrozenCLIP) -> None:
    for form in ("cosine", "mse", "kl", "contrastive"):
        method = build_method(clip, "fedrsclip", dpa=form, cmfa="none", dpa_stop_gradient=True)
        s, p = prompts(method)
        dpa = method.loss_terms(s, p, method.encode(s, p), batch(clip))["dpa"]
        shared, private = torch.autograd.grad(dpa.sum(), [s["ctx"], p["ctx"]], allow_unused=True)
        assert shared is None or not shared.any()
        assert private.any()


@pytest.mark.parametrize("branch", ["shared", "private", "both"])
def test_cmfa_forms_by_hand(clip: FrozenCLIP, branch: str) -> None:
    """Several positives per class: all pairs of one class count, not the diagonal alone."""
    data = batch(clip)
    s, p = prompts(build_method(clip, "fedrsclip"))
    plain = build_method(clip, "promptfl", context_tokens=4)
    sides = {
        "shared": plain.encode({"ctx": s["ctx"]}, {})["classes"],
        "private": plain.encode({"ctx": p["ctx"]}, {})["classes"],
    }
    chosen = list(sides.values()) if branch == "both" else [sides[branch]]

    def cmfa(form: str) -> Tensor:
        method = build_method(
            clip,
            "fedrsclip",
            dpa="none",
            cmfa=form,
            cmfa_weight=1.0,
            cmfa_branch=branch,
            cmfa_temperature=0.1,
        )
        return method.loss_terms(s, p, method.encode(s, p), data)["cmfa"]

    for k in range(K):
        n = int(data.mask_KB[k].sum())
        v, y = data.inputs.features[k, :n], data.labels_KB[k, :n].tolist()
        cosine = nce = 0.0
        for classes in chosen:
            t = classes[k][torch.tensor(y)]
            cosine += float(1 - (v * t).sum(-1).mean()) / len(chosen)
            e = ((v @ t.T) / 0.1).exp()
            for i in range(n):
                positives = [j for j in range(n) if y[j] == y[i]]
                for j in positives:
                    to_text = math.log(float(e[i, j] / e[i].sum()))
                    to_image = math.log(float(e[j, i] / e[:, i].sum()))
                    nce -= (to_text + to_image) / (2 * n * len(positives) * len(chosen))
        assert cmfa("cosine")[k].item() == pytest.approx(cosine, abs=1e-5)
        assert cmfa("contrastive")[k].item() == pytest.approx(nce, rel=1e-4)


def test_weights_scale_their_terms(clip: FrozenCLIP) -> None:
    one = build_method(clip, "fedrsclip", dpa_weight=1.0, cmfa_weight=1.0)
    two = build_method(clip, "fedrsclip", dpa_weight=2.0, cmfa_weight=0.5)
    s, p = prompts(one)
    a, b = (m.loss_terms(s, p, m.encode(s, p), batch(clip)) for m in (one, two))
    assert torch.allclose(b["dpa"], 2 * a["dpa"])
    assert torch.allclose(b["cmfa"], 0.5 * a["cmfa"])
    assert torch.equal(a["ce"], b["ce"])


@pytest.mark.parametrize(
    "options",
    [
        {"prompts": "shared"},
        {"prompts": "private", "dpa": "none", "cmfa_branch": "shared"},
        {"private_tokens": 2, "composition": "sum"},
        {"private_tokens": 2, "dpa": "mse"},
        {"theta": 1.5},
        {"dpa": "euclid"},
        {"cmfa_weight": -1.0},
    ],
)
def test_meaningless_choices_are_refused(clip: FrozenCLIP, options: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        build_method(clip, "fedrsclip", **options)
