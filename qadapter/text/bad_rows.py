"""Rows that cannot be used: an error with their place, or skipped and counted by reason."""

import logging
from collections import Counter

logger = logging.getLogger(__name__)

LISTED = 3  # the first so many skipped rows are named


class RowError(ValueError):
    """A row that cannot be used. ``reason`` is the text without what only this row has."""

    # All arguments go to the base class, so that the error survives its way out of a process.
    def __init__(self, place: str, text: str, reason: str = "") -> None:
        super().__init__(place, text, reason)
        self.place, self.text, self.reason = place, text, reason or text

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


class BadRows:
    """What becomes of bad rows: raised at once, or with ``skip`` counted."""

    def __init__(self, skip: bool = False) -> None:
        self.skip = skip
        self.reasons: Counter[str] = Counter()
        self.first: list[str] = []

    def add(self, error: RowError) -> None:
        if not self.skip:
            raise error
        self.count(error.reason, str(error))

    def count(self, reason: str, message: str) -> None:
        self.reasons[reason] += 1
        if len(self.first) < LISTED:
            self.first.append(message)

    def __str__(self) -> str:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in self.reasons.most_common())
        return f"{reasons}. The first: " + "; ".join(self.first)

    def log(self, rows: int, name: str) -> None:
        """One warning, if any of the ``rows`` that there were was skipped."""
        if self.reasons:
            logger.warning(
                "Skipped %d of %d rows of %s: %s", self.reasons.total(), rows, name, self
            )
