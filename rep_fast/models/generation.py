"""Plain token-by-token generation that passes through every active hook.

Greedy, or sampled from the `top_k` best tokens with their probabilities renormalised (ROME's way of drawing context
templates, methods §2.1).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from rep_fast.errors import HparamError
from rep_fast.models.batch import Batch
from rep_fast.models.forward_pass import ForwardPass

if TYPE_CHECKING:
    from rep_fast.models.editable_lm import EditableLM


@torch.no_grad()
def generate_ids(
    lm: EditableLM, prompt_ids: Sequence[int], *, max_new_tokens: int, top_k: int | None, seed: int | None
) -> list[int]:
    """Prompt ids followed by at most `max_new_tokens` more; ends after the first end-of-text token.

    The same seed gives the same tokens: the draw is made on the CPU in float64 wherever the model is.
    """
    if max_new_tokens < 0:
        raise HparamError(f"max_new_tokens is {max_new_tokens}; it must be 0 or more")
    if top_k is not None and top_k < 1:
        raise HparamError(f"top_k is {top_k}; it must be 1 or more, or None for greedy")
    lm.check_length(len(prompt_ids) + max_new_tokens)
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    ids = list(prompt_ids)
    cache = DynamicCache(config=lm.config)
    prompt_lengths = torch.tensor([len(ids)], device=lm.device)
    decided: dict[Hashable, Any] = {}
    fresh = ids
    for _ in range(max_new_tokens):
        with lm.telling(ForwardPass(prompt_lengths, len(ids) - len(fresh), decided)):
            hidden = _step(lm, fresh, len(ids), cache)
        fresh = [_choose(lm.head(hidden[:, -1])[0], top_k, generator)]
        ids += fresh
        if fresh[0] in lm.eos_token_ids:
            break
    return ids


def _step(lm: EditableLM, fresh: Sequence[int], n_tokens: int, cache: DynamicCache) -> Tensor:
    batch = Batch.from_rows([fresh], device=lm.device)
    position_ids = torch.arange(n_tokens - len(fresh), n_tokens, device=lm.device)[None]
    attention_mask = torch.ones(1, n_tokens, dtype=torch.int64, device=lm.device)
    return lm.base(
        input_ids=batch.input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=True,
    )[0]


def _choose(logits: Tensor, top_k: int | None, generator: torch.Generator) -> int:
    if top_k is None:
        return int(logits.argmax())
    best = logits.double().cpu().topk(min(top_k, logits.numel()))
    drawn = torch.multinomial(best.values.softmax(dim=0), 1, generator=generator)
    return int(best.indices[drawn])
