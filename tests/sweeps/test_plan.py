"""Which runs a sweep file stands for."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from fedprompt.config.schema import to_yaml
from fedprompt.config.shipped import configs_dir
from fedprompt.errors import UserError
from fedprompt.experiment.compose import compose
from fedprompt.sweeps import plan as plan_module
from fedprompt.sweeps.plan import (
    expand,
    load_sweep,
    settings_hash,
    sweep_path,
    without_places,
)
from tests.support.sweeps import SHIPPED, TINY, plan, write


class TestPlan:
    """What a file means."""

    def test_rows_times_grid_times_seeds_in_order(self, tmp_path: Path) -> None:
        runs = plan(tmp_path, grid={"training.lr": [0.02, 0.1], "partition.clients": [2, 3]})
        assert len(runs) == 16
        assert [(r.row, dict(r.values), r.seed) for r in runs[:3]] == [
            ("PromptFL", {"training.lr": 0.02, "partition.clients": 2}, 1),
            ("PromptFL", {"training.lr": 0.02, "partition.clients": 2}, 2),
            ("PromptFL", {"training.lr": 0.02, "partition.clients": 3}, 1),
        ]
        config = runs[-1].config
        assert (config.method.name, config.training.lr, config.partition.clients) == (
            "fedrsclip", 0.1, 3,
        )  # fmt: skip
        assert config.seed == 2

    def test_a_protocol_that_compares_the_runs(self, tmp_path: Path) -> None:
        name = "leave_one_domain_out"
        with pytest.raises(UserError, match=rf"table.yaml: 'protocol' is 'ood'.*{name}"):
            plan(tmp_path, protocol="ood")
        with pytest.raises(UserError, match=f"PromptFL.*{name}.*among the run's protocols"):
            plan(tmp_path, protocol=name)
        protocols = [*TINY, f"protocols=[global,{name}]", "data.domains=[savanna,delta]"]
        assert plan(tmp_path, protocol=name, common=protocols)

    def test_a_config_is_that_of_the_single_run(self, tmp_path: Path) -> None:
        run = plan(tmp_path)[3]
        folder = f"output.dir='{run.folder}'"
        single = [*TINY, "method=promptfl", "training.lr=0.1", "seed=2", folder]
        assert run.config == compose("benchmark", single)

    def test_names_are_readable_and_hold_every_setting(self, tmp_path: Path) -> None:
        runs = plan(tmp_path)
        assert [r.name.rpartition("-")[0] for r in runs[-2:]] == [
            "fedrsclip-x-lr0.1-seed1", "fedrsclip-x-lr0.1-seed2",
        ]  # fmt: skip
        # A setting that no name shows: still another folder.
        other = plan(tmp_path, "evaluation.every=3")
        assert len({r.folder for r in (*runs, *other)}) == 16
        assert [r.name for r in plan(tmp_path)] == [r.name for r in runs]

    def test_places_do_not_enter_the_hash(self, tmp_path: Path) -> None:
        config = plan(tmp_path)[0].config
        moved = replace(config.output, dir="elsewhere", root="other", cache="cache")
        assert settings_hash(replace(config, output=moved)) == settings_hash(config)
        assert settings_hash(replace(config, seed=7)) != settings_hash(config)

    def test_a_cell_is_composed_and_written_once_for_all_seeds(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = Counter[str]()
        for name in ("compose", "to_yaml"):
            function = getattr(plan_module, name)

            def counted(*args: Any, name: str = name, function: Any = function) -> Any:
                calls[name] += 1
                return function(*args)

            monkeypatch.setattr(plan_module, name, counted)
        runs = plan(tmp_path, seeds=[1, 2, 30])
        cells = len(runs) // 3
        assert calls == {"compose": cells, "to_yaml": cells}
        monkeypatch.undo()
        for run in runs:
            assert run.name.endswith(f"-seed{run.seed}-{settings_hash(run.config)}")
            text = to_yaml(without_places(run.config))
            assert settings_hash(run.config) == sha256(text.encode()).hexdigest()[:10]

    def test_threads_are_fixed(self, tmp_path: Path) -> None:
        free = "simulation.threads=0"
        assert plan(tmp_path, free, resources={"cpus": 2.5})[0].config.simulation.threads == 2
        assert plan(tmp_path, free)[0].config.simulation.threads == 1
        assert plan(tmp_path, "simulation.threads=3")[0].config.simulation.threads == 3

    def test_grid_takes_names_lists_and_null(self, tmp_path: Path) -> None:
        grid = {"method": ["promptfl", "kgcoop"], "partition.shots": [None, 4]}
        runs = plan(tmp_path, rows=None, grid=grid, seeds=[1])
        assert [(r.config.method.name, r.config.partition.shots) for r in runs] == [
            ("promptfl", None), ("promptfl", 4), ("kgcoop", None), ("kgcoop", 4),
        ]  # fmt: skip
        assert runs[0].name.startswith("promptfl-methodpromptfl-shotsnull-seed1-")

    def test_quick_adds_to_common_and_replaces_the_rest(self, tmp_path: Path) -> None:
        quick = {"seeds": [5], "common": ["federation.rounds=0"], "rows": ["PromptFL"], "grid": {}}
        (run,) = expand(load_sweep(write(tmp_path, quick=quick), quick=True), tmp_path)
        assert (run.row, run.seed, run.config.federation.rounds) == ("PromptFL", 5, 0)
        assert run.config.partition.clients == 3
        assert load_sweep(tmp_path / "table.yaml", quick=True).name == "table-quick"

    def test_a_name_of_its_own(self, tmp_path: Path) -> None:
        path = write(tmp_path, name="mine", quick={"seeds": [5]})
        assert load_sweep(path).name == "mine"
        assert load_sweep(path, quick=True).name == "mine-quick"

    def test_an_experiment_may_lie_beside_the_file(self, tmp_path: Path) -> None:
        (tmp_path / "mine.yaml").write_text("extends: benchmark\nseed: 1\n")
        runs = plan(tmp_path, experiment="mine.yaml")
        assert runs[0].config.experiment == "mine"

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"row": {}}, "unknown key 'row'. Did you mean 'rows'"),
            ({"name": "../elsewhere"}, "'name' must be the name of a folder"),
            ({"name": ""}, "'name' must be the name of a folder"),
            ({"experiment": None}, "must name its 'experiment'"),
            ({"seeds": [1, 1]}, "different whole numbers"),
            ({"seeds": "1"}, "different whole numbers"),
            ({"common": "a=1"}, "must be a list of overrides"),
            ({"rows": ["method=promptfl"]}, "'rows' must hold"),
            ({"grid": {"training.lr": 0.1}}, "'grid' must hold"),
            ({"grid": {"seed": [1, 2]}}, "cannot hold seed"),
            ({"resources": {"cpus": 0}}, "resources.cpus is 0"),
            ({"resources": {"gpu": 1}}, "Did you mean 'gpus'"),
            ({"rows": {"a": ["methd=promptfl"]}}, "a, lr 0.02: config: unknown key 'methd'"),
            ({"rows": {"a": [], "b": []}}, "'b, lr 0.02' and 'a, lr 0.02' are the same runs"),
            ({"common": ["output.dir=x"]}, "output.dir is set"),
            ({"common": ["seed=4"]}, "seed is an override"),
            ({"quick": {"rows": ["none"]}}, "no row 'none'"),
        ],
    )
    def test_mistakes_are_one_line(
        self, tmp_path: Path, changes: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(UserError, match=message.replace("[", r"\[")) as caught:
            plan(tmp_path, **changes)
        assert "\n" not in str(caught.value)

    def test_missing_files_and_variants(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="Did you mean 'few_shot'"):
            sweep_path("few_shots")
        with pytest.raises(UserError, match="cannot read"):
            load_sweep(tmp_path / "none.yaml")
        with pytest.raises(UserError, match="has no 'quick' variant"):
            load_sweep(write(tmp_path), quick=True)

    @pytest.mark.parametrize("name", SHIPPED)
    def test_shipped_files_say_what_they_are_and_have_a_quick_variant(self, name: str) -> None:
        path = configs_dir() / "sweep" / f"{name}.yaml"
        comment = [x for x in path.read_text().splitlines() if x.startswith("#")]
        assert any(f"fedprompt sweep {name}" in line for line in comment)
        (told,) = (line for line in comment if line.startswith("# Time:"))
        photographs = path.stem in ("fedrsclip_main", "office_home_domains", "paper_settings")
        real = path.stem.startswith("fed_") or photographs  # needs other data
        assert re.search(r"\bmin", told) or real
        assert ("not measured" in told) == real
        runs = expand(load_sweep(path, quick=True), Path("out"))
        assert all(r.config.backbone.model == "tiny" for r in runs)
        assert all(r.config.federation.rounds <= 2 for r in runs)
