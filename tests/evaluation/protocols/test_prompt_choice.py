"""The choice of prompts: its counts by hand, the means of a report, and who is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedprompt.errors import UserError
from fedprompt.evaluation.alignment import signal
from fedprompt.evaluation.protocol import Finished
from fedprompt.evaluation.protocols.prompt_choice import (
    IMAGES,
    MODELS,
    PromptChoice,
    PromptChoiceOptions,
)
from fedprompt.scoring import logits_of
from tests.support import twins
from tests.support.protocol_runs import models_of, summary_of

PROTOCOL = PromptChoice(PromptChoiceOptions(), None)  # type: ignore[arg-type]
EVEN, UNEVEN = [0, 1, 2, 0, 1, 2], [0, 0, 0, 0, 0, 1]


@dataclass
class Fixed:
    """A model with fixed answers, of which zero-shot CLIP's are sure of every other image."""

    answers: list[int]

    def logits(self) -> Tensor:
        sure = torch.tensor([8.0, 0.5] * 3)
        return torch.nn.functional.one_hot(torch.tensor(self.answers), 4) * sure[:, None]


def counts(monkeypatch: pytest.MonkeyPatch, labels: list[int], *answers: list[int]) -> Any:
    models = [(Fixed(a), {}) for a in answers]
    monkeypatch.setattr(PROTOCOL, "_logits", lambda _, model, *rest: model.logits())
    workspace = SimpleNamespace(dataset=SimpleNamespace(labels_N=np.array(labels)))
    return PROTOCOL._counts(workspace, models, np.arange(6))  # type: ignore[arg-type]


def test_even_pseudo_labels_choose_by_confidence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images 0, 2 and 4 are confident: the global model answers them, zero-shot CLIP the others."""
    assert signal(np.bincount(EVEN, minlength=4)) > 0
    found = counts(monkeypatch, [0, 1, 2, 0, 3, 3], EVEN, [0, 0, 0, 0, 3, 3], [3] * 6)
    assert found == {
        "tested": 6, "zero-shot": 4, "global": 4, "personal": 2,
        "choice": 4, "confident": 3, "aligned": 1,
    }  # fmt: skip


def test_uneven_pseudo_labels_choose_the_personal_model(monkeypatch: pytest.MonkeyPatch) -> None:
    assert signal(np.bincount(UNEVEN, minlength=4)) < 0
    found = counts(monkeypatch, [0] * 6, UNEVEN, [0] * 6, [0, 0, 1, 1, 1, 1])
    assert (found["choice"], found["personal"], found["aligned"]) == (2, 2, 0)


def test_every_client_counts_alike_and_best_is_by_client() -> None:
    def row(tested: int, *right: int) -> dict[str, int]:
        one = dict(zip((*MODELS, "choice"), right, strict=True))
        one |= {"tested": tested, "confident": tested, "aligned": int(tested == 4)}
        return {f"{kind}-{n}": v for kind in IMAGES for n, v in one.items()}

    nothing = dict.fromkeys(row(4, 0, 0, 0, 0), 0)
    clients = {0: row(4, 1, 2, 4, 2), 1: row(10, 9, 8, 0, 0), 2: nothing}
    run = Finished(None, {}, clients, [], {})  # type: ignore[arg-type]
    part = PROTOCOL.measure(run)
    own, *_ = part["rows"]
    assert own["clients"] == 2
    assert own["accuracy"] == pytest.approx(
        {"zero-shot": 0.575, "global": 0.65, "personal": 0.5, "choice": 0.25, "best": 0.95}
    )
    assert (own["aligned"], own["confident"]) == (0.5, 1.0)
    assert len(PromptChoice.table(part).rows) == len(IMAGES)
    assert PROTOCOL.measure(Finished(None, {}, {}, [], {}))["rows"] == []  # type: ignore[arg-type]


def test_a_run_tests_the_same_models_on_every_kind_of_images(runs: Callable[..., Path]) -> None:
    folder = runs("prompt_choice")
    part, summary = summary_of(folder)["protocols"]["prompt_choice"], summary_of(folder)
    by_images = {row["images"]: row for row in part["rows"]}
    own = by_images[IMAGES["own"]]
    # All test images of a client are drawn, so these are the run's own accuracies.
    assert own["accuracy"]["personal"] == pytest.approx(summary["personal"]["mean"])
    assert own["accuracy"]["zero-shot"] == pytest.approx(summary["zero_shot"]["personal"]["mean"])
    workspace, shared, private = models_of(folder)
    method, tested = workspace.method, []
    clients = [k for k in range(workspace.num_clients) if len(workspace.partition.test(k))]
    for k in clients:
        following = [j % workspace.num_clients for j in range(k + 1, k + workspace.num_clients)]
        other = next(j for j in following if j in clients)
        inputs, labels = workspace.test_data(other)
        stacked = [{n: t[None] for n, t in held.items()} for held in (shared, private[k])]
        answers = torch.cat(list(logits_of(method, method.encode(*stacked), inputs)))
        tested.append(float((answers.argmax(-1) == labels).float().mean()))
    found = by_images[IMAGES["other"]]["accuracy"]["personal"]
    assert found == pytest.approx(float(np.mean(tested)))


def test_methods_without_models_of_their_own_or_a_global_one_are_refused(clip: Any) -> None:
    method = twins.build(clip, "promptfl")
    with pytest.raises(UserError, match=r"prompt_choice .* 'promptfl'"):
        PROTOCOL.open(SimpleNamespace(method=method))  # type: ignore[arg-type]
    suited = {n: PromptChoice.suits(twins.build(clip, n)) for n in
              ("fedpgp", "promptfl", "coop_local")}  # fmt: skip
    assert suited == {"fedpgp": True, "promptfl": False, "coop_local": False}
