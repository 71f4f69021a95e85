"""Everything that is used of Flower's SecAgg+, which Flower has in its private legacy API only.

A Flower without it leaves the names below undefined, so other modules refer to them as attributes
of this module, and only after `require_flower`. `tests/test_flower_private.py` states what stops
working when an upgrade removes one of them.
"""

from __future__ import annotations

import logging
from importlib.metadata import version

from fedprompt.errors import UserError

_missing: ImportError | None = None
try:
    from flwr.client.mod import secaggplus_mod
    from flwr.client.mod.secure_aggregation.secaggplus_mod import SecAggPlusState
    from flwr.common import Code, FitRes, Status, bytes_to_ndarray, ndarrays_to_parameters
    from flwr.common.secure_aggregation.crypto.shamir import combine_shares
    from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
    from flwr.common.secure_aggregation.secaggplus_constants import (
        RECORD_KEY_STATE,
        Key,
    )
    from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
    from flwr.compat.common.recorddict_compat import fitres_to_recorddict
    from flwr.supercore.primitives.asymmetric import bytes_to_private_key, bytes_to_public_key
except ImportError as error:
    _missing = error

__all__ = [
    "RECORD_KEY_STATE",
    "Code",
    "FitRes",
    "Key",
    "SecAggPlusState",
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
    "require_flower",
    "secaggplus_mod",
]


def _is_worth_logging(record: logging.LogRecord) -> bool:
    """Drops the mod's two debugging lines per stage and client, which Flower prints by default."""
    return record.module != "secaggplus_mod" or record.levelno >= logging.WARNING


logging.getLogger("flwr").addFilter(_is_worth_logging)


def require_flower() -> None:
    """Check that the installed Flower has SecAgg+.

    Raises:
        UserError: it does not.
    """
    if _missing is not None:
        raise UserError(
            f"secure_aggregation is built on the SecAgg+ of Flower 1.41; flwr {version('flwr')} "
            f"lacks it ({_missing}). Install flwr 1.41 or set secure_aggregation.enabled=false."
        )


def pairwise_secret(secret_key: bytes, public_key: bytes) -> bytes:
    """The secret that two peers share, from one's secret key and the other's public key (PEM)."""
    return generate_shared_key(bytes_to_private_key(secret_key), bytes_to_public_key(public_key))
