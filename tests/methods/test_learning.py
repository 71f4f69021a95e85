"""On the embedded scenes, the test loss of a method falls within a few rounds.

The loss decides, because accuracies on 80 images differ by several images by chance.
"""

from __future__ import annotations

from typing import Any

import pytest

from fedprompt.experiment.workspaces import ResourceCache, open_workspace
from fedprompt.federation.server_app import Federation
from fedprompt.scoring import score_global
from fedprompt.simulation.inline_grid import InlineGrid
from tests.support.builders import small_config

METHODS: dict[str, dict[str, Any]] = {
    "afl": {},
    "tofa": {},
    # From near zero, the residual learns first, and the global model has none.
    "fedsept": {"context_tokens": 4, "init_std": 0.2},
    "locoop": {"context_tokens": 4},
    "fedlocoop": {"context_tokens": 4},
    "fedgallop": {},
    "focoop": {"context_tokens": 4, "negatives": 10, "global_share": 0.5},
    "lora": {"text_layers": 2},
    "gpr_niam": {"context_tokens": 4},
    "flora": {"context_tokens": 4, "bottleneck": 2},
    "mocoop": {},
    "biomedcoop": {},
    "pre": {},
    "ove_pg": {},
    "palm": {},
    "prompt_bank": {"pairs": 3},
    "bbt": {},
    "rebapl": {"options": {"context_tokens": 4}, "cycles": 2},
    "pre_forgettable": {},
    "copl": {},
    "sabre_fl": {"options": {"context_tokens": 4}},
    "gopro": {},
    "fedmvp": {},
    "adclip": {},
    "coprompt": {"context_tokens": 2, "depth": 2},
    "tfup_t": {},
    "ctp_tft": {},
    "fdbpl": {"label_weight": 1.0},
    "restore": {"depth": 2},
    "promptkd": {"visual_depth": 2},
    "plpp": {"options": {"context_tokens": 4}},
    "gram": {"options": {"context_tokens": 4}},
    "plan": {"text_depth": 1, "visual_depth": 1, "text_tokens": 2, "visual_tokens": 2},
    "fedapt": {"context_tokens": 4, "domains": 2},
    "trip": {"context_tokens": 2, "experts": 2},
    "dualprompt_rs": {"depth": 3},
    "decoupled_dpl": {"text_depth": 2, "visual_depth": 2},
}
"""The methods, with the keys that make a run short."""
TRAINING: dict[str, dict[str, Any]] = {
    # Smaller steps along noisy estimates lead nowhere in so few.
    "bbt": {"lr": 0.05},
    "fedsept": {"lr": 0.02},
    "rebapl": {"optimizer": "sgd", "lr": 0.1},
}
"""What some methods need instead of Adam at 0.01."""
ROUNDS = 4
DATA = {
    "images_per_class": 8,
    "domains": ["delta"],
    "test_fraction": 0.5,
    "descriptions": "aerial_scenes",
}
RESOURCES = ResourceCache()


@pytest.mark.parametrize("name", METHODS)
def test_the_global_model_learns(name: str) -> None:
    config = small_config(
        method={"name": name, **METHODS[name]},
        strategy={"name": "auto"},
        data=DATA,
        partition={"clients": 2, "alpha": 10.0, "local_test_fraction": 0.0},
        training={"lr": 0.01, "batch_size": 20, "optimizer": "adam", "weight_decay": 0.0}
        | TRAINING.get(name, {}),
        federation={"rounds": ROUNDS},
    )
    workspace = open_workspace(config, resources=RESOURCES)
    federation = Federation(workspace, InlineGrid(workspace))
    federation.join()
    inputs, labels = workspace.server_test()
    first = score_global(workspace.method, federation.shared, inputs, labels)
    for server_round in range(1, ROUNDS + 1):
        federation.train_round(server_round)
    last = score_global(workspace.method, federation.shared, inputs, labels)
    assert first is not None
    assert last is not None
    assert last.loss_sum < 0.95 * first.loss_sum
