"""Writing a batch of facts into several layers: what MEMIT, EMMET, PMET and AlphaEdit share (methods §5.3).

One value per fact is optimised at the last edited layer. Then layer by layer, upwards, with the updates of the layers
below in place: read the keys there and how much of each value is still missing, and write this layer's share of it.
The methods differ in the metric of the closed form (`least_squares.py`), the share, and where the value stands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from rep_fast.editors.answered import unanswered
from rep_fast.editors.keys import KeyReader, LookupRows
from rep_fast.editors.least_squares import BatchUpdate, solve_batch, spread_share
from rep_fast.editors.passes import WrittenKeys, joined_passes, protecting
from rep_fast.editors.state import EditorState
from rep_fast.editors.value import HIDDEN, OptimisedValue, ValueHparams, optimise_values
from rep_fast.edits import PAST_KEYS, Edit, LowRank, ModuleEdit
from rep_fast.errors import HparamError, NothingToEditError, PromptError
from rep_fast.facts import Fact
from rep_fast.models import EditableLM, Site
from rep_fast.presets import flat_mapping


@dataclass(frozen=True)
class BatchHparams:
    """Hyper-parameters that all batch editors have.

    layers: edited layers, 0-based, ascending; the value is optimised at the last. share_values: facts whose prompts are
    the same up to the subject's last token have one key; they get one value, optimised for all of them (False: one
    each, as in the references, of which the update then writes the mean). passes: what the
    edited model still does not answer is written again on top, up to so many passes in all; one is what is published.
    allow_conflicts: take facts that say two things with the same words. factor_precision: of the kept factor of C,
    where the method has one: "fp64" solves for a hundred keys in two thirds of the time and takes twice the memory,
    both give the same update to 1e-8; "auto" see `SpdSolver.factor`. target_tok, fact_token: tokenisation choices
    (methods §2.3, §2.4). template_style: of `context_templates`.
    """

    layers: tuple[int, ...]
    share_values: bool = True
    passes: int = 1
    allow_conflicts: bool = False
    factor_precision: Literal["auto", "fp32", "fp64"] = "auto"
    target_tok: str = "in_context"
    fact_token: str = "subject_last"
    template_style: str = "memit"
    value: ValueHparams = field(default_factory=ValueHparams)

    def __post_init__(self) -> None:
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise HparamError(f"layers {list(self.layers)} must be one or more, ascending, each once")
        if self.passes < 1:
            raise HparamError(f"passes={self.passes} must be at least 1")


@dataclass(frozen=True)
class Rule:
    """What makes one method of this family.

    metric: (layer, A [M, a]) → NA [M, a] float64. ridge: (layer, number of keys) → weight of N⁻¹. sites: where the
    value is optimised, the last is the one that is written. root: PMET's spread. remembers: keeps past keys.
    """

    metric: Callable[[int, Tensor], Tensor]
    ridge: Callable[[int, int], float]
    sites: tuple[str, ...] = HIDDEN
    root: bool = False
    remembers: bool = False


@dataclass(frozen=True)
class LayerWrite:
    """What was written at one layer: keys [M, n] float64, the update, ΔW as applied, and the norm of what was missing
    there, mean over keys, []."""

    layer: int
    keys: Tensor
    update: BatchUpdate
    delta: LowRank
    missing: Tensor


def edit_batch(
    lm: EditableLM,
    facts: Sequence[Fact],
    *,
    hparams: BatchHparams,
    templates: Sequence[str],
    method: str,
    rule: Rule,
    state: EditorState | None = None,
) -> Edit:
    """Edit facts by one rule.

    Args:
        state: past keys, for rules that remember.
    Returns:
        Edit with one module per layer. Its `vectors`: for a single key k_star [M] (the key the layer's update was
        written for), direction [M] (the metric times k_star) and response [M] (ρ(k) = k·response, the part of the
        layer's update that k retrieves); past_keys [n, M] where the rule remembers. `tensors`: z_star, z_0 ([D] for a
        single value, else [n, D]) where the value is a hidden state, v_star, v_0 where it is an MLP output; of the
        first pass. `notes`: groups of facts that share a key, facts that were answered already, losses; in later_passes
        the facts that further ones wrote.
    Raises:
        PromptError: facts that contradict each other. LayerError: no such layer.
        NothingToEditError, TokenizationError: see `optimise_values`. SolverError: see `solve_batch`.
        FingerprintError: the state is another model's.
    """
    for layer in hparams.layers:
        lm.check_layer(layer)
    state = state or EditorState()
    state.check_model(lm)
    n_keys = len(key_groups(lm, facts, hparams))
    parts: list[Edit] = []
    written = WrittenKeys(lambda fact: key_tokens(lm, fact, hparams))
    missing = list(facts)
    with ExitStack() as active:
        while missing:
            protected = protecting(state, written.without(missing), lm)
            try:
                part = _one_pass(
                    lm, missing, n_keys=n_keys, hparams=hparams, templates=templates, method=method, rule=rule,
                    state=protected,
                )  # fmt: skip
            except NothingToEditError:
                if not parts:
                    raise
                break  # at the edge of rounding the optimisation sees an answer where the plain forward saw none
            parts.append(part)
            written.add(part, [missing[group[0]] for group in key_groups(lm, missing, hparams)])
            if len(parts) == hparams.passes:
                break
            active.enter_context(part.applied(lm))
            missing = unanswered(lm, facts, target_tok=hparams.target_tok)
    return parts[0] if len(parts) == 1 else joined_passes(parts, written)


def _one_pass(
    lm: EditableLM,
    facts: Sequence[Fact],
    *,
    n_keys: int,
    hparams: BatchHparams,
    templates: Sequence[str],
    method: str,
    rule: Rule,
    state: EditorState,
) -> Edit:
    """Values, keys and updates of these facts on the model as it stands; `n_keys` of the whole batch sets the ridge."""
    groups = key_groups(lm, facts, hparams)
    grouped = [[facts[number] for number in group] for group in groups]
    found = optimise_values(
        lm, grouped, layer=hparams.layers[-1], templates=templates, hparams=hparams.value, sites=rule.sites,
        fact_token=hparams.fact_token, target_tok=hparams.target_tok,
    )  # fmt: skip
    rows = LookupRows.of(lm, [group[0] for group in grouped], templates, fact_token=hparams.fact_token)
    targets = torch.stack([value.v_star for value in found])
    written = write_layers(lm, KeyReader(lm, rows), hparams.layers, targets, rule, state, n_keys=n_keys)
    return _as_edit(lm, facts, groups, found, written, hparams, templates, method, rule)


def key_groups(lm: EditableLM, facts: Sequence[Fact], hparams: BatchHparams) -> list[list[int]]:
    """Numbers of the facts behind each key, in order of their first.

    Raises:
        PromptError: two facts with the same prompt and subject and different targets, unless `allow_conflicts`.
    """
    said: dict[tuple[str, str], tuple[int, str]] = {}
    groups: dict[Any, list[int]] = {}
    for number, fact in enumerate(facts):
        first, target = said.setdefault((fact.prompt, fact.subject), (number, fact.target_new))
        if target != fact.target_new and not hparams.allow_conflicts:
            raise PromptError(
                f"facts {first} and {number} contradict each other: {fact.text!r} cannot be both {target!r} and "
                f"{fact.target_new!r}; leave one out, or set allow_conflicts"
            )
        own: Any = key_tokens(lm, fact, hparams) if hparams.share_values else number
        groups.setdefault(own, []).append(number)
    return list(groups.values())


def key_tokens(lm: EditableLM, fact: Fact, hparams: BatchHparams) -> tuple[int, ...]:
    """What a fact's bare key depends on: the prompt's tokens up to the one that is looked up."""
    located = lm.locate(fact.prompt, fact.subject, strategy=hparams.fact_token)
    return tuple(located.ids[: located.position + 1])


def write_layers(
    lm: EditableLM, reader: KeyReader, layers: Sequence[int], targets: Tensor, rule: Rule, state: EditorState, *,
    n_keys: int,
) -> list[LayerWrite]:  # fmt: skip
    """The updates of all layers, from below; the model is as it was when this returns.

    Args:
        targets: [n, D], wanted at the rule's site of the last layer, at the keys' tokens of the bare prompts.
        n_keys: what the rule's ridge is told; of the whole batch, also where a pass writes fewer.
    """
    site, written = Site(rule.sites[-1], layers[-1]), []
    with ExitStack() as active:
        for step, layer in enumerate(layers):
            keys, current = reader.read(layer, site)
            columns = keys.T.double()
            missing = (targets.to(current) - current).double().to(columns.device)  # read at the last layer
            update = solve_batch(
                columns, missing.T * spread_share(step, len(layers), root=rule.root),
                metric=partial(_metric_at, rule, layer),
                ridge=rule.ridge(layer, n_keys), past=state.columns(layer, like=columns),
            )  # fmt: skip
            delta = update.delta(targets.dtype)
            written.append(LayerWrite(layer, columns, update, delta, missing.norm(dim=1).mean()))
            step_edit = Edit((), "", {}, lm.fingerprint, (ModuleEdit(layer, delta),), model_name=lm.name)
            active.enter_context(step_edit.applied(lm))
    return written


def _metric_at(rule: Rule, layer: int, columns: Tensor) -> Tensor:
    return rule.metric(layer, columns).to(columns.device)


def _as_edit(
    lm: EditableLM, facts: Sequence[Fact], groups: Sequence[Sequence[int]], found: Sequence[OptimisedValue],
    written: Sequence[LayerWrite], hparams: BatchHparams, templates: Sequence[str], method: str, rule: Rule,
) -> Edit:  # fmt: skip
    answered = sorted(
        number for group, value in zip(groups, found, strict=True)
        for number, already in zip(group, value.answered, strict=True) if already
    )  # fmt: skip
    notes: dict[str, Any] = {
        "templates": list(templates),
        "loss_first": [value.losses[0] for value in found],
        "loss_last": [value.losses[-1] for value in found],
        "v_forwards": [len(value.losses) for value in found],
        "missing": torch.stack([write.missing.to(written[-1].missing.device) for write in written]).tolist(),
        "shared_keys": [list(group) for group in groups if len(group) > 1],
        "answered_before": answered,
    }
    names = ("z_star", "z_0") if rule.sites == HIDDEN else ("v_star", "v_0")
    stars, starts = torch.stack([v.v_star for v in found]), torch.stack([v.v_0 for v in found])
    values = (stars[0], starts[0]) if len(found) == 1 else (stars, starts)
    modules = [
        ModuleEdit(write.layer, write.delta, vectors=_vectors(write, remembers=rule.remembers)) for write in written
    ]
    return Edit(
        facts=tuple(facts), method=method, hparams=flat_mapping(hparams), fingerprint=lm.fingerprint,
        modules=tuple(modules), notes=notes, tensors=dict(zip(names, values, strict=True)), model_name=lm.name,
    )  # fmt: skip


def _vectors(write: LayerWrite, *, remembers: bool) -> dict[str, Tensor]:
    dtype = write.delta.left.dtype
    vectors = {PAST_KEYS: write.keys.T.to(dtype).contiguous()} if remembers else {}
    if write.keys.shape[1] == 1:
        key, row = write.keys[:, 0], write.update.rows[0]
        # ΔW = R row, so ⟨ΔW k, ΔW k*⟩/‖ΔW k*‖² = (row·k)/(row·k*) (methods §17)
        vectors |= {
            "k_star": key.to(dtype),
            "direction": write.update.images[:, 0].to(dtype),
            "response": (row / (row @ key)).to(dtype),
        }
    return vectors
