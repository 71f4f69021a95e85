"""What every method promises, whatever its paper: found by module, tested at its defaults."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from PIL import Image

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.backbone.loading import shape_only_clip
from fedprompt.config.fields import build as build_options
from fedprompt.config.schema import Config, TrainingConfig
from fedprompt.data.dataset import TEST, TRAIN, ImageDataset
from fedprompt.data.features.table import FeatureTable, encode_inputs, open_feature_table
from fedprompt.data.partition import make_partition
from fedprompt.experiment.checkpoint import read_checkpoint
from fedprompt.experiment.display import QuietDisplay
from fedprompt.experiment.rounds import run_server
from fedprompt.experiment.run_folder import RunFolder
from fedprompt.federation.checkpoint import Checkpoint
from fedprompt.federation.registry import strategy_class
from fedprompt.federation.screening import Update
from fedprompt.federation.server_app import Federation
from fedprompt.messages import ARRAYS
from fedprompt.methods.base import ClientData, Method, Task, Tensors, uploaded_numbers
from fedprompt.methods.registry import all_methods, method_class
from fedprompt.reports.run_data import CHECKPOINT, PRIVATE
from fedprompt.rng import generator
from fedprompt.scoring import encode_personal, logits_of, model_of, score_personal
from fedprompt.simulation.inline_grid import InlineGrid
from fedprompt.simulation.private_log import PrivateLog
from fedprompt.training import LocalResult, train_clients
from fedprompt.workspace import Workspace
from tests.support.builders import CLASS_NAMES, random_clip, small_config

SIZES = (5, 12, 9)
"""Images of three clients; batches of 4 make two of them end with a partial one."""
NEW_NAMES = ("pine forest", "oil tank", "airport")


@pytest.fixture(scope="module")
def clip() -> FrozenCLIP:
    """Random weights, narrow towers of four layers; prompts that go deeper stop there."""
    vision = {"width": 32, "head_width": 16, "layers": 4, "patch_size": 16}
    text = {"width": 32, "heads": 2, "layers": 4}
    return random_clip(vision_cfg=vision, text_cfg=text)


@pytest.fixture(scope="module")
def dataset() -> ImageDataset:
    """Sixty coloured, noisy pictures of six classes."""
    images, classes = 60, len(CLASS_NAMES)
    colours = generator(0, "colours").integers(0, 255, (classes, 4, 4, 3))

    def picture(index: int) -> Image.Image:
        noise = generator(0, "picture", index).integers(-30, 30, (4, 4, 3))
        values = np.clip(colours[index % classes] + noise, 0, 255).astype(np.uint8)
        return Image.fromarray(values).resize((32, 32), Image.Resampling.NEAREST)

    return ImageDataset(
        name="pictures",
        class_names=CLASS_NAMES,
        labels_N=np.arange(images, dtype=np.int64) % classes,
        split_N=np.where(np.arange(images) < 48, TRAIN, TEST).astype(np.int8),
        domains_N=np.zeros(images, dtype=np.int64),
        domain_names=("all",),
        fingerprint="coloured pictures",
        open_image=lambda i: picture(int(i)),
    )


@pytest.fixture(scope="module")
def columns(
    clip: FrozenCLIP, dataset: ImageDataset, tmp_path_factory: pytest.TempPathFactory
) -> FeatureTable:
    """Everything that a method may ask of these pictures, from the cache."""
    cache = tmp_path_factory.mktemp("cache")
    return open_feature_table(clip, dataset, cache, {"patches", "pixels"}, progress=False)


def build(name: str, clip: FrozenCLIP, names: Sequence[str] = CLASS_NAMES) -> Method:
    cls = method_class(name)
    return cls(cls.Config(), clip, Task(tuple(names)))


def clients(columns: FeatureTable, dataset: ImageDataset) -> list[ClientData]:
    data, first = [], 0
    for client, size in enumerate(SIZES):
        index = np.arange(first, first + size)
        labels = torch.from_numpy(dataset.labels_N[index])
        data.append(ClientData(client, columns.rows(index), labels))
        first += size
    return data


class Server:
    """The method's own server rule, without messages."""

    def __init__(self, method: Method, data: Sequence[ClientData]) -> None:
        rule = dict(method.config.default_strategy)
        cls = strategy_class(rule["name"])
        start = {n: t.numpy() for n, t in method.init_shared(1).items()}
        self.strategy = cls(
            build_options(cls.Config, rule, "strategy"),
            shapes={n: a.shape for n, a in start.items()},
            seed=1,
            extras={n: t.numpy() for n, t in method.init_extras(1).items()},
        )
        self.strategy.set_nodes({d.client: d.client for d in data})
        self.shared = start

    def send(self, server_round: int, data: Sequence[ClientData]) -> list[Tensors]:
        return [
            {
                n: torch.from_numpy(np.array(a))
                for n, a in (
                    self.shared | self.strategy.client_extras(server_round, d.client)
                ).items()
            }
            for d in data
        ]

    def collect(self, server_round: int, results: Sequence[LocalResult]) -> None:
        updates = [
            Update(r.client, {n: t.numpy() for n, t in r.shared.items()}, r.num_examples)
            for r in results
        ]
        self.shared = self.strategy.aggregate(server_round, self.shared, updates)


