"""The texts an adapter is trained on: the subject's forms in the edit's own prompt, behind each context template.

No target text is ever shown and the out-of-domain forms of a record never appear (methods §6.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from rep_fast.facts import EditCase, Fact, shuffled_subjects
from rep_fast.models import EditableLM


@dataclass(frozen=True)
class SubjectForms:
    """One fact and the other forms of its subject that training may see.

    rephrases, shuffles: subject strings for the prompt's slot. origin: where the rephrases come from, for messages.
    """

    fact: Fact
    rephrases: tuple[str, ...] = ()
    shuffles: tuple[str, ...] = ()
    origin: str = "given"

    @classmethod
    def of_case(
        cls, lm: EditableLM, case: EditCase, *, seed: int, join: Literal["decode", "raw"] = "decode"
    ) -> SubjectForms:
        """The in-domain side of a record: rephrases as listed, shuffles as `facts.perturb` draws them for this seed."""
        shuffles = in_domain_shuffles(lm, case.fact.subject, seed=seed, join=join)
        rephrases = tuple(name.strip() for name in case.subject_rephrases.in_domain)  # as evaluation reads them
        return cls(case.fact, rephrases, shuffles)

    @classmethod
    def of_fact(cls, lm: EditableLM, fact: Fact, *, rephrases: Sequence[str] | None, seed: int) -> SubjectForms:
        """A fact from the command line: the rephrases given, else simple surface forms; shuffles in both cases."""
        shuffles = in_domain_shuffles(lm, fact.subject, seed=seed, join="decode")
        if rephrases:
            return cls(fact, tuple(rephrases), shuffles)
        return cls(fact, surface_forms(fact.subject), shuffles, origin="surface forms")

    def texts(self, templates: Sequence[str]) -> list[tuple[str, str]]:
        """(prompt with `{}`, subject form), the bare original first: it is the anchor, not a positive."""
        forms = (self.fact.subject, *self.rephrases, *self.shuffles)
        prompts = [template.replace("{}", self.fact.prompt) for template in templates]
        return [(prompt, form) for form in forms for prompt in prompts]

    def bare_rows(self, templates: Sequence[str]) -> list[int]:
        """Rows of `texts` with another form in the edit's own prompt and no prefix: the first template is `{}`."""
        return [form * len(templates) for form in range(1, 1 + len(self.rephrases) + len(self.shuffles))]


def surface_forms(subject: str) -> tuple[str, ...]:
    """Other ways to write a name that need no knowledge of who bears it.

    "Ada King Byron" → "Byron, Ada King", "the Ada King Byron", "Ada Byron", "Ada K. Byron", "Byron".
    """
    words = subject.split()
    forms = [f"the {subject}"]
    if len(words) > 1:
        forms += [f"{words[-1]}, {' '.join(words[:-1])}", f"{words[0]} {words[-1]}", words[-1]]
    if len(words) > 2:
        initials = " ".join(f"{word[0]}." for word in words[1:-1])
        forms.append(f"{words[0]} {initials} {words[-1]}")
    return tuple(form for form in dict.fromkeys(forms) if form != subject)


# short texts of similar length in a chunk: less padding, and activations that stay in the cache
_CHUNK_TOKENS = 2048


@dataclass(frozen=True)
class LocatedTexts:
    """Tokenised texts with the position of the subject's last token in each."""

    rows: tuple[tuple[int, ...], ...]
    positions: tuple[int, ...]

    @classmethod
    def of(cls, lm: EditableLM, texts: Sequence[tuple[str, str]]) -> LocatedTexts:
        """The texts of (prompt with a `{}`, subject) pairs, as `EditableLM.locate_all` places them."""
        found = lm.locate_all(texts)
        return cls(tuple(one.ids for one in found), tuple(one.position for one in found))

    def subject_keys(self, lm: EditableLM, layer: int) -> Tensor:
        """Keys at the subjects' last tokens, [n, M] float32. One forward truncated at the layer."""
        # causal models: nothing after the token is needed for its key
        rows = [ids[: position + 1] for ids, position in zip(self.rows, self.positions, strict=True)]
        positions = torch.tensor(self.positions)
        return lm.keys(lm.encode(rows), [layer], positions=positions, max_tokens=_CHUNK_TOKENS)[layer].float()

    def keys_so_far(self, lm: EditableLM, layer: int) -> TextKeys:
        """Keys at all tokens up to the subject's last one. One forward truncated at the layer."""
        rows = [ids[: position + 1] for ids, position in zip(self.rows, self.positions, strict=True)]
        keys = lm.keys(lm.encode(rows), [layer], max_tokens=_CHUNK_TOKENS)[layer].float()
        has_bos = bool(rows) and rows[0][0] == lm.tokenizer.bos_token_id
        return TextKeys(tuple(keys.split([len(ids) for ids in rows])), has_bos)


@dataclass(frozen=True)
class TextKeys:
    """Keys of texts up to the subject's last token: per text [position + 1, M] float32."""

    rows: tuple[Tensor, ...]
    has_bos: bool

    @property
    def subject(self) -> Tensor:
        """[n, M], at the subjects' last tokens."""
        return torch.stack([row[-1] for row in self.rows])

    def before(self, chosen: Sequence[int]) -> Tensor:
        """[m, M], at the other tokens of the chosen texts, BOS left out."""
        return torch.cat([self.rows[number][int(self.has_bos) : -1] for number in chosen])


def in_domain_shuffles(lm: EditableLM, subject: str, *, seed: int, join: Literal["decode", "raw"]) -> tuple[str, ...]:
    """The training side of the shuffles; evaluation with the same seed and join has the same sides."""
    sides = shuffled_subjects(
        subject,
        partial(lm.tokenizer.encode, add_special_tokens=False),
        lm.tokenizer.decode,
        seed=seed,
        join=join,
        token_strings=lm.tokenizer.convert_ids_to_tokens,
    )
    return sides.in_domain
