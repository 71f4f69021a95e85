"""What every method promises about evaluation."""

from __future__ import annotations

import numpy as np
import torch

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.data.dataset import ImageDataset
from fedprompt.data.features.table import FeatureTable, encode_inputs
from fedprompt.methods.base import Method, Task
from fedprompt.scoring import encode_personal, logits_of, model_of, score_personal
from tests.support import twins
from tests.support.builders import CLASS_NAMES
from tests.support.method_contract import (
    NEW_NAMES,
    SIZES,
    clients,
    shapes,
    starts,
    train,
)


def test_models_score_images(method: Method, columns: FeatureTable, dataset: ImageDataset) -> None:
    data = clients(columns, dataset)
    received, private = starts(method, data)
    tests = [(d.inputs, d.labels_N) for d in data]
    scores, _ = score_personal(method, received, private, tests)
    assert [s.tested for s in scores] == list(SIZES)
    assert all(np.isfinite(s.loss_sum) for s in scores)
    if method.has_global:
        shared = {n: t[None] for n, t in method.init_shared(1).items()}
        logits = method.logits(
            method.encode(shared, None), data[0].inputs.of_one().on(method.clip.device)
        )
        assert logits.shape == (1, SIZES[0], len(CLASS_NAMES))
        assert torch.isfinite(logits).all()


def test_the_global_model_follows_the_shared_tensors_unless_it_is_fixed(method: Method) -> None:
    shared = {n: t[None] for n, t in method.init_shared(1).items()}
    if not method.has_global or not shared:
        assert not method.fixed_global, "there is no model, or nothing that it could follow"
        return
    draw = torch.Generator().manual_seed(1)
    other = {n: t + 0.5 * torch.rand(t.shape, generator=draw) for n, t in shared.items()}
    with torch.no_grad():
        before, after = (method.encode(t, None) for t in (shared, other))
    assert before.keys() == after.keys()
    same = all(torch.equal(t, after[n]) for n, t in before.items())
    assert same == method.fixed_global


def test_cached_equals_uncached(
    method: Method, clip: FrozenCLIP, columns: FeatureTable, dataset: ImageDataset
) -> None:
    index = np.arange(3, 10)
    images = torch.stack([clip.preprocess(dataset.open_image(int(i))) for i in index])
    fresh = encode_inputs(clip, images, method.needs, method.routing)
    received, private = starts(method, clients(columns, dataset)[:1])
    encoded = encode_personal(method, received, private)
    ours, theirs = (
        torch.cat(list(logits_of(method, encoded, i))) for i in (columns.rows(index), fresh)
    )
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_new_class_names_or_a_reason(
    method: Method, clip: FrozenCLIP, columns: FeatureTable, dataset: ImageDataset
) -> None:
    if method.no_transfer_reason is not None:
        assert len(method.no_transfer_reason) > 10
        return
    data = clients(columns, dataset)[:2]
    received, private = starts(method, data)
    if method.trainable:
        private = [r.private for r in train(method, data, received, private)]
    other = twins.build(clip, method.name, Task(NEW_NAMES))
    # `encode` may not read what belongs to the old names, such as prototypes for the server.
    old, new = (
        {n: s for n, s in shapes(m.init_shared(1)).items() if f"shared.{n}" not in m.frozen}
        for m in (method, other)
    )
    assert old == new
    encoded = encode_personal(other, received, private)
    logits = torch.cat(list(logits_of(other, model_of(encoded, 1), data[1].inputs)))
    assert logits.shape == (SIZES[1], len(NEW_NAMES))
    assert torch.isfinite(logits).all()
