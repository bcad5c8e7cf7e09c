"""Metrics by name, each with the protocol it belongs to (methods §9).

"Locality" or "efficacy" mean different quantities in different papers: no number is comparable without its protocol.
Protocols: `REP` (robust editing: exact match, agreement), `EasyEdit` (token match), `PAC` (path editing: token match,
agreement and their mean), `ROME` (comparisons of probabilities on CounterFact: ES, PS, NS and their differences;
generated texts), `zsRE` (correct tokens, those of the neighbours too). In percent; fluency in bits × 100.

Every metric of neighbours leaves out the prompts that the record's own group edits (all records that stand on one model
together, written yet or not), unless the run's protocol asks them too (`Protocol.edited_neighbours`).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rep_fast.evaluation.records import CaseRecord, PromptScore

Records = Sequence[CaseRecord]
# A metric's value in [−1, 1] (fluency: in bits) and the number of prompts (micro) or records (macro) behind it; None
# without any.
Measured = tuple[float, int] | None


@dataclass(frozen=True)
class Metric:
    """A named number with its protocol and its definition in words."""

    name: str
    protocol: str
    meaning: str
    compute: Callable[[Records], Measured]


def measure(records: Records) -> dict[str, tuple[float, int]]:
    """Every metric these records allow, times 100, with the count it is averaged over."""
    measured: dict[str, tuple[float, int]] = {}
    for metric in METRICS:
        value = metric.compute(records)
        if value is not None:
            measured[metric.name] = (100.0 * value[0], value[1])
    return measured


def _exact(prompt: PromptScore) -> float:
    return prompt.exact_match


def _tokens(prompt: PromptScore) -> float:
    return prompt.token_match


def _agreement(prompt: PromptScore) -> float:
    return prompt.agreement or 0.0


def _micro(group: str, role: str, unit: Callable[[PromptScore], float]) -> Callable[[Records], Measured]:
    """Mean over all prompts of all records."""

    def compute(records: Records) -> Measured:
        return _mean([unit(prompt) for record in records for prompt in record.prompts(group, role)])

    return compute


def _macro(group: str, role: str, unit: Callable[[PromptScore], float]) -> Callable[[Records], Measured]:
    """Mean over records of the mean over each record's prompts."""

    def compute(records: Records) -> Measured:
        per_record = [[unit(prompt) for prompt in record.prompts(group, role)] for record in records]
        return _mean([statistics.fmean(values) for values in per_record if values])

    return compute


def _paired(
    group: str, winner: str, loser: str, unit: Callable[[PromptScore, PromptScore], float]
) -> Callable[[Records], Measured]:
    """Mean over records of the mean over prompts that have both targets."""

    def compute(records: Records) -> Measured:
        means = []
        for record in records:
            first, second = record.prompts(group, winner), record.prompts(group, loser)
            if first and second:
                means.append(statistics.fmean(unit(a, b) for a, b in zip(first, second, strict=True)))
        return _mean(means)

    return compute


def _wins(winner: PromptScore, loser: PromptScore) -> float:
    return float(winner.nll < loser.nll)


def _margin(winner: PromptScore, loser: PromptScore) -> float:
    return winner.probability - loser.probability


def _mean(values: Sequence[float]) -> Measured:
    return (statistics.fmean(values), len(values)) if values else None


def _harmonic(*parts: Callable[[Records], Measured]) -> Callable[[Records], Measured]:
    def compute(records: Records) -> Measured:
        values = [part(records) for part in parts]
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            return None
        return statistics.harmonic_mean([v for v, _ in known]), min(n for _, n in known)

    return compute


_rewrite_tm = _macro("success", "new", _tokens)
_rephrase_tm = _macro("paraphrase", "new", _tokens)
_locality_macro = _macro("locality", "kept", _agreement)
_es = _paired("success", "new", "true", _wins)
_ps = _paired("paraphrase", "new", "true", _wins)
_ns = _paired("locality", "kept", "new", _wins)


def _about_questions(compute: Callable[[Records], Measured]) -> Callable[[Records], Measured]:
    """Of records whose neighbours are questions: those of zsRE."""
    return lambda records: compute([record for record in records if record.is_of_questions])


def _fluency(kind: str) -> Callable[[Records], Measured]:
    """Mean over records of the mean over each record's generated texts of one kind, in bits."""

    def compute(records: Records) -> Measured:
        per_record = [[text.fluency for text in record.generated if text.kind == kind] for record in records]
        return _mean([statistics.fmean(values) for values in per_record if values])

    return compute


def _consistency(records: Records) -> Measured:
    return _mean([record.consistency for record in records if record.consistency is not None])


def _path_score(records: Records) -> Measured:
    """Of efficacy and generality alone where locality is absent; nothing where one of those two is."""
    wanted = [_rewrite_tm(records), _rephrase_tm(records)]
    parts = [part for part in (*wanted, _locality_macro(records)) if part is not None]
    if None in wanted:
        return None
    return statistics.fmean(value for value, _ in parts), min(n for _, n in parts)


