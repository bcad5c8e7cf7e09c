"""Training the key adapters of an edit, one per edited layer, on cached keys.

The keys of a layer depend neither on the edit at that layer nor on the adapter, so every key is computed once, by a
forward truncated at the layer; all steps then run on cached vectors (methods §6.4). With several layers the lowest is
first: what it and its trained adapter do to the stream is in the keys of the next one, as it will be at inference.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rep_fast.edits import Edit, KeyAdapter, active_composition, with_native_keys
from rep_fast.errors import HparamError
from rep_fast.models import EditableLM
from rep_fast.models.transfer import sent
from rep_fast.ops import AdapterWeights
from rep_fast.presets import flat_mapping
from rep_fast.rep.adam import Adam
from rep_fast.rep.calibrated_step import calibrated_step
from rep_fast.rep.forms import LocatedTexts, SubjectForms
from rep_fast.rep.hparams import RepHparams
from rep_fast.rep.negatives import NegativePool, draw_negatives
from rep_fast.rep.objectives import paper_loss, protecting, soft_adapted


@dataclass(frozen=True)
class CachedKeys:
    """Everything training reads, of one layer, float32.

    positives [s, M]; bare [b, M], those among them without a prefix; anchor [M], the bare prompt's key; negatives
    [n, M] (empty for the paper's objective); response [M] with ρ(k) = k·response; target [M], the paper objective's
    direction t; prompt_basis [M, p], an orthonormal basis of the keys of the bare prompt's tokens.
    """

    positives: Tensor
    bare: Tensor
    anchor: Tensor
    negatives: Tensor
    response: Tensor
    target: Tensor
    prompt_basis: Tensor


def train_adapters(
    lm: EditableLM,
    edit: Edit,
    forms: SubjectForms,
    *,
    pools: Mapping[int, NegativePool],
    templates: Sequence[str],
    hparams: RepHparams,
    seed: int = 0,
) -> Edit:
    """The edit with a key adapter per edited layer, trained for its subject.

    Args:
        lm: the model without this edit; edits that will precede it in use (a sequence, methods §6.5) are active.
        edit: of one fact, with the vectors `k_star`, `direction` and `response` in every module, as the locate-and-edit
            editors give them.
        forms: the subject's in-domain forms.
        pools: layer → negatives of that layer; the paper's objective does without.
        templates: context templates; their prompts are the pool of texts.
        seed: of the adapter's start, the order of texts and the draw of negatives.
    Returns:
        A new Edit; each adapter's `notes` say ρ before and after, and how often the gate opens on positives, negatives.
    Raises:
        HparamError: a module lacks those vectors, or negatives are needed and missing.
    Cost: per layer one truncated forward over templates × forms short texts, then `steps` small matrix products.
    """
    trained = edit
    for layer in _edited_layers(edit):
        with _active_below(lm, trained, layer, with_adapters=hparams.multilayer == "in_order"):
            trained = _train_layer(
                lm, trained, layer, forms, pools.get(layer), templates=templates, hparams=hparams, seed=seed
            )
    return trained


def _train_layer(
    lm: EditableLM,
    edit: Edit,
    layer: int,
    forms: SubjectForms,
    pool: NegativePool | None,
    *,
    templates: Sequence[str],
    hparams: RepHparams,
    seed: int,
) -> Edit:
    """The edit with the adapter of one layer; keys are read from the model as it stands."""
    with _as_composed(lm, layer):
        keys = cache_keys(lm, edit, layer, forms, pool, templates=templates, hparams=hparams, seed=seed)
    start = KeyAdapter.initial(
        lm.key_width(layer), rank=hparams.rank, gate_hidden=hparams.gate_hidden(lm.key_width(layer)), tau=hparams.tau,
        seed=seed, trained_for=(forms.fact.subject,),
    ).to(device=lm.layer_device(layer))  # fmt: skip
    weights, losses = fit(start.weights, keys, hparams, seed=seed)
    trained = KeyAdapter(weights, tau=hparams.tau, trained_for=(forms.fact.subject,))
    notes = {
        **report(trained, keys),
        **_firing(trained, pool),
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "forms": forms.origin,
    }
    notes["hparams"] = flat_mapping(hparams)
    return edit.with_adapters({layer: KeyAdapter(weights, trained.tau, trained.trained_for, notes)})


def cache_keys(
    lm: EditableLM,
    edit: Edit,
    layer: int,
    forms: SubjectForms,
    pool: NegativePool | None,
    *,
    templates: Sequence[str],
    hparams: RepHparams,
    seed: int,
) -> CachedKeys:
    """Keys of the training texts and negatives, from the unedited lower layers.

    Raises:
        HparamError: the first template is not `{}`, there is nothing to train on, or negatives are needed and missing.
    """
    if not templates or templates[0] != "{}":
        raise HparamError(f"the first context template must be the bare '{{}}', got {list(templates[:1])}")
    texts = LocatedTexts.of(lm, forms.texts(templates))
    if len(texts.rows) < 2:
        raise HparamError(f"there is no other form of {forms.fact.subject!r} and no context to train an adapter on")
    positives = texts.keys_so_far(lm, layer)
    keys = positives.subject
    vectors = edit.module(layer).vectors
    response = vectors["response"].to(keys)
    direction = vectors["k_star" if hparams.target == "raw" else "direction"].to(keys)
    target = direction if hparams.target == "raw" else direction / direction.norm()
    negatives = keys[:0]
    if hparams.objective == "calibrated":
        if pool is None:
            raise HparamError("the calibrated objective needs negatives; pass a NegativePool of the edited layer")
        if pool.corpus.layer != layer:
            raise HparamError(f"the negatives are keys of layer {pool.corpus.layer}, the edit is at layer {layer}")
        negatives = draw_negatives(
            lm, forms, texts, pool, positive_keys=positives, response=response, templates=templates, hparams=hparams,
            seed=seed,
        ).all()  # fmt: skip
        if not len(negatives):
            raise HparamError("no negatives were drawn; raise n_random, n_hard, n_subjects or n_other_tokens")
    prompt_keys = lm.keys([texts.rows[0]], [layer])[layer].to(keys)
    basis = torch.linalg.qr(prompt_keys.T.double()).Q.to(keys)
    return CachedKeys(
        positives=keys[1:], bare=keys[forms.bare_rows(templates)], anchor=keys[0], negatives=negatives.to(keys),
        response=response, target=target, prompt_basis=basis,
    )  # fmt: skip


def fit(
    weights: AdapterWeights, keys: CachedKeys, hparams: RepHparams, *, seed: int
) -> tuple[AdapterWeights, list[float]]:
    """Adam on the adapter's weights; returns the trained weights and the loss of every step."""
    # one flat parameter: the cost of a step is per tensor here
    flat = torch.cat([part.detach().reshape(-1) for part in weights])
    parts = AdapterWeights(
        *(part.view(like.shape) for part, like in zip(flat.split([w.numel() for w in weights]), weights, strict=True))
    )
    optimiser = Adam(flat, lr=hparams.lr)
    step = _calibrated if hparams.objective == "calibrated" else _paper
    losses = []
    positives = _slices(keys.positives, hparams.batch, f"order/{seed}")
    negatives = _slices(keys.negatives, hparams.negative_batch, f"negatives/{seed}")
    generator = torch.Generator().manual_seed(seed)
    for _ in range(hparams.steps):
        loss, gradients = step(parts, keys, next(positives), next(negatives), hparams, generator)
        optimiser.step(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        losses.append(loss.detach())
    trained = AdapterWeights(*(part.clone() for part in parts))
    return _protected(trained, keys, hparams), torch.stack(losses).tolist()


def report(adapter: KeyAdapter, keys: CachedKeys) -> dict[str, float]:
    """ρ on the positives before and after the hard-gated adapter, and the share of open gates on both sides."""
    moved = adapter(keys.positives)
    found = {
        "rho_before": float((keys.positives @ keys.response).mean()),
        "rho_after": float((moved @ keys.response).mean()),
        "open_on_positives": float(adapter.is_open(keys.positives).float().mean()),
        "n_positives": float(len(keys.positives)),
        "n_negatives": float(len(keys.negatives)),
    }
    if len(keys.negatives):
        found["open_on_negatives"] = float(adapter.is_open(keys.negatives).float().mean())
    return found


def _protected(weights: AdapterWeights, keys: CachedKeys, hparams: RepHparams) -> AdapterWeights:
    if hparams.objective == "calibrated" and hparams.protect_prompt:
        return protecting(weights, keys.prompt_basis)
    return weights


def _firing(adapter: KeyAdapter, pool: NegativePool | None) -> dict[str, float]:
    """How often the gate opens on text that was not trained on."""
    if pool is None or pool.held_out is None:
        return {}
    return {"firing_rate": float(adapter.is_open(pool.held_out.keys).float().mean())}


def _calibrated(
    weights: AdapterWeights,
    keys: CachedKeys,
    positives: Tensor,
    negatives: Tensor,
    hparams: RepHparams,
    generator: torch.Generator,
) -> tuple[Tensor, Sequence[Tensor]]:
    bare = [keys.bare] if hparams.bare_every_step else []
    rows = torch.cat([*bare, positives, keys.anchor[None]])
    entering = _dropped(rows, hparams.dropout, generator)
    if hparams.protect_prompt:
        # (A − AQQᵀ)k = A(k − QQᵀk): the span is taken out of the keys in each step, out of A once at the end
        entering = entering - (entering @ keys.prompt_basis) @ keys.prompt_basis.T
    return calibrated_step(weights, rows, negatives, keys.response, hparams, entering=entering)


def _paper(
    weights: AdapterWeights,
    keys: CachedKeys,
    positives: Tensor,
    _negatives: Tensor,
    hparams: RepHparams,
    generator: torch.Generator,
) -> tuple[Tensor, Sequence[Tensor]]:
    leaves = AdapterWeights(*(part.detach().requires_grad_() for part in weights))
    rows = torch.cat([positives, keys.anchor[None]])
    moved, _ = soft_adapted(rows, leaves, entering=_dropped(rows, hparams.dropout, generator))
    loss = paper_loss(
        moved[:-1], keys.target, moved[-1], keys.anchor, alpha=hparams.consistency, absolute=hparams.absolute
    )
    return loss, torch.autograd.grad(loss, list(leaves))


def _slices(keys: Tensor, size: int | None, order_seed: str) -> Iterator[Tensor]:
    """Endless batches of keys.

    The rows are shuffled once and read in consecutive slices, from the start again when they are used up (methods
    §6.3); size None, or more than there are, gives all rows every time.
    """
    if size is None or size >= len(keys):
        while True:
            yield keys
    order = list(range(len(keys)))
    random.Random(order_seed).shuffle(order)
    shuffled = keys[sent(torch.tensor(order), keys.device)]
    looped = torch.cat([shuffled, shuffled[:size]])  # a slice may run over the end
    begin = 0
    while True:
        yield looped[begin : begin + size]
        begin = (begin + size) % len(keys)


def _dropped(rows: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """Entries set to 0 with probability `rate`, the others scaled by 1/(1 − rate)."""
    if rate == 0.0:
        return rows
    kept = torch.rand(rows.shape, generator=generator) >= rate
    return rows * sent((kept / (1 - rate)).to(rows.dtype), rows.device)


def _edited_layers(edit: Edit) -> list[int]:
    """The layers to train, from below."""
    wanted = ("k_star", "direction", "response")
    missing = {name for module in edit.modules for name in wanted if name not in module.vectors}
    if missing or not edit.modules:
        raise HparamError(
            f"an edit of {len(edit.facts)} facts by {edit.method!r} lacks the vectors {', '.join(sorted(missing))}; "
            "REP is trained for edits of one fact by a locate-and-edit method"
        )
    return sorted(edit.layers)


def _as_composed(lm: EditableLM, layer: int) -> AbstractContextManager[None]:
    """The layer's keys are what its new adapter will be handed: in a chain what the adapters of earlier edits leave,
    native ones where all adapters act on the same key (methods §6.5)."""
    return nullcontext() if active_composition(lm) == "chain" else with_native_keys(lm, (layer, "down"))


def _active_below(lm: EditableLM, edit: Edit, layer: int, *, with_adapters: bool) -> AbstractContextManager[object]:
    """The part of the edit below a layer is active, with or without its adapters."""
    below = [module for module in edit.modules if module.layer < layer]
    if not below:
        return nullcontext()
    if not with_adapters:
        below = [replace(module, adapters=()) for module in below]
    return replace(edit, modules=tuple(below)).applied(lm, compose=active_composition(lm))
