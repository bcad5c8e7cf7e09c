"""From the objects of a run to the plain data of a page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from rep_fast.analysis import Sweep
from rep_fast.collisions import Collision, ScanResult
from rep_fast.edits import Edit
from rep_fast.evaluation import MAIN_METRICS, METRICS, Summary
from rep_fast.facts import EditCase, shuffled_subjects
from rep_fast.models import EditableLM
from rep_fast.paths import NodeScores, layer_map, select
from rep_fast.report.answering import answers
from rep_fast.report.data import Answered, CollisionRow, Curves, EditedFact, LayerScores, MetricRow, Similarities

_MEANING = {metric.name: (metric.protocol, metric.meaning) for metric in METRICS}
_CUT = "\ufffd"  # a window of tokens may begin and end inside a character


def edited_fact(
    lm: EditableLM,
    case: EditCase,
    edits: Mapping[str, Edit],
    *,
    per_kind: int = 2,
    seed: int = 0,
    n_tokens: int | None = None,
) -> EditedFact:
    """A case with the model's answers before and under each edit.

    Args:
        edits: column → edit of this case.
        per_kind: prompts of each kind: paraphrases, seen and unseen rephrases, shuffles, neighbours.
        seed: of the shuffles, as the edit's adapter was trained with.
        n_tokens: length of each answer, see `answers`.
    """
    fact = case.fact
    asked = [(kind, prompt) for kind, prompts in _prompts(lm, case, seed).items() for prompt in prompts[:per_kind]]
    prompts = [prompt for _, prompt in asked]
    targets = [fact.target_new, fact.target_true or "", case.neighborhood_target]
    before = answers(lm, prompts, targets, n_tokens=n_tokens)
    after: dict[str, list[str]] = {}
    for column, edit in edits.items():
        with edit.applied(lm):
            after[column] = answers(lm, prompts, targets, n_tokens=n_tokens)
    answered = tuple(
        Answered(
            kind=kind,
            prompt=prompt,
            before=before[place],
            after={column: texts[place] for column, texts in after.items()},
            wanted=before[place] if kind == "neighbour" else fact.target_new,
        )
        for place, (kind, prompt) in enumerate(asked)
    )
    return EditedFact(fact.prompt, fact.subject, fact.target_new, fact.target_true or "", answered)


def _prompts(lm: EditableLM, case: EditCase, seed: int) -> dict[str, list[str]]:
    fact, names = case.fact, case.subject_rephrases
    shuffles = shuffled_subjects(
        fact.subject, lambda text: lm.tokenizer.encode(text, add_special_tokens=False), lm.tokenizer.decode, seed=seed
    )

    def filled(subjects: Iterable[str]) -> list[str]:
        return [fact.prompt.replace("{}", subject) for subject in subjects]

    return {
        "prompt": [fact.text],
        "paraphrase": list(case.paraphrase_prompts),
        "rephrase": filled(names.in_domain),
        "unseen rephrase": filled(names.out_of_domain),
        "unseen shuffle": filled(shuffles.out_of_domain),
        "neighbour": list(case.neighborhood_prompts),
    }


def metric_rows(summary: Summary, names: Sequence[str] = MAIN_METRICS) -> tuple[MetricRow, ...]:
    """The summary's metrics, those no column has left out."""
    rows = []
    for name in names:
        cells = {
            column: (own[name].mean, own[name].std, own[name].n) for column, own in summary.cells.items() if name in own
        }
        if cells:
            rows.append(MetricRow(name, *_MEANING[name], cells))
    return tuple(rows)


def sweep_curves(found: Sweep, names: Sequence[str] = MAIN_METRICS) -> Curves:
    """A sweep's curves, the metrics no value has left out."""
    series = {name: tuple(found.series(name)) for name in names}
    kept = {name: values for name, values in series.items() if any(value is not None for value in values)}
    return Curves(found.name, tuple(map(str, found.values)), kept)


def similarity_rows(measured: Iterable[Mapping[str, tuple[Tensor, Tensor]]]) -> tuple[Similarities, ...]:
    """`Workbench.similarities` of several edits put together."""
    before: dict[str, list[float]] = {}
    after: dict[str, list[float]] = {}
    for kinds in measured:
        for kind, (rho_before, rho_after) in kinds.items():
            before.setdefault(kind, []).extend(rho_before.tolist())
            after.setdefault(kind, []).extend(rho_after.tolist())
    return tuple(Similarities(kind, tuple(before[kind]), tuple(after[kind])) for kind in before)


def collision_rows(
    lm: EditableLM, scanned: ScanResult, *, per_subject: int = 2, most: int = 12
) -> tuple[CollisionRow, ...]:
    """The strongest collisions, at most `per_subject` of each; see `around_hit` for their texts."""
    hits = [hit for own in scanned.collisions for hit in own[:per_subject]]
    hits.sort(key=lambda hit: -hit.rho)
    return tuple(CollisionRow(hit.subject, hit.rho, *around_hit(lm, hit)) for hit in hits[:most])


def around_hit(lm: EditableLM, hit: Collision, *, width: int | None = None) -> tuple[str, str, str]:
    """The words before a hit, its token, and the words after it, as they can be read: whole words, no special tokens.

    The token may be a piece of a word, whose other pieces then end the first text and begin the last; its leading blank
    belongs to the first unless it is all there is. With `width`, at most so many characters before and half as many
    after it, where words are not longer than that.
    """
    token = _without_marks(lm, hit.hit_token)
    blank = token[: len(token) - len(token.lstrip())] if token.strip() else ""
    before = _without_marks(lm, hit.prefix_text.removesuffix(hit.hit_token)).lstrip(_CUT) + blank
    if width is not None:
        before = before[-width - 1 :]  # one more: it tells whether a word begins there
    if not before[:1].isspace():  # the window may begin inside a word
        before = before.partition(" ")[2] or before
    after = _without_marks(lm, hit.following_text).rstrip(_CUT)
    if width is not None:
        after = after[: width // 2]
    if " " in after:  # or end inside one
        after = after.rpartition(" ")[0]
    return before.lstrip(), token.removeprefix(blank) or " ", after.rstrip()


def _without_marks(lm: EditableLM, text: str) -> str:
    """A corpus text without the tokenizer's special tokens, which stand where documents begin."""
    for mark in lm.tokenizer.all_special_tokens:
        text = text.replace(mark, " ")
    return text


def layer_scores(label: str, scores: NodeScores, *, top: int = 15) -> LayerScores:
    """Mean score of each layer's `top` best nodes."""
    chosen = select(scores, top=min(top, scores.key.shape[1]))
    means = layer_map(scores, chosen.positive)
    return LayerScores(label, _finite(means.key), _finite(means.value))


def _finite(values: Tensor) -> tuple[float | None, ...]:
    return tuple(value if math.isfinite(value) else None for value in values.tolist())


def model_description(lm: EditableLM, layers: Sequence[int]) -> dict[str, str]:
    """What the model is, in words; `layers` are the edited ones, none stand for all."""
    numbers = ", ".join(map(str, layers)) if layers else "all"
    parameters = sum(weight.numel() for weight in lm.model.parameters())
    return {
        "name": str(lm.name),
        "family": lm.family,
        "parameters": f"{parameters / 1e6:.1f} M",
        "layers": str(lm.n_layers),
        "hidden width D": str(lm.hidden_size),
        "key width M": str(lm.key_width(0)),
        "edited layers": f"{numbers} (the first is 0)",
        "dtype, device": f"{str(lm.dtype).removeprefix('torch.')}, {lm.device}",
        "torch threads": str(torch.get_num_threads()),
    }
