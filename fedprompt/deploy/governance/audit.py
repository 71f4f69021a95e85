"""What a node has been asked, and what has left it: an audit log that only grows. Runs on the node.

Every request is recorded before it is answered, and every reply before it leaves, with names, sizes
and SHA-256 of its tensors and with all of its numbers. `egress_statement` sums up a run for readers
who are no engineers.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord

from fedprompt.deploy.governance.journal import Entry, Journal
from fedprompt.deploy.node_report import fault_of
from fedprompt.errors import UserError
from fedprompt.messages import error_reason, to_wire, values_of

FILE = "audit.jsonl"
WHAT = "audit log"
ASKED, SENT, REFUSED = "asked", "sent", "refused"
MAX_LISTED = 32
"""Longest list of numbers that an entry repeats; of a longer one it gives length and SHA-256."""
WORDS = {
    "num-train": "the number of training images",
    "num-test": "the number of test images",
    "train-counts": "the number of training images of each class, or an empty list if withheld",
    "test-counts": "the number of test images of each class, or an empty list if withheld",
    "bad-images": "the number of image files that could not be read",
    "labelled": "whether the training images have labels",
    "client-id": "the number under which this site takes part",
    "sample": "what the site's frozen model computes for a drawn picture and a sentence of the "
    "program itself, to show that it is the same model everywhere",
    "num-examples": "the number of images that were trained or tested on",
    "correct": "how many test images were classified correctly",
    "loss": "the mean training loss, a measure of how well the training images are fitted",
    "fedprompt": "the version of this program",
    "flwr": "the version of its library Flower",
    "torch": "the version of its library PyTorch",
}
"""What a value of a reply is, for readers who do not know our names."""
KINDS = {"train": "to train", "evaluate": "to test its model", "query": "which data it has"}
"""What a server asks a node for, by the kind of the message."""


class AuditLog:
    """The audit log of one node.

    Args:
        folder: where it is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.journal = Journal(folder / FILE, WHAT)

    def asked(self, message: Message, **fields: Any) -> str:
        """Record a request before it is answered; returns the entry's hash.

        Raises:
            UserError: the log has been changed, or cannot be written.
        """
        digest = hashlib.sha256(to_wire(message)).hexdigest()
        return self.journal.append(ASKED, kind=_kind(message), sha256=digest, **fields)

    def sent(self, message: Message, reply: Message, **fields: Any) -> str:
        """Record a reply before it leaves; returns the entry's hash.

        Raises:
            UserError: the log has been changed, or cannot be written.
        """
        reason = error_reason(reply) if reply.has_error() else fault_of(reply.content)
        if reason is not None:
            return self.journal.append(REFUSED, kind=_kind(message), reason=reason, **fields)
        content = describe(reply)
        return self.journal.append(SENT, kind=_kind(message), content=content, **fields)


def describe(reply: Message) -> dict[str, Any]:
    """What a reply contains, record by record, as plain JSON."""
    return {name: _described(record) for name, record in reply.content.items()}


def _described(record: Any) -> dict[str, Any]:
    if isinstance(record, ArrayRecord):
        return {name: _tensor(values_of(array)) for name, array in record.items()}
    assert isinstance(record, (MetricRecord, ConfigRecord))
    return {name: _value(value) for name, value in record.items()}


def _tensor(values: Any) -> dict[str, Any]:
    content = np.ascontiguousarray(values)
    return {
        "shape": list(content.shape),
        "bytes": content.nbytes,
        # As text, because a norm can be infinite, which is no JSON.
        "norm": f"{np.linalg.norm(content.astype(np.float64)):.6g}",
        "sha256": hashlib.sha256(content.tobytes()).hexdigest(),
    }


