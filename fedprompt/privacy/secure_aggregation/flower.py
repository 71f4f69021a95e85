"""All that is used of Flower's SecAgg+. It lies in Flower's legacy API: import this module late."""

from __future__ import annotations

import logging

from flwr.client.mod import secaggplus_mod
from flwr.client.mod.secure_aggregation.secaggplus_mod import SecAggPlusState
from flwr.common import Code, FitRes, Status, bytes_to_ndarray, ndarrays_to_parameters
from flwr.common.secure_aggregation.crypto.shamir import combine_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
from flwr.common.secure_aggregation.secaggplus_constants import (
    RECORD_KEY_CONFIGS,
    RECORD_KEY_STATE,
    Key,
    Stage,
)
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from flwr.compat.common.recorddict_compat import fitres_to_recorddict
from flwr.supercore.primitives.asymmetric import bytes_to_private_key, bytes_to_public_key

__all__ = [
    "RECORD_KEY_CONFIGS",
    "RECORD_KEY_STATE",
    "Code",
    "FitRes",
    "Key",
    "SecAggPlusState",
    "Stage",
    "Status",
    "bytes_to_ndarray",
    "bytes_to_private_key",
    "bytes_to_public_key",
    "combine_shares",
    "fitres_to_recorddict",
    "generate_shared_key",
    "ndarrays_to_parameters",
    "pairwise_secret",
    "pseudo_rand_gen",
    "secaggplus_mod",
]


def _worth_a_line(record: logging.LogRecord) -> bool:
    """Not the mod's two debugging lines per stage and client, which Flower prints by default."""
    return record.module != "secaggplus_mod" or record.levelno >= logging.WARNING


logging.getLogger("flwr").addFilter(_worth_a_line)


def pairwise_secret(secret_key: bytes, public_key: bytes) -> bytes:
    """What two peers have in common, from the one's secret and the other's public key (PEM)."""
    return generate_shared_key(bytes_to_private_key(secret_key), bytes_to_public_key(public_key))