def _perturbed(kind: str, side: str, words: str) -> Metric:
    domain = "in-domain" if side == "id" else "out-of-domain"
    name = f"{kind}_{side}"
    return Metric(name, "REP", f"EM of the new target {words}, {domain}, per prompt", _micro(name, "new", _exact))


_WORDS = "; words as nltk.word_tokenize finds them with a sentence splitter that knows no abbreviations"
_UNEDITED = "; neighbours that the same group edits are left out, unless the protocol asks them"

METRICS: tuple[Metric, ...] = (
    Metric("success", "REP", "EM of the new target on the edited prompt", _micro("success", "new", _exact)),
    Metric(
        "locality",
        "REP",
        "share of neighbours' answer positions with the unedited model's arg-max, per prompt" + _UNEDITED,
        _micro("locality", "kept", _agreement),
    ),
    Metric("paraphrase", "REP", "EM of the new target on paraphrases, per prompt", _micro("paraphrase", "new", _exact)),
    _perturbed("rephrase", "id", "on rephrased subjects"),
    _perturbed("rephrase", "ood", "on rephrased subjects"),
    _perturbed("shuffle", "id", "on subjects with shuffled tokens"),
    _perturbed("shuffle", "ood", "on subjects with shuffled tokens"),
    _perturbed("long", "id", "after long contexts"),
    _perturbed("long", "ood", "after long contexts"),
    Metric("reversion", "REP", "EM of the true target on the edited prompt", _micro("success", "true", _exact)),
    Metric("paraphrase_macro", "REP", "EM on paraphrases, mean of record means", _macro("paraphrase", "new", _exact)),
    Metric("rewrite_tm", "EasyEdit", "TM of the new target on the edited prompt", _rewrite_tm),
    Metric("rephrase_tm", "EasyEdit", "TM of the new target on paraphrased prompts", _rephrase_tm),
    Metric(
        "locality_macro",
        "EasyEdit",
        "agreement with the unedited model, mean of record means" + _UNEDITED,
        _locality_macro,
    ),
    Metric("path_efficacy", "PAC", "TM of the new target on the edited prompt", _rewrite_tm),
    Metric(
        "path_locality",
        "PAC",
        "agreement with the unedited model, mean of record means" + _UNEDITED,
        _locality_macro,
    ),
    Metric("path_generality", "PAC", "TM of the new target on paraphrased prompts", _rephrase_tm),
    Metric(
        "path_score",
        "PAC",
        "arithmetic mean of efficacy (TM), locality (agreement) and generality (TM)",
        _path_score,
    ),
    Metric("es", "ROME", "share of records with P(new) > P(true) on the edited prompt", _es),
    Metric("ps", "ROME", "share of paraphrases with P(new) > P(true), mean of record means", _ps),
    Metric("ns", "ROME", "share of neighbours with P(true) > P(new), mean of record means" + _UNEDITED, _ns),
    Metric("s", "ROME", "harmonic mean of ES, PS and NS", _harmonic(_es, _ps, _ns)),
    Metric("em_diff", "ROME", "P(new) − P(true) on the edited prompt", _paired("success", "new", "true", _margin)),
    Metric("pm_diff", "ROME", "P(new) − P(true) on paraphrases", _paired("paraphrase", "new", "true", _margin)),
    Metric(
        "nm_diff", "ROME", "P(true) − P(new) on neighbours" + _UNEDITED, _paired("locality", "kept", "new", _margin)
    ),
    Metric(
        "zsre_efficacy",
        "zsRE",
        "share of correct tokens of the new target on the edited prompt, where neighbours are questions",
        _about_questions(_rewrite_tm),
    ),
    Metric(
        "zsre_generality",
        "zsRE",
        "share of correct tokens of the new target on paraphrases, where neighbours are questions",
        _about_questions(_rephrase_tm),
    ),
    Metric(
        "zsre_specificity",
        "zsRE",
        "share of correct tokens of the answers to neighbours' questions: correctness, not agreement" + _UNEDITED,
        _macro("question", "true", _tokens),
    ),
    Metric(
        "fluency",
        "REP",
        "n-gram entropy in bits × 100 of the edited prompt's sampled continuation" + _WORDS,
        _fluency("prompt"),
    ),
    Metric(
        "generation_fluency",
        "ROME",
        "n-gram entropy in bits × 100 of texts sampled from the record's generation prompts" + _WORDS,
        _fluency("generation"),
    ),
    Metric(
        "consistency",
        "ROME",
        "tf-idf cosine of sampled texts with reference texts about the new target",
        _consistency,
    ),
)

PROTOCOL_OF: dict[str, str] = {metric.name: metric.protocol for metric in METRICS}
# Metrics of generated texts, which are written only when asked for.
GENERATED = ("fluency", "generation_fluency", "consistency")
