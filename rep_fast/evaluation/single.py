"""The single-edit regime: edit, evaluate, undo exactly, for every seed, case and column (methods §10)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from rep_fast.edits import Edit
from rep_fast.errors import HparamError, NothingToEditError, PromptError, RecordError, TokenizationError
from rep_fast.evaluation.oracle import oracle_patch, wanted_value
from rep_fast.evaluation.questions import PERTURBED_GROUPS, CaseQuestion, case_questions, neighbour_questions
from rep_fast.evaluation.records import CaseRecord, case_scores
from rep_fast.evaluation.run_directory import RunDirectory
from rep_fast.evaluation.scoring import PlannedBatch, ScoringPlan, TargetScore, plan_scoring, run_scoring
from rep_fast.evaluation.summary import Summary
from rep_fast.facts import EditCase, PerturbedCase, TextSource, perturb
from rep_fast.models import EditableLM
from rep_fast.presets import Preset, from_flat_mapping

BuildEdit = Callable[[EditCase, int], Edit]
Progress = Callable[[int, int], None]

CEILING = "ceiling"
# What is wrong with one record must not end a run of hundreds; anything else is wrong with the run and does.
_CASE_ERRORS = (PromptError, NothingToEditError, TokenizationError)


@dataclass(frozen=True)
class Protocol:
    """Choices that change numbers, all of them part of a run's settings.

    Attributes:
        target_tok: "in_context" or "standalone" target tokenisation (methods §2.4).
        n_words: whitespace-separated words of a long context.
        long_in, long_out: long contexts on each side.
        shuffle_join: "decode" or "raw" (methods §8.2).
        mode: how edits are applied, "hook" or "merge".
    """

    target_tok: str = "in_context"
    n_words: int = 300
    long_in: int = 5
    long_out: int = 5
    shuffle_join: Literal["decode", "raw"] = "decode"
    mode: Literal["hook", "merge"] = "hook"

    @classmethod
    def of_preset(cls, preset: Preset) -> Protocol:
        """The choices of a preset's section `evaluation`."""
        made: Protocol = from_flat_mapping(cls, preset.section("evaluation"), where=f"preset {preset.name}")
        return made


def evaluate_single(
    lm: EditableLM,
    cases: Sequence[EditCase],
    columns: Mapping[str, BuildEdit],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    text: TextSource | None = None,
    out_dir: str | Path | None = None,
    resume: bool = False,
    settings: Mapping[str, Any] | None = None,
    ceiling_of: str | None = None,
    protocol: Protocol = Protocol(),
    token_budget: int = 8192,
    progress: Progress | None = None,
) -> Summary:
    """Evaluate editors one case at a time, each on the unedited model.

    Args:
        columns: name → function (case, seed) → Edit; called in order for each seed and case, so that later columns may
            build on what an earlier one made for the same case.
        seeds: each draws its own shuffles and long contexts and is passed to the columns.
        text: where long contexts come from; None leaves them out.
        out_dir: run directory, where every (seed, case, column) is on disk before the next starts; None: in memory.
        resume: continue the run in `out_dir`.
        settings: hyper-parameters of the columns, stored with the run; a resumed run must have the same.
        ceiling_of: column whose v* makes the extra column "ceiling" (`oracle.oracle_patch`).
        progress: called as progress(done, total) after each (seed, case, column).
    Returns:
        Summary of all records, in percent. The model's weights are bit-identical to what they were.
    Raises:
        HparamError: edits are active, a column has a reserved or unknown name, no seed, no column.
        RecordError: no cases, or two with the same case_id.
        OutputError, RunMismatchError, CorruptFileError: see `RunDirectory`.
    """
    _check_arguments(lm, cases, columns, seeds, ceiling_of)
    names = [*columns, *([CEILING] if ceiling_of else [])]
    described = _describe(lm, cases, names, seeds, text, protocol, settings, ceiling_of)
    with RunDirectory(out_dir, described, resume=resume) as run:
        before = _pre_edit(lm, cases, run, protocol, token_budget)
        regime = _SingleRegime(lm, columns, ceiling_of, text, protocol, token_budget, before)
        done, total = len(run.records), len(seeds) * len(cases) * len(names)
        for seed in seeds:
            for case in cases:
                todo = [name for name in names if (seed, case.case_id, name) not in run.records]
                if not todo:
                    continue
                for record in regime.evaluate(case, seed, todo):
                    run.append(record)
                    done += 1
                    if progress is not None:
                        progress(done, total)
        order = [(seed, case.case_id, name) for name in names for seed in seeds for case in cases]
        summary = Summary.of([run.records[key] for key in order], settings=described)
        run.write_text("summary.json", summary.to_json())
        run.write_text("summary.csv", summary.to_csv())
    return summary


