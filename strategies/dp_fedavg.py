"""DP-FedAvg: client-level differential privacy by clipping and Gaussian noise on the server.

Source: Learning Differentially Private Recurrent Language Models (McMahan et al., ICLR 2018, arXiv
1710.06963): w <- w + (sum_k Delta_k min(1, S / |Delta_k|) + N(0, z^2 S^2 I)) / m, with the norm
over all shared tensors together (flat clipping). All clients have the same weight, and m is the
number of clients that were asked, not of those that replied.

Neighbouring runs differ in one client's replies, which in one of them are missing or invalid; which
clients exist and who is asked is public. One client then changes the sum by at most S, because
nothing about it decides whether others count: neither the number of images that it claims
(`max_examples_ratio` has no effect), nor whether it replies. Noise is therefore added and sent in
every round, even if no reply is valid, and `min_replies` above 1 is refused.

Accounting: `RdpAccountant` of Google's dp-accounting (Renyi DP). A client pays for every
round in which it was asked; `epsilon` is that of the client that was asked most often. A round that
a resumed run repeats with other replies, and so with other noise, is paid for twice: the server
records every release before it leaves (fedprompt/privacy/releases.py). No amplification by sampling
is claimed: who takes part follows from the run's seed, which clients know.

What is covered: the shared tensors, against everybody except the server. What is not covered: the
losses and evaluations that clients report and the share of clipped changes, which the server keeps
in its run folder, and personal models.

The noise comes from a secret key that is drawn from the operating system and saved in the
checkpoint, which must be kept secret as well; noise from the run's seed could be subtracted by
anybody who knows the config. The noise is also keyed by the sum that it hides: a repeated round
gives the same bits if the replies are the same, and fresh noise if not. `noise_seed` fixes the key,
for tests. There is no defence against floating-point attacks on the noise (Mironov, CCS 2012).
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedprompt.config.fields import option
from fedprompt.errors import UserError
from fedprompt.federation.screening import Update
from fedprompt.federation.strategy import SharedPromptStrategy, StrategyConfig
from fedprompt.messages import Arrays
from fedprompt.privacy.accountant import epsilon

from .parts.vectors import Rows, changes, clipped, moved, norms

KEY, ASKED = "key", "asked"
"""Names in the state: the noise's secret key, and (client, rounds asked) pairs."""


@dataclass(frozen=True)
class DPFedAvgConfig(StrategyConfig):
    """Flat clipping and noise; with `noise` 0, changes are clipped and nothing is private."""

    name: str = option("dp_fedavg", "strategy name")
    clip: float = option(1.0, "largest L2 norm S of a client's change", gt=0)
    noise: float = option(1.0, "noise multiplier z: standard deviation over S", ge=0)
    delta: float = option(1e-5, "delta that epsilon is given for", gt=0, lt=1)
    max_epsilon: float | None = option(
        None, "budget: a round that would exceed it leaves the prompts as they are", gt=0
    )
    noise_seed: int | None = option(
        None, "fixes the noise, which is then no secret; null = from the operating system"
    )