def first_private(method: Method, data: Sequence[ClientData]) -> list[Tensors]:
    return [method.init_private_from_data(method.init_private(1, d.client), d, 1) for d in data]


def starts(method: Method, data: Sequence[ClientData]) -> tuple[list[Tensors], list[Tensors]]:
    return Server(method, data).send(1, data), first_private(method, data)


def train(
    method: Method,
    data: Sequence[ClientData],
    received: Sequence[Tensors],
    private: Sequence[Tensors],
    server_round: int = 1,
    **changes: Any,
) -> list[LocalResult]:
    settings = {"lr": 0.01, "batch_size": 4, "weight_decay": 0.0, "schedule": "constant"}
    config = TrainingConfig(**{**settings, **changes})
    return train_clients(
        method, received, private, data, config, seed=1, server_round=server_round, rounds=10
    )


def shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {n: tuple(t.shape) for n, t in tensors.items()}


def assert_close(ours: Tensors, theirs: Tensors, start: Tensors, rtol: float) -> None:
    """Equal within `rtol` of how far training has moved the tensor, and float rounding."""
    assert ours.keys() == theirs.keys()
    for n in ours:
        moved = float((theirs[n] - start[n]).abs().max())
        size = float(theirs[n].abs().max())
        gap = float((ours[n] - theirs[n]).abs().max())
        assert gap <= rtol * moved + 1e-6 * size + 1e-8, (n, gap, moved)


def weights_hash(clip: FrozenCLIP) -> str:
    state = clip.model.state_dict()
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in state.values())).hexdigest()


@pytest.fixture(params=list(all_methods()))
def method(request: pytest.FixtureRequest, clip: FrozenCLIP) -> Method:
    return build(request.param, clip)


@pytest.fixture
def trainable(method: Method) -> Method:
    if not method.trainable:
        pytest.skip(f"{method.name} learns nothing")
    return method


def test_it_cites_first(method: Method) -> None:
    text = inspect.getdoc(sys.modules[type(method).__module__]) or ""
    assert text.splitlines()[0].endswith((".", ":")) or text.splitlines()[1]
    assert "Source" in text, "the docstring of the module names its paper"
    assert method.source


def test_tensors_are_seeded_float32_and_alike_for_all_clients(method: Method) -> None:
    for start in (method.init_shared, method.init_extras, lambda s: method.init_private(s, 2)):
        for n, value in start(1).items():
            assert value.dtype == torch.float32, n
            assert torch.isfinite(value).all(), n
            assert torch.equal(value, start(1)[n]), n
    assert shapes(method.init_private(1, 0)) == shapes(method.init_private(1, 7))
    names = [*method.init_shared(1), *method.init_extras(1)]
    assert len(names) == len(set(names)), "received tensors have names of their own"


def test_training_moves_prompts_and_nothing_else(
    trainable: Method, clip: FrozenCLIP, columns: FeatureTable, dataset: ImageDataset
) -> None:
    method, data = trainable, clients(columns, dataset)
    before = weights_hash(clip)
    server, private = Server(method, data), first_private(method, data)
    shared = method.init_shared(1)
    first = [
        {f"shared.{n}": t for n, t in shared.items()}
        | {f"private.{n}": t for n, t in private[k].items()}
        for k in range(len(data))
    ]
    for server_round in (1, 2):
        results = train(method, data, server.send(server_round, data), private, server_round)
        server.collect(server_round, results)
        private = [r.private for r in results]
    for k, result in enumerate(results):
        assert shapes(result.shared) == shapes(method.init_shared(1))
        assert shapes(result.private) == shapes(method.init_private(1, 0))
        last = {f"shared.{n}": t for n, t in result.shared.items()}
        last |= {f"private.{n}": t for n, t in result.private.items()}
        for n, t in last.items():
            assert t.dtype == torch.float32
            assert torch.isfinite(t).all(), n
            assert n in method.frozen or not torch.equal(t, first[k][n]), f"{n} does not learn"
        assert next(iter(result.losses)) == "ce"
        assert all(np.isfinite(v) for v in result.losses.values())
    assert weights_hash(clip) == before
    assert all(p.grad is None for p in clip.model.parameters())


