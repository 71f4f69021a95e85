"""Masks: numbers modulo 2^32 that look random without the secret that they are derived from.

Flower reduces a secret to 32 bits by XOR and seeds the Mersenne Twister with them. A secret that
two peers share is base64 text, in which at most 7 of 8 bits vary, so that 28 bits remain; all of
them can be tried within hours. `stream` expands a secret with AES-256 in counter mode instead, as
Bonawitz et al. do. It is added to Flower's mask, and both are removed together.

Our masks also depend on the tensors that training started from. If a server sends one client other
tensors than its peers, so that the sum consists of this client's change alone, the masks between
them do not cancel (attack and defence: Pasquini et al., CCS 2022, arXiv 2111.07380).
"""

from __future__ import annotations

from hashlib import sha256

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from fedprompt.privacy.secure_aggregation import flower
from fedprompt.privacy.secure_aggregation.params import MODULUS

Masked = NDArray[np.uint32]
"""Numbers modulo 2^32; sums and differences of this type wrap around by themselves."""


def stream(secret: bytes, count: int, start: str = "") -> Masked:
    """Numbers from all bits of a secret, which may be used for one vector only.

    Args:
        secret: known to two clients, or to one until the sum is unmasked.
        count: how many numbers.
        start: digest of the tensors that training started from, see `survivors.start_of`.
    """
    # The prefix separates this key from every other use of the same secret.
    key = sha256(b"fedprompt secure aggregation mask" + start.encode() + secret).digest()
    # A constant counter is safe, since every key encrypts one vector.
    encryptor = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    return np.frombuffer(encryptor.update(bytes(4 * count)), dtype="<u4").astype(np.uint32)


def mask(secret: bytes, count: int, start: str = "") -> Masked:
    """Everything that a client adds to its `count` numbers for a secret: Flower's mask and ours."""
    # Flower masks its own weight and the client's numbers as two arrays.
    flowers = flower.pseudo_rand_gen(secret, MODULUS, [(1,), (count - 1,)])
    return np.concatenate(flowers).astype(np.uint32) + stream(secret, count, start)
