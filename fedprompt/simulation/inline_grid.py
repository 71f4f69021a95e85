"""The grid that runs all clients in the server's process; `simulation.kind: inline`.

It is also the plain reference for the grid on Ray, which must give the same results bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from fedprompt.messages import Parcel
from fedprompt.simulation.answer_block import run_block
from fedprompt.simulation.block_grid import BlockGrid


class InlineGrid(BlockGrid):
    """A grid that runs its blocks in this process, one after the other; see `BlockGrid`."""

    def _run_blocks(
        self, kind: str, blocks: Sequence[Sequence[Parcel]], deadline: float
    ) -> dict[int, list[bytes]]:
        done = {}
        for index, block in enumerate(blocks):
            # A block that has started is never interrupted.
            if time.monotonic() > deadline:
                break
            answered = run_block(
                self.workspace,
                block,
                self.known(block),
                self.answer,
                at_once=self.at_once(kind),
            )
            self.keep(answered.changed)
            self.learn(kind, answered.fitted)
            done[index] = answered.replies
        return done
