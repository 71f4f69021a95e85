"""Out-of-distribution detection against scikit-learn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedprompt.backbone.negative_words import negative_words
from fedprompt.evaluation.registry import (
    result_tables,
)
from fedprompt.scoring import encode_global
from tests.support.protocol_runs import (
    TARGETS,
    logits,
    models_of,
    summary_of,
)

OF_LOGITS = {"MCM", "MSP", "energy", "NegLabel"}
"""The scores that every method has."""


def test_ood_by_a_second_way(runs: Callable[..., Path]) -> None:
    from sklearn.metrics import average_precision_score, roc_auc_score

    folder = runs("ood")
    part = summary_of(folder)["protocols"]["ood"]
    workspace, shared, _ = models_of(folder)
    held = workspace.held_out
    assert held is not None
    assert len(held.class_names) == 5
    scores = []
    for index in (workspace.partition.server_test, held.index_N):
        cosines = logits(workspace, workspace.task.class_names, shared, None, index)
        cosines = cosines.double() / workspace.clip.logit_scale
        scores.append(cosines.softmax(-1).amax(-1).numpy())
    truth = [1] * len(scores[0]) + [0] * len(scores[1])
    found = {(row["model"], row["score"]): row for row in part["rows"]}
    both = np.concatenate(scores)
    assert found["global", "MCM"]["auroc"] == pytest.approx(roc_auc_score(truth, both), abs=1e-4)
    expected = average_precision_score(truth, both)
    assert found["global", "MCM"]["aupr"] == pytest.approx(expected, abs=1e-4)
    assert found["global", "GL-MCM"]["auroc"] != found["global", "MCM"]["auroc"]
    for share in part["histogram"]["global"]["share"].values():
        assert sum(share) == pytest.approx(1.0)


def test_the_scores_of_the_logits_by_a_second_way(runs: Callable[..., Path]) -> None:
    from sklearn.metrics import roc_auc_score

    folder = runs("ood")
    part = summary_of(folder)["protocols"]["ood"]
    workspace, shared, _ = models_of(folder)
    clip, names = workspace.clip, workspace.task.class_names
    assert workspace.held_out is not None
    words = negative_words(clip, names, 100, "negatives")
    words_WD = clip.zero_shot_classifier(words, ["The nice {}."])
    tests = (workspace.partition.server_test, workspace.held_out.index_N)
    found: dict[str, list[float]] = {"MSP": [], "energy": [], "NegLabel": []}
    for index, inputs in zip(
        tests, (workspace.server_test()[0], workspace.held_out_test()[0]), strict=True
    ):
        every = logits(workspace, names, shared, None, index).double().exp()
        found["MSP"] += (every.amax(-1) / every.sum(-1)).tolist()
        found["energy"] += every.sum(-1).log().tolist()
        other = (clip.logit_scale * inputs.features @ words_WD.T).double().exp().sum(-1)
        found["NegLabel"] += (every.sum(-1) / (every.sum(-1) + other)).tolist()
    truth = [1] * len(tests[0]) + [0] * len(tests[1])
    rows = {row["score"]: row for row in part["rows"] if row["model"] == "global"}
    for score, values in found.items():
        expected = roc_auc_score(truth, values)
        assert rows[score]["auroc"] == pytest.approx(expected, abs=1e-4), score


def test_ood_against_other_data_and_without_patches(
    runs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import fedprompt.evaluation.protocols.ood as module

    monkeypatch.setattr(module, "local_encoder", lambda clip: None)
    folder = runs("ood", protocol_options={"ood": {"out": TARGETS}})
    summary = summary_of(folder)
    assert summary["classes"] == 20, "nothing is held out"
    assert list(summary["protocols"]["ood"]["out_images"]) == ["steppe", "oasis"]
    assert {row["score"] for row in summary["protocols"]["ood"]["rows"]} == OF_LOGITS
    (table,) = result_tables(summary, "here")
    assert "No GL-MCM: the backbone's image tower gives no patch features." in table.note
    assert table.rows[-1][0] == "global, NegLabel, oasis"


def test_base_to_new_shares_its_new_classes_with_ood(runs: Callable[..., Path]) -> None:
    part = summary_of(runs("ood", "base_to_new"))["protocols"]
    assert part["ood"]["out_images"] == {"held-out classes": part["base_to_new"]["new_images"]}


def test_a_method_s_own_novelty_head_is_a_further_score(runs: Callable[..., Path]) -> None:
    from sklearn.metrics import roc_auc_score

    method = {"name": "anomalyclip", "context_tokens": 4}
    folder = runs("ood", method=method, protocol_options={"ood": {"local": False}})
    part = summary_of(folder)["protocols"]["ood"]
    workspace, shared, _ = models_of(folder)
    assert workspace.held_out is not None
    encoded = encode_global(workspace.method, shared)
    novelty = []
    for inputs in (workspace.server_test()[0], workspace.held_out_test()[0]):
        found = workspace.method.novelty(encoded, inputs.of_one())
        assert found is not None
        novelty.append(found[0].numpy())
    truth = [0] * len(novelty[0]) + [1] * len(novelty[1])
    rows = {(row["model"], row["score"]): row for row in part["rows"]}
    assert {score for model, score in rows if model == "zero-shot"} == OF_LOGITS
    expected = roc_auc_score(truth, np.concatenate(novelty))
    assert rows["global", "novelty head"]["auroc"] == pytest.approx(expected, abs=1e-4)
