"""Figures hold the run's numbers; a run folder that is damaged is refused by file and line."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from omegaconf import OmegaConf
from PIL import Image

from fedprompt.data.partition import dense, sparse
from fedprompt.errors import UserError
from fedprompt.reports.client_figures import MANY, figure_clients, figure_partition
from fedprompt.reports.round_figures import (
    draw_all,
    figure_accuracy,
    figure_loss,
    plot_partition,
    spread_labels,
)
from fedprompt.reports.run_data import accuracy_of, load_run
from fedprompt.rng import generator


def personal(accuracy: dict[int, float]) -> dict[str, Any]:
    """The `personal` entry of a metrics line for these clients."""
    tested = np.array(list(accuracy.values()))
    return {
        "mean": float(tested.mean()),
        "std": float(tested.std()),
        "worst": float(tested.min()),
        "p10": float(np.percentile(tested, 10)),
        "clients_tested": len(tested),
        "clients": list(accuracy),
        "accuracy": list(accuracy.values()),
    }


def write_run(
    folder: Path,
    clients: int = 3,
    classes: int = 4,
    rounds: int = 2,
    *,
    untested: tuple[int, ...] = (),
    domains: int = 1,
    names: list[str] | None = None,
    finished: bool = True,
) -> Path:
    """A run folder as a run leaves it, with made-up learning curves."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = generator(1, "fake run", clients, classes, rounds)
    share_KC = draw.dirichlet(np.full(classes, 0.3), size=clients)
    size_K = draw.integers(60, 240, size=clients)
    train_KC = np.array([draw.multinomial(n, p) for n, p in zip(size_K, share_KC, strict=True)])
    test_KC = train_KC // 3
    test_KC[list(untested)] = 0
    domain_KD = np.zeros((clients, domains), dtype=np.int64)
    domain_KD[np.arange(clients), np.arange(clients) % domains] = (train_KC + test_KC).sum(axis=1)
    partition = {
        "class_names": names or [f"class {c}" for c in range(classes)],
        "domain_names": [f"domain {d}" for d in range(domains)],
        "train_counts": sparse(train_KC),
        "test_counts": sparse(test_KC),
        "domain_counts": sparse(domain_KD),
        "server_test_counts": [25] * classes,
    }
    offset_K = draw.normal(0, 0.09, size=clients)

    def clients_at(level: float) -> dict[str, Any]:
        noise_K = draw.normal(0, 0.01, size=clients)
        accuracy_K = np.clip(level + offset_K + noise_K, 0, 1).round(4)
        return personal({k: float(accuracy_K[k]) for k in range(clients) if k not in untested})

    zero_shot = {"accuracy": 0.412, "personal": clients_at(0.43)}
    lines: list[dict[str, Any]] = []
    sent = 8192 * clients
    for r in range(rounds + 1):
        progress = 1 - 0.82**r
        lines.append(
            {
                "kind": "round",
                "round": r,
                "lr": 0.002 if r else None,
                "train": {"loss": 2.1 - 1.6 * progress} if r else None,
                "clients": {"sampled": clients, "accepted": clients, "rejected": 0} if r else None,
                "bytes_up": sent if r else 0,
                "bytes_down": sent if r else 0,
                "global": {"accuracy": 0.41 + 0.33 * progress, "loss": 2.2 - 1.3 * progress},
                "personal": clients_at(0.43 + 0.42 * progress),
                "personal_on_global": {"mean": 0.41 + 0.22 * progress, "std": 0.04},
            }
        )
    for r in range(rounds + 1):
        progress = 1 - 0.75**r
        lines.append(
            {
                "kind": "local_only",
                "round": r,
                "train": {"loss": 2.1 - 1.7 * progress} if r else None,
                "personal": clients_at(0.43 + 0.34 * progress),
                "personal_on_global": {"mean": 0.41 + 0.05 * progress, "std": 0.05},
            }
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "timings.jsonl").write_text(
        "".join(
            json.dumps({"round": r, "train_s": 0.5 if r else 0.0, "evaluate_s": 0.25}) + "\n"
            for r in range(rounds + 1)
        )
    )
    (folder / "partition.json").write_text(json.dumps(partition))
    config = {
        "experiment": "quickstart",
        "seed": 1,
        "data": {"title": "aerial_scenes"},
        "method": {"name": "fedrsclip", "context_tokens": 4},
        "strategy": {"name": "fedavg"},
        "federation": {"rounds": rounds},
    }
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    if finished:
        last, alone = lines[rounds], lines[-1]
        summary = {
            "experiment": "quickstart",
            "method": "fedrsclip",
            "strategy": "fedavg",
            "seed": 1,
            "rounds": rounds,
            "clients": clients,
            "classes": classes,
            "backbone": "tiny",
            "data": "aerial_scenes",
            "global": last["global"],
            "personal": last["personal"],
            "personal_on_global": last["personal_on_global"],
            "zero_shot": zero_shot,
            "local_only": alone if rounds else None,
            "shared": {"ctx": [4, 512]},
            "private": {"ctx": [4, 512]},
            "uploaded_numbers_per_client_round": 2048,
            "bytes_up": sent * rounds,
            "bytes_down": sent * rounds,
            "rejected_replies": 0,
            "wall_s": 75.2,
            "environment": {"python": "3.11.7", "torch": "2.15.0", "device": "cpu", "threads": 2},
        }
        (folder / "summary.json").write_text(json.dumps(summary, indent=2))
    return folder


