"""A node's own settings, and what an experiment cannot make a node do."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.common.config import parse_config_args

from fedprompt.config.schema import Config
from fedprompt.deploy.folders import format_node_config
from fedprompt.deploy.node_config import (
    NodeSettings,
    on_node,
    on_server,
    read_node_settings,
    state_folder,
)
from fedprompt.errors import UserError
from tests.support.builders import small_config


def folders_config(**data: Any) -> Config:
    defaults = {"source": "client_folders", "class_names": ["a", "b"], "root": "/server/tests"}
    return small_config(data=defaults | data, partition={"clients": 3})


def test_settings_are_read(tmp_path: Path) -> None:
    config = {"partition-id": 2, "data": str(tmp_path), "device": "cpu", "threads": 3}
    config |= {"state-dir": "~/s", "cache-dir": "/c", "checkpoint": "/w.pt", "num-partitions": 4}
    node = read_node_settings(config)
    home = str(Path.home() / "s")
    assert node == NodeSettings(2, str(tmp_path), home, "/c", "cpu", 3, "/w.pt", same_machine=True)
    strict = read_node_settings(
        {"partition-id": 0, "require-secure-aggregation": True, "require-noise": 1}
    )
    assert strict == NodeSettings(0, require_secure_aggregation=True, require_noise=1.0)
    assert read_node_settings({"partition-id": 0}) == NodeSettings(0)
    assert read_node_settings({"partition-id": 0, "root": "/r"}) == NodeSettings(0, root="/r")
    # Flower's simulation engine sets this key; its clients run on the server's machine.
    simulated = read_node_settings({"partition-id": 0, "num-partitions": 4})
    assert simulated == NodeSettings(0, same_machine=True)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({}, "partition-id is None"),
        ({"partition-id": -1}, "partition-id is -1"),
        ({"partition-id": "0"}, "partition-id is '0'"),
        ({"partition-id": True}, "partition-id is True"),
        ({"partition-id": 0, "dat": "x"}, "Did you mean 'data'?"),
        ({"partition-id": 0, "device": "tpu"}, "device is 'tpu'"),
        ({"partition-id": 0, "threads": "two"}, "threads is 'two'"),
        ({"partition-id": 0, "same-machine": 1}, "same-machine is 1"),
        ({"partition-id": 0, "require-noise": -1}, "require-noise is -1"),
        ({"partition-id": 0, "require-noise": float("nan")}, "require-noise is nan"),
        ({"partition-id": 0, "require-noise": "1"}, "require-noise is '1'"),
        (
            {"partition-id": 0, "require-secure-aggregation": "no"},
            "require-secure-aggregation is 'no'",
        ),
    ],
)
def test_wrong_settings_are_refused(given: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        read_node_settings(given)
    assert line in str(caught.value)


def test_a_node_reads_its_own_folder_only() -> None:
    config = folders_config(folders=["/a", "/b", "/c"])
    there = on_node(config, NodeSettings(1, "/mine", cache_dir="/cache", device="cpu", threads=2))
    assert there.data.folders == ["", "/mine", ""]
    assert there.data.root is None
    assert (there.output.cache, there.backbone.device, there.simulation.threads) == (
        "/cache",
        "cpu",
        2,
    )
    server = on_server(config)
    assert server.data.folders == ["", "", ""]
    assert server.data.root == "/server/tests"


def test_no_path_of_the_experiment_is_followed() -> None:
    config = small_config(
        data={"source": "folder", "root": "/home/secret"}, partition={"clients": 2},
        output={"cache": "/etc"},
    )  # fmt: skip
    with pytest.raises(UserError, match=r"data\.source=folder"):
        on_node(config, NodeSettings(0, "/mine"))
    assert on_node(folders_config(), NodeSettings(0, "/mine")).output.cache is None


@pytest.mark.parametrize(
    ("node", "line"),
    [
        (NodeSettings(3, "/mine"), "partition.clients"),
        (NodeSettings(0), "--data"),
    ],
)
def test_an_experiment_that_does_not_fit_the_node(node: NodeSettings, line: str) -> None:
    with pytest.raises(UserError, match=line):
        on_node(folders_config(), node)


@pytest.mark.parametrize(
    ("node", "sections", "line"),
    [
        (
            NodeSettings(0, "/mine", require_secure_aggregation=True),
            {"privacy": {"noise": 9.0}},
            "secure_aggregation.enabled=false",
        ),
        (
            NodeSettings(0, "/mine", require_noise=1.5),
            {"privacy": {"noise": 1.0}},
            "privacy.noise=1.",
        ),
        (
            NodeSettings(0, "/mine", require_noise=1.0),
            {"privacy": {"noise": 1.0, "noise_seed": 3}},
            "privacy.noise_seed",
        ),
    ],
)
def test_an_experiment_that_protects_less_than_the_node_requires(
    node: NodeSettings, sections: dict[str, Any], line: str
) -> None:
    config = replace(folders_config(), privacy=small_config(**sections).privacy)
    with pytest.raises(UserError) as caught:
        on_node(config, node)
    assert line in str(caught.value)
    enough = small_config(privacy={"noise": 2.0}, secure_aggregation={"enabled": True})
    protected = {"privacy": enough.privacy, "secure_aggregation": enough.secure_aggregation}
    on_node(replace(config, **protected), node)


def test_private_prompts_are_stored_in_the_nodes_state_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert state_folder(NodeSettings(0, state_dir="/s"), "abc", 7) == Path("/s/abc")
    assert state_folder(NodeSettings(0, state_dir="/s"), "", 7) == Path("/s/run-7")
    monkeypatch.setenv("FEDPROMPT_STATE", "/env")
    assert state_folder(NodeSettings(0), "abc", 7) == Path("/env/abc")
    for name in ("../up", "a/b", ".hidden", "a" * 200, "a\n", "ä" + os.sep):
        with pytest.raises(UserError, match="not a folder name"):
            state_folder(NodeSettings(0, state_dir="/s"), name, 7)


def test_flower_parses_a_formatted_node_config() -> None:
    settings = {"partition-id": 3, "data": "/a folder/with = signs", "threads": 2, "device": "cpu"}
    assert parse_config_args([format_node_config(settings)]) == settings
    for odd in ("it's", 'a"b', "two\nlines"):
        with pytest.raises(UserError, match="quotes"):
            format_node_config({"data": odd})


@pytest.mark.parametrize("kind", ["sign_flip", "backdoor", "crash"])
def test_an_attack_of_a_simulation_is_refused(kind: str) -> None:
    """Nodes never attack, so a run would look as if the strategy had withstood it."""
    with pytest.raises(UserError, match=rf"attack\.kind={kind}.*attack\.kind=none") as error:
        on_server(small_config(attack={"kind": kind}))
    assert "\n" not in str(error.value)
