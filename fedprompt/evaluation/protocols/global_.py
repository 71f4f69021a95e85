"""One model for all clients, tested on the server's test images; on by default.

The results have keys of their own (`global`) in every metrics line and in the summary, and the
tables and figures of all runs show them. Without this protocol the shared prompts are not tested
on the server's test set.
"""

from __future__ import annotations

from fedprompt.evaluation.protocol import NoOptions, Protocol


class Global(Protocol):
    """The shared prompts alone on the server's test images: accuracy over images."""

    name = "global"
    title = "Global model"
    needs_global = True
    Options = NoOptions
