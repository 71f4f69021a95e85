"""Which cards the runs of a sweep get; the cards are invented."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedprompt.errors import UserError
from fedprompt.runtime import cards
from fedprompt.runtime.cards import Card
from fedprompt.sweeps.gpus import VISIBLE, only_cards, roomy_cards, with_gpus
from fedprompt.sweeps.plan import Resources
from fedprompt.sweeps.run import places_here
from tests.support.sweeps import plan


def invent(monkeypatch: pytest.MonkeyPatch, *free: int | None) -> None:
    """Cards of 80 bytes, of which so many are free."""
    monkeypatch.setattr(cards, "cards", lambda: [Card("H100", 80, n) for n in free])


@pytest.mark.parametrize(
    ("free", "roomy"),
    [([80, 3, 40], [0, 2]), ([5, 9, 7], [1]), ([None, None], [0, 1]), ([], [])],
)
def test_cards_that_others_use_are_left_out(
    monkeypatch: pytest.MonkeyPatch, free: list[int | None], roomy: list[int]
) -> None:
    invent(monkeypatch, *free)
    assert roomy_cards() == roomy


def test_every_run_gets_a_card_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    invent(monkeypatch, 80, 3, 40)
    monkeypatch.setattr("fedprompt.sweeps.run.cpu_count", lambda: 8)
    runs = plan(tmp_path, "backbone.device=auto")
    resources = with_gpus(Resources(), runs, 3)
    assert resources.gpus == 1
    assert places_here(resources, 24) == 2, "two of the three cards have room"
    assert places_here(with_gpus(Resources(gpus=0.5), runs, 3), 24) == 4


def test_runs_on_cpus_get_none(tmp_path: Path) -> None:
    assert with_gpus(Resources(), plan(tmp_path, "backbone.device=cpu"), 3).gpus == 0
    assert with_gpus(Resources(), plan(tmp_path, "backbone.device=auto"), 0).gpus == 0


@pytest.mark.parametrize(("gpus", "total"), [(0.0, 1), (0.5, 0)])
def test_a_share_that_is_of_no_use_is_refused(tmp_path: Path, gpus: float, total: int) -> None:
    with pytest.raises(UserError, match=r"resources\.gpus"):
        with_gpus(Resources(gpus=gpus), plan(tmp_path, "backbone.device=cuda"), total)


@pytest.mark.parametrize(("before", "inside"), [(None, "0,2"), ("5,6,7", "5,7")])
def test_only_these_cards_are_visible_inside(
    monkeypatch: pytest.MonkeyPatch, before: str | None, inside: str
) -> None:
    if before is None:
        monkeypatch.delenv(VISIBLE, raising=False)
    else:
        monkeypatch.setenv(VISIBLE, before)
    with only_cards([0, 2]):
        assert os.environ[VISIBLE] == inside
    assert os.environ.get(VISIBLE) == before


def test_what_is_free_is_read_by_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = [SimpleNamespace(name=n, uuid=n.lower(), total_memory=9) for n in ("B", "A", "C")]
    monkeypatch.setattr(cards, "count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties.__getitem__)
    answer = "GPU-a, 100, 550.1\nGPU-b, [N/A], 550.1\n"

    def ask(*command: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, answer)

    monkeypatch.setattr(subprocess, "run", ask)
    assert [(c.name, c.free_bytes, c.driver) for c in cards.cards()] == [
        ("B", None, "550.1"),
        ("A", 100 * 2**20, "550.1"),
        ("C", None, None),
    ]