def curves(figure: Figure | None) -> dict[str, tuple[list[float], list[float]]]:
    """x and y of every line in a figure, by label."""
    assert figure is not None
    lines = [line for axes in figure.axes for line in axes.get_lines()]
    return {
        str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata())) for line in lines
    }


def bars(figure: Figure | None, panel: int) -> list[float]:
    assert figure is not None
    patches = figure.axes[panel].patches
    return [patch.get_height() for patch in patches if isinstance(patch, Rectangle)]


def rewrite(path: Path, change: Any) -> None:
    """Replace every JSON line of a file by `change(line)`."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(change(line)) + "\n" for line in lines))


def test_accuracy_figure_holds_every_measured_number(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run", rounds=2))
    drawn = curves(figure_accuracy(run))
    for label, part, key in (
        ("Global", "global", "accuracy"),
        ("Personalised", "personal", "mean"),
        ("Worst client", "personal", "worst"),
    ):
        assert drawn[label] == ([0, 1, 2], [line[part][key] for line in run.rounds])
    assert drawn["Local-only"] == ([0, 1, 2], [x["personal"]["mean"] for x in run.local_only])
    assert run.summary is not None
    assert drawn["Zero-shot"][1] == [0.412, 0.412]
    assert set(drawn["Zero-shot, own"][1]) == {run.summary["zero_shot"]["personal"]["mean"]}


def test_accuracy_band_is_one_standard_deviation_and_stays_within_0_and_1(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", rounds=1)
    rewrite(
        folder / "metrics.jsonl",
        lambda x: x | {"personal": {"mean": [0.5, 0.9][x["round"]], "std": 0.2, "worst": 0.1}},
    )
    figure = figure_accuracy(load_run(folder))
    assert figure is not None
    (band,) = figure.axes[0].collections
    corners = {(float(x), round(float(y), 6)) for x, y in band.get_paths()[0].vertices}
    assert corners == {(0, 0.3), (0, 0.7), (1, 0.7), (1, 1.0)}


def test_rounds_that_were_not_evaluated_are_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", rounds=4)
    odd = {"global": None, "personal": None}
    rewrite(folder / "metrics.jsonl", lambda x: x | odd if x["round"] % 2 else x)
    run = load_run(folder)
    assert curves(figure_accuracy(run))["Global"][0] == [0, 2, 4]
    assert curves(figure_loss(run))["Training"][0] == [1, 2, 3, 4]
    assert run.last("global") == run.rounds[4]["global"]


def test_loss_figure_holds_the_losses_and_skips_what_is_not_finite(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", rounds=3)
    broken = {"train": {"loss": float("nan")}}
    rewrite(
        folder / "metrics.jsonl",
        lambda x: x | broken if (x["kind"], x["round"]) == ("round", 2) else x,
    )
    run = load_run(folder)
    drawn = curves(figure_loss(run))
    kept = [run.rounds[r]["train"]["loss"] for r in (1, 3)]
    assert drawn["Training"] == ([1, 3], kept)
    assert drawn["Global test"][1] == [line["global"]["loss"] for line in run.rounds]
    alone = [line["train"]["loss"] for line in run.local_only[1:]]
    assert drawn["Local-only training"] == ([1, 2, 3], alone)


def test_client_figure_shows_each_client_and_marks_the_untested(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run", clients=4, untested=(2,)))
    figure = figure_clients(run)
    assert run.partition is not None
    last = run.rounds[-1]["personal"]
    assert last["clients"] == [0, 1, 3]
    assert bars(figure, 0) == last["accuracy"]
    assert bars(figure, 1) == dense(run.partition["test_counts"], 4).sum(axis=1).tolist()
    drawn = curves(figure)
    assert drawn["Not tested"][0] == [2]
    assert drawn["Zero-shot"][0] == [0, 1, 3]
    mean = f"Mean {100 * last['mean']:.1f} ± {100 * last['std']:.1f} %"
    assert set(drawn[mean][1]) == {last["mean"]}


def test_many_clients_are_drawn_as_a_distribution(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run", clients=MANY + 100, untested=(7,)))
    figure = figure_clients(run)
    assert run.partition is not None
    last = accuracy_of(run.rounds[-1]["personal"])
    assert 7 not in last
    assert bars(figure, 0) == np.histogram(list(last.values()), np.linspace(0, 1, 21))[0].tolist()
    assert sum(bars(figure, 1)) == MANY + 100
    drawn = figure_partition(run.partition)
    train_KC = dense(run.partition["train_counts"], 4)
    assert sum(bars(drawn, 0)) == sum(bars(drawn, 1)) == MANY + 100
    widths = [patch.get_width() for patch in drawn.axes[2].patches]
    assert widths == (train_KC > 0).sum(axis=0).tolist()
    names = [tick.get_text() for tick in drawn.axes[2].get_yticklabels()]
    assert names == run.partition["class_names"]


def test_a_round_that_tests_everyone_is_no_point_of_the_participants_curve(
    tmp_path: Path,
) -> None:
    folder = write_run(tmp_path / "run", rounds=3)
    config = OmegaConf.load(folder / "config.yaml")
    config.evaluation = {"clients": "participants"}
    OmegaConf.save(config, folder / "config.yaml")
    rewrite(folder / "metrics.jsonl", lambda x: x if x["round"] else x | {"personal": None})
    run = load_run(folder)
    drawn = curves(figure_accuracy(run))
    means = [(line["personal"] or {}).get("mean") for line in run.rounds]
    assert drawn["Personalised, participants"] == ([1, 2], means[1:3])
    assert drawn["Personalised, all"] == ([3], means[3:])
    assert drawn["Local-only, all"][0] == [3]
    assert drawn["Global"][0] == [0, 1, 2, 3]
    assert "Personalised" not in drawn


def test_partition_figure_holds_every_count() -> None:
    counts = [[5, 0, 1], [0, 40, 0]]
    rows = sparse(np.array(counts))
    figure = figure_partition({"class_names": ["a", "b", "c"], "train_counts": rows})
    top, heat = figure.axes[:2]
    assert np.ma.filled(heat.images[0].get_array(), 0).tolist() == np.transpose(counts).tolist()
    assert [text.get_text() for text in heat.texts] == ["5", "1", "40"]
    assert [tick.get_text() for tick in heat.get_yticklabels()] == ["a", "b", "c"]
    assert [patch.get_height() for patch in top.patches] == [6, 40]


def test_partition_totals_are_stacked_by_domain_only_when_the_counts_agree() -> None:
    description = {
        "class_names": ["a", "b"],
        "domain_names": ["city", "coast"],
        "train_counts": [[0, 3, 1, 1], [1, 6]],
        "test_counts": [[0, 1], [1, 2]],
    }
    stacked = figure_partition(description | {"domain_counts": [[0, 5], [0, 2, 1, 6]]})
    assert bars(stacked, 0) == [5, 2, 0, 6]
    assert stacked.axes[0].get_ylabel() == "Train + test"
    plain = figure_partition(description | {"domain_counts": [[0, 9], [0, 2, 1, 4]]})
    assert bars(plain, 0) == [4, 6]


@pytest.mark.parametrize(
    ("clients", "classes", "named"), [(10, 20, 20), (100, 45, 45), (10, 345, 44)]
)
def test_partition_names_as_many_classes_as_fit_a_line_each(
    clients: int, classes: int, named: int
) -> None:
    names = [f"class {c}" for c in range(classes)]
    counts = sparse(np.ones((clients, classes), dtype=np.int64))
    figure = figure_partition({"class_names": names, "train_counts": counts})
    figure.draw_without_rendering()
    labels = figure.axes[1].get_yticklabels()
    assert len(labels) == named
    spans = sorted((box.y0, box.y1) for box in (label.get_window_extent() for label in labels))
    overlap = [low[1] - high[0] for low, high in pairwise(spans)]
    assert max(overlap) <= 1.0, "pixels by which neighbouring names overlap"


def test_class_names_are_drawn_literally(tmp_path: Path) -> None:
    names = ["$\\frac{$", "a_b^c", "<script>", "x" * 60]
    path = tmp_path / "new folder" / "partition.png"
    plot_partition({"class_names": names, "train_counts": [[0, 1, 1, 2, 2, 3, 3, 4]]}, path)
    with Image.open(path) as image:
        assert image.width == 840


def test_draw_all_writes_four_figures_at_150_dpi(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    paths = draw_all(folder)
    names = ["accuracy_per_round", "client_accuracy", "loss_per_round", "partition"]
    assert paths == [folder / "plots" / f"{name}.png" for name in names]
    for path in paths:
        with Image.open(path) as image:
            assert image.width == 840
            assert image.info["dpi"] == pytest.approx((150, 150), abs=0.1)
            assert "Software" not in image.info
    first = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in draw_all(folder)] == first


def test_a_run_of_zero_rounds_and_a_bare_run_are_drawn(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "zero", rounds=0))
    assert curves(figure_accuracy(run))["Global"] == ([0], [0.41])
    bare = write_run(tmp_path / "bare", finished=False)
    rewrite(bare / "metrics.jsonl", lambda x: {"kind": x["kind"], "round": x["round"]})
    (bare / "partition.json").unlink()
    (bare / "timings.jsonl").unlink()
    (bare / "plots").mkdir()
    (bare / "plots" / "partition.png").write_bytes(b"of an earlier run")
    assert draw_all(bare) == []
    assert list((bare / "plots").iterdir()) == []


def test_a_method_without_a_global_model_has_no_global_curve(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    rewrite(folder / "metrics.jsonl", lambda x: x | {"global": None})
    drawn = curves(figure_accuracy(load_run(folder)))
    assert "Global" not in drawn
    assert "Zero-shot" not in drawn
    assert {"Personalised", "Zero-shot, own"} <= set(drawn)


def test_labels_keep_their_order_and_their_distance() -> None:
    assert spread_labels([0.2, 0.8], gap=0.1) == [0.2, 0.8]
    assert spread_labels([0.5, 0.5, 0.1], gap=0.1) == pytest.approx([0.5, 0.6, 0.1])
    assert spread_labels([1.0, 0.99, 0.98], gap=0.1) == pytest.approx([1.0, 0.9, 0.8])
    assert spread_labels([], gap=0.1) == []


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    folder = write_run(tmp_path / "run")
    (folder / name).unlink()
    with pytest.raises(UserError, match=rf"{name} is missing"):
        load_run(folder)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere is not a run folder"):
        load_run(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "metrics.jsonl",
            '{"kind": "round", "round": 0}\n{"kind": "ro\n',
            r"line 2, column \d+ is",
        ),
        ("metrics.jsonl", '{"kind": "round", "round": 0}\n\n', "line 2, column 1 is damaged"),
        ("metrics.jsonl", "[1]\n", "line 1 is damaged: a list, not a JSON object"),
        ("metrics.jsonl", '{"kind": "round"}\n', "line 1 is damaged: it needs a 'kind'"),
        ("metrics.jsonl", '{"kind": "round", "round": 0, "global": 3}\n', "line 1 is .*'global'"),
        (
            "metrics.jsonl",
            '{"kind": "round", "round": 0, "personal": {"accuracy": [0.5, "x"]}}\n',
            "line 1, personal is damaged: 'accuracy' is 'x', not a number",
        ),
        (
            "metrics.jsonl",
            '{"kind": "round", "round": 0, "personal": {"clients": [1], "accuracy": [0, 1]}}\n',
            "line 1 is damaged: 'personal' needs as many 'clients' as 'accuracy'",
        ),
        (
            "summary.json",
            '{"personal": {"clients": [1.5], "accuracy": [1]}}',
            "'personal' needs as many 'clients'",
        ),
        ("metrics.jsonl", "", "holds no round yet"),
        ("timings.jsonl", '{"round": 0, "train_s": 1}\noops\n', "line 2, column 1 is damaged"),
        ("timings.jsonl", '{"train_s": "long"}\n', "line 1 is damaged: 'train_s' is 'long'"),
        ("partition.json", "{\n  oops\n}", "line 2, column 3 is damaged"),
        ("partition.json", '{"class_names": ["a"], "train_counts": [[1, 2]]}', "'class_names'"),
        ("partition.json", '{"class_names": ["a"], "train_counts": [[-1, 2]]}', "'class_names'"),
        ("partition.json", '{"class_names": ["a"], "train_counts": 3}', "'class_names'"),
        (
            "partition.json",
            '{"class_names": ["a"], "train_counts": [[0, 2]], "test_counts": []}',
            "'class_names'",
        ),
        ("partition.json", '{"class_names": ["a"], "train_counts": [[1], []]}', "'class_names'"),
        ("summary.json", '{"global": {', r"line 1, column \d+ is damaged"),
        ("summary.json", '{"local_only": {"personal": {"mean": "x"}}}', "local_only, personal is"),
        ("summary.json", '{"zero_shot": 1}', "'zero_shot' must be an object"),
        ("config.yaml", "a: [1\n", "damaged"),
        ("config.yaml", "- a\n", "must hold 'key: value' lines"),
    ],
)
def test_a_damaged_file_is_refused_by_name(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    folder = write_run(tmp_path / "run")
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_run(folder)
    assert str(folder / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_last_line_that_is_still_being_written_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", rounds=2)
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text + '{"kind": "local_only", "rou')
    assert len(load_run(folder).local_only) == 3


def test_text_that_is_not_utf8_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "metrics.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged: it is not UTF-8"):
        load_run(folder)