class DPFedAvg(SharedPromptStrategy):
    """The mean of clipped changes plus noise, and the epsilon that it has cost.

    Raises:
        UserError: there is noise, and its accountant is not installed or `min_replies` is above 1.
    """

    name = "dp_fedavg"
    steps_without_replies = True
    secret_state = True
    Config = DPFedAvgConfig
    config: DPFedAvgConfig
    remembers_clients = True

    def __init__(self, config: Any, **options: Any) -> None:
        super().__init__(config, **options)
        if self.config.noise and self.min_replies > 1:
            raise UserError(
                f"federation.min_replies is {self.min_replies}, but strategy 'dp_fedavg' must not "
                "let the number of replies decide whether a round counts: the prompts would show "
                "whether a single client has replied. Set federation.min_replies=1."
            )
        seed = self.config.noise_seed
        key = secrets.token_bytes(32) if seed is None else hashlib.sha256(b"%d" % seed).digest()
        self._key = np.frombuffer(key, np.uint8).copy()
        self._asked: dict[int, int] = {}
        self._clipped: float | None = None
        self.epsilon: float | None = epsilon(self.config.noise, 0, self.config.delta)

    @property
    def weights_by_examples(self) -> bool:
        """Never: a client's claim must not change anything."""
        return False

    def aggregate(self, server_round: int, shared: Arrays, updates: list[Update]) -> Arrays:
        """One noisy step, or none if it would exceed the budget."""
        config = self.config
        self._clipped = None
        if not self.sampled:
            # Nobody could be asked, so nothing is released and there is no sum to divide.
            return shared
        rows_UP = changes(shared, updates)
        sum_P = clipped(rows_UP, config.clip).sum(axis=0)
        tag, asked = self._tag(server_round, sum_P), self._asked_so_far()
        if not self.releases.has("server", server_round, tag):
            # Every client that was asked pays, whether or not its reply counted.
            asked = asked | {c: asked.get(c, 0) + 1 for c in self.sampled}
        # Checked before the noise is drawn: a refused step costs nothing.
        spent = epsilon(config.noise, max(asked.values(), default=0), config.delta)
        if config.max_epsilon is not None and (spent is None or spent > config.max_epsilon):
            return shared
        if config.noise:
            self.releases.add("server", server_round, self.sampled, tag)
        self._asked, self.epsilon = asked, spent
        self._clipped = float((norms(rows_UP) > config.clip).mean()) if updates else None
        noise_P = config.noise * config.clip * self._normal(server_round, sum_P)
        # w <- w + (sum_k Delta_k min(1, S / |Delta_k|) + N(0, z^2 S^2 I)) / m. If m were the number
        # of replies, single clients could change it, which the accounting does not cover.
        return moved(shared, (sum_P + noise_P) / len(self.sampled))

    def metrics(self) -> dict[str, Any]:
        """Epsilon so far (null without noise), its delta, and the share of clipped changes."""
        return {
            "epsilon": self.epsilon,
            "delta": self.config.delta,
            "releases": max(self._asked.values(), default=0),
            "clipped_share": self._clipped,
        }

    def state(self) -> Arrays:
        """The key of the noise and how often each client was asked."""
        pairs = np.array(sorted(self._asked.items()), dtype=np.int64).reshape(-1, 2)
        return {KEY: self._key, ASKED: pairs}

    def load_state(self, state: Arrays) -> None:
        """Restore what `state` has returned."""
        self._key = state[KEY].copy()
        self._asked = {int(client): int(rounds) for client, rounds in state[ASKED]}
        self._asked = self._asked_so_far()
        most = max(self._asked.values(), default=0)
        self.epsilon = epsilon(self.config.noise, most, self.config.delta)

    def _asked_so_far(self) -> dict[int, int]:
        """How often each client was asked, in releases that a crash has undone as well."""
        asked = dict(self._asked)
        # The record is ahead of the state if the run ended between a release and its checkpoint.
        for client, releases in self.releases.by_client("server").items():
            asked[client] = max(releases, asked.get(client, 0))
        return asked

    def _normal(self, server_round: int, sum_P: Rows) -> NDArray[np.float64]:
        """Standard normal numbers (P,) keyed by the secret, the round and the sum itself."""
        parts = (self._key.tobytes(), server_round.to_bytes(8, "little"), sum_P.tobytes())
        digest = hashlib.sha256(b"".join(parts)).digest()
        draw = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))
        return draw.standard_normal(len(sum_P))

    def _tag(self, server_round: int, sum_P: Rows) -> str:
        """Names the noise of a round; without the secret key it says nothing about the sum."""
        about = b"tag of the noise" + server_round.to_bytes(8, "little") + sum_P.tobytes()
        return hmac.digest(self._key.tobytes(), about, "sha256").hex()[:32]
