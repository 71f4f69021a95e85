"""What a node reports when it joins: written on the node, checked in the server app.

The report consists of the client's number, how many images of each class the node trains and tests
on, its backbone's features of a sample (backbone_check.py), and versions (versions.py). A node that
cannot take part sends its versions and one line with the reason instead. No other text and no file
name leaves the node.

C is the number of classes, D the dimension of the joint embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from fedprompt.backbone.sample import sample_features
from fedprompt.config.schema import FORMATS, WeightFormat
from fedprompt.deploy.versions import (
    VERSIONS,
    read_versions,
    version_warnings,
    versions_record,
)
from fedprompt.messages import CONFIG, MAX_EXAMPLES, METRICS, Refused
from fedprompt.runtime.peer_text import sanitised
from fedprompt.workspace import Workspace

ZERO_SHOT = "zero-shot"
"""Key of an evaluate message that asks for the backbone's own accuracy, without any prompt."""


@dataclass(frozen=True)
class NodeReport:
    """One client's data, in numbers.

    Args:
        client: the client's number, 0 .. K - 1.
        train_C: training images per class; empty if the node's policy withholds them.
        test_C: test images per class; likewise.
        bad_images: images that cannot be read.
        labelled: whether the training images have labels.
        sample: the backbone's features of the sample, 2 D numbers.
        versions: version of each package of `versions.py`, as pairs; empty on the node itself.
        totals: number of training and of test images where `train_C` and `test_C` are withheld.
        weights: the format in which the node keeps the backbone's weights.
    """

    client: int
    train_C: tuple[int, ...]
    test_C: tuple[int, ...]
    bad_images: int
    labelled: bool
    sample: tuple[float, ...]
    versions: tuple[tuple[str, str], ...] = ()
    totals: tuple[int, int] | None = None
    weights: WeightFormat = "float32"

    @property
    def num_train(self) -> int:
        """Number of training images."""
        return sum(self.train_C) if self.totals is None else self.totals[0]

    @property
    def num_test(self) -> int:
        """Number of test images."""
        return sum(self.test_C) if self.totals is None else self.totals[1]

    def warnings(self, class_names: Sequence[str]) -> list[str]:
        """What the administrators of both sides should know about the node's images."""
        counted = self.totals is None
        rows = zip(class_names, self.train_C, self.test_C, strict=counted)
        empty = [name for name, train, test in rows if train + test == 0]
        warnings = []
        if empty:
            names = ", ".join(f"'{name}'" for name in empty[:5])
            more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
            warnings.append(
                f"no images of {names}{more} ({len(empty)} of {len(class_names)} classes)"
            )
        if self.bad_images:
            warnings.append(f"{self.bad_images} unreadable images were skipped")
        if self.versions:
            warnings += version_warnings(dict(self.versions))
        return warnings


def make_report(workspace: Workspace, client: int) -> NodeReport:
    """The report that a node sends when it is asked which client it is.

    Args:
        workspace: the node's own workspace, with its images and its backbone.
        client: the client's number, 0 .. K - 1.
    """
    partition, labels_N = workspace.partition, workspace.dataset.labels_N
    classes = len(workspace.dataset.class_names)
    train_C = partition.train_counts(labels_N, classes)[client].tolist()
    test_C = partition.test_counts(labels_N, classes)[client].tolist()
    # Without owners, the node has opened the whole data set, and bad images belong to no client.
    has_owners = workspace.dataset.owners_N is not None
    bad_images = len(workspace.dataset.bad_images) if has_owners else 0
    labelled = client not in partition.unlabelled
    sample = tuple(sample_features(workspace.clip).ravel().tolist())
    weights = workspace.clip.compression.weights
    return NodeReport(
        client, tuple(train_C), tuple(test_C), bad_images, labelled, sample, weights=weights
    )


