"""Training over an active codebook: the loss that falls is the one that evaluation scores, wherever a target ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from rep_fast import editors
from rep_fast.editors import value
from rep_fast.editors.value_descent import ValueHparams
from rep_fast.edits import Codebook, Edit, ModuleEdit
from rep_fast.evaluation import score_targets
from rep_fast.facts import Fact
from rep_fast.models import EditableLM
from rep_fast.paths.tracing import target_nll

FACT = Fact("{} belongs to the continent of", "Slovenia", "Antarctica and Asia", "Europe")


@pytest.fixture
def covered(build_lm: Callable[..., EditableLM]) -> Iterator[EditableLM]:
    """A model with an entry in the first layer for the prompt's last token alone; the target's tokens are far off."""
    lm = build_lm("llama", dtype=torch.float64)
    key = lm.keys([FACT.text], 0)[0][-1].double()
    out = 3 * torch.randn(1, lm.hidden_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    book = Codebook(key[None], out, ("x",), (1e-4,))
    clean = nll(lm)
    with Edit((), "x", {}, lm.fingerprint, (ModuleEdit(0, replacement=book),)).applied(lm):
        assert abs(nll(lm) - clean) > 1e-3  # the entry matters to the loss
        yield lm


def nll(lm: EditableLM) -> float:
    return float(score_targets(lm, [(FACT.text, FACT.target_new)])[0].nll)


def test_traced_loss(covered: EditableLM) -> None:
    found = target_nll(covered, [covered.answer(FACT.text, FACT.target_new)])
    assert float(found.detach()) == pytest.approx(nll(covered), rel=1e-9)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("lora", {"layers": (1,), "lora_steps": 1, "lora_kind": "lora", "lora_rank": 2, "lora_dropout": 0.0}),
        ("ft-m", {"layers": (1,), "ft_steps": 1}),
    ],
)
def test_first_loss_of_a_training_editor(covered: EditableLM, name: str, settings: dict[str, object]) -> None:
    editor = editors.get(name)
    edit = editor(covered, [FACT], hparams=editor.hparams(covered, overrides=settings))
    assert edit.notes["losses"][0] == pytest.approx(nll(covered), rel=1e-9)


def test_first_loss_of_a_value(covered: EditableLM) -> None:
    hparams = ValueHparams(v_steps=1, kl_factor=0.0, v_weight_decay=0.0, early_stop=None)
    found = value.optimise_value(covered, FACT, layer=1, templates=("{}",), hparams=hparams)
    assert found.losses[0] == pytest.approx(nll(covered), rel=1e-9)
