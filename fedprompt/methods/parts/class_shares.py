"""What a client says about its labels, for methods whose tensors have one row per class.

CoOp's class-specific contexts and PALM upload it, and the strategy `per_class` averages each row
over the clients that have images of the class. THIS REVEALS THE CLIENT'S LABEL HISTOGRAM.

Suffixes: K clients, C classes.
"""

from __future__ import annotations

from torch import Tensor

from fedprompt.methods.batch import RoundInfo

SHARES = "class_shares"
"""Name of the shared tensor (C,): zeros until a client has trained, and never trained itself."""


def class_shares(round_info: RoundInfo) -> Tensor:
    """The share (K, C) of each class among each client's training images."""
    # The strategy multiplies the shares by the client's number of images.
    counts_KC = round_info.class_counts_KC.float()
    return counts_KC / counts_KC.sum(-1, keepdim=True)
