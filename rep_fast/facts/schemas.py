"""One parser per file format: a record as it stands in the file → an EditCase (methods §8.6)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rep_fast.errors import PromptError
from rep_fast.facts.case import BLANK_REPHRASES, EditCase
from rep_fast.facts.fact import Fact, Sided

Record = Mapping[str, Any]
IN_DOMAIN_COUNT = "subject_rephrase_in_domain"  # written only where the split is not the usual first half


class FieldError(ValueError):
    """A field of one record is missing or has the wrong shape; the reader adds file and index."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(reason)
        self.field = field


def parse_robustness(record: Record, index: int) -> EditCase:
    """Robustness file: full prompt, subject, paraphrases or null, neighbours, ten rephrased subjects."""
    used = {"case_id", "prompt", "subject", "target_new", "target_true", "rephrase_prompt", "locality_prompt"}
    used |= {"locality_ground_truth", "subject_rephrase", "rephrase_target", IN_DOMAIN_COUNT}
    fact = _full_prompt_fact(record, true_field="target_true")
    extra = {name: value for name, value in record.items() if name not in used}
    rephrase_target = record.get("rephrase_target")
    if isinstance(rephrase_target, str) and rephrase_target.strip() != fact.target_new:
        extra["rephrase_target"] = rephrase_target
    # shipped files hold blank machine-made texts: of no use to anybody, so dropped, and counted
    rephrases, blank = _without_blanks(_texts(record, "subject_rephrase"))
    if blank:
        extra[BLANK_REPHRASES] = blank
    paraphrases, _ = _without_blanks(_texts(record, "rephrase_prompt", optional=True))
    return _case(
        case_id=_case_id(record),
        fact=fact,
        paraphrases=("rephrase_prompt", paraphrases),
        neighbours=("locality_prompt", _texts(record, "locality_prompt")),
        neighborhood_target=_text(record, "locality_ground_truth", optional=True),
        subject_rephrases=_split(rephrases, record.get(IN_DOMAIN_COUNT)),
        extra=extra,
    )


def parse_pac(record: Record, index: int) -> EditCase:
    """CounterFact or zsRE as used for path editing: like the robustness file, `ground_truth` for `target_true`."""
    paraphrases = "paraphrase_prompts" if "paraphrase_prompts" in record else "rephrase_prompt"
    used = {"case_id", "prompt", "subject", "target_new", "ground_truth", paraphrases, "locality_prompt"}
    used |= {"locality_ground_truth"}
    return _case(
        case_id=_case_id(record),
        fact=_full_prompt_fact(record, true_field="ground_truth"),
        paraphrases=(paraphrases, _texts(record, paraphrases, optional=True)),
        neighbours=("locality_prompt", _texts(record, "locality_prompt", optional=True)),
        neighborhood_target=_first_text(record, "locality_ground_truth"),
        extra={name: value for name, value in record.items() if name not in used},
    )


def parse_counterfact(record: Record, index: int) -> EditCase:
    """CounterFact source: the fact inside `requested_rewrite`, its prompt with a slot."""
    rewrite = record["requested_rewrite"]
    if not isinstance(rewrite, Mapping):
        raise FieldError("requested_rewrite", f"must be an object, got {type(rewrite).__name__}")
    targets = {}
    for name in ("target_new", "target_true"):
        target = rewrite.get(name)
        if not isinstance(target, Mapping):
            raise FieldError(f"requested_rewrite.{name}", f"must be an object with 'str', got {target!r:.40}")
        targets[name] = _text(target, "str", prefix=f"requested_rewrite.{name}.")
    prompt = _text(rewrite, "prompt", prefix="requested_rewrite.")
    subject = _text(rewrite, "subject", prefix="requested_rewrite.")
    used = {"case_id", "requested_rewrite", "paraphrase_prompts", "neighborhood_prompts"}
    extra = {name: value for name, value in record.items() if name not in used}
    if "relation_id" in rewrite:
        extra["relation_id"] = rewrite["relation_id"]
    return _case(
        case_id=_case_id(record),
        fact=_checked("requested_rewrite.prompt", lambda: Fact(prompt, subject, **targets)),
        paraphrases=("paraphrase_prompts", _texts(record, "paraphrase_prompts", optional=True)),
        neighbours=("neighborhood_prompts", _texts(record, "neighborhood_prompts", optional=True)),
        neighborhood_target=targets["target_true"],  # neighbours share the true object
        extra=extra,
    )