def test_clients_at_once_equal_one_at_a_time(
    trainable: Method, columns: FeatureTable, dataset: ImageDataset
) -> None:
    """Also: batches padded for the others' sake change nothing, since sizes differ."""
    method, data = trainable, clients(columns, dataset)
    server, private = Server(method, data), first_private(method, data)
    for server_round in (1, 2):
        received = server.send(server_round, data)
        together = train(method, data, received, private, server_round)
        for k, one in enumerate(data):
            alone = train(method, [one], [received[k]], [private[k]], server_round)[0]
            assert alone.losses == pytest.approx(together[k].losses, rel=1e-3, abs=1e-5)
            assert_close(together[k].shared, alone.shared, received[k], 1e-3)
            assert_close(together[k].private, alone.private, private[k], 1e-3)
        server.collect(server_round, together)
        private = [r.private for r in together]


def test_the_order_of_clients_never_matters(
    trainable: Method, columns: FeatureTable, dataset: ImageDataset
) -> None:
    method, data = trainable, clients(columns, dataset)
    received, private = starts(method, data)
    forth = train(method, data, received, private)
    back = train(method, data[::-1], received[::-1], private[::-1])[::-1]
    for a, b in zip(forth, back, strict=True):
        assert a.client == b.client
        for n in a.shared:
            assert torch.equal(a.shared[n], b.shared[n]), n
        for n in a.private:
            assert torch.equal(a.private[n], b.private[n]), n


def test_loss_falls(trainable: Method, columns: FeatureTable, dataset: ImageDataset) -> None:
    method, data = trainable, clients(columns, dataset)[1:2]
    server, private = Server(method, data), first_private(method, data)
    losses = []
    for server_round in range(1, 13):
        settings = {"optimizer": "adam", "lr": 0.003, "batch_size": 12}
        received = server.send(server_round, data)
        results = train(method, data, received, private, server_round, **settings)
        server.collect(server_round, results)
        private = [r.private for r in results]
        losses.append(results[0].losses["loss"])
    assert np.mean(losses[-3:]) < np.mean(losses[:3]), losses


def test_models_score_images(method: Method, columns: FeatureTable, dataset: ImageDataset) -> None:
    data = clients(columns, dataset)
    received, private = starts(method, data)
    tests = [(d.inputs, d.labels_N) for d in data]
    scores, _ = score_personal(method, received, private, tests)
    assert [s.tested for s in scores] == list(SIZES)
    assert all(np.isfinite(s.loss_sum) for s in scores)
    if method.has_global:
        shared = {n: t[None] for n, t in method.init_shared(1).items()}
        logits = method.logits(
            method.encode(shared, None), data[0].inputs.of_one().on(method.clip.device)
        )
        assert logits.shape == (1, SIZES[0], len(CLASS_NAMES))
        assert torch.isfinite(logits).all()


def test_cached_equals_uncached(
    method: Method, clip: FrozenCLIP, columns: FeatureTable, dataset: ImageDataset
) -> None:
    index = np.arange(3, 10)
    images = torch.stack([clip.preprocess(dataset.open_image(int(i))) for i in index])
    fresh = encode_inputs(clip, images, method.needs)
    received, private = starts(method, clients(columns, dataset)[:1])
    encoded = encode_personal(method, received, private)
    ours, theirs = (
        torch.cat(list(logits_of(method, encoded, i))) for i in (columns.rows(index), fresh)
    )
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_new_class_names_or_a_reason(
    method: Method, clip: FrozenCLIP, columns: FeatureTable, dataset: ImageDataset
) -> None:
    if method.no_transfer_reason is not None:
        assert len(method.no_transfer_reason) > 10
        return
    data = clients(columns, dataset)[:2]
    received, private = starts(method, data)
    if method.trainable:
        private = [r.private for r in train(method, data, received, private)]
    other = build(method.name, clip, NEW_NAMES)
    assert shapes(other.init_shared(1)) == shapes(method.init_shared(1))
    encoded = encode_personal(other, received, private)
    logits = torch.cat(list(logits_of(other, model_of(encoded, 1), data[1].inputs)))
    assert logits.shape == (SIZES[1], len(NEW_NAMES))
    assert torch.isfinite(logits).all()


