"""What we use of Flower's private modules, where, and what stops working without it.

Flower promises stability for its public packages only. When a new version removes or renames one of
the names below, this is the test that fails, and it says what is affected.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT

PUBLIC = ("flwr.app", "flwr.serverapp", "flwr.clientapp", "flwr.simulation")
"""Flower's public packages; `flwr.serverapp.strategy` is a public part of one of them."""

MESSAGES = "fedprompt/messages/flower.py"
SECURE_AGGREGATION = "fedprompt/privacy/secure_aggregation/flower.py"

BYTES = "messages have no bytes: no grid works, and a node cannot talk to its worker process"
IDENTITY = "no message can be created outside of a running Flower app: no simulation works"
MASKS = "secure aggregation is refused with a message; everything else works"

BREAKS: dict[tuple[str, str], str] = {
    (MESSAGES, "flwr.common.serde.message_from_proto"): BYTES,
    (MESSAGES, "flwr.common.serde.message_to_proto"): BYTES,
    (MESSAGES, "flwr.common.serde.recorddict_from_proto"): BYTES,
    (MESSAGES, "flwr.common.serde.recorddict_to_proto"): BYTES,
    (MESSAGES, "flwr.common.serde_utils.metadata_to_proto"): BYTES,
    (MESSAGES, "flwr.proto.message_pb2.Message"): BYTES,
    (MESSAGES, "flwr.proto.recorddict_pb2.RecordDict"): BYTES,
    (MESSAGES, "flwr.supercore.run.Run"): "our grids cannot implement `Grid.run`: none works",
    (MESSAGES, "flwr.supercore.task_identity.TaskIdentity"): IDENTITY,
    **{
        (SECURE_AGGREGATION, name): MASKS
        for name in (
            "flwr.client.mod.secaggplus_mod",
            "flwr.client.mod.secure_aggregation.secaggplus_mod.SecAggPlusState",
            "flwr.common.Code",
            "flwr.common.FitRes",
            "flwr.common.Status",
            "flwr.common.bytes_to_ndarray",
            "flwr.common.ndarrays_to_parameters",
            "flwr.common.secure_aggregation.crypto.shamir.combine_shares",
            "flwr.common.secure_aggregation.crypto.symmetric_encryption.generate_shared_key",
            "flwr.common.secure_aggregation.secaggplus_constants.Key",
            "flwr.common.secure_aggregation.secaggplus_constants.RECORD_KEY_STATE",
            "flwr.common.secure_aggregation.secaggplus_utils.pseudo_rand_gen",
            "flwr.compat.common.recorddict_compat.fitres_to_recorddict",
            "flwr.supercore.primitives.asymmetric.bytes_to_private_key",
            "flwr.supercore.primitives.asymmetric.bytes_to_public_key",
        )
    },
}
"""What stops working without a private name, by the module of ours that imports it."""

ATTRIBUTES = ("_message_id",)
"""Private attributes of a message's metadata that `messages/flower.py` sets."""


def private_imports(path: Path) -> Iterator[str]:
    """Names that a source file imports from Flower's private modules."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            public = any(f"{name}.".startswith(f"{package}.") for package in PUBLIC)
            if name.split(".")[0] == "flwr" and not public:
                yield name


SOURCES = [*(ROOT / "fedprompt").rglob("*.py"), *(ROOT / "strategies").rglob("*.py")]


def test_private_modules_are_imported_in_two_places_only() -> None:
    imported = {
        (path.relative_to(ROOT).as_posix(), name)
        for path in SOURCES
        for name in private_imports(path)
    }
    assert imported == set(BREAKS)


@pytest.mark.parametrize("name", sorted({name for _, name in BREAKS}))
def test_the_installed_flower_has(name: str) -> None:
    breaks = {reason for (_, known), reason in BREAKS.items() if known == name}
    module, _, attribute = name.rpartition(".")
    try:
        there = hasattr(importlib.import_module(module), attribute)
    except ImportError:
        there = False
    assert there, f"Flower has no {name}; {breaks}"


def test_private_attributes_are_set_in_one_place_only() -> None:
    for attribute in ATTRIBUTES:
        holders = [
            path.relative_to(ROOT).as_posix()
            for path in SOURCES
            if f'"{attribute}"' in path.read_text(encoding="utf-8")
        ]
        assert holders == [MESSAGES], attribute
