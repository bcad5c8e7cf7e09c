"""GRACE: a codebook that answers for the model near the keys of edited prompts (methods §5.13).

No weight changes. At the prompt's last token the key that reaches one module is compared with the keys of edited
prompts; within a key's radius the module's output is replaced by a value, which gradient steps have made say the new
target. So an edit is exact on its prompt, and the model is untouched, bit for bit, wherever no radius reaches.

An edit carries the entries of its own facts with the radius they start from. The codebook of several active edits is
what their entries, in the order of the edits, make of each other (`Codebook.reach`): undoing one gives the radii back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from rep_fast.editors.answered import answered_before, left_out
from rep_fast.edits import Codebook, Edit, ModuleEdit, replacements_at, without_replacements
from rep_fast.edits.codebook import EXTENTS, Acting, Extent, extent_positions, key_distances
from rep_fast.errors import HparamError
from rep_fast.facts import Fact
from rep_fast.models import Answer, Batch, EditableLM, ForwardPass, Site
from rep_fast.models.transfer import sent
from rep_fast.ops.arriving import read_late
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


@dataclass(frozen=True)
class Question:
    """The edited prompt of one fact, and what enters and leaves the unedited module at its last token.

    key: [inputs] float32 or wider. output: [outputs] in the model's dtype.
    """

    fact: Fact
    answer: Answer
    batch: Batch
    key: Tensor
    output: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, lm: EditableLM, fact: Fact, hparams: GraceHparams) -> Question:
        """The question of one fact."""
        answer = lm.answer(fact.text, fact.target_new, mode=hparams.target_tok)
        batch = lm.encode([answer.input_ids], prompt_lengths=[answer.prompt_length])
        before, after = (Site(kind, hparams.layer) for kind in LINEAR_SITES[hparams.linear])
        seen = lm.read(batch, [before, after])
        last = answer.prompt_length - 1
        key, output = seen[before][0, last].clone(), seen[after][0, last].clone()
        return cls(fact, answer, batch, key.to(torch.promote_types(key.dtype, torch.float32)), output)

    @property
    def label(self) -> str:
        """What its entry makes the model say."""
        return self.fact.target_new.strip()


class WrittenEntries:
    """The active entries at a module and, one after another, those of the questions that are added to them.

    Which entry absorbs which follows from keys, labels and radii alone: it is known before any value is trained.
    """

    def __init__(self, standing: Sequence[Codebook], questions: Sequence[Question], radius: float) -> None:
        book = Codebook.stacked(standing) if standing else None
        acting = Acting() if book is None else Acting.of(book)
        self._values = [] if book is None else list(book.values)
        added = torch.stack([question.key.double() for question in questions])
        keys = added if book is None else torch.cat([book.keys.double().to(added.device), added])
        distances = key_distances(added, keys).cpu()
        self._absorbers: list[int | None] = []  # of each question: whose value stands where it is absorbed
        for new, question in enumerate(questions, len(self._values)):
            spoken_by = list(acting.spoken_by)
            near = acting.write(distances[len(self._absorbers), :new], question.label, radius)
            self._absorbers.append(None if near is None else spoken_by[near])

    def absorbing_value(self, number: int) -> Tensor | None:
        """The value at the entry that absorbs question `number`, None if it has a place of its own."""
        absorber = self._absorbers[number]
        return None if absorber is None else self._values[absorber]

    def finish(self, value: Tensor) -> None:
        """The value of the next question."""
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
    standing = [made for made in replacements_at(lm, place) if isinstance(made, Codebook)]
    with without_replacements(lm, place):
        questions = {
            number: Question.of(lm, fact, hparams) for number, fact in enumerate(facts) if number not in before
        }
        written = WrittenEntries(standing, list(questions.values()), hparams.eps)
        trained = {}
        for turn, (number, question) in enumerate(questions.items()):
            start = written.absorbing_value(turn)
            generator = torch.Generator().manual_seed(seed + number)
            trained[number] = train_value(lm, question, start, hparams=hparams, generator=generator)
            written.finish(trained[number].value)
    entries = list(trained.values())
    codebook = Codebook(
        torch.stack([entry.key for entry in entries]),
        torch.stack([entry.value for entry in entries]),
        tuple(question.label for question in questions.values()),
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
    lm: EditableLM, question: Question, start: Tensor | None, *, hparams: GraceHparams, generator: torch.Generator
) -> TrainedValue:
    """The value that, in place of the module's output, makes the model answer the bare prompt with the new target.

    start: of the entry that absorbs it, None where it has a place of its own.
    """
    device, dtype = question.output.device, torch.promote_types(question.output.dtype, torch.float32)
    is_absorbed = start is not None
    if start is None and hparams.val_init == "warm":
        start = question.output
    elif start is None:
        start = sent(torch.rand(question.output.shape, generator=generator), device)
    value = start.detach().to(device, dtype, copy=True)
    losses: list[float] = []
    steps = islice(_descent(lm, question, value, hparams), hparams.n_iter + 1)
    for value, loss in read_late(steps):  # noqa: B007 - the last is the result
        losses.append(loss)
        if hparams.early_stop is not None and loss < hparams.early_stop:
            break
    return TrainedValue(question.key, value, tuple(losses), is_absorbed)


def _descent(
    lm: EditableLM, question: Question, value: Tensor, hparams: GraceHparams
) -> Iterator[tuple[Tensor, Tensor]]:
    """Values one Adam step after another, from `value`, each with its loss."""
    answer, batch = question.answer, question.batch
    site = Site(LINEAR_SITES[hparams.linear][1], hparams.layer)
    where = extent_positions(hparams.replacement, ForwardPass.of(batch), batch.input_ids.shape[1])[..., None]
    targets = sent(torch.tensor(answer.target_ids), lm.device)
    value = value.requires_grad_()
    optimiser = torch.optim.Adam([value], lr=hparams.edit_lr)
    while True:
        with lm.patch(site, lambda tensor: torch.where(where.to(tensor.device), value.to(tensor), tensor)):
            logits = lm.logits(batch, at=[answer.positions]).to(value.dtype)
        loss = torch.nn.functional.cross_entropy(logits, targets.to(logits.device))
        yield value.detach().clone(), loss.detach()
        (value.grad,) = torch.autograd.grad(loss, [value])  # weights get no gradient, nothing accumulates
        optimiser.step()
