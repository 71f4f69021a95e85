"""A node's policy: which requests it answers, and what it reveals. Runs on the node.

The policy is a YAML file on the node, named by `deploy node --policy`. Nothing that a server sends
can change it. Before anything is opened, the node compares the experiment with it; before a reply
leaves, the reply. `fedprompt deploy check` makes the same comparison before anybody starts a run.
"""

from __future__ import annotations

import datetime
import fnmatch
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedprompt.config.fields import build, option
from fedprompt.config.schema import Config
from fedprompt.config.shipped import load_yaml
from fedprompt.errors import UserError
from fedprompt.evaluation.registry import protocol_class
from fedprompt.methods.parts.class_shares import SHARES
from fedprompt.privacy.secure_aggregation.params import Terms

ROUNDED_TO = 10
"""With `class_counts: rounded`, counts are rounded up to multiples of this number."""
_HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")


@dataclass(frozen=True)
class Policy:
    """The keys of a policy file. Without a key, the policy does not limit what it is about."""

    experiments: list[str] = option([], "names of experiments that are answered; * and ? match")
    methods: list[str] = option([], "names of methods that are answered; * and ? match")
    strategies: list[str] = option([], "names of strategies that are answered; * and ? match")
    protocols: list[str] = option(
        [],
        "protocols that may ask the node for numbers; * and ? match. Empty: all, but none if "
        "class_counts is not exact",
    )
    classes: list[str] = option([], "class names that an experiment may ask about")
    max_rounds: int | None = option(None, "most rounds of an experiment", ge=1)
    tensors: list[str] = option([], "names of tensors that may leave; * and ? match")
    max_numbers: int | None = option(None, "most numbers in the tensors of one reply", ge=1)
    max_change: float | None = option(
        None, "largest L2 norm of the change that leaves, over all tensors and with noise", gt=0
    )
    secure_aggregation: bool = option(False, "refuse experiments in which the server sees updates")
    min_peers: int = option(
        0, "other nodes whose updates are at least in a sum; needs secure_aggregation", ge=0
    )
    min_noise: float = option(0.0, "least privacy.noise of an experiment", ge=0)
    max_clip: float | None = option(None, "largest privacy.clip of an experiment", gt=0)
    min_image_noise: float = option(0.0, "least privacy.image_noise of an experiment", ge=0)
    class_counts: Literal["exact", "rounded", "withheld"] = option(
        "exact", f"images per class in the node's report: as they are, up to {ROUNDED_TO}s, or none"
    )
    test_accuracy: bool = option(True, "whether evaluations are answered")
    hours: str | None = option(None, "local time in which requests are answered, 'HH:MM-HH:MM'")
    max_epsilon: float | None = option(
        None, "most epsilon that is spent on the node's data, over all experiments together", gt=0
    )
    max_image_epsilon: float | None = option(
        None, "most epsilon that is spent on any single image, over all experiments together", gt=0
    )
    delta: float = option(
        1e-5, "delta for which max_epsilon and max_image_epsilon hold", gt=0, lt=1
    )

    def check(self) -> None:
        """Refuse keys that contradict each other."""
        if self.min_peers and not self.secure_aggregation:
            raise UserError("'min_peers' needs secure_aggregation: true.")
        if self.hours is not None and not _HOURS.fullmatch(self.hours):
            raise UserError(f"'hours' is {self.hours!r}; write it as '18:00-06:00'.")
        if self.hours is not None and self.hours[:5] == self.hours[6:]:
            raise UserError(f"'hours' is {self.hours!r}; begin and end must differ.")
        if self.class_counts != "exact" and self.test_accuracy:
            raise UserError(
                f"'class_counts' is {self.class_counts}, which needs test_accuracy: false: with "
                "prompts of its own choice, a server could count the test images of each class."
            )

    @property
    def requires_noise(self) -> bool:
        """Whether an experiment without noise is refused."""
        return self.min_noise > 0 or self.min_image_noise > 0 or self.limits_epsilon

    @property
    def limits_epsilon(self) -> bool:
        """Whether the node keeps count of what its data have spent."""
        return self.max_epsilon is not None or self.max_image_epsilon is not None


def read_policy(path: Path) -> tuple[Policy, str]:
    """Read a policy file.

    Args:
        path: the YAML file.

    Returns:
        The policy and the SHA-256 of the file, which identifies it in replies and records.

    Raises:
        UserError: the file cannot be read, or a key or value in it is wrong.
    """
    values = load_yaml(path, "policy")
    try:
        return build(Policy, values, "policy"), hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"policy: cannot read {path}: {error.strerror}.") from None


def objections(policy: Policy, config: Config) -> list[str]:
    """Why a node does not answer an experiment.

    Args:
        policy: the node's policy.
        config: the experiment.

    Returns:
        One reason for every key of the policy that the experiment violates.
    """
    found = []
    for key, allowed, name in (
        ("experiments", policy.experiments, config.experiment),
        ("methods", policy.methods, config.method.name),
        ("strategies", policy.strategies, config.strategy.name),
    ):
        if allowed and not _matches(name, allowed):
            found.append(f"{key}: '{name}' is not in {', '.join(allowed)}")
    rounds = config.federation.rounds
    if policy.max_rounds is not None and rounds > policy.max_rounds:
        found.append(f"max_rounds: {rounds} rounds, more than {policy.max_rounds}")
    if policy.class_counts != "exact" and config.method.reveals_classes:
        found.append(f"class_counts: method '{config.method.name}' sends sums over single classes")
    if policy.class_counts != "exact" and config.relabel_every:
        found.append("class_counts: partition.relabel_every asks for guesses by class")
    found += _protocol_objections(policy, config)
    found += class_objections(policy, getattr(config.data, "class_names", None) or [])
    found += _protection_objections(policy, config)
    return found


