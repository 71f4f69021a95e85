"""What a node says of itself when it joins, written by the node and checked by the server.

It is the client's number, how many images of each class it trains and tests on, and what its
backbone makes of a sample; or the one line that says why it cannot take part. No file name leaves
the node, but for that line's. C classes, D joint embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from fedprompt.deploy.backbone_check import sample_features
from fedprompt.federation.screening import MAX_EXAMPLES
from fedprompt.messages import CONFIG, METRICS, error_reason
from fedprompt.workspace import Workspace

ZERO_SHOT = "zero-shot"
"""Key of an evaluate message that asks for the backbone's own accuracy, without any prompt."""
LONGEST = 500
"""Characters that are kept of a peer's text."""


@dataclass(frozen=True)
class Description:
    """One client: training and test images per class (C,), and images that cannot be read.

    `sample` is what its backbone makes of a sample, (2 D) numbers; see `same_backbone`.
    """

    client: int
    train_C: tuple[int, ...]
    test_C: tuple[int, ...]
    bad_images: int
    labelled: bool
    sample: tuple[float, ...]

    @property
    def trains(self) -> bool:
        """Whether it has labelled training images."""
        return self.labelled and sum(self.train_C) > 0

    def notes(self, class_names: Sequence[str]) -> list[str]:
        """What both sides should know of its folder, in words."""
        rows = zip(class_names, self.train_C, self.test_C, strict=True)
        lacking = [name for name, train, test in rows if train + test == 0]
        notes = []
        if lacking:
            sanitised = ", ".join(f"'{name}'" for name in lacking[:5])
            more = f" and {len(lacking) - 5} more" if len(lacking) > 5 else ""
            notes.append(
                f"no image of {sanitised}{more} ({len(lacking)} of {len(class_names)} classes)"
            )
        if self.bad_images:
            notes.append(f"{self.bad_images} unreadable images left out")
        return notes


def describe(workspace: Workspace, client: int) -> Description:
    """What this node has of `client`."""
    partition, labels_N = workspace.partition, workspace.dataset.labels_N
    classes = len(workspace.dataset.class_names)
    train_C = partition.train_counts(labels_N, classes)[client].tolist()
    test_C = partition.test_counts(labels_N, classes)[client].tolist()
    own = workspace.dataset.owners_N is not None
    bad = len(workspace.dataset.bad_images) if own else 0
    labelled = client not in partition.unlabelled
    sample = tuple(sample_features(workspace.clip).ravel().tolist())
    return Description(client, tuple(train_C), tuple(test_C), bad, labelled, sample)


def to_reply(description: Description, message: Message) -> Message:
    """The answer to a query."""
    metrics = MetricRecord(
        {
            "client-id": description.client,
            "num-train": sum(description.train_C),
            "num-test": sum(description.test_C),
            "train-counts": list(description.train_C),
            "test-counts": list(description.test_C),
            "bad-images": description.bad_images,
            "labelled": int(description.labelled),
            "sample": list(description.sample),
        }
    )
    return Message(RecordDict({METRICS: metrics}), reply_to=message)


def fault_reply(fault: str, message: Message) -> Message:
    """The answer of a node that cannot take part."""
    record = ConfigRecord({"fault": fault[:LONGEST]})
    return Message(RecordDict({CONFIG: record}), reply_to=message)


def from_reply(reply: Message, classes: int, clients: int) -> Description | str:
    """The description in a reply, or what is wrong; every byte of it is a peer's."""
    if reply.has_error():
        return error_reason(reply)[:LONGEST]
    settings = reply.content.get(CONFIG)
    if isinstance(settings, ConfigRecord):
        return " ".join(str(settings.get("fault", "no reason given")).split())[:LONGEST]
    metrics = reply.content.get(METRICS)
    if not isinstance(metrics, MetricRecord):
        return "its description cannot be read"
    client = metrics.get("client-id")
    if not isinstance(client, int) or not 0 <= client < clients:
        return f"it says that it is client {client!r}; there are {clients}"
    train, test = (
        _counts(metrics, "train-counts", classes),
        _counts(metrics, "test-counts", classes),
    )
    bad, labelled = metrics.get("bad-images"), metrics.get("labelled")
    if train is None or test is None or not _is_count(bad) or labelled not in (0, 1):
        return f"its description does not fit the experiment's {classes} classes"
    sample = metrics.get("sample")
    if not isinstance(sample, list) or not np.isfinite(sample).all():
        return "its description does not say what its backbone makes of a sample"
    assert isinstance(bad, int)
    return Description(client, train, test, bad, bool(labelled), tuple(map(float, sample)))


def _counts(metrics: MetricRecord, name: str, classes: int) -> tuple[int, ...] | None:
    values: Any = metrics.get(name)
    if not isinstance(values, list) or len(values) != classes or not all(map(_is_count, values)):
        return None
    return tuple(values)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value <= MAX_EXAMPLES
