"""Reading and writing case files: every format, every malformed record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rep_fast.errors import OutputError, RecordError
from rep_fast.facts import CaseFile, EditCase, Fact, RephraseCounts, Sided, read_cases, write_cases

ROBUSTNESS = {
    "case_id": 143,
    "prompt": "Microsoft Office Mobile, created by",
    "subject": "Microsoft Office Mobile",
    "target_new": "Adobe",
    "target_true": "Microsoft",
    "rephrase_prompt": ["Office Mobile was developed by"],
    "rephrase_target": "Adobe",
    "locality_prompt": ["Windows NT was created by", "Xenix was a product of"],
    "locality_ground_truth": "Microsoft",
    "subject_rephrase": ["Office for Phones", "Mobile Office", "The Microsoft Office Mobile"],
}
COUNTERFACT = {
    "case_id": 3,
    "pararel_idx": 2796,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Danielle Darrieux",
    },
    "paraphrase_prompts": ["Danielle Darrieux, a native", "Danielle Darrieux spoke"],
    "neighborhood_prompts": ["The mother tongue of Léon Blum is"],
    "attribute_prompts": ["J.R.R. Tolkien spoke"],
    "generation_prompts": ["Danielle Darrieux was born in"],
}
ZSRE = {
    "subject": "Watts Humphrey",
    "src": "What university did Watts Humphrey attend?",
    "pred": "Trinity College",
    "rephrase": "What university did Watts Humphrey take part in?",
    "alt": "University of Michigan",
    "answers": ["Illinois Institute of Technology"],
    "loc": "nq question: who played desmond doss father in hacksaw ridge",
    "loc_ans": "Hugo Weaving",
    "cond": "Trinity College >> University of Michigan",
}
PAC = {
    "case_id": 0,
    "prompt": "The mother tongue of Danielle Darrieux is",
    "subject": "Danielle Darrieux",
    "target_new": "English",
    "ground_truth": "French",
    "rephrase_prompt": "Danielle Darrieux, a native",
    "locality_prompt": "The mother tongue of Léon Blum is",
    "locality_ground_truth": "French",
}
BY_SCHEMA = {"robustness": ROBUSTNESS, "counterfact": COUNTERFACT, "zsre": ZSRE, "pac": PAC}


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def read(tmp_path: Path, *records: Any, skip_bad: bool = False) -> CaseFile:
    return read_cases(write(tmp_path / "cases.json", list(records)), skip_bad=skip_bad)


@pytest.mark.parametrize("schema", BY_SCHEMA)
def test_schema_is_recognised_by_content(tmp_path: Path, schema: str) -> None:
    assert read(tmp_path, BY_SCHEMA[schema]).schema == schema


def test_robustness_record(tmp_path: Path) -> None:
    (case,) = read(tmp_path, ROBUSTNESS | {"note": 7}).cases
    assert case == EditCase(
        case_id=143,
        fact=Fact("{}, created by", "Microsoft Office Mobile", "Adobe", "Microsoft"),
        paraphrase_prompts=("Office Mobile was developed by",),
        neighborhood_prompts=("Windows NT was created by", "Xenix was a product of"),
        neighborhood_target="Microsoft",
        subject_rephrases=Sided(("Office for Phones", "Mobile Office"), ("The Microsoft Office Mobile",)),
        extra={"note": 7},
    )


def test_null_paraphrases_are_none(tmp_path: Path) -> None:
    assert read(tmp_path, ROBUSTNESS | {"rephrase_prompt": None}).cases[0].paraphrase_prompts == ()


def test_targets_lose_the_leading_blank_that_shipped_files_hold(tmp_path: Path) -> None:
    (case,) = read(tmp_path, ROBUSTNESS | {"target_new": " Adobe", "rephrase_target": " Adobe"}).cases
    assert case.fact.target_new == "Adobe"
    assert case.extra == {}


def test_counterfact_record(tmp_path: Path) -> None:
    (case,) = read(tmp_path, COUNTERFACT).cases
    assert case.fact == Fact("The mother tongue of {} is", "Danielle Darrieux", "English", "French")
    assert case.neighborhood_target == "French"
    assert case.paraphrase_prompts == ("Danielle Darrieux, a native", "Danielle Darrieux spoke")
    assert case.extra["relation_id"] == "P103"
    assert case.extra["generation_prompts"] == ["Danielle Darrieux was born in"]


def test_zsre_record_is_numbered_by_position(tmp_path: Path) -> None:
    cases = read(tmp_path, ZSRE, ZSRE).cases
    assert [case.case_id for case in cases] == [0, 1]
    assert cases[0].fact.target_new == "University of Michigan"
    assert cases[0].fact.target_true == "Illinois Institute of Technology"
    assert cases[0].neighborhood_prompts == ("nq question: who played desmond doss father in hacksaw ridge",)
    assert cases[0].neighborhood_target == "Hugo Weaving"


def test_pac_record_and_its_zsre_flavour(tmp_path: Path) -> None:
    zsre = {name: value for name, value in PAC.items() if name != "rephrase_prompt"}
    zsre |= {"case_id": 1, "paraphrase_prompts": ["A?", "B?"], "similar_prompts": ["C?"]}
    plain, flavoured = read(tmp_path, PAC, zsre).cases
    assert plain.fact.target_true == "French"
    assert plain.paraphrase_prompts == ("Danielle Darrieux, a native",)
    assert flavoured.paraphrase_prompts == ("A?", "B?")
    assert flavoured.extra == {"similar_prompts": ["C?"]}


@pytest.mark.parametrize("schema", BY_SCHEMA)
def test_what_is_written_reads_back_unchanged(tmp_path: Path, schema: str) -> None:
    cases = read(tmp_path, BY_SCHEMA[schema]).cases
    write_cases(tmp_path / "copy.json", cases)
    copy = read_cases(tmp_path / "copy.json")
    assert copy.schema == "robustness"
    assert copy.cases == cases


def test_an_unusual_split_survives_writing(tmp_path: Path) -> None:
    case = EditCase(1, Fact("{} is", "Rome", "t"), subject_rephrases=Sided(("a", "b", "c"), ("d",)))
    write_cases(tmp_path / "copy.json", [case])
    assert read_cases(tmp_path / "copy.json").cases == [case]


def test_a_prompt_that_names_its_subject_twice_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"case 1: .* more than once"):
        write_cases(tmp_path / "copy.json", [EditCase(1, Fact("{} or Rome is", "Rome", "t"))])
    assert not list(tmp_path.iterdir())


def test_writing_into_a_file_as_directory_fails_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        write_cases(tmp_path / "file" / "cases.json", [])


def test_rephrases_that_keep_the_subject_are_counted(tmp_path: Path) -> None:
    names = ["The Microsoft Office Mobile", "Microsoft Office Mobile", "Microsoft Office Mobile, the app", "Else", " "]
    other = ROBUSTNESS | {"case_id": 1, "subject_rephrase": ["Else"]}
    counts = read(tmp_path, ROBUSTNESS | {"subject_rephrase": names}, other).rephrases
    assert counts == RephraseCounts(
        total=5, ending_in_subject=2, containing_subject=3, unchanged=1, cases_with_unchanged=1, blank=1
    )


MALFORMED: list[tuple[dict[str, Any], str, str]] = [
    (ROBUSTNESS | {"subject": "Libre Office"}, "prompt", "occurs 0 times"),
    (ROBUSTNESS | {"subject": "e"}, "prompt", "occurs 4 times"),
    (ROBUSTNESS | {"prompt": 5}, "prompt", "must be a text, got int 5"),
    (ROBUSTNESS | {"prompt": "Microsoft Office Mobile {}"}, "prompt", "already holds"),
    (ROBUSTNESS | {"target_new": " "}, "target_new", "is blank"),
    (ROBUSTNESS | {"target_new": None}, "target_new", "is missing"),
    (ROBUSTNESS | {"case_id": "7"}, "case_id", "must be an integer"),
    (ROBUSTNESS | {"case_id": None}, "case_id", "is missing"),
    (ROBUSTNESS | {"subject_rephrase": None}, "subject_rephrase", "is missing"),
    (ROBUSTNESS | {"subject_rephrase": [1]}, "subject_rephrase", "must be a list of texts"),
    (ROBUSTNESS | {"locality_prompt": {"a": 1}}, "locality_prompt", "must be a list of texts"),
    (ROBUSTNESS | {"locality_prompt": [" "]}, "locality_prompt", "holds a blank text"),
    (ROBUSTNESS | {"subject_rephrase_in_domain": 9}, "subject_rephrase_in_domain", "is 9"),
    (ROBUSTNESS | {"subject_rephrase_in_domain": "1"}, "subject_rephrase_in_domain", "must be an integer"),
    ({name: value for name, value in ROBUSTNESS.items() if name != "target_true"}, "target_true", "is missing"),
]


@pytest.mark.parametrize(("record", "field", "reason"), MALFORMED)
def test_a_malformed_record_is_named_by_file_index_and_field(
    tmp_path: Path, record: dict[str, Any], field: str, reason: str
) -> None:
    with pytest.raises(RecordError, match=rf"cases\.json, record 1, field '{field}': .*{reason}"):
        read(tmp_path, ROBUSTNESS, record | {"case_id": record["case_id"] if field == "case_id" else 2})


def test_the_message_on_a_malformed_record_says_how_to_go_on(tmp_path: Path) -> None:
    lacking = {name: value for name, value in ROBUSTNESS.items() if name != "subject"} | {"case_id": 2}
    with pytest.raises(RecordError, match=r"is missing; correct it, or .* with --skip-bad \(skip_bad=True\)$"):
        read(tmp_path, ROBUSTNESS, lacking)


@pytest.mark.parametrize(("record", "field", "reason"), MALFORMED)
def test_a_malformed_record_is_skipped_on_demand(
    tmp_path: Path, record: dict[str, Any], field: str, reason: str
) -> None:
    found = read(
        tmp_path, ROBUSTNESS, record | {"case_id": record["case_id"] if field == "case_id" else 2}, skip_bad=True
    )
    assert [case.case_id for case in found.cases] == [143]
    (skipped,) = found.skipped
    assert (skipped.index, skipped.field) == (1, field)
    assert reason in skipped.reason


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"requested_rewrite": "x"}, "requested_rewrite"),
        (
            {"requested_rewrite": COUNTERFACT["requested_rewrite"] | {"target_new": "English"}},
            "requested_rewrite.target_new",
        ),
        (
            {"requested_rewrite": COUNTERFACT["requested_rewrite"] | {"target_true": {}}},
            "requested_rewrite.target_true.str",
        ),
        ({"requested_rewrite": COUNTERFACT["requested_rewrite"] | {"prompt": "no slot"}}, "requested_rewrite.prompt"),
        ({"requested_rewrite": COUNTERFACT["requested_rewrite"] | {"subject": ""}}, "requested_rewrite.subject"),
    ],
)
def test_malformed_counterfact_records_are_named(tmp_path: Path, change: dict[str, Any], field: str) -> None:
    with pytest.raises(RecordError, match=f"record 0, field '{field}'"):
        read(tmp_path, COUNTERFACT | change)


@pytest.mark.parametrize(
    ("change", "field"),
    [({"answers": []}, "answers"), ({"subject": "Nobody"}, "src"), ({"alt": ""}, "alt"), ({"loc": 3}, "loc")],
)
def test_malformed_zsre_records_are_named(tmp_path: Path, change: dict[str, Any], field: str) -> None:
    with pytest.raises(RecordError, match=f"record 0, field '{field}'"):
        read(tmp_path, ZSRE | change)


def test_a_record_that_is_no_object(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="record 1, field 'record': must be an object, got list"):
        read(tmp_path, ROBUSTNESS, [1])


def test_a_repeated_case_id(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="record 1, field 'case_id': 143 was already used by record 0"):
        read(tmp_path, ROBUSTNESS, ROBUSTNESS)


def test_only_malformed_records(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="all 2 records are malformed, the first in field 'prompt'"):
        read(tmp_path, *[ROBUSTNESS | {"subject": "x y"}] * 2, skip_bad=True)


def test_an_unknown_format_names_what_was_found_and_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"unknown format: its first record holds \['a'\]; .*requested_rewrite"):
        read(tmp_path, {"a": 1})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "is not JSON: .* at line 1"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"{}", "must hold a list of records, got dict"),
        (b"[]", "holds no records"),
        (b"[" * 100000, "is no"),
    ],
)
def test_files_that_are_no_list_of_records(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "cases.json").write_bytes(content)
    with pytest.raises(RecordError, match=reason):
        read_cases(tmp_path / "cases.json")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"cannot read the case file .*absent\.json"):
        read_cases(tmp_path / "absent.json")


def test_a_byte_order_mark_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "cases.json").write_bytes(b"\xef\xbb\xbf" + json.dumps([ROBUSTNESS]).encode())
    assert len(read_cases(tmp_path / "cases.json").cases) == 1
