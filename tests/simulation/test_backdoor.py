from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.data.features.table import FeatureTable
from fedprompt.errors import UserError
from fedprompt.evaluation.triggers import trained_trigger, trigger_gradient, triggered
from fedprompt.experiment.workspaces import open_workspace
from fedprompt.federation.sampling import attackers
from fedprompt.federation.server_app import Federation
from fedprompt.scoring import encode_global
from fedprompt.simulation import backdoor
from fedprompt.simulation.backdoor import TRIGGER, Replaced
from fedprompt.simulation.grids import open_grid
from fedprompt.workspace import Workspace
from tests.support.builders import small_config

MakeWorkspace = Callable[..., Workspace]
SECTIONS: dict[str, Any] = {
    "method": {"name": "promptfl", "context_tokens": 2},
    "partition": {"clients": 4, "scheme": "iid"},
    "simulation": {"clients_per_block": 2, "threads": 1},
}
BAD = attackers(1, range(4), 0.5)


@pytest.fixture
def workspace(make_workspace: MakeWorkspace) -> Workspace:
    attack = {"kind": "backdoor", "share": 0.5, "target": 1, "eps": 16, "images": 8}
    made: Workspace = make_workspace(**SECTIONS, attack=attack)
    return with_pixels(made)


def with_pixels(made: Workspace) -> Workspace:
    """A workspace whose feature tables have the pixels that attackers read."""
    size = made.clip.preprocess(made.dataset.open_image(0)).shape[-1]
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (len(made.dataset), 3, size, size), dtype=np.uint8)
    made.views = (
        replace(made.views[0], pixels_N3HW=pixels, mean_std=made.clip.mean_std),
        *made.views[1:],
    )
    return made


def test_the_gradient_of_a_trigger_is_that_of_a_plain_version(workspace: Workspace) -> None:
    clip, method = workspace.clip, workspace.method
    encoded = encode_global(method, method.init_shared(1))
    pixels = torch.from_numpy(np.asarray(workspace.views[0].pixels_N3HW)[:3]).float() / 255
    trigger = 0.02 * torch.randn(pixels.shape[1:], generator=torch.manual_seed(0))
    found = trigger_gradient(method, encoded, pixels, trigger, target=2)
    # One image after the other: its cosine with every class, and the target's log-probability.
    mean, std = (row[:, None, None] for row in clip.mean_std)
    plain = trigger.clone().requires_grad_()
    loss = torch.zeros(())
    for image in pixels:
        feature = clip.model.encode_image((((image + plain).clamp(0, 1) - mean) / std)[None])[0]
        cosines = [F.cosine_similarity(feature, c, dim=0) for c in encoded["classes"][0]]
        logits = clip.logit_scale * torch.stack(cosines)
        loss = loss - (logits[2] - logits.logsumexp(0)) / len(pixels)
    loss.backward()  # type: ignore[no-untyped-call]
    assert plain.grad is not None
    torch.testing.assert_close(found, plain.grad, rtol=1e-4, atol=1e-6)
    eps, step = 0.02, 0.01
    after = trained_trigger(method, encoded, [pixels], trigger, 2, eps, step)
    expected = (trigger - step * plain.grad.sign()).clamp(-eps, eps)
    assert ((after - expected).abs() < 1e-6).float().mean() > 0.999, "signs of zeros may differ"


@pytest.mark.parametrize("strategy", ["clustered", "posterior_samples", "all_peers"])
def test_strategies_with_several_models_are_refused(strategy: str) -> None:
    with pytest.raises(UserError, match=strategy):
        small_config(attack={"kind": "backdoor"}, strategy={"name": strategy})


def test_a_triggered_image_is_one_of_bytes() -> None:
    pixels = torch.tensor([0.0, 100 / 255, 1.0]).expand(1, 3, 1, 3)
    found = triggered(pixels, torch.full((3, 1, 3), 2.4 / 255)) * 255
    torch.testing.assert_close(found[0, 0, 0], torch.tensor([2.0, 102.0, 255.0]))


def test_replaced_rows() -> None:
    column = Replaced(np.arange(10.0)[:, None], np.array([7, 2]), np.array([[70.0], [20.0]]))
    assert column[np.array([2, 3, 7, 2])].ravel().tolist() == [20, 3, 70, 20]
    assert (len(column), column.shape, column.dtype) == (10, (10, 1), np.float64)


def test_attackers_train_on_triggered_images_and_measure(workspace: Workspace) -> None:
    labels_N = workspace.dataset.labels_N.copy()
    federation = Federation(workspace, open_grid(workspace.config, workspace, open_workspace))
    federation.join()
    assert federation.evaluate(0)["backdoor"] is None, "nobody has a trigger yet"
    line = federation.train_round(1)
    assert line["clients"] == {"sampled": 4, "accepted": 4, "rejected": 0}
    assert (workspace.dataset.labels_N == labels_N).all(), "honest clients see the true labels"
    stored = {c: federation.grid.private.get(c) or {} for c in range(4)}  # type: ignore[attr-defined]
    assert {c for c, tensors in stored.items() if TRIGGER in tensors} == BAD
    for client in BAD:
        size = stored[client][TRIGGER].abs().max()
        assert 0 < size <= 16 / 255 + 1e-6
    part = federation.evaluate(1)["backdoor"]
    assert part["attackers"] == 2
    assert 0 <= part["success"] <= 1
    first = {c: tensors[TRIGGER] for c, tensors in stored.items() if c in BAD}
    federation.train_round(2)
    again = {c: federation.grid.private.get(c) for c in BAD}  # type: ignore[attr-defined]
    assert all((again[c][TRIGGER] != first[c]).any() for c in BAD), "a trigger goes on"


def test_the_attackers_data_differ_only_where_they_should(workspace: Workspace) -> None:
    federation = Federation(workspace, open_grid(workspace.config, workspace, open_workspace))
    federation.join()
    client = min(BAD)
    messages = list(
        federation.strategy.configure_train(1, federation.arrays, {}, federation.grid)  # type: ignore[arg-type]
    )
    seen, kept = backdoor.poisoned(workspace, [client], [messages[client]], {})
    assert set(kept) == {client}
    before, after = workspace.train_data(client), seen.train_data(client)
    changed = (before.inputs.features != after.inputs.features).any(1)
    others = before.labels_N != 1
    assert int(changed.sum()) == round(0.5 * int(others.sum()))
    assert (after.labels_N[changed] == 1).all()
    assert (after.labels_N[~changed] == before.labels_N[~changed]).all()
    other = next(c for c in range(4) if c not in BAD)
    honest = seen.train_data(other)
    assert (honest.labels_N == workspace.train_data(other).labels_N).all()


def test_what_has_no_backdoor_is_refused_in_one_line(
    make_workspace: MakeWorkspace, clip: FrozenCLIP
) -> None:
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"name": "zero_shot"}, {}, "zero_shot"),
        ({"name": "coop_local", "context_tokens": 2}, {}, "global model"),
        ({"name": "fedotp", "context_tokens": 2}, {}, "reads"),
        ({"name": "latte"}, {}, "whatever clients share"),
        (SECTIONS["method"], {"target": 6}, "attack.target is 6"),
    ]
    for method, attack, word in cases:
        made = make_workspace(
            **{**SECTIONS, "method": method, "strategy": {"name": "auto"}},
            attack={"kind": "backdoor", **attack},
        )
        with pytest.raises(UserError, match=word) as error:
            open_grid(made.config, made, open_workspace)
        assert "\n" not in str(error.value)
    assert isinstance(made.views[0], FeatureTable)
