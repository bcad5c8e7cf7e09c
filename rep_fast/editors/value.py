"""v*: the value that makes the model say the new target (methods §3).

A vector δ is added to the MLP output of one layer at the subject's last token and optimised by Adam, over the prompt
behind several prefixes, against a KL term that keeps "{subject} is a" where it was.

Exact savings, all with the same δ trajectory as the definition (`plain_value.py`): the layers up to the edit are
constant in δ and run once, which also gives the keys; the tokens before the subject's last one cannot see δ, so of
them only the attention keys and values are kept; the head is applied at the positions whose logits enter the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rep_fast.errors import NothingToEditError, TokenizationError
from rep_fast.facts import Fact
from rep_fast.models import EditableLM, Site

KL_PROMPT = "{} is a"
_SMALLEST_NORM = 1e-12


@dataclass(frozen=True)
class ValueHparams:
    """Hyper-parameters of the optimisation, named as in the field.

    v_steps forwards are made and v_steps − 1 updates; early_stop ends before an update once the loss is below it
    (None: never); ‖δ‖ ≤ clamp_norm_factor·‖v_0‖.
    """

    v_steps: int = 25
    v_lr: float = 0.5
    v_weight_decay: float = 1e-3
    clamp_norm_factor: float = 4.0
    kl_factor: float = 0.0625
    early_stop: float | None = 0.05


@dataclass(frozen=True)
class EditTexts:
    """Token rows of one optimisation: the prompt behind each template, then the KL prompt.

    rows: ids, the new target's tokens but the last appended to all but the last row. lookup: position of the subject's
    last token per row. answer_at: per row the positions whose logits are read. target_ids [P, T].
    """

    rows: tuple[tuple[int, ...], ...]
    lookup: tuple[int, ...]
    answer_at: tuple[tuple[int, ...], ...]
    target_ids: Tensor


@dataclass(frozen=True)
class OptimisedValue:
    """What the optimisation found.

    v_star, v_0: [D] optimised and original MLP output of the bare prompt; keys [P, M], values [P, D]: key and MLP
    output of each prompt at the subject's last token, unedited; losses: one per forward; deltas [steps, D] the
    trajectory of δ, for comparison with the plain definition.
    """

    v_star: Tensor
    v_0: Tensor
    keys: Tensor
    values: Tensor
    losses: tuple[float, ...]
    deltas: Tensor


def edit_texts(
    lm: EditableLM,
    fact: Fact,
    templates: Sequence[str],
    *,
    fact_token: str = "subject_last",
    target_tok: str = "in_context",
) -> EditTexts:
    """Compose templates, prompt and target (methods §2.1, §2.4 item 4).

    Raises:
        TokenizationError: standalone targets have pulled the subject's last tokens out of a text.
    """
    rows, lookup, answer_at, targets = [], [], [], []
    for template in templates:
        prompt = template.replace("{}", fact.prompt)
        answer = lm.answer(prompt.replace("{}", fact.subject), fact.target_new, mode=target_tok)
        rows.append(answer.input_ids)
        answer_at.append(answer.positions)
        targets.append(answer.target_ids)
        located = lm.locate(prompt, fact.subject, strategy=fact_token)
        lookup.append(located.position)
        # the row may be long enough and yet hold other tokens there
        if answer.input_ids[: located.position + 1] != located.ids[: located.position + 1]:
            raise TokenizationError(
                f"target {fact.target_new!r} runs together with subject {fact.subject!r} at the end of "
                f"{prompt!r} in standalone mode; use target_tok=in_context"
            )
    kept = lm.locate(KL_PROMPT, fact.subject, strategy=fact_token)
    # the KL term reads the logits at the lookup token: nothing after it matters
    rows.append(kept.ids[: kept.position + 1])
    lookup.append(kept.position)
    answer_at.append((kept.position,))
    return EditTexts(tuple(rows), tuple(lookup), tuple(answer_at), torch.tensor(targets, device=lm.device))


def optimise_value(
    lm: EditableLM, fact: Fact, *, layer: int, templates: Sequence[str], hparams: ValueHparams,
    fact_token: str = "subject_last", target_tok: str = "in_context",
) -> OptimisedValue:  # fmt: skip
    """v* for one fact at the MLP output of `layer`.

    Args:
        templates: context templates, the bare `{}` first (v_0 is taken from it).
    Raises:
        NothingToEditError: the unedited model already answers the bare prompt with the new target.
        TokenizationError: see `edit_texts`.
    Cost: one forward of the whole batch, then v_steps passes over the layers above `layer` and the tokens from the
    subject's last one on.
    """
    texts = edit_texts(lm, fact, templates, fact_token=fact_token, target_tok=target_tok)
    batch = lm.encode(texts.rows)
    lookup = torch.tensor(texts.lookup, device=lm.device)
    # a standalone target of an always-prepend tokenizer is read from one token before the prompt's last one, which may
    # lie before the subject's last: that term is constant in δ, but it belongs to the loss (methods §2.4 item 4)
    starts = [min(place, *read) for place, read in zip(texts.lookup, texts.answer_at, strict=True)]
    key_site, value_site = Site("key", layer), Site("value", layer)
    with torch.no_grad(), lm.capture([key_site, value_site]) as seen:
        state = lm.suffix_state(batch, layer, starts)
    keys, values = seen.at(key_site, lookup)[:-1], seen.at(value_site, lookup)[:-1]
    suffix = torch.arange(state.hidden.shape[1], device=state.hidden.device)
    is_lookup = (suffix == (lookup - state.starts).to(suffix.device)[:, None])[..., None]

    def logits(delta: Tensor) -> Tensor:
        moved = state.hidden + is_lookup * delta.to(state.hidden)
        return lm.resume(state, moved, at=texts.answer_at)

    deltas, losses = optimise_delta(logits, texts, values[0], hparams, fact)
    v_0 = values[0].to(deltas.dtype)
    return OptimisedValue(v_0 + deltas[-1], v_0, keys.to(deltas.dtype), values.to(deltas.dtype), losses, deltas)


def optimise_delta(
    logits: Callable[[Tensor], Tensor], texts: EditTexts, v_0: Tensor, hparams: ValueHparams, fact: Fact
) -> tuple[Tensor, tuple[float, ...]]:
    """Adam on δ alone; returns δ after each forward [steps, D] and the losses.

    L(δ) = mean NLL of the target + kl_factor·KL(p_δ ‖ p_0) + v_weight_decay·‖δ‖/‖v_0‖²; δ and Adam's state are float32
    or wider whatever the model's dtype.
    """
    dtype = torch.promote_types(v_0.dtype, torch.float32)
    v_0_norm = v_0.detach().to(dtype).norm()
    delta = torch.zeros(v_0.shape, dtype=dtype, device=v_0.device, requires_grad=True)
    optimiser = torch.optim.Adam([delta], lr=hparams.v_lr)
    log_p_0: Tensor | None = None
    losses, deltas = [], []
    for step in range(hparams.v_steps):
        rows = logits(delta).to(dtype)
        if log_p_0 is None:
            log_p_0 = rows[-1].detach().log_softmax(dim=-1)
            _check_something_to_edit(rows, texts, fact)
        loss = _loss(rows, texts, delta, log_p_0, v_0_norm, hparams)
        losses.append(float(loss.detach()))
        deltas.append(delta.detach().clone())
        done = hparams.early_stop is not None and losses[-1] < hparams.early_stop
        if done or step == hparams.v_steps - 1:
            break
        (delta.grad,) = torch.autograd.grad(loss, [delta])  # weights get no gradient, nothing accumulates
        optimiser.step()
        with torch.no_grad():
            delta.mul_((hparams.clamp_norm_factor * v_0_norm / delta.norm().clamp_min(_SMALLEST_NORM)).clamp_max(1.0))
    return torch.stack(deltas), tuple(losses)


def _loss(
    rows: Tensor, texts: EditTexts, delta: Tensor, log_p_0: Tensor, v_0_norm: Tensor, hparams: ValueHparams
) -> Tensor:
    log_p = rows.log_softmax(dim=-1)
    nll = -log_p[:-1].gather(1, texts.target_ids.reshape(-1, 1)).mean()
    # expectation under the current distribution, as in ROME
    kl = (log_p[-1].exp() * (log_p[-1] - log_p_0)).sum()
    return nll + hparams.kl_factor * kl + hparams.v_weight_decay * delta.norm() / v_0_norm**2


def _check_something_to_edit(rows: Tensor, texts: EditTexts, fact: Fact) -> None:
    """The bare prompt's answers stand first: one row of logits per target token."""
    n_targets = texts.target_ids.shape[1]
    if bool((rows[:n_targets].argmax(dim=-1) == texts.target_ids[0]).all()):
        raise NothingToEditError(
            f"the model already answers {fact.text!r} with {fact.target_new!r}; choose another target"
        )
