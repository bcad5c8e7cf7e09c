"""Editors: functions from facts to an `Edit`. One file per method; v* (`value.py`), keys (`keys.py`) and the writing of
batches into several layers (`batch.py`) are shared.

`get(name)` is the one door: it knows which names exist and how a preset's values become hyper-parameters.
"""

from __future__ import annotations

from rep_fast.editors.alphaedit import AlphaEditHparams, alphaedit
from rep_fast.editors.door import Editor, get, names
from rep_fast.editors.emmet import EmmetHparams, emmet
from rep_fast.editors.fine_tuning import FineTuningHparams, fine_tune
from rep_fast.editors.grace import GraceHparams, grace
from rep_fast.editors.knowledge_neurons import KnowledgeNeuronsHparams, knowledge_neurons
from rep_fast.editors.lora import LoraHparams, lora
from rep_fast.editors.memit import MemitHparams, memit
from rep_fast.editors.pac import PacHparams, pac
from rep_fast.editors.pmet import PmetHparams, pmet
from rep_fast.editors.rome import RomeHparams, closed_form, rome
from rep_fast.editors.state import EditorState
from rep_fast.editors.value import OptimisedValue, optimise_value, optimise_values
from rep_fast.editors.value_descent import ValueHparams
from rep_fast.editors.wise import WiseHparams, wise

__all__ = [
    "AlphaEditHparams",
    "Editor",
    "EditorState",
    "EmmetHparams",
    "FineTuningHparams",
    "GraceHparams",
    "KnowledgeNeuronsHparams",
    "LoraHparams",
    "MemitHparams",
    "OptimisedValue",
    "PacHparams",
    "PmetHparams",
    "RomeHparams",
    "ValueHparams",
    "WiseHparams",
    "alphaedit",
    "closed_form",
    "emmet",
    "fine_tune",
    "get",
    "grace",
    "knowledge_neurons",
    "lora",
    "memit",
    "names",
    "optimise_value",
    "optimise_values",
    "pac",
    "pmet",
    "rome",
    "wise",
]
