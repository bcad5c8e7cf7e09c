"""An evaluation record: a fact and the texts that show whether its edit holds, and what it must leave alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rep_fast.errors import PromptError
from rep_fast.facts.fact import Fact, Sided, clean_text


@dataclass(frozen=True, slots=True)
class EditCase:
    """A fact with its evaluation texts.

    Args:
        case_id: number of the record in its source set, unique in a file.
        fact: what is edited.
        paraphrase_prompts: other wordings of the whole prompt, full texts (many do not even name the subject).
        neighborhood_prompts: full prompts about other subjects, which an edit must not change.
        neighborhood_target: the answer of the neighbours; fixes how many of their positions are scored.
        subject_rephrases: other names of the subject, for the slot of `fact.prompt`.
        extra: fields of the source record that the package does not use, kept for writing.
    Raises:
        PromptError: a text is blank or no text.
    """

    case_id: int
    fact: Fact
    paraphrase_prompts: tuple[str, ...] = ()
    neighborhood_prompts: tuple[str, ...] = ()
    neighborhood_target: str = ""
    subject_rephrases: Sided[str] = field(default_factory=Sided)
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if isinstance(self.case_id, bool) or not isinstance(self.case_id, int):
            raise PromptError(f"case_id must be an integer, got {self.case_id!r}")
        if self.subject_rephrases is None:
            object.__setattr__(self, "subject_rephrases", Sided())
        for name in ("paraphrase_prompts", "neighborhood_prompts"):
            texts = getattr(self, name)
            if isinstance(texts, str):
                raise PromptError(f"{name} must be a sequence of texts, got the single text {texts!r:.60}")
            object.__setattr__(self, name, tuple(clean_text(text, what=name) for text in texts))
        for rephrase in self.subject_rephrases:
            clean_text(rephrase, what="a rephrase of the subject")


@dataclass(frozen=True, slots=True)
class RephraseCounts:
    """How much of the original subject is left in the rephrases of a file (methods §8.1).

    Attributes:
        total: rephrases read.
        ending_in_subject: end with the original subject, so their subject-last token is the old one.
        containing_subject: hold it anywhere.
        unchanged: are the original subject.
        cases_with_unchanged: records with at least one unchanged rephrase.
        blank: blank entries that were dropped.
    """

    total: int
    ending_in_subject: int
    containing_subject: int
    unchanged: int
    cases_with_unchanged: int
    blank: int


def count_rephrases(cases: Iterable[EditCase]) -> RephraseCounts:
    """Counts over the rephrased subjects of all cases, in-domain and out-of-domain together."""
    total = ending = containing = unchanged = cases_with_unchanged = blank = 0
    for case in cases:
        subject, rephrases = case.fact.subject, [text.strip() for text in case.subject_rephrases]
        same = rephrases.count(subject)
        total += len(rephrases)
        ending += sum(text.endswith(subject) for text in rephrases)
        containing += sum(subject in text for text in rephrases)
        unchanged += same
        cases_with_unchanged += same > 0
        blank += int(case.extra.get(BLANK_REPHRASES, 0))
    return RephraseCounts(total, ending, containing, unchanged, cases_with_unchanged, blank)


BLANK_REPHRASES = "blank_rephrases"  # key in EditCase.extra: how many blank entries the source record held
