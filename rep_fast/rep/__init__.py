"""REP: the gated key adapter's training, in the paper's form and calibrated."""

from __future__ import annotations

from rep_fast.rep.forms import LocatedTexts, SubjectForms, TextKeys, surface_forms
from rep_fast.rep.hparams import RepHparams
from rep_fast.rep.negatives import NegativePool, Negatives, draw_negatives
from rep_fast.rep.training import CachedKeys, cache_keys, fit, train_adapters

__all__ = [
    "CachedKeys",
    "LocatedTexts",
    "NegativePool",
    "Negatives",
    "RepHparams",
    "SubjectForms",
    "TextKeys",
    "cache_keys",
    "draw_negatives",
    "fit",
    "surface_forms",
    "train_adapters",
]
