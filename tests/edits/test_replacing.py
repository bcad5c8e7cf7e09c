"""Replacements in a model: what they do to forwards, generation and scores, how they stack, and that they leave."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rep_fast.edits import (
    Codebook,
    Edit,
    LowRank,
    MemoryRules,
    ModuleEdit,
    Replacement,
    SideMemory,
    accumulate,
    replacements_at,
    without_replacements,
)
from rep_fast.edits.codebook import EXTENTS, Extent
from rep_fast.errors import HparamError, LayerError
from rep_fast.evaluation import score_targets
from rep_fast.facts import Fact
from rep_fast.models import EditableLM, Site

FACT = Fact("{} belongs to the continent of", "Slovenia", "Antarctica", "Europe")
PROMPTS = ("Slovenia belongs to the continent of", "Michael Jordan plays the sport of", "The iPhone is produced by")
PAIRS = [(prompt, target) for prompt in PROMPTS for target in ("Antarctica and Europe", "Asia", "Paris")]
SOME_FAMILIES = ("llama", "gptj", "gpt2")


def random_tensor(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def codebook(
    lm: EditableLM, prompts: Sequence[str], *, seed: int = 0, extent: Extent = "replace_last", layer: int = 1
) -> Codebook:
    """Entries for the down-projection's keys at the ends of prompts, with random values."""
    keys = torch.stack([lm.keys([prompt], layer)[layer][-1] for prompt in prompts]).double()
    values = 3 * random_tensor(len(prompts), lm.hidden_size, seed=seed)
    return Codebook(keys, values, tuple(map(str, range(seed, seed + len(prompts)))), (0.5,) * len(prompts), extent)


def side_memory(lm: EditableLM, *, seed: int = 0, gap: float = 1e-6, layer: int = 1, size: float = 0.3) -> SideMemory:
    """A random memory that takes every prompt unless told otherwise."""
    change = size * random_tensor(*lm.linear_shape(layer, "down"), seed=seed)
    return SideMemory(change[None], (gap,), (1,), MemoryRules(lm.activation, save_freq=1, merge_freq=2))


def edit_of(lm: EditableLM, *replacements: Replacement, delta: LowRank | None = None, layer: int = 1) -> Edit:
    modules = tuple(
        ModuleEdit(layer + number, delta, replacement=replacement) for number, replacement in enumerate(replacements)
    )
    return Edit((FACT,), "x", {}, lm.fingerprint, modules, model_name=lm.name)


def split_gap(lm: EditableLM, memory: SideMemory, layer: int = 1) -> SideMemory:
    """The memory with a threshold between the gaps of the first prompt and of the second."""
    gaps = []
    for prompt in PROMPTS[:2]:
        seen = lm.read([prompt], [("key", layer), ("value", layer)])
        key, value = seen[Site("key", layer)].double(), seen[Site("value", layer)].double()
        act = torch.nn.functional.silu if lm.activation == "silu" else _gelu_new
        gaps.append(float((act(value) - act(value + key @ memory.changes[0].T)).norm(dim=-1).mean()))
    return SideMemory(memory.changes, (sum(gaps) / 2 / memory.rules.act_ratio,), (1,), memory.rules)


def _gelu_new(tensor: Tensor) -> Tensor:
    return torch.nn.functional.gelu(tensor, approximate="tanh")


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def state(lm: EditableLM) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}


def assert_clean(lm: EditableLM, before: dict[str, Tensor]) -> None:
    assert lm.active_edits == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in lm.model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules())


@torch.no_grad()
def test_a_codebook_speaks_at_its_prompt_and_is_silent_elsewhere(fresh_lm: EditableLM) -> None:
    lm, before = fresh_lm, state(fresh_lm)
    book = codebook(lm, PROMPTS[:1])
    clean = [lm.logits([prompt]) for prompt in PROMPTS]

    def put(output: Tensor) -> Tensor:
        return torch.cat([output[:, :-1], book.values[:1][None]], dim=1)

    with lm.patch(Site("value", 1), put):
        expected = lm.logits([PROMPTS[0]])
    with edit_of(lm, book).applied(lm):
        close(lm.logits([PROMPTS[0]]), expected)
        assert not torch.allclose(expected, clean[0], atol=1e-3)
        assert all(
            torch.equal(lm.logits([prompt]), plain) for prompt, plain in zip(PROMPTS[1:], clean[1:], strict=True)
        )
        # the same prompt with more text behind it ends elsewhere
        longer = PROMPTS[0] + " Europe"
        changed = lm.logits([longer])
    assert torch.equal(changed, lm.logits([longer]))
    assert_clean(lm, before)


@torch.no_grad()
def test_a_side_memory_takes_whole_prompts(fresh_lm: EditableLM) -> None:
    lm, before = fresh_lm, state(fresh_lm)
    memory = split_gap(lm, side_memory(lm))
    clean = [lm.logits([prompt]) for prompt in PROMPTS[:2]]
    with edit_of(lm, memory).applied(lm):
        changed = [lm.logits([prompt]) for prompt in PROMPTS[:2]]
    weight = lm.linear_weight(1, "down")
    kept = weight.clone()
    weight.add_(memory.changes[0])
    moved = [lm.logits([prompt]) for prompt in PROMPTS[:2]]
    weight.copy_(kept)
    taken = [not torch.equal(one, plain) for one, plain in zip(changed, clean, strict=True)]
    assert sorted(taken) == [False, True]
    close(changed[taken.index(True)], moved[taken.index(True)])
    assert_clean(lm, before)


