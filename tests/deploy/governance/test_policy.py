"""Every clause of a node's policy refuses what it forbids, and says so."""

from __future__ import annotations

import datetime
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprompt.config.protection import PrivacyConfig, SecureAggregationConfig
from fedprompt.deploy.governance.policy import (
    Policy,
    class_objections,
    closed_until,
    objections,
    read_policy,
    reply_objections,
    revealed_counts,
)
from fedprompt.errors import UserError
from tests.support.federations import CLASSES, config_for

MASKED = SecureAggregationConfig(enabled=True)
NOISY = PrivacyConfig(noise=2.0, clip=1.0)


@pytest.mark.parametrize(
    ("clause", "allowed", "sections"),
    [
        ({"experiments": ["rs_*"]}, {"experiments": ["fold*"]}, {}),
        ({"methods": ["promptfl"]}, {"methods": ["promptfl", "fedrsclip"]}, {}),
        ({"strategies": ["median"]}, {"strategies": ["fed*"]}, {}),
        ({"classes": list(CLASSES[1:])}, {"classes": [*CLASSES, "lake"]}, {}),
        ({"max_rounds": 2}, {"max_rounds": 3}, {}),
        (
            {"protocols": ["calibration"]},
            {"protocols": ["per_*"]},
            {"protocols": ["global", "per_class"]},
        ),
        ({"secure_aggregation": True}, {"secure_aggregation": False}, {}),
        (
            {"secure_aggregation": True, "min_peers": 3},
            {"secure_aggregation": True, "min_peers": 2},
            {"secure_aggregation": MASKED},
        ),
        ({"min_noise": 2.5}, {"min_noise": 2.0}, {"privacy": NOISY}),
        ({"max_clip": 0.5}, {"max_clip": 1.0}, {"privacy": NOISY}),
        ({"max_epsilon": 1.0}, {}, {}),
        ({"min_noise": 1.0}, {}, {"privacy": replace(NOISY, noise_seed=3)}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_a_clause_refuses_what_it_forbids_and_nothing_else(
    clause: dict[str, Any], allowed: dict[str, Any], sections: dict[str, Any]
) -> None:
    config = replace(config_for(Path("images"), Path("run")), **sections)
    found = objections(Policy(**clause), config)
    assert len(found) == 1
    assert next(reversed(clause)) in found[0]
    assert objections(Policy(**allowed), config) == []


def test_all_violated_clauses_are_named_at_once() -> None:
    policy = Policy(methods=["promptfl"], max_rounds=1, min_noise=1.0)
    assert len(objections(policy, config_for(Path("images"), Path("run")))) == 3


def test_what_reveals_classes_is_refused_where_their_counts_are_not_exact() -> None:
    config = replace(config_for(Path("images"), Path("run")), protocols=["global", "per_class"])
    for counts in ("rounded", "withheld"):
        policy = Policy(class_counts=counts, test_accuracy=False)  # type: ignore[arg-type]
        assert "per_class" in objections(policy, config)[0]
        named = replace(policy, protocols=["per_class"])
        assert objections(named, config) == []
    assert objections(Policy(), config) == []
    sent = {"class_shares": np.zeros(4, np.float32)}
    assert "class_shares" in reply_objections(Policy(class_counts="rounded"), sent, 0.0)[0]
    assert reply_objections(Policy(), sent, 0.0) == []


def test_replies() -> None:
    sent = {"shared.context": np.zeros((4, 8), np.float32), "extra": np.zeros(3, np.float32)}
    assert reply_objections(Policy(), sent, 2.0) == []
    assert "extra" in reply_objections(Policy(tensors=["shared.*"]), sent, 0.0)[0]
    assert reply_objections(Policy(tensors=["shared.*", "extra"]), sent, 0.0) == []
    assert "35" in reply_objections(Policy(max_numbers=34), sent, 0.0)[0]
    assert reply_objections(Policy(max_numbers=35), sent, 0.0) == []
    assert len(reply_objections(Policy(max_change=1.0), sent, 1.1)) == 1
    assert len(reply_objections(Policy(max_change=1.0), sent, float("nan"))) == 1
    assert reply_objections(Policy(max_change=1.0), sent, 1.0) == []


def test_hours() -> None:
    night, day = Policy(hours="18:00-06:00"), Policy(hours="09:00-17:00")
    at = {h: datetime.time(h, 30) for h in (3, 12, 20)}
    assert [closed_until(night, t) for t in at.values()] == [None, "18:00", None]
    assert [closed_until(day, t) for t in at.values()] == ["09:00", None, "09:00"]
    assert closed_until(Policy(), at[3]) is None


def test_counts() -> None:
    assert revealed_counts(Policy(), [0, 1, 27]) == [0, 1, 27]
    assert revealed_counts(Policy(class_counts="rounded"), [0, 1, 27]) == [0, 10, 30]
    assert revealed_counts(Policy(class_counts="withheld"), [0, 1, 27]) == []


def test_classes_are_named_but_not_all() -> None:
    names = [f"class {k}" for k in range(9)]
    (found,) = class_objections(Policy(classes=["class 0"]), names)
    assert "class 1" in found
    assert "3 more" in found


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("max_round: 3", "max_rounds"),
        ("max_rounds: 0", "policy.max_rounds"),
        ("hours: 6pm-6am", "hours"),
        ("class_counts: some", "class_counts"),
        ("class_counts: rounded", "test_accuracy"),
        ("hours: 10:00-10:00", "hours"),
        ("min_peers: 3", "secure_aggregation"),
        ("- a", "key: value"),
    ],
)
def test_a_wrong_policy_file_is_one_line(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(f"{text}\n")
    with pytest.raises(UserError) as error:
        read_policy(path)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_the_hash_is_that_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("max_rounds: 5\n")
    policy, first = read_policy(path)
    assert policy == Policy(max_rounds=5)
    path.write_text("max_rounds: 5  # of the ethics board\n")
    assert read_policy(path) != (policy, first)
