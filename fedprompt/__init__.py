"""Federated prompt learning for CLIP: Flower clients with shared and private prompts.

From Python, for example in a notebook:

    import fedprompt

    result = fedprompt.run("quickstart", method="promptfl", seed=2, **{"federation.rounds": 3})
    print(result.table())
    result.metrics                    # one dict per round: pandas.DataFrame(result.metrics)
    result.classifier(client=0).predict(["image.png"])

    fedprompt.methods.names()         # likewise fedprompt.strategies, .protocols and .data
    fedprompt.methods.get("promptfl")

Everything is imported when it is first used: `import fedprompt` itself does not import PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedprompt import data, methods, strategies
    from fedprompt.errors import StopRun, UserError
    from fedprompt.evaluation import protocols
    from fedprompt.experiment.api import Result, compose, resume, run
    from fedprompt.sweeps.api import SweepResult, sweep

__version__ = "0.1.0"
__all__ = [
    "Result",
    "StopRun",
    "SweepResult",
    "UserError",
    "compose",
    "data",
    "methods",
    "protocols",
    "resume",
    "run",
    "strategies",
    "sweep",
]

_MEMBERS = {
    "Result": "fedprompt.experiment.api",
    "compose": "fedprompt.experiment.api",
    "resume": "fedprompt.experiment.api",
    "run": "fedprompt.experiment.api",
    "SweepResult": "fedprompt.sweeps.api",
    "sweep": "fedprompt.sweeps.api",
    "StopRun": "fedprompt.errors",
    "UserError": "fedprompt.errors",
}
"""The module that defines each class and function offered here."""
_PACKAGES = {
    "data": "fedprompt.data",
    "methods": "fedprompt.methods",
    "protocols": "fedprompt.evaluation.protocols",
    "strategies": "fedprompt.strategies",
}


def __getattr__(name: str) -> Any:
    if name in _MEMBERS:
        value: Any = getattr(importlib.import_module(_MEMBERS[name]), name)
    elif name in _PACKAGES:
        value = importlib.import_module(_PACKAGES[name])
    else:
        raise AttributeError(f"module 'fedprompt' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
