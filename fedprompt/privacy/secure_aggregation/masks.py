"""Masks: numbers modulo 2^32 that look random to whoever lacks the secret behind them.

Flower XORs a secret down to 32 bits and seeds the Mersenne twister with them; a secret that two
peers have in common is base64 text, of whose 8 bits at most 7 vary, so 28 bits are left. All of
them can be tried within hours. `stream` expands a secret with AES-256 in counter mode instead, as
Bonawitz et al. do; it lies over Flower's mask, and both are removed together.
"""

from __future__ import annotations

from hashlib import sha256

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from fedprompt.privacy.secure_aggregation.flower import pseudo_rand_gen
from fedprompt.privacy.secure_aggregation.params import MODULUS

Masked = NDArray[np.uint32]
"""Numbers modulo 2^32: their sums and differences wrap around by themselves."""


def stream(secret: bytes, count: int) -> Masked:
    """`count` numbers from all bits of a secret; a secret is used for one vector only."""
    key = sha256(b"fedprompt secure aggregation mask" + secret).digest()
    encryptor = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    return np.frombuffer(encryptor.update(bytes(4 * count)), dtype="<u4").astype(np.uint32)


def mask(secret: bytes, count: int) -> Masked:
    """All that a client has put over its `count` numbers for a secret: Flower's mask and ours."""
    flowers = pseudo_rand_gen(secret, MODULUS, [(1,), (count - 1,)])
    return np.concatenate(flowers).astype(np.uint32) + stream(secret, count)
