"""The Ray grid's own decisions, on a stand-in for Ray that runs every call at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from flwr.app import MessageType
from ray import cloudpickle

from fedprompt.config.schema import Config
from fedprompt.data.features.table import FeatureTable
from fedprompt.data.partition import make_partition
from fedprompt.errors import DeviceFault, UserError
from fedprompt.experiment.workspaces import open_workspace
from fedprompt.federation.client_app import handle
from fedprompt.federation.server_app import Federation
from fedprompt.methods.base import uploaded_numbers
from fedprompt.runtime import OPTIONAL_LIBRARIES
from fedprompt.simulation import ray_grid, ray_pool
from fedprompt.simulation.block_grid import Opener
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.simulation.ray_grid import RayGrid
from fedprompt.simulation.ray_worker import Place, Worker, pack, unpack
from fedprompt.workspace import Workspace
from tests.support.builders import fake_dataset, small_config
from tests.support.grids import assert_same, federate

MakeWorkspace = Callable[..., Workspace]


@dataclass(eq=False)
class Ref:
    """A finished call: its value, or the error that it raised."""

    value: Any = None
    error: Exception | None = None


class FakeRay:
    """Actors as local objects; arguments and results are pickled as Ray would."""

    exceptions = ray.exceptions

    def __init__(self, trouble: Callable[[str, int], Exception | None]) -> None:
        self.trouble = trouble
        self.sent: list[int] = []
        self.started = 0

    def is_initialized(self) -> bool:
        return True

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 8.0}}]

    def remote(self, worker: type) -> Any:
        fake = self

        class Actor:
            def __init__(self, *args: Any) -> None:
                self.number = fake.started
                fake.started += 1
                self.worker = worker(*args)

            def __getattr__(self, name: str) -> Any:
                def call(*args: Any) -> Ref:
                    content = cloudpickle.dumps(args)
                    fake.sent.append(len(content))
                    if error := fake.trouble(name, self.number):
                        return Ref(error=error)
                    result = getattr(self.worker, name)(*cloudpickle.loads(content))
                    return Ref(cloudpickle.loads(cloudpickle.dumps(result)))

                return type("Method", (), {"remote": staticmethod(call)})

        return type(
            "Class",
            (),
            {"options": staticmethod(lambda **_: type("New", (), {"remote": Actor}))},
        )

    @staticmethod
    def wait(refs: list[Ref], **_: Any) -> tuple[list[Ref], list[Ref]]:
        return refs[:1], refs[1:]

    @staticmethod
    def get(ref: Ref) -> Any:
        if ref.error is not None:
            raise ref.error
        return ref.value

    @staticmethod
    def kill(actor: Any) -> None:
        del actor


@pytest.fixture
def on_fake_ray(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., tuple[RayGrid, FakeRay]]:
    def make(
        workspace: Workspace, trouble: Callable[[str, int], Exception | None] = lambda *_: None
    ) -> tuple[RayGrid, FakeRay]:
        class LocalWorker(Worker):
            def __init__(self, libraries: frozenset[str]) -> None:
                # This process has imported them already, and other tests may need them.
                super().__init__(OPTIONAL_LIBRARIES)

            def open(self, config: Config, opener: Opener) -> Place:
                del config, opener
                self._workspace = workspace
                return Place(1, "here", 1e9)

        fake = FakeRay(trouble)
        monkeypatch.setattr(ray_grid, "ray", fake)
        monkeypatch.setattr(ray_pool, "ray", fake)
        monkeypatch.setattr(ray_pool, "Worker", LocalWorker)
        return RayGrid(workspace, opener=open_workspace), fake

    return make


def task_error(text: str) -> Exception:
    return ray.exceptions.RayTaskError("run", text, ValueError(text))


def died() -> Exception:
    return ray.exceptions.RayActorError(error_msg="the actor is dead")


def test_equals_inline(make_workspace: MakeWorkspace, on_fake_ray: Any) -> None:
    workspace = make_workspace(simulation={"workers": 2, "clients_per_block": 2, "threads": 1})
    assert_same(federate(on_fake_ray(workspace)[0]), federate(InlineGrid(workspace)), rtol=0)


def test_neither_features_nor_weights_are_sent(clip: Any, on_fake_ray: Any) -> None:
    """All calls of a run, with 25 MB of features and 13 MB of weights."""
    dataset = fake_dataset(images=200_000)
    config = small_config(partition={"clients": 6, "scheme": "iid", "shots": 2})
    features = np.ones((len(dataset), clip.embed_dim), np.float32)
    assert features.nbytes > 25e6
    partition = make_partition(dataset, config.partition, 1)
    grid, fake = on_fake_ray(Workspace(config, clip, dataset, partition, [FeatureTable(features)]))
    federate(grid, 2)
    grid.use(grid.workspace)
    assert len(fake.sent) > 10
    assert max(fake.sent) < 100_000


def test_the_common_content_is_sent_once_per_block(
    make_workspace: MakeWorkspace, on_fake_ray: Any
) -> None:
    workspace = make_workspace(
        method={"name": "promptfl", "context_tokens": 64},
        simulation={"workers": 1, "clients_per_block": 4},
    )
    grid, fake = on_fake_ray(workspace)
    federation = Federation(workspace, grid)
    federation.join()
    content = uploaded_numbers(workspace.method) * 4
    fake.sent.clear()
    line = federation.train_round(1)
    assert line["bytes_down"] > 4 * content  # counted for every client
    assert content < sum(fake.sent) < 2 * content


def test_a_worker_that_never_starts_is_dropped_and_the_others_go_on(
    make_workspace: MakeWorkspace, on_fake_ray: Any
) -> None:
    """Worker 0 dies in its first block, and whatever replaces it does not open."""
    workspace = make_workspace(simulation={"workers": 2, "clients_per_block": 1, "threads": 1})

    def trouble(name: str, number: int) -> Exception | None:
        if (name == "run" and number == 0) or (name == "open" and number > 1):
            return died()
        return None

    grid, fake = on_fake_ray(workspace, trouble)
    assert_same(federate(grid), federate(InlineGrid(workspace)), rtol=0)
    assert [slot.number for slot in grid.pool.slots] == [1]
    assert fake.started == 2 + 1 + workspace.config.simulation.retries


def test_with_no_worker_left_one_line_says_so(
    make_workspace: MakeWorkspace, on_fake_ray: Any
) -> None:
    workspace = make_workspace(simulation={"workers": 2, "clients_per_block": 1, "retries": 50})

    def trouble(name: str, number: int) -> Exception | None:
        return died() if name == "run" or (name == "open" and number > 1) else None

    grid, _ = on_fake_ray(workspace, trouble)
    with pytest.raises(UserError, match=r"^grid: no Ray worker is left .* 1 free CPUs"):
        federate(grid)


def test_workers_that_do_not_open_end_the_start_with_the_reason(
    make_workspace: MakeWorkspace, on_fake_ray: Any
) -> None:
    def trouble(name: str, number: int) -> Exception | None:
        return task_error("UserError: no checkpoint file x") if name == "open" else None

    with pytest.raises(UserError, match=r"did not start: .*no checkpoint file x"):
        on_fake_ray(make_workspace(), trouble)


def test_an_error_in_a_worker_does_not_restart_it(
    make_workspace: MakeWorkspace, on_fake_ray: Any
) -> None:
    workspace = make_workspace(simulation={"workers": 1, "clients_per_block": 1})
    left = [2]

    def trouble(name: str, number: int) -> Exception | None:
        if name == "run" and left[0]:
            left[0] -= 1
            return task_error("out of luck")
        return None

    grid, fake = on_fake_ray(workspace, trouble)
    assert_same(federate(grid), federate(InlineGrid(workspace)), rtol=0)
    assert fake.started == 1


def test_a_worker_whose_device_has_failed_is_replaced(
    make_workspace: MakeWorkspace, on_fake_ray: Any
) -> None:
    workspace = make_workspace(simulation={"workers": 1, "clients_per_block": 2})

    def trouble(name: str, number: int) -> Exception | None:
        if name == "run" and number == 0:
            cause = DeviceFault("the device failed")
            return ray.exceptions.RayTaskError("run", "a long traceback", cause)
        return None

    grid, fake = on_fake_ray(workspace, trouble)
    assert_same(federate(grid), federate(InlineGrid(workspace)), rtol=0)
    assert fake.started == 2


_TRIED: list[int] = []


def two_at_most(workspace: Any, clients: Any, messages: Any, private: Any) -> Any:
    """A client side whose memory holds two training clients."""
    if messages[0].metadata.message_type == MessageType.TRAIN:
        _TRIED.append(len(clients))
        if len(clients) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
    return handle(workspace, clients, messages, private)


def test_a_size_that_fitted_in_a_worker_is_remembered(
    make_workspace: MakeWorkspace, on_fake_ray: Any
) -> None:
    workspace = make_workspace(simulation={"workers": 1, "clients_per_block": 4, "threads": 1})
    grid, _ = on_fake_ray(workspace)
    grid.answer = two_at_most
    _TRIED.clear()
    _, _, lines = federate(grid)
    assert [line["clients"]["accepted"] for line in lines] == [4, 4, 4]
    assert _TRIED == [4, 2, 2, 2, 2, 2, 2]


def test_clients_of_a_block_that_is_lost_too_often_are_named(
    make_workspace: MakeWorkspace, on_fake_ray: Any
) -> None:
    workspace = make_workspace(simulation={"workers": 1, "clients_per_block": 4, "retries": 1})
    training = [False]

    def trouble(name: str, number: int) -> Exception | None:
        return died() if name == "run" and training[0] else None

    grid, fake = on_fake_ray(workspace, trouble)
    federation = Federation(workspace, grid)
    federation.join()
    training[0] = True
    assert federation.train_round(1)["clients"]["rejected"] == 4
    assert set(federation.strategy.rejected.values()) == {"its worker died"}
    assert fake.started == 3


def test_packed_tensors_come_back_as_copies() -> None:
    tensors = {c: {"ctx": torch.full((2, 3), float(c)), "w": torch.tensor(c)} for c in (4, 1)}
    packed = pack(tensors)
    back = unpack(packed)
    assert list(back) == [4, 1]
    for client in back:
        assert all(torch.equal(back[client][n], tensors[client][n]) for n in ("ctx", "w"))
    packed[1]["ctx"][:] = -1
    assert back[4]["ctx"].min() == 4
    assert unpack(pack({})) == {}


def test_the_worker_module_loads_without_pytorch(tmp_path: Path) -> None:
    """What OpenMP reads when PyTorch is loaded is set after this module's import."""
    import subprocess
    import sys

    code = "import fedprompt.simulation.ray_worker, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0
    code = "import fedprompt.simulation.block_grid, sys; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0
