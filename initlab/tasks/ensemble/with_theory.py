"""What a task hands over, passed on and remembered as far as theory has a word on it; then the two side by side."""

from collections.abc import Callable, Mapping
from functools import partial

import pandas as pd

from initlab.errors import UsageError

Frames = Mapping[str, pd.DataFrame]
Beside = Callable[..., pd.DataFrame]  # (rows of `stats`, method=) -> the table `theory`
QUICK = "closed"  # the method for a run that is being stopped: a quarter of a second


class Seen:
    """Passes frames on to `add`, and keeps the rows of `stats` that are `chosen` for a prediction, if one is wanted."""

    def __init__(
        self, add: Callable[[Frames], None], wanted: bool, chosen: Callable[[pd.DataFrame], pd.DataFrame]
    ) -> None:
        self._add, self._wanted, self._chosen = add, wanted, chosen
        self._kept: list[pd.DataFrame] = []

    def add(self, frames: Frames) -> None:
        self._add(frames)
        if self._wanted and "stats" in frames:
            self._kept.append(self._chosen(frames["stats"]))

    def rows(self) -> pd.DataFrame | None:
        """What was remembered; None where that is nothing."""
        return pd.concat(self._kept, ignore_index=True) if self._kept else None

    def around(self, measure: Callable[[], object], beside: Beside, method: str) -> str:
        """Measure, then hand over what theory says of it; a note where it says nothing.

        However measuring ends, what it has handed over is compared; where it is stopped, by formulas.
        """
        try:
            measure()
        except BaseException:
            self.compare(partial(beside, method=QUICK))
            raise
        return self.compare(partial(beside, method=method))

    def compare(self, beside: Callable[[pd.DataFrame], pd.DataFrame]) -> str:
        """Hand over the table `theory`; a note where there is none.

        Whatever goes wrong with a prediction, what was measured is not lost by it.
        """
        kept = self.rows()
        if kept is None:
            return ""
        try:
            found = beside(kept)
        except UsageError as error:
            return f"theory: no prediction ({error})"
        except Exception as error:
            return f"theory: no prediction, a fault of ours ({type(error).__name__}: {' '.join(str(error).split())})"
        self._add({"theory": found})
        return ""
