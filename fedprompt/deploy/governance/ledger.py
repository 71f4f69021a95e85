"""How much privacy a node's data have spent, over all experiments. Runs on the node.

The mechanism is the noise that the node adds itself (`fedprompt.privacy.local_noise`): one Gaussian
release for every round in which it has trained. Releases of all experiments on the same data
compose (Mironov, 2017, Renyi differential privacy). What epsilon does not cover is listed there,
above all the counts of correct answers, which `test_accuracy: false` in the policy withholds.

A release is spent before it leaves. A node that is killed between the two has spent it, but not
twice: the reply is kept on the node, and the same question gets the same bytes again, which reveals
nothing new.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from fedprompt.config.protection import PrivacyConfig
from fedprompt.deploy.governance.journal import Journal, verify
from fedprompt.errors import UserError
from fedprompt.files import write_bytes
from fedprompt.privacy.accountant import composed_epsilon

FILE = "privacy.jsonl"
WHAT = "privacy ledger"
SPENT = "spent"


@dataclass(frozen=True)
class Budget:
    """The most epsilon that may be spent, at a delta."""

    epsilon: float
    delta: float


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
            entry["noise"]
            for entry in entries
            if entry["event"] == SPENT and entry["data"] == self.data
        )

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

    def check(self, privacy: PrivacyConfig, budget: Budget) -> None:
        """Refuse a release that would exceed the budget.

        Raises:
            UserError: it would, the ledger has been changed, or the accountant is not installed.
        """
        delta = budget.delta
        after = self.epsilon(delta, more=multiplier(privacy))
        # Written with `not`, so that a NaN is refused: comparisons with NaN are false.
        if not after <= budget.epsilon:
            raise UserError(
                f"this node's data have spent epsilon {self.epsilon(delta):.3g} at delta "
                f"{delta:g}, and one more round would make it {after:.3g}, above the policy's "
                f"max_epsilon={budget.epsilon:g}."
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
        self, question: str, reply: bytes, privacy: PrivacyConfig, run: str, budget: Budget
    ) -> None:
        """Count a release; when this returns, its reply may leave.

        The same question is counted once, because its reply is kept.

        Args:
            question: identifies the question.
            reply: the bytes that are about to leave, or of which only a masked form leaves.
            privacy: the experiment's noise.
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
                self._spend(question, reply, digest, privacy, run, budget)
        except OSError as error:
            raise UserError(
                f"cannot write to {self.folder}: {error.strerror}; nothing was released."
            ) from None

    def _spend(
        self,
        question: str,
        reply: bytes,
        digest: str,
        privacy: PrivacyConfig,
        run: str,
        budget: Budget,
    ) -> None:
        spent = {(e.get("question"), e.get("reply")) for e in self.journal.entries()}
        if (question, digest) in spent:
            return
        # Again, because other releases may have been counted while this one was trained.
        self.check(privacy, budget)
        # First the reply: a release that is counted can then be repeated with the same bytes.
        write_bytes(self._reply(question), reply, mode=0o600)
        self.journal.append(
            SPENT, data=self.data, noise=multiplier(privacy), question=question, reply=digest,
            run=run,
        )  # fmt: skip
        self._forget(run, question)

    def _forget(self, run: str, question: str) -> None:
        """Remove the kept replies to earlier questions of a run, which are over."""
        for entry in self.journal.entries():
            if entry.get("run") == run and entry.get("question") != question:
                self._reply(entry["question"]).unlink(missing_ok=True)

    def _reply(self, question: str) -> Path:
        return self.folder / f"reply-{question[:32]}.bin"


def multiplier(privacy: PrivacyConfig) -> float:
    """The noise multiplier of a node's release, relative to twice the clip (local_noise.py)."""
    return privacy.noise / 2


def spent_epsilon(folder: Path, delta: float) -> dict[str, tuple[int, float]]:
    """The number of releases and epsilon of every data folder in a node's ledger.

    Raises:
        UserError: the ledger has been changed, or the accountant is not installed.
    """
    data = sorted({e["data"] for e in verify(folder / FILE, WHAT) if e["event"] == SPENT})
    ledgers = {name: Ledger(folder, name) for name in data}
    return {n: (ledger.releases().total(), ledger.epsilon(delta)) for n, ledger in ledgers.items()}
