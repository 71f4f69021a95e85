"""Flower's ClientApp of a node. Flower starts a new process with it for every message.

If the node's settings name a `worker`, this process only passes the message to that worker and the
reply back, so that PyTorch, CLIP and the features are loaded once and not for every message.
Without a worker it answers the message itself, more slowly but with the same result. Imports of
PyTorch must therefore stay inside the function that needs them.
"""

from __future__ import annotations

import sys

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedprompt.deploy.worker_client import WorkerUnavailable, ask_worker

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train this node's client on its images."""
    return _answer(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Test this node's personal model on its test images."""
    return _answer(message, context)


@app.query()
def query(message: Message, context: Context) -> Message:
    """Report which client this node is and how many images it has."""
    return _answer(message, context)


def _answer(message: Message, context: Context) -> Message:
    # Plain dictionaries, because the worker receives them as JSON.
    settings = dict(context.node_config), dict(context.run_config), context.run_id, context.state
    worker = str(context.node_config.get("worker", ""))
    if worker:
        try:
            return ask_worker(worker, message, *settings)
        except WorkerUnavailable as reason:
            sys.stderr.write(
                f"fedprompt: the worker at {worker} cannot be reached ({reason}); this process "
                "answers the message itself, which is slower\n"
            )
    from fedprompt.deploy.node import answer  # loads PyTorch

    return answer(message, *settings)
