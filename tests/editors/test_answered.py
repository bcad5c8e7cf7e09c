"""Facts that the model answers already: found, left out or kept, named in the notes, and refused when alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from rep_fast import editors
from rep_fast.editors.answered import (
    ANSWERS_PER_PASS,
    answered_before,
    are_answered,
    left_out,
    said_instead,
    unanswered,
)
from rep_fast.errors import NothingToEditError
from rep_fast.facts import Fact
from rep_fast.models import EditableLM

PROMPT = Fact("{} belongs to the continent of", "Slovenia", "Antarctica", "Europe")
OTHER = Fact("The mother tongue of {} is", "Danielle Darrieux", "Korean", "French")
TEMPLATES = ("{}", "I think that. {}")
# editors that take several facts and need no second moments
SETTINGS: dict[str, dict[str, Any]] = {
    "grace": {"layer": 1, "n_iter": 3},
    "wise": {"layer": 1, "n_iter": 2, "edit_lr": 0.05},
    "ft-m": {"layers": (1,), "ft_steps": 1},
    "lora": {"layers": (1,), "lora_steps": 1, "lora_kind": "lora", "lora_rank": 2},
    "pac": {"layers": (1,), "top": 2, "pac_epochs": 1, "early_stop": None},
}


@pytest.fixture
def known(tiny_llama64: EditableLM) -> Fact:
    """A fact whose target is the model's own answer: one of the tokens that are read back as themselves."""
    lm = tiny_llama64
    for subject in ("Slovenia", "Europe", "Paris", "Kobe Bryant", "Michael Jordan", "Asia", "Africa"):
        for prompt in ("{} is", "{} belongs to", "The city of {} is in", "I think that {}", "{} plays", "{} and"):
            text = prompt.replace("{}", subject)
            target = lm.generate(text, max_new_tokens=1)[len(text) :].strip()
            said = lm.logits([text], at=[[len(lm.encode(text).rows()[0]) - 1]]).argmax(dim=-1)
            if target and lm.answer(text, target).target_ids == tuple(said.tolist()):
                return Fact(prompt, subject, target)
    raise AssertionError("no prompt of the list is answered by a visible token; add prompts")


def write(lm: EditableLM, name: str, facts: list[Fact], **options: Any) -> Any:
    editor = editors.get(name)
    return editor(lm, facts, hparams=editor.hparams(lm, overrides=SETTINGS[name]), templates=TEMPLATES, **options)


def test_answers_are_the_arg_max_at_every_token_of_the_target(tiny_llama64: EditableLM, known: Fact) -> None:
    lm = tiny_llama64
    longer = Fact(known.prompt, known.subject, f"{known.target_new} Antarctica")  # only its first token is said
    facts = [OTHER, known, longer]
    assert are_answered(lm, facts, target_tok="in_context") == [False, True, False]
    assert unanswered(lm, facts, target_tok="in_context") == [OTHER, longer]
    assert answered_before(lm, facts, target_tok="in_context") == [1]


def test_many_answers_are_asked_a_few_at_a_time(tiny_llama64: EditableLM, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_llama64
    facts = [dataclasses.replace(OTHER, subject=f"Kobe Bryant{number}") for number in range(2 * ANSWERS_PER_PASS + 3)]
    answers = [lm.answer(fact.text, fact.target_new) for fact in facts]
    alone = [said_instead(lm, [answer])[0] for answer in answers]
    passes: list[int] = []
    logits = lm.logits

    def counting(batch: Any, **options: Any) -> torch.Tensor:
        passes.append(batch.n_rows)
        return logits(batch, **options)

    monkeypatch.setattr(lm, "logits", counting)
    assert said_instead(lm, answers) == alone
    assert passes == [ANSWERS_PER_PASS, ANSWERS_PER_PASS, 3]


def test_an_answer_stays_in_only_where_an_earlier_fact_writes_its_prompt() -> None:
    """Facts 0 and 1 are answered; 2 writes the prompt of the answered 3, which is written after it."""
    facts = [PROMPT, PROMPT, OTHER, dataclasses.replace(OTHER, target_new="French")]
    assert left_out(facts, [0, 1, 3]) == [0, 1]
    assert left_out(facts, [0, 1, 2]) == [0, 1, 2]
    assert left_out(facts, []) == []


@pytest.mark.parametrize("name", SETTINGS)
def test_one_answered_fact_does_not_hold_up_the_others(tiny_llama64: EditableLM, known: Fact, name: str) -> None:
    edit = write(tiny_llama64, name, [OTHER, known])
    assert edit.facts == (OTHER, known)
    assert edit.notes["answered_before"] == [1]
    assert write(tiny_llama64, name, [OTHER]).notes["answered_before"] == []


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "ft-m"])
def test_a_call_is_refused_when_nothing_is_left(tiny_llama64: EditableLM, known: Fact, name: str) -> None:
    begin = f"the model already answers {known.text!r} with {known.target_new!r}"
    with pytest.raises(NothingToEditError, match=rf"^{begin}; choose another target$"):
        write(tiny_llama64, name, [known])
    with pytest.raises(NothingToEditError, match=rf"^{begin}, and so on for all 2 facts; choose another target$"):
        write(tiny_llama64, name, [known, known])


