"""Pseudo-labels of clients without labels: the rule against loops, and whole rounds with them."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, MessageType

from fedprompt.data.partition.pseudo_labels import (
    GUESSES,
    PHASE,
    Guesses,
    Totals,
    images_chosen,
)
from fedprompt.data.partition.stages import stage_of
from fedprompt.deploy.governance.policy import Policy, objections
from fedprompt.errors import UserError
from fedprompt.federation.pseudo_labelling import TOTALS, PseudoLabels, pseudo_labels
from fedprompt.federation.server_app import Federation
from fedprompt.files.tensors import array_checksum
from fedprompt.messages import to_arrays
from fedprompt.methods.base import UNLABELLED
from fedprompt.rng import generator
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.workspace import Workspace
from tests.support.builders import small_config
from tests.support.displays import StopAfter
from tests.support.recorded_runs import play, play_on

MakeWorkspace = Callable[..., Workspace]
N, C = 40, 4


@pytest.fixture
def logits_NC() -> np.ndarray:
    return 4 * generator(0, "guesses").standard_normal((N, C)) + np.array([3.0, 0, 0, -1])


def plainly(logits_NC: np.ndarray, share: float) -> tuple[list[int], list[float], list[bool]]:
    """Classes, probabilities and whether they are sure, image by image."""
    p = [[math.exp(x) / sum(map(math.exp, row)) for x in row] for row in logits_NC.tolist()]
    top = [max(row) for row in p]
    entropy = [-sum(x * math.log(x) for x in row) for row in p]

    def quantile(values: list[float], q: float) -> float:
        at = q * (len(values) - 1)
        low, rest = int(at), at - int(at)
        ordered = [*sorted(values), math.inf]
        return ordered[low] + (rest * (ordered[low + 1] - ordered[low]) if rest else 0)

    limits = quantile(top, share), quantile(entropy, 1 - share)
    sure = [t > limits[0] and e < limits[1] for t, e in zip(top, entropy, strict=True)]
    return [row.index(max(row)) for row in p], top, sure


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5])
def test_guesses_are_those_of_loops(logits_NC: np.ndarray, share: float) -> None:
    classes, top, sure = plainly(logits_NC, share)
    guesses = Guesses.of(logits_NC, share)
    assert guesses.classes_N.tolist() == classes
    assert guesses.sure_N.tolist() == sure
    assert 0 < sum(sure) < N
    of_sure = Counter(c for c, s in zip(classes, sure, strict=True) if s)
    sure_C, guessed_C = guesses.counts(C + 1)
    assert sure_C.tolist() == [of_sure[c] for c in range(C + 1)]
    assert guessed_C.tolist() == [Counter(classes)[c] for c in range(C + 1)]

    quota_C = np.array([3, 0, 2, 50, 1])
    expected = [UNLABELLED] * N
    for c in range(C):
        rows = sorted((i for i in range(N) if classes[i] == c), key=lambda i: -top[i])
        for i in rows[: quota_C[c]]:
            expected[i] = c
    assert guesses.chosen(quota_C).tolist() == expected
    assert images_chosen(quota_C, guessed_C) == sum(label != UNLABELLED for label in expected)
    again = Guesses.read(guesses.table())
    assert again.chosen(quota_C).tolist() == expected
    assert again.sure_N.tolist() == sure


def test_a_client_without_any_quota_keeps_its_best_guess(logits_NC: np.ndarray) -> None:
    classes, top, _ = plainly(logits_NC, 0.5)
    best = top.index(max(top))
    labels_N = Guesses.of(logits_NC, 0.5).chosen(np.zeros(C, dtype=np.int64))
    assert {best: classes[best]} == {i: c for i, c in enumerate(labels_N) if c != UNLABELLED}
    assert images_chosen(np.zeros(C, dtype=np.int64), np.array([1, 2, 0, 4])) == 1
    alone = Guesses.of(logits_NC[:1], 0.5)
    assert alone.counts(C)[0].sum() == 0, "a single image is above no quantile"
    assert (alone.chosen(np.zeros(C, dtype=np.int64)) != UNLABELLED).all()
    # Equally probable images keep their order.
    same = Guesses.of(np.repeat(logits_NC[:1], 5, 0), 0.5)
    assert same.place_N.tolist() == list(range(5))


def test_quotas_are_shares_of_equal_targets() -> None:
    own_KC = np.array([[5, 1, 0, 0], [1, 1, 0, 0], [0, 0, 7, 0]])
    sums = own_KC.sum(0).tolist()
    for phase in (1, 2, 5):
        totals = Totals(phase, tuple(sums), images=37, clients=3)
        assert totals.per_class == math.ceil(Fraction(15, 4)) == 4
        unknown = math.ceil(Fraction(37 * phase, 4 * 4 * 3))
        for own_C in own_KC:
            expected = [
                math.ceil(Fraction(4 * n, s)) if s else unknown
                for n, s in zip(own_C.tolist(), sums, strict=True)
            ]
            assert totals.quota(own_C).tolist() == expected
    nobody = Totals(1, (0, 0), images=16, clients=4)
    assert nobody.quota(np.array([0, 0])).tolist() == [1, 1]


def test_the_server_counts_only_what_can_be() -> None:
    server = PseudoLabels(2)
    assert server.settings() == {}
    assert server.waiting(1, {4, 2}) == [2, 4]
    row = {"sure-0": 1, "sure-1": 2, "guessed-0": 3, "guessed-1": 2}
    faults = server.add({2: row, 4: row}, {2: 5, 4: 6}.__getitem__)
    assert list(faults) == [4]
    assert "counts 5 training images of 6" in faults[4]
    assert server.settings() == {TOTALS: [1, 5, 1, 1, 2]}
    assert server.waiting(1, {4, 2}) == [4], "it is asked again"
    assert server.images_of(2) == 2 + 2
    assert server.images_of(4) == 1
    assert server.line() == {"phase": 1, "clients": 1, "sure": 3, "chosen": 4}
    assert server.waiting(2, {2}) == [2]
    assert server.settings() == {}, "a new phase has other totals"


BLIND: dict[str, Any] = {
    "method": {"name": "promptfl", "context_tokens": 2},
    "partition": {"unlabelled_clients": 4, "relabel_every": 2},
    "federation": {"rounds": 3},
}
HALF = BLIND | {"partition": {"unlabelled_clients": 2, "relabel_every": 2}}


def test_the_schedule_runs_through_in_every_phase() -> None:
    config = small_config(**BLIND)
    stages = [stage_of(config, r) for r in (1, 2, 3)]
    assert [s[:3] for s in stages] == [(1, 1, 2), (1, 2, 2), (2, 1, 2)]
    assert stages[0].seed == config.seed != stages[2].seed
    # The method decides where the partition does not.
    assert small_config(method={"name": "fedcopl"}).relabel_every == 5
    assert small_config(method={"name": "ditto", "base": "fedcopl"}).relabel_every == 5
    none = {"partition": {"relabel_every": 0, "unlabelled_clients": 1}}
    assert not small_config(method={"name": "fedcopl"}, **none).trains_without_labels
    assert small_config(**BLIND).able_to_train == 4


def start(workspace: Workspace) -> tuple[Federation, InlineGrid]:
    grid = InlineGrid(workspace)
    federation = Federation(workspace, grid)
    federation.join()
    return federation, grid


def test_clients_without_labels_train_on_their_quotas(make_workspace: MakeWorkspace) -> None:
    workspace = make_workspace(**BLIND)
    assert workspace.trainable == workspace.possible_attackers == [0, 1, 2, 3]
    federation, grid = start(workspace)
    line = federation.train_round(1)
    assert line["clients"] == {"sampled": 4, "accepted": 4, "rejected": 0, "unlabelled": 4}
    classes = len(workspace.task.class_names)
    clip, task = workspace.clip, workspace.task
    zero_CD = clip.zero_shot_classifier(task.class_names, task.templates)
    guesses = []
    for client in range(4):
        inputs = workspace.views[0].rows(workspace.partition.train(client))
        logits_NC = clip.logit_scale * (inputs.features @ zero_CD.T)
        guesses.append(Guesses.of(logits_NC.double().numpy(), 0.5))
    counts = [g.counts(classes)[0] for g in guesses]
    images = sum(len(workspace.partition.train(c)) for c in range(4))
    totals = Totals(1, tuple(sum(counts).tolist()), images, 4)  # type: ignore[attr-defined]
    trained = 0
    for client, (own, sure_C) in enumerate(zip(guesses, counts, strict=True)):
        expected_N = own.chosen(totals.quota(sure_C))
        settings = ConfigRecord({**federation.pseudo.settings()})
        stored = grid.private.get(client)
        assert stored is not None
        labels_N = pseudo_labels(workspace, client, settings, stored)
        assert labels_N is not None
        assert labels_N.tolist() == expected_N.tolist()
        data = workspace.train_data(client, None, labels_N)
        taken = expected_N != UNLABELLED
        assert data.labels_N.tolist() == expected_N[taken].tolist()
        rows = workspace.views[0].rows(workspace.partition.train(client)[taken])
        assert torch.equal(data.plain().features, rows.features)
        assert federation.pseudo.images_of(client) == len(data)
        trained += len(data)
    assert line["pseudo_labels"] == {
        "phase": 1, "clients": 4, "sure": sum(totals.sure_C), "chosen": trained
    }  # fmt: skip
    assert "pseudo_labels" not in federation.train_round(2)
    third = federation.train_round(3)
    assert third["pseudo_labels"]["phase"] == 2
    assert [float((grid.private.get(c) or {})[PHASE]) for c in range(4)] == [2.0] * 4


def test_labels_of_clients_without_any_change_nothing(make_workspace: MakeWorkspace) -> None:
    def trained(change: int) -> tuple[str, list[torch.Tensor]]:
        workspace = make_workspace(**HALF)
        hidden = workspace.partition.unlabelled
        own = np.concatenate([workspace.partition.train(k) for k in hidden])
        labels_N = workspace.dataset.labels_N.copy()
        labels_N[own] = (labels_N[own] + change) % len(workspace.dataset.class_names)
        workspace.dataset = replace(workspace.dataset, labels_N=labels_N)
        federation, grid = start(workspace)
        lines = [federation.train_round(r) for r in (1, 2, 3)]
        assert [line["clients"]["unlabelled"] for line in lines] == [2, 2, 2]
        for client in range(4):
            assert (GUESSES in (grid.private.get(client) or {})) == (client in hidden)
            if client not in hidden:
                assert (workspace.train_data(client).labels_N != UNLABELLED).all()
        stored = [(grid.private.get(k) or {})[GUESSES] for k in sorted(hidden)]
        return array_checksum(to_arrays(federation.arrays)), stored

    first, second = trained(0), trained(1)
    assert first[0] == second[0]
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@pytest.mark.parametrize("method", ["fedpgp", "afl", "tip_adapter"])
def test_any_method_trains_on_pseudo_labels_in_blocks_as_alone(
    make_workspace: MakeWorkspace, method: str
) -> None:
    def trained(per_block: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        sections = {**HALF, "method": {"name": method}, "federation": {"rounds": 3}}
        workspace = make_workspace(**sections, simulation={"clients_per_block": per_block})
        federation, grid = start(workspace)
        lines = [federation.train_round(r) for r in (1, 2, 3)]
        assert all(line["clients"]["accepted"] == 4 for line in lines)
        private = [grid.private.get(c) or {} for c in range(4)]
        return to_arrays(federation.arrays), private

    (together, own), (alone, own_alone) = trained(4), trained(1)
    for name, value in together.items():
        np.testing.assert_allclose(value, alone[name], rtol=1e-3, atol=1e-5)
    for one, other in zip(own, own_alone, strict=True):
        assert one.keys() == other.keys()
        if GUESSES in one:
            assert torch.equal(one[PHASE], other[PHASE])


def test_a_resumed_run_goes_on_with_the_same_labels(
    make_workspace: MakeWorkspace, tmp_path: Path
) -> None:
    """Interrupted within a phase: the server asks again, and clients have their guesses."""
    workspace = make_workspace(**{**BLIND, "method": {"name": "fedpgp"}})

    play(workspace, tmp_path / "whole")
    for stop in (1, 2):
        part = tmp_path / f"part{stop}"
        with pytest.raises(KeyboardInterrupt):
            play(workspace, part, StopAfter(stop))
        play_on(workspace, part)
        lines = [(f / "metrics.jsonl").read_text() for f in (tmp_path / "whole", part)]
        assert lines[0] == lines[1]
    phases = [json.loads(x).get("pseudo_labels", {}).get("phase") for x in lines[0].splitlines()]
    assert phases == [None, 1, None, 2]


def test_a_client_that_missed_the_beginning_says_so(make_workspace: MakeWorkspace) -> None:
    workspace = make_workspace(**BLIND)
    settings = ConfigRecord({TOTALS: [2, 9, 4, *[1] * len(workspace.task.class_names)]})
    stored = {GUESSES: torch.zeros(3, 3), PHASE: torch.tensor([1.0])}
    with pytest.raises(UserError, match=r"client 1 .*phase 2"):
        pseudo_labels(workspace, 1, settings, stored)
    for wrong in ([2, 9, 4, 1], [2, 9, 0, *[1] * 6], [2, 9, 4, *[-1] * 6]):
        with pytest.raises(UserError, match="same experiment"):
            pseudo_labels(workspace, 1, ConfigRecord({TOTALS: wrong}), stored)


def test_a_lost_answer_costs_a_round_and_not_the_run(
    make_workspace: MakeWorkspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = make_workspace(**BLIND)
    federation, grid = start(workspace)
    exchange = grid.send_and_receive

    def without_client_2(messages: list[Message], **kwargs: Any) -> list[Message]:
        if messages[0].metadata.message_type == MessageType.EVALUATE:
            messages = [m for m in messages if m.metadata.dst_node_id != node]
        return list(exchange(messages, **kwargs))

    node = federation.strategy.known.node_of_client[2]
    monkeypatch.setattr(grid, "send_and_receive", without_client_2)
    line = federation.train_round(1)
    assert line["pseudo_labels"]["clients"] == 3
    assert line["clients"]["accepted"] == 3
    assert "phase 1" in line["dropped"]["2"]
    monkeypatch.setattr(grid, "send_and_receive", exchange)
    assert federation.train_round(2)["clients"]["accepted"] == 4


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"secure_aggregation": {"enabled": True}}, "secure_aggregation"),
        ({"privacy": {"noise": 1.0}}, "privacy.noise"),
        ({"privacy": {"image_noise": 1.0}}, "privacy.image_noise"),
        ({"strategy": {"name": "dp_fedavg"}}, "strategy.name=dp_fedavg"),
        ({"asynchronous": {"enabled": True}, "clock": {"enabled": True}}, "asynchronous"),
        ({"attack": {"kind": "label_flip", "share": 0.5}}, "label_flip"),
        ({"protocols": ["global", "privacy_audit"]}, "privacy_audit"),
        ({"method": {"name": "fdbpl"}}, "fdbpl"),
        ({"data": {"source": "aerial_objects"}}, "aerial_objects"),
        (
            {"partition": {**BLIND["partition"], "labels_per_round": 2, "active_rounds": 1}},
            "labels_per_round",
        ),
    ],
)
def test_what_cannot_be_is_refused(sections: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=rf"relabel_every=2.*{named}"):
        small_config(**{**BLIND, **sections})


def test_a_partition_file_with_clients_without_labels_is_checked_too(
    make_workspace: MakeWorkspace,
) -> None:
    workspace = make_workspace(
        method={"name": "promptfl"},
        partition={"relabel_every": 2},
        secure_aggregation={"enabled": True},
    )
    workspace.partition = replace(workspace.partition, unlabelled=frozenset({1}))
    with pytest.raises(UserError, match="secure_aggregation"):
        Federation(workspace, InlineGrid(workspace))


def test_a_node_that_withholds_its_counts_refuses(make_workspace: MakeWorkspace) -> None:
    private = Policy(class_counts="withheld", test_accuracy=False)
    [reason] = objections(private, small_config(**BLIND))
    assert "relabel_every" in reason
    assert not objections(private, small_config(method={"name": "promptfl"}))
    assert not objections(Policy(), small_config(**BLIND))
