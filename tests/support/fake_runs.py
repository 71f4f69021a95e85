"""Run folders with made-up numbers, as runs and sweeps leave them; nothing is trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from omegaconf import OmegaConf

from fedprompt.data.partition import sparse
from fedprompt.rng import generator


def personal(accuracy: dict[int, float]) -> dict[str, Any]:
    """The `personal` entry of a metrics line for these clients."""
    tested = np.array(list(accuracy.values()))
    return {
        "mean": float(tested.mean()),
        "std": float(tested.std(ddof=1)) if len(tested) > 1 else None,
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
                "train": {"loss": 2.1 - 1.6 * progress, "loss-ce": 1.9 - 1.5 * progress}
                if r
                else None,
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
                "train": dict.fromkeys(("loss", "loss-ce"), 2.1 - 1.7 * progress) if r else None,
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


def rewrite(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Replace every JSON line of a file with `change(line)`."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(change(line)) + "\n" for line in lines))


def edit_summary(folder: Path, **changes: Any) -> None:
    """Replace entries of a run's summary."""
    path = folder / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write_sweep(
    folder: Path, alphas: tuple[float, ...] = (0.1, 1.0), clients: tuple[int, ...] = (3, 5)
) -> list[Path]:
    """Runs of every alpha, number of clients and of two seeds, all with different numbers."""
    runs = []
    for a, alpha in enumerate(alphas):
        for number in clients:
            for seed in (1, 2):
                run = write_run(folder / f"a{alpha}-k{number}-s{seed}", clients=number)
                change_config(run, seed=seed, partition={"alpha": alpha, "clients": number})
                scale_accuracies(run, 1 - 0.1 * a - 0.01 * seed - 0.001 * number)
                runs.append(run)
    return runs


def change_config(run: Path, **changes: Any) -> None:
    """Replace sections of a run's config."""
    path = run / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))


def scale_accuracies(run: Path, factor: float) -> None:
    """Scale the accuracies of all rounds, in metrics.jsonl and in summary.json."""
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if line["kind"] == "round":
            line["global"]["accuracy"] *= factor
            line["personal"]["mean"] *= factor
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    last = [line for line in lines if line["kind"] == "round"][-1]
    summary = json.loads((run / "summary.json").read_text())
    summary |= {"global": last["global"], "personal": last["personal"], "wall_s": 100 * factor}
    (run / "summary.json").write_text(json.dumps(summary))
