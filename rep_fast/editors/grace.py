"""GRACE: a codebook that answers for the model near the keys of edited prompts (methods §5.13).

No weight changes. At the prompt's last token the key that reaches one module is compared with the keys of edited
prompts; within a key's radius the module's output is replaced by a value, which gradient steps have made say the new
target. So an edit is exact on its prompt, and the model is untouched, bit for bit, wherever no radius reaches.

An edit carries the entries of its own facts with the radius they start from. The codebook of several active edits is
what their entries, in the order of the edits, make of each other (`Codebook.reach`): undoing one gives the radii back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rep_fast.editors.answered import answered_before, left_out
from rep_fast.edits import Codebook, Edit, ModuleEdit, replacements_at, without_replacements
from rep_fast.edits.codebook import EXTENTS, Acting, Extent, extent_positions, key_distances
from rep_fast.errors import HparamError
from rep_fast.facts import Fact
from rep_fast.models import Answer, Batch, EditableLM, ForwardPass, Site
from rep_fast.presets import flat_mapping

# linear module → sites of its input and its output
LINEAR_SITES = {"down": ("key", "value"), "up": ("mlp_in", "up"), "gate": ("mlp_in", "gate")}


@dataclass(frozen=True)
class GraceHparams:
    """Hyper-parameters of GRACE.

    layer, linear: the module that is replaced, see `EditableLM.linears`. eps: radius of a new key. n_iter updates
    of Adam(edit_lr) are made, and one forward more; early_stop ends before an update once the loss is below it (None:
    never). val_init: a value starts from random numbers in 0 … 1 ("cold") or the module's output ("warm").
    replacement: the value goes to the prompt's last token, to all tokens of the prompt, or to all tokens.
    """

    layer: int
    linear: str = "down"
    eps: float = 1.0
    n_iter: int = 100
    edit_lr: float = 1.0
    early_stop: float | None = None
    val_init: Literal["cold", "warm"] = "cold"
    replacement: Extent = "replace_last"
    target_tok: str = "in_context"

    def __post_init__(self) -> None:
        if self.linear not in LINEAR_SITES:
            raise HparamError(f"GRACE replaces the output of {', '.join(LINEAR_SITES)}, not of linear={self.linear!r}")
        if self.replacement not in EXTENTS:
            raise HparamError(f"replacement={self.replacement!r} is unknown; choose from {', '.join(EXTENTS)}")
        if self.n_iter < 1 or self.eps <= 0 or self.edit_lr <= 0:
            raise HparamError(
                f"n_iter={self.n_iter}, eps={self.eps} and edit_lr={self.edit_lr} of GRACE must be positive"
            )

    @property
    def layers(self) -> tuple[int, ...]:
        """The edited layer, as methods of several layers name theirs."""
        return (self.layer,)


@dataclass(frozen=True)
class TrainedValue:
    """One entry: the query of the edited prompt [inputs], the value [outputs], and the loss of each forward.

    is_absorbed: an earlier entry with the same label took it in.
    """

    key: Tensor
    value: Tensor
    losses: tuple[float, ...]
    is_absorbed: bool


class WrittenEntries:
    """The active entries at a module and, one after another, those that are added to them."""

    def __init__(self, standing: Sequence[Codebook]) -> None:
        book = Codebook.stacked(standing) if standing else None
        self._acting = Acting() if book is None else Acting.of(book)
        self._keys = [] if book is None else list(book.keys.double())
        self._values = [] if book is None else list(book.values)

    def absorbing_value(self, key: Tensor, label: str, radius: float) -> Tensor | None:
        """Enter a key; the value that stands at the entry which absorbs it, None if it has a place of its own."""
        key = key.double()
        earlier = torch.stack(self._keys).to(key.device) if self._keys else key.new_zeros(0, len(key))
        spoken_by = list(self._acting.spoken_by)
        near = self._acting.write(key_distances(key[None], earlier)[0].cpu(), label, radius)
        self._keys.append(key)
        return None if near is None else self._values[spoken_by[near]]

    def finish(self, value: Tensor) -> None:
        """The value of the key that was entered last."""
        self._values.append(value)


def grace(
    lm: EditableLM, facts: Sequence[Fact], *, hparams: GraceHparams, method: str = "grace", seed: int = 0
) -> Edit:
    """Edit facts with GRACE, one entry each.

    Args:
        facts: at least one; entries follow their order.
        seed: of the random start; entry i of a call starts from the same numbers whatever the others are.
    Returns:
        Edit whose one module carries a `Codebook`; labels are the new targets. A fact that the model answers already
        has no entry; `notes` name it in answered_before (`answered.py`), and in absorbed the facts whose entry joined
        an earlier one with the same label: its value goes on from the one there and takes its place.
    Raises:
        LayerError: no such layer, or a family without this linear. NothingToEditError: the model already answers every
            fact with its new target.
    Cost: n_iter + 1 forwards of one row per fact, and backwards down to the layer.
    """
    place = (lm.check_layer(hparams.layer), hparams.linear)
    before = left_out(facts, answered_before(lm, facts, target_tok=hparams.target_tok))
    written = WrittenEntries([made for made in replacements_at(lm, place) if isinstance(made, Codebook)])
    with without_replacements(lm, place):
        trained = {
            number: train_value(
                lm, fact, hparams=hparams, generator=torch.Generator().manual_seed(seed + number), written=written
            )
            for number, fact in enumerate(facts)
            if number not in before
        }
    entries = list(trained.values())
    codebook = Codebook(
        torch.stack([entry.key for entry in entries]),
        torch.stack([entry.value for entry in entries]),
        tuple(_label(facts[number]) for number in trained),
        (hparams.eps,) * len(entries),
        hparams.replacement,
    )
    notes = {
        "loss_first": [entry.losses[0] for entry in entries],
        "loss_last": [entry.losses[-1] for entry in entries],
        "forwards": [len(entry.losses) for entry in entries],
        "answered_before": before,
        "absorbed": [number for number, entry in trained.items() if entry.is_absorbed],
    }
    return Edit(
        facts=tuple(facts),
        method=method,
        hparams=flat_mapping(hparams),
        fingerprint=lm.fingerprint,
        modules=(ModuleEdit(hparams.layer, linear=hparams.linear, replacement=codebook),),
        notes=notes,
        model_name=lm.name,
    )


def train_value(
    lm: EditableLM, fact: Fact, *, hparams: GraceHparams, generator: torch.Generator, written: WrittenEntries
) -> TrainedValue:
    """The value that, in place of the module's output, makes the model answer the bare prompt with the new target.

    It is added to the written entries, and goes on from the value of the one that absorbs it.
    """
    answer = lm.answer(fact.text, fact.target_new, mode=hparams.target_tok)
    batch = lm.encode([answer.input_ids], prompt_lengths=[answer.prompt_length])
    targets = torch.tensor(answer.target_ids, device=lm.device)
    key, output = _unedited(lm, answer, batch, hparams)
    dtype = torch.promote_types(output.dtype, torch.float32)
    start = written.absorbing_value(key.to(dtype), _label(fact), hparams.eps)
    is_absorbed = start is not None
    if start is None:
        start = output if hparams.val_init == "warm" else torch.rand(output.shape, generator=generator)
    value = start.detach().to(output.device, dtype, copy=True).requires_grad_()
    site = Site(LINEAR_SITES[hparams.linear][1], hparams.layer)
    where = extent_positions(hparams.replacement, ForwardPass.of(batch), batch.input_ids.shape[1])[..., None]
    optimiser = torch.optim.Adam([value], lr=hparams.edit_lr)
    losses: list[float] = []
    with lm.patch(site, lambda tensor: torch.where(where.to(tensor.device), value.to(tensor), tensor)):
        while True:
            logits = lm.logits(batch, at=[answer.positions]).to(dtype)
            loss = torch.nn.functional.cross_entropy(logits, targets.to(logits.device))
            losses.append(float(loss.detach()))
            if len(losses) > hparams.n_iter or (hparams.early_stop is not None and losses[-1] < hparams.early_stop):
                break
            (value.grad,) = torch.autograd.grad(loss, [value])  # weights get no gradient, nothing accumulates
            optimiser.step()
    written.finish(value.detach())
    return TrainedValue(key.to(dtype), value.detach(), tuple(losses), is_absorbed)


def _label(fact: Fact) -> str:
    return fact.target_new.strip()


@torch.no_grad()
def _unedited(lm: EditableLM, answer: Answer, batch: Batch, hparams: GraceHparams) -> tuple[Tensor, Tensor]:
    """What enters and leaves the module at the prompt's last token."""
    before, after = (Site(kind, hparams.layer) for kind in LINEAR_SITES[hparams.linear])
    seen = lm.read(batch, [before, after])
    last = answer.prompt_length - 1
    return seen[before][0, last], seen[after][0, last]
