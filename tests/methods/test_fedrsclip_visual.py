"""FedRSCLIP's image prompts: both readings, every composition, against values made by hand."""

from __future__ import annotations

import math
from dataclasses import replace
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
from tests.support import twins
from tests.support.builders import CLASS_NAMES, batch_of, random_clip

K, B, THETA = 2, 5, 0.3
COMPOSITIONS = ("two_branch", "concat", "sum", "attention")


@pytest.fixture(scope="module")
def deep_clip() -> FrozenCLIP:
    return random_clip(vision_cfg={"layers": 3})


def make(clip: FrozenCLIP, **options: Any) -> Method:
    cls = method_class("fedrsclip")
    config = build(cls.Config, {"name": "fedrsclip", **options}, "method")
    return cls(config, clip, Task(CLASS_NAMES))


def some_batch(clip: FrozenCLIP) -> Batch:
    labels = torch.tensor([[0, 1, 2, 3, 3], [5, 4, 0, 0, 1]])
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    return batch_of(twins.pictures(clip, K, B), labels, mask)


def leaves_of(method: Method) -> tuple[Tensors, Tensors]:
    return twins.moved(method.init_shared(1), K, 1), twins.moved(method.init_private(1, 0), K, 2)


class ByHand:
    """One client's features from plain passes: text and image, shared and private."""

    def __init__(
        self, clip: FrozenCLIP, shared: Tensors, private: Tensors, batch: Batch, k: int
    ) -> None:
        self.clip, real = clip, int(batch.mask_KB[k].sum())
        assert batch.inputs.pixels is not None
        self.pixels, self.labels = batch.inputs.pixels[k, :real], batch.labels_KB[k, :real]
        self.s, self.p = ({n: t[k] for n, t in c.items()} for c in (shared, private))

    def text(self, context: Tensor) -> Tensor:
        return twins.plain_text(self.clip, " ".join(["X"] * len(context)), [context])

    def images(self, prompts: Tensor | None) -> Tensor:
        return twins.plain_images(self.clip, self.pixels, [] if prompts is None else list(prompts))

    def logits(self, images: Tensor, classes: Tensor) -> Tensor:
        return self.clip.logit_scale * images @ classes.T

    def composed(self, composition: str) -> Tensor:
        """Logits of both text and both image prompts."""
        s, p, vs, vp = self.s["ctx"], self.p["ctx"], self.s["visual"], self.p["visual"]
        if composition == "concat":
            classes = self.text(torch.cat([s, p]))
            return self.logits(self.images(torch.cat([vs, vp], dim=1)), classes)
        if composition == "sum":
            return self.logits(self.images(vs + vp), self.text(s + p))
        if composition == "attention":
            images = torch.stack([twins.cross_attended(a, b) for a, b in zip(vs, vp, strict=True)])
            return self.logits(self.images(images), self.text(twins.cross_attended(s, p)))
        classes = (1 - THETA) * self.text(s) + THETA * self.text(p)
        return self.logits((1 - THETA) * self.images(vs) + THETA * self.images(vp), classes)


@pytest.mark.parametrize("composition", COMPOSITIONS)
@pytest.mark.parametrize("depth", [1, 2])
def test_both_image_prompts_compose_as_the_text_prompts_do(
    deep_clip: FrozenCLIP, composition: str, depth: int
) -> None:
    method = make(
        deep_clip,
        visual="both",
        visual_depth=depth,
        visual_tokens=3,
        composition=composition,
        theta=THETA,
        dpa="none",
        cmfa="none",
    )
    (shared, private), batch = leaves_of(method), some_batch(deep_clip)
    ce = method.loss_terms(shared, private, method.encode(shared, private), batch)["ce"]
    leaves = [*shared.values(), *private.values()]
    ours = torch.autograd.grad(ce.sum(), leaves)
    for k in range(K):
        hand = ByHand(deep_clip, shared, private, batch, k)
        loss = F.cross_entropy(hand.composed(composition), hand.labels)
        assert ce[k].item() == pytest.approx(loss.item(), rel=1e-4)
        for a, b in zip(ours, torch.autograd.grad(loss, leaves), strict=True):
            twins.close(a[k], b[k])


