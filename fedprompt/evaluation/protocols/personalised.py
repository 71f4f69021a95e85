"""One model per client, tested on the client's own test images; on by default.

The clients measure it in every evaluated round, when the server asks them to evaluate, not here.
The results are the keys `personal` and `personal_on_global` of every metrics line and of the
summary, and the tables and figures of all runs show them. Without this protocol, no client tests
its own model, and there is no local-only baseline.
"""

from __future__ import annotations

from fedprompt.evaluation.protocol import NoOptions, Protocol


class Personalised(Protocol):
    """Each client's personal model on the client's own test images; every client counts once.

    The results are the mean, the standard deviation (with divisor n - 1), the worst client, and the
    10th percentile (interpolated).
    """

    name = "personalised"
    title = "Personalised models"
    Options = NoOptions
    multi_label = True
