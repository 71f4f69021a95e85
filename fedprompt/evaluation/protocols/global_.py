"""One model for all clients, tested on the server's test images; on by default.

The server measures it in every evaluated round (`Federation.evaluate`), not here. The results are
the key `global` of every metrics line and of the summary, and the tables and figures of all runs
show them. Without this protocol, the shared prompts are not tested on the server's test set.

The file's name has an underscore because `global` is a keyword of Python.
"""

from __future__ import annotations

from fedprompt.evaluation.protocol import NoOptions, Protocol


class Global(Protocol):
    """The shared prompts alone on the server's test images: accuracy over images."""

    name = "global"
    title = "Global model"
    needs_global = True
    Options = NoOptions
    multi_label = True
