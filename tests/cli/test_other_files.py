"""No command writes over a file that fedprompt has not written, and every command may repeat."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedprompt.cli import main as cli
from fedprompt.deploy.local import run_local
from fedprompt.deploy.new_federation import create_federation
from fedprompt.errors import UserError
from fedprompt.experiment.compose import compose
from fedprompt.experiment.display import QuietDisplay
from tests.support.fake_runs import write_sweep

FEW = ("data.images_per_class=4", "partition.clients=2")
CASES = {
    "partition.json": ("data", "partition", "label_skew", *FEW),
    "partition.png": ("data", "show", "label_skew", *FEW),
    "sheet.png": ("data", "sheet", "label_skew", *FEW),
    "report.html": ("report", "runs/0", "runs/1"),
    "out/table.csv": ("compare", "runs", "--out", "out"),
    "out/table.md": ("compare", "runs", "--out", "out"),
    "out/curves.png": ("compare", "runs", "--out", "out"),
}


@pytest.mark.parametrize("file", CASES)
def test_a_file_of_the_user_is_left_alone_and_our_own_is_replaced(
    file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for i, run in enumerate(write_sweep(tmp_path / "written", alphas=(0.1,))):
        (tmp_path / "runs").mkdir(exist_ok=True)
        run.rename(tmp_path / "runs" / str(i))
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    monkeypatch.setattr("sys.argv", ["fedprompt", *CASES[file]])

    def status() -> int:
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0)

    assert status() == 2
    said = capsys.readouterr().err
    assert file in said
    assert "not written by fedprompt" in said
    assert path.read_text() == "mine"
    path.unlink()
    assert status() == 0
    first = path.read_bytes()
    assert status() == 0
    assert path.read_bytes() == first


def test_a_sweep_refuses_other_files_before_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["sweep", "fedrsclip_ablation", "--quick", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["fedprompt", *arguments])
    monkeypatch.setattr("fedprompt.sweeps.api.run_planned", lambda *_, **__: pytest.fail("ran"))
    for name in ("sweep.json", "report.html"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(SystemExit, match="2"):
            cli.main()
        assert name in capsys.readouterr().err
        assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(name, "mine")]
        (tmp_path / name).unlink()


@pytest.mark.parametrize("name", ["README.md", "node-1", "server"])
def test_a_new_federation_overwrites_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=name):
        create_federation(tmp_path, ["localhost"], nodes=2, port=9092, days=30)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_local_nodes_refuse_a_folder_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "server").mkdir()
    config = compose("label_skew", [f"output.dir={tmp_path / 'run'}"])
    with pytest.raises(UserError, match="not empty"):
        run_local(config, QuietDisplay(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["server"]
