"""What one local step of every method may cost a device, on towers of two layers.

A step of ViT-B/16 starts more kernels, because its towers have twelve layers; copies and waits are
the same. Launches cost about 5 microseconds each, whatever they compute, and most steps of prompt
learning compute less than that; a wait empties the device's queue, which costs more.

Lower a number when a change lowers the cost. A higher number needs a reason beside it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from tests.support.device_lives import Cost


@dataclass(frozen=True)
class Budget:
    """The most that some part of a round may cost.

    Attributes:
        launches: kernels, rounded up to the next multiple of 5.
        copies: copies between host and device, in both directions.
        waits: waits of the host for the device.
    """

    launches: int
    copies: int = 0
    waits: int = 0


STEP = {
    "clip_adapter": Budget(70, 4),
    "cocoop": Budget(195, 4),
    "coop_csc": Budget(155, 6, 0),
    "coop_local": Budget(170, 4),
    "ditto": Budget(345, 4),
    "dp2fl": Budget(300, 6, 0),
    "dp_fpl": Budget(280, 5, 0),
    "fedclip": Budget(110, 4),
    "fedcocoop": Budget(195, 4),
    "feddda": Budget(300, 8, 0),
    "fedkgcoop": Budget(200, 4),
    "fedmaple": Budget(290, 6, 0),
    "fedmgp": Budget(940, 6, 0),
    "fedotp": Budget(570, 5, 20),
    "fedper": Budget(175, 4),
    "fedpgp": Budget(395, 5, 0),
    "fedpha": Budget(550, 10, 2),
    "fedprox": Budget(185, 4),
    "fedrsclip": Budget(325, 4),
    "fedtpg": Budget(295, 4),
    "ivlp": Budget(280, 6, 0),
    "kgcoop": Budget(200, 4),
    "maple": Budget(290, 6, 0),
    "pfedmma": Budget(445, 8, 0),
    "pfedmoap": Budget(345, 4, 1),
    "pfedprompt": Budget(170, 4),
    "plot": Budget(725, 5, 30),
    "proda": Budget(605, 11, 1),
    "prograd": Budget(275, 4),
    "promptfl": Budget(170, 4),
    "promptfolio": Budget(180, 4),
    "promptsrc": Budget(340, 6),
    "scaffold": Budget(185, 4),
    "vpt": Budget(135, 6, 0),
}
"""By method; methods that learn nothing have no steps."""


def exceeded(cost: Cost, budget: Budget) -> list[str]:
    """What a cost exceeds of a budget, each with the lines or operations to look at."""
    parts = [
        ("launches", cost.launches, budget.launches),
        ("copies", cost.uploads + cost.downloads, budget.copies),
        ("waits", cost.waits, budget.waits),
    ]
    return [
        f"{name}: {spent.total()} instead of {most}, {_largest(spent)}"
        for name, spent, most in parts
        if spent.total() > most
    ]


def _largest(spent: Counter[str]) -> str:
    return ", ".join(f"{count} x {where}" for where, count in spent.most_common(12))
