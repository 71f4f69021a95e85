"""The installed package: complete, and never mixed up with a foreign package of the same name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from fedprompt.deploy.guard import processes_with
from tests.support import ROOT
from tests.support.federations import needs_processes
from tests.support.installations import Environment, build_wheel

SMALL = (
    "data.images_per_class=8", "data.domains=[savanna]", "partition.clients=3",
    "partition.alpha=1", "federation.rounds=1", "evaluation.local_only=false",
    "output.report=false", "simulation.threads=1",
)  # fmt: skip
LOCATE = """
import sys
import fedprompt
cls = fedprompt.strategies.get("fedavg")
print(fedprompt.__file__, sys.modules[cls.__module__].__file__, "strategies" in sys.modules)
"""


@pytest.fixture(scope="module", params=["wheel", "editable"])
def environment(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Environment:
    return Environment(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A working folder with somebody else's `strategies` and `configs`."""
    (tmp_path / "strategies").mkdir()
    for name in ("__init__", "fedavg"):
        (tmp_path / "strategies" / f"{name}.py").write_text("raise SystemExit('foreign')\n")
    (tmp_path / "configs" / "experiment").mkdir(parents=True)
    return tmp_path


def test_the_wheel_is_complete_and_has_one_top_level_package(tmp_path: Path) -> None:
    names = zipfile.ZipFile(build_wheel(tmp_path)).namelist()
    assert max(Counter(names).values()) == 1
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"fedprompt"}
    assert {name.partition("/")[0] for name in names} - {"fedprompt"}, "there is a dist-info folder"
    for top, inside in (("strategies", "fedprompt/strategies"), ("configs", "fedprompt/configs")):
        files = [p for p in (ROOT / top).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
        assert files
        for path in files:
            assert f"{inside}/{path.relative_to(ROOT / top)}" in names
    data = [p for p in (ROOT / "fedprompt").rglob("*") if p.suffix in (".json", ".yaml", ".j2")]
    for path in data:
        assert str(path.relative_to(ROOT)) in names
    assert "fedprompt/strategies/__init__.py" in names


def test_the_app_that_flower_sends_holds_every_module(tmp_path: Path) -> None:
    """`flwr run` leaves out whatever looks like a test, such as a module called `test_sets`."""
    flower = Path(sys.executable).parent / "flwr"
    if not flower.is_file():
        pytest.skip("Flower's command is not installed")
    environment = {**os.environ, "FLWR_HOME": str(tmp_path)}
    done = subprocess.run(
        [flower, "build", "--app", ROOT],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (app,) = tmp_path.glob("*.fab")
    names = set(zipfile.ZipFile(app).namelist())
    modules = {
        str(path.relative_to(ROOT)) for top in ("fedprompt", "strategies")
        for path in (ROOT / top).rglob("*.py")
    }  # fmt: skip
    assert modules
    assert modules - names == set()


def test_a_foreign_strategies_package_is_not_imported(
    environment: Environment, foreign: Path
) -> None:
    # `-c` puts the working folder in front of everything else on the path.
    package, strategy, mixed = environment.run("-c", LOCATE, cwd=foreign).split()
    assert mixed == "False"
    wheel = environment.kind == "wheel"
    place = environment.packages if wheel else ROOT
    assert Path(package) == place / "fedprompt" / "__init__.py"
    inside = "fedprompt/strategies" if wheel else "strategies"
    assert Path(strategy).parent == place / inside
    assert (environment.packages / "fedprompt").is_dir() == wheel, "an editable one copies nothing"


def test_shipped_configs_are_found(environment: Environment, foreign: Path) -> None:
    assert "quickstart" in environment.run("-m", "fedprompt", "list", cwd=foreign)


@pytest.mark.slow
def test_a_run_beside_a_foreign_strategies_package(environment: Environment, foreign: Path) -> None:
    environment.run(
        "-m", "fedprompt", "run", "label_skew", *SMALL, "strategy=fedavgm", "output.dir=run",
        cwd=foreign,
    )  # fmt: skip
    assert json.loads((foreign / "run" / "summary.json").read_text())["strategy"] == "fedavgm"


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_processes
def test_a_deployment_from_a_wheel(tmp_path_factory: pytest.TempPathFactory, foreign: Path) -> None:
    environment = Environment(tmp_path_factory.mktemp("deploy"), "wheel")
    environment.add_flower_commands()
    command = ("-m", "fedprompt", "deploy")
    environment.run(*command, "example", "site", "--nodes", 2, "--images", 4, cwd=foreign)
    (experiment,) = (foreign / "site").rglob("*.yaml")
    environment.run(
        *command, "local", experiment, "federation.rounds=1", "output.dir=run",
        "output.report=false",
        cwd=foreign, FEDPROMPT_TEST=str(foreign),
    )  # fmt: skip
    assert json.loads((foreign / "run" / "summary.json").read_text())["rounds"] == 1
    assert processes_with(f"FEDPROMPT_TEST={foreign}") == []
