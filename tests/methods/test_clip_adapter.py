"""CLIP-Adapter against the network written as torch modules, on un-normalised features."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.data.features.inputs import Inputs
from fedprompt.errors import UserError
from fedprompt.methods.base import Task, uploaded_numbers
from tests.support import twins
from tests.support.builders import CLASS_NAMES, batch_of

K, B = 2, 5
LABELS = torch.tensor([[0, 1, 1, 5, 2], [3, 3, 4, 0, 1]])


def twin(clip: FrozenCLIP, down: Tensor, up: Tensor, raw_BD: Tensor, ratio: float) -> Tensor:
    """Logits of one client, features as the image tower gives them."""
    width = raw_BD.shape[-1]
    net = nn.Sequential(
        nn.Linear(width, width // 4, bias=False),
        nn.ReLU(),
        nn.Linear(width // 4, width, bias=False),
        nn.ReLU(),
    )
    adapted = torch.func.functional_call(net, {"0.weight": down, "2.weight": up}, (raw_BD,))
    mixed = ratio * adapted + (1 - ratio) * raw_BD
    text = clip.encode_text_raw([f"a photo of a {name}." for name in CLASS_NAMES])
    mixed = mixed / mixed.norm(dim=-1, keepdim=True)
    text = text / text.norm(dim=-1, keepdim=True)
    return clip.model.logit_scale.exp() * mixed @ text.t()


@pytest.mark.parametrize("ratio", [0.2, 0.7])
def test_logits_loss_and_gradients(clip: FrozenCLIP, ratio: float) -> None:
    method = twins.build(clip, "clip_adapter", ratio=ratio)
    shared, _ = twins.tensors(method, 0.3, K)
    raw = twins.draw(K, B, clip.embed_dim) * torch.tensor([0.3, 7.0])[:, None, None]
    batch = batch_of(F.normalize(raw, dim=-1), LABELS)
    encoded = method.encode(shared, {})
    logits = method.logits(encoded, batch.inputs)
    loss_terms = method.loss_terms(shared, {}, encoded, batch)
    found = method.gradients(loss_terms, {f"shared.{n}": t for n, t in shared.items()}, batch)
    for k in range(K):
        down, up = (
            shared[f"adapter.{n}.weight"][k].detach().requires_grad_() for n in ("down", "up")
        )
        expected = twin(clip, down, up, raw[k], ratio)
        twins.close(logits[k], expected)
        loss = F.cross_entropy(expected, LABELS[k])
        assert loss_terms["ce"][k].item() == pytest.approx(loss.item(), rel=1e-4)
        for name, grad in zip(("down", "up"), torch.autograd.grad(loss, [down, up]), strict=True):
            ours = found[f"shared.adapter.{name}.weight"]
            assert ours is not None
            twins.close(ours[k], grad)


def test_ratio_zero_is_zero_shot(clip: FrozenCLIP) -> None:
    method, zero_shot = twins.build(clip, "clip_adapter", ratio=0.0), twins.build(clip, "zero_shot")
    shared = {n: t[None] for n, t in method.init_shared(1).items()}
    inputs = Inputs(twins.features(1, B, clip.embed_dim))
    ours = method.logits(method.encode(shared, None), inputs)
    twins.close(ours, zero_shot.logits(zero_shot.encode({}, None), inputs))


def test_upload_at_512_is_131072_numbers() -> None:
    method = twins.build(shape_only_clip("ViT-B-32"), "clip_adapter")
    assert {n: tuple(t.shape) for n, t in method.init_shared(1).items()} == {
        "adapter.down.weight": (128, 512),
        "adapter.up.weight": (512, 128),
    }
    assert uploaded_numbers(method) == 131_072
    assert method.init_private(1, 0) == {}


def test_the_adapter_is_no_matrix_of_class_embeddings(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "clip_adapter")
    shared = {n: t[None] for n, t in method.init_shared(1).items()}
    assert method.class_embeddings(method.encode(shared, None)) is None


@pytest.mark.parametrize("name", ["clip_adapter", "fedclip", "tip_adapter"])
def test_underscores_in_class_names_are_spaces(clip: FrozenCLIP, name: str) -> None:
    written, read = (Task(("river", c)) for c in ("dense_residential", "dense residential"))
    ours, theirs = (
        twins.build(clip, name, task).encode({}, None)["classes"] for task in (written, read)
    )
    assert torch.equal(ours, theirs)


def test_own_template_and_bad_ones(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "clip_adapter", template="a satellite photo of {}.")
    classes = method.encode({}, None)["classes"][0]
    text = clip.encode_text_raw([f"a satellite photo of {name}." for name in CLASS_NAMES])
    twins.close(classes, F.normalize(text, dim=-1))
    for template in ("a photo", "a {} and a {}", "a {name}"):
        with pytest.raises(UserError, match="template"):
            twins.build(clip, "clip_adapter", template=template)
    with pytest.raises(UserError, match="ratio"):
        twins.build(clip, "clip_adapter", ratio=1.5)
