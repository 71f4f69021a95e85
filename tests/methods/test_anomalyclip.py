"""AnomalyCLIP: a plain text tower with short deep prompts, the choice of regions, the score."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.errors import UserError
from fedprompt.methods.base import Tensors, uploaded_numbers
from tests.support import twins
from tests.support.twins import K

OPTIONS: dict[str, Any] = {"context_tokens": 3, "deep_tokens": 2, "depth": 2, "top_share": 0.5}


def feature(clip: FrozenCLIP, context_Md: Tensor, deep_Jmd: Tensor, words: str) -> Tensor:
    """The public code's pass: the first tokens of the context are replaced at later layers."""
    model: Any = clip.model
    tokens, deep = len(context_Md), deep_Jmd.shape[1]
    ids = clip.tokenizer([" ".join(["X"] * tokens) + f" {words}."])
    x = model.token_embedding(ids)
    x = torch.cat([x[:, :1], context_Md[None], x[:, 1 + tokens :]], 1) + model.positional_embedding
    for layer, block in enumerate(model.transformer.resblocks):
        if 0 < layer <= len(deep_Jmd):
            x = torch.cat([x[:, :1], deep_Jmd[layer - 1][None], x[:, 1 + deep :]], 1)
        x = block(x, attn_mask=model.attn_mask)
    x = model.ln_final(x)[0, int(ids.argmax())] @ model.text_projection
    return x / x.norm()


def twin(
    clip: FrozenCLIP, own: Tensors, images: Tensor, local: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities of the images, and both terms."""
    words = ("object", "damaged object")
    pair = torch.stack([feature(clip, own["ctx"][i], own["deep"], w) for i, w in enumerate(words)])
    scores = images @ pair.T / 0.07
    normal = F.cross_entropy(scores, torch.zeros(len(images), dtype=torch.long))
    fixed = twins.template_features(clip)
    chosen = []
    for regions, y in zip(local, labels, strict=True):
        for region in regions:
            best = (fixed @ region).argsort(descending=True)[:3].tolist()
            if int(y) not in best:
                chosen.append(F.cross_entropy((pair @ region / 0.07)[None], torch.tensor([1])))
    assert 0 < len(chosen) < local.shape[0] * local.shape[1]
    return scores.softmax(-1), normal, 0.5 * torch.stack(chosen).mean()


def test_twin(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "anomalyclip", **OPTIONS, region_weight=0.5)
    shared, _ = twins.tensors(method, 0.1)
    batch = twins.batch(clip, local=True)
    assert batch.inputs.local is not None
    encoded = method.encode(shared, {})
    terms = method.loss_terms(shared, {}, encoded, batch)
    ours = torch.autograd.grad(
        terms["ce"].sum() + terms["regions"].sum(), list(shared.values()), retain_graph=True
    )
    score = method.novelty(encoded, batch.inputs)
    assert score is not None
    for k in range(K):
        own = {n: t[k].detach().requires_grad_() for n, t in shared.items()}
        images, labels = twins.images_of(batch, k)
        local = batch.inputs.local[k][batch.mask_KB[k]]
        p, normal, abnormal = twin(clip, own, images, local, labels)
        twins.close(terms["ce"][k], normal)
        twins.close(terms["regions"][k], abnormal)
        twins.close(score[k][batch.mask_KB[k]], p[:, 1])
        theirs = torch.autograd.grad(normal + abnormal, list(own.values()))
        for n, a, b in zip(own, ours, theirs, strict=True):
            twins.close(a[k], b, n)


def test_classes_are_zero_shot_clip_s(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "anomalyclip", **OPTIONS)
    shared, _ = twins.tensors(method, 0.1)
    images = twins.batch(clip).inputs
    found = method.logits(method.encode(shared, {}), images)
    twins.close(found, clip.logit_scale * images.features @ twins.template_features(clip).T)


def test_clients_do_not_touch_each_other(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "anomalyclip", **OPTIONS)
    shared, private = twins.tensors(method)
    twins.assert_clients_alone_agree(method, shared, private, twins.batch(clip, local=True))


@pytest.mark.parametrize(("backbone", "numbers"), [("ViT-B-16", 28_672), ("ViT-L-14", 43_008)])
def test_upload(backbone: str, numbers: int) -> None:
    method = twins.build(shape_only_clip(backbone), "anomalyclip")
    assert uploaded_numbers(method) == numbers


def test_a_tower_of_one_prompted_layer_has_no_deep_tokens(clip: FrozenCLIP) -> None:
    assert twins.build(clip, "anomalyclip", depth=1).init_shared(1).keys() == {"ctx"}


def test_deep_tokens_must_fit_into_the_context(clip: FrozenCLIP) -> None:
    with pytest.raises(UserError, match="deep_tokens"):
        twins.build(clip, "anomalyclip", context_tokens=3)
