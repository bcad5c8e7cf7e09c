"""Editors: functions from facts to an `Edit`. One file per method; v* (`value.py`) is shared.

`get(name)` is the one door: it knows which names exist and how a preset's values become hyper-parameters.
"""

from __future__ import annotations

from rep_fast.editors.door import Editor, get, names
from rep_fast.editors.fine_tuning import FineTuningHparams, fine_tune
from rep_fast.editors.knowledge_neurons import KnowledgeNeuronsHparams, knowledge_neurons
from rep_fast.editors.pac import PacHparams, pac
from rep_fast.editors.rome import RomeHparams, closed_form, rome
from rep_fast.editors.value import OptimisedValue, ValueHparams, optimise_value

__all__ = [
    "Editor",
    "FineTuningHparams",
    "KnowledgeNeuronsHparams",
    "OptimisedValue",
    "PacHparams",
    "RomeHparams",
    "ValueHparams",
    "closed_form",
    "fine_tune",
    "get",
    "knowledge_neurons",
    "names",
    "optimise_value",
    "pac",
    "rome",
]
