"""Which client holds which image.

Clients share the TRAIN images only; the TEST images stay with the server. Each client's images are
split into local train and local test class by class, so that both have the same label skew and no
image in common. The schemes are in `schemes`; a partition file (`file`) replaces them if one is
named, and then also says which images the server tests on.

Every image has one holder, so no image can be in two places. A client may be unlabelled: its
training images are there without their labels, and it never trains. Neither does a client without
training images. Both are tested like any other client; one without test images is not tested.
"""

from fedprompt.data.partition.assign import make_partition
from fedprompt.data.partition.counts import dense, describe, sparse
from fedprompt.data.partition.holders import NOBODY, SERVER, Partition

__all__ = ["NOBODY", "SERVER", "Partition", "dense", "describe", "make_partition", "sparse"]
