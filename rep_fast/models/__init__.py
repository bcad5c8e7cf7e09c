"""EditableLM: a Hugging Face causal LM and tokenizer behind one set of names for all families.

lm = EditableLM.from_pretrained("factworld")
found = lm.locate("{} lives in", "Ada Stone")
key = lm.keys([found.ids], [2], positions=[found.position])[2]          # [1, M]
"""

from __future__ import annotations

from rep_fast.models.batch import Batch
from rep_fast.models.context_templates import context_templates
from rep_fast.models.editable_lm import EditableLM
from rep_fast.models.families import FAMILIES, BlockInputs, Layout
from rep_fast.models.forward_pass import ForwardPass
from rep_fast.models.hooks import Captured
from rep_fast.models.resume import SuffixState
from rep_fast.models.rows import RowState, advance, enter_layer, read_rows
from rep_fast.models.sites import SITE_KINDS, Site
from rep_fast.models.tokens import Answer, Located

__all__ = [
    "FAMILIES",
    "SITE_KINDS",
    "Answer",
    "Batch",
    "BlockInputs",
    "Captured",
    "EditableLM",
    "ForwardPass",
    "Layout",
    "Located",
    "RowState",
    "Site",
    "SuffixState",
    "advance",
    "context_templates",
    "enter_layer",
    "read_rows",
]
