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
    "bbt": Budget(100),
    "adclip": Budget(255),
    "anomalyclip": Budget(180),
    "biomedcoop": Budget(135),
    "clip_adapter": Budget(60),
    "cocoop": Budget(105),
    "coop_csc": Budget(145),
    "coop_local": Budget(90),
    "copl": Budget(115),
    "coprompt": Budget(315),
    "ctp_tft": Budget(230),
    "decoupled_dpl": Budget(205),
    "ditto": Budget(175),
    "dp2fl": Budget(225),
    "dp_fpl": Budget(200),
    "dualprompt_rs": Budget(235),
    "fdbpl": Budget(210),
    "fedclip": Budget(95),
    "fedcocoop": Budget(105),
    "fedapt": Budget(170),
    "feddeap": Budget(405),
    "fedcopl": Budget(190),
    "feddda": Budget(200),
    "fedkgcoop": Budget(115),
    "fedmaple": Budget(215),
    "fedmgp": Budget(845),
    "fedmvp": Budget(260),
    "fedotp": Budget(500, 0, 2),
    "fedper": Budget(90),
    "fedpgp": Budget(170),
    "fedpha": Budget(310),
    "fedprox": Budget(100),
    "fedgallop": Budget(265),
    "fedlapt": Budget(165),
    "fedlocoop": Budget(120),
    "fedrsclip": Budget(140),
    "fedsept": Budget(160),
    "focoop": Budget(665),  # eight steps of ascent, each with a gradient of its own
    "fedtpg": Budget(165),
    "gopro": Budget(255),
    "flora": Budget(220),
    "gpr_niam": Budget(105),
    "gram": Budget(180),
    "ivlp": Budget(205),
    "kgcoop": Budget(115),
    "locoop": Budget(120),
    "lora": Budget(150),
    "maple": Budget(215),
    "mocoop": Budget(280),
    "ove_pg": Budget(145),
    "palm": Budget(60),
    "pfedmma": Budget(410),
    "pfedmoap": Budget(180),
    "pfedprompt": Budget(90),
    "plot": Budget(590, 0, 3),
    "plpp": Budget(225),
    "pre": Budget(335),
    "pre_forgettable": Budget(295),
    "proda": Budget(375, 2),  # a tower plans its classes once per number of contexts
    "prograd": Budget(155),
    "promptfl": Budget(90),
    "promptfolio": Budget(95),
    "prompt_bank": Budget(115),
    "promptkd": Budget(165),
    "promptsrc": Budget(255),
    "restore": Budget(340),
    "rebapl": Budget(250),
    "sabre_fl": Budget(90),
    "scaffold": Budget(100),
    "tfup_t": Budget(95),
    "spg": Budget(365),
    "plan": Budget(370),
    "trip": Budget(110),
    "vpt": Budget(130),
}
"""By method; methods that learn nothing have no steps."""
COPIES_PER_ROUND = 4
"""What the local training of a round may copy in both directions, whatever its number of steps."""
MORE_COPIES = {"proda": 10, "promptsrc": 30, "fedlapt": 40, "focoop": 30}
"""Methods with many text towers, whose indices are copied once per process; the last two also
choose their words at the first use."""
DEEP_STEP = 350
"""Launches of a step of PromptFL and FedRSCLIP on text towers of twelve layers, as in ViT-B/16."""


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
