"""The command line as a newcomer meets it, and bad input: one line, exit 2, nothing lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from fedprompt.cli import main as cli
from fedprompt.data import open_dataset
from fedprompt.experiment.compose import compose
from fedprompt.experiment.groups import choices, description
from fedprompt.reports.run_data import COSTS

QUICK = [
    "data.images_per_class=8",
    "data.domains=[savanna]",
    "partition.clients=3",
    "partition.alpha=1",
    "federation.rounds=1",
]


def fedprompt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of one command."""
    monkeypatch.setattr("sys.argv", ["fedprompt", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "160")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fedprompt.experiment.display import QuietDisplay
    from fedprompt.experiment.run import run

    target = tmp_path_factory.mktemp("cli") / "first run"
    return run(compose("label_skew", [*QUICK, f"output.dir='{target}'"]), QuietDisplay())


class TestOneRun:
    """What a newcomer does, in order, on one finished run."""

    def test_folder_holds_what_the_readme_says(self, run_dir: Path) -> None:
        names = {p.name for p in run_dir.iterdir()}
        assert names >= {
            "config.yaml", "metrics.jsonl", "summary.json", "checkpoint.safetensors",
            "prompts.safetensors", "partition.json", "report.html", "plots",
        }  # fmt: skip
        summary = json.loads((run_dir / "summary.json").read_text())
        for key in (
            "method", "strategy", "rounds", "uploaded_numbers_per_client_round",
            *COSTS, "wall_s",
        ):  # fmt: skip
            assert summary[key], key
        assert 0 <= summary["global"]["accuracy"] <= 1
        assert summary["personal"].keys() >= {"mean", "std", "worst", "p10"}
        assert summary["zero_shot"]["accuracy"] > 0
        assert summary["local_only"]["personal"]["mean"] > 0
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        last = [json.loads(x) for x in lines if '"round"' in x and "local_only" not in x][-1]
        assert last["global"]["accuracy"] == summary["global"]["accuracy"]
        assert last["personal"]["mean"] == summary["personal"]["mean"]
        assert (run_dir / "report.html").stat().st_size > 30_000
        assert len(list((run_dir / "plots").glob("*.png"))) == 4

    def test_report_predict_export(
        self,
        run_dir: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        (run_dir / "report.html").unlink()
        status, out, _ = fedprompt(monkeypatch, capsys, "report", run_dir)
        assert status == 0
        assert (run_dir / "report.html").is_file()
        config = compose(run_dir / "config.yaml")
        dataset = open_dataset(config.data, config.seed)
        dataset.open_image(0).save(tmp_path / "scene.png")
        status, out, _ = fedprompt(
            monkeypatch, capsys, "predict", run_dir, tmp_path / "scene.png", "--client", 1
        )
        assert status == 0
        assert "scene.png" in out
        assert sum(name in out for name in dataset.class_names) == 3
        status, out, _ = fedprompt(
            monkeypatch, capsys, "export", run_dir, "--out", tmp_path / "c.safetensors"
        )
        assert status == 0
        assert (tmp_path / "c.safetensors").is_file()

    def test_the_same_folder_is_not_overwritten(
        self, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = (run_dir / "summary.json").read_bytes()
        status, _, err = fedprompt(
            monkeypatch, capsys, "run", "label_skew", f"output.dir='{run_dir}'"
        )
        assert status == 2
        assert "already holds a run" in err
        assert (run_dir / "summary.json").read_bytes() == before


def test_help_names_every_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = fedprompt(monkeypatch, capsys, "--help")
    assert status == 0
    for command in ("run", "report", "predict", "export", "methods", "data", "list"):
        assert command in out
    status, out, _ = fedprompt(monkeypatch, capsys, "run", "--help")
    assert "fedprompt run quickstart" in out
    assert "--resume" in out


def test_methods_and_list(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = fedprompt(monkeypatch, capsys, "methods")
    assert status == 0
    assert "2,048" in out
    status, out, _ = fedprompt(monkeypatch, capsys, "list")
    assert "quickstart" in out
    assert "openai_vit_b16" in out
    groups = ("experiment", "sweep", "method", "strategy", "data", "backbone", "protocol")
    nameless = [(g, n) for g in groups for n in choices(g) if not description(g, n)]
    assert not nameless
    status, out, _ = fedprompt(monkeypatch, capsys, "list", "strategy")
    assert (status, "quickstart" in out) == (0, False)
    line = next(line for line in out.splitlines() if line.startswith(" dp_fedavg "))
    assert "DP-FedAvg (McMahan" in line
    status, _, err = fedprompt(monkeypatch, capsys, "list", "strategie")
    assert status == 2
    assert "Did you mean 'strategy'" in err


def test_data_show_draws_the_partition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plot, sheet = tmp_path / "partition.png", tmp_path / "sheet.png"
    status, out, _ = fedprompt(
        monkeypatch, capsys, "data", "show", "label_skew", *QUICK, "--out", plot
    )
    assert status == 0
    assert "3 clients, 20 classes" in out
    assert Image.open(plot).width > 300
    status, _, _ = fedprompt(
        monkeypatch, capsys, "data", "sheet", "label_skew", *QUICK, "--out", sheet
    )
    assert status == 0
    assert Image.open(sheet).height > 20 * 90


def _empty_class(tmp_path: Path) -> str:
    (tmp_path / "images" / "river").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "river" / "a.png")
    (tmp_path / "images" / "lake").mkdir()
    return f"data.root={tmp_path / 'images'}"


def _corrupt(tmp_path: Path) -> str:
    for name in ("river", "lake"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "images" / name / f"{i}.png")
    (tmp_path / "images" / "lake" / "2.png").write_bytes(b"no picture")
    return f"data.root={tmp_path / 'images'}"


BAD_INPUT = {
    "unknown experiment": (["run", "quikstart"], "Did you mean 'quickstart'?"),
    "misspelt key": (["run", "quickstart", "training.lrr=1"], "Did you mean 'lr'?"),
    "misspelt group": (["run", "quickstart", "trainig.lr=1"], "Did you mean 'training.lr'?"),
    "misspelt method": (["run", "quickstart", "method=fedrsclp"], "Did you mean 'fedrsclip'?"),
    "not key=value": (["run", "quickstart", "fast"], "'fast' is not key=value"),
    "impossible value": (["run", "quickstart", "training.lr=-1"], "must be greater than 0"),
    "wrong type": (["run", "quickstart", "federation.rounds=many"], "federation.rounds"),
    "bad choice": (["run", "quickstart", "simulation.kind=slurm"], "one of inline, ray"),
    "missing folder": (
        ["run", "quickstart", "data=image_folder", "data.root={tmp}/none"], "{tmp}/none"
    ),
    "no root": (["run", "quickstart", "data=image_folder"], "data.root="),
    "more clients than images": (
        ["run", "quickstart", "data.images_per_class=8", "data.domains=[savanna]",
         "partition.clients=5000"], "5000"
    ),
    "too few classes": (
        ["run", "quickstart", "partition.scheme=pathological", "partition.clients=2",
         "partition.classes_per_client=3"], "classes_per_client"
    ),
    "unknown domain": (["run", "quickstart", "data.domains=[savana]"], "savanna"),
    "wrong checkpoint": (
        ["run", "label_skew", *QUICK, "backbone=openai_vit_b32", "backbone.pretrained=null",
         "backbone.checkpoint={tmp}/weights.pt"], "weights.pt"
    ),
    "missing checkpoint": (
        ["run", "label_skew", *QUICK, "backbone=remoteclip_vit_b32"], "RemoteCLIP-ViT-B-32.pt"
    ),
    "unwritable run folder": (
        ["run", "label_skew", *QUICK, "output.root={tmp}/file"], "output.root"
    ),
    "nothing to resume": (["run", "--resume", "{tmp}/none"], "no run to resume"),
    "run without anything": (["run"], "give an experiment"),
    "predict without a run": (["predict", "{tmp}", "{tmp}/x.png"], "holds no run"),
    "report without a run": (["report", "{tmp}"], "{tmp}"),
    "malformed yaml": (["run", "{tmp}/bad.yaml"], "not valid YAML"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_2(
    case: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("a file, not a folder")
    (tmp_path / "weights.pt").write_bytes(b"not a checkpoint")
    (tmp_path / "bad.yaml").write_text("training: {lr: [")
    arguments, expected = BAD_INPUT[case]
    monkeypatch.chdir(tmp_path)
    status, out, err = fedprompt(
        monkeypatch, capsys, *(a.replace("{tmp}", str(tmp_path)) for a in arguments)
    )
    assert status == 2
    (line,) = err.strip().splitlines()
    assert line.startswith("fedprompt: ")
    assert expected.replace("{tmp}", str(tmp_path)) in line
    assert "Traceback" not in out
    assert not list(tmp_path.glob("runs/*")), "a run that never began leaves no folder"


@pytest.mark.parametrize(("make", "expected"), [(_empty_class, "lake"), (_corrupt, "2.png")])
def test_bad_image_folders(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    make: object,
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    root = make(tmp_path)  # type: ignore[operator]
    status, _, err = fedprompt(monkeypatch, capsys, "run", "quickstart", "data=image_folder", root)
    assert status == 2
    (line,) = err.strip().splitlines()
    assert expected in line


def test_skipped_images_are_counted_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, _ = fedprompt(
        monkeypatch, capsys, "run", "quickstart", "data=image_folder", _corrupt(tmp_path),
        "data.on_bad_image=skip", "partition.clients=1", "partition.scheme=iid",
        "federation.rounds=1", "output.dir=run", "output.report=false",
        "evaluation.local_only=false",
    )  # fmt: skip
    assert status == 0
    assert "2.png" in out
    assert json.loads(Path("run/summary.json").read_text())["skipped_images"] == 1
