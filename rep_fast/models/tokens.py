"""Token positions of subjects and token ids of targets.

methods §2.3 (which token) and §2.4 (pitfalls). Everything is tokenised in context: a subject at the start of a text and
one inside it have different ids, and so have targets.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from rep_fast.errors import HparamError, PromptError, TokenizationError

logger = logging.getLogger(__name__)

STRATEGIES = ("subject_last", "subject_first", "subject_first_after_last", "last")
TARGET_MODES = ("in_context", "standalone")


@dataclass(frozen=True)
class Located:
    """A tokenised text and the position of the token that was asked for, counted without padding."""

    ids: tuple[int, ...]
    position: int


@dataclass(frozen=True)
class Answer:
    """A prompt followed by a target, ready for teacher forcing.

    The logits at `positions[t]` of `input_ids` predict `target_ids[t]`. In context: input_ids = prompt_ids +
    target_ids[:-1] and the first position is the prompt's last token. In standalone mode both follow the references.
    """

    prompt_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    input_ids: tuple[int, ...]
    positions: tuple[int, ...]

    @classmethod
    def joined(cls, prompt_ids: Sequence[int], target_ids: Sequence[int]) -> Answer:
        """The answer built on ids, which no decoding can distort."""
        prompt, target = tuple(prompt_ids), tuple(target_ids)
        positions = tuple(range(len(prompt) - 1, len(prompt) - 1 + len(target)))
        return cls(prompt, target, prompt + target[:-1], positions)

    @property
    def n_targets(self) -> int:
        return len(self.target_ids)

    @property
    def prompt_length(self) -> int:
        """Tokens of `input_ids` that are the prompt's; the rest are the target's."""
        return min(len(self.prompt_ids), len(self.input_ids))


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text with the tokenizer's normal special tokens."""
    return list(tokenizer(text)["input_ids"])


def split_prompt(prompt: str, subject: str) -> tuple[str, str]:
    """Text before and after the subject's place.

    Raises:
        PromptError: `{}` does not occur exactly once, or the subject is blank.
    """
    if prompt.count("{}") != 1:
        raise PromptError(
            f"prompt {prompt!r} holds {{}} {prompt.count('{}')} times; write it once, where the subject stands"
        )
    if not subject.strip():
        raise PromptError(f"subject {subject!r} of prompt {prompt!r} is blank; give the subject's text")
    before, after = prompt.split("{}")
    return before, after


def locate(tokenizer: Any, prompt: str, subject: str, *, strategy: str = "subject_last") -> Located:
    """Tokenise `prompt` with `subject` put in and find the token that stands for the subject.

    Character offsets decide where the tokenizer has them; else the counting rule len(enc(p + s)) − 1 (methods §2.3).
    """
    if strategy not in STRATEGIES:
        raise HparamError(f"fact token strategy {strategy!r} is unknown; choose from {', '.join(STRATEGIES)}")
    before, after = split_prompt(prompt, subject)
    text = before + subject + after
    ids, spans = _encode_with_spans(tokenizer, text)
    if strategy == "last":
        return Located(ids, len(ids) - 1)
    first = strategy == "subject_first"
    character = len(before) if first else len(before) + len(subject) - 1
    position = None if spans is None else spanned_position(spans, character, first=first)
    if position is None:
        position = counted_position(tokenizer, before, subject, first=first)
    if strategy == "subject_first_after_last" and after:
        position += 1
    if not 0 <= position < len(ids):
        raise TokenizationError(
            f"{strategy} of subject {subject!r} falls on token {position} of the {len(ids)} tokens of {text!r}; "
            f"use strategy 'subject_last'"
        )
    return Located(ids, position)


