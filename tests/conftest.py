"""Small, offline, thread-frugal fixtures shared by all tests."""

from __future__ import annotations

import gc
import logging
import os

# What is imported and collected stays, so that a search for garbage among it is in vain. It takes a
# fifth of the time until the first test runs. `pytest_collection` switches it on again.
gc.disable()

# Before torch, Flower and Ray are imported: two cores are shared by everything on the machine.
for name, value in {
    "OMP_NUM_THREADS": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
}.items():
    os.environ.setdefault(name, value)

from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.schema import Config
from fedprompt.data import catalogue
from fedprompt.data.features.table import FeatureTable
from fedprompt.data.partition import make_partition
from fedprompt.data.sources import catalogue as source
from fedprompt.rng import generator
from fedprompt.workspace import Workspace
from tests.support.builders import fake_dataset, random_clip, small_config
from tests.support.published_copies import FEWER
from tests.support.simulated_device import register, why_unavailable

torch.set_num_threads(1)
if why_unavailable() is None:
    # Here, because it is too late once a test has run a backward pass.
    register()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Leave everything that has been imported and collected out of later searches for garbage."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session")
def clip() -> FrozenCLIP:
    return random_clip()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache; one cache serves the whole test run."""
    own = tmp_path_factory.getbasetemp()
    # Processes of pytest-xdist have folders of their own inside one folder of the test run.
    common = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    monkeypatch.setenv("FEDPROMPT_CACHE", str(common / "fedprompt-cache"))
    monkeypatch.setenv("FEDPROMPT_STATE", str(own / "fedprompt-state"))


@pytest.fixture(scope="session", autouse=True)
def _no_wait_for_the_disk() -> Iterator[None]:
    """Files need not survive a loss of power in the middle of a test; a kill takes none of them.

    Processes that a test starts do wait for it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(autouse=True)
def _own_log_handlers() -> Iterator[None]:
    """Programs set up logging once per process; here many of them share one."""
    logger = logging.getLogger("fedprompt")
    before = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture(scope="session")
def make_workspace(clip: FrozenCLIP) -> Callable[..., Workspace]:
    """Workspaces on the random CLIP and invented features with class structure."""
    dataset = fake_dataset()
    draw = generator(0, "fake features")
    centres_CD = draw.standard_normal((6, clip.embed_dim))
    noise_ND = draw.standard_normal((len(dataset), clip.embed_dim))
    features_ND = (centres_CD[dataset.labels_N] + noise_ND).astype(np.float32)

    def make(**sections: Any) -> Workspace:
        config = small_config(**sections)
        partition = make_partition(
            dataset,
            config.partition,
            config.seed,
            without_labels=config.trains_without_labels,
        )
        return Workspace(config, clip, dataset, partition, [FeatureTable(features_ND)])

    return make


@pytest.fixture
def run_config(tmp_path: Path) -> Callable[..., Config]:
    """Configs whose run folder lies in the test's own folder."""

    def make(**sections: Any) -> Config:
        config = small_config(**sections)
        return replace(config, output=replace(config.output, dir=str(tmp_path / "run")))

    return make


@pytest.fixture
def few_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Miniature copies of the largest published sets have a few of their classes."""

    def fewer(name: str) -> catalogue.Entry:
        found = catalogue.entry(name)
        return replace(found, num_classes=FEWER.get(name, found.num_classes))

    monkeypatch.setattr(source, "entry", fewer)