@pytest.mark.parametrize("visual", ["shared", "private"])
@pytest.mark.parametrize("prompts", ["both", "shared"])
def test_one_kind_prompts_every_image(deep_clip: FrozenCLIP, visual: str, prompts: str) -> None:
    method = make(deep_clip, visual=visual, prompts=prompts, dpa="none", theta=THETA)
    (shared, private), batch = leaves_of(method), some_batch(deep_clip)
    assert ("visual" in shared) == (visual == "shared")
    assert ("visual" in private) == (visual == "private")
    logits = method.logits(method.encode(shared, private), batch.inputs)
    hand = ByHand(deep_clip, shared, private, batch, 0)
    classes = hand.text(hand.s["ctx"])
    if prompts == "both":
        classes = (1 - THETA) * classes + THETA * hand.text(hand.p["ctx"])
    images = hand.images((hand.s | hand.p)["visual"])
    twins.close(logits[0], hand.logits(images, classes))


@pytest.mark.parametrize("visual", ["none", "shared", "private", "both"])
def test_the_global_model_knows_nothing_private(deep_clip: FrozenCLIP, visual: str) -> None:
    method, inputs = make(deep_clip, visual=visual), twins.pictures(deep_clip, 1, B)
    shared = twins.moved(method.init_shared(1), 1, 1)
    encoded = method.encode(shared, None)
    assert inputs.pixels is not None
    prompts = list(shared["visual"][0]) if "visual" in shared else []
    images = twins.plain_images(deep_clip, inputs.pixels[0], prompts)
    classes = twins.plain_text(deep_clip, "X X X X", [shared["ctx"][0]])
    twins.close(method.logits(encoded, inputs)[0], deep_clip.logit_scale * images @ classes.T)
    assert (method.class_embeddings(encoded) is None) == ("visual" in shared)


def test_dpa_forms_with_two_image_prompts(deep_clip: FrozenCLIP) -> None:
    """Each but `kl` is the mean of a text part and an image part; `kl` sees both at once."""
    batch = some_batch(deep_clip)
    shared, private = leaves_of(make(deep_clip, visual="both"))

    def dpa(form: str, **options: Any) -> Tensor:
        method = make(deep_clip, visual="both", dpa=form, dpa_weight=1.0, cmfa="none", **options)
        return method.loss_terms(shared, private, method.encode(shared, private), batch)["dpa"]

    for k in range(K):
        hand = ByHand(deep_clip, shared, private, batch, k)
        ts, tp = hand.text(hand.s["ctx"]), hand.text(hand.p["ctx"])
        vs, vp = hand.images(hand.s["visual"]), hand.images(hand.p["visual"])
        cosine = 1 - ((ts * tp).sum(-1).mean() + (vs * vp).sum(-1).mean()) / 2
        assert dpa("cosine")[k].item() == pytest.approx(cosine.item(), rel=1e-4)
        squares = [F.mse_loss(hand.s[n], hand.p[n]).item() for n in ("ctx", "visual")]
        assert dpa("mse")[k].item() == pytest.approx(sum(squares) / 2, rel=1e-5)
        log_s = hand.logits(vs, ts).log_softmax(-1)
        log_p = hand.logits(vp, tp).log_softmax(-1)
        kl = F.kl_div(log_p, log_s, log_target=True, reduction="batchmean")
        assert dpa("kl")[k].item() == pytest.approx(kl.item(), rel=1e-4)
        nce = (info_nce(ts @ tp.T) + info_nce(vs @ vp.T)) / 2
        assert dpa("contrastive")[k].item() == pytest.approx(nce, rel=1e-4)
    for form in ("cosine", "mse", "kl", "contrastive"):
        found = torch.autograd.grad(
            dpa(form, dpa_stop_gradient=True).sum(),
            [shared["ctx"], shared["visual"], private["ctx"], private["visual"]],
            allow_unused=True,
        )
        assert all(g is None or not g.any() for g in found[:2])
        assert all(g.any() for g in found[2:])


def info_nce(cosines_NN: Tensor) -> float:
    """Symmetric, positives on the diagonal, temperature 0.07; one number at a time."""
    e = (cosines_NN.detach().double() / 0.07).exp()
    n = len(e)
    there = [math.log(float(e[i, i] / e[i].sum())) for i in range(n)]
    back = [math.log(float(e[i, i] / e[:, i].sum())) for i in range(n)]
    return -(sum(there) + sum(back)) / (2 * n)


