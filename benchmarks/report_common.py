"""The names that `benchmarks.quality` still takes from here."""

from benchmarks.tables import conditions, left_out

__all__ = ["conditions", "left_out"]