def report_reply(report: NodeReport, message: Message) -> Message:
    """The reply to a query that carries a report."""
    metrics = MetricRecord(
        {
            "client-id": report.client,
            "num-train": report.num_train,
            "num-test": report.num_test,
            "train-counts": list(report.train_C),
            "test-counts": list(report.test_C),
            "bad-images": report.bad_images,
            "labelled": int(report.labelled),
            "sample": list(report.sample),
            "weights": FORMATS.index(report.weights),
        }
    )
    return Message(RecordDict({METRICS: metrics, VERSIONS: versions_record()}), reply_to=message)


def fault_reply(fault: str, message: Message) -> Message:
    """The reply of a node that cannot take part, with the reason in one line."""
    record = ConfigRecord({"fault": sanitised(fault)})
    return Message(RecordDict({CONFIG: record, VERSIONS: versions_record()}), reply_to=message)


def fault_of(content: RecordDict) -> str | None:
    """Why the node that sent this reply to a query cannot take part; None if it can."""
    settings = content.get(CONFIG)
    if not isinstance(settings, ConfigRecord):
        return None
    fault = settings.get("fault")
    return fault if isinstance(fault, str) and fault else "no reason given"


def read_report(content: RecordDict, classes: int, clients: int) -> NodeReport:
    """Check the reply to a query; every byte of it is untrusted.

    Args:
        content: what the node sent.
        classes: number of classes C of the experiment.
        clients: number of clients K of the experiment.

    Returns:
        The report.

    Raises:
        Refused: the node cannot take part; the message is one line with the reason.
    """
    # First of all: another version is often the true reason of whatever else is wrong.
    versions = read_versions(content)
    if (fault := fault_of(content)) is not None:
        raise Refused(fault)
    metrics = content.get(METRICS)
    if not isinstance(metrics, MetricRecord):
        raise Refused("its report cannot be read")
    client = metrics.get("client-id")
    # The number becomes an index into the partition's rows, so its range matters.
    if not isinstance(client, int) or not 0 <= client < clients:
        raise Refused(f"it claims to be client {client!r}, but there are {clients} clients")
    train_C = _counts(metrics, "train-counts", classes)
    test_C = _counts(metrics, "test-counts", classes)
    totals = None
    if metrics.get("train-counts") == metrics.get("test-counts") == []:
        totals = _withheld(metrics)
        train_C = test_C = () if totals is not None else None
    bad_images, labelled = metrics.get("bad-images"), metrics.get("labelled")
    if train_C is None or test_C is None or not _is_count(bad_images) or labelled not in (0, 1):
        raise Refused(f"its report does not fit the experiment's {classes} classes")
    sample = metrics.get("sample")
    # Flower's MetricRecord holds numbers only, so `isfinite` gets no text.
    if not isinstance(sample, list) or not np.isfinite(sample).all():
        raise Refused("its report lacks its backbone's features of the sample")
    weights = metrics.get("weights", 0)
    if not isinstance(weights, int) or not 0 <= weights < len(FORMATS):
        raise Refused("it keeps its backbone's weights in a format that the server does not know")
    assert isinstance(bad_images, int)
    features = tuple(map(float, sample))
    return NodeReport(
        client, train_C, test_C, bad_images, bool(labelled), features, tuple(versions.items()),
        totals, FORMATS[weights],
    )  # fmt: skip


def _counts(metrics: MetricRecord, name: str, classes: int) -> tuple[int, ...] | None:
    values: Any = metrics.get(name)
    if not isinstance(values, list) or len(values) != classes or not all(map(_is_count, values)):
        return None
    return tuple(values)


def _withheld(metrics: MetricRecord) -> tuple[int, int] | None:
    """The totals of a node that withholds its counts; None if they are no counts."""
    train, test = metrics.get("num-train"), metrics.get("num-test")
    return (int(train), int(test)) if _is_count(train) and _is_count(test) else None  # type: ignore[arg-type]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value <= MAX_EXAMPLES