def parse_zsre(record: Record, index: int) -> EditCase:
    """zsRE source: question `src`, new target `alt`, true target the first of `answers`; numbered by position."""
    answers = record.get("answers")
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise FieldError("answers", f"must be a list of at least one text, got {answers!r:.60}")
    prompt, subject, target = _text(record, "src"), _text(record, "subject"), _text(record, "alt")
    used = {"src", "subject", "alt", "rephrase", "loc", "loc_ans"}
    return _case(
        case_id=_case_id(record) if "case_id" in record else index,
        fact=_checked("src", lambda: Fact.from_text(prompt, subject, target, answers[0])),
        paraphrases=("rephrase", _texts(record, "rephrase", optional=True)),
        neighbours=("loc", _texts(record, "loc", optional=True)),
        neighborhood_target=_text(record, "loc_ans", optional=True),
        extra={name: value for name, value in record.items() if name not in used | {"case_id"}},
    )


Parser = Callable[[Record, int], EditCase]
# schema → (fields that give it away, parser); the first whose fields are all there is taken
SCHEMAS: Mapping[str, tuple[frozenset[str], Parser]] = {
    "counterfact": (frozenset({"requested_rewrite"}), parse_counterfact),
    "zsre": (frozenset({"src", "alt"}), parse_zsre),
    "robustness": (frozenset({"prompt", "subject", "target_true"}), parse_robustness),
    "pac": (frozenset({"prompt", "subject", "ground_truth"}), parse_pac),
}


def _full_prompt_fact(record: Record, *, true_field: str) -> Fact:
    prompt, subject, target = (_text(record, name) for name in ("prompt", "subject", "target_new"))
    if true_field not in record:
        raise FieldError(true_field, "is missing")
    true = None if record[true_field] is None else _first_text(record, true_field)
    return _checked("prompt", lambda: Fact.from_text(prompt, subject, target, true))


def _case(
    *, paraphrases: tuple[str, tuple[str, ...]], neighbours: tuple[str, tuple[str, ...]], **fields: Any
) -> EditCase:
    for name, texts in (paraphrases, neighbours):
        if any(not text.strip() for text in texts):
            raise FieldError(name, "holds a blank text")
    return _checked(
        "record",
        lambda: EditCase(paraphrase_prompts=paraphrases[1], neighborhood_prompts=neighbours[1], **fields),
    )


def _checked(field: str, build: Callable[[], Any]) -> Any:
    try:
        return build()
    except PromptError as error:
        raise FieldError(field, str(error)) from None


def _case_id(record: Record) -> int:
    value = record.get("case_id")
    if isinstance(value, bool) or not isinstance(value, int):
        raise FieldError("case_id", "is missing" if value is None else f"must be an integer, got {value!r:.40}")
    return value


def _text(record: Record, name: str, *, optional: bool = False, prefix: str = "") -> str:
    value = record.get(name)
    if value is None and optional:
        return ""
    if value is None:
        raise FieldError(prefix + name, "is missing")
    if not isinstance(value, str):
        raise FieldError(prefix + name, f"must be a text, got {type(value).__name__} {value!r:.40}")
    if not value.strip() and not optional:
        raise FieldError(prefix + name, "is blank")
    return value.strip()


def _texts(record: Record, name: str, *, optional: bool = False) -> tuple[str, ...]:
    value = record.get(name)
    if value is None and optional:
        return ()
    if value is None:
        raise FieldError(name, "is missing")
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise FieldError(name, f"must be a list of texts, got {value!r:.60}")
    return tuple(value)


def _first_text(record: Record, name: str) -> str:
    texts = _texts(record, name, optional=True)
    return texts[0].strip() if texts else ""


def _without_blanks(texts: tuple[str, ...]) -> tuple[tuple[str, ...], int]:
    kept = tuple(text for text in texts if text.strip())
    return kept, len(texts) - len(kept)


def _split(rephrases: tuple[str, ...], in_domain_count: Any) -> Sided[str]:
    if in_domain_count is None:
        return Sided.halves(rephrases)
    if isinstance(in_domain_count, bool) or not isinstance(in_domain_count, int):
        raise FieldError(IN_DOMAIN_COUNT, f"must be an integer, got {in_domain_count!r:.40}")
    if not 0 <= in_domain_count <= len(rephrases):
        raise FieldError(IN_DOMAIN_COUNT, f"is {in_domain_count}, but the record has {len(rephrases)} rephrases")
    return Sided(rephrases[:in_domain_count], rephrases[in_domain_count:])
