"""CoPrompt: a twin of the authors' module, its sentences, its second view and its uploads."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.errors import UserError
from fedprompt.experiment.workspaces import ResourceCache, open_workspace
from fedprompt.methods.base import ClientData, Task, uploaded_numbers
from fedprompt.training import train_clients
from tests.support import twins
from tests.support.builders import CLASS_NAMES, batch_of, random_clip, small_config

K, B = 2, 4
LABELS = torch.tensor([[0, 1, 2, 3], [5, 4, 0, 0]])
MASK = torch.tensor([[True] * 4, [True] * 3 + [False]])
KINDS = ("a view of a {}.", "{} from above.", "the old {}")
TASK = Task(
    CLASS_NAMES,
    descriptions=tuple((n, tuple(k.format(n) for k in KINDS)) for n in CLASS_NAMES),
)
OPTIONS: dict[str, Any] = {"depth": 2, "context_tokens": 2, "consistency_weight": 3.0}


@pytest.fixture(scope="module")
def clip() -> FrozenCLIP:
    return random_clip(vision_cfg={"patch_size": 16})


def adapted(features: Tensor, tensors: dict[str, Tensor], name: str, ratio: float) -> Tensor:
    """An adapter as torch modules, on features of any length."""
    width = features.shape[-1]
    net = nn.Sequential(
        nn.Linear(width, width // 4, bias=False),
        nn.ReLU(),
        nn.Linear(width // 4, width, bias=False),
        nn.ReLU(),
    )
    weights = {"0.weight": tensors[f"{name}.down.weight"], "2.weight": tensors[f"{name}.up.weight"]}
    out: Tensor = torch.func.functional_call(net, weights, (features,))
    return F.normalize(ratio * out + (1 - ratio) * features, dim=-1)


@pytest.mark.parametrize("adapters", ["private", "shared"])
def test_twin(clip: FrozenCLIP, adapters: str) -> None:
    method = twins.build(clip, "coprompt", TASK, adapters=adapters, **OPTIONS)
    shared, private = twins.tensors(method, clients=K)
    held = shared | private
    batch = replace(
        batch_of(twins.pictures(clip, K, B), LABELS, MASK, step=1),
        second_KBD=twins.features(K, B, clip.embed_dim, seed=9),
    )
    terms = twins.loss_of(method, shared, private, batch)
    ours = dict(zip(held, twins.gradients(terms, list(held.values())), strict=True))
    assert batch.inputs.pixels is not None
    assert batch.second_KBD is not None
    drawn = (batch.uniform((), "sentence") * len(KINDS)).long().tolist()
    for k in range(K):
        leaves = {n: t.detach()[k].clone().requires_grad_() for n, t in held.items()}
        visual = [
            p @ w.T + b
            for p, w, b in zip(leaves["text"], leaves["weight"], leaves["bias"], strict=True)
        ]
        # Adapters see features that are not normalised in the public code.
        images = 7 * twins.plain_images(clip, batch.inputs.pixels[k], visual)
        classes = 3 * twins.plain_text(clip, "a photo of a", list(leaves["text"]))
        images = adapted(images, leaves, "image_adapter", 0.1)[MASK[k]]
        classes = adapted(classes, leaves, "text_adapter", 0.2)
        sentence = twins.template_features(clip, KINDS[drawn[k]])
        second = batch.second_KBD[k][MASK[k]]
        expected = {
            "ce": F.cross_entropy(clip.logit_scale * images @ classes.T, LABELS[k][MASK[k]]),
            "text": 3 * (1 - F.cosine_similarity(classes, sentence, dim=1).mean()),
            "image": 3 * (1 - F.cosine_similarity(images, second, dim=1).mean()),
        }
        for name, value in expected.items():
            twins.close(terms[name][k], value, name)
        theirs = torch.autograd.grad(torch.stack(list(expected.values())).sum(), leaves.values())
        for name, gradient in zip(leaves, theirs, strict=True):
            twins.close(ours[name][k], gradient, name)


def test_all_classes_have_the_same_sentence_and_steps_have_others(clip: FrozenCLIP) -> None:
    method: Any = twins.build(clip, "coprompt", TASK, **OPTIONS)
    for n, kind in enumerate(KINDS):
        twins.close(method.sentences_NCD[n], twins.template_features(clip, kind))
    shared, private = twins.tensors(method, clients=1)
    inputs = twins.pictures(clip, 1, B)
    seen = {
        round(twins.loss_of(method, shared, private, b)["text"].item(), 5)
        for b in (batch_of(inputs, LABELS[:1], step=step) for step in range(12))
    }
    assert len(seen) == len(KINDS)


def test_training_compares_with_another_view_of_the_same_image(clip: FrozenCLIP) -> None:
    """Of two views, the second is always the one that is not trained on."""
    method = twins.build(clip, "coprompt", TASK, **OPTIONS)
    inputs = twins.pictures(clip, 1, 6)[0]
    # Views 0 and 1 of three images; the features of an image's views point in opposite ways.
    inputs = replace(inputs, features=torch.cat([inputs.features[:3], -inputs.features[:3]]))
    data = ClientData(0, inputs, torch.arange(3), views=2)
    seen: list[Tensor] = []
    loss_terms = method.loss_terms

    def noted(shared: Any, private: Any, encoded: Any, batch: Any) -> Any:
        seen.append((batch.inputs.features * batch.second_KBD).sum(-1))
        return loss_terms(shared, private, encoded, batch)

    method.loss_terms = noted  # type: ignore[method-assign]
    train_clients(
        method,
        [method.init_shared(1)],
        [method.init_private(1, 0)],
        [data],
        twins.config(),
        seed=1,
        server_round=1,
        rounds=2,
    )
    twins.close(torch.cat(seen, 1), -torch.ones(1, 6))


def test_a_run_with_one_view_says_so(caplog: pytest.LogCaptureFixture) -> None:
    resources = ResourceCache()
    for name, views, lines in (("coprompt", 1, 1), ("coprompt", 2, 0), ("promptfl", 1, 0)):
        caplog.clear()
        data = {"images_per_class": 2, "domains": ["delta"], "views": views}
        config = small_config(method={"name": name}, data=data, partition={"clients": 1})
        with caplog.at_level(logging.WARNING, "fedprompt"):
            open_workspace(config, resources=resources)
        assert len([r for r in caplog.records if "data.views" in r.message]) == lines


def test_the_global_model_is_maple_if_adapters_are_private(clip: FrozenCLIP) -> None:
    method = twins.build(clip, "coprompt", TASK, **OPTIONS)
    maple = twins.build(clip, "maple", depth=2, context_tokens=2, sharing="factors")
    shared, _ = twins.tensors(method, clients=1)
    inputs = twins.pictures(clip, 1, B)
    ours = method.logits(method.encode(shared, None), inputs)
    twins.close(ours, maple.logits(maple.encode(shared, None), inputs))
    personal = method.encode(shared, twins.tensors(method, clients=1)[1])
    assert (method.logits(personal, inputs) - ours).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ({}, 4_752_384),
        ({"adapters": "shared"}, 5_014_528),
        ({"sharing": "text"}, 12 * 4 * 512),
        ({"sharing": "materialised"}, 12 * 4 * (512 + 768)),
    ],
)
def test_upload_on_vit_b16(options: dict[str, Any], numbers: int) -> None:
    assert uploaded_numbers(twins.build(shape_only_clip("ViT-B-16"), "coprompt", **options)) == (
        numbers
    )


def test_bad_input_is_refused(clip: FrozenCLIP) -> None:
    some = (*TASK.descriptions[:-1], (CLASS_NAMES[-1], ("one sentence.",)))
    with pytest.raises(UserError, match=CLASS_NAMES[-1]):
        twins.build(clip, "coprompt", Task(CLASS_NAMES, descriptions=some))
    for key, value in (("text_ratio", 1.5), ("consistency_weight", -1), ("adapters", "none")):
        with pytest.raises(UserError, match=key):
            twins.build(clip, "coprompt", **{key: value})