def made_to_act(lm: EditableLM, kind: str) -> Replacement:
    """One that acts on the first prompt and not on the second, whatever comes after them."""
    return split_gap(lm, side_memory(lm)) if kind == "side_memory" else codebook(lm, PROMPTS[:1], extent=kind)  # type: ignore[arg-type]


@torch.no_grad()
@pytest.mark.parametrize("kind", [*EXTENTS, "side_memory"])
def test_generation_keeps_what_the_prompt_decided(tiny_families: EditableLM, kind: str) -> None:
    """Step by step with a cache as by whole forwards that know where the prompt ends."""
    lm = tiny_families
    plain = [lm.generate_ids(prompt, max_new_tokens=6) for prompt in PROMPTS[:2]]
    with edit_of(lm, made_to_act(lm, kind)).applied(lm):
        cached = [lm.generate_ids(prompt, max_new_tokens=6) for prompt in PROMPTS[:2]]
        for prompt, found in zip(PROMPTS[:2], cached, strict=True):
            ids = lm.encode([prompt]).rows()[0]
            length = len(ids)
            while len(ids) < len(found):
                ids.append(int(lm.logits(lm.encode([ids], prompt_lengths=[length]))[0, -1].argmax()))
            assert tuple(ids) == found
    assert sum(one != other for one, other in zip(cached, plain, strict=True)) == 1


@torch.no_grad()
@pytest.mark.parametrize("kind", [*EXTENTS, "side_memory"])
def test_scores_equal_single_rows(tiny_families: EditableLM, kind: str) -> None:
    lm = tiny_families
    with edit_of(lm, made_to_act(lm, kind)).applied(lm):
        scores = score_targets(lm, PAIRS, token_budget=60)
        for (prompt, target), score in zip(PAIRS, scores, strict=True):
            answer = lm.answer(prompt, target)
            batch = lm.encode([answer.input_ids], prompt_lengths=[len(answer.prompt_ids)])
            logits = lm.logits(batch)[0, list(answer.positions)]
            nll = -logits.log_softmax(-1).gather(1, torch.tensor(answer.target_ids)[:, None]).mean()
            assert score.argmax == tuple(logits.argmax(-1).tolist())
            assert score.nll == pytest.approx(float(nll), rel=1e-9)


@pytest.fixture(scope="module", params=SOME_FAMILIES)
def tiny_families(request: pytest.FixtureRequest, build_lm: Callable[..., EditableLM]) -> EditableLM:
    return build_lm(request.param, dtype=torch.float64)


@torch.no_grad()
def test_deltas_come_first_then_kinds_in_the_order_of_the_edits(tiny_families: EditableLM) -> None:
    lm = tiny_families
    delta = LowRank(random_tensor(lm.hidden_size, 1, seed=5), 0.1 * random_tensor(1, lm.key_width(1), seed=6))
    memory, book = side_memory(lm), codebook(lm, PROMPTS[:1])
    parts: dict[str, Edit] = {
        "memory": edit_of(lm, memory),
        "book": edit_of(lm, book),
        "delta": Edit((FACT,), "x", {}, lm.fingerprint, (ModuleEdit(1, delta),)),
    }
    seen = lm.read([PROMPTS[0]], [("key", 1), ("value", 1)])
    key, value = seen[Site("key", 1)][0], seen[Site("value", 1)][0] + delta.on_rows(seen[Site("key", 1)][0])
    for order in itertools.permutations(parts):
        expected = value.clone()
        for name in order:
            if name == "memory":
                expected = expected + key @ memory.changes[0].T
            if name == "book":
                expected[-1] = book.values[0]
        handles = [parts[name].apply(lm) for name in order]
        close(lm.read([PROMPTS[0]], [("value", 1)])[Site("value", 1)][0], expected)
        for handle in handles:
            handle.undo()


@torch.no_grad()
def test_stacked_edits_act_as_one_and_undo_in_any_order(build_lm: Callable[..., EditableLM]) -> None:
    lm = build_lm("llama", dtype=torch.float64)
    before = state(lm)
    keys = codebook(lm, PROMPTS[:1]).keys
    close_key = keys + 0.6 * torch.nn.functional.normalize(random_tensor(*keys.shape, seed=3))
    first = Codebook(keys, random_tensor(1, lm.hidden_size, seed=1), ("a",), (0.5,))
    second = Codebook(close_key, random_tensor(1, lm.hidden_size, seed=2), ("b",), (0.5,))
    single = [side_memory(lm, seed=seed, layer=2) for seed in range(3)]
    edits = [
        edit_of(lm, first, single[0]),
        edit_of(lm, second, single[1]),
        edit_of(lm, codebook(lm, PROMPTS[1:2]), single[2]),
    ]
    for undone in itertools.permutations(range(3)):
        handles = [edit.apply(lm) for edit in edits]
        left = list(range(3))
        for number in undone:
            books = [edits[i].modules[0].replacement for i in left]
            memories = [single[i] for i in left]
            stacked = lm.logits(list(PROMPTS))
            for handle in handles:
                handle.undo()
            with edit_of(lm, Codebook.stacked(books), SideMemory.stacked(memories)).applied(lm):  # type: ignore[arg-type]
                close(lm.logits(list(PROMPTS)), stacked)
            left.remove(number)
            handles = [edits[i].apply(lm) for i in left]
        assert_clean(lm, before)


