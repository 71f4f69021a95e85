"""Recorded local steps: every method computes what its plain steps do, or is not recorded."""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NoReturn

import pytest
import torch

from fedprompt.backbone import text_tower
from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.schema import TrainingConfig
from fedprompt.messages.parcels import to_parcels
from fedprompt.methods import promptsrc
from fedprompt.methods.base import ClientData, Method, Tensors, takes_steps
from fedprompt.methods.parts import step_graphs
from fedprompt.methods.parts.step_graphs import StepGraphs
from fedprompt.methods.promptsrc import imagenet_templates
from fedprompt.methods.registry import all_methods
from fedprompt.runtime.step_recorder import CudaRecorder, ReadFrom, step_recorder
from fedprompt.simulation.answer_block import run_block
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.training import train_clients
from tests.support import twins
from tests.support.device_lives import TASK, clients, clip_on, images
from tests.support.doc_pages import DOCS
from tests.support.grids import federate, queries
from tests.support.method_contract import Server, first_private
from tests.support.secure_rounds import MakeWorkspace
from tests.support.tape_recorder import TapeRecorder, watched


@pytest.fixture(scope="module")
def on_cpu() -> FrozenCLIP:
    return clip_on("cpu")


@pytest.fixture(autouse=True)
def _as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_tower, "prefers_bins", lambda device: True)
    monkeypatch.setattr(promptsrc, "imagenet_templates", lambda: imagenet_templates()[:2])


def two_rounds(
    method: Method,
    data: list[ClientData],
    graphs: StepGraphs | None = None,
    training: Mapping[str, Any] = MappingProxyType({}),
) -> Tensors:
    """What clients have after two rounds, between which everything but the shapes changes."""
    server, private, momentum = Server(method, data), first_private(method, data), None
    settings = {"lr": 0.01, "batch_size": 4, "schedule": "cosine", **training}
    found: Tensors = {}
    for server_round in (1, 2):
        received = server.send(server_round, data)
        with watched():
            results = train_clients(
                method, received, private, data, TrainingConfig(**settings),
                seed=1, server_round=server_round, rounds=10, momentum=momentum, graphs=graphs,
            )  # fmt: skip
        server.collect(server_round, results)
        private, momentum = [r.private for r in results], [r.momentum for r in results]
        found |= {
            f"{server_round}/{r.client}/{kind}.{n}": torch.as_tensor(t)
            for r in results
            for kind, values in (("shared", r.shared), ("private", r.private), ("loss", r.losses))
            for n, t in values.items()
        }
    return found


def assert_same_bits(ours: Tensors, theirs: Tensors) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert torch.equal(ours[name], expected), name


def recorded(method: Method) -> tuple[StepGraphs, TapeRecorder]:
    recorder = TapeRecorder()
    return StepGraphs(method, recorder), recorder


@pytest.mark.parametrize("name", list(all_methods()))
def test_recorded_steps_are_plain_steps_or_the_page_names_the_method(
    name: str, on_cpu: FrozenCLIP
) -> None:
    method = twins.build(on_cpu, name, TASK)
    if not method.trainable:
        pytest.skip("nothing to record")
    data = clients(on_cpu, method.needs | method.needs_to_train)
    graphs, recorder = recorded(method)
    assert_same_bits(two_rounds(method, data, graphs), two_rounds(method, data))
    line = re.search(
        r"^Methods whose steps are not recorded.*$", (DOCS / "gpu.md").read_text(), re.M
    )
    assert line
    is_named = f"`{name}`" in line[0]
    assert is_named == (graphs.refused is not None), f"correct docs/gpu.md: {graphs.refused}"
    if graphs.refused is None:
        # Two steps in each of two rounds, by methods that take steps.
        assert [tape.replays for tape in recorder.tapes] == [4] * takes_steps(method)


@pytest.mark.parametrize(
    "training",
    [
        {"momentum_state": "keep"},
        {"momentum": 0.0, "weight_decay": 0.1},
        {"optimizer": "adamw"},
        {"clip_grad_norm": 0.01},
    ],
    ids=lambda training: next(iter(training)),
)
def test_any_optimiser_takes_recorded_gradients(
    training: dict[str, Any], on_cpu: FrozenCLIP
) -> None:
    method = twins.build(on_cpu, "promptfl", TASK)
    data = clients(on_cpu, {"features"})
    graphs, _ = recorded(method)
    ours = two_rounds(method, data, graphs, training)
    assert_same_bits(ours, two_rounds(method, data, None, training))


