"""Flower's ClientApp of a node.

Flower starts a new process for every message. Where the node's settings name a `worker`, this
process only carries the message there and the reply back, so that PyTorch, CLIP and features are
loaded once and not for every message; without one it does the work itself, with the same result.
"""

from __future__ import annotations

import sys

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedprompt.deploy.worker_client import WorkerAway, carry

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Local training on this node's client."""
    return _answer(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Test this node's personal model."""
    return _answer(message, context)


@app.query()
def query(message: Message, context: Context) -> Message:
    """Say which client this node is and what it has."""
    return _answer(message, context)


def _answer(message: Message, context: Context) -> Message:
    settings = dict(context.node_config), dict(context.run_config), context.run_id, context.state
    worker = str(context.node_config.get("worker", ""))
    if worker:
        try:
            return carry(worker, message, *settings)
        except WorkerAway as reason:
            sys.stderr.write(f"fedprompt: no worker at {worker} ({reason}); doing without\n")
    from fedprompt.deploy.node import answer  # late: it loads PyTorch

    return answer(message, *settings)
