"""What an adapter must leave alone: keys its gate is trained to stay shut on (methods §17).

Random corpus keys, corpus keys that resemble the edited one (the collision scan), other subjects put into the edit's
own prompt and into other prompts, and the tokens of the positive texts before the subject's last one.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from rep_fast.collisions import CorpusSample, WhitenedQueries, hard_negatives
from rep_fast.facts import Fact, TextSource
from rep_fast.models import EditableLM
from rep_fast.rep.forms import LocatedTexts, SubjectForms, TextKeys
from rep_fast.rep.hparams import RepHparams

_NAME = re.compile(r"\b[A-Z][\w'’-]+(?: [A-Z][\w'’-]+)+\b")
_DOCUMENTS_READ = 400
# keys of the same tokens in the same context agree to rounding, whatever batch they were computed in
_SAME_KEY = 1e-3


@dataclass(frozen=True)
class NegativePool:
    """What negatives are drawn from, shared by all edits of one layer.

    subjects: other subjects, never those of evaluation records. prompts: prompts with `{}` to put them in besides the
    edit's own. corpus: keys of the layer over a sample of text; held_out: over further text, for the firing rate.
    """

    subjects: tuple[str, ...]
    prompts: tuple[str, ...]
    corpus: CorpusSample
    held_out: CorpusSample | None = None

    @classmethod
    def of_facts(
        cls, facts: Iterable[Fact], corpus: CorpusSample, held_out: CorpusSample | None = None
    ) -> NegativePool:
        """Subjects and prompts of known facts on the training side."""
        facts = list(facts)
        subjects, prompts = (dict.fromkeys(part) for part in ([f.subject for f in facts], [f.prompt for f in facts]))
        return cls(tuple(subjects), tuple(prompts), corpus, held_out)

    @classmethod
    def of_text(
        cls, text: TextSource, corpus: CorpusSample, held_out: CorpusSample | None = None, *, limit: int = 400
    ) -> NegativePool:
        """Names of two and more capitalised words found in a text, for models whose facts nobody lists."""
        names: dict[str, None] = {}
        for document in islice(text, _DOCUMENTS_READ):
            names |= dict.fromkeys(_NAME.findall(document))
        return cls(tuple(islice(names, limit)), (), corpus, held_out)


@dataclass(frozen=True)
class Negatives:
    """Keys [·, M] float32 by kind."""

    random: Tensor
    hard: Tensor
    subjects: Tensor
    other_tokens: Tensor

    def all(self) -> Tensor:
        """Every key in one tensor [n, M]."""
        return torch.cat([self.random, self.hard, self.subjects, self.other_tokens])


def draw_negatives(
    lm: EditableLM,
    forms: SubjectForms,
    positives: LocatedTexts,
    pool: NegativePool,
    *,
    positive_keys: TextKeys,
    response: Tensor,
    templates: Sequence[str],
    hparams: RepHparams,
    seed: int,
) -> Negatives:
    """Negatives of one edit.

    Args:
        positive_keys: of `positives`.
        response: [M] with ρ(k) = k·response; ranks the hard ones.
    Cost: one truncated forward over some 200 short texts and one pass over the corpus sample.
    """
    rng = random.Random(f"negatives/{seed}/{forms.fact.text}")
    last = positives.rows[0][positives.positions[0]]
    query = WhitenedQueries(
        subjects=(forms.fact.subject,),
        whitened=response.float()[None],
        self_similarity=torch.ones(1, dtype=torch.float64),
        last_tokens=torch.tensor([last], device=lm.device),
    )
    layer = pool.corpus.layer
    hard = pool.corpus.keys[:0]
    if hparams.n_hard:
        (hard,) = hard_negatives(pool.corpus, query, n=hparams.n_hard, max_rho=hparams.max_rho)
    texts = _other_subjects(forms, pool, templates, hparams.n_subjects, rng)
    subjects = LocatedTexts.of(lm, texts).subject_keys(lm, layer) if texts else hard[:0]
    sampled = rng.sample(range(len(positives.rows)), min(len(positives.rows), hparams.n_other_tokens // 4))
    drawn = pool.corpus.random(hparams.n_random, seed=int.from_bytes(rng.randbytes(4), "little"))
    others = positive_keys.before(sampled) if sampled else hard[:0]
    # a corpus may name the subject, too
    random_, hard, others = _unlike(
        (drawn, hard.to(drawn), others.to(drawn)), positive_keys.subject.to(drawn), response, hparams.max_rho
    )
    return Negatives(random_, hard, subjects, others[: hparams.n_other_tokens])


def _unlike(kinds: Sequence[Tensor], positives: Tensor, response: Tensor, max_rho: float) -> list[Tensor]:
    """Keys that are not positives themselves: "Ada Byron" is a form of the subject inside "Ada Byron the Elder" too."""
    keys = torch.cat(list(kinds))
    # by products, ten times as fast as difference by difference; in float32 their error would be as large as the limit
    distance = torch.cdist(keys.double(), positives.double(), compute_mode="use_mm_for_euclid_dist").amin(dim=1)
    is_other = (distance >= _SAME_KEY * keys.norm(dim=1)) & (keys @ response.to(keys) < max_rho)
    parts = zip(keys.split([len(kind) for kind in kinds]), is_other.split([len(kind) for kind in kinds]), strict=True)
    return [kind[is_kept] for kind, is_kept in parts]


def _other_subjects(
    forms: SubjectForms, pool: NegativePool, templates: Sequence[str], n_subjects: int, rng: random.Random
) -> list[tuple[str, str]]:
    """(prompt, subject): each drawn subject in the edit's prompt, bare and behind a prefix, and in another prompt."""
    own = {forms.fact.subject, *forms.rephrases, *forms.shuffles}
    others = [subject for subject in pool.subjects if subject not in own]
    texts = []
    for subject in rng.sample(others, min(n_subjects, len(others))):
        texts.append((forms.fact.prompt, subject))
        texts.append((rng.choice(templates).replace("{}", forms.fact.prompt), subject))
        if pool.prompts:
            texts.append((rng.choice(pool.prompts), subject))
    return texts
