"""How much privacy a node's data have spent, over all experiments. Runs on the node.

The mechanism is the noise that the node adds itself: to its update (`privacy.local_noise`), one
Gaussian release for every round in which it has trained, or to the gradients of single images
(`privacy.image_epsilon`). The two protect different things, all of the node's data and
each of its images, so there are two epsilons, each with a limit of its own. Releases of all
experiments on the same data compose (Mironov, 2017, Renyi differential privacy). What epsilon does
not cover is listed there, above all the counts of correct answers, which `test_accuracy: false` in
the policy withholds.

A release is spent before it leaves. A node that is killed between the two has spent it, but not
twice: the reply is kept on the node, and the same question gets the same bytes again, which reveals
nothing new.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from fedprompt.config.schema import Config
from fedprompt.deploy.governance.journal import Journal, verify
from fedprompt.errors import UserError
from fedprompt.files import write_bytes
from fedprompt.privacy.accountant import composed_epsilon, sampled_epsilon
from fedprompt.privacy.image_epsilon import Event, round_releases

FILE = "privacy.jsonl"
WHAT = "privacy ledger"
SPENT = "spent"


@dataclass(frozen=True)
class Budget:
    """The most epsilon that may be spent, at a delta; None for no limit.

    Attributes:
        epsilon: of all data of the node.
        delta: holds for both.
        image_epsilon: of a single image.
    """

    epsilon: float | None
    delta: float
    image_epsilon: float | None = None


@dataclass(frozen=True)
class Release:
    """What one round of a node lets out.

    Attributes:
        noise: noise multiplier of the update as a whole, relative to what it can change by; 0 for
            no noise.
        image: the kind and the number of releases about single images (`round_releases`); None
            without noise on these.
    """

    noise: float
    image: tuple[Event, int] | None = None

    @classmethod
    def of(cls, config: Config, images: int, *, steps: bool) -> Release:
        """The release of a round of an experiment.

        Args:
            config: the experiment.
            images: the number of the node's training images.
            steps: whether the method takes steps.
        """
        privacy = config.privacy
        image = round_releases(privacy, config.training, images, steps=steps)
        # Two clipped updates differ by at most twice the clip (local_noise.py).
        return cls(privacy.noise / 2, image if privacy.image_noise else None)


class Ledger:
    """The releases that concern one data folder of this node.

    Args:
        folder: where the ledger and the replies that have been counted are kept.
        data: names the data, e.g. the resolved path of the image folder.
    """

    def __init__(self, folder: Path, data: str) -> None:
        self.folder = folder
        self.data = data
        self.journal = Journal(folder / FILE, WHAT)

    def releases(self) -> Counter[float]:
        """The number of releases so far, by noise multiplier.

        Raises:
            UserError: the ledger has been changed.
        """
        entries = self.journal.entries()
        return Counter(
            entry["noise"] for entry in entries if self._is_ours(entry) and entry.get("noise")
        )

    def image_releases(self) -> Counter[Event]:
        """The number of releases about single images so far, by their kind.

        Raises:
            UserError: the ledger has been changed.
        """
        found: Counter[Event] = Counter()
        for entry in self.journal.entries():
            if self._is_ours(entry) and entry.get("image"):
                noise, batches, count = entry["image"]
                found[noise, batches] += count
        return found

    def _is_ours(self, entry: Mapping[str, Any]) -> bool:
        ours: bool = entry["event"] == SPENT and entry["data"] == self.data
        return ours

    def image_epsilon(self, delta: float, more: tuple[Event, int] | None = None) -> float:
        """Epsilon of a single image, of all releases so far and of those of one more round.

        Raises:
            UserError: the ledger has been changed, or the accountant is not installed.
        """
        releases = self.image_releases()
        if more is not None:
            releases[more[0]] += more[1]
        epsilon = sampled_epsilon(releases, delta)
        assert epsilon is not None  # only releases with noise are spent
        return epsilon

    def epsilon(self, delta: float, more: float | None = None) -> float:
        """Epsilon of all releases so far, and of one more with the noise multiplier `more`.

        Raises:
            UserError: the ledger has been changed, or the accountant is not installed.
        """
        releases = self.releases()
        if more is not None:
            releases[more] += 1
        epsilon = composed_epsilon(releases, delta)
        assert epsilon is not None  # only releases with noise are spent
        return epsilon

    def check(self, release: Release, budget: Budget) -> None:
        """Refuse a release that would exceed the budget.

        Raises:
            UserError: it would, the ledger has been changed, or the accountant is not installed.
        """
        delta = budget.delta
        if budget.epsilon is not None:
            spent, after = self.epsilon(delta), self.epsilon(delta, more=release.noise)
            _refuse_beyond("data", "max_epsilon", spent, after, budget.epsilon, delta)
        if budget.image_epsilon is not None:
            spent = self.image_epsilon(delta)
            after = self.image_epsilon(delta, more=release.image)
            _refuse_beyond(
                "single images", "max_image_epsilon", spent, after, budget.image_epsilon, delta
            )

    def kept_reply(self, question: str) -> bytes | None:
        """The reply that this question got before, if it is kept.

        Args:
            question: identifies the question: the run, the round and the tensors in it.

        Raises:
            UserError: the reply cannot be read.
        """
        try:
            path = self._reply(question)
            return path.read_bytes() if path.is_file() else None
        except OSError as error:
            raise UserError(f"cannot read {self._reply(question)}: {error.strerror}.") from None

    def spend(
        self, question: str, reply: bytes, release: Release, run: str, budget: Budget
    ) -> None:
        """Count a release; when this returns, its reply may leave.

        The same question is counted once, because its reply is kept.

        Args:
            question: identifies the question.
            reply: the bytes that are about to leave, or of which only a masked form leaves.
            release: what the reply lets out.
            run: the name of the run.
            budget: what may be spent.

        Raises:
            UserError: the budget would be exceeded, the ledger or the reply cannot be written, or
                the ledger has been changed.
        """
        digest = hashlib.sha256(reply).hexdigest()
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            # One process of the node at a time: two that both check first would both spend.
            with FileLock(self.folder / "spend.lock"):
                self._spend(question, reply, digest, release, run, budget)
        except OSError as error:
            raise UserError(
                f"cannot write to {self.folder}: {error.strerror}; nothing was released."
            ) from None

    def _spend(
        self,
        question: str,
        reply: bytes,
        digest: str,
        release: Release,
        run: str,
        budget: Budget,
    ) -> None:
        spent = {(e.get("question"), e.get("reply")) for e in self.journal.entries()}
        if (question, digest) in spent:
            return
        # Again, because other releases may have been counted while this one was trained.
        self.check(release, budget)
        # First the reply: a release that is counted can then be repeated with the same bytes.
        write_bytes(self._reply(question), reply, mode=0o600)
        what: dict[str, Any] = {"noise": release.noise} if release.noise else {}
        if release.image is not None:
            event, count = release.image
            what |= {"image": [*event, count]}
        self.journal.append(SPENT, data=self.data, question=question, reply=digest, run=run, **what)
        self._forget(run, question)

    def _forget(self, run: str, question: str) -> None:
        """Remove the kept replies to earlier questions of a run, which are over."""
        for entry in self.journal.entries():
            if entry.get("run") == run and entry.get("question") != question:
                self._reply(entry["question"]).unlink(missing_ok=True)

    def _reply(self, question: str) -> Path:
        return self.folder / f"reply-{question[:32]}.bin"


def _refuse_beyond(
    whose: str, key: str, spent: float, after: float, limit: float, delta: float
) -> None:
    # Written with `not`, so that a NaN is refused: comparisons with NaN are false.
    if not after <= limit:
        raise UserError(
            f"this node's {whose} have spent epsilon {spent:.3g} at delta {delta:g}, and one more "
            f"round would make it {after:.3g}, above the policy's {key}={limit:g}."
        )


def spent_epsilon(folder: Path, delta: float) -> dict[str, tuple[int, float]]:
    """The number of releases and epsilon of every data folder in a node's ledger.

    Raises:
        UserError: the ledger has been changed, or the accountant is not installed.
    """
    found = {n: (book.releases().total(), book.epsilon(delta)) for n, book in _books(folder)}
    return {name: spent for name, spent in found.items() if spent[0]}


def spent_image_epsilon(folder: Path, delta: float) -> dict[str, tuple[int, float]]:
    """As `spent_epsilon`, for single images."""
    found = {
        n: (book.image_releases().total(), book.image_epsilon(delta)) for n, book in _books(folder)
    }
    return {name: spent for name, spent in found.items() if spent[0]}


def _books(folder: Path) -> list[tuple[str, Ledger]]:
    data = {e["data"] for e in verify(folder / FILE, WHAT) if e["event"] == SPENT}
    return [(name, Ledger(folder, name)) for name in sorted(data)]
