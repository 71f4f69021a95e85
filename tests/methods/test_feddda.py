"""FedDDA: the sentence over 77 positions, and the gated adapters as torch modules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.data.features.inputs import Inputs
from fedprompt.errors import UserError
from fedprompt.methods import feddda
from fedprompt.methods.base import Task, Tensors, uploaded_numbers
from tests.support import twins
from tests.support.builders import CLASS_NAMES, batch_of

K, B, M = 2, 5, 4
LABELS = torch.tensor([[0, 1, 1, 5, 2], [3, 3, 4, 0, 1]])


def sentences(clip: FrozenCLIP, ours_Md: Tensor, own_Md: Tensor) -> Tensor:
    """Features of `[SOS][G] {class} with a style of [P].[EOS]`, class by class."""
    features = []
    for name in CLASS_NAMES:
        words = clip.tokenizer([f"{name} with a style of"])[0]
        length = int(words.argmax()) - 1
        full = clip.tokenizer([f"{'X ' * M}{name} with a style of {'X ' * M}".strip() + "."])
        embedded = clip.model.token_embedding(full)[0]
        parts = [
            embedded[:1],
            ours_Md,
            embedded[1 + M : 1 + M + length],
            own_Md,
            embedded[1 + 2 * M + length :],
        ]
        features.append(twins.text_pass(clip, torch.cat(parts)[None], full)[0])
    return torch.stack(features)


def twin(clip: FrozenCLIP, shared: Tensors, private: Tensors, raw_BD: Tensor) -> Tensor:
    """Logits of one client from un-normalised features."""

    def adapter(own: Tensors) -> Tensor:
        hidden = (raw_BD @ own["adapter.down.weight"].T).relu()
        return (hidden @ own["adapter.up.weight"].T).relu()

    gate = (raw_BD @ private["gate.weight"].T).softmax(dim=1)
    mixed = gate[:, 0:1] * raw_BD + gate[:, 1:2] * adapter(private) + gate[:, 2:3] * adapter(shared)
    mixed = mixed / mixed.norm(dim=-1, keepdim=True)
    text = sentences(clip, shared["ctx"], private["ctx"])
    return clip.model.logit_scale.exp() * mixed @ text.t()


def one(tensors: Tensors, k: int) -> Tensors:
    return {n: t[k].detach().requires_grad_() for n, t in tensors.items()}


def test_logits_loss_and_gradients(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "feddda", context_tokens=M)
    shared, private = twins.tensors(method, 0.2, K)
    batch = batch_of(twins.features(K, B, clip.embed_dim), LABELS)
    encoded = method.encode(shared, private)
    logits = method.logits(encoded, batch.inputs)
    loss_terms = method.loss_terms(shared, private, encoded, batch)
    named = {f"shared.{n}": t for n, t in shared.items()}
    named |= {f"private.{n}": t for n, t in private.items()}
    found = method.gradients(loss_terms, named, batch)
    for k in range(K):
        s, p = one(shared, k), one(private, k)
        expected = twin(clip, s, p, batch.inputs.features[k])
        twins.close(logits[k], expected)
        loss = F.cross_entropy(expected, LABELS[k])
        assert loss_terms["ce"][k].item() == pytest.approx(loss.item(), rel=1e-4)
        gradients = torch.autograd.grad(loss, [*s.values(), *p.values()])
        for name, theirs in zip(named, gradients, strict=True):
            ours = found[name]
            assert ours is not None
            twins.close(ours[k], theirs)


def test_lengths_of_features_reach_the_gate(
    clip: FrozenCLIP, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The public code gates by un-normalised features, and softmax is not free of scale."""
    method = twins.build(clip, "feddda", context_tokens=M)
    shared, private = twins.tensors(method, 0.2, 1)
    raw = 5 * twins.draw(1, B, clip.embed_dim)
    monkeypatch.setattr(
        feddda, "raw_features", lambda inputs: inputs.features * raw.norm(dim=-1, keepdim=True)
    )
    inputs = Inputs(F.normalize(raw, dim=-1))
    ours = method.logits(method.encode(shared, private), inputs)[0]
    twins.close(ours, twin(clip, one(shared, 0), one(private, 0), raw[0]))


def test_the_private_context_stands_behind_the_name(clip: FrozenCLIP) -> None:
    """Swapped contexts are another sentence; words between them count."""
    method = twins.build(clip, "feddda", context_tokens=M)
    shared, private = twins.tensors(method, 0.2, 1)
    classes = method.encode(shared, private)["classes"]
    swapped = method.encode({**shared, "ctx": private["ctx"]}, {**private, "ctx": shared["ctx"]})
    assert not torch.allclose(classes, swapped["classes"], atol=1e-3)
    bare = twins.build(clip, "feddda", context_tokens=M, style="")
    assert not torch.allclose(classes, bare.encode(shared, private)["classes"], atol=1e-3)


def test_shares_and_keeps_what_the_paper_does() -> None:
    method = twins.build(shape_only_clip("ViT-B-16"), "feddda")
    assert uploaded_numbers(method) == 16 * 512 + 131_072 == 139_264
    private = method.init_private(1, 0)
    assert {n: tuple(t.shape) for n, t in private.items()} == {
        "ctx": (16, 512),
        "adapter.down.weight": (128, 512),
        "adapter.up.weight": (512, 128),
        "gate.weight": (3, 512),
    }
    assert not torch.equal(private["ctx"], method.init_shared(1)["ctx"])
    assert all(torch.equal(t, method.init_private(1, 5)[n]) for n, t in private.items())
    assert not method.has_global


def test_one_shared_prompt_for_several_clients(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "feddda", context_tokens=M)
    shared, private = twins.tensors(method, 0.2, K)
    both = {n: t[:1].expand_as(t) for n, t in shared.items()}
    inputs = Inputs(twins.features(1, B, clip.embed_dim))
    few = method.logits(method.encode({n: t[:1] for n, t in shared.items()}, private), inputs)
    twins.close(few, method.logits(method.encode(both, private), inputs))
    assert few.shape == (K, B, len(CLASS_NAMES))


def test_a_name_too_long_for_both_contexts_is_refused(clip: FrozenCLIP) -> None:
    long = Task(("river", "very " * 50 + "long river"))
    with pytest.raises(UserError, match="text positions"):
        twins.build(clip, "feddda", long)
