"""The stages of a run in which labels or classes arrive over time.

A run with `partition.labels_per_round` is divided into active rounds (`queries.py`), one with
`partition.sessions` into sessions (`sessions.py`), and one with `partition.relabel_every` into the
phases of pseudo-labels (`pseudo_labels.py`), all of equally many communication rounds, except that
the last phase may end early. Any other run is a single stage. Local training counts its rounds
within a stage, so the schedule of the learning rate runs through in each of them.
"""

from __future__ import annotations

from typing import NamedTuple

from fedprompt.config.schema import Config
from fedprompt.rng import generator


class Stage(NamedTuple):
    """Where a round lies.

    Attributes:
        number: its active round, session or phase, from 1.
        server_round: the round within the stage, from 1.
        rounds: rounds of each stage.
        seed: the seed of local training in it.
    """

    number: int
    server_round: int
    rounds: int
    seed: int

    @property
    def begins(self) -> bool:
        """Whether the round is the first of its stage."""
        return self.server_round == 1


def stage_of(config: Config, server_round: int) -> Stage:
    """Where a round lies.

    Args:
        config: the experiment.
        server_round: the round, from 1.
    """
    partition, total = config.partition, config.federation.rounds
    if partition.labels_per_round:
        rounds, purpose = total // partition.active_rounds, "active round"
    elif partition.sessions:
        rounds, purpose = total // partition.sessions, "session"
    elif config.relabel_every:
        rounds, purpose = config.relabel_every, "phase"
    else:
        return Stage(1, server_round, total, config.seed)
    index, within = divmod(server_round - 1, rounds)
    # Draws are keyed by seed and round, and noise of one stage must not come again in the next.
    seed = int(generator(config.seed, purpose, index).integers(10**18)) if index else config.seed
    return Stage(index + 1, within + 1, rounds, seed)
