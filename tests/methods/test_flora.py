"""FLORA: a twin of its four terms on values and gradients, and what it uploads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.methods.base import uploaded_numbers
from tests.support import twins
from tests.support.twins import K

MU, TAU, ORTHOGONALITY, DECAY = 0.7, 0.4, 0.3, 0.2


def attention(tensors: dict[str, Tensor], width: int) -> nn.Sequential:
    layers = nn.Sequential(
        nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.Softmax(dim=1)
    )
    own = {n.removeprefix("attention."): t for n, t in tensors.items() if n != "sigma"}
    layers.load_state_dict(own)
    return layers


@pytest.mark.parametrize("gram", ["rows", "columns"])
def test_twin(clip: FrozenCLIP, gram: str) -> None:
    method = twins.build(
        clip, "flora", context_tokens=4, bottleneck=2, mu=MU, temperature=TAU, gram=gram,
        orthogonality=ORTHOGONALITY, decay=DECAY,
    )  # fmt: skip
    shared, private = twins.tensors(method, 0.3)
    batch = twins.batch(clip)
    terms = twins.loss_of(method, shared, private, batch)
    assert list(terms) == ["ce", "contrast", "orthogonality", "decay"]
    total = sum(t.sum() for t in terms.values())
    names = [*shared, *private]
    ours = torch.autograd.grad(total, twins.leaves(shared, private))
    ids = clip.tokenizer(["X X X X"])[0, 1:5]
    untuned = clip.model.token_embedding(ids).detach()
    for k in range(K):
        own = {n: t[k].detach().requires_grad_() for n, t in {**shared, **private}.items()}
        layers = attention({n: own[n] for n in shared}, clip.embed_dim)
        images, labels = twins.images_of(batch, k)
        context = own["sigma"] + own["U"] @ own["V"]
        text, of_sigma, of_zero = (
            twins.class_features(clip, c) for c in (context, own["sigma"], untuned)
        )
        seen = layers(images) * images
        logits = clip.logit_scale * F.normalize(seen, dim=-1) @ text.T
        cos = nn.CosineSimilarity(dim=-1)
        pairs = torch.stack([cos(of_zero, of_sigma), cos(of_zero, text)], dim=1) / TAU
        target = torch.zeros(len(pairs), dtype=torch.int64)
        u = own["U"] if gram == "rows" else own["U"].T
        expected = {
            "ce": F.cross_entropy(logits, labels),
            "contrast": MU * F.cross_entropy(pairs, target),
            "orthogonality": ORTHOGONALITY * torch.norm(u @ u.T - torch.eye(len(u)), p="fro"),
            "decay": DECAY * torch.norm(own["V"], p=2),
        }
        for name, value in expected.items():
            twins.close(terms[name][k], value, name)
        of_layers = dict(layers.named_parameters())
        inputs = [of_layers.get(n.removeprefix("attention."), own[n]) for n in names]
        theirs = torch.autograd.grad(sum(expected.values()), inputs)
        for name, gradient, other in zip(names, ours, theirs, strict=True):
            twins.close(gradient[k], other, name)


def test_upload_and_global_model(clip: FrozenCLIP) -> None:
    b16 = twins.build(shape_only_clip("ViT-B-16"), "flora")
    assert uploaded_numbers(b16) == 16 * 512 + 2 * (512 * 512 + 512)
    assert b16.init_private(0, 0)["U"].shape == (16, 8)
    method = twins.build(clip, "flora", context_tokens=4, bottleneck=2)
    shared, private = twins.tensors(method, 0.3)
    plain, personal = (method.encode(shared, p)["classes"] for p in (None, private))
    twins.close(
        plain, twins.build(clip, "fedpgp", context_tokens=4).encode(shared, None)["classes"]
    )
    assert not torch.allclose(plain, personal, atol=1e-3)
