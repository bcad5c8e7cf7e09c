"""Analyses of edits: what their keys look like to the update, and how results depend on a setting (methods §12)."""

from __future__ import annotations

from rep_fast.analysis.similarity import form_similarities
from rep_fast.analysis.sweeps import Sweep, sweep, with_threshold

__all__ = ["Sweep", "form_similarities", "sweep", "with_threshold"]
