"""Multi-Krum: the mean of the updates that lie closest to most others.

Source: Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent (Blanchard et al.,
NeurIPS 2017), section 4. The scores, and how we differ, are in `krum.py`. The paper leaves open how
many updates are averaged; here it is n - f of n, where f clients are expected to attack.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedprompt.config.fields import option

from .krum import Krum, KrumConfig


@dataclass(frozen=True)
class MultiKrumConfig(KrumConfig):
    """As `KrumConfig`; `attackers` is also the share of updates that are left out."""

    name: str = option("multi_krum", "strategy name")


class MultiKrum(Krum):
    """Mean of the n - f updates with the lowest scores; all of them have the same weight."""

    name = "multi_krum"
    Config = MultiKrumConfig

    def num_selected(self, clients: int, attackers: int) -> int:
        """All but the expected attackers."""
        return clients - attackers
