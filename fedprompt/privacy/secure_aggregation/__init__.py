"""Secure aggregation: the server learns the sum of the clients' updates, and no single one.

Sources: Secure Single-Server Aggregation with (Poly)Logarithmic Overhead (SecAgg+, Bell et al.,
CCS 2020, arXiv 2002.11011), after Practical Secure Aggregation (Bonawitz et al., CCS 2017). The
cryptography is Flower's: key agreement, Shamir shares, encrypted envelopes, and its client mod,
which answers all four exchanges of a round here too:

    setup         each client makes two pairs of keys; the server collects the public ones
    share_keys    each splits its secret key and a seed into shares, sealed for its peers
    collect       each trains and sends its numbers plus masks; those between two peers cancel
    unmask        each hands out a share per peer: of its seed where it has sent its numbers, of
                  its key where it has not; `threshold` shares are enough to remove a mask

How we differ from Flower 1.41:
- What is summed is the change of the shared tensors, in few and exact steps, so that the result
  depends on no random number; with it the weight, the loss and whether something was cut off
  (vector.py). Flower sums the tensors themselves and shows the number of images and all metrics.
- Flower stretches a mask from 32 bits, between two peers from 28 at most, which can be found by
  trying. A second mask from all 256 bits of the same secret lies over it (masks.py).
- The server's side is our own (server.py). Flower's asks for key shares of clients that left before
  they gave any out, at which everybody fails, and wants its retired strategy classes.
- A client refuses terms other than the experiment's, a list of peers that has one of them both here
  and gone, and a second question about the same masks (client.py).

What it protects against: a server that reads everything but keeps to the protocol, and fewer than
`threshold` of a client's peers in league with it. Not against one that makes up clients or hands
out its own keys for theirs: it relays all public keys, and nobody else vouches for them.
"""

from __future__ import annotations

from flwr.app import ConfigRecord, Message

from fedprompt.errors import UserError

RECORD, STAGE = "secaggplus_configs", "stage"
"""Flower's names of the record that a message of the protocol carries, and of its stage in it."""
SETUP, SHARE_KEYS, COLLECT, UNMASK = "setup", "share_keys", "collect_masked_vectors", "unmask"
ALIKE = "count-alike"
"""Key of a train message's settings by which every client weighs the same."""


def stage_of(message: Message) -> str | None:
    """The protocol's stage that a message belongs to; None for any other message."""
    record = message.content.get(RECORD) if message.has_content() else None
    stage = record.get(STAGE) if isinstance(record, ConfigRecord) else None
    return stage if isinstance(stage, str) else None


def require_flower() -> None:
    """Raise `UserError` where the installed Flower has no SecAgg+."""
    try:
        from fedprompt.privacy.secure_aggregation import flower  # noqa: F401
    except ImportError as error:
        from importlib.metadata import version

        raise UserError(
            f"secure_aggregation is built on the SecAgg+ of Flower 1.41; flwr {version('flwr')} "
            f"lacks it ({error}). Install flwr 1.41 or set secure_aggregation.enabled=false."
        ) from None