@dataclass
class _SingleRegime:
    """Evaluates one case at a time; scoring plans are made once per (seed, case) and run for every column."""

    lm: EditableLM
    columns: Mapping[str, BuildEdit]
    ceiling_of: str | None
    text: TextSource | None
    protocol: Protocol
    token_budget: int
    before: Mapping[int, Sequence[Sequence[int]]]

    def evaluate(self, case: EditCase, seed: int, todo: Sequence[str]) -> Iterator[CaseRecord]:
        """Records of the columns in `todo`, in order, each as soon as it is known."""
        try:
            perturbed = perturb_case(self.lm, case, text=self.text, seed=seed, protocol=self.protocol)
            asked = case_questions(case, perturbed)
            plan = self._plan(asked)
        except _CASE_ERRORS as error:
            yield from (CaseRecord(seed, case.case_id, name, failure=str(error)) for name in todo)
            return
        edits: dict[str, Edit] = {}
        for name in todo:
            try:
                if name == CEILING:
                    record = self._ceiling(case, seed, perturbed, edits)
                else:
                    record = self._column(case, seed, name, asked, plan, edits)
            except _CASE_ERRORS as error:
                record = CaseRecord(seed, case.case_id, name, failure=str(error))
            yield record

    def _plan(self, asked: Sequence[CaseQuestion]) -> ScoringPlan:
        questions = [item.question for item in asked]
        return plan_scoring(self.lm, questions, token_budget=self.token_budget, target_tok=self.protocol.target_tok)

    def _column(
        self,
        case: EditCase,
        seed: int,
        name: str,
        asked: Sequence[CaseQuestion],
        plan: ScoringPlan,
        edits: dict[str, Edit],
    ) -> CaseRecord:
        clock = _Clock(self.lm)
        edits[name] = self.columns[name](case, seed)
        clock.lap("edit")
        handle = edits[name].apply(self.lm, mode=self.protocol.mode)
        try:
            scores = run_scoring(self.lm, plan)
            clock.lap("evaluation")
        finally:
            handle.undo()
        clock.lap("undo")
        sorted_scores = case_scores(asked, scores, before=self.before[case.case_id])
        return CaseRecord(seed, case.case_id, name, sorted_scores, clock.seconds)

    def _ceiling(self, case: EditCase, seed: int, perturbed: PerturbedCase, edits: Mapping[str, Edit]) -> CaseRecord:
        assert self.ceiling_of is not None
        clock = _Clock(self.lm)
        edit = edits.get(self.ceiling_of) or self.columns[self.ceiling_of](case, seed)
        clock.lap("edit")
        asked = [
            item
            for item in case_questions(case, perturbed, lm=self.lm)
            if item.role == "new" and item.group in ("success", *PERTURBED_GROUPS)
        ]
        scores = score_ceiling(self.lm, edit, self._plan(asked))
        clock.lap("evaluation")
        return CaseRecord(seed, case.case_id, CEILING, case_scores(asked, scores), clock.seconds)


def score_ceiling(lm: EditableLM, edit: Edit, plan: ScoringPlan) -> list[TargetScore]:
    """Score a plan whose questions carry subject positions on the unedited model with v* forced there."""
    wanted_value(edit)

    def around(planned: PlannedBatch) -> Any:
        return oracle_patch(lm, edit, planned.subject_positions)

    return run_scoring(lm, plan, around=around)