REPLACING: dict[str, dict[str, Any]] = {
    "grace": {"layer": 1, "n_iter": 60, "edit_lr": 1.0},
    "wise": {"layer": 1, "n_iter": 40, "edit_lr": 1.0, "mask_ratio": 1.0, "norm_constraint": 9.0},
}


@pytest.mark.parametrize("name", REPLACING)
def test_an_edit_is_taken_back_by_another(tiny_llama64: EditableLM, known: Fact, name: str) -> None:
    """The model is asked as it stands, not as it is below the active replacements."""
    lm, editor = tiny_llama64, editors.get(name)
    hparams = editor.hparams(lm, overrides=REPLACING[name])
    other = dataclasses.replace(known, target_new="the")
    with editor(lm, [other], hparams=hparams, templates=TEMPLATES[:1]).applied(lm):
        assert are_answered(lm, [known, other], target_tok="in_context") == [False, True]
        with pytest.raises(NothingToEditError):
            editor(lm, [other], hparams=hparams, templates=TEMPLATES[:1])
        back = editor(lm, [known], hparams=hparams, templates=TEMPLATES[:1])
        assert back.notes["answered_before"] == []
        with back.applied(lm):
            assert are_answered(lm, [known, other], target_tok="in_context") == [True, False]
    # the same in one call, before which the earlier fact cannot be asked
    both = editor(lm, [other, known], hparams=hparams, templates=TEMPLATES[:1])
    assert both.notes["answered_before"] == []
    with both.applied(lm):
        assert are_answered(lm, [known, other], target_tok="in_context") == [True, False]


def test_a_codebook_has_no_entry_for_an_answered_fact(tiny_llama64: EditableLM, known: Fact) -> None:
    book = write(tiny_llama64, "grace", [known, OTHER], seed=4).modules[0].replacement
    # an entry starts from the numbers of its place in the call
    alone = write(tiny_llama64, "grace", [OTHER], seed=5).modules[0].replacement
    assert book.labels == alone.labels == ("Korean",)
    torch.testing.assert_close(book.keys, alone.keys, rtol=1e-12, atol=0)
    torch.testing.assert_close(book.values, alone.values, rtol=1e-9, atol=1e-9)


def test_a_side_memory_does_not_learn_an_answered_fact(tiny_llama64: EditableLM, known: Fact) -> None:
    both, alone = (write(tiny_llama64, "wise", facts).modules[0].replacement for facts in ([known, OTHER], [OTHER]))
    assert both.counts == alone.counts == (1,)
    assert torch.equal(both.changes, alone.changes)


def test_fine_tuning_goes_on_until_its_loss_is_below_the_floor(tiny_llama64: EditableLM, known: Fact) -> None:
    edit = write(tiny_llama64, "ft-m", [known])
    assert edit.notes["answered_before"] == [0]
    assert edit.notes["updates"] == 1


def test_joint_training_keeps_an_answered_fact(tiny_llama64: EditableLM, known: Fact) -> None:
    """The others' updates could take its answer away."""
    both, alone = (write(tiny_llama64, "ft-m", facts).modules[0].delta for facts in ([known, OTHER], [OTHER]))
    assert not torch.equal(both.matrix, alone.matrix)
