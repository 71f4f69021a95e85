"""What has been released with noise stays counted, whatever ends the process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedprompt.errors import UserError
from fedprompt.experiment.display import QuietDisplay
from fedprompt.experiment.run import resume, run
from fedprompt.experiment.run_folder import RunFolder
from fedprompt.privacy.accountant import epsilon
from fedprompt.privacy.releases import FILE, Releases


def test_a_record_is_continued_and_never_forgets(tmp_path: Path) -> None:
    path = tmp_path / FILE
    for _ in range(2):
        releases = Releases()
        releases.open(path)
        releases.add("clients", 1, [0, 1])
        releases.add("clients", 2, [1])
        releases.add("server", 2, [0, 1], "same bits")
    assert releases.by_client("clients") == {0: 2, 1: 4}
    assert releases.repeated("clients") == 2
    assert releases.by_client("server") == {0: 1, 1: 1}
    assert len(path.read_bytes().splitlines()) == 5


def test_a_torn_line_is_dropped_and_a_damaged_one_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / FILE
    releases = Releases()
    releases.open(path)
    for server_round in (1, 2):
        releases.add("clients", server_round, [0])
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    releases.open(path)
    releases.add("clients", 2, [0])
    assert path.read_bytes() == whole
    assert releases.by_client("clients") == {0: 2}
    path.write_bytes(b"#" + whole)
    with pytest.raises(UserError, match=FILE):
        Releases().open(path)


def test_a_record_that_cannot_be_written_stops_the_release(tmp_path: Path) -> None:
    releases = Releases()
    releases.open(tmp_path / "gone" / FILE)
    with pytest.raises(UserError, match=FILE):
        releases.add("clients", 1, [0])


class Killed(Exception):
    pass


@pytest.mark.parametrize("noise", ["clients", "server"])
def test_a_repeated_round_is_counted_if_its_noise_is_new(
    run_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, noise: str
) -> None:
    pytest.importorskip("dp_accounting", reason="needs the extra 'dp'")
    sections: dict[str, Any] = {
        "clients": {"privacy": {"noise": 4.0, "clip": 0.1}},
        "server": {"strategy": {"name": "dp_fedavg", "noise": 2.0}},
    }[noise]
    config = run_config(method={"name": "promptfl", "context_tokens": 2}, **sections)
    assert config.federation.rounds == 3
    save = RunFolder.save_checkpoint

    def lethal(folder: RunFolder, checkpoint: Any, *more: Any, **options: Any) -> None:
        if checkpoint.server_round == 2:
            raise Killed
        save(folder, checkpoint, *more, **options)

    monkeypatch.setattr(RunFolder, "save_checkpoint", lethal)
    with pytest.raises(Killed):
        run(config, QuietDisplay())
    monkeypatch.undo()
    folder = Path(config.output.dir)
    resume(folder, QuietDisplay())
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    part = "privacy" if noise == "clients" else "strategy"
    spent = [line[part]["epsilon"] for line in lines if part in line]
    # The server's noise is a function of the sum, so round 2 was the same bits for both times.
    times = (1, 3, 4) if noise == "clients" else (1, 2, 3)
    assert spent == [epsilon(2.0, n, 1e-5) for n in times]
