"""A command that a signal ends says how to go on, in one line, and ends everything it started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedprompt.cli.main import main
from fedprompt.runtime import endings
from fedprompt.runtime.endings import advice, check_signals, run_command

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def _handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The signal handlers and the state of this process are as before, afterwards."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    state = {k: v for k, v in vars(endings._State).items() if not k.startswith("__")}
    # Whoever started the tests in the background or under nohup has some signals ignored, and a
    # command leaves those alone.
    for number in SIGNALS:
        ends = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, ends)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for name, value in state.items():
        setattr(endings._State, name, value)


def ended(command: Callable[[], None]) -> int:
    with pytest.raises(SystemExit) as end:
        run_command(command)
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.mark.parametrize("number", SIGNALS)
def test_every_signal_runs_the_way_out_and_names_the_command(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    left = []

    def command() -> None:
        with advice(lambda: "continue with: outer"), advice(lambda: "continue with: inner"):
            try:
                signal.raise_signal(number)
            finally:
                left.append(True)

    assert ended(command) == 128 + number
    assert left
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.endswith("; continue with: outer\n")
    assert (number.name in error) == (number != signal.SIGINT)


def test_a_second_signal_does_not_cut_the_ending_short(
    capsys: pytest.CaptureFixture[str],
) -> None:
    left = []

    def command() -> None:
        try:
            signal.raise_signal(signal.SIGHUP)
        finally:
            for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
                signal.raise_signal(number)
            left.append(True)

    assert ended(command) == 128 + signal.SIGHUP
    assert left
    assert capsys.readouterr().err.count("\n") == 1


def test_an_error_while_ending_does_not_hide_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            raise OSError("the terminal is gone")

    assert ended(command) == 128 + signal.SIGTERM
    assert "SIGTERM" in capsys.readouterr().err


def test_a_signal_that_was_lost_is_raised_at_the_next_check() -> None:
    def command() -> None:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        check_signals()
        raise AssertionError("the check lets the command go on")

    assert ended(command) == 128 + signal.SIGTERM


def test_an_ignored_signal_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    run_command(lambda: signal.raise_signal(signal.SIGHUP))
    check_signals()


def test_handlers_that_a_library_replaced_are_restored() -> None:
    def command() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        endings.restore_handlers()
        signal.raise_signal(signal.SIGTERM)

    assert ended(command) == 128 + signal.SIGTERM


@pytest.mark.parametrize("number", SIGNALS)
def test_an_interrupted_run_names_the_command_that_resumes_it(
    number: signal.Signals,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "my run"

    def interrupted(*_: object, **__: object) -> None:
        signal.raise_signal(number)

    monkeypatch.setattr("fedprompt.experiment.run.open_workspace", interrupted)
    monkeypatch.setattr(
        sys, "argv", ["fedprompt", "run", "quickstart", f"output.dir={folder}", "--quiet"]
    )
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 128 + number
    error = capsys.readouterr().err
    assert error.endswith(f"continue with: fedprompt run --resume '{folder}'\n")
    assert error.count("\n") == 1


def test_an_interrupted_sweep_names_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("fedprompt.sweeps.api.run_serial", interrupted)
    arguments = ["sweep", "fedrsclip_ablation", "--seeds", "1", "--serial", "--out"]
    monkeypatch.setattr(sys, "argv", ["fedprompt", *arguments, str(tmp_path / "a b")])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 128 + signal.SIGTERM
    line = f"fedprompt {' '.join(arguments)} '{tmp_path / 'a b'}'\n"
    assert capsys.readouterr().err.endswith(line)


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    script = (
        "import signal, time\n"
        "from fedprompt.runtime import endings\n"
        "endings.IMPATIENCE_S = 0\n"
        "def command():\n"
        "    with endings.advice(lambda: 'continue with: this'):\n"
        "        try:\n"
        "            signal.raise_signal(signal.SIGINT)\n"
        "        finally:\n"
        "            time.sleep(0.01)\n"
        "            signal.raise_signal(signal.SIGINT)\n"
        "            print('waited')\n"
        "endings.run_command(command)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == 130
    assert done.stdout == ""
    assert done.stderr.endswith("; continue with: this\n")
