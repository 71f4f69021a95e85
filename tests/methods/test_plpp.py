"""PLPP: twin of both perplexity losses, token by token; which bases it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.errors import UserError
from fedprompt.methods.base import uploaded_numbers
from tests.support import twins
from tests.support.twins import START, K

TOP = 3


def twin_states(clip: FrozenCLIP, context_Md: Tensor) -> Tensor:
    """Outputs (M, d) of open_clip's own text tower at the context, with nothing behind it."""
    model: Any = clip.model
    rest = model.token_embedding(torch.zeros(76 - len(context_Md), dtype=torch.long))
    start = model.token_embedding(torch.tensor([START]))
    x = (torch.cat([start, context_Md, rest]) + model.positional_embedding)[None]
    x = model.transformer(x, attn_mask=model.attn_mask)
    return model.ln_final(x)[0, 1 : 1 + len(context_Md)]


def twin_terms(clip: FrozenCLIP, context_Md: Tensor) -> tuple[Tensor, Tensor]:
    """Both losses of one context, averaged over its tokens."""
    words = clip.model.token_embedding.weight.detach()
    there, back = [], []
    for token, state in zip(context_Md, twin_states(clip, context_Md), strict=True):
        cosines = F.cosine_similarity(token[None], words, dim=-1)
        nearest = cosines.detach().argsort(descending=True)[:TOP]
        q, p = cosines[nearest].softmax(0), (words[nearest] @ state).softmax(0)
        there.append(-(q.detach() * p.log()).sum())
        back.append(-(p.detach() * q.log()).sum())
    return torch.stack(there).mean(), torch.stack(back).mean()


def test_twin(clip: FrozenCLIP) -> None:
    options = {"context_tokens": 4}
    method = twins.build(clip, "plpp", options=options, top_k=TOP, ppl_weight=0.3)
    shared, batch = twins.tensors(method)[0], twins.batch(clip)
    loss_terms = twins.loss_of(method, shared, {}, batch)
    assert list(loss_terms) == ["ce", "ppl", "inverted_ppl"]
    ours = twins.applied_gradients(method, shared, batch)["ctx"]
    for k in range(K):
        context = shared["ctx"][k].detach().requires_grad_()
        there, back = twin_terms(clip, context)
        twins.close(loss_terms["ppl"][k], 0.3 * there, "ppl")
        twins.close(loss_terms["inverted_ppl"][k], 0.3 * back, "inverted")
        images, labels = twins.images_of(batch, k)
        classes = twins.class_features(clip, context)
        ce = F.cross_entropy(clip.logit_scale * images @ classes.T, labels)
        (theirs,) = torch.autograd.grad(ce + 0.3 * (there + back), [context])
        twins.close(ours[k], theirs, "gradient")


@pytest.mark.parametrize("base", ["kgcoop", "plot", "coop_csc"])
def test_every_context_of_a_base_counts(clip: FrozenCLIP, base: str) -> None:
    method = twins.build(clip, "plpp", base=base, top_k=TOP, ppl_weight=1.0)
    shared, batch = twins.tensors(method)[0], twins.batch(clip, patches=True)
    terms = twins.loss_of(method, shared, {}, batch)
    contexts = shared["ctx"][1].reshape(-1, *shared["ctx"].shape[-2:])
    found = torch.stack([torch.stack(twin_terms(clip, c)) for c in contexts]).mean(0)
    twins.close(torch.stack([terms["ppl"][1], terms["inverted_ppl"][1]]), found)


def test_clients_do_not_touch_each_other(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "plpp", top_k=TOP)
    twins.assert_clients_alone_agree(method, *twins.tensors(method), twins.batch(clip))


def test_upload_on_vit_b16() -> None:
    assert uploaded_numbers(twins.build(shape_only_clip("ViT-B-16"), "plpp")) == 8_192


@pytest.mark.parametrize("base", ["palm", "vpt", "maple"])
def test_bases_without_a_context_are_refused(clip: FrozenCLIP, base: str) -> None:
    with pytest.raises(UserError, match="ctx"):
        twins.build(clip, "plpp", base=base)


@pytest.mark.parametrize("options", [{"top_k": 0}, {"top_k": 10**6}, {"ppl_weight": -1}])
def test_bad_options(clip: FrozenCLIP, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        twins.build(clip, "plpp", **options)
