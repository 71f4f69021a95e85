"""Client messages answered in this process, one cohort after the other."""

from __future__ import annotations

import time
from collections.abc import Sequence

from fedprompt.messages import Parcel
from fedprompt.simulation.cohort_grid import CohortGrid, run_cohort


class InlineGrid(CohortGrid):
    """All clients in this process, one cohort after the other."""

    def _run_cohorts(
        self, kind: str, cohorts: Sequence[Sequence[Parcel]], deadline: float
    ) -> dict[int, list[bytes]]:
        done = {}
        for index, cohort in enumerate(cohorts):
            if time.monotonic() > deadline:
                break
            done[index], changed = run_cohort(
                self.workspace, cohort, self.known(cohort), self.answer
            )
            self.keep(changed)
        return done


Grid = InlineGrid
