"""Unlearning: whose images are left out, both membership attacks, and every measure by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import norm

from fedprompt.data.sources.client_folders import ClientFoldersConfig
from fedprompt.deploy.node_config import on_server
from fedprompt.errors import UserError
from fedprompt.evaluation.forgetting import Request
from fedprompt.evaluation.membership import likelihood_ratios, margins, success
from fedprompt.evaluation.metrics import tpr_at_fpr
from fedprompt.evaluation.protocols.unlearning import Unlearning
from fedprompt.evaluation.registry import result_tables
from fedprompt.experiment.display import QuietDisplay
from fedprompt.experiment.rounds import train_reference
from fedprompt.experiment.run import _train_references
from fedprompt.federation.server_app import Federation
from fedprompt.methods.promptfl import PromptFL
from fedprompt.reports.figure import Figure
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.workspace import Workspace
from tests.support.builders import small_config
from tests.support.protocol_runs import silent

MakeWorkspace = Callable[..., Workspace]
QUICK: dict[str, Any] = {
    "method": {"name": "promptfl", "context_tokens": 2},
    "partition": {"clients": 3, "alpha": 10.0, "local_test_fraction": 0.4},
    "federation": {"rounds": 2},
    "protocols": ["global", "unlearning"],
}


def unlearning(make_workspace: MakeWorkspace, **options: Any) -> Workspace:
    keys = {"shadows": 4, "extraction_images": 2, **options}
    return make_workspace(**QUICK, protocol_options={"unlearning": keys})


def finished(workspace: Workspace) -> tuple[Federation, dict[str, Any]]:
    """A run of the workspace, its references, and what the protocol measures."""
    grid = InlineGrid(workspace)
    federation = Federation(workspace, grid)
    federation.protocols.open()
    federation.join()
    for server_round in (1, 2):
        federation.train_round(server_round)
    _train_references(federation, grid, QuietDisplay(silent()))
    return federation, federation.measure_protocols([], {})["unlearning"]


def test_requests_leave_out_what_they_name(make_workspace: MakeWorkspace) -> None:
    workspace = unlearning(make_workspace)
    partition, labels_N = workspace.partition, workspace.dataset.labels_N
    request = Request.of_classes(workspace.dataset, partition, (1, 4), [0, 1, 2])
    rest = request.without(partition)
    for k in range(3):
        own = partition.train(k)
        assert rest.train(k).tolist() == [i for i in own if labels_N[i] not in (1, 4)]
        assert rest.test(k).tolist() == partition.test(k).tolist()
    assert set(labels_N[request.others]) == {1, 4}
    assert set(request.others) <= set(partition.test_flat)
    alone = Request.of_client(partition, 2)
    assert alone.forgotten.tolist() == partition.train(2).tolist()
    assert alone.others.tolist() == partition.test(2).tolist()
    assert alone.without(partition).trainable == [0, 1]


def test_every_image_is_in_half_of_the_shadows(make_workspace: MakeWorkspace) -> None:
    partition = unlearning(make_workspace).partition
    request = Request.of_client(partition, 1)
    inside_SP = request.inside(6, 1)
    assert (inside_SP.sum(0) == 3).all()
    assert len({row.tobytes() for row in inside_SP}) > 1
    for shadow, inside_P in zip(request.shadows(partition, 6, 1), inside_SP, strict=True):
        assert set(shadow.train(1)) == set(request.pool_P[inside_P])
        assert not set(shadow.test(1)) & set(shadow.train(1))
        assert shadow.train(0).tolist() == partition.train(0).tolist()


def test_margins_are_logits_of_probabilities() -> None:
    logits, labels = torch.randn(7, 4, generator=torch.Generator().manual_seed(1)), torch.arange(7)
    p = logits.double().softmax(-1)[labels, labels % 4]
    expected = torch.log(p / (1 - p)).numpy()
    np.testing.assert_allclose(margins(logits, labels % 4), expected, rtol=1e-9)


def test_likelihood_ratios_of_normal_distributions() -> None:
    draw = np.random.default_rng(0)
    shadows, target = draw.normal(size=(6, 5)), draw.normal(size=5)
    inside = draw.random((6, 5)).argsort(0) < 3
    found = likelihood_ratios(target, shadows, inside)
    columns = [(shadows[inside[:, i], i], shadows[~inside[:, i], i]) for i in range(5)]
    std = [np.sqrt(np.mean([np.var(c[side], ddof=1) for c in columns])) for side in (0, 1)]
    expected = [
        norm.logpdf(target[i], c[0].mean(), std[0]) - norm.logpdf(target[i], c[1].mean(), std[1])
        for i, c in enumerate(columns)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_the_attack_finds_members_that_shadows_know_better() -> None:
    draw = np.random.default_rng(0)
    hardness, member = 5 * draw.normal(size=200), np.arange(200) < 100
    inside = draw.random((8, 200)).argsort(0) < 4
    shadows = hardness + inside + 0.1 * draw.normal(size=(8, 200))
    target = hardness + member + 0.1 * draw.normal(size=200)
    found = success(likelihood_ratios(target, shadows, inside), member)
    plain = success(target, member)
    assert found is not None
    assert plain is not None
    assert found["auc"] > 0.99
    assert found["tpr"] > 0.9
    assert plain["auc"] < 0.65
    assert success(np.where(member, np.nan, target), member) is None


def test_true_positives_at_few_false_ones() -> None:
    known, other = [3.0, 2.0, 1.0, 0.5], np.arange(100) / 50
    # One of a hundred others may be accepted: the highest, 1.98; the next, 1.96, may not.
    assert tpr_at_fpr(known, other) == 0.5
    assert tpr_at_fpr(known, [2.0, 0.0]) == 0.25
    assert tpr_at_fpr(known, other, 0.8) == 1.0
    assert tpr_at_fpr([1.0], [1.0, 0.0], 1.0) == 1.0


def test_a_forgotten_class_by_a_second_way(
    make_workspace: MakeWorkspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def zeros(method: Any, shared: Any, classes: Any) -> Any:
        return {n: torch.zeros_like(t) for n, t in shared.items()}

    monkeypatch.setattr(PromptFL, "without_classes", zeros)
    workspace = unlearning(make_workspace, classes=["harbor"], subsets=2)
    federation, part = finished(workspace)
    label = workspace.task.class_names.index("harbor")
    rows = {row["model"]: row for row in part["rows"]}
    assert list(rows) == ["zero-shot", "trained", "left out", "retrained"]
    partition, labels_N = workspace.partition, workspace.dataset.labels_N
    train = [i for k in range(3) for i in partition.train(k) if labels_N[i] == label]
    server = partition.server_test

    def logits(shared: Any, index: Any) -> torch.Tensor:
        inputs, _ = workspace.images(np.array(index))
        encoded = workspace.method.encode({n: t[None] for n, t in shared.items()}, None)
        return workspace.method.logits(encoded, inputs.of_one())[0].detach()

    def accuracy(shared: Any, index: Any) -> float:
        return float(np.mean(logits(shared, index).argmax(-1).numpy() == labels_N[index]))

    trained = federation.shared
    own = server[labels_N[server] == label]
    assert rows["trained"]["forgotten"] == pytest.approx(accuracy(trained, train))
    assert rows["trained"]["unseen"] == pytest.approx(accuracy(trained, own))
    others = server[labels_N[server] != label]
    assert rows["trained"]["retained"] == pytest.approx(accuracy(trained, others))
    means = torch.stack(
        [logits(trained, server[labels_N[server] == c][:2]).mean(0) for c in range(6)]
    )
    nearest = [(row - means).square().sum(-1).argmin() == label for row in logits(trained, own[2:])]
    assert rows["trained"]["extracted"] == pytest.approx(float(np.mean(nearest)))
    # The same federation on the partition without the images.
    request = Request.of_classes(workspace.dataset, partition, (label,), [0, 1, 2])
    without = workspace.with_partition(request.without(partition))
    again = train_reference(Federation(without, InlineGrid(without)))
    assert torch.equal(
        again["ctx"], federation.protocols.references["unlearning"]["retrained"]["ctx"]
    )
    assert not torch.equal(again["ctx"], trained["ctx"])
    keys = ("forgotten", "unseen", "retained")
    gap = np.mean([abs(rows["trained"][k] - rows["retrained"][k]) for k in keys])
    assert rows["trained"]["gap"] == pytest.approx(gap)
    losses = [F.cross_entropy(logits(trained, [i]), torch.tensor([label])) for i in request.pool_P]
    found = success(-np.array(losses, dtype=float), request.member_P)
    assert rows["trained"]["loss"]["auc"] == pytest.approx(found["auc"])  # type: ignore[index]
    assert part["shadows"] == 4
    assert all(0 <= row["lira"]["auc"] <= 1 for row in part["rows"])
    assert [row["classes"] for row in part["subsets"]] == [1, 3, 5]
    assert part["subsets"][0]["sets"] == 2
    (table,) = result_tables({"protocols": {"unlearning": part}}, "here")
    assert "Leaving out 3 classes" in table.note
    compared, figure = Unlearning.compare([("a", part), ("b", part)])
    assert len(compared.rows) == 2 * len(rows)
    assert isinstance(figure, Figure)


def test_a_forgotten_client(make_workspace: MakeWorkspace) -> None:
    workspace = unlearning(make_workspace, client=1, shadows=0)
    _, part = finished(workspace)
    rows = {row["model"]: row for row in part["rows"]}
    assert list(rows) == ["zero-shot", "trained", "retrained"], "others have all of its classes"
    assert part["images"]["forgotten"] == len(workspace.partition.train(1))
    assert part["images"]["unseen"] == len(workspace.partition.test(1))
    assert part["images"]["retained"] == len(workspace.partition.server_test)
    assert rows["trained"]["lira"] is None
    assert rows["trained"]["loss"] is not None


def test_without_local_test_images_no_member_is_told_apart(make_workspace: MakeWorkspace) -> None:
    partition = {**QUICK["partition"], "local_test_fraction": 0.0}
    workspace = make_workspace(**{**QUICK, "partition": partition})
    federation, part = finished(workspace)
    assert list(federation.protocols.references["unlearning"]) == ["retrained"]
    assert part["why_no_membership"]
    assert part["rows"][1]["loss"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ["harbour"]}, "harbour.*Did you mean 'harbor'"),
        ({"client": 3}, r"unlearning\.client is 3"),
    ],
)
def test_unknown_requests_are_refused_before_training(
    make_workspace: MakeWorkspace, options: dict[str, Any], message: str
) -> None:
    workspace = unlearning(make_workspace, **options)
    federation = Federation(workspace, InlineGrid(workspace))
    with pytest.raises(UserError, match=message):
        federation.protocols.open()


@pytest.mark.parametrize("name", ["coop_local", "zero_shot"])
def test_methods_without_a_global_model_that_learns_are_refused(
    make_workspace: MakeWorkspace, name: str
) -> None:
    workspace = make_workspace(**{**QUICK, "method": {"name": name}})
    federation = Federation(workspace, InlineGrid(workspace))
    with pytest.raises(UserError, match=rf"unlearning.*{name}"):
        federation.protocols.open()


@pytest.mark.parametrize(
    "options", [{"shadows": 3}, {"shadows": 2}, {"classes": ["beach"], "client": 0}]
)
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"client|shadows"):
        small_config(protocols=["unlearning"], protocol_options={"unlearning": options})


def test_a_deployment_refuses_it() -> None:
    config = small_config(protocols=["global", "unlearning"])
    with pytest.raises(UserError, match=r"unlearning.*only a simulation"):
        on_server(config)
    plain = replace(small_config(), data=ClientFoldersConfig())
    assert on_server(plain).protocols == plain.protocols
