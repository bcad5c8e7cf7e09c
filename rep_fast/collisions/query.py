"""What a scan looks for: the key of a subject, whitened, and the token that marks the subject's own occurrences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rep_fast import ops
from rep_fast.facts import Fact
from rep_fast.models import EditableLM
from rep_fast.stats import SecondMoments


@dataclass(frozen=True)
class Query:
    """A key to be found in a corpus.

    Attributes:
        subject: shown in results.
        key: [M] k*, the key an edit writes to.
        last_token: id of the subject's last token in context; corpus tokens there or shortly after are its own.
    """

    subject: str
    key: Tensor
    last_token: int


@dataclass(frozen=True)
class WhitenedQueries:
    """Queries of one layer, whitened together.

    Attributes:
        subjects: one name per query.
        whitened: [S, M] float32, C⁻¹k*, on the CPU like the others.
        self_similarity: [S] float64, β(k*, k*) = k*ᵀC⁻¹k*.
        last_tokens: [S] int64.
    """

    subjects: tuple[str, ...]
    whitened: Tensor
    self_similarity: Tensor
    last_tokens: Tensor

    @cached_property
    def for_scan(self) -> ops.ScanQueries:
        """`whitened` as the scan keeps it packed from block to block."""
        return ops.ScanQueries(self.whitened)

    def exclusion(self, token_ids: Tensor, starts: Tensor, window: int) -> ops.LastTokenExclusion:
        """The rule that keeps a subject's own tokens out: its last token stands at p, p−1, … or p−window."""
        return ops.LastTokenExclusion(token_ids, starts, self.last_tokens.to(token_ids.device), window=window)


def subject_queries(lm: EditableLM, facts: Sequence[Fact], layer: int) -> list[Query]:
    """One query per fact: the key at the subject's last token of the bare prompt."""
    found = [lm.locate(fact.prompt, fact.subject) for fact in facts]
    batch = lm.encode([own.ids for own in found])
    keys = lm.keys(batch, [layer], positions=torch.tensor([own.position for own in found]))[layer]
    return [Query(fact.subject, key, own.ids[own.position]) for fact, key, own in zip(facts, keys, found, strict=True)]


def whiten_queries(lm: EditableLM, queries: Sequence[Query], moments: SecondMoments, layer: int) -> WhitenedQueries:
    """C⁻¹k* of every query, with the model's own second moment.

    Raises:
        FingerprintError: the moments belong to another model.
        LayerError: they do not cover the layer. SingularMomentError: they cover too few tokens.
    """
    moments.check_model(lm)
    keys = torch.stack([query.key for query in queries]).double().cpu()
    solver = moments.solver(layer)
    whitened = solver.solve(keys.T.to(solver.second_moment.device)).T.to(keys)
    return WhitenedQueries(
        subjects=tuple(query.subject for query in queries),
        whitened=whitened.float().contiguous(),
        self_similarity=(keys * whitened).sum(1),
        last_tokens=torch.tensor([query.last_token for query in queries]),
    )
