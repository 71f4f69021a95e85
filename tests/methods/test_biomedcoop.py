"""BiomedCoOp: twin of mean, pruning and divergence by loops; sentences and what stands in."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.errors import UserError
from fedprompt.methods.base import Task, uploaded_numbers
from fedprompt.methods.biomedcoop import kept
from tests.support import twins
from tests.support.builders import CLASS_NAMES
from tests.support.twins import K

KINDS = ("a view of a {}.", "{} from above.", "the old {}", "a map with a {}.", "one small {}.")
TASK = Task(
    CLASS_NAMES,
    descriptions=tuple((n, tuple(k.format(n) for k in KINDS)) for n in CLASS_NAMES),
)


def twin_kept(scores: list[float], tau: float, pruning: str) -> list[int]:
    centre = statistics.median_low(scores) if pruning == "mad" else statistics.mean(scores)
    spread = (
        statistics.median_low([abs(s - centre) for s in scores])
        if pruning == "mad"
        else statistics.stdev(scores)
    )
    return [i for i, s in enumerate(scores) if abs(s - centre) <= tau * spread]


@pytest.mark.parametrize(
    ("pruning", "tau", "norm"), [("z_score", 1.0, "numel"), ("mad", 1.5, "batchmean")]
)
def test_twin(clip: FrozenCLIP, pruning: str, tau: float, norm: str) -> None:
    options = {"pruning": pruning, "tau": tau, "kl_norm": norm, "mean_weight": 3, "kl_weight": 2}
    method = twins.build(clip, "biomedcoop", TASK, **options)
    shared, batch = twins.tensors(method)[0], twins.batch(clip)
    terms = twins.loss_of(method, shared, {}, batch)
    ours = twins.applied_gradients(method, shared, batch)["ctx"]
    sentences = [twins.template_features(clip, kind) for kind in KINDS]
    mean = F.normalize(torch.stack(sentences).mean(0), dim=-1)
    dropped = set()
    for k in range(K):
        context = shared["ctx"][k].detach().requires_grad_()
        classes = twins.class_features(clip, context)
        images, labels = twins.images_of(batch, k)
        scores = [
            statistics.mean(max(float(v @ t) for t in of_i) for v in images) for of_i in sentences
        ]
        chosen = twin_kept(scores, tau, pruning)
        dropped |= set(range(len(KINDS))) - set(chosen)
        teacher = F.normalize(torch.stack([sentences[i] for i in chosen]).mean(0), dim=-1)
        logits = clip.logit_scale * images @ classes.T
        q, p = (clip.logit_scale * images @ teacher.T).softmax(-1), logits.softmax(-1)
        kl = (q * (q / p).log()).sum() / (len(images) * (6 if norm == "numel" else 1))
        expected: dict[str, Tensor] = {
            "ce": F.cross_entropy(logits, labels),
            "mean": 3 * F.mse_loss(classes, mean),
            "kl": 2 * kl,
        }
        for name, value in expected.items():
            twins.close(terms[name][k], value, name)
        (theirs,) = torch.autograd.grad(sum(expected.values()), [context])  # type: ignore[arg-type]
        twins.close(ours[k], theirs, "gradient")
    assert dropped, "some sentence is pruned"


def test_clients_do_not_touch_each_other(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "biomedcoop", TASK)
    twins.assert_clients_alone_agree(method, *twins.tensors(method), twins.batch(clip))


def test_which_sentences_are_kept() -> None:
    """The second standardisation of the code cancels the first; the robust rule is another one."""
    scores = torch.tensor([[1.0, 1.1, 1.2, 1.3, 3.0]])
    assert kept(scores, 1.5, "z_score").tolist() == [[True, True, True, True, False]]
    assert kept(scores, 1.5, "mad").tolist() == [[False, True, True, True, False]]
    assert kept(scores, 1.5, "none").all()
    for pruning in ("z_score", "mad"):
        assert kept(torch.tensor([[7.0]]), 1.0, pruning).all()
        assert kept(torch.full((1, 4), 7.0), 1.0, pruning).all()


def test_templates_stand_in(clip: FrozenCLIP) -> None:
    method: Any = twins.build(clip, "biomedcoop")
    twins.close(method.mean_CD, twins.template_features(clip))
    assert method.reads_descriptions
    assert twins.build(clip, "fedprox", base="biomedcoop").reads_descriptions


def test_underscores_in_class_names_are_spaces(clip: FrozenCLIP) -> None:
    names = tuple(name.replace(" ", "_") for name in CLASS_NAMES)
    assert Task(names, descriptions=TASK.descriptions).sentences() == TASK.sentences()


def test_upload_on_vit_b16() -> None:
    assert uploaded_numbers(twins.build(shape_only_clip("ViT-B-16"), "biomedcoop")) == 2_048


def test_unequal_numbers_of_sentences_are_refused(clip: FrozenCLIP) -> None:
    some = (*TASK.descriptions[:-1], (CLASS_NAMES[-1], ("one sentence.",)))
    with pytest.raises(UserError, match=CLASS_NAMES[-1]):
        twins.build(clip, "biomedcoop", Task(CLASS_NAMES, descriptions=some))


@pytest.mark.parametrize("options", [{"tau": 0.5}, {"kl_weight": -1}, {"pruning": "x"}])
def test_bad_options(clip: FrozenCLIP, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        twins.build(clip, "biomedcoop", **options)
