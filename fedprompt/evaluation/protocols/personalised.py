"""One model per client, tested on the client's own test images; on by default.

The results have keys of their own (`personal`, `personal_on_global`) in every metrics line and in
the summary, and the tables and figures of all runs show them. Without this protocol, no client
tests its own model and there is no local-only baseline.
"""

from __future__ import annotations

from fedprompt.evaluation.protocol import NoOptions, Protocol


class Personalised(Protocol):
    """Each client's own model on its own test images: every client counts once.

    Mean, standard deviation (divide by n), worst client, 10th percentile (interpolated).
    """

    name = "personalised"
    title = "Personalised models"
    Options = NoOptions
