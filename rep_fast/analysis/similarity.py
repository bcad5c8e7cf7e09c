"""Whitened similarity of a subject's forms to the key an edit was written for (methods §12.1)."""

from __future__ import annotations

from torch import Tensor

from rep_fast.api import Workbench
from rep_fast.edits import Edit
from rep_fast.evaluation import Protocol, perturb_case
from rep_fast.facts import EditCase
from rep_fast.rep import LocatedTexts

OTHERS_SHOWN = 100


def form_similarities(
    bench: Workbench, edit: Edit, case: EditCase, *, seed: int = 0
) -> dict[str, tuple[Tensor, Tensor]]:
    """ρ of the subject's forms and of other subjects, before and after the edit's adapters.

    ρ(k) = k·response is the fraction of the edit that a key retrieves: β(k, k*)/β(k*, k*) for R-ROME.

    Returns:
        Kind ("original", "rephrase", "shuffle", "long", "other") → (ρ before [n], ρ after [n]); kinds without texts are
        left out.
    """
    module, fact = edit.modules[0], case.fact
    protocol = Protocol.of_preset(bench.preset)
    perturbed = perturb_case(bench.lm, case, text=bench.context_text, seed=seed, protocol=protocol)
    others = [subject for subject in bench.negative_pool(module.layer).subjects if subject != fact.subject]
    texts = {
        "original": [(fact.prompt, fact.subject)],
        "rephrase": [(one.prompt, one.subject) for one in perturbed.rephrase],
        "shuffle": [(one.prompt, one.subject) for one in perturbed.shuffle],
        "long": [(one.prompt, one.subject) for one in perturbed.long],
        "other": [(fact.prompt, subject) for subject in others[:OTHERS_SHOWN]],
    }
    found = {}
    for kind, pairs in texts.items():
        if not pairs:
            continue
        keys = LocatedTexts.of(bench.lm, pairs).subject_keys(bench.lm, module.layer)
        response = module.vectors["response"].to(keys)
        moved = keys
        for adapter in module.adapters:
            moved = adapter(moved)
        found[kind] = (keys @ response, moved @ response)
    return found
