"""KgCoOp and FedKgCoOp: twin of logits, loss and gradients; templates; the federated settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.errors import UserError
from fedprompt.methods.base import Task
from tests.support import twins
from tests.support.builders import CLASS_NAMES
from tests.support.twins import K

SATELLITE = "a centered satellite photo of {}."


@pytest.mark.parametrize(
    ("name", "options", "template", "weight"),
    [
        ("kgcoop", {}, "a photo of a {}.", 8.0),
        ("kgcoop", {"template": SATELLITE, "kg_weight": 0.5}, SATELLITE, 0.5),
        ("fedkgcoop", {}, "a photo of a {}.", 8.0),
    ],
)
def test_twin(
    clip: FrozenCLIP, name: str, options: dict[str, Any], template: str, weight: float
) -> None:
    """L = CE + w (1 - mean_c cos(t_c, t0_c))."""
    method = twins.build(clip, name, **options)
    shared, batch = twins.tensors(method)[0], twins.batch(clip)
    encoded = method.encode(shared, {})
    logits, loss_terms = (
        method.logits(encoded, batch.inputs),
        method.loss_terms(shared, {}, encoded, batch),
    )
    ours = twins.applied_gradients(method, shared, batch)["ctx"]
    fixed = twins.template_features(clip, template)
    for k in range(K):
        context = shared["ctx"][k].detach().requires_grad_()
        classes = twins.class_features(clip, context)
        images, labels = twins.images_of(batch, k)
        expected = clip.model.logit_scale.exp() * images @ classes.T
        twins.close(logits[k][batch.mask_KB[k]], expected, "logits")
        pairs = zip(classes, fixed, strict=True)
        cosines = [(t * t0).sum() / (t.norm() * t0.norm()) for t, t0 in pairs]
        distance = 1 - sum(cosines) / len(CLASS_NAMES)
        twins.close(loss_terms["kg"][k], weight * distance, "kg")
        loss = F.cross_entropy(expected, labels) + weight * distance
        twins.close(loss_terms["ce"][k] + loss_terms["kg"][k], loss, "loss")
        (theirs,) = torch.autograd.grad(loss, [context])
        twins.close(ours[k], theirs, "gradient")


def test_nothing_to_pull_where_the_prompt_is_the_template(clip: FrozenCLIP) -> None:
    """ "a photo of a" with CLASS. is the default template itself."""
    method = twins.build(clip, "kgcoop")
    shared = {n: t[None] for n, t in method.init_shared(1).items()}
    classes = method.encode(shared, {})["classes"][0]
    assert (classes - twins.template_features(clip)).abs().max() < 1e-5
    loss_terms = method.loss_terms(shared, {}, method.encode(shared, {}), twins.batch(clip))
    assert loss_terms["kg"].abs().max() < 1e-5


def test_several_templates_are_their_normalised_mean(clip: FrozenCLIP) -> None:
    templates = ("a photo of a {}.", SATELLITE)
    method: Any = twins.build(clip, "kgcoop", Task(CLASS_NAMES, templates))
    mean = sum(twins.template_features(clip, t) for t in templates)
    twins.close(method.template_CD, F.normalize(mean, dim=-1))


def test_underscores_in_class_names_are_spaces(clip: FrozenCLIP) -> None:
    """In the template as in the prompt."""
    names = tuple(name.replace(" ", "_") for name in CLASS_NAMES)
    method: Any = twins.build(clip, "kgcoop", Task(names))
    twins.close(method.template_CD, twins.template_features(clip))


def test_what_fedtpg_changes(clip: FrozenCLIP) -> None:
    """Random starts, and every client counts the same."""
    method = twins.build(clip, "fedkgcoop")
    assert dict(method.config.default_strategy) == {"name": "fedavg", "weights": "uniform"}
    assert not torch.equal(method.init_shared(1)["ctx"], method.init_shared(2)["ctx"])
    assert dict(twins.build(clip, "kgcoop").config.default_strategy) == {"name": "fedavg"}


@pytest.mark.parametrize("options", [{"template": "a photo."}, {"kg_weight": -1.0}])
def test_bad_options(clip: FrozenCLIP, options: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        twins.build(clip, "kgcoop", **options)
