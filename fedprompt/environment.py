"""Environment variables that must be set before torch, Flower and Ray are imported."""

from __future__ import annotations

import os

DEFAULTS = {
    # Idle threads sleep instead of spinning: on a busy machine that costs several times the work.
    "OMP_WAIT_POLICY": "PASSIVE",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def set_defaults() -> None:
    """Set them where the user has not decided: no spinning threads, telemetry or update check."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
