"""The reported round: chosen on validation images, never on the test images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedprompt.errors import UserError
from fedprompt.experiment.display import QuietDisplay
from fedprompt.experiment.run import run
from fedprompt.experiment.selection import last_round, objective, select
from fedprompt.experiment.validate import validate
from fedprompt.federation.scores import personal_part
from tests.support.builders import small_config


def line(
    number: int,
    test: float,
    validation: float | None,
    personal: dict[int, tuple[float, float | None]],
) -> dict[str, Any]:
    """A round's line: accuracies on test images, and on validation images."""
    tests = {client: pair[0] for client, pair in personal.items()}
    chosen_on = {client: pair[1] for client, pair in personal.items() if pair[1] is not None}
    return {
        "round": number,
        "global": {"accuracy": test, "loss": 1.0},
        "personal": personal_part(list(tests), list(tests.values())),
        "personal_on_global": None,
        "validation": {
            "global": None if validation is None else {"accuracy": validation, "loss": 1.0},
            "personal": personal_part(list(chosen_on), list(chosen_on.values())),
        },
    }


LINES = [
    line(0, 0.9, 0.1, {0: (0.9, 0.2), 1: (0.8, 0.1), 2: (0.1, None)}),
    line(1, 0.3, 0.7, {0: (0.4, 0.6), 1: (0.2, 0.9), 2: (0.2, None)}),
    line(2, 0.5, 0.7, {0: (0.5, 0.6), 1: (0.9, 0.3), 2: (0.3, None)}),
    line(3, 0.8, 0.6, {0: (0.1, 0.5), 2: (0.4, None)}),
]


def test_every_model_has_its_own_best_round() -> None:
    chosen = select(LINES)
    # Of two equal rounds the later one. Other rounds have the best test accuracies.
    assert chosen["selection"]["global"] == {"round": 2, "validation_accuracy": 0.7}
    assert chosen["global"]["accuracy"] == 0.5
    assert chosen["selection"]["personal"] == {
        "clients": [0, 1],
        "rounds": [2, 1],
        "validation_accuracy": [0.6, 0.9],
    }
    # Client 2 has no validation images, so its last test counts.
    assert chosen["personal"]["clients"] == [0, 1, 2]
    assert chosen["personal"]["accuracy"] == [0.5, 0.2, 0.4]


def test_the_backdoor_is_that_of_the_chosen_global_model() -> None:
    lines = [{**x, "backdoor": {"success": x["round"] / 10}} for x in LINES]
    assert select(lines)["backdoor"] == {"success": 0.2}
    assert last_round(lines)["backdoor"] == {"success": 0.3}


def test_test_accuracies_do_not_decide() -> None:
    """Other test accuracies give the same rounds."""
    others = [
        line(n, 1.0 - n / 10, x["validation"]["global"]["accuracy"], {0: (n / 10, y)})
        for n, (x, y) in enumerate(zip(LINES, (0.2, 0.6, 0.6, 0.5), strict=True))
    ]
    assert select(others)["selection"]["global"] == select(LINES)["selection"]["global"]
    assert select(others)["selection"]["personal"]["rounds"] == [2]


def test_without_validation_images_the_last_round_counts() -> None:
    lines = [{k: v for k, v in x.items() if k != "validation"} for x in LINES]
    chosen = select(lines)
    assert chosen.pop("selection") == {"rule": "best_validation"}
    assert chosen == last_round(lines)


def test_rounds_that_were_not_evaluated_are_not_chosen() -> None:
    gap = {"round": 4, "global": None, "personal": None, "personal_on_global": None}
    assert select([*LINES, gap])["global"] == select(LINES)["global"]


def test_a_model_that_is_not_finite_counts_as_wrong_and_is_named() -> None:
    """A trial does not win because only its best clients are left, and a choice keeps the mark."""
    lines = [line(1, 0.5, 0.5, {0: (0.6, 0.6), 1: (0.6, 0.6)})]
    lines.append(line(2, 0.5, 0.5, {0: (0.9, 0.9), 1: (0.0, 0.0)}))
    for part in (lines[1]["personal"], lines[1]["validation"]["personal"]):
        part["not_finite"] = [1]
    settings = small_config().evaluation
    assert objective(lines, settings) == pytest.approx(0.45)
    chosen = select(lines)["personal"]
    assert chosen["accuracy"] == [0.9, 0.6]
    assert "not_finite" not in chosen, "client 1 is reported by its finite model of round 1"
    lines[0]["validation"]["personal"]["accuracy"][1] = 0.0
    assert select(lines)["personal"]["not_finite"] == [1]


@pytest.mark.parametrize("local_only", [False, True])
def test_a_run_reports_what_its_lines_say(tmp_path: Path, local_only: bool) -> None:
    config = small_config(
        data={"images_per_class": 16, "domains": ["savanna"]},
        partition={
            "clients": 3, "alpha": 1.0,
            "local_validation_fraction": 0.2, "server_validation_fraction": 0.5,
        },
        federation={"rounds": 3},
        evaluation={"select": "best_validation", "local_only": local_only},
        simulation={"threads": 1},
        output={"report": False, "dir": str(tmp_path / "run")},
    )  # fmt: skip
    folder = run(config, QuietDisplay())
    summary = json.loads((folder / "summary.json").read_text())
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    rounds = [x for x in lines if x["kind"] == "round"]
    assert {k: summary[k] for k in select(rounds)} == select(rounds)
    assert summary["last"] == last_round(rounds)
    assert len(summary["selection"]["personal"]["rounds"]) == 3
    counts = json.loads((folder / "partition.json").read_text())
    assert sum(counts["server_validation_counts"]) > 0
    if local_only:
        alone = [x for x in lines if x["kind"] == "local_only"]
        assert summary["local_only"]["personal"] == select(alone)["personal"]


def test_a_choice_without_validation_images_is_refused() -> None:
    with pytest.raises(UserError, match="local_validation_fraction"):
        validate({"evaluation": {"select": "best_validation"}})
