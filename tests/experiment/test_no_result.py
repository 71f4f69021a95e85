"""A run without a result ends with exit status 1 and one line, and leaves no summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedprompt.cli import main as cli
from fedprompt.errors import RunFailed
from fedprompt.experiment import run as run_module
from fedprompt.experiment.display import QuietDisplay
from fedprompt.experiment.run import resume
from fedprompt.federation import client_app
from fedprompt.reports.run_data import load_run

SMALL = (
    "data.images_per_class=4", "data.domains=[savanna]", "partition.clients=2",
    "federation.rounds=2", "evaluation.local_only=false", "output.report=false",
)  # fmt: skip


def status_of(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["fedprompt", "run", "label_skew", *SMALL, *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("training.lr=1e30", "no client's update was accepted in any of 2 rounds"),
        ("training.lr=1e-30", "the shared prompts have not changed in 2 rounds"),
        ("conditions.dropout=0.9999", "see conditions and clock"),
    ],
)
def test_a_learning_rate_that_trains_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: str,
    said: str,
) -> None:
    folder = tmp_path / "run"
    changes = (change, "method=promptfl", f"output.dir={folder}")
    assert status_of(monkeypatch, *changes) == 1
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("fedprompt: ")]
    assert len(lines) == 1
    assert said in lines[0]
    assert "metrics.jsonl" in lines[0]
    assert not (folder / "summary.json").exists()
    with pytest.raises(RunFailed):
        resume(folder, QuietDisplay())


def test_clients_that_all_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("no such luck")

    monkeypatch.setattr("fedprompt.federation.client_app.train_clients", broken)
    assert status_of(monkeypatch, f"output.dir={tmp_path / 'run'}") == 1
    assert "ZeroDivisionError: no such luck" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["zero_shot", "coop_local"])
def test_methods_without_shared_prompts_are_fine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    assert status_of(monkeypatch, f"method={method}", f"output.dir={tmp_path / 'run'}") == 0
    assert (tmp_path / "run" / "summary.json").is_file()


def test_rounds_that_all_have_too_few_updates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Clients keep what they have trained, but nothing has ever been aggregated."""
    train = client_app.train_clients

    def half(
        method: Any, received: Any, private: Any, data: Any, *rest: Any, **options: Any
    ) -> Any:
        if any(client.client == 1 for client in data):
            raise ZeroDivisionError("no such luck")
        return train(method, received, private, data, *rest, **options)

    monkeypatch.setattr(client_app, "train_clients", half)
    changes = ("method=fedrsclip", "federation.min_replies=2", f"output.dir={tmp_path / 'run'}")
    assert status_of(monkeypatch, *changes) == 1
    errors = capsys.readouterr().err
    assert "none of 2 rounds counted" in errors
    assert "federation.min_replies=2" in errors
    assert "ZeroDivisionError: no such luck" in errors


def test_a_baseline_whose_clients_all_fail_ends_the_run_with_status_1_after_its_own_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = client_app.train_clients

    def only_promptfl(method: Any, *rest: Any, **options: Any) -> Any:
        if method.name != "promptfl":
            raise ZeroDivisionError("no such luck")
        return train(method, *rest, **options)

    monkeypatch.setattr(client_app, "train_clients", only_promptfl)
    folder = tmp_path / "run"
    changes = ("method=promptfl", "evaluation.local_only=true", f"output.dir={folder}")
    assert status_of(monkeypatch, *changes) == 1
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("fedprompt: ")]
    assert len(lines) == 1
    assert "local-only baseline has no result" in lines[0]
    assert "ZeroDivisionError: no such luck" in lines[0]
    summary = load_run(folder).summary
    assert summary is not None
    assert summary["local_only"] is None


def test_a_device_that_fails_at_the_server_ends_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Sticky(RuntimeError):
        """Stands for `torch.AcceleratorError`, which older releases of PyTorch do not have."""

    def failing(*_: object, **__: object) -> None:
        raise Sticky("CUDA error: unspecified launch failure")

    monkeypatch.setattr(run_module, "DEVICE_ERRORS", (Sticky,))
    monkeypatch.setattr("fedprompt.federation.server_app.score_global", failing)
    assert status_of(monkeypatch, "method=promptfl", f"output.dir={tmp_path / 'run'}") == 1
    errors = capsys.readouterr().err
    assert "unspecified launch failure" in errors
    assert "Traceback" not in errors