@torch.no_grad()
def test_accumulated_edits_act_as_the_stack(build_lm: Callable[..., EditableLM]) -> None:
    lm = build_lm("llama", dtype=torch.float64)
    edits = [edit_of(lm, codebook(lm, PROMPTS[:1])), edit_of(lm, codebook(lm, PROMPTS[1:2], seed=1))]
    with edits[0].applied(lm), edits[1].applied(lm):
        stacked = lm.logits(list(PROMPTS))
    with accumulate(edits).applied(lm):
        close(lm.logits(list(PROMPTS)), stacked)
    with pytest.raises(LayerError, match="a codebook and a side memory at layer 1 cannot become one edit; stack"):
        accumulate([edits[0], edit_of(lm, side_memory(lm))])


@torch.no_grad()
def test_a_module_without_its_replacements(build_lm: Callable[..., EditableLM]) -> None:
    lm = build_lm("llama", dtype=torch.float64)
    book = codebook(lm, PROMPTS[:1])
    clean = lm.logits([PROMPTS[0]])
    with without_replacements(lm, (1, "down")):
        assert torch.equal(lm.logits([PROMPTS[0]]), clean)
    with edit_of(lm, book).applied(lm):
        assert replacements_at(lm, (1, "down")) == [book]
        assert replacements_at(lm, (2, "down")) == []
        with without_replacements(lm, (1, "down")):
            assert torch.equal(lm.logits([PROMPTS[0]]), clean)
        assert not torch.equal(lm.logits([PROMPTS[0]]), clean)


@torch.no_grad()
def test_half_precision_rows_that_keep_their_output_keep_every_bit(build_lm: Callable[..., EditableLM]) -> None:
    lm = build_lm("llama", dtype=torch.bfloat16)
    clean = [lm.logits([prompt]) for prompt in PROMPTS[:2]]
    with edit_of(lm, codebook(lm, PROMPTS[:1])).applied(lm):
        assert torch.equal(lm.logits([PROMPTS[1]]), clean[1])
        assert not torch.equal(lm.logits([PROMPTS[0]]), clean[0])


def test_refusals(build_lm: Callable[..., EditableLM], tmp_path: Path) -> None:
    lm = build_lm("llama", dtype=torch.float64)
    before, book = state(lm), codebook(lm, PROMPTS[:1])
    with pytest.raises(HparamError, match=r"codebook of layer 1 decides for each prompt anew.*with mode 'hook'"):
        edit_of(lm, book).apply(lm, mode="merge")
    with pytest.raises(HparamError, match="which no weight can hold"):
        edit_of(lm, book).merge_into(lm)
    with pytest.raises(HparamError, match="which no weight can hold"):
        edit_of(lm, book).export_peft(tmp_path, lm, without_adapters=True)
    with pytest.raises(LayerError, match=r"the replacement of layer 1 is \(4, 48\), the weight there is \(32, 48\)"):
        edit_of(lm, Codebook(book.keys, torch.zeros(1, 4).double(), ("a",), (1.0,))).apply(lm)
    assert_clean(lm, before)
    other = codebook(lm, PROMPTS[1:2], extent="replace_all")
    with edit_of(lm, book).applied(lm):
        edited = lm.logits([PROMPTS[0]])
        with pytest.raises(HparamError, match="replace in one way, got replace_all and replace_last; make the edits"):
            edit_of(lm, other).apply(lm)
        assert torch.equal(lm.logits([PROMPTS[0]]), edited)
    assert_clean(lm, before)


@pytest.mark.parametrize("kind", ["replace_last", "side_memory"])
def test_a_resumed_forward_through_a_replacement_is_refused(build_lm: Callable[..., EditableLM], kind: str) -> None:
    lm = build_lm("llama", dtype=torch.float64)
    batch = lm.encode([PROMPTS[0]])
    at: list[list[Any]] = [[int(batch.lengths[0]) - 1]]
    with edit_of(lm, made_to_act(lm, kind)).applied(lm):
        # at or below the state's layer it is part of the state
        above = lm.suffix_state(batch, 1, [2])
        close(lm.resume(above, above.hidden, at=at), lm.logits(batch, at=at))
        below = lm.suffix_state(batch, 0, [2])
        with pytest.raises(LayerError, match="a resumed forward or a bare call of the model does not show; undo"):
            lm.resume(below, below.hidden, at=at)
        with pytest.raises(LayerError, match="undo that edit first"):
            lm.model(batch.input_ids)
