"""WISE: edits go into a copy of one weight, and a prompt is routed through it when it stirs the copy (methods §5.14).

W' starts at W and is trained, entry by entry where a random mask allows it, to say the new target and to answer the
edited subject's keys very differently from W, all others alike. How differently is the activation gap
d = ‖act(Wk + b) − act(W'k + b)‖; `SideMemory` routes by it.

W' is a leaf of the graph beside the model: the layers up to the edited one, and so all its keys and outputs, are
constant in W' and run once; each step runs only the layers above.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from rep_fast.editors.answered import answered_before, left_out
from rep_fast.edits import Edit, MemoryRules, ModuleEdit, SideMemory, replacements_at, without_replacements
from rep_fast.edits.side_memory import activation_gaps, check_rules, filled, prompt_gaps
from rep_fast.errors import HparamError
from rep_fast.facts import Fact
from rep_fast.models import Batch, EditableLM, ForwardPass, Site, SuffixState
from rep_fast.models.transfer import sent
from rep_fast.ops.arriving import read_late
from rep_fast.presets import flat_mapping

LINEAR = "down"


@dataclass(frozen=True)
class WiseHparams:
    """Hyper-parameters of WISE.

    layer: whose down-projection has the side memory. At most n_iter steps of SGD(edit_lr, weight_decay); it stops when
    the loss is at most stop_loss and has moved by at most stop_change. alpha, beta, gamma: wanted gaps, d_out ≤ alpha,
    d_in ≥ beta, d_in − d_out ≥ gamma. mask_ratio: probability that an entry of W' may be trained. norm_constraint:
    entries of W' stay this close to W. Others: see `MemoryRules`.
    """

    layer: int
    n_iter: int = 70
    edit_lr: float = 1.0
    weight_decay: float = 1e-5
    alpha: float = 5.0
    beta: float = 20.0
    gamma: float = 10.0
    mask_ratio: float = 0.2
    norm_constraint: float = 1.0
    stop_loss: float = 0.02
    stop_change: float = 1e-4
    act_ratio: float = 0.88
    save_freq: int = 500
    merge_freq: int = 1000
    density: float = 0.53
    template_style: str = "wise"
    target_tok: str = "in_context"

    def __post_init__(self) -> None:
        if self.n_iter < 1 or self.edit_lr <= 0 or self.norm_constraint <= 0 or not 0 < self.mask_ratio <= 1:
            raise HparamError(
                f"n_iter={self.n_iter}, edit_lr={self.edit_lr}, norm_constraint={self.norm_constraint} and "
                f"mask_ratio={self.mask_ratio} of WISE must be positive, the last at most 1"
            )

    @property
    def layers(self) -> tuple[int, ...]:
        """The edited layer, as methods of several layers name theirs."""
        return (self.layer,)

    def rules(self, activation: str) -> MemoryRules:
        """What the memories of a model with this activation follow."""
        return MemoryRules(activation, self.act_ratio, self.save_freq, self.merge_freq, self.density)


@dataclass(frozen=True)
class Examples:
    """One fact behind every template, with what the model makes of it at the edited layer.

    batch: prompts with their targets. state, keys [P, T, M], values [P, T, D]: of the layer, constant in W'. answer_at,
    target_ids [P·n]: where the target's tokens are read. is_subject, is_rest: [P, T], the prompt's tokens in two parts.
    """

    batch: Batch
    state: SuffixState
    keys: Tensor
    values: Tensor
    answer_at: tuple[tuple[int, ...], ...]
    target_ids: Tensor
    is_subject: Tensor
    is_rest: Tensor


def wise(
    lm: EditableLM, facts: Sequence[Fact], *, hparams: WiseHparams, templates: Sequence[str], method: str = "wise",
    seed: int = 0,
) -> Edit:  # fmt: skip
    """Edit facts with WISE, one after another into the memory that active WISE edits of the layer are filling.

    Args:
        facts: at least one.
        templates: `context_templates` of the model, the bare one first.
        seed: of the masks; a memory's mask is drawn from it and the memory's number.
    Returns:
        Edit whose one module carries a `SideMemory` with what this call added; undone, the memory is as before. A fact
        that the model answers already is left out; `notes` name it in answered_before (`answered.py`).
    Raises:
        LayerError: no such layer, a quantised weight, or an active edit above the layer that replaces outputs.
        HparamError: active side memories follow other rules. NothingToEditError: the model already answers every fact
            with its new target.
    Cost: one forward of all rows per fact, then n_iter passes over the layers above; D·M numbers per memory touched.
    """
    place = (lm.check_layer(hparams.layer), LINEAR)
    rules = hparams.rules(lm.activation)
    active = [made for made in replacements_at(lm, place) if isinstance(made, SideMemory)]
    check_rules(active, rules)
    filling = _Filling(filled(active), rules)
    losses: list[tuple[float, ...]] = []
    before = left_out(facts, answered_before(lm, facts, target_tok=hparams.target_tok))
    with without_replacements(lm, place):
        for fact in (fact for number, fact in enumerate(facts) if number not in before):
            examples = gather(lm, fact, hparams, templates)
            start = filling.start(examples)
            mask = trainable_entries(start, hparams.mask_ratio, seed=seed, number=filling.number)
            change, lost = train_memory(lm, examples, start, mask, hparams)
            filling.add(change - start, _prompt_gap(examples, change, lm.activation))
            losses.append(lost)
    notes = {
        "templates": list(templates),
        "loss_first": [lost[0] for lost in losses],
        "loss_last": [lost[-1] for lost in losses],
        "forwards": [len(lost) for lost in losses],
        "answered_before": before,
    }
    return Edit(
        facts=tuple(facts),
        method=method,
        hparams=flat_mapping(hparams),
        fingerprint=lm.fingerprint,
        modules=(ModuleEdit(place[0], linear=LINEAR, replacement=filling.written()),),
        notes=notes,
        model_name=lm.name,
    )


@dataclass
class _Piece:
    """What was written into one memory: a change [D, M], the smallest gap [] of its facts, and how many these are."""

    change: Tensor
    gap: Tensor
    count: int


class _Filling:
    """The memories of a module while facts are written into them, and the pieces that this call adds.

    memories: those that active edits have filled, in order and each as one piece.
    """

    def __init__(self, memories: Sequence[SideMemory], rules: MemoryRules) -> None:
        self._rules, self._n_memories = rules, len(memories)
        self._open = memories[-1].changes[0] if memories else None
        self._open_count = memories[-1].counts[0] if memories else rules.save_freq
        self._pieces: list[_Piece] = []

    @property
    def _has_room(self) -> bool:
        return self._open_count < self._rules.save_freq

    @property
    def number(self) -> int:
        """Of the memory that takes the next fact."""
        return self._n_memories - self._has_room

    def start(self, examples: Examples) -> Tensor:
        """What that memory's W' − W [D, M] is by now."""
        if self._open is not None and self._has_room:
            return self._open.to(examples.values)
        return examples.values.new_zeros(examples.values.shape[-1], examples.keys.shape[-1])

    def add(self, change: Tensor, gap: Tensor) -> None:
        """Writes a fact's change [D, M], with the smallest gap [] of its rows, into that memory."""
        if self._open is None or not self._has_room:
            self._n_memories += 1
            self._open, self._open_count = change, 1
            self._pieces.append(_Piece(change, gap, 1))
            return
        self._open, self._open_count = self._open + change, self._open_count + 1
        if self._pieces:
            last = self._pieces[-1]
            self._pieces[-1] = _Piece(last.change + change, torch.minimum(last.gap, gap), last.count + 1)
        else:  # the memory was begun by an earlier edit
            self._pieces.append(_Piece(change, gap, 1))

    def written(self) -> SideMemory:
        """What this call has added, a piece per memory."""
        gaps = torch.stack([piece.gap for piece in self._pieces]).tolist()
        counts = tuple(piece.count for piece in self._pieces)
        return SideMemory(torch.stack([piece.change for piece in self._pieces]), tuple(gaps), counts, self._rules)


