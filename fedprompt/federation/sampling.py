"""Which clients a federation has, which can train, which train in a round, and which attack.

Runs on the server, at the start of every round, through the strategy (`SharedPromptStrategy.sample`
and `set_nodes`). The attackers are those of a simulation.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from fedprompt.rng import generator


class Clients:
    """The clients that a federation reaches at present, and their Flower nodes.

    Args:
        node_of_client: Flower's node id of every client.
        trainable: ids of the clients that have labelled images; None if all of them have.
        present: ids of the trainable clients that can be asked at present; None for all of them.
    """

    def __init__(
        self,
        node_of_client: Mapping[int, int],
        trainable: Collection[int] | None = None,
        present: Collection[int] | None = None,
    ) -> None:
        # Sorted, because draws are made by position and must not depend on the order of joining.
        self.node_of_client = dict(sorted(node_of_client.items()))
        self.client_of_node = {node: client for client, node in self.node_of_client.items()}
        self.ids = list(self.node_of_client)
        able = self.ids if trainable is None else trainable
        self.trainable = sorted(set(self.ids) & set(able))
        self.present = self.trainable if present is None else sorted(set(present) & set(able))


def draw_clients(clients: Clients, *, seed: int, server_round: int, fraction: float) -> list[int]:
    """Ids of the clients that train in a round, ascending.

    Flower's node ids are random, so the draw is made among client ids. It depends on the seed and
    the round only, and is therefore the same after a resume.

    Args:
        clients: the known clients.
        seed: seed of the run.
        server_round: the round, from 1.
        fraction: share of the trainable clients, in (0, 1]; at least one client is drawn. Fewer
            are if so many are not present.
    """
    # Only trainable clients count, so that unlabelled ones do not enlarge the sample.
    count = max(1, round(fraction * len(clients.trainable)))
    # Keyed by the round, so that a resumed run draws the clients of an uninterrupted one.
    return choose(clients.present, count, seed, "sample", server_round)


def choose(among: Sequence[int], count: int, seed: int, *purpose: str | int) -> list[int]:
    """Draw some of the clients, ascending; all of them if there are no more.

    Args:
        among: client ids, ascending.
        count: how many to draw.
        seed: seed of the run.
        purpose: what the draw is for, as in `fedprompt.rng.generator`.
    """
    if count >= len(among):
        return list(among)
    drawn = generator(seed, *purpose).choice(np.array(among, np.int64), size=count, replace=False)
    return sorted(int(c) for c in drawn)


def attackers(seed: int, among: Sequence[int], share: float) -> frozenset[int]:
    """Draw the clients of a simulation that attack; they are the same in every round.

    Args:
        seed: the experiment's seed.
        among: ids of the clients that may train, ascending. One that joins after training, or has
            no labels to train on, would never send an attack.
        share: fraction of these clients that attack; their number is rounded.

    Returns:
        The ids of the attackers.
    """
    count = round(share * len(among))
    # Drawn once per seed: an attacker stays an attacker in every round and after a resume.
    draw = generator(seed, "attackers")
    drawn = draw.choice(np.array(among, np.int64), size=count, replace=False)
    return frozenset(int(c) for c in drawn)