@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_cmfa_aligns_text_with_the_prompted_images(deep_clip: FrozenCLIP, composition: str) -> None:
    """From two passes each text branch meets its own image feature; else there is one."""
    batch = some_batch(deep_clip)
    options: dict[str, Any] = {"visual": "both", "composition": composition, "dpa": "none"}
    method = make(deep_clip, cmfa="cosine", cmfa_weight=1.0, **options)
    shared, private = leaves_of(method)
    cmfa = method.loss_terms(shared, private, method.encode(shared, private), batch)["cmfa"]
    for k in range(K):
        hand = ByHand(deep_clip, shared, private, batch, k)
        s, p, vs, vp = hand.s["ctx"], hand.p["ctx"], hand.s["visual"], hand.p["visual"]
        images = {
            "two_branch": lambda vs=vs, vp=vp, h=hand: (h.images(vs), h.images(vp)),
            "concat": lambda vs=vs, vp=vp, h=hand: (h.images(torch.cat([vs, vp], 1)),) * 2,
            "sum": lambda vs=vs, vp=vp, h=hand: (h.images(vs + vp),) * 2,
            "attention": lambda vs=vs, vp=vp, h=hand: (
                (
                    h.images(
                        torch.stack(
                            [twins.cross_attended(a, b) for a, b in zip(vs, vp, strict=True)]
                        )
                    ),
                )
                * 2
            ),
        }[composition]()
        joint = {"sum": s + p, "attention": twins.cross_attended(s, p)}.get(composition, p)
        texts = hand.text(s), hand.text(joint)
        parts = [
            1 - (v * t[hand.labels]).sum(-1).mean().item()
            for v, t in zip(images, texts, strict=True)
        ]
        assert cmfa[k].item() == pytest.approx(sum(parts) / 2, rel=1e-4)


def test_padding_changes_no_image_term(deep_clip: FrozenCLIP) -> None:
    method = make(deep_clip, visual="both", dpa="contrastive")
    (shared, private), batch = leaves_of(method), some_batch(deep_clip)
    s, p = ({n: t[1:2] for n, t in c.items()} for c in (shared, private))
    one = replace(
        batch,
        inputs=batch.inputs[1:2],
        labels_KB=batch.labels_KB[1:2],
        mask_KB=batch.mask_KB[1:2],
        round_info=replace(batch.round_info, clients=(1,)),
    )
    cut = replace(
        one,
        inputs=one.inputs[:, :3],
        labels_KB=one.labels_KB[:, :3],
        mask_KB=one.mask_KB[:, :3],
    )
    encoded = method.encode(s, p)
    padded, without = (method.loss_terms(s, p, encoded, b) for b in (one, cut))
    for name, value in without.items():
        assert padded[name].item() == pytest.approx(value.item(), rel=1e-4)


def test_one_shared_model_serves_several_private_ones(deep_clip: FrozenCLIP) -> None:
    """In evaluation the shared side has a client axis of 1."""
    inputs = twins.pictures(deep_clip, K, B)
    for composition in COMPOSITIONS:
        method = make(deep_clip, visual="both", composition=composition)
        one = twins.moved(method.init_shared(1), 1, 1)
        private = twins.moved(method.init_private(1, 0), K, 2)
        every = {n: t.expand(K, *t.shape[1:]) for n, t in one.items()}
        twins.close(
            method.logits(method.encode(one, private), inputs),
            method.logits(method.encode(every, private), inputs),
        )


def test_what_the_config_makes_it_need_and_send() -> None:
    clip = shape_only_clip("ViT-B-16")
    assert make(clip).needs == {"features"}
    sent = {"none": 2048, "private": 2048, "shared": 2048 + 4 * 768, "both": 2048 + 4 * 768}
    for visual, numbers in sent.items():
        method = make(clip, visual=visual)
        assert ("pixels" in method.needs) == (visual != "none")
        assert uploaded_numbers(method) == numbers
        assert ("visual" in method.init_private(1, 0)) == (visual in ("private", "both"))


def test_starts(deep_clip: FrozenCLIP) -> None:
    """Private image prompts differ between clients; as residuals they start at nothing."""
    method = make(deep_clip, visual="both", visual_depth=9)
    start = stack([method.init_private(1, c) for c in range(2)])["visual"]
    assert start.shape == (2, 3, 4, 64)
    assert not torch.equal(start[0], start[1])
    residual = make(deep_clip, visual="both", composition="sum")
    assert not residual.init_private(1, 0)["visual"].any()
    alone = make(deep_clip, visual="private", composition="sum")
    assert alone.init_private(1, 0)["visual"].any()


@pytest.mark.parametrize(
    "options",
    [
        {"visual": "shared", "prompts": "private", "dpa": "none"},
        {"visual": "both", "prompts": "private", "dpa": "none"},
        {"visual": "deep"},
        {"visual": "shared", "visual_tokens": 0},
        {"visual": "shared", "visual_depth": 0},
    ],
)
def test_meaningless_choices_are_refused(clip: FrozenCLIP, options: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        make(clip, **options)