def gather(lm: EditableLM, fact: Fact, hparams: WiseHparams, templates: Sequence[str]) -> Examples:
    """The rows of one fact, run once up to the edited layer and prepared to go on from there."""
    prompts = [template.replace("{}", fact.prompt) for template in templates]
    answers = [lm.answer(p.replace("{}", fact.subject), fact.target_new, mode=hparams.target_tok) for p in prompts]
    batch = lm.encode([a.input_ids for a in answers], prompt_lengths=[a.prompt_length for a in answers])
    key_site, value_site = Site("key", hparams.layer), Site("value", hparams.layer)
    with torch.no_grad(), lm.capture([key_site, value_site]) as seen:
        state = lm.suffix_state(batch, hparams.layer, [0] * batch.n_rows)
    answer_at = tuple(answer.positions for answer in answers)
    target_ids = sent(torch.tensor([token for answer in answers for token in answer.target_ids]), lm.device)
    values = _widened(seen[value_site])
    is_prompt = ForwardPass.of(batch).is_prompt(values.shape[1])
    is_subject = _subject_tokens(lm, prompts, fact.subject, is_prompt)
    return Examples(
        batch, state, seen[key_site].to(values), values, answer_at, target_ids, is_subject, is_prompt & ~is_subject
    )


def train_memory(
    lm: EditableLM, examples: Examples, start: Tensor, mask: Tensor, hparams: WiseHparams
) -> tuple[Tensor, tuple[float, ...]]:
    """SGD on W' − W [D, M] from `start`, where `mask` [D, M] allows it; returns it and the loss of each forward."""
    losses: list[float] = []
    steps = islice(_descent(lm, examples, start, mask, hparams), hparams.n_iter + 1)
    for change, loss in read_late(steps):  # noqa: B007 - the last is the result
        moved = abs(loss - losses[-1]) if losses else float("inf")
        losses.append(loss)
        if loss <= hparams.stop_loss and moved <= hparams.stop_change:
            break
    return change, tuple(losses)