def locate_all(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[Located]:
    """`locate` at the subject's last token for many (prompt, subject): one call of a tokenizer with offsets."""
    if not getattr(tokenizer, "is_fast", False) or not pairs:
        return [locate(tokenizer, prompt, subject) for prompt, subject in pairs]
    split = [split_prompt(prompt, subject) for prompt, subject in pairs]
    texts = [before + subject + after for (before, after), (_, subject) in zip(split, pairs, strict=True)]
    encoded = tokenizer(texts, return_offsets_mapping=True)
    found = []
    for number, (prompt, subject) in enumerate(pairs):
        character = len(split[number][0]) + len(subject) - 1
        position = spanned_position(encoded["offset_mapping"][number], character, first=False)
        if position is None:
            found.append(locate(tokenizer, prompt, subject))
        else:
            found.append(Located(tuple(encoded["input_ids"][number]), position))
    return found


def _encode_with_spans(tokenizer: Any, text: str) -> tuple[tuple[int, ...], Sequence[tuple[int, int]] | None]:
    """Ids and, where the tokenizer keeps them, the characters each token came from."""
    if not getattr(tokenizer, "is_fast", False):
        return tuple(encode_text(tokenizer, text)), None
    encoded = tokenizer(text, return_offsets_mapping=True)
    return tuple(encoded["input_ids"]), encoded["offset_mapping"]


def spanned_position(spans: Sequence[tuple[int, int]], character: int, *, first: bool) -> int | None:
    """First or last token whose span holds a character; None when no span does.

    A character outside a byte-level vocabulary takes several tokens, all with its span; special tokens have empty ones.
    """
    hits = [index for index, (start, end) in enumerate(spans) if start <= character < end]
    if not hits:
        return None
    return hits[0] if first else hits[-1]


def counted_position(tokenizer: Any, before: str, subject: str, *, first: bool) -> int:
    """The subject's position by counting tokens of the text before it, for tokenizers without offsets."""
    if first:
        # a trailing space would be counted as a token of its own (methods §2.4 item 1)
        return len(encode_text(tokenizer, before.rstrip()))
    return len(encode_text(tokenizer, before + subject)) - 1


def answer(tokenizer: Any, prompt: str, target: str, *, mode: str = "in_context") -> Answer:
    """Target ids after a prompt.

    in_context: ids = enc(prompt + " " + target) after the common prefix with enc(prompt), joined on ids. standalone:
    as the published code does (methods §2.4 item 4), including its one target too many with tokenizers that always
    prepend a blank.

    Raises:
        PromptError: prompt or target is blank. TokenizationError: the target has no tokens of its own.
    """
    if mode not in TARGET_MODES:
        raise HparamError(f"target mode {mode!r} is unknown; choose from {', '.join(TARGET_MODES)}")
    if not prompt.strip():
        raise PromptError("the prompt is blank; give the text that the target should follow")
    if not target.strip():
        raise PromptError(f"target {target!r} after prompt {prompt!r} is blank; give the target's text")
    build = {"in_context": _answer_in_context, "standalone": _answer_standalone}
    chosen = build[mode](tokenizer, prompt, target)
    if logger.isEnabledFor(logging.INFO):
        other_mode = next(name for name in TARGET_MODES if name != mode)
        with suppress(TokenizationError):
            _log_difference(target, {mode: chosen, other_mode: build[other_mode](tokenizer, prompt, target)})
    return chosen


def _log_difference(target: str, answers: dict[str, Answer]) -> None:
    (used, chosen), (unused, other) = answers.items()
    if (chosen.target_ids, chosen.positions) == (other.target_ids, other.positions):
        return
    logger.info(
        "target %r: %s gives ids %s at positions %s, %s gives %s at %s",
        *(target, used, chosen.target_ids, chosen.positions, unused, other.target_ids, other.positions),
    )


def _answer_in_context(tokenizer: Any, prompt: str, target: str) -> Answer:
    prompt_ids = encode_text(tokenizer, prompt)
    blank = "" if prompt[-1].isspace() else " "
    joint = encode_text(tokenizer, prompt + blank + target.strip())
    shared = _shared_length(prompt_ids, joint)
    if shared < len(prompt_ids) and not prompt[-1].isspace():
        # the target merges with the prompt's last token: keep the prompt, whose positions others rely on
        target_ids = _standalone_ids(tokenizer, target)
    else:
        # after a trailing blank the natural reading gives the blank to the target
        prompt_ids, target_ids = joint[:shared], joint[shared:]
    known = [token for token in target_ids if token != tokenizer.unk_token_id]
    if not prompt_ids or not known or not tokenizer.decode(known).strip():
        raise TokenizationError(
            f"the tokenizer gives target {target!r} after prompt {prompt!r} no tokens of its own; choose another target"
        )
    return Answer.joined(prompt_ids, target_ids)


def _shared_length(left: Sequence[int], right: Sequence[int]) -> int:
    for position, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return position
    return min(len(left), len(right))


def _standalone_ids(tokenizer: Any, target: str) -> list[int]:
    ids = encode_text(tokenizer, " " + target.strip())
    if ids and ids[0] in (tokenizer.bos_token_id, tokenizer.unk_token_id):
        return ids[1:]
    return ids


def _answer_standalone(tokenizer: Any, prompt: str, target: str) -> Answer:
    target_ids = _standalone_ids(tokenizer, target)
    if not target_ids:
        raise TokenizationError(f"the tokenizer gives target {target!r} no tokens; choose another target")
    prompt_ids = encode_text(tokenizer, prompt)
    input_ids = encode_text(tokenizer, prompt + tokenizer.decode(target_ids[:-1]))
    begin = len(input_ids) - len(target_ids)
    if begin < 0:
        raise TokenizationError(
            f"target {target!r} has more tokens than prompt {prompt!r} can hold in standalone mode; use 'in_context'"
        )
    positions = tuple(range(begin, len(input_ids)))
    return Answer(tuple(prompt_ids), tuple(target_ids), tuple(input_ids), positions)
