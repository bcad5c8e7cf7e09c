"""Evaluation of editors by any regime, resumable at every record and every edit (methods §10)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rep_fast.edits import Edit
from rep_fast.errors import HparamError, RecordError
from rep_fast.evaluation.case_scorer import CASE_ERRORS, CaseScorer, pre_edit
from rep_fast.evaluation.fluency import WORDS, References
from rep_fast.evaluation.protocol import DEFAULT_PROTOCOL, NOT_WRITTEN_DOWN, Protocol
from rep_fast.evaluation.records import CaseRecord
from rep_fast.evaluation.regime import Regime
from rep_fast.evaluation.run_directory import RunDirectory
from rep_fast.evaluation.stacking import Clock, Group, Progress, Setting, StoredEdits, Work, WriteStep
from rep_fast.evaluation.summary import Summary
from rep_fast.evaluation.transform import Transform
from rep_fast.facts import EditCase, TextSource
from rep_fast.models import EditableLM

CEILING = "ceiling"


def evaluate_regime(
    lm: EditableLM,
    cases: Sequence[EditCase],
    columns: Mapping[str, WriteStep],
    *,
    regime: Regime,
    seeds: Sequence[int] = (0, 1, 2),
    text: TextSource | None = None,
    out_dir: str | Path | None = None,
    resume: bool = False,
    keep_edits: bool = False,
    settings: Mapping[str, Any] | None = None,
    ceiling_of: str | None = None,
    protocol: Protocol = DEFAULT_PROTOCOL,
    transform: Transform | None = None,
    references: Mapping[str, Sequence[str]] | None = None,
    token_budget: int = 8192,
    progress: Progress | None = None,
) -> Summary:
    """Evaluate editors on groups of cases whose edits are stacked on one model.

    A case that cannot be asked or written is recorded with its reason and the group goes on without it. Where a step of
    several cases fails, each is tried alone to find which they are, and the others are written together.

    Args:
        columns: name → function (the step's cases, seed, the group's edits that are active) → Edit, made on the model
            as it stands. Called in order for each seed and group.
        regime: how cases are grouped and edits stacked.
        seeds: each draws its own shuffles and long contexts and is passed to the columns.
        text: where long contexts come from; None leaves them out.
        out_dir: run directory, where every edit and every record is on disk before the next is made; None: in memory.
        resume: continue the run in `out_dir`.
        keep_edits: leave the edits of finished groups in `out_dir`/edits.
        settings: hyper-parameters of the columns, stored with the run; a resumed run must have the same.
        ceiling_of: column whose v* makes the extra column "ceiling" (`oracle.oracle_patch`); regime single only.
        transform: RECT of each edit when it is made, or PRUNE of the sum of a group's edits each time it is asked
            about, each edit then being made on the untransformed ones before it.
        references: new target → texts about it, which consistency compares generated texts with.
        progress: called as progress(done, total) after each evaluation, and each edit of a stacked regime.
    Returns:
        Summary of all records, in percent. The model's weights are bit-identical to what they were.
    Raises:
        HparamError: edits are active, a column has a reserved or unknown name, no seed, no column, a ceiling of stacked
            edits, references without generated texts, or a transform of edits that change no weight.
        RecordError: no cases, or two with the same case_id.
        MissingDependencyError: texts are to be generated and nltk is not installed.
        OutputError, RunMismatchError, CorruptFileError: see `RunDirectory`.
    """
    _check_arguments(lm, cases, columns, seeds)
    _check_options(columns, regime, ceiling_of, protocol, references)
    names = [*columns, *([CEILING] if ceiling_of else [])]
    described = _described(
        lm, cases, names, regime=regime, seeds=seeds, text=text, protocol=protocol, references=references,
        settings=settings, ceiling_of=ceiling_of, transform=transform,
    )  # fmt: skip
    with RunDirectory(out_dir, described, resume=resume, absent={"protocol": NOT_WRITTEN_DOWN}) as run:
        scorer = CaseScorer(
            lm,
            text=text,
            protocol=protocol,
            token_budget=token_budget,
            before=pre_edit(lm, cases, run, protocol=protocol, token_budget=token_budget),
            references=None if references is None else References(references),
        )
        work = Work(len(seeds) * sum(_work(regime, len(group), names) for group in regime.groups(cases)), progress)
        setting = Setting(lm, regime, protocol, scorer, run, work, keep_edits, transform)
        for seed in seeds:
            for number, group in enumerate(regime.groups(_ordered(cases, seed, protocol))):
                _evaluate_group(setting, group, columns, seed=seed, number=number, ceiling_of=ceiling_of)
        return _summarised(run, names, seeds, cases, described)


def _described(
    lm: EditableLM,
    cases: Sequence[EditCase],
    names: Sequence[str],
    *,
    regime: Regime,
    seeds: Sequence[int],
    text: TextSource | None,
    protocol: Protocol,
    references: Mapping[str, Sequence[str]] | None,
    settings: Mapping[str, Any] | None,
    ceiling_of: str | None,
    transform: Transform | None,
) -> dict[str, Any]:
    """What identifies a run: a resumed one must have the same."""
    return {
        "regime": regime.name,
        "evaluate_every": regime.evaluate_every,
        "model": lm.name,
        "fingerprint": lm.fingerprint,
        "cases": len(cases),
        "cases_digest": cases_digest(cases),
        "columns": list(names),
        "ceiling_of": ceiling_of,
        "transform": None if transform is None else transform.name,
        # absent from runs that took RECT of the sum, so that none of those goes on with RECT of each update
        **({"transform_of_each": True} if transform is not None and transform.of_each else {}),
        "seeds": list(seeds),
        "text": None if text is None else text.name,
        "text_digest": None if text is None else text.digest,
        "references_digest": None if references is None else _digest(references),
        # absent from runs whose fluency is of other words, so that none of those goes on with these
        **({"fluency_words": WORDS} if protocol.generated_tokens else {}),
        "protocol": dataclasses.asdict(protocol),
        "hparams": dict(settings or {}),
    }


def _summarised(
    run: RunDirectory,
    names: Sequence[str],
    seeds: Sequence[int],
    cases: Sequence[EditCase],
    described: Mapping[str, Any],
) -> Summary:
    summary = Summary.of(_in_order(run, names, seeds, cases), settings=described)
    run.write_text("summary.json", summary.to_json())
    run.write_text("summary.csv", summary.to_csv())
    return summary


def _evaluate_group(
    setting: Setting,
    cases: Sequence[EditCase],
    columns: Mapping[str, WriteStep],
    *,
    seed: int,
    number: int,
    ceiling_of: str | None,
) -> None:
    """One group under every column; plans of its cases are shared by the columns."""
    setting.scorer.begin_group(cases)
    made: list[Edit] = []
    for place, (name, write) in enumerate(columns.items()):
        # one record is edited again as fast as its edit would be read
        directory = setting.run.directory("edits", f"seed{seed}-column{place}-group{number}")
        stored = StoredEdits(directory if setting.regime.is_stacked or setting.keep_edits else None)
        group = Group(setting, cases, seed=seed, column=name, write=write, stored=stored)
        group.evaluate()
        if name == ceiling_of:
            made = group.edits
    if ceiling_of is not None:
        _evaluate_ceiling(setting, cases[0], seed, columns[ceiling_of], made)


def _evaluate_ceiling(setting: Setting, case: EditCase, seed: int, write: WriteStep, made: Sequence[Edit]) -> None:
    if (seed, case.case_id, CEILING, 1) in setting.run.records:
        setting.work.skip()
        return
    labels: dict[str, Any] = {"column": CEILING, "regime": setting.regime.name}
    clock = Clock(setting.lm)
    try:
        setting.scorer.plan(case, seed)
        edit = made[0] if made else write([case], seed, ())
        edit_seconds = clock.lap()
        record = setting.scorer.score_ceiling(case, seed, edit, **labels)
        record = dataclasses.replace(record, seconds={"edit": edit_seconds, "evaluation": clock.lap()})
    except CASE_ERRORS as error:
        record = CaseRecord(seed, case.case_id, failure=str(error), **labels)
    setting.keep(record)


def _ordered(cases: Sequence[EditCase], seed: int, protocol: Protocol) -> Sequence[EditCase]:
    if protocol.record_order == "file":
        return cases
    return random.Random(f"records/{seed}").sample(cases, len(cases))


def _work(regime: Regime, n_cases: int, names: Sequence[str]) -> int:
    """Pieces of work of one group: evaluations, and edits where they do not come one with each."""
    n_edits = len(list(regime.steps(range(n_cases)))) if regime.is_stacked else 0
    return len(names) * (sum(regime.evaluated_after(n_cases)) + n_edits)


def _in_order(
    run: RunDirectory, names: Sequence[str], seeds: Sequence[int], cases: Sequence[EditCase]
) -> list[CaseRecord]:
    """All records by column, seed, case and number of edits, whatever order they were made in."""
    place = {case.case_id: number for number, case in enumerate(cases)}
    column = {name: number for number, name in enumerate(names)}
    order = {seed: number for number, seed in enumerate(seeds)}
    return sorted(run.records.values(), key=lambda r: (column[r.column], order[r.seed], place[r.case_id], r.n_edits))


def _check_arguments(
    lm: EditableLM, cases: Sequence[EditCase], columns: Mapping[str, WriteStep], seeds: Sequence[int]
) -> None:
    if lm.active_edits:
        raise HparamError(f"{len(lm.active_edits)} edits are active on {lm.name!r}; undo them before evaluating others")
    if not columns or not seeds:
        raise HparamError(f"nothing to evaluate: {len(columns)} columns, {len(seeds)} seeds; give at least one of each")
    if len(set(seeds)) < len(seeds):
        raise HparamError(f"seeds {list(seeds)} repeat; give each once")
    if not cases:
        raise RecordError("no cases to evaluate; give at least one")
    seen: set[int] = set()
    for index, case in enumerate(cases):
        if case.case_id in seen:
            raise RecordError(f"case {index} repeats case_id {case.case_id}; a run needs distinct ones")
        seen.add(case.case_id)


def _check_options(
    columns: Mapping[str, WriteStep],
    regime: Regime,
    ceiling_of: str | None,
    protocol: Protocol,
    references: Mapping[str, Sequence[str]] | None,
) -> None:
    if CEILING in columns:
        raise HparamError(f"column name {CEILING!r} is reserved; use ceiling_of= to have it computed")
    if ceiling_of is not None and ceiling_of not in columns:
        raise HparamError(f"ceiling_of={ceiling_of!r} is not one of the columns {list(columns)}")
    if ceiling_of is not None:
        check_ceiling(regime)
    if references is not None and not protocol.generated_tokens:
        raise HparamError(
            "references are compared with generated texts, and none are generated; set generated_tokens=100"
        )


def check_ceiling(regime: Regime) -> None:
    """Refuse a ceiling of stacked edits.

    Raises:
        HparamError: the regime stacks edits.
    """
    if regime.is_stacked:
        raise HparamError(
            f"the ceiling forces one value into the unedited model, regime {regime.name!r} stacks edits; take it in "
            "regime single"
        )


def cases_digest(cases: Sequence[EditCase]) -> str:
    """SHA-256 over the cases' content, in order; of the fields nobody reads, only what texts are generated from."""
    digest = hashlib.sha256()
    for case in cases:
        extra = {name: case.extra[name] for name in ("generation_prompts",) if name in case.extra}
        digest.update(_canonical(dataclasses.asdict(dataclasses.replace(case, extra=extra))))
    return digest.hexdigest()


def _digest(data: Any) -> str:
    return hashlib.sha256(_canonical(data)).hexdigest()


def _canonical(data: Any) -> bytes:
    return json.dumps(data, sort_keys=True, ensure_ascii=False, default=list).encode()
