"""Protocols: config, hold-outs, numbers against a slow second way, tables and figures."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fedprompt.config.schema import Config, to_dict
from fedprompt.data.features.inputs import Inputs
from fedprompt.errors import UserError
from fedprompt.evaluation.metrics import harmonic_mean
from fedprompt.evaluation.protocol import Protocol
from fedprompt.evaluation.protocols.communication import curve, reached
from fedprompt.evaluation.protocols.fairness import gap, spread
from fedprompt.evaluation.registry import (
    DEFAULT,
    all_protocols,
    compare_runs,
    open_protocols,
    result_tables,
    who_holds_out,
)
from fedprompt.experiment.checkpoint import read_checkpoint
from fedprompt.experiment.compose import compose
from fedprompt.experiment.display import QuietDisplay, protocol_tables
from fedprompt.experiment.run import resume, run
from fedprompt.experiment.summary import draw_report
from fedprompt.experiment.validate import validate
from fedprompt.experiment.workspaces import open_workspace
from fedprompt.methods.base import Task
from fedprompt.methods.registry import method_class
from fedprompt.reports.figure import Figure, Lines
from fedprompt.reports.format import Table
from fedprompt.reports.run_data import PRIVATE, load_run
from fedprompt.simulation.private_log import PrivateLog
from fedprompt.workspace import Workspace
from tests.support import ROOT
from tests.support.builders import small_config

TARGETS = [
    {"use": "aerial_scenes", "title": "steppe", "domains": ["steppe"], "images_per_class": 2},
    {"use": "aerial_scenes", "title": "oasis", "domains": ["oasis"], "images_per_class": 4,
     "class_names": ["beach", "runway", "sea ice"]},
]  # fmt: skip
WITH_RESULTS = [name for name in all_protocols() if name not in DEFAULT]
OPTIONS: dict[str, Any] = {
    "base_to_new": {"all_classes": True},
    "cross_data_set": {"targets": TARGETS},
    "ood": {"local": True},
    "leave_one_domain_out": {"domain": "highland"},
}


def config_of(*names: str, **sections: Any) -> Config:
    wanted = {n: OPTIONS[n] for n in names if n in OPTIONS}
    return small_config(
        **{
            "data": {"images_per_class": 8, "domains": ["savanna", "highland", "delta"]},
            "federation": {"rounds": 2},
            "protocols": [*DEFAULT, *names],
            "protocol_options": wanted,
            **sections,
        }
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A finished run with these protocols; each combination is run once."""
    made: dict[str, Path] = {}

    def make(*names: str, **sections: Any) -> Path:
        key = json.dumps([names, sections])
        if key not in made:
            config = config_of(*names, **sections)
            folder = tmp_path_factory.mktemp("run") / "run"
            config = replace(config, output=replace(config.output, dir=str(folder), report=True))
            made[key] = run(config, QuietDisplay(_silent()))
        return made[key]

    return make


def _silent() -> Any:
    from rich.console import Console

    return Console(quiet=True)


