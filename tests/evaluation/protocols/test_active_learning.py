"""Accuracy over labels, by hand."""

from __future__ import annotations

from fedprompt.evaluation.protocols.active_learning import points


def test_points_are_the_last_accuracies_of_every_active_round() -> None:
    def line(r: int, accuracy: float | None, asked: int | None = None) -> dict[str, object]:
        whole = None if accuracy is None else {"accuracy": accuracy}
        own = None if accuracy is None else {"mean": accuracy / 2}
        labels = {} if asked is None else {"labels": {"active_round": r // 2 + 1, "asked": asked}}
        return {"round": r, "global": whole, "personal": own, **labels}

    found = points([line(0, 0.1), line(1, 0.2, 8), line(2, 0.4), line(3, 0.3, 16), line(4, None)])
    assert found == [
        {"active_round": 1, "labels": 8, "global": 0.4, "personal": 0.2},
        {"active_round": 2, "labels": 16, "global": 0.3, "personal": 0.15},
    ]
