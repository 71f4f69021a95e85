"""Tab completion as the shells ask for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedprompt.cli.completion import complete_dataset, complete_protocol, keys, values_of
from tests.cli.test_cli import fedprompt


def complete(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str, shell: str
) -> list[str]:
    """What is offered at the end of the line; bash breaks words at `=`."""
    monkeypatch.setenv("_FEDPROMPT_COMPLETE", f"complete_{shell}")
    words = line.replace("=", " = ") if shell == "bash" else line
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", line)
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    _, out, _ = fedprompt(monkeypatch, capsys)
    return [offer.split("\t")[0] for offer in out.splitlines()]


@pytest.mark.parametrize("shell", ["bash", "fish"])
@pytest.mark.parametrize(
    ("line", "offers"),
    [
        ("fedprompt doct", ["doctor"]),
        ("fedprompt run quicks", ["quickstart"]),
        ("fedprompt run quickstart federation.roun", ["federation.rounds="]),
        ("fedprompt run quickstart strateg", ["strategy="]),
        ("fedprompt run quickstart seed=2 method=promptf", ["promptfl", "promptfolio"]),
        ("fedprompt run quickstart simulation.kind=r", ["ray"]),
        ("fedprompt run quickstart output.report=t", ["true"]),
        ("fedprompt sweep few", ["few_shot"]),
        ("fedprompt data check euros", ["eurosat"]),
        ("fedprompt data show quicks", ["quickstart"]),
    ],
)
def test_names_keys_and_values(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    shell: str,
    line: str,
    offers: list[str],
) -> None:
    key = line.split()[-1].partition("=")[0]
    if "=" in line.split()[-1] and shell == "fish":
        offers = [f"{key}={offer}" for offer in offers]
    assert complete(monkeypatch, capsys, line, shell) == offers


def test_every_key_and_choice_is_offered() -> None:
    assert {"method", "seed", "data", "data.root", "training.lr"} <= set(keys(""))
    assert "training.lr" in keys("training.")
    assert "sgd" in values_of("training.optimizer")
    assert values_of("training.lr") == values_of("nothing") == values_of("nothing.x") == []
    assert complete_protocol("calib") == ["calibration"]
    assert complete_dataset("no such") == []


@pytest.mark.parametrize("named", [True, False])
def test_scripts_for_shells_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], named: bool
) -> None:
    monkeypatch.setenv("SHELL", "/bin/zsh" if named else "/usr/bin/bash")
    arguments = ["--show-completion", *(["bash"] if named else [])]
    status, out, _ = fedprompt(monkeypatch, capsys, *arguments)
    assert status == 0
    assert "_FEDPROMPT_COMPLETE=complete_bash" in out


def test_the_script_is_installed_for_the_named_shell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    status, out, _ = fedprompt(monkeypatch, capsys, "--install-completion", "fish")
    assert status == 0
    (script,) = tmp_path.rglob("*.fish")
    assert "complete_fish" in script.read_text()
    assert str(script) in out.replace("\n", "")


@pytest.mark.parametrize("shell", ["/bin/tcsh", ""])
def test_an_unknown_shell_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shell: str
) -> None:
    monkeypatch.setenv("SHELL", shell)
    status, _, err = fedprompt(monkeypatch, capsys, "--show-completion")
    assert status == 2
    assert "bash|zsh|fish" in err
