"""AD-CLIP: a twin image by image, the domains' means through FedAvg, and who stands for whom."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.data.features.inputs import Inputs
from fedprompt.errors import UserError
from fedprompt.methods.base import UNLABELLED, Batch, ClientData, Method, Tensors, uploaded_numbers
from tests.support import twins
from tests.support.builders import random_resnet_clip
from tests.support.twins import K


def half_labelled(clip: FrozenCLIP) -> Batch:
    """Client 0 has labels, client 1 none, client 2 some."""
    batch = twins.batch(clip, statistics=True)
    labels = batch.labels_KB.clone()
    labels[1] = UNLABELLED
    labels[2, 1:3] = UNLABELLED
    return replace(batch, labels_KB=labels)


def tensors(clip: FrozenCLIP, method: Method) -> tuple[Tensors, Tensors]:
    """Both domains are known."""
    shared, private = twins.tensors(method, 0.02)
    seen = torch.tensor([0.75, 0.25]).expand(K, 2)
    means = twins.style_statistics(clip, K, 2, seed=8)
    return shared | {"seen": seen, "styles": means * seen[..., None, None, None]}, private


def plain_styles(own: Tensors, statistics_L2w: Tensor, names: tuple[str, str]) -> list[Tensor]:
    """Two linear layers of every layer; the mapping has a ReLU between them."""
    tokens = []
    for layer, (mean, deviation) in enumerate(statistics_L2w):
        x = (mean + deviation) / 2
        for i, name in enumerate(names):
            x = F.linear(x, own[f"{name}.weight"][layer], own[f"{name}.bias"][layer])
            x = x.relu() if name == "map.0" and i == 0 else x
        tokens.append(x)
    return tokens


def plain_classes(
    clip: FrozenCLIP, own: Tensors, source: Tensor, target: Tensor, image: Tensor
) -> Tensor:
    """Class features (C, D) of a prompt of 2 L + 4 tokens."""
    rows = [
        F.linear(mean, own["content.weight"][layer], own["content.bias"][layer])
        for layer, (mean, _) in enumerate(image)
    ]
    q = own["mix.bias"] + sum(w * x for w, x in zip(own["mix.weight"][0], rows, strict=True))
    names = ("style.0", "style.1")
    tokens = [*plain_styles(own, source, names), *plain_styles(own, target, names), q, q, q, q]
    return twins.class_features(clip, torch.stack(tokens))


def test_twin(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "adclip")
    (shared, private), batch = tensors(clip, method), half_labelled(clip)
    terms = twins.loss_of(method, shared, private, batch)
    trained = {n: t for n, t in shared.items() if t.requires_grad}
    ours = dict(zip(trained, twins.gradients(terms, list(trained.values())), strict=True))
    assert set(trained) == set(shared) - {"seen", "styles"}
    for k in range(K):
        own = {n: t[k].detach().requires_grad_(n in trained) for n, t in shared.items()}
        means = [own["styles"][d] / own["seen"][d] for d in (0, 1)]
        real = batch.mask_KB[k]
        found: dict[str, list[Tensor]] = {n: [] for n in ("ce", "align", "style", "entropy")}
        for v, image, label in zip(
            batch.inputs.features[k][real], batch.inputs.statistics[k][real],
            batch.labels_KB[k][real], strict=True,
        ):  # fmt: skip
            labelled = int(label) != UNLABELLED
            source, target = (image, means[1]) if labelled else (means[0], image)
            of_source = plain_classes(clip, own, source, target, source)
            of_target = plain_classes(clip, own, source, target, target)
            logits = clip.logit_scale * (of_source if labelled else of_target) @ v
            if labelled:
                found["ce"].append(F.cross_entropy(logits, label))
                mapped = torch.stack(plain_styles(own, source, ("map.0", "map.1")))
                tokens = torch.stack(plain_styles(own, source, ("style.0", "style.1")))
                found["style"].append(0.1 * F.mse_loss(tokens, mapped))
            else:
                p = logits.softmax(0)
                found["entropy"].append(-0.01 * (p * p.log()).sum())
            found["align"].append(
                F.kl_div(of_source.log_softmax(0), of_target.softmax(0), reduction="sum")
            )
        total = torch.zeros(())
        for name, values in found.items():
            if not values:
                assert not terms[name][k]
                continue
            mean = torch.stack(values).mean()
            twins.close(terms[name][k], mean, f"{name} of client {k}")
            total = total + mean
        leaves = [own[n] for n in trained]
        theirs = torch.autograd.grad(total, leaves, allow_unused=True)
        for n, gradient in zip(trained, theirs, strict=True):
            if gradient is None:
                assert not ours[n][k].any()
            elif n == "mix.bias":  # only rounding: the layer norms of the text tower take it out
                assert float(ours[n][k].abs().max()) < 1e-5
            else:
                twins.close(ours[n][k], gradient, f"{n} of client {k}")


def test_clients_do_not_touch_each_other(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "adclip")
    (shared, private), batch = tensors(clip, method), half_labelled(clip)
    shared["mix.bias"] = shared["mix.bias"].detach()  # its gradient is rounding
    batch.labels_KB[1, 0] = 3
    twins.assert_clients_alone_agree(method, shared, private, batch)


def test_averaged_sums_are_the_means_of_both_domains(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "adclip")
    sizes, labels = (4, 2, 3), ([0, 1, 2, 3], [UNLABELLED] * 2, [1, UNLABELLED, UNLABELLED])
    images = [twins.style_statistics(clip, n, seed=n) for n in sizes]
    data = [
        ClientData(k, Inputs(torch.zeros(n, clip.embed_dim), statistics=x), torch.tensor(own))
        for k, (n, x, own) in enumerate(zip(sizes, images, labels, strict=True))
    ]
    sent = [method.shared_from_data(one) for one in data]
    assert set(sent[0]) == {"styles", "seen"}
    averaged = {
        n: sum(len(one) * s[n] for one, s in zip(data, sent, strict=True)) / sum(sizes)
        for n in sent[0]
    }
    all_labels = torch.cat([one.labels_N for one in data])
    for domain, chosen in enumerate((all_labels >= 0, all_labels < 0)):
        mean = averaged["styles"][domain] / averaged["seen"][domain]
        twins.close(mean, torch.cat(images)[chosen].mean(0))
    kept = [method.init_private_from_data({}, one, 1)["target"].item() for one in data]
    assert kept == [0, 1, 0]


def test_the_global_model_reads_images_as_the_target_does(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "adclip")
    shared, private = tensors(clip, method)
    inputs = twins.batch(clip, statistics=True).inputs
    plain = method.logits(method.encode(shared, None), inputs)
    private["target"] = torch.tensor([[0.0], [1.0], [0.0]])
    own = method.logits(method.encode(shared, private), inputs)
    assert torch.equal(own[1], plain[1])
    assert not torch.equal(own[0], plain[0])
    # Before a domain was seen, the image stands for both.
    unseen = shared | {n: torch.zeros_like(shared[n]) for n in ("seen", "styles")}
    alike = method.logits(method.encode(unseen, private), inputs)
    assert torch.equal(alike, method.logits(method.encode(unseen, None), inputs))
    assert alike.isfinite().all()


def test_upload_on_vit_b16() -> None:
    """Networks of 12 layers, and both domains' statistics with their shares."""
    style = 12 * (768 * 256 + 256 + 256 * 512 + 512)
    content = 12 * (768 * 512 + 512) + 13
    mapping = 12 * (768 * 384 + 384 + 384 * 512 + 512)
    assert style + content + mapping == 14_575_117
    method = twins.build(shape_only_clip("ViT-B-16"), "adclip")
    expected = 14_575_117 + 2 * 12 * 2 * 768 + 2
    assert uploaded_numbers(method) == expected == 14_611_983


def test_a_resnet_is_refused() -> None:
    with pytest.raises(UserError, match=r"backbone.*ViT"):
        twins.build(random_resnet_clip(), "adclip")