def _value(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"bytes": len(value), "sha256": hashlib.sha256(value).hexdigest()}
    if isinstance(value, list) and (len(value) > MAX_LISTED or bytes in map(type, value)):
        text = json.dumps([v.hex() if isinstance(v, bytes) else v for v in value])
        return {"length": len(value), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    if isinstance(value, list):
        return [_value(item) for item in value]
    # As text, for the same reason as a norm.
    return f"{value:.9g}" if isinstance(value, float) else value


def _kind(message: Message) -> str:
    return message.metadata.message_type.partition(".")[0]


def egress_statement(entries: Sequence[Entry], run: str | None) -> str:
    """A page in Markdown on what has left the node.

    Args:
        entries: all entries of the audit log, oldest first.
        run: the run to report on; None for all.

    Returns:
        The page.

    Raises:
        UserError: the log has no entry on this run.
    """
    of_run = [e for e in entries if "kind" in e and (run is None or e.get("run") == run)]
    if not of_run:
        runs = sorted({str(e["run"]) for e in entries if e.get("run")})
        raise UserError(
            f"the audit log has no entry on run '{run}'; it has entries on: "
            f"{', '.join(runs) or 'no run'}."
        )
    sent = [entry for entry in of_run if entry["event"] == SENT]
    lines = [
        f"# What has left this site{f' in run {run}' if run else ''}",
        "",
        f"Period: {of_run[0]['time']} to {of_run[-1]['time']} (UTC).",
        f"Experiments: {_listed(of_run, 'experiment')}. Methods: {_listed(of_run, 'method')}. "
        f"Servers: {_listed(of_run, 'server')}.",
        f"Policies of this site in force (SHA-256): {_listed(of_run, 'policy')}.",
        "",
        "## Summary",
        "",
    ]
    for kind, words in KINDS.items():
        counts = Counter(entry["event"] for entry in of_run if entry["kind"] == kind)
        lines.append(
            f"- The server asked {words}: {counts[ASKED]} requests, of which the site answered "
            f"{counts[SENT]} and refused {counts[REFUSED]}."
        )
    lines += ["", "## Learned numbers (tensors) that have left", ""]
    lines += _tensor_table(sent) or ["None."]
    lines += ["", "## Other values that have left", "", *(_value_lines(sent) or ["None."])]
    reasons = sorted({str(e["reason"]) for e in of_run if e["event"] == REFUSED})
    lines += ["", "## Reasons of refusals that have left", ""]
    lines += [f"- {reason}" for reason in reasons] or ["None."]
    lines += [
        "",
        "## What has not left",
        "",
        "No reply in this log contains an image or a private prompt of this site. A reason of a "
        "refusal can name a file that cannot be read; all reasons are listed above. The learned "
        "numbers are computed from the images (with the method afl, they are sums of image "
        "features), so they carry some information about them; the documentation on privacy says "
        "how much is known about that.",
        "",
        f"The audit log has {len(entries)} entries; its last hash is `{entries[-1]['hash']}`.",
        "",
    ]
    return "\n".join(lines)


def _listed(entries: Sequence[Entry], key: str) -> str:
    return ", ".join(sorted({str(e[key]) for e in entries if e.get(key)})) or "none"


def _tensor_table(sent: Sequence[Entry]) -> list[str]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for entry in sent:
        for record in entry["content"].values():
            for name, value in record.items():
                if isinstance(value, dict) and "norm" in value:
                    found.setdefault(name, []).append(value)
    rows = [
        f"| {name} | {' x '.join(map(str, values[-1]['shape']))} | {len(values)} | "
        f"{sum(v['bytes'] for v in values):,} | {min(float(v['norm']) for v in values):.4g} to "
        f"{max(float(v['norm']) for v in values):.4g} |"
        for name, values in sorted(found.items())
    ]
    heading = [
        "| name | shape | times | bytes in all | length (L2 norm) |",
        "|---|---|---|---|---|",
    ]
    return heading + rows if rows else []


def _value_lines(sent: Sequence[Entry]) -> list[str]:
    found: dict[tuple[str, str], int] = Counter(
        (entry["kind"], f"{record}.{name}")
        for entry in sent
        for record, values in entry["content"].items()
        for name, value in values.items()
        if not (isinstance(value, dict) and "norm" in value)
    )
    return [
        f"- when asked {KINDS.get(kind, kind)}, {_times(count)}: {_in_words(name)}"
        for (kind, name), count in sorted(found.items())
    ]


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _in_words(name: str) -> str:
    plain = name.rpartition(".")[2]
    words = WORDS.get(plain, "a part of the mean training loss" if "loss-" in plain else "")
    return f"{words} (`{name}`)" if words else f"`{name}`"
