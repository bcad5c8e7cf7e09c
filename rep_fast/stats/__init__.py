"""Second moments of keys: collecting, storing, factoring."""

from __future__ import annotations

from rep_fast.stats.second_moments import SecondMoments

__all__ = ["SecondMoments"]
