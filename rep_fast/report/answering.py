"""What a model says to a prompt, as a person would read it: the first few words of the greedy continuation."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rep_fast.models import EditableLM

# A sentence's end: what follows no longer answers the prompt.
_END = re.compile(r"[.!?](?=\s|$)|\n")
_SPARE_TOKENS = 2


def answers(
    lm: EditableLM, prompts: Sequence[str], targets: Sequence[str], *, n_tokens: int | None = None
) -> list[str]:
    """One short greedy continuation per prompt through every active edit, up to its sentence's end.

    Args:
        targets: the continuations are long enough for any of them.
        n_tokens: their length, where it is more than that.
    """
    longest = max((lm.answer("The", target).n_targets for target in targets if target), default=4)
    length = max(longest + _SPARE_TOKENS, n_tokens or 0)
    return [_continuation(lm, prompt, length) for prompt in prompts]


def _continuation(lm: EditableLM, prompt: str, n_tokens: int) -> str:
    n_prompt = int(lm.encode([prompt]).lengths[0])
    ids = lm.generate_ids(prompt, max_new_tokens=n_tokens)
    text = lm.decode(ids[n_prompt:]).strip()
    end = _END.search(text)
    return text[: end.start()].strip() if end else text
