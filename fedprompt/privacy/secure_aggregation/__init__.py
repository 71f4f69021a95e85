"""Secure aggregation: the server learns the sum of the clients' updates, and no single one.

Sources: Secure Single-Server Aggregation with (Poly)Logarithmic Overhead (SecAgg+, Bell et al.,
CCS 2020, arXiv 2002.11011), after Practical Secure Aggregation (Bonawitz et al., CCS 2017). The
cryptography is Flower's: key agreement, Shamir shares, encrypted shares, and its client mod, which
answers all stages of a round but `confirm`:

    setup         every client creates two pairs of keys; the server collects the public keys
    share_keys    every client splits its secret key and a seed into shares, encrypted for its peers
    collect       every client trains and sends its numbers plus masks; the masks between two peers
                  cancel in the sum
    confirm       the clients agree on whose numbers are in the sum (survivors.py)
    unmask        every client reveals one share per peer: of the peer's seed if the peer has sent
                  its numbers, of its key if not; `threshold` shares suffice to remove a mask

How we differ from Flower 1.41:
- The sum is that of the changes of the shared tensors, rounded to exact steps, so that the result
  does not depend on random numbers. It includes the weight, the loss and whether a change was
  clipped (vector.py). Flower sums the tensors themselves, and reveals the number of images and all
  metrics.
- Flower expands a mask from 32 bits, and between two peers from at most 28, which can be found by
  trying all of them. A second mask from all 256 bits of the same secret is added (masks.py). It
  also depends on the tensors that training started from.
- Flower has no consistency step: a server could show its clients different lists of survivors.
- The server's side is our own (server.py). Flower's server asks for key shares of clients that left
  before they had distributed any, at which every client fails, and it needs Flower's retired
  strategy classes.
- A client refuses protocol parameters that differ from the experiment's, the number of clients
  included; a list that names a peer both as present and as dropped out; a second request about the
  same masks (client.py); and, on a node, a second sum of updates from the same tensors for another
  set of clients, also after a crash (survivors.py).

Threat model: the protocol protects against a server that reads everything it receives but follows
the protocol, as long as fewer than `threshold` of a client's peers collude with it; and against one
that lies about who is in the sum, about the parameters or about the tensors, as long as at most one
third of a client's peers collude with it. It does not protect against a server that invents clients
or replaces the clients' public keys by its own: the server relays all public keys, and nobody else
certifies them. docs/privacy.md lists what else remains.
"""

from __future__ import annotations

from flwr.app import ConfigRecord, Message

from fedprompt.privacy.secure_aggregation.flower import require_flower

__all__ = [
    "ALIKE",
    "COLLECT",
    "CONFIRM",
    "RECORD",
    "SETUP",
    "SHARE_KEYS",
    "STAGE",
    "UNMASK",
    "require_flower",
    "stage_of",
]

RECORD, STAGE = "secaggplus_configs", "stage"
"""Flower's names of the record that a message of the protocol carries, and of its stage in it."""
SETUP, SHARE_KEYS, COLLECT, UNMASK = "setup", "share_keys", "collect_masked_vectors", "unmask"
CONFIRM = "confirm"
"""Our own stage, between `COLLECT` and `UNMASK`; Flower's mod does not see it."""
ALIKE = "count-alike"
"""Key in the settings of a training message; if set, all clients have the same weight."""


def stage_of(message: Message) -> str | None:
    """The stage of the protocol that a message belongs to; None for any other message."""
    record = message.content.get(RECORD) if message.has_content() else None
    stage = record.get(STAGE) if isinstance(record, ConfigRecord) else None
    return stage if isinstance(stage, str) else None
