"""Choices by accuracy on validation images: the reported round, and whether a run ends early.

Used on the server, in `evaluation.select` when a run ends and in `evaluation.stop_below` after
every round. Only accuracies of `metrics.jsonl` are chosen among: the saved prompts, and what
protocols measure at the end, are those of the last round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedprompt.config.schema import EvaluationConfig
from fedprompt.federation.scores import personal_part

Line = Mapping[str, Any]


def last_round(lines: Sequence[Line]) -> dict[str, Any]:
    """The accuracies of the last round: the parts of a summary that `select` returns."""
    line = lines[-1] if lines else {}
    return {
        "global": line.get("global") or {"accuracy": None, "loss": None},
        "personal": line.get("personal"),
        "personal_on_global": line.get("personal_on_global"),
        **({"backdoor": line["backdoor"]} if "backdoor" in line else {}),
    }


def select(lines: Sequence[Line]) -> dict[str, Any]:
    """The accuracies in the rounds with the highest accuracy on validation images.

    The global model has the round that is best on the server's validation images, and every
    client's personal model the round that is best on the client's own. Of several best rounds, the
    last one counts: on few images many rounds are equal, and the later ones have trained longer.
    Without validation images, that is the last round in which the model was tested.

    Args:
        lines: the evaluated rounds of a run in `metrics.jsonl`, in order.

    Returns:
        `global`, `personal` and `personal_on_global` as in a line, and `selection`: the chosen
        rounds and the accuracies on validation images by which they were chosen. `rounds` of
        `selection.personal` are in the order of its `clients`.
    """
    last = last_round(lines)
    best = _best_round((line["round"], _part(line, "validation", "global")) for line in lines)
    by_round = {line["round"]: line for line in lines}
    chosen: dict[str, Any] = {**last, "selection": {"rule": "best_validation"}}
    if best is not None:
        number, accuracy = best
        chosen["global"] = by_round[number]["global"] or last["global"]
        if "backdoor" in by_round[number]:
            # That of the model whose accuracy is reported beside it.
            chosen["backdoor"] = by_round[number]["backdoor"]
        chosen["selection"]["global"] = {"round": number, "validation_accuracy": accuracy}
    own: dict[int, tuple[int, float]] = {}
    for line in lines:
        for client, value in _by_client(line, "validation", "personal").items():
            if client not in own or value >= own[client][1]:
                own[client] = line["round"], value
    if own:
        rounds = {client: own[client][0] for client in sorted(own)}
        chosen["selection"]["personal"] = {
            "clients": list(rounds),
            "rounds": list(rounds.values()),
            "validation_accuracy": [own[client][1] for client in rounds],
        }
        for name in ("personal", "personal_on_global"):
            chosen[name] = _at_rounds(lines, name, rounds)
    return chosen


def objective(lines: Sequence[Line], settings: EvaluationConfig) -> float | None:
    """The accuracy on validation images by which `fedprompt tune` ranks a run.

    Args:
        lines: the evaluated rounds of the run, in order.
        settings: the config's `evaluation` section. With `select=best_validation` the best round
            counts, else the last one.

    Returns:
        The accuracy, or None if nothing was measured on validation images.
    """
    values = [value for line in lines if (value := _objective_at(line, settings)) is not None]
    if not values:
        return None
    return max(values) if settings.select == "best_validation" else values[-1]


def ends_early(lines: Sequence[Line], settings: EvaluationConfig) -> bool:
    """Whether a run is so far behind that it ends after the last of these rounds.

    Args:
        lines: the rounds so far.
        settings: the config's `evaluation` section; `stop_below` has a threshold for each round,
            from round 1.

    Returns:
        True if the best objective of all rounds is below the last round's threshold.
    """
    number = lines[-1]["round"] if lines else 0
    if not 1 <= number <= len(settings.stop_below):
        return False
    values = objective_by_round(lines, settings)
    return bool(values) and values[-1] < settings.stop_below[number - 1]


def objective_by_round(lines: Sequence[Line], settings: EvaluationConfig) -> tuple[float, ...]:
    """The best objective until each round, from round 1, of a run evaluated in every round.

    Args:
        lines: the evaluated rounds of the run, in order, from round 0.
        settings: the config's `evaluation` section.

    Returns:
        One value per round; empty if nothing was measured on validation images.
    """
    best, values = None, []
    for line in lines:
        value = _objective_at(line, settings)
        if value is not None:
            best = value if best is None else max(best, value)
        if line["round"] > 0 and best is not None:
            values.append(best)
    return tuple(values)


def _objective_at(line: Line, settings: EvaluationConfig) -> float | None:
    part = _part(line, "validation", settings.objective) or {}
    value: float | None = part.get("mean" if settings.objective == "personal" else "accuracy")
    return value


def _at_rounds(lines: Sequence[Line], name: str, rounds: Mapping[int, int]) -> Any:
    """A part of personal accuracies, with every client's of its own round.

    A client without validation images has its last accuracy. None if the part was not measured in
    the chosen rounds of all clients, as `evaluation.personal_on_global_every` allows: the mean of
    some clients, or of other rounds, would not be that of the reported models.
    """
    missing = [
        client
        for line in lines
        for client in _by_client(line, "personal")
        if line["round"] == rounds.get(client) and _part(line, name) is None
    ]
    if missing:
        return None
    accuracy: dict[int, float] = {}
    not_finite: dict[int, bool] = {}
    for line in lines:
        diverged = (_part(line, name) or {}).get("not_finite", ())
        for client, value in _by_client(line, name).items():
            if line["round"] <= rounds.get(client, line["round"]):
                accuracy[client] = value
                not_finite[client] = client in diverged
    clients = sorted(accuracy)
    values = [accuracy[client] for client in clients]
    return personal_part(clients, values, [c for c, diverged in not_finite.items() if diverged])


def _best_round(accuracies: Any) -> tuple[int, float] | None:
    """The last of the rounds with the highest accuracy, and that accuracy."""
    best: tuple[int, float] | None = None
    for number, part in accuracies:
        accuracy = (part or {}).get("accuracy")
        if accuracy is not None and (best is None or accuracy >= best[1]):
            best = number, accuracy
    return best


def _part(line: Line, *names: str) -> Any:
    value: Any = line
    for name in names:
        value = (value or {}).get(name)
    return value


def _by_client(line: Line, *names: str) -> dict[int, float]:
    part = _part(line, *names)
    return dict(zip(part["clients"], part["accuracy"], strict=True)) if part else {}
