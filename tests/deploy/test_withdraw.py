"""A run is repeated without a site, and the two are compared."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fedprompt.config.schema import Config
from fedprompt.deploy import withdraw as module
from fedprompt.deploy.folders import ServerFolder, read_server_folder
from fedprompt.deploy.joining.server_side import revoke
from fedprompt.deploy.new_federation import create_federation
from fedprompt.deploy.withdraw import FILE, withdraw, without_client
from fedprompt.errors import UserError
from fedprompt.experiment.display import Display, QuietDisplay
from fedprompt.experiment.run import run as experiment
from tests.support.federations import config_for, write_clients


def test_a_run_without_a_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_clients(tmp_path / "images")
    create_federation(tmp_path / "federation", ["127.0.0.1"], nodes=3, port=9555, days=40)
    server = read_server_folder(tmp_path / "federation" / "server")
    config = config_for(tmp_path / "images", tmp_path / "run", rounds=1)
    path = experiment(config, QuietDisplay())
    started: list[Config] = []

    def on_nodes(_: ServerFolder, repeated: Config, display: Display) -> Path:
        started.append(repeated)
        # Stands for the nodes that are left, whose prompts end elsewhere.
        return experiment(replace(repeated, seed=9), display)

    monkeypatch.setattr(module, "run_on_server", on_nodes)
    with pytest.raises(UserError, match=r"deployment\.json"):
        withdraw(server, path, 1, QuietDisplay())
    (path / "deployment.json").write_text('{"run": "r", "id": 7}')
    with pytest.raises(UserError, match="deploy revoke"):
        withdraw(server, path, 1, QuietDisplay())
    revoke(server, "1")
    with pytest.raises(UserError, match="0 to 2"):
        withdraw(server, path, 3, QuietDisplay())
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    found = withdraw(server, path, 1, QuietDisplay())
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before
    (repeated,) = started
    assert repeated == without_client(config, path, 1)
    assert repeated.federation.min_nodes == 2
    assert repeated.partition.clients == 3
    folder = tmp_path / "run-without-client-1"
    assert json.loads((folder / FILE).read_text()) == found
    assert found["without_client"] == 1
    assert found["distance_of_shared_prompts"] > 0
    assert all(0 <= value <= 1 for value in found["global_accuracy"])
    (path / "summary.json").unlink()
    with pytest.raises(UserError, match="has not finished"):
        withdraw(server, path, 1, QuietDisplay())