def summary_of(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return loaded


# Config


def test_default_protocols_and_round_trip() -> None:
    plain = compose("quickstart")
    assert plain.protocols == ["global", "personalised"]
    chosen = config_of(*(n for n in WITH_RESULTS if n != "leave_one_domain_out"))
    assert validate(to_dict(chosen)) == chosen
    targets = chosen.protocol_options["cross_data_set"].targets
    assert targets[0]["source"] == "aerial_scenes", "complete: no name is left to look up"
    assert validate(to_dict(chosen)).protocol_options["cross_data_set"].targets == targets


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        ({"protocols": ["globl"]}, "no protocol 'globl'. Did you mean 'global'"),
        ({"protocols": "global"}, "must be a list of names"),
        ({"protocols": []}, "protocols is empty"),
        ({"protocols": ["global", "global"]}, "twice"),
        ({"protocol_options": {"x": {}}}, "no protocol 'x'"),
        ({"protocol_options": 3}, "a key per protocol"),
        ({"protocol_options": {"ood": 3}}, "protocol_options.ood is 3"),
        ({"protocol_options": {"ood": {"locl": 1}}}, "Did you mean 'local'"),
        ({"protocol_options": {"calibration": {"bins": 0}}}, "bins is 0; it must be at least 1"),
        ({"protocol_options": {"communication": {"percents": [101]}}}, "at most 100"),
        ({"protocol_options": {"cross_data_set": {"targets": ["nowhere"]}}}, "no data 'nowhere'"),
        ({"protocol_options": {"cross_data_set": {"targets": 3}}}, "must be a list of data sets"),
        (
            {"protocol_options": {"ood": {"out": ["aerial_scenes", "aerial_scenes"]}}},
            "two data sets are called 'aerial_scenes'",
        ),
        ({"protocols": ["global", "fairness"]}, "'fairness' reads the results of personalised"),
        (
            {"protocols": ["base_to_new", "leave_one_domain_out"]},
            "'base_to_new' and 'leave_one_domain_out' both hold something out",
        ),
        ({"protocols": ["ood", "leave_one_domain_out"]}, "both hold something out"),
    ],
)
def test_impossible_configs_are_one_line(raw: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        small_config(**raw)


def test_who_holds_out() -> None:
    def holder(*names: str, **options: Any) -> str | None:
        raw = {"protocols": list(names), "protocol_options": options}
        found = who_holds_out(open_protocols(small_config(**raw)))
        return None if found is None else found.name

    assert holder("global") is None
    assert holder("ood") == "ood"
    # The new classes serve as unknown ones, whatever the order.
    assert holder("ood", "base_to_new") == holder("base_to_new", "ood") == "base_to_new"
    assert holder("ood", "leave_one_domain_out", ood={"out": TARGETS}) == "leave_one_domain_out"
    assert holder("ood", ood={"out": TARGETS}) is None


@pytest.mark.parametrize("name", sorted(all_protocols()))
def test_every_protocol_says_what_it_is(name: str) -> None:
    cls = all_protocols()[name]
    assert cls.title
    assert cls.__doc__
    if name not in DEFAULT:
        assert cls.caption
        assert {"measure", "table", "figure"} <= set(vars(cls))
    options = cls.prepare({})
    assert cls.prepare(options) == options


def test_every_shipped_experiment_and_sweep_of_a_protocol_composes() -> None:
    folder = ROOT / "configs"
    found = sorted(p.stem for p in (folder / "experiment").glob("protocol_*.yaml"))
    covered = {name for stem in found for name in compose(stem).protocols}
    assert covered == set(all_protocols())


# Runs


@pytest.mark.parametrize("name", WITH_RESULTS)
def test_every_protocol_runs_draws_and_is_reported(runs: Callable[..., Path], name: str) -> None:
    folder = runs(name)
    part = summary_of(folder)["protocols"]
    assert list(part) == [name]
    picture = folder / "plots" / f"protocol_{name}.png"
    with Image.open(picture) as image:
        assert image.size[0] == 840
        assert len(np.unique(np.asarray(image.convert("L")))) > 20, "not an empty page"
    html = (folder / "report.html").read_text()
    (table,) = result_tables(summary_of(folder), "here")
    assert table.rows
    assert all(len(row) == len(table.columns) for row in table.rows)
    assert f'id="protocol_{name}"' in html
    assert f"<h2>{table.title}</h2>" in html
    assert table.markdown().splitlines()[-1].count("|") == len(table.columns) + 1
    assert len(protocol_tables([table], 80)) == 1


def test_default_runs_have_no_further_keys(runs: Callable[..., Path]) -> None:
    folder = runs()
    assert "protocols" not in summary_of(folder)
    assert '"protocols"' not in (folder / "metrics.jsonl").read_text()


def test_without_the_usual_two_nothing_of_theirs_is_measured(runs: Callable[..., Path]) -> None:
    folder = runs(protocols=["calibration"], evaluation={"local_only": True})
    summary = summary_of(folder)
    assert summary["personal"] is summary["local_only"] is summary["personal_on_global"] is None
    assert summary["global"]["accuracy"] is None
    assert set(summary["protocols"]["calibration"]["models"]) == {
        "zero-shot", "global", "personal",
    }  # fmt: skip


def models_of(folder: Path) -> tuple[Workspace, dict[str, torch.Tensor], list[Any]]:
    """The run's workspace, shared tensors and each client's private ones."""
    config = compose(folder / "config.yaml")
    workspace = open_workspace(config)
    checkpoint = read_checkpoint(folder / "checkpoint.safetensors")
    log = PrivateLog(folder / PRIVATE, workspace.num_clients)
    log.read(checkpoint.server_round, checkpoint.private)
    own = [log.get(k) or workspace.start_private(k) for k in range(workspace.num_clients)]
    return workspace, checkpoint.shared, own


def logits(
    workspace: Workspace,
    names: tuple[str, ...],
    shared: dict[str, torch.Tensor],
    own: dict[str, torch.Tensor] | None,
    index: Any,
) -> torch.Tensor:
    """One model on some images, encoded anew from the pixels for one class list."""
    cls = method_class(workspace.config.method.name)
    method = cls(workspace.config.method, workspace.clip, Task(names, workspace.task.templates))
    images = [workspace.clip.preprocess(workspace.dataset.open_image(int(i))) for i in index]
    features = F.normalize(workspace.clip.encode_images(torch.stack(images)), dim=-1)
    private = None if own is None else {n: t[None] for n, t in own.items()}
    with torch.no_grad():
        encoded = method.encode({n: t[None] for n, t in shared.items()}, private)
        return method.logits(encoded, Inputs(features[None]))[0]


def test_base_to_new_by_a_second_way(runs: Callable[..., Path]) -> None:
    folder = runs("base_to_new")
    part = summary_of(folder)["protocols"]["base_to_new"]
    workspace, shared, own = models_of(folder)
    base, new = tuple(part["base_classes"]), tuple(part["new_classes"])
    assert (len(base), len(new)) == (10, 10)
    held = workspace.held_out
    assert held is not None
    trained = np.concatenate([workspace.partition.train(k) for k in range(4)])
    assert not set(trained) & set(held.index_N)
    assert (workspace.dataset.labels_N[trained] >= 0).all(), "no image of a new class is held"
    rows = {row["model"]: row for row in part["rows"]}

    def accuracy(names: tuple[str, ...], private: Any, index: Any, labels: Any) -> float:
        found = logits(workspace, names, shared, private, index).argmax(-1).numpy()
        return float((found == labels).mean())

    tests = workspace.partition.server_test
    base_labels = workspace.dataset.labels_N[tests]
    assert rows["global"]["base"] == accuracy(base, None, tests, base_labels)
    assert rows["global"]["new"] == accuracy(new, None, held.index_N, held.labels_N)
    everyone = [accuracy(new, own[k], held.index_N, held.labels_N) for k in range(4)]
    assert rows["personal"]["new"] == pytest.approx(np.mean(everyone))
    assert rows["personal"]["std"]["new"] == pytest.approx(np.std(everyone))
    assert len(set(everyone)) > 1, "personal models differ"
    assert rows["global"]["harmonic"] == pytest.approx(
        harmonic_mean(rows["global"]["base"], rows["global"]["new"])
    )
    both = accuracy((*base, *new), None, held.index_N, held.labels_N + len(base))
    assert rows["global"]["new_of_all"] == both
    assert both < rows["global"]["new"], "more names compete"
    lines = load_run(folder).rounds
    assert lines[-1]["protocols"]["base_to_new"]["new"] == rows["global"]["new"]
    assert rows["global"]["base"] == lines[-1]["global"]["accuracy"]


def test_a_random_base_depends_on_the_seed() -> None:
    def base(seed: int, how: str) -> tuple[str, ...]:
        options = {"base_to_new": {"base": how, "base_share": 0.55}}
        config = config_of("base_to_new", seed=seed, protocol_options=options)
        return open_workspace(config).task.class_names

    assert len(base(1, "random")) == 11, "0.55 of 20 classes, rounded up"
    assert base(1, "random") != base(2, "random")
    assert base(1, "random") == base(1, "random")
    assert base(1, "first") == base(2, "first")


def test_a_method_that_cannot_transfer_says_why(
    runs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(method_class("promptfl"), "no_transfer_reason", "it is bound to classes")
    folder = runs("base_to_new", "cross_data_set", method={"name": "promptfl"})
    part = summary_of(folder)["protocols"]
    rows = {row["model"]: row for row in part["base_to_new"]["rows"]}
    for model in ("global", "personal"):
        assert rows[model]["base"] is not None
        assert rows[model]["new"] is rows[model]["harmonic"] is None
        assert "bound to classes" in rows[model]["why"]
    tables = result_tables(summary_of(folder), "here")
    assert "bound to classes" in tables[0].note
    assert [row["global"] is None for row in part["cross_data_set"]["rows"]] == [False, True, True]


def test_methods_without_a_global_model_are_reported(runs: Callable[..., Path]) -> None:
    names = [n for n in WITH_RESULTS if n != "leave_one_domain_out"]
    folder = runs(*names, method={"name": "coop_local"})
    part = summary_of(folder)["protocols"]
    assert set(part["ood"]["histogram"]) == {"zero-shot"}
    assert set(part["calibration"]["models"]) == {"zero-shot", "personal"}
    assert part["per_class"]["confusion_of"] == "zero-shot"
    assert part["base_to_new"]["rows"][1]["why"] == "the method has no global model"
    assert part["base_to_new"]["rows"][2]["new"] is not None


def test_leave_one_domain_out_by_a_second_way(runs: Callable[..., Path]) -> None:
    folder = runs("leave_one_domain_out")
    part = summary_of(folder)["protocols"]["leave_one_domain_out"]
    workspace, shared, own = models_of(folder)
    assert part["seen_domains"] == ["savanna", "delta"]
    assert part["unseen_domain"] == "highland"
    whole = open_workspace(config_of())
    unseen = np.flatnonzero((whole.dataset.domains_N == 1) & (whole.dataset.split_N == 1))
    labels = whole.dataset.labels_N[unseen]
    names = workspace.task.class_names
    rows = {row["model"]: row for row in part["rows"]}
    found = logits(workspace, names, shared, None, unseen).argmax(-1).numpy()
    assert rows["global"]["unseen"] == pytest.approx((found == labels).mean())
    everyone = [
        (logits(workspace, names, shared, own[k], unseen).argmax(-1).numpy() == labels).mean()
        for k in range(4)
    ]
    assert rows["personal"]["unseen"] == pytest.approx(np.mean(everyone))
    seen = list(rows["global"]["by_domain"].values())
    assert rows["global"]["seen"] == pytest.approx(np.mean(seen)), "as many images in each"
    held = {k for k in range(4) for i in workspace.partition.train(k) if i in set(unseen)}
    assert not held


def test_leave_one_domain_out_needs_a_known_domain_of_several() -> None:
    options = {"leave_one_domain_out": {"domain": "hghland"}}
    config = config_of("leave_one_domain_out", protocol_options=options)
    with pytest.raises(UserError, match=r"no domain 'hghland'. Did you mean 'highland'"):
        open_workspace(config)
    one = {"images_per_class": 4, "domains": ["savanna"]}
    config = config_of("leave_one_domain_out", data=one, protocol_options={})
    with pytest.raises(UserError, match="two or more domains"):
        open_workspace(config)


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


def test_ood_against_other_data_and_without_patches(
    runs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import fedprompt.evaluation.protocols.ood as module

    monkeypatch.setattr(module, "local_encoder", lambda clip: None)
    folder = runs("ood", protocol_options={"ood": {"out": TARGETS}})
    summary = summary_of(folder)
    assert summary["classes"] == 20, "nothing is held out"
    assert list(summary["protocols"]["ood"]["out_images"]) == ["steppe", "oasis"]
    assert {row["score"] for row in summary["protocols"]["ood"]["rows"]} == {"MCM"}
    (table,) = result_tables(summary, "here")
    assert "No GL-MCM: the backbone's image tower gives no patch features." in table.note
    assert table.rows[-1][0] == "global, MCM, oasis"


def test_base_to_new_shares_its_new_classes_with_ood(runs: Callable[..., Path]) -> None:
    part = summary_of(runs("ood", "base_to_new"))["protocols"]
    assert part["ood"]["out_images"] == {"held-out classes": part["base_to_new"]["new_images"]}


def test_cross_data_set_uses_the_targets_own_names(runs: Callable[..., Path]) -> None:
    folder = runs("cross_data_set")
    rows = summary_of(folder)["protocols"]["cross_data_set"]["rows"]
    assert [(r["data"], r["images"], r["classes"], r["known_classes"]) for r in rows] == [
        ("aerial_scenes", 120, 20, 20), ("steppe", 20, 20, 20), ("oasis", 3, 3, 3),
    ]  # fmt: skip
    assert rows[0]["global"] == summary_of(folder)["global"]["accuracy"]
    workspace, shared, _ = models_of(folder)
    config = config_of(data={"images_per_class": 4, "domains": ["oasis"]})
    oasis = open_workspace(config)
    names = ("beach", "runway", "sea ice")
    labels = [oasis.task.class_names.index(name) for name in names]
    # Of four images per class the last one is the test image.
    index = [int(np.flatnonzero(oasis.dataset.labels_N == label)[3]) for label in labels]
    pictures = Workspace(
        workspace.config, workspace.clip, oasis.dataset, oasis.partition, oasis.views
    )
    found = logits(pictures, names, shared, None, index).argmax(-1)
    assert rows[2]["global"] == pytest.approx((found == torch.arange(3)).double().mean())


def test_calibration_and_classes_by_a_second_way(runs: Callable[..., Path]) -> None:
    folder = runs("calibration", "per_class")
    part = summary_of(folder)["protocols"]
    workspace, shared, own = models_of(folder)
    names, labels_N = workspace.task.class_names, workspace.dataset.labels_N
    confidence: list[float] = []
    hits: list[bool] = []
    tested, right = np.zeros(20), np.zeros(20)
    for k in range(4):
        index = workspace.partition.test(k)
        p = logits(workspace, names, shared, own[k], index).double().softmax(-1)
        found = p.argmax(-1).numpy()
        confidence += p.amax(-1).tolist()
        hits += (found == labels_N[index]).tolist()
        np.add.at(tested, labels_N[index], 1)
        np.add.at(right, labels_N[index], found == labels_N[index])
    personal = part["calibration"]["models"]["personal"]
    assert personal["images"] == len(hits)
    assert personal["mean_accuracy"] == pytest.approx(np.mean(hits))
    expected = 0.0
    for m in range(15):
        inside = [i for i, c in enumerate(confidence) if m / 15 < c <= (m + 1) / 15]
        if inside:
            gap_m = np.mean([confidence[i] for i in inside]) - np.mean([hits[i] for i in inside])
            expected += abs(gap_m) * len(inside) / len(hits)
    assert personal["ece"] == pytest.approx(expected, abs=1e-4)
    for c in range(20):
        share = right[c] / tested[c] if tested[c] else None
        assert part["per_class"]["accuracy"]["personal"][c] == pytest.approx(share)
    counts = np.array(part["per_class"]["confusion"])
    assert counts.sum() == len(workspace.partition.server_test)
    accuracy = np.trace(counts) / counts.sum()
    assert accuracy == pytest.approx(summary_of(folder)["global"]["accuracy"])


def test_fairness_has_the_summarys_clients(runs: Callable[..., Path]) -> None:
    folder = runs("fairness", evaluation={"local_only": True})
    summary = summary_of(folder)
    part = summary["protocols"]["fairness"]
    for model, entry in (
        ("personal", summary["personal"]),
        ("zero-shot", summary["zero_shot"]["personal"]),
        ("local-only", summary["local_only"]["personal"]),
    ):
        for key in ("mean", "std", "worst", "p10"):
            assert part["models"][model][key] == entry[key]
    difference = np.array(summary["personal"]["accuracy"]) - np.array(
        summary["local_only"]["personal"]["accuracy"]
    )
    assert part["to_local_only"]["mean"] == pytest.approx(difference.mean())
    assert part["to_local_only"]["worse"] == int((difference < 0).sum())


def test_fairness_by_hand() -> None:
    found = spread({0: 0.2, 1: 0.6, 4: 1.0}, 0.5)
    assert found["lowest_mean"] == pytest.approx(0.4)
    assert found["gini"] == pytest.approx((2 * 0.2 * 0 + 0.4 * 4 + 0.8 * 2) / (9 * 2 * 0.6))
    assert gap({0: 0.5, 1: 0.7}, {1: 0.9, 2: 0.1}) == {
        "clients": 1, "mean": pytest.approx(-0.2), "lowest": pytest.approx(-0.2), "worse": 1,
    }  # fmt: skip
    assert gap({0: 0.5}, {}) is None


def test_communication_by_hand() -> None:
    accuracy = [0.2, 0.91, 0.5, None, 0.96, 1.0]
    lines = [
        {
            "round": r,
            "bytes_up": 10 if r else 0,
            "bytes_down": 20 if r else 0,
            "global": None if a is None else {"accuracy": a},
        }
        for r, a in enumerate(accuracy)
    ]
    points = curve(lines, "global", "accuracy")
    assert [p[0] for p in points] == [0, 1, 2, 4, 5]
    # Round 1 reaches 90 %, but round 2 falls below it again.
    assert reached(points, 0.9) == {"round": 4, "accuracy": 0.96, "up": 40, "down": 80}
    assert reached(points, 0.99)["round"] == 5
    assert reached(points, 1.0)["round"] == 5
    assert reached(points, 0.1) == {"round": 0, "accuracy": 0.2, "up": 0, "down": 0}


def test_communication_of_a_run_adds_up_to_its_traffic(runs: Callable[..., Path]) -> None:
    summary = summary_of(runs("communication"))
    last = summary["protocols"]["communication"]["curves"]["personal"]["points"][-1]
    assert (last["up"], last["down"]) == (summary["bytes_up"], summary["bytes_down"])
    assert last["accuracy"] == summary["personal"]["mean"]


def test_few_shot_holds_no_more_than_that(runs: Callable[..., Path]) -> None:
    folders = [runs("few_shot", partition={"clients": 4, "shots": s}) for s in (2, 1)]
    table, figure = compare_runs("few_shot", [load_run(f) for f in folders])
    assert [row[0].split()[0] for row in table.rows] == ["1", "2"]
    (panel,) = figure.panels
    assert isinstance(panel, Lines)
    assert [curve.name for curve in panel.curves] == ["zero-shot", "global", "personal"]
    assert list(panel.curves[1].y) == [
        summary_of(f)["global"]["accuracy"] for f in reversed(folders)
    ]
    for folder, shots in zip(folders, (2, 1), strict=True):
        part = summary_of(folder)["protocols"]["few_shot"]
        workspace = open_workspace(compose(folder / "config.yaml"))
        counts_KC = workspace.partition.train_counts(workspace.dataset.labels_N, 20)
        assert counts_KC.max() == shots
        assert part["train_images"] == counts_KC.sum()
        assert part["shots"] == shots


def test_domains_in_turn_are_one_table(runs: Callable[..., Path]) -> None:
    folders = [
        runs("leave_one_domain_out", protocol_options={"leave_one_domain_out": {"domain": d}})
        for d in ("savanna", "delta")
    ]
    table, figure = compare_runs("leave_one_domain_out", [load_run(f) for f in folders])
    assert table.columns == ("model", "delta", "savanna", "mean")
    parts = [summary_of(f)["protocols"]["leave_one_domain_out"]["rows"] for f in folders]
    unseen = [rows[1]["unseen"] for rows in parts]
    assert table.rows[1][1:] == tuple(
        f"{100 * v:.1f} %" for v in (unseen[1], unseen[0], np.mean(unseen))
    )
    assert isinstance(figure, Figure)
    with pytest.raises(UserError, match="holds no results of protocol 'few_shot'"):
        compare_runs("few_shot", [load_run(folders[0])])


def test_protocols_that_cannot_be_compared_say_which_can(runs: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="these have: few_shot, leave_one_domain_out"):
        compare_runs("ood", [load_run(runs("ood"))])


def test_a_run_that_ended_before_its_protocols_resumes_to_the_same(
    runs: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("base_to_new", "calibration", "fairness")
    whole = runs(*names, evaluation={"local_only": True})
    config = config_of(*names, evaluation={"local_only": True})
    config = replace(config, output=replace(config.output, dir=str(tmp_path / "run")))

    def killed(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("fedprompt.experiment.run.finish", killed)
        with pytest.raises(KeyboardInterrupt):
            run(config, QuietDisplay(_silent()))
    folder = resume(tmp_path / "run", QuietDisplay(_silent()))
    assert summary_of(folder)["protocols"] == summary_of(whole)["protocols"]
    assert (folder / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


# Damage


@pytest.mark.parametrize("name", WITH_RESULTS)
def test_damaged_results_are_one_line(runs: Callable[..., Path], tmp_path: Path, name: str) -> None:
    source, folder = runs(name), tmp_path / "run"
    folder.mkdir()
    for file in ("config.yaml", "metrics.jsonl", "partition.json"):
        os.link(source / file, folder / file)
    summary = summary_of(source)
    for broken in ({}, {"rows": [3]}, {"models": 1, "curves": 2, "accuracy": []}):
        summary["protocols"] = {name: broken}
        (folder / "summary.json").write_text(json.dumps(summary))
        with pytest.raises(UserError, match=rf"summary\.json is damaged: 'protocols\.{name}'"):
            draw_report(folder)
    summary["protocols"] = {"of_another_version": {}}
    (folder / "summary.json").write_text(json.dumps(summary))
    draw_report(folder)


def test_figures_of_protocols_that_are_gone_do_not_stay(
    runs: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    (folder / "plots").mkdir(parents=True)
    for file in ("config.yaml", "metrics.jsonl", "summary.json"):
        os.link(runs() / file, folder / file)
    (folder / "plots" / "protocol_ood.png").write_bytes(b"old")
    draw_report(folder)
    assert not (folder / "plots" / "protocol_ood.png").exists()


def test_markdown_escapes_the_column_separator() -> None:
    table = Table("t", ("a", "b"), (("x|y", "1"),))
    assert table.markdown() == "| a | b |\n| --- | --- |\n| x/y | 1 |"
    assert issubclass(all_protocols()["ood"], Protocol)