def _protocol_objections(policy: Policy, config: Config) -> list[str]:
    # The numbers of a protocol can be those of single classes, whose counts are not to be known.
    allowed = policy.protocols or (["*"] if policy.class_counts == "exact" else [])
    asking = [name for name in config.protocols if protocol_class(name).asks_clients]
    others = [name for name in asking if not _matches(name, allowed)]
    if not others:
        return []
    return [f"protocols: {', '.join(others)} would ask for numbers about the images of this node"]


def class_objections(policy: Policy, class_names: Sequence[str]) -> list[str]:
    """Why a node does not answer questions about these classes; empty if it does."""
    others = [name for name in class_names if policy.classes and name not in policy.classes]
    if not others:
        return []
    more = f" and {len(others) - 5} more" if len(others) > 5 else ""
    return [f"classes: {', '.join(others[:5])}{more} may not be asked about"]


def _protection_objections(policy: Policy, config: Config) -> list[str]:
    privacy, masks = config.privacy, config.secure_aggregation
    found = []
    if policy.secure_aggregation and not masks.enabled:
        found.append("secure_aggregation: the experiment has secure_aggregation.enabled=false")
    elif masks.enabled and policy.min_peers:
        peers = Terms.of(masks, _round_size(config)).threshold - 1
        if peers < policy.min_peers:
            found.append(
                f"min_peers: a sum has at least {peers} other nodes, fewer than {policy.min_peers}"
            )
    if privacy.noise < policy.min_noise:
        found.append(f"min_noise: privacy.noise={privacy.noise:g} is below {policy.min_noise:g}")
    if policy.max_epsilon is not None and privacy.noise == 0:
        found.append("max_epsilon: the experiment has privacy.noise=0, which no epsilon limits")
    image_noise = privacy.image_noise
    if image_noise < policy.min_image_noise:
        found.append(
            f"min_image_noise: privacy.image_noise={image_noise:g} is below "
            f"{policy.min_image_noise:g}"
        )
    if policy.max_image_epsilon is not None and image_noise == 0:
        found.append(
            "max_image_epsilon: the experiment has privacy.image_noise=0, which no epsilon of "
            "single images limits"
        )
    if policy.requires_noise and privacy.noise_seed is not None:
        found.append(
            "min_noise, max_epsilon, min_image_noise, max_image_epsilon: with privacy.noise_seed "
            "the server could subtract the noise"
        )
    if policy.max_clip is not None and privacy.clip > policy.max_clip:
        found.append(f"max_clip: privacy.clip={privacy.clip:g} is above {policy.max_clip:g}")
    return found


def _round_size(config: Config) -> int:
    """As `Workspace.round_size` of nodes that hold images of their own, before one is opened."""
    return max(1, round(config.federation.fraction * config.able_to_train))


def reply_objections(
    policy: Policy, sent: Mapping[str, NDArray[np.float32]], change: float
) -> list[str]:
    """Why a trained reply must not leave.

    Args:
        policy: the node's policy.
        sent: the tensors of the reply by name.
        change: L2 norm of their change, all tensors together.

    Returns:
        One reason for every key of the policy that the reply violates.
    """
    found = []
    others = [n for n in sorted(sent) if policy.tensors and not _matches(n, policy.tensors)]
    if others:
        found.append(f"tensors: {', '.join(others)} may not leave")
    if policy.class_counts != "exact" and SHARES in sent:
        found.append(f"class_counts: {SHARES} says how the images divide among the classes")
    numbers = sum(values.size for values in sent.values())
    if policy.max_numbers is not None and numbers > policy.max_numbers:
        found.append(f"max_numbers: {numbers} numbers, more than {policy.max_numbers}")
    # Written with `not`, so that a NaN is refused: comparisons with NaN are false.
    if policy.max_change is not None and not change <= policy.max_change:
        # Without the norm: it would be one more release.
        found.append(f"max_change: the change has a norm above {policy.max_change:g}")
    return found


def closed_until(policy: Policy, now: datetime.time) -> str | None:
    """When the node answers again, 'HH:MM'; None if it answers now.

    Args:
        policy: the node's policy.
        now: the node's local time.
    """
    if policy.hours is None:
        return None
    start, _, end = policy.hours.partition("-")
    current = f"{now:%H:%M}"
    # A window such as 18:00-06:00 contains midnight.
    is_open = start <= current < end if start < end else current >= start or current < end
    return None if is_open else start


def revealed_counts(policy: Policy, counts_C: Sequence[int]) -> list[int]:
    """Images per class (C,) as the policy reveals them; empty if it withholds them."""
    if policy.class_counts == "withheld":
        return []
    if policy.class_counts == "rounded":
        return [ROUNDED_TO * math.ceil(count / ROUNDED_TO) for count in counts_C]
    return list(counts_C)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
