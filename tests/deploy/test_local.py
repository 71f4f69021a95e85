"""What `deploy local` starts its nodes with."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import MagicMock

import pytest

from fedprompt.config.schema import Config
from fedprompt.deploy import local, submit
from fedprompt.experiment.display import QuietDisplay
from tests.support.builders import small_config
from tests.support.federations import config_for


def started(config: Config, folder: Path, monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    """The federation that `run_local` has started for an experiment; none of it is real."""
    federation = MagicMock()
    federation.__enter__.return_value = federation
    monkeypatch.setattr(local, "LocalFederation", lambda *_: federation)
    monkeypatch.setattr(submit, "follow", lambda *_, **__: None)
    monkeypatch.setattr(submit, "conclude", lambda *_: folder)
    local.run_local(config, QuietDisplay(), folder / "f")
    return federation


def test_a_node_that_lends_a_folder_is_given_its_own_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(tmp_path / "images", tmp_path / "run", clients=2)
    federation = started(config, tmp_path, monkeypatch)
    given = [call.args for call in federation.start_node.call_args_list]
    folders = [str(tmp_path / "images" / f"client-{k}") for k in range(2)]
    assert given == [(k, {"data": folders[k], "checkpoint": None}) for k in range(2)]
    assert federation.submit.call_args.kwargs == {"same_machine": False}


def test_nodes_that_lend_nothing_open_the_paths_of_the_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(partition={"clients": 2}, output={"dir": str(tmp_path / "run")})
    federation = started(config, tmp_path, monkeypatch)
    given = [call.args for call in federation.start_node.call_args_list]
    assert given == [(0, {"same-machine": True}), (1, {"same-machine": True})]
    assert federation.submit.call_args.kwargs == {"same_machine": True}
