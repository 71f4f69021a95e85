"""MLflow: one MLflow run per run, in the experiment of the same name.

The store is the one that `MLFLOW_TRACKING_URI` names, else the SQLite file `mlflow.db` beside the
run folder (`mlflow ui --backend-store-uri sqlite:///runs/mlflow.db`).
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

from filelock import FileLock

from fedprompt.config.schema import Config
from fedprompt.experiment.trackers.base import Point, SteppedLogger, parameters
from fedprompt.experiment.trackers.state import read_state, write_state

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

T = TypeVar("T")

AT_ONCE = 100
"""Parameters or metrics that a server takes in one request."""
LONGEST = 500
"""Characters of a parameter that every MLflow keeps."""


class MLflow(SteppedLogger):
    """Metrics per round, the config as parameters, the summary as metrics at the last round."""

    name: ClassVar[str] = "mlflow"
    needs: ClassVar[tuple[str, ...]] = ("mlflow",)

    def __init__(self, folder: Path, config: Config) -> None:
        self._config, self._finished = config, False
        # Runs that start at once would make the tables and the experiment twice.
        with FileLock(folder.parent / ".mlflow.lock"):
            self._client = _client(folder)
            self._run, begun = self._open(folder)
        self._seen = self._held() if begun else {}

    def _open(self, folder: Path) -> tuple[str, bool]:
        """The MLflow run's id, and whether an earlier start had begun it."""
        from mlflow.exceptions import MlflowException

        known = read_state(folder, self.name).get("run")
        if known is not None:
            try:
                self._client.update_run(known, status="RUNNING")
                return known, True
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        found = self._client.get_experiment_by_name(self._config.experiment)
        experiment = found.experiment_id if found else self._new_experiment(folder)
        run: str = self._client.create_run(experiment, run_name=folder.name).info.run_id
        self._log_parameters(run)
        write_state(folder, self.name, {"run": run})
        return run, False

    def _new_experiment(self, folder: Path) -> str:
        # Without a server MLflow would put artifacts below the current folder.
        local = "MLFLOW_TRACKING_URI" not in os.environ
        place = (folder.parent / "mlartifacts").resolve().as_uri() if local else None
        made: str = self._client.create_experiment(self._config.experiment, place)
        return made

    def _log_parameters(self, run: str) -> None:
        from mlflow.entities import Param

        values = [Param(k, str(v)[:LONGEST]) for k, v in parameters(self._config).items()]
        for some in _chunks(values):
            self._client.log_batch(run, params=some)

    def _held(self) -> dict[str, set[int]]:
        names = self._client.get_run(self._run).data.metrics
        return {
            name: {m.step for m in self._client.get_metric_history(self._run, name)}
            for name in names
        }

    def write(self, metrics: Mapping[str, float], server_round: int) -> None:
        """One point per metric."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        points = [Metric(name, value, now, server_round) for name, value in metrics.items()]
        for some in _chunks(points):
            self._client.log_batch(self._run, metrics=some)

    def add(self, point: Point) -> None:
        """As the base class; MLflow allows few characters in a name."""
        allowed = {_allowed(name): value for name, value in point.metrics.items()}
        super().add(replace(point, metrics=allowed))

    def finish(self, summary: Mapping[str, float]) -> None:
        """The summary as metrics at the last round; the run is FINISHED."""
        final = {f"final/{name}": value for name, value in summary.items()}
        rounds = self._config.federation.rounds
        self.add(Point(rounds, rounds, final))
        self._client.set_terminated(self._run, "FINISHED")
        self._finished = True

    def close(self) -> None:
        """An unfinished run is KILLED until it is resumed."""
        if not self._finished:
            self._client.set_terminated(self._run, "KILLED")


def _client(folder: Path) -> MlflowClient:
    from mlflow.tracking import MlflowClient

    # It sets its levels when it is imported, and would tell of every table it makes.
    if "MLFLOW_LOGGING_LEVEL" not in os.environ:
        for chatty in ("mlflow", "alembic"):
            logging.getLogger(chatty).setLevel(logging.WARNING)
    local = f"sqlite:///{(folder.parent / 'mlflow.db').resolve()}"
    return MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or local)


def _allowed(name: str) -> str:
    return re.sub(r"[^\w./ -]", "_", name, flags=re.ASCII)


def _chunks(items: list[T]) -> Iterator[list[T]]:
    for first in range(0, len(items), AT_ONCE):
        yield items[first : first + AT_ONCE]
