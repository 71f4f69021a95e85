"""What `deploy run` submits to the SuperLink: the app, the experiment and the nodes' clients."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import cast

import pytest
from flwr.cli.config_utils import load_and_validate

from fedprompt.config.schema import to_yaml
from fedprompt.deploy import submit
from fedprompt.deploy.bundle import write_bundle, write_run_config
from fedprompt.deploy.example import write_example
from fedprompt.deploy.folders import ServerFolder
from fedprompt.deploy.key_registration import REGISTERED, registered_clients
from fedprompt.deploy.node_config import NodeSettings, on_node
from fedprompt.deploy.submission import read_submission
from fedprompt.deploy.submit import new_run, run_on_server, settings_of, start_run
from fedprompt.errors import UserError
from fedprompt.experiment.compose import compose, parse
from fedprompt.experiment.display import LogDisplay
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


def test_the_example_runs_on_nodes_and_on_one_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_example(tmp_path / "scenes", nodes=2, images_per_class=2)
    config = compose(str(path), [f"output.dir={tmp_path / 'run'}"])
    submitted: list[str] = []

    def submit(server: ServerFolder, settings: dict[str, str], *_: object) -> Path:
        submitted.append(settings["config"])
        return tmp_path

    monkeypatch.setattr("fedprompt.deploy.submit._submit_and_follow", submit)
    said: list[str] = []
    run_on_server(cast("ServerFolder", None), config, LogDisplay(said.append))
    (text,) = submitted
    assert parse(text).data.folders == []  # type: ignore[attr-defined]
    assert str(tmp_path / "scenes" / "client-0") not in text, "a folder of one machine stays there"
    assert ["--data" in line for line in said] == [True]


def test_a_text_that_is_no_experiment_is_refused() -> None:
    for text in ("a: [", "- 1", "method: {name: nothing}", "data: !!python/object:os.system {}"):
        with pytest.raises(UserError, match="config:"):
            parse(text)


def documented_experiment() -> str:
    """The experiment of the page on deployments."""
    yaml = [b.text for b in blocks(DOCS / "deployment.md") if b.language == "yaml"]
    (text,) = (text for text in yaml if text.startswith("experiment:"))
    return text


def test_the_documented_experiment_runs_on_nodes_with_their_own_folders(tmp_path: Path) -> None:
    text = documented_experiment()
    (tmp_path / "experiment.yaml").write_text(text)
    config = compose(str(tmp_path / "experiment.yaml"), [])
    there = on_node(new_run(config), NodeSettings(2, "/srv/images"))
    assert there.data.folders == ["", "", "/srv/images"]
    assert there.data.root is None


def test_the_documented_resume_names_the_experiments_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = documented_experiment()
    (tmp_path / "experiment.yaml").write_text(text)
    example = write_example(tmp_path / "images", nodes=3, images_per_class=4)
    resumed = {c.split()[-1] for c in commands(DOCS / "deployment.md") if "deploy run" in c}
    for experiment in (tmp_path / "experiment.yaml", example):
        path = new_run(compose(str(experiment), [])).output.dir
        assert path is not None
        assert str(Path(path).relative_to(tmp_path)) in resumed


@pytest.fixture
def submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ServerFolder:
    """A server's folder from which `start_run` can submit, with one registered node."""
    server = ServerFolder(tmp_path / "server")
    server.path.mkdir()
    (server.path / REGISTERED).write_text(json.dumps({"1": {"key": "k", "node": 77}}))
    monkeypatch.setattr(submit, "run_flwr", lambda command, environment: '"run-id": 5')
    for key, value in server.environment.items():
        monkeypatch.setenv(key, value)
    return server


@pytest.mark.parametrize("same_machine", [False, True])
def test_paths_of_the_server_do_not_travel(
    tmp_path: Path, submitted: ServerFolder, same_machine: bool
) -> None:
    data = {"source": "folder", "root": str(tmp_path / "tests")}
    config = small_config(data=data, output={"dir": str(tmp_path / "run")})
    settings = {**settings_of(config), "resume": str(tmp_path / "run")}
    assert start_run(submitted, settings, tmp_path / "x", {}, same_machine=same_machine) == 5
    text = (tmp_path / "x" / "run.toml").read_text(encoding="utf-8")
    sent = tomllib.loads(text)
    assert set(sent) == {"config", "run", "versions"}
    assert (str(tmp_path) in text) is same_machine
    # The server app, a process of the same machine, knows them all.
    submission = read_submission(sent["run"])
    assert parse(submission.config) == config
    assert submission.resume == settings["resume"]
    assert submission.registered == {77: 1}
    for path in (submitted.path / "submitted").iterdir():
        assert path.stat().st_mode & 0o777 == 0o600


def test_a_run_that_was_not_submitted_here_is_refused(submitted: ServerFolder) -> None:
    (submitted.path / "submitted").mkdir()
    (submitted.path / "submitted" / "ab.json").write_text("{}")
    (submitted.path / "x.json").write_text("{}")
    for run in ("ab", "cd", "../x", "", "a" * 100):
        with pytest.raises(UserError, match="deploy run"):
            read_submission(run)


def test_a_key_is_registered_for_one_client(tmp_path: Path) -> None:
    assert registered_clients(ServerFolder(tmp_path)) == {}
    (tmp_path / REGISTERED).write_text(json.dumps({"1": {"key": "k", "node": 77}}))
    assert registered_clients(ServerFolder(tmp_path)) == {77: 1}
