"""How an evaluation grows with the number of clients, counted in positions through the towers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.data.dataset import ImageDataset
from fedprompt.data.features.table import FeatureTable
from fedprompt.data.partition import make_partition
from fedprompt.federation.common_evaluation import count_positions
from fedprompt.federation.server_app import Federation
from fedprompt.methods.base import Method
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.workspace import Workspace
from tests.support.builders import small_config
from tests.support.detectors import strategy_of


@pytest.fixture(scope="module")
def federation(
    method: Method, clip: FrozenCLIP, dataset: ImageDataset, columns: FeatureTable
) -> Federation:
    """Four clients, each of them a block, as on a large backbone."""
    config = small_config(
        method={"name": method.name},
        strategy=strategy_of(method),
        partition={"clients": 4, "scheme": "iid"},
        simulation={"clients_per_block": 1},
    )
    partition = make_partition(dataset, config.partition, config.seed)
    workspace = Workspace(config, clip, dataset, partition, [columns])
    federation = Federation(workspace, InlineGrid(workspace))
    federation.join()
    return federation


def test_only_own_images_and_private_tensors_cost_more_with_more_clients(
    federation: Federation,
) -> None:
    workspace, test = federation.workspace, federation.common_test
    one = count_positions(workspace)
    private = workspace.method.init_private(workspace.config.seed, 0)
    assert test.is_global == (not private and not workspace.extras_shapes)

    def positions(clients: int) -> int:
        """Positions of an evaluation, apart from the clients' own test images."""
        before = workspace.clip.positions_encoded
        line = federation.evaluate(0, range(clients))
        assert line["personal_on_global"]["clients"] == list(range(clients))
        workspace.memo.clear()  # as training does
        own = sum(len(workspace.partition.test(client)) for client in range(clients))
        return workspace.clip.positions_encoded - before - own * one.image

    one_client, two, four = (positions(clients) for clients in (1, 2, 4))
    images = len(workspace.partition.server_test)
    if test.is_global:
        # The model is encoded once and scored once on the server's images, for all clients.
        assert one_client == two == four == one.model + images * one.image
    elif not private:
        # What the server sends beside the shared tensors is the same for all clients.
        assert one_client == two == four
    else:
        each = one.model + images * (one.private or one.image)
        assert (two - one_client, four - two) == (each, 2 * each)


def test_one_model_of_everyone_has_one_score(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients who are asked answer what the server writes without asking them, bit for bit."""
    if not federation.common_test.is_global:
        pytest.skip("every client has a model of its own")
    lines = []
    for is_global in (True, False):
        asked = replace(federation.common_test, is_global=is_global)
        monkeypatch.setattr(federation, "common_test", asked)
        lines.append(federation.evaluate(0))
    assert lines[0] == lines[1]
    assert set(lines[0]["personal_on_global"]["accuracy"]) == {lines[0]["global"]["accuracy"]}
