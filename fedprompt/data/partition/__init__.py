"""The partition: which client holds which image.

It is computed before the first round, from the config and the seed, in every process of a run; all
processes obtain the same partition. The TRAIN images of the data set are divided among the clients
and the TEST images stay with the server. Each client's images are then split into local train and
local test class by class, so that both parts have the same label skew and no image in common. The
schemes are in `schemes`. A partition file (`file`) replaces the scheme if the config names one; it
then also determines which images the server tests on.

Every image has at most one holder, so no image can be in two places. A client may be unlabelled: it
holds training images without their labels, and trains only with methods that learn without. A
client without training images never trains. Both are tested like any other client. A client without
test images is not tested. In active learning (`queries`), labels become known over time.
"""

from fedprompt.data.partition.assign import make_partition
from fedprompt.data.partition.counts import dense, describe, sparse
from fedprompt.data.partition.holders import NOBODY, SERVER, Partition

__all__ = ["NOBODY", "SERVER", "Partition", "dense", "describe", "make_partition", "sparse"]
