"""Analyses of edits: what their keys look like to the update (methods §12)."""

from __future__ import annotations

from rep_fast.analysis.similarity import form_similarities

__all__ = ["form_similarities"]
