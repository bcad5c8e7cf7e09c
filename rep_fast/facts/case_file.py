"""Reading and writing files of evaluation cases; the format is recognised from the content."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rep_fast.errors import RecordError
from rep_fast.facts.case import EditCase, RephraseCounts, count_rephrases
from rep_fast.facts.fact import Sided, occurrences
from rep_fast.facts.schemas import IN_DOMAIN_COUNT, SCHEMAS, FieldError
from rep_fast.safe_files import write_atomically


@dataclass(frozen=True, slots=True)
class SkippedRecord:
    """A record that was left out: its position in the file, the field at fault and why."""

    index: int
    field: str
    reason: str


@dataclass(frozen=True, slots=True)
class CaseFile:
    """What was read: the cases, the format they stood in, and the records left out."""

    cases: list[EditCase]
    schema: str
    skipped: list[SkippedRecord]

    @property
    def rephrases(self) -> RephraseCounts:
        """How many rephrased subjects still end with, contain or are the original subject."""
        return count_rephrases(self.cases)


def read_cases(path: str | Path, *, skip_bad: bool = False) -> CaseFile:
    """Cases of a JSON file in robustness, CounterFact, zsRE or PAC format, in file order.

    Args:
        path: a JSON file holding a list of records.
        skip_bad: leave malformed records out and list them in `.skipped`, instead of stopping at the first.
    Raises:
        RecordError: the file is missing, no JSON list, empty, of an unknown format; or a record is malformed (with
            `skip_bad`: all of them are).
    """
    path = Path(path)
    records = _read_records(path)
    schema = _detect_schema(path, records)
    parse = SCHEMAS[schema][1]
    cases: list[EditCase] = []
    skipped: list[SkippedRecord] = []
    index_of: dict[int, int] = {}
    for index, record in enumerate(records):
        try:
            if not isinstance(record, dict):
                raise FieldError("record", f"must be an object, got {type(record).__name__}")
            if missing := SCHEMAS[schema][0] - record.keys():
                raise FieldError(sorted(missing)[0], "is missing")
            case = parse(record, index)
            if case.case_id in index_of:
                raise FieldError("case_id", f"{case.case_id} was already used by record {index_of[case.case_id]}")
        except FieldError as error:
            if not skip_bad:
                raise RecordError(
                    f"{path}, record {index}, field '{error.field}': {error}; "
                    f"correct it, or leave bad records out with --skip-bad (skip_bad=True)"
                ) from None
            skipped.append(SkippedRecord(index, error.field, str(error)))
            continue
        index_of[case.case_id] = index
        cases.append(case)
    if not cases:
        first = skipped[0]
        raise RecordError(
            f"{path}: all {len(skipped)} records are malformed, the first in field '{first.field}': {first.reason}"
        )
    return CaseFile(cases, schema, skipped)


def write_cases(path: str | Path, cases: Iterable[EditCase]) -> None:
    """Write cases in the robustness format; `read_cases` gives them back unchanged.

    Raises:
        OutputError: the file cannot be written.
        RecordError: a prompt names its subject outside the slot too, which this format cannot express.
    """
    records = [_robustness_record(case) for case in cases]
    text = json.dumps(records, ensure_ascii=False, indent=1) + "\n"
    write_atomically(path, text.encode("utf-8"))


def _read_records(path: Path) -> list[Any]:
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise RecordError(f"cannot read the case file {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise RecordError(f"{path} is not UTF-8 text (byte {error.start}); convert it") from None
    except json.JSONDecodeError as error:
        raise RecordError(f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise RecordError(f"{path} is not a list of records: its JSON is nested too deeply") from None
    if not isinstance(records, list):
        raise RecordError(f"{path} must hold a list of records, got {type(records).__name__}")
    if not records:
        raise RecordError(f"{path} holds no records")
    return records


def _detect_schema(path: Path, records: list[Any]) -> str:
    """Format of the file: that of the first record that looks like any."""
    for record in records:
        if isinstance(record, dict):
            for schema, (marks, _) in SCHEMAS.items():
                if marks <= record.keys():
                    return schema
    known = "; ".join(f"{schema} ({', '.join(sorted(marks))})" for schema, (marks, _) in SCHEMAS.items())
    found = sorted(records[0]) if isinstance(records[0], dict) else type(records[0]).__name__
    raise RecordError(f"{path} has an unknown format: its first record holds {found}; known formats by field: {known}")


def _robustness_record(case: EditCase) -> dict[str, Any]:
    fact, rephrases = case.fact, list(case.subject_rephrases)
    if occurrences(fact.text, fact.subject) != 1:
        raise RecordError(
            f"case {case.case_id}: {fact.text!r} names {fact.subject!r} more than once, which the robustness format "
            "cannot express; reword the prompt"
        )
    record: dict[str, Any] = {
        "case_id": case.case_id,
        "prompt": fact.text,
        "subject": fact.subject,
        "target_new": fact.target_new,
        "target_true": fact.target_true,
        "rephrase_prompt": list(case.paraphrase_prompts) or None,
        "rephrase_target": fact.target_new,
        "locality_prompt": list(case.neighborhood_prompts),
        "locality_ground_truth": case.neighborhood_target,
        "subject_rephrase": rephrases,
    }
    if Sided.halves(rephrases) != case.subject_rephrases:
        record[IN_DOMAIN_COUNT] = len(case.subject_rephrases.in_domain)
    own = {name: value for name, value in case.extra.items() if name not in record or name == "rephrase_target"}
    return {**record, **own}
