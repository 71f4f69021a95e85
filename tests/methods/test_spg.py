"""SPG: a plain GAN as the twin, its two sides apart, and prediction without chance."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.methods.base import Tensors, uploaded_numbers
from tests.support import twins
from tests.support.twins import K


def plain_generator(own: Tensors, x: Tensor) -> Tensor:
    for i in range(4):
        x = F.linear(x, own[f"g.{i}.weight"], own[f"g.{i}.bias"])
        if i:
            scale, shift = own[f"g.norm{i}.weight"], own[f"g.norm{i}.bias"]
            x = F.layer_norm(x, x.shape[-1:], scale, shift)
        x = F.leaky_relu(x, 0.2)
    return torch.tanh(F.linear(x, own["g.4.weight"], own["g.4.bias"]))


def plain_judge(own: Tensors, x: Tensor) -> Tensor:
    for i in range(3):
        x = F.leaky_relu(F.linear(x, own[f"d.{i}.weight"], own[f"d.{i}.bias"]), 0.2)
    return F.linear(x, own["d.3.weight"], own["d.3.bias"])[:, 0]


def test_twin(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "spg", dropout=0, latent=3, context_tokens=2, context_init=None)
    shared, private = twins.tensors(method, 0.02)
    batch = twins.batch(clip)
    terms = twins.loss_of(method, shared, private, batch)
    leaf_of = shared | private
    ours = torch.autograd.grad(sum(t.sum() for t in terms.values()), list(leaf_of.values()))
    z_KBZ = batch.normal((batch.labels_KB.shape[1], 3), "z")
    for k in range(K):
        own = {n: t[k].detach().requires_grad_() for n, t in leaf_of.items()}
        images, labels = twins.images_of(batch, k)
        ce = F.cross_entropy(
            clip.logit_scale * images @ twins.class_features(clip, own["label"]).T, labels
        )
        made = plain_generator(own, torch.cat([z_KBZ[k, : len(images)], images], -1))
        label = own["label"].flatten().expand(len(images), -1)
        ones, zeros, square = torch.ones(len(images)), torch.zeros(len(images)), nn.MSELoss()
        real = square(plain_judge(own, torch.cat([label.detach(), images], -1)), ones)
        fake = square(plain_judge(own, torch.cat([made.detach(), images], -1)), zeros)
        passed = square(plain_judge(own, torch.cat([made, images], -1)), ones)
        for name, value in (("ce", ce), ("discriminator", real + fake), ("generator", passed)):
            twins.close(terms[name][k], value, name)
        # D's own loss for D, G's own loss for G.
        of_d = [n for n in own if n.startswith("d.")]
        theirs = dict(
            zip(of_d, torch.autograd.grad(real + fake, [own[n] for n in of_d]), strict=True)
        )
        of_g = [n for n in own if n.startswith("g.")]
        theirs |= dict(zip(of_g, torch.autograd.grad(passed, [own[n] for n in of_g]), strict=True))
        theirs["label"] = torch.autograd.grad(ce, own["label"])[0]
        for n, found in zip(leaf_of, ours, strict=True):
            twins.close(found[k], theirs[n], n)


def test_prediction_averages_the_contexts_of_fixed_draws(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "spg", draws=3)
    shared = {n: t[None] for n, t in method.init_shared(1).items()}
    images = twins.batch(clip).inputs[:1]
    found = method.logits(method.encode(shared, None), images)[0]
    own = {n: t[0] for n, t in shared.items()}
    for row, v in zip(found, images.features[0], strict=True):
        drawn = [plain_generator(own, torch.cat([z, v])) for z in method.fixed_SZ]  # type: ignore[attr-defined]
        context = torch.stack(drawn).mean(0).view(4, -1)
        twins.close(row, clip.logit_scale * twins.class_features(clip, context) @ v)


def test_gradients_are_clipped_tensor_by_tensor(clip: FrozenCLIP) -> None:
    free = twins.build(clip, "spg", clip_generator=1e6, clip_discriminator=1e6)
    method = twins.build(clip, "spg", clip_generator=0.02, clip_discriminator=0.3)
    shared, private = twins.tensors(method, 0.02)
    batch = twins.batch(clip)
    leaves = {f"shared.{n}": t for n, t in shared.items()}
    leaves |= {f"private.{n}": t for n, t in private.items()}
    ours, theirs = (
        m.gradients(twins.loss_of(m, shared, private, batch), leaves, batch) for m in (method, free)
    )
    clipped = 0
    for name, found in ours.items():
        other = theirs[name]
        assert found is not None
        assert other is not None
        limit = {"shared.g": 0.02, "private.d": 0.3}.get(name[: name.index(".") + 2], torch.inf)
        for k in range(K):
            size = float(other[k].norm())
            twins.close(found[k], other[k] * min(1.0, limit / size))
            clipped += size > limit
    assert 0 < clipped < len(leaves) * K


def test_dropout_is_drawn_anew_for_each_use_and_step(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "spg")
    shared, private = twins.tensors(method, 0.02)
    first, again, later = (
        twins.loss_of(method, shared, private, twins.batch(clip, step=step)) for step in (0, 0, 1)
    )
    assert torch.equal(first["discriminator"], again["discriminator"])
    assert not torch.equal(first["discriminator"], later["discriminator"])
    whole = twins.build(clip, "spg", dropout=0)
    free = twins.loss_of(whole, shared, private, twins.batch(clip))
    assert torch.equal(first["ce"], free["ce"])
    assert not torch.equal(first["generator"], free["generator"])


def test_upload_on_vit_b16() -> None:
    method = twins.build(shape_only_clip("ViT-B-16"), "spg")
    assert uploaded_numbers(method) == 2_871_168
    judge = {n: t for n, t in method.init_private(1, 0).items() if n.startswith("d.")}
    assert sum(t.numel() for t in judge.values()) == 1_837_057
