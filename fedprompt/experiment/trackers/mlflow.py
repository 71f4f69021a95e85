"""MLflow: one MLflow run for each of our runs, in the MLflow experiment of the same name.

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
"""Maximum number of parameters or metrics in one request to a server."""
GONE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "INVALID_STATE")
"""What stores answer about a run that was deleted, for good or into their trash."""
IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
"""A run must not wait for minutes where a server is away, which is MLflow's default."""
LONGEST = 500
"""Length that every version of MLflow accepts for a parameter's value, in characters."""


class MLflow(SteppedLogger):
    """Metrics per round, the config as parameters, the summary as metrics of the last round."""

    name: ClassVar[str] = "mlflow"
    needs: ClassVar[tuple[str, ...]] = ("mlflow",)

    def __init__(self, folder: Path, config: Config) -> None:
        self._config, self._finished = config, False
        # Without the lock, runs that start together would create the tables and the experiment
        # twice.
        with FileLock(folder.parent / ".mlflow.lock"):
            self._client = _client(folder)
            self._run, begun = self._open(folder)
        self._seen = self._held() if begun else {}

    def _open(self, folder: Path) -> tuple[str, bool]:
        """Return the id of the MLflow run, and whether an earlier start had already created it."""
        from mlflow.exceptions import MlflowException

        known = read_state(folder, self.name).get("run")
        if known is not None:
            try:
                self._client.update_run(known, status="RUNNING")
                return known, True
            except MlflowException as error:
                # The MLflow run was deleted by the user, or the store is another one: start a new
                # log.
                if error.error_code not in GONE:
                    raise
        found = self._client.get_experiment_by_name(self._config.experiment)
        experiment = found.experiment_id if found else self._new_experiment(folder)
        run: str = self._client.create_run(experiment, run_name=folder.name).info.run_id
        self._log_parameters(run)
        # Stored last: after an earlier crash, the next start creates a complete log instead.
        write_state(folder, self.name, {"run": run})
        return run, False

    def _new_experiment(self, folder: Path) -> str:
        # Without a server, MLflow would store artifacts below the working directory.
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
        """Return which rounds of which metric the MLflow run already contains."""
        names = self._client.get_run(self._run).data.metrics
        return {
            name: {m.step for m in self._client.get_metric_history(self._run, name)}
            for name in names
        }

    def write(self, metrics: Mapping[str, float], server_round: int) -> None:
        """Write one point per metric."""
        from mlflow.entities import Metric

        # MLflow expects milliseconds.
        now = int(1000 * time.time())
        points = [Metric(name, value, now, server_round) for name, value in metrics.items()]
        for some in _chunks(points):
            self._client.log_batch(self._run, metrics=some)

    def add(self, point: Point) -> None:
        """Write what the log lacks of the point, under names that MLflow accepts."""
        allowed = {_allowed(name): value for name, value in point.metrics.items()}
        # Renamed before the comparison, because the store returns the renamed metrics.
        super().add(replace(point, metrics=allowed))

    def finish(self, summary: Mapping[str, float]) -> None:
        """Write the summary as metrics of the last round and mark the run as FINISHED."""
        final = {f"final/{name}": value for name, value in summary.items()}
        rounds = self._config.federation.rounds
        self.add(Point(rounds, rounds, final))
        self._client.set_terminated(self._run, "FINISHED")
        self._finished = True

    def close(self) -> None:
        """Mark an unfinished run as KILLED until it is resumed."""
        if not self._finished:
            self._client.set_terminated(self._run, "KILLED")


def _client(folder: Path) -> MlflowClient:
    from mlflow.tracking import MlflowClient

    # MLflow sets its logging levels when it is imported, and would log every table it creates.
    if "MLFLOW_LOGGING_LEVEL" not in os.environ:
        for chatty in ("mlflow", "alembic"):
            logging.getLogger(chatty).setLevel(logging.WARNING)
    for variable, value in IMPATIENT.items():
        os.environ.setdefault(variable, value)
    local = f"sqlite:///{(folder.parent / 'mlflow.db').resolve()}"
    return MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or local)


def _allowed(name: str) -> str:
    return re.sub(r"[^\w./ -]", "_", name, flags=re.ASCII)


def _chunks(items: list[T]) -> Iterator[list[T]]:
    for first in range(0, len(items), AT_ONCE):
        yield items[first : first + AT_ONCE]
