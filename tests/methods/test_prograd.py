"""ProGrad: both gradients by a plain twin, the projection by hand, per client; the start."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.errors import UserError
from fedprompt.methods.base import Task
from fedprompt.methods.prograd import _projected
from tests.support import twins
from tests.support.builders import CLASS_NAMES
from tests.support.twins import K


@pytest.mark.parametrize(("temperature", "part"), [(1.0, 1.0), (2.0, 0.8)])
@pytest.mark.parametrize("seed", range(4))
def test_twin(clip: FrozenCLIP, temperature: float, part: float, seed: int) -> None:
    """CE, T^2 * cross-entropy with the teacher, and the gradient that the optimiser is given."""
    method = twins.build(
        clip, "prograd", context_tokens=6, temperature=temperature, projection=part
    )
    shared, batch = twins.moved(method.init_shared(1), K, seed), twins.batch(clip)
    encoded = method.encode(shared, {})
    logits, loss_terms = (
        method.logits(encoded, batch.inputs),
        method.loss_terms(shared, {}, encoded, batch),
    )
    ours = twins.applied_gradients(method, shared, batch)["ctx"]
    teacher = twins.template_features(clip)
    scale = clip.model.logit_scale.exp().detach()
    for k in range(K):
        context = shared["ctx"][k].detach().requires_grad_()
        images, labels = twins.images_of(batch, k)
        student = scale * images @ twins.class_features(clip, context).T
        twins.close(logits[k][batch.mask_KB[k]], student, "logits")
        ce = F.cross_entropy(student, labels)
        probability = (scale * images @ teacher.T / temperature).softmax(-1)
        kl = -(probability * (student / temperature).log_softmax(-1)).sum(-1).mean()
        kl = kl * temperature**2
        twins.close(loss_terms["ce"][k], ce, "ce")
        twins.close(loss_terms["kl"][k], kl, "kl")
        (g,) = torch.autograd.grad(ce, [context], retain_graph=True)
        (h,) = torch.autograd.grad(kl, [context])
        unit = h / h.norm()
        along = torch.dot(g.flatten(), unit.flatten())
        expected = g - part * along * unit if along < 0 else g
        twins.close(ours[k], expected, "gradient")


def test_projection_by_hand() -> None:
    """Client 0 conflicts: (2, -3) loses what is along (0, 1). Client 1 agrees, 2 has no h."""
    g = torch.tensor([[[2.0, -3.0]], [[2.0, 3.0]], [[1.0, -1.0]]])
    h = torch.tensor([[[0.0, 5.0]], [[0.0, 5.0]], [[0.0, 0.0]]])
    assert _projected(g, h, 1.0).tolist() == [[[2, 0]], [[2, 3]], [[1, -1]]]
    assert _projected(g, h, 0.5).tolist() == [[[2, -1.5]], [[2, 3]], [[1, -1]]]


def test_both_cases_occur_above(clip: FrozenCLIP) -> None:
    """The twin sees conflicting gradients and agreeing ones."""
    conflicts = set()
    method = twins.build(clip, "prograd", context_tokens=6)
    for seed in range(4):
        shared, batch = twins.moved(method.init_shared(1), K, seed), twins.batch(clip)
        loss_terms = method.loss_terms(shared, {}, method.encode(shared, {}), batch)
        found = [
            torch.autograd.grad(loss_terms[t].sum(), [shared["ctx"]], retain_graph=True)[0]
            for t in ("ce", "kl")
        ]
        conflicts |= {bool(x < 0) for x in (found[0] * found[1]).flatten(1).sum(-1)}
    assert conflicts == {True, False}


def test_underscores_in_class_names_are_spaces(clip: FrozenCLIP) -> None:
    """For the teacher as in the prompt."""
    names = tuple(name.replace(" ", "_") for name in CLASS_NAMES)
    method: Any = twins.build(clip, "prograd", Task(names))
    twins.close(method.teacher_CD, twins.template_features(clip))


def test_a_template_with_a_comma_is_learned_token_by_token(clip: FrozenCLIP) -> None:
    """Nine tokens of eight words: all of them end the context, zeros in front."""
    task = Task(CLASS_NAMES, ("a type of pet, a photo of a {}.",))
    ctx = twins.build(clip, "prograd", task).init_shared(1)["ctx"]
    words: Any = clip.tokenizer(["a type of pet, a photo of a"])[0, 1:10]
    assert not ctx[:7].any()
    assert torch.equal(ctx[7:], clip.text.token_embedding(words).detach())


def test_the_start_is_the_templates_words_behind_zeros(clip: FrozenCLIP) -> None:
    task = Task(CLASS_NAMES, ("a centered satellite photo of {}.",))
    ctx = twins.build(clip, "prograd", task).init_shared(1)["ctx"]
    words: Any = clip.tokenizer(["a centered satellite photo of"])[0, 1:6]
    assert ctx.shape == (16, clip.text.width)
    assert not ctx[:11].any()
    assert torch.equal(ctx[11:], clip.text.token_embedding(words).detach())


def test_other_starts(clip: FrozenCLIP) -> None:
    random = twins.build(clip, "prograd", start="context_init").init_shared(1)["ctx"]
    assert random.std() == pytest.approx(0.02, rel=0.1)
    no_words = twins.build(clip, "prograd", Task(CLASS_NAMES, ("{}.",))).init_shared(1)["ctx"]
    assert torch.equal(random, no_words)
    words = twins.build(
        clip, "prograd", start="context_init", context_init="a photo of a", context_tokens=4
    )
    assert words.init_shared(1)["ctx"].shape == (4, clip.text.width)


def test_bad_options(clip: FrozenCLIP) -> None:
    with pytest.raises(UserError, match="4 tokens, but context_tokens is 2"):
        twins.build(clip, "prograd", context_tokens=2).init_shared(1)
    with pytest.raises(UserError, match="start=context_init"):
        twins.build(clip, "prograd", context_init="a photo of a")
    with pytest.raises(UserError, match="temperature"):
        twins.build(clip, "prograd", temperature=0.0)
