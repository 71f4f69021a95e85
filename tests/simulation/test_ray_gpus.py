"""How the GPUs are shared by Ray's workers; machines with GPUs are invented."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from fedprompt.config.schema import SimulationConfig
from fedprompt.errors import UserError
from fedprompt.experiment.workspaces import open_workspace
from fedprompt.runtime import cards
from fedprompt.simulation.grids import check_grid, open_grid
from fedprompt.simulation.ray_gpus import gpus_per_worker
from fedprompt.simulation.ray_grid import RayGrid
from tests.support.builders import small_config


def simulation(workers: int, share: float | None = None) -> SimulationConfig:
    return SimulationConfig(kind="ray", workers=workers, gpus_per_worker=share)


@pytest.mark.parametrize(
    ("workers", "machines", "share"),
    [(2, [2], 1), (1, [4], 1), (3, [2], 1 / 2), (7, [2], 1 / 4), (4, [1, 1], 1 / 2), (2, [0], 0)],
)
def test_without_a_share_in_the_config_the_cards_are_divided(
    workers: int, machines: list[int], share: float
) -> None:
    found = gpus_per_worker(simulation(workers), "auto", machines)
    assert found == share
    assert not found or sum(machines) * int(1 / found + 1e-9) >= workers


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_other_devices_take_no_card(device: str) -> None:
    assert gpus_per_worker(simulation(2), device, [4]) == 0


def test_a_share_in_the_config_is_taken_if_it_fits() -> None:
    assert gpus_per_worker(simulation(6, 1 / 3), "cuda", [2]) == 1 / 3
    assert gpus_per_worker(simulation(2, 0.0), "auto", [0]) == 0


@pytest.mark.parametrize(
    ("workers", "share", "device", "machine", "says"),
    [
        (5, 0.5, "auto", 2, "simulation.workers=5 with simulation.gpus_per_worker=0.5.* hold 4"),
        (2, 1, "cuda", 1, "simulation.workers=2 .* 1 GPU holds 1"),
        (3, 0.4, "cuda", 1, "simulation.workers=2"),
        (2, 0.5, "auto", 0, "gpus_per_worker=0.5 is set, but PyTorch sees no GPU"),
        (2, 0, "cuda", 1, "gpus_per_worker=0 .*backbone.device=cpu"),
        (2, 0, "auto", 1, "gpus_per_worker=0 .*backbone.device=cpu"),
        (2, 1, "cpu", 1, "backbone.device=cpu does not use"),
    ],
)
def test_a_share_that_does_not_fit_is_refused_with_its_numbers(
    workers: int, share: float, device: str, machine: int, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        gpus_per_worker(simulation(workers, share), device, [machine])


def test_more_than_a_whole_card_is_refused_by_the_config() -> None:
    with pytest.raises(UserError, match="gpus_per_worker"):
        small_config(simulation={"kind": "ray", "gpus_per_worker": 2})


def test_a_run_is_refused_before_anything_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "count", lambda: 1)
    sections: dict[str, Any] = {"kind": "ray", "workers": 3, "gpus_per_worker": 0.5}
    config = small_config(simulation=sections, backbone={"device": "auto"})
    with pytest.raises(UserError, match=r"simulation\.workers=2"):
        check_grid(config)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_ray_spreads_its_workers_over_the_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    # Ray believes the number that it is given; the workers find no card and use the CPU.
    monkeypatch.setattr(cards, "count", lambda: 2)
    config = small_config(
        simulation={"kind": "ray", "workers": 3, "cpus_per_worker": 0.1},
        backbone={"device": "auto"},
    )
    grid = open_grid(config, open_workspace(config), open_workspace)
    assert isinstance(grid, RayGrid)
    try:
        of_card = Counter(slot.place.memory for slot in grid.pool.slots if slot.place)
    finally:
        grid.close()
    assert sorted(of_card.values()) == [1, 2]
