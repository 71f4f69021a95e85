"""Leave one domain out against a slow computation from the pixels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from fedprompt.cli.compare import print_sweep
from fedprompt.errors import UserError
from fedprompt.evaluation.protocols.leave_one_domain_out import LeaveOneDomainOut
from fedprompt.evaluation.registry import compare_runs
from fedprompt.experiment.workspaces import open_workspace
from fedprompt.reports.figure import Figure
from fedprompt.reports.run_data import load_run
from tests.support.protocol_runs import (
    config_of,
    logits,
    models_of,
    summary_of,
)


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
    console = Console(record=True, width=100)
    print_sweep(folders[0], console, "leave_one_domain_out")
    assert table.rows[1][2] in console.export_text()
    with pytest.raises(UserError, match="holds no results of protocol 'few_shot'"):
        compare_runs("few_shot", [load_run(folders[0])])


def test_methods_and_variants_of_one_have_rows_of_their_own() -> None:
    def part(method: str, settings: str, domain: str, accuracy: float) -> dict[str, Any]:
        rows = [{"model": "zero-shot", "unseen": 0.5}, {"model": "global", "unseen": accuracy}]
        return {"method": method, "settings": settings, "unseen_domain": domain, "rows": rows}

    runs = [
        ("short", part("promptfl", "s1", "sea", 0.6)),
        ("short", part("promptfl", "s1", "sky", 0.7)),
        ("long", part("promptfl", "s2", "sea", 0.8)),
        ("other", part("trip", "s3", "sky", 0.9)),
        ("other", part("trip", "s3", "sky", 0.7)),
    ]
    table, _ = LeaveOneDomainOut.compare(runs)
    assert table.rows == (
        ("zero-shot", "50.0 %", "50.0 %", "50.0 %"),
        ("short: global", "60.0 %", "70.0 %", "65.0 %"),
        ("long: global", "80.0 %", "-", "-"),
        ("trip: global", "-", "80.0 %", "-"),
    )
