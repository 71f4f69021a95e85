"""Attacks on single updates, and the protocol that runs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedprompt.evaluation.protocols.privacy_audit import PrivacyAudit, variation
from fedprompt.evaluation.registry import open_protocols
from fedprompt.experiment.display import make_display
from fedprompt.experiment.run import run
from fedprompt.privacy.inversion import Attacker, cosine, decoded, uploaded_by
from fedprompt.workspace import Workspace

MakeWorkspace = Callable[..., Workspace]
PROMPTFL = {"name": "promptfl", "context_tokens": 2}


def test_variation() -> None:
    assert variation([1, 0, 0], [0, 0.5, 0.5]) == 1
    assert variation([0.5, 0.5], [0.25, 0.75]) == 0.25


def test_a_linear_map_is_decoded() -> None:
    draw = np.random.default_rng(0)
    matrix = draw.standard_normal((5, 40))
    features = draw.standard_normal((60, 5))
    true = draw.standard_normal(5)
    found = decoded(features @ matrix, features, true @ matrix, 0.0)
    assert cosine(found, true) > 0.999
    noise = 100 * draw.standard_normal(40)
    lost = decoded(features @ matrix, features, true @ matrix + noise, 100.0)
    assert np.linalg.norm(lost - features.mean(0)) < 0.5, "much noise: the mean is all that is left"
    assert cosine(np.zeros(3), np.ones(3)) == 0


def attack(workspace: Workspace, client: int) -> tuple[Attacker, dict[str, torch.Tensor]]:
    received = workspace.method.init_shared(workspace.config.seed)
    return Attacker(workspace, client, received), received


def test_an_imagined_update_is_the_update(make_workspace: MakeWorkspace) -> None:
    workspace = make_workspace(method=PROMPTFL)
    attacker, received = attack(workspace, 1)
    data = workspace.train_data(1)
    uploaded = uploaded_by(workspace, 1, received, {}, image=0)
    (row,) = attacker.imagined([(data.inputs[[0]], data.labels_N[[0]])])
    np.testing.assert_allclose(row, attacker.change(uploaded), rtol=1e-5, atol=1e-9)
    assert np.abs(row).max() > 0


def test_the_class_mix_is_found_and_noise_hides_it(make_workspace: MakeWorkspace) -> None:
    training = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "lr": 0.01}
    sections = {
        "method": PROMPTFL, "training": training,
        "partition": {"scheme": "pathological", "classes_per_client": 2},
    }  # fmt: skip

    def distances(**more: Any) -> list[float]:
        workspace = make_workspace(**sections, **more)
        found = []
        for client in range(4):
            attacker, received = attack(workspace, client)
            uploaded = uploaded_by(workspace, client, received, {}, image=None)
            labels_N = workspace.train_data(client).labels_N.numpy()
            true_C = np.bincount(labels_N, minlength=6) / len(labels_N)
            found.append(variation(attacker.class_shares(uploaded), true_C))
        return found

    plain = distances()
    noisy = distances(privacy={"noise": 100.0, "clip": 1.0, "noise_seed": 1})
    assert np.mean(plain) < 0.25
    assert np.mean(noisy) > np.mean(plain) + 0.2


def test_an_image_feature_is_found_and_noise_hides_it(make_workspace: MakeWorkspace) -> None:
    def found(**more: Any) -> tuple[float, float]:
        workspace = make_workspace(method=PROMPTFL, **more)
        pairs = []
        for client in range(4):
            attacker, received = attack(workspace, client)
            data = workspace.train_data(client)
            label, true_D = int(data.labels_N[0]), data.inputs.features[0].double().numpy()
            uploaded = uploaded_by(workspace, client, received, {}, image=0)
            privacy = workspace.config.privacy
            noise = privacy.noise * privacy.clip
            result = attacker.feature(uploaded, label, 64, noise)
            assert result is not None
            guess = attacker.own_features(label).mean(0)
            pairs.append((cosine(result, true_D), cosine(guess, true_D)))
        attack_mean, guess_mean = np.mean(pairs, axis=0)
        return float(attack_mean), float(guess_mean)

    plain, guess = found()
    noisy, _ = found(privacy={"noise": 10.0, "clip": 1.0, "noise_seed": 1})
    assert plain > guess + 0.02
    assert noisy < plain
    assert noisy < guess + 0.05


def test_the_audit_of_a_run(run_config: Callable[..., Any], tmp_path: Path) -> None:
    config = run_config(
        method=PROMPTFL,
        protocols=["global", "privacy_audit"],
        protocol_options={"privacy_audit": {"candidates": 8, "images": 2}},
    )
    folder = run(config, make_display())
    part = json.loads((folder / "summary.json").read_text())["protocols"]["privacy_audit"]
    attacks = part["attacks"]
    assert list(attacks) == ["model", "update", "classes", "image"]
    assert all(0 <= attacks[k]["result"] <= 1 for k in ("model", "update", "classes"))
    assert part["epsilon"] == {"server": None, "client": None}
    table = PrivacyAudit.table(part)
    assert [row[0] for row in table.rows] == [
        "member, model",
        "member, update",
        "class mix",
        "image",
    ]
    compared, figure = PrivacyAudit.compare([("one", part), ("two", part)])
    assert compared.rows[0][0] == "one"
    assert compared.rows[0][-1] == "none"
    assert len(figure.panels) == 1
    assert PrivacyAudit.figure(part, None).panels  # type: ignore[arg-type]


def test_the_audit_skips_what_it_cannot_attack(make_workspace: MakeWorkspace) -> None:
    for method in ({"name": "coop_local", "context_tokens": 2}, {"name": "zero_shot"}):
        workspace = make_workspace(method=method, protocols=["global", "privacy_audit"])
        (protocol,) = (p for p in open_protocols(workspace.config) if p.name == "privacy_audit")
        private = [workspace.start_private(c) for c in range(4)]
        rows = protocol.measure_clients(workspace, range(4), [{}] * 4, private)
        assert all(set(row.values()) == {0} for row in rows)


def test_the_audit_sees_through_a_method_with_private_prompts(
    make_workspace: MakeWorkspace,
) -> None:
    workspace = make_workspace(
        protocols=["global", "privacy_audit"],
        protocol_options={"privacy_audit": {"candidates": 4, "images": 1}},
    )
    shared = workspace.method.init_shared(1)
    private = [workspace.start_private(c) for c in range(2)]
    (protocol,) = (p for p in open_protocols(workspace.config) if p.name == "privacy_audit")
    rows = protocol.measure_clients(workspace, range(2), [shared] * 2, private)
    assert [row["trained"] for row in rows] == [1, 1]
    assert [row["inverted"] for row in rows] == [1, 0]
    assert all(0 <= row["classes"] <= 1 for row in rows)
