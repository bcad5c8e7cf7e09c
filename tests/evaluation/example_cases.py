"""Cases and edits that need no editor, shared by the tests of the regimes."""

from __future__ import annotations

import torch

from rep_fast.edits import Edit, LowRank, ModuleEdit
from rep_fast.evaluation import Protocol
from rep_fast.facts import EditCase, Fact, MemoryText, Sided

LAYER = 1
TEXT = MemoryText("words", ["the world is wide and long", "people went home again", "because of this they stay"] * 4)
PROTOCOL = Protocol(n_words=8, long_in=2, long_out=1)


def make_cases(n: int = 3) -> list[EditCase]:
    subjects = ["Slovenia", "Danielle Darrieux", "Michael Jordan"]
    return [
        EditCase(
            case_id=10 + i,
            fact=Fact("{} belongs to the continent of", subjects[i % 3], "Antarctica", "Europe"),
            paraphrase_prompts=("In the world, it is part of", "Its continent is"),
            neighborhood_prompts=("Paris belongs to the continent of", "Zürich belongs to the continent of"),
            neighborhood_target="Europe",
            subject_rephrases=Sided(("The Republic",), ("Republic of it", "This land")),
        )
        for i in range(n)
    ]


def random_edit(lm, case: EditCase, seed: int, *, size: float = 3.0) -> Edit:
    generator = torch.Generator().manual_seed(1000 * seed + case.case_id)
    left = size * torch.randn(lm.hidden_size, 1, generator=generator, dtype=lm.dtype)
    right = torch.randn(1, lm.key_width(LAYER), generator=generator, dtype=lm.dtype)
    v_star = 5 * torch.randn(lm.hidden_size, generator=generator, dtype=lm.dtype)
    return Edit(
        facts=(case.fact,),
        method="random",
        hparams={},
        fingerprint=lm.fingerprint,
        modules=(ModuleEdit(LAYER, LowRank(left, right)),),
        tensors={"v_star": v_star},
    )


def without_times(summary):
    return summary.to_dict() | {"seconds": None}
