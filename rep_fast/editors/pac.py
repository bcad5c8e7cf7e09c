"""PAC: contrastive editing of the few rows and columns a fact runs through (methods §7.5).

Trace the new target's loss on the model as it stands, choose positive nodes (most sensitive) and negative nodes
(least), and take two Adam steps per batch: NLL of the new target moves the positive nodes, then, from a fresh forward
pass, λ times the NLL of the unedited model's own prediction moves the negative ones. All layers are edited, no second
moment is needed.

Presets choose the variant. `pac-official`: one trace over the whole edit set, repeated every two epochs, all facts in
joint epochs, as the released code does. `pac-paper`: per-request tracing, exact best paths, signed sums. Section `pac`
of `default`: one fact at a time, a few large steps.

λ scales the loss of the negative nodes alone, and Adam divides its scale out again: 0 or not decides, its size hardly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rep_fast.editors.adam import Skip
from rep_fast.editors.course import Course
from rep_fast.editors.pac_adam import RowAdam, step_on_all, step_on_rows
from rep_fast.editors.pac_contrast import Contrast, contrasts_of
from rep_fast.editors.pac_slices import Place, Rows, TrainableSlices
from rep_fast.edits import Edit
from rep_fast.errors import HparamError
from rep_fast.facts import Fact
from rep_fast.models import EditableLM
from rep_fast.paths import KEY_NODES, MODES, SCORES, NodeScores, NodeSet, score_nodes, select, target_nll
from rep_fast.presets import flat_mapping

SCOPES = ("dataset", "batch", "edit")


@dataclass(frozen=True)
class PacHparams:
    """Hyper-parameters of path editing.

    layers: traced and edited layers, () for all. top, bottom: |T⁺| and |T⁻|. select: "per_list" (nodes of each list) or
    "kbest" (nodes of the exact best paths), see `paths.select`. score, k_node: see `paths.score_nodes`. trace_scope:
    the facts that share a set of nodes, "dataset", "batch" or "edit" (batches of one fact). retrace: epochs after which
    nodes are chosen anew on the edited weights; None: once. pac_lambda: λ, 0 leaves the negative step out. kept: which
    prediction of the unedited model, see `pac_contrast`. pac_lr: Adam's step size. pac_epochs, pac_batch: passes over
    all facts, facts per step; a batch whose facts all have an NLL below early_stop is left alone, and the edit ends
    with an epoch that left all alone (None: never). adam_state: see `pac_adam`. layer_weighted: steps of a layer scaled
    by its share of the positive nodes' scores, their mean over layers kept. target_tok: of `EditableLM.answer`.
    """

    pac_lr: float
    pac_epochs: int
    layers: tuple[int, ...] = ()
    top: int = 15
    bottom: int = 1
    select: str = "per_list"
    score: str = "zabs"
    k_node: str = "up"
    trace_scope: str = "edit"
    retrace: int | None = None
    pac_lambda: float = 0.1
    kept: Literal["teacher_forced", "free"] = "teacher_forced"
    pac_batch: int = 1
    early_stop: float | None = 0.05
    adam_state: Literal["slices", "dense_parity"] = "slices"
    layer_weighted: bool = False
    target_tok: str = "in_context"

    def __post_init__(self) -> None:
        for name, known in (("select", MODES), ("score", SCORES), ("k_node", KEY_NODES), ("trace_scope", SCOPES)):
            if getattr(self, name) not in known:
                raise HparamError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(known)}")
        for name in ("pac_epochs", "pac_batch", "top", "bottom", "retrace"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise HparamError(f"{name}={value} is out of range; it must be 1 or more")
        if self.pac_lr <= 0 or self.pac_lambda < 0:
            raise HparamError(f"pac_lr={self.pac_lr} must be above 0 and pac_lambda={self.pac_lambda} not below it")
        if self.trace_scope == "edit" and self.pac_batch != 1:
            raise HparamError(
                f"trace_scope='edit' gives each fact its own nodes; use pac_batch=1, not {self.pac_batch}"
            )


def pac(lm: EditableLM, facts: Sequence[Fact], *, hparams: PacHparams, seed: int = 0, method: str = "pac") -> Edit:
    """Edit facts along their parameter paths.

    Args:
        facts: one or more; all are optimised together in `epochs` over batches of consecutive facts.
        seed: order of the batches in each epoch.
    Returns:
        Edit with `Slices` of every module that has nodes: rows of up (and gate), columns of down. notes: NLL of each
        fact in its first and last forward pass, epochs begun, updates made, nodes trained in all, and numbers of the
            facts that were answered before (`answered.py`).
    Raises:
        HparamError: no facts, more nodes asked than a layer has, a gate asked of a plain MLP.
        LayerError: no such layer.
        NothingToEditError: the model answers every fact with its new target already.
    Cost: per batch and epoch two forward and two backward passes for activations (one with pac_lambda=0), and the
        traces. No gradient of a whole weight, no optimiser state beyond the trained rows.
    """
    facts = list(facts)
    _check(lm, facts, hparams)
    training = _Training(lm, facts, hparams, seed)
    training.run()
    return Edit(
        facts=tuple(facts),
        method=method,
        hparams=flat_mapping(hparams),
        fingerprint=lm.fingerprint,
        modules=training.slices.modules(),
        notes=training.notes(),
        model_name=lm.name,
    )


def _check(lm: EditableLM, facts: Sequence[Fact], hparams: PacHparams) -> None:
    if not facts:
        raise HparamError("no facts to edit; give at least one")
    for layer in hparams.layers:
        lm.check_layer(layer)
    if "gate" in hparams.k_node and not lm.has_gate:
        raise HparamError(f"k_node={hparams.k_node!r} needs a gated MLP, {lm.family} has a plain one; use k_node='up'")


@dataclass(frozen=True)
class _Choice:
    """Nodes of one trace: rows of the slices, the step size of each module, and Adam's state for either step."""

    positive: Rows
    negative: Rows
    rates: Mapping[Place, float]
    positive_adam: RowAdam
    negative_adam: RowAdam