# In a federation


class Spying(InlineGrid):
    """Keeps every train reply."""

    replies: list[Message]

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        replies = list(super().send_and_receive(messages, timeout=timeout))
        self.replies = getattr(self, "replies", []) + replies
        return replies


@pytest.fixture
def workspace(
    method: Method, clip: FrozenCLIP, dataset: ImageDataset, columns: FeatureTable
) -> Workspace:
    config = small_config(
        method={"name": method.name},
        strategy={"name": "auto"},
        partition={"clients": 3, "alpha": 10.0},
        training={"lr": 0.01, "batch_size": 8},
        federation={"rounds": 4, "fraction": 0.7},
    )
    partition = make_partition(dataset, config.partition, config.seed)
    return Workspace(config, clip, dataset, partition, [columns])


def test_only_declared_shared_tensors_leave_a_client(
    trainable: Method, workspace: Workspace
) -> None:
    grid = Spying(workspace)
    federation = Federation(workspace, grid)
    federation.join()
    for server_round in (1, 2):
        federation.train_round(server_round)
    expected = shapes(trainable.init_shared(1))
    trained = [r for r in grid.replies if ARRAYS in r.content]
    assert len(trained) == 4, "two of three clients in two rounds"
    for reply in trained:
        record = reply.content[ARRAYS]
        assert isinstance(record, ArrayRecord)
        sent = {n: a.numpy() for n, a in record.items()}
        assert {n: a.shape for n, a in sent.items()} == expected
        assert sum(a.size for a in sent.values()) == uploaded_numbers(trainable)
        others = [v for n, v in reply.content.items() if n != ARRAYS]
        assert all(isinstance(v, (MetricRecord, ConfigRecord)) for v in others)
        for other in others:
            assert sum(len(v) if isinstance(v, list) else 1 for v in other.values()) < 20


class StopAfter(QuietDisplay):
    """Interrupts a run when a round is recorded."""

    def __init__(self, server_round: int) -> None:
        self.last = server_round

    def round(self, line: Mapping[str, Any], eta_s: float) -> None:
        if line["round"] == self.last:
            raise KeyboardInterrupt


def test_resume_goes_on_bit_for_bit(
    trainable: Method, workspace: Workspace, tmp_path: Path
) -> None:
    def run(folder: RunFolder, display: QuietDisplay, checkpoint: Any = None) -> None:
        private = PrivateLog(folder.path / PRIVATE, 3)
        federation = Federation(workspace, InlineGrid(workspace, private))
        try:
            run_server(federation, folder, display, checkpoint, private)
        finally:
            folder.close()

    def into(name: str) -> Config:
        output = replace(workspace.config.output, dir=str(tmp_path / name))
        return replace(workspace.config, output=output)

    run(RunFolder.create(into("whole")), QuietDisplay())
    with pytest.raises(KeyboardInterrupt):
        run(RunFolder.create(into("part")), StopAfter(2))
    run(RunFolder.resume(tmp_path / "part")[0], QuietDisplay(), read(tmp_path / "part"))
    ours, theirs = read(tmp_path / "part"), read(tmp_path / "whole")
    for mine, other in ((ours.shared, theirs.shared), (ours.strategy, theirs.strategy)):
        assert mine.keys() == other.keys()
        for n, t in other.items():
            assert torch.equal(mine[n], t), n
    lines = [(tmp_path / n / "metrics.jsonl").read_text() for n in ("part", "whole")]
    assert lines[0] == lines[1]


def read(folder: Path) -> Checkpoint:
    return read_checkpoint(folder / CHECKPOINT)


def test_a_method_is_described_at_the_sizes_of_vit_b_16() -> None:
    clip = shape_only_clip("ViT-B-16")
    for name, cls in all_methods().items():
        described = cls(cls.Config(), clip, Task(("a class", "another class")))
        assert uploaded_numbers(described) >= 0, name