def _descent(
    lm: EditableLM, examples: Examples, start: Tensor, mask: Tensor, hparams: WiseHparams
) -> Iterator[tuple[Tensor, Tensor]]:
    """Changes one step of SGD after another, from `start`, each with its loss."""
    weight = lm.linear_weight(hparams.layer, LINEAR).detach().to(start)
    change = start.clone()
    while True:
        leaf = change.detach().requires_grad_()
        loss = memory_loss(lm, examples, leaf, hparams)
        yield change, loss.detach()
        (gradient,) = torch.autograd.grad(loss, [leaf])  # the model's weights get none
        step = gradient + hparams.weight_decay * (weight + change)
        moved_to = (change - hparams.edit_lr * step).clamp_(-hparams.norm_constraint, hparams.norm_constraint)
        change = torch.where(mask, moved_to, change)


def memory_loss(lm: EditableLM, examples: Examples, change: Tensor, hparams: WiseHparams) -> Tensor:
    """NLL of the target through W' + mean⁺(d_out − α) + mean⁺(β − d_in) + mean⁺(γ − d_in + d_out), means over rows."""
    moved = examples.keys @ change.T
    hidden = examples.state.hidden + moved.to(examples.state.hidden)
    logits = lm.resume(examples.state, hidden, at=examples.answer_at).to(change.dtype)
    nll = torch.nn.functional.cross_entropy(logits, examples.target_ids.to(logits.device))
    gaps = activation_gaps(examples.values, examples.values + moved, lm.activation)
    inside, outside = (_row_means(gaps, where) for where in (examples.is_subject, examples.is_rest))
    wanted = (outside - hparams.alpha, hparams.beta - inside, hparams.gamma - inside + outside)
    return nll + sum((_mean_of_positive(excess) for excess in wanted), start=gaps.new_zeros(())).to(nll.device)


def trainable_entries(like: Tensor, ratio: float, *, seed: int, number: int) -> Tensor:
    """The mask of memory `number`: each entry of a matrix like this is trainable with probability `ratio`."""
    generator = torch.Generator().manual_seed((seed << 20) + number)
    return sent(torch.rand(like.shape, generator=generator) < ratio, like.device)


def _subject_tokens(lm: EditableLM, prompts: Sequence[str], subject: str, is_prompt: Tensor) -> Tensor:
    """[P, T] bool: from the subject's first token to its last."""
    positions = torch.arange(is_prompt.shape[1], device=is_prompt.device)
    spans = torch.tensor(
        [[lm.locate(p, subject, strategy=end).position for end in ("subject_first", "subject_last")] for p in prompts]
    )
    spans = sent(spans, is_prompt.device)
    return (positions >= spans[:, :1]) & (positions <= spans[:, 1:]) & is_prompt


def _prompt_gap(examples: Examples, change: Tensor, activation: str) -> Tensor:
    """What routing will measure at least, on the rows of training, []."""
    side = examples.values + examples.keys @ change.T
    return prompt_gaps(examples.values, side, ForwardPass.of(examples.batch), activation).min()


def _row_means(gaps: Tensor, where: Tensor) -> Tensor:
    where = where.to(gaps.device)
    return (gaps * where).sum(dim=1) / where.sum(dim=1).clamp_min(1)


def _mean_of_positive(excess: Tensor) -> Tensor:
    """Mean of the positive entries, 0 where there are none; how many there are is not known on the host."""
    is_positive = excess > 0
    return torch.where(is_positive, excess, 0.0).sum() / is_positive.sum().clamp_min(1)


def _widened(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
