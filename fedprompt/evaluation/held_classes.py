"""The last classes of a data set, which protocols hold out as classes that nobody knows."""

from __future__ import annotations

import math

from fedprompt.data.dataset import ImageDataset
from fedprompt.data.held_out import HeldOut, hold_out_classes
from fedprompt.errors import UserError


def hold_out_last(
    dataset: ImageDataset, share: float, protocol: str, or_else: str = ""
) -> tuple[ImageDataset, HeldOut]:
    """Hold out the last classes; see `Protocol.hold_out`.

    Args:
        dataset: the whole data set.
        share: share of the classes that is held out, rounded up.
        protocol: the protocol whose option `held_share` this is, for messages.
        or_else: what else the user can do if too many would be held out.

    Raises:
        UserError: fewer than two classes would stay, or the held-out ones have no test images.
    """
    classes = len(dataset.class_names)
    held = math.ceil(round(share * classes, 9))
    if classes - held < 2:
        raise UserError(
            f"protocol {protocol}: {held} of {classes} classes would be held out; two or more must "
            f"stay. Lower protocol_options.{protocol}.held_share{or_else}."
        )
    view, found = hold_out_classes(dataset, list(range(classes - held, classes)))
    if not len(found.index_N):
        raise UserError(f"protocol {protocol}: the held-out classes have no test images.")
    return view, found