class _Training:
    """One edit in the making."""

    def __init__(self, lm: EditableLM, facts: Sequence[Fact], hparams: PacHparams, seed: int) -> None:
        self._lm, self._hparams = lm, hparams
        self._layers = tuple(sorted(set(hparams.layers))) or tuple(range(lm.n_layers))
        self._contrasts = contrasts_of(lm, facts, kept=hparams.kept, target_tok=hparams.target_tok)
        self._batches = [
            range(n, min(n + hparams.pac_batch, len(facts))) for n in range(0, len(facts), hparams.pac_batch)
        ]
        self._generator = torch.Generator().manual_seed(seed)
        linears = (*hparams.k_node.split("+"), "down")
        self.slices = TrainableSlices(lm, [(layer, linear) for layer in self._layers for linear in linears])
        self._choices: dict[int, _Choice] = {}
        self._shared_adam = RowAdam()
        self._course = Course(lm.device)
        self._nll: list[tuple[range, Tensor]] = []  # facts of each batch that was entered, and theirs

    def run(self) -> None:
        """Epochs until the steps are used up or nothing is left to do."""
        with self.slices.in_forward():
            for epoch in range(self._hparams.pac_epochs):
                if self._hparams.retrace is not None and epoch % self._hparams.retrace == 0:
                    if self._course.is_over():  # the trace would wait anyway, and its nodes join the slices
                        return
                    self._choices.clear()
                order = torch.randperm(len(self._batches), generator=self._generator).tolist()
                for place, number in enumerate(order, 1):
                    self._train_on(number)
                    if place == len(order):
                        self._course.end_pass()
                    if self._course.has_ended():
                        return

    def notes(self) -> dict[str, Any]:
        """What happened, as JSON values."""
        facts = range(len(self._contrasts))
        epochs, updates = self._course.told()
        entered = self._nll[: epochs * len(self._batches)]
        values = torch.cat([nll for _, nll in entered]).tolist()
        first: dict[int, float] = {}
        last: dict[int, float] = {}
        for fact, value in zip((fact for batch, _ in entered for fact in batch), values, strict=True):
            first.setdefault(fact, value)
            last[fact] = value
        return {
            "nll_first": [first[fact] for fact in facts],
            "nll_last": [last[fact] for fact in facts],
            "epochs": epochs,
            "updates": updates,
            "nodes": sum(len(own) for own in self.slices.values.values()),
            "answered_before": [fact for fact in facts if self._contrasts[fact].is_answered],
        }

    def _train_on(self, number: int) -> None:
        """The two steps on one batch, none where its facts hold already."""
        batch, stop = self._batches[number], self._hparams.early_stop
        contrasts = [self._contrasts[fact] for fact in batch]
        choice = self._choice(number)
        with self.slices.trainable():
            nll = target_nll(self._lm, [contrast.wanted for contrast in contrasts])
            self._nll.append((batch, nll.detach()))
            skip = self._course.enter(None if stop is None else (nll.detach() < stop).all().to(self._lm.device))
            if skip is True:
                return
            gradients = self.slices.gradients(nll.mean())
        self._step(gradients, choice.positive, choice.positive_adam, choice.rates, skip)
        if self._hparams.pac_lambda > 0:
            with self.slices.trainable():
                kept = target_nll(self._lm, [contrast.kept for contrast in contrasts])
                gradients = self.slices.gradients(self._hparams.pac_lambda * kept.mean())
            self._step(gradients, choice.negative, choice.negative_adam, choice.rates, skip)

    def _step(
        self, gradients: Mapping[Place, Tensor], rows: Rows, adam: RowAdam, rates: Mapping[Place, float], skip: Skip
    ) -> None:
        if self._hparams.adam_state == "dense_parity":
            step_on_all(self.slices, gradients, rows, self._shared_adam, rates, skip=skip)
        else:
            step_on_rows(self.slices, gradients, rows, adam, rates, skip=skip)

    def _choice(self, number: int) -> _Choice:
        """The nodes of a batch, traced on the weights as they are when first asked for."""
        shared_by = 0 if self._hparams.trace_scope == "dataset" else number
        if shared_by not in self._choices:
            is_dataset = self._hparams.trace_scope == "dataset"
            facts = self._contrasts if is_dataset else [self._contrasts[fact] for fact in self._batches[number]]
            self._choices[shared_by] = self._traced(facts)
        return self._choices[shared_by]

    def _traced(self, contrasts: Sequence[Contrast]) -> _Choice:
        hparams = self._hparams
        scores = score_nodes(
            self._lm, [contrast.fact for contrast in contrasts], score=hparams.score, k_node=hparams.k_node,
            target_tok=hparams.target_tok, with_edits=True,
        ).at(self._layers)  # fmt: skip
        chosen = select(scores, top=hparams.top, bottom=hparams.bottom, mode=hparams.select)
        weights = _layer_weights(scores, chosen.positive) if hparams.layer_weighted else [1.0] * len(self._layers)
        by_layer = dict(zip(self._layers, weights, strict=True))
        return _Choice(
            positive=self.slices.rows(self._by_place(chosen.positive)),
            negative=self.slices.rows(self._by_place(chosen.negative)),
            rates={place: hparams.pac_lr * by_layer[place[0]] for place in self.slices.values},
            positive_adam=RowAdam(),
            negative_adam=RowAdam(),
        )

    def _by_place(self, nodes: NodeSet) -> dict[Place, tuple[int, ...]]:
        found: dict[Place, tuple[int, ...]] = {}
        for layer, key, value in zip(self._layers, nodes.key, nodes.value, strict=True):
            found |= {(layer, linear): key for linear in self._hparams.k_node.split("+")}
            found[layer, "down"] = value
        return found


def _layer_weights(scores: NodeScores, nodes: NodeSet) -> list[float]:
    """Share of each layer in the positive nodes' absolute scores, times the number of layers."""
    sums = [
        float(key[list(own_key)].abs().sum() + value[list(own_value)].abs().sum())
        for key, value, own_key, own_value in zip(scores.key, scores.value, nodes.key, nodes.value, strict=True)
    ]
    total = sum(sums)
    return [len(sums) * own / total if total > 0 else 1.0 for own in sums]