def _of_sizes(on_cpu: FrozenCLIP, *sizes: int) -> list[ClientData]:
    return [
        ClientData(k, images(on_cpu, size), torch.arange(size) % 3) for k, size in enumerate(sizes)
    ]


def test_each_set_of_active_clients_and_each_batch_size_has_a_recording(on_cpu: FrozenCLIP) -> None:
    method = twins.build(on_cpu, "promptfl", TASK)
    graphs, recorder = recorded(method)
    three = _of_sizes(on_cpu, 12, 8, 4)
    ours = two_rounds(method, three, graphs)
    assert_same_bits(ours, two_rounds(method, three))
    assert [tape.replays for tape in recorder.tapes] == [2, 2, 2]
    # Other clients, and more images of them, are the same shapes; a smaller batch is not.
    two = _of_sizes(on_cpu, 9, 9)
    assert_same_bits(two_rounds(method, two, graphs), two_rounds(method, two))
    assert [tape.replays for tape in recorder.tapes] == [2, 8, 2]
    two_rounds(method, two, graphs, {"batch_size": 2})
    assert graphs.recorded == len(recorder.tapes) == 4


def test_recordings_are_bounded_and_dropped(
    on_cpu: FrozenCLIP, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(step_graphs, "MOST", 1)
    method = twins.build(on_cpu, "promptfl", TASK)
    graphs, recorder = recorded(method)
    three = _of_sizes(on_cpu, 12, 8, 4)
    with caplog.at_level(logging.WARNING, "fedprompt.training"):
        assert_same_bits(two_rounds(method, three, graphs), two_rounds(method, three))
    assert graphs.recorded == len(recorder.tapes) == len(caplog.records) == 1
    tape = weakref.ref(recorder.tapes.pop())
    assert tape() is not None
    graphs.clear()
    assert tape() is None


def test_a_method_that_is_not_recorded_says_so_once(
    on_cpu: FrozenCLIP, caplog: pytest.LogCaptureFixture
) -> None:
    """One that declares it, and one whose draws are noticed."""
    for name, reason in (("fedpha", "lengths"), ("dp_fpl", "draws")):
        caplog.clear()
        graphs, recorder = recorded(method := twins.build(on_cpu, name, TASK))
        with caplog.at_level(logging.WARNING, "fedprompt.training"):
            two_rounds(method, clients(on_cpu, {"features"}), graphs)
        assert not recorder.tapes
        (line,) = [r.getMessage() for r in caplog.records]
        assert name in line
        assert "backbone.cuda_graphs" in line
        assert reason in line


def test_what_a_recording_reads_is_kept_and_what_it_computes_is_not() -> None:
    source, unread = torch.ones(3, requires_grad=True), torch.ones(3)
    with ReadFrom() as read:
        middle = source[1:] * 2
        torch.autograd.grad(middle.square().sum(), source)
    kept = {t.untyped_storage().data_ptr() for t in read.tensors}
    assert source.data_ptr() in kept
    assert unread.data_ptr() not in kept
    assert middle.data_ptr() not in kept


def test_only_cuda_records() -> None:
    assert step_recorder(torch.device("cpu"), wanted=True) is None
    assert step_recorder(torch.device("cuda"), wanted=False) is None
    assert isinstance(step_recorder(torch.device("cuda"), wanted=True), CudaRecorder)


def test_a_run_drops_its_recordings_at_its_end_and_when_memory_is_short(
    make_workspace: MakeWorkspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "fedprompt.workspace.experiment.step_recorder", lambda device, wanted: TapeRecorder()
    )
    workspace = make_workspace(partition={"clients": 2})
    graphs = workspace.graphs
    assert graphs is not None
    grid = InlineGrid(workspace)
    federate(grid, rounds=1)
    assert graphs.recorded
    grid.close()
    assert not graphs.recorded

    def short(*arguments: Any) -> NoReturn:
        graphs.recorded = 1
        raise torch.OutOfMemoryError

    run_block(workspace, to_parcels(queries([0])), {}, short)
    assert not graphs.recorded
