"""What a method promises that says it learns without labels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedprompt.federation.server_app import Federation
from fedprompt.files.tensors import array_checksum
from fedprompt.messages import to_arrays
from fedprompt.methods.base import Method
from fedprompt.methods.registry import all_methods
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.simulation.private_log import PrivateLog
from fedprompt.workspace import Workspace

DECLARED = [name for name, cls in all_methods().items() if cls.Config().learns_without_labels]


@pytest.mark.parametrize("method", DECLARED, indirect=True)
@pytest.mark.parametrize("hidden", [{0, 2}, {0, 1, 2}])
def test_hidden_labels_change_nothing_and_clients_without_learn(
    method: Method, workspace: Workspace, hidden: set[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    if not method.trainable:
        pytest.skip(f"{method.name} learns nothing")
    partition = replace(workspace.partition, unlabelled=frozenset(hidden))

    def trained(labels_N: np.ndarray) -> tuple[str, list[dict[str, torch.Tensor] | None]]:
        dataset = replace(workspace.dataset, labels_N=labels_N)
        own = Workspace(workspace.config, workspace.clip, dataset, partition, workspace.views)
        log = PrivateLog(tmp_path_factory.mktemp("private") / "log", 3)
        federation = Federation(own, InlineGrid(own, log))
        federation.join()
        for server_round in (1, 2, 3):
            line = federation.train_round(server_round)
            assert line["clients"]["rejected"] == 0
            assert line["clients"]["unlabelled"] == len(hidden & set(federation.strategy.sampled))
        assert method.init_private(1, 0) or not federation.untrained
        private = [log.get(client) for client in range(3)]
        log.close()
        return array_checksum(to_arrays(federation.arrays)), private

    true_N = workspace.dataset.labels_N
    own = np.concatenate([workspace.partition.train(client) for client in hidden])
    other_N = true_N.copy()
    other_N[own] = (true_N[own] + 1) % len(workspace.dataset.class_names)
    first, second = trained(true_N), trained(other_N)
    assert first[0] == second[0]
    for one, another in zip(first[1], second[1], strict=True):
        assert (one is None) == (another is None)
        assert all(torch.equal(v, (another or {})[n]) for n, v in (one or {}).items())
