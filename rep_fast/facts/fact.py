"""A fact to be edited: a prompt with one slot for the subject, and the answer it shall get."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from rep_fast.errors import PromptError

T = TypeVar("T")
SLOT = "{}"


def clean_text(value: object, *, what: str) -> str:
    """`value` without surrounding whitespace.

    Raises:
        PromptError: it is not a string, is blank, or holds half of a surrogate pair, which no tokenizer takes.
    """
    if not isinstance(value, str):
        raise PromptError(f"{what} must be a string, got {type(value).__name__} {value!r:.60}")
    if not value.strip():
        raise PromptError(f"{what} is empty (got {value!r:.60}); give it some text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{what} {value!r:.60} holds half of a surrogate pair at {error.start}; repair the text"
        ) from None
    return value.strip()


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact: "`prompt` with `subject` in its slot" shall be continued by `target_new` instead of `target_true`.

    Surrounding whitespace is removed everywhere, because a target is joined to its prompt with exactly one space and
    the last token of a subject must not be a blank.

    Args:
        prompt: text with exactly one `{}`, the place of the subject.
        subject: what the fact is about.
        target_new: the answer after the edit.
        target_true: the answer before it, where known.
    Raises:
        PromptError: no or several slots, an empty or non-text field.
    """

    prompt: str
    subject: str
    target_new: str
    target_true: str | None = None

    def __post_init__(self) -> None:
        for name, what in (("prompt", "prompt"), ("subject", "subject"), ("target_new", "target (target_new)")):
            object.__setattr__(self, name, clean_text(getattr(self, name), what=what))
        if self.target_true is not None:
            object.__setattr__(self, "target_true", clean_text(self.target_true, what="target_true"))
        if (slots := self.prompt.count(SLOT)) != 1:
            raise PromptError(f"prompt {self.prompt!r} holds {slots} '{{}}'; write exactly one where the subject goes")

    @classmethod
    def from_text(cls, text: str, subject: str, target_new: str, target_true: str | None = None) -> Fact:
        """The fact behind a full prompt: the subject, which must occur exactly once, becomes the slot.

        Raises:
            PromptError: the subject is absent or occurs several times, or the text already holds a `{}`.
        """
        text, subject = clean_text(text, what="prompt"), clean_text(subject, what="subject")
        if SLOT in text:
            raise PromptError(
                f"prompt {text!r} already holds '{{}}'; use Fact(prompt, subject, …) for prompts with a slot"
            )
        if (count := occurrences(text, subject)) != 1:
            raise PromptError(
                f"subject {subject!r} occurs {count} times in {text!r}; it must occur once "
                "(or write the prompt with '{}' in its place)"
            )
        return cls(text.replace(subject, SLOT), subject, target_new, target_true)

    @property
    def text(self) -> str:
        """The full prompt, subject in place."""
        return self.prompt.replace(SLOT, self.subject)


def occurrences(text: str, subject: str) -> int:
    """Overlapping ones count as well: "ana" stands twice in "anana", and which is meant is unknown."""
    return sum(text.startswith(subject, start) for start in range(len(text) - len(subject) + 1))


@dataclass(frozen=True, slots=True)
class Sided(Generic[T]):
    """Variants of one thing on two sides: in-domain (training may see them) and out-of-domain (never seen)."""

    in_domain: tuple[T, ...] = ()
    out_of_domain: tuple[T, ...] = ()

    @classmethod
    def halves(cls, items: Sequence[T]) -> Sided[T]:
        """The first ⌈n/2⌉ are in-domain, the rest out-of-domain (methods §8.1)."""
        cut = (len(items) + 1) // 2
        return cls(tuple(items[:cut]), tuple(items[cut:]))

    def __iter__(self) -> Iterator[T]:
        yield from self.in_domain
        yield from self.out_of_domain

    def __len__(self) -> int:
        return len(self.in_domain) + len(self.out_of_domain)
