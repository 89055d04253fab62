"""What a task hands over, passed on and remembered as far as theory has a word on it; then the two side by side."""

from collections.abc import Callable, Mapping

import pandas as pd

from initlab.errors import UsageError

Frames = Mapping[str, pd.DataFrame]


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
