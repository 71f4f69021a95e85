"""What `deploy run` submits to the SuperLink: the app, the experiment and the nodes' clients."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from flwr.cli.config_utils import load_and_validate

from fedprompt.config.schema import to_yaml
from fedprompt.deploy.bundle import write_bundle, write_run_config
from fedprompt.deploy.example import write_example
from fedprompt.deploy.folders import ServerFolder
from fedprompt.deploy.key_registration import REGISTERED, registered_clients
from fedprompt.deploy.node_config import NodeSettings, on_node
from fedprompt.deploy.submit import new_run
from fedprompt.errors import UserError
from fedprompt.experiment.compose import compose, parse
from tests.support.builders import small_config
from tests.support.doc_pages import DOCS, blocks, commands


def test_the_submitted_app_consists_of_imports_only(tmp_path: Path) -> None:
    write_bundle(tmp_path / "app")
    config, warnings = load_and_validate(tmp_path / "app" / "pyproject.toml")
    assert warnings == []
    components = config["tool"]["flwr"]["app"]["components"]
    assert set(components) == {"serverapp", "clientapp"}
    code = [p.read_text() for p in (tmp_path / "app").rglob("*.py")]
    statements = {line for text in code for line in text.splitlines() if line and '"""' not in line}
    assert statements == {
        "from fedprompt.deploy.client_app import app",
        "from fedprompt.deploy.server_app import app",
        '__all__ = ["app"]',
    }


def test_an_experiment_is_unchanged_by_flowers_run_config(tmp_path: Path) -> None:
    config = small_config(
        data={"templates": ['an "aerial" image\\of a {}, ünïcödé 🛰'], "title": "t"}
    )
    path = tmp_path / "run.toml"
    write_run_config(path, {"config": to_yaml(config), "run": "r"})
    read = tomllib.loads(path.read_text(encoding="utf-8"))
    assert parse(read["config"]) == config


def test_a_text_that_is_no_experiment_is_refused() -> None:
    for text in ("a: [", "- 1", "method: {name: nothing}", "data: !!python/object:os.system {}"):
        with pytest.raises(UserError, match="config:"):
            parse(text)


def test_the_documented_experiment_runs_on_nodes_with_their_own_folders(tmp_path: Path) -> None:
    (text,) = (b.text for b in blocks(DOCS / "deployment.md") if b.language == "yaml")
    (tmp_path / "experiment.yaml").write_text(text)
    config = compose(str(tmp_path / "experiment.yaml"), [])
    there = on_node(new_run(config), NodeSettings(2, "/srv/images"))
    assert there.data.folders == ["", "", "/srv/images"]
    assert there.data.root is None


def test_the_documented_resume_names_the_experiments_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (text,) = (b.text for b in blocks(DOCS / "deployment.md") if b.language == "yaml")
    (tmp_path / "experiment.yaml").write_text(text)
    example = write_example(tmp_path / "images", nodes=3, images_per_class=4)
    resumed = {c.split()[-1] for c in commands(DOCS / "deployment.md") if "deploy run" in c}
    for experiment in (tmp_path / "experiment.yaml", example):
        path = new_run(compose(str(experiment), [])).output.dir
        assert path is not None
        assert str(Path(path).relative_to(tmp_path)) in resumed


def test_a_key_is_registered_for_one_client(tmp_path: Path) -> None:
    assert registered_clients(ServerFolder(tmp_path)) == {}
    (tmp_path / REGISTERED).write_text(json.dumps({"1": {"key": "k", "node": 77}}))
    assert registered_clients(ServerFolder(tmp_path)) == {77: 1}
