"""The two protocols of every run by default: one model for all, and one model per client.

Their results have their own keys in every metrics line and in the summary (`global`, `personal`,
`personal_on_global`); tables and figures of all runs show them. Without `global` the shared prompts
are not tested on the server's test set; without `personalised` no client tests its own model, and
there is no local-only baseline.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedprompt.evaluation.protocol import Protocol


@dataclass(frozen=True)
class NoOptions:
    """Nothing to choose; what the two have in common is the section `evaluation`."""


class Global(Protocol):
    """The shared prompts alone on the server's test images: accuracy over images."""

    name = "global"
    title = "Global model"
    needs_global = True
    Options = NoOptions


class Personalised(Protocol):
    """Each client's own model on its own test images: every client counts once.

    Mean, standard deviation (divide by n), worst client, 10th percentile (interpolated).
    """

    name = "personalised"
    title = "Personalised models"
    Options = NoOptions