def perturb_case(
    lm: EditableLM, case: EditCase, *, text: TextSource | None, seed: int, protocol: Protocol = Protocol()
) -> PerturbedCase:
    """The perturbed prompts of a case as evaluation asks them (methods §8), the same for the same seed."""
    return perturb(
        case,
        encode=partial(lm.tokenizer.encode, add_special_tokens=False),
        decode=lm.tokenizer.decode,
        text=text,
        seed=seed,
        n_words=protocol.n_words,
        n_long_in=protocol.long_in,
        n_long_out=protocol.long_out,
        join=protocol.shuffle_join,
        token_strings=lm.tokenizer.convert_ids_to_tokens,
    )


class _Clock:
    """Seconds between laps, the device waited for."""

    def __init__(self, lm: EditableLM) -> None:
        self._on_gpu = lm.device.type == "cuda"
        self.seconds: dict[str, float] = {}
        self._last = self._now()

    def lap(self, stage: str) -> None:
        now = self._now()
        self.seconds[stage] = now - self._last
        self._last = now

    def _now(self) -> float:
        if self._on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()


def _pre_edit(
    lm: EditableLM, cases: Sequence[EditCase], run: RunDirectory, protocol: Protocol, token_budget: int
) -> dict[int, list[list[int]]]:
    """Arg-max tokens of the unedited model at the answer positions of all neighbours, computed once per run."""
    stored = run.read_json("pre_edit.json")
    if stored is not None:
        return {int(case_id): predicted for case_id, predicted in stored.items()}
    predicted: dict[int, list[list[int]]] = {}
    for case in cases:
        kept = [item.question for item in neighbour_questions(case) if item.role == "kept"]
        try:
            plan = plan_scoring(lm, kept, token_budget=token_budget, target_tok=protocol.target_tok)
        except _CASE_ERRORS:
            continue  # planning the case itself meets the same error, which is recorded there
        predicted[case.case_id] = [list(score.argmax) for score in run_scoring(lm, plan)]
    run.write_json("pre_edit.json", predicted)
    return predicted


def _check_arguments(
    lm: EditableLM,
    cases: Sequence[EditCase],
    columns: Mapping[str, BuildEdit],
    seeds: Sequence[int],
    ceiling_of: str | None,
) -> None:
    if lm.active_edits:
        raise HparamError(f"{len(lm.active_edits)} edits are active on {lm.name!r}; undo them before evaluating others")
    if not columns or not seeds:
        raise HparamError(f"nothing to evaluate: {len(columns)} columns, {len(seeds)} seeds; give at least one of each")
    if len(set(seeds)) < len(seeds):
        raise HparamError(f"seeds {list(seeds)} repeat; give each once")
    if CEILING in columns:
        raise HparamError(f"column name {CEILING!r} is reserved; use ceiling_of= to have it computed")
    if ceiling_of is not None and ceiling_of not in columns:
        raise HparamError(f"ceiling_of={ceiling_of!r} is not one of the columns {list(columns)}")
    if not cases:
        raise RecordError("no cases to evaluate; give at least one")
    seen: set[int] = set()
    for index, case in enumerate(cases):
        if case.case_id in seen:
            raise RecordError(f"case {index} repeats case_id {case.case_id}; a run needs distinct ones")
        seen.add(case.case_id)


def _describe(
    lm: EditableLM,
    cases: Sequence[EditCase],
    names: Sequence[str],
    seeds: Sequence[int],
    text: TextSource | None,
    protocol: Protocol,
    settings: Mapping[str, Any] | None,
    ceiling_of: str | None,
) -> dict[str, Any]:
    """What identifies a run; field names appear in the message when a resumed run differs."""
    return {
        "regime": "single",
        "model": lm.name,
        "fingerprint": lm.fingerprint,
        "cases": len(cases),
        "cases_digest": cases_digest(cases),
        "columns": list(names),
        "ceiling_of": ceiling_of,
        "seeds": list(seeds),
        "text": None if text is None else text.name,
        "text_digest": None if text is None else text.digest,
        "protocol": dataclasses.asdict(protocol),
        "hparams": dict(settings or {}),
    }


def cases_digest(cases: Sequence[EditCase]) -> str:
    """SHA-256 over the cases' content, in order."""
    digest = hashlib.sha256()
    for case in cases:
        data = dataclasses.asdict(dataclasses.replace(case, extra={}))
        digest.update(json.dumps(data, sort_keys=True, ensure_ascii=False).encode())
    return digest.hexdigest()
