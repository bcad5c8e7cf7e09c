"""What is kept of one evaluation of a case: per-prompt scores and times, as plain data that JSON can hold."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rep_fast.evaluation.questions import CaseQuestion
from rep_fast.evaluation.scoring import TargetScore

# seed, case_id, column, n_edits
RecordKey = tuple[int, int, str, int]


@dataclass(frozen=True)
class PromptScore:
    """Score of one prompt and target; `agreement`: share of answer positions with the unedited model's arg-max."""

    hits: tuple[bool, ...]
    nll: float
    agreement: float | None = None

    @property
    def exact_match(self) -> float:
        """EM, 0 or 1."""
        return float(all(self.hits))

    @property
    def token_match(self) -> float:
        """TM in [0, 1]."""
        return sum(self.hits) / len(self.hits)

    @property
    def probability(self) -> float:
        """exp(−NLL), the geometric mean of the answer tokens' probabilities."""
        return math.exp(-self.nll)


@dataclass(frozen=True)
class GeneratedText:
    """A text the edited model wrote: the prompt and its sampled continuation.

    `kind`: "prompt" for the edited prompt, "generation" for one of the record's own generation prompts; `fluency` in
    bits.
    """

    kind: str
    text: str
    fluency: float


@dataclass(frozen=True)
class CaseRecord:
    """Scores of one case under one column and seed: group → role → prompts in order.

    `seconds` holds the time per stage; `failure` says why there are no scores. `regime` says how edits were stacked
    (`Regime.name`), `n_edits` how many records of the case's group had been written when it was evaluated, those that
    could not be written among them; a failure stands where its group ends. `generated`: texts the edited model wrote,
    where that was asked for, and `consistency` of them with texts about the new target. `neighbours_left_out`: how many
    neighbour prompts were not asked because the group edits them (`Protocol.edited_neighbours`); None where that was
    not counted. `asks_questions`: whether the case's neighbours are questions (zsRE), asked or left out; None in older
    records, where the scores tell.
    """

    seed: int
    case_id: int
    column: str
    scores: Mapping[str, Mapping[str, tuple[PromptScore, ...]]] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    failure: str | None = None
    regime: str = "single"
    n_edits: int = 1
    generated: tuple[GeneratedText, ...] = ()
    consistency: float | None = None
    neighbours_left_out: int | None = None
    asks_questions: bool | None = None

    @property
    def key(self) -> RecordKey:
        """What identifies the record in a run."""
        return (self.seed, self.case_id, self.column, self.n_edits)

    @property
    def is_of_questions(self) -> bool:
        """Whether zsRE's metrics are about this record."""
        return "question" in self.scores if self.asks_questions is None else self.asks_questions

    def prompts(self, group: str, role: str) -> tuple[PromptScore, ...]:
        """Scores of one group and role, () where the case has none."""
        return self.scores.get(group, {}).get(role, ())

    def to_json(self) -> dict[str, Any]:
        """Plain data; an infinite NLL is written as null because JSON has no infinity."""
        return {
            "seed": self.seed,
            "case_id": self.case_id,
            "column": self.column,
            "scores": {
                group: {role: [_prompt_to_json(p) for p in prompts] for role, prompts in roles.items()}
                for group, roles in self.scores.items()
            },
            "seconds": dict(self.seconds),
            "failure": self.failure,
            "regime": self.regime,
            "n_edits": self.n_edits,
            **({"generated": [dataclasses.asdict(text) for text in self.generated]} if self.generated else {}),
            **({} if self.consistency is None else {"consistency": self.consistency}),
            **({} if self.neighbours_left_out is None else {"neighbours_left_out": self.neighbours_left_out}),
            **({} if self.asks_questions is None else {"asks_questions": self.asks_questions}),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CaseRecord:
        """Inverse of `to_json`; KeyError or TypeError when the data has another shape."""
        return cls(
            seed=data["seed"],
            case_id=data["case_id"],
            column=data["column"],
            scores={
                group: {role: tuple(_prompt_from_json(p) for p in prompts) for role, prompts in roles.items()}
                for group, roles in data["scores"].items()
            },
            seconds=data["seconds"],
            failure=data["failure"],
            regime=data["regime"],
            n_edits=data["n_edits"],
            generated=tuple(GeneratedText(**text) for text in data.get("generated", ())),
            consistency=data.get("consistency"),
            neighbours_left_out=data.get("neighbours_left_out"),
            asks_questions=data.get("asks_questions"),
        )


def case_scores(
    asked: Sequence[CaseQuestion],
    scores: Sequence[TargetScore],
    *,
    before: Sequence[Sequence[int]] = (),
) -> dict[str, dict[str, tuple[PromptScore, ...]]]:
    """Sort scores into group → role; `before` holds the unedited model's arg-max per "kept" question, in order."""
    kept = iter(before)
    sorted_scores: dict[str, dict[str, tuple[PromptScore, ...]]] = {}
    for item, score in zip(asked, scores, strict=True):
        agreement = _agreement(score.argmax, next(kept)) if item.role == "kept" else None
        roles = sorted_scores.setdefault(item.group, {})
        roles[item.role] = (*roles.get(item.role, ()), PromptScore(score.hits, score.nll, agreement))
    return sorted_scores


def _agreement(after: Sequence[int], before: Sequence[int]) -> float:
    return sum(a == b for a, b in zip(after, before, strict=True)) / len(after)


def _prompt_to_json(prompt: PromptScore) -> dict[str, Any]:
    data: dict[str, Any] = {
        "hits": [int(hit) for hit in prompt.hits],
        "nll": prompt.nll if math.isfinite(prompt.nll) else None,
    }
    if prompt.agreement is not None:
        data["agreement"] = prompt.agreement
    return data


def _prompt_from_json(data: Mapping[str, Any]) -> PromptScore:
    nll = data["nll"]
    return PromptScore(
        hits=tuple(bool(hit) for hit in data["hits"]),
        nll=math.inf if nll is None else nll,
        agreement=data.get("agreement"),
    )
