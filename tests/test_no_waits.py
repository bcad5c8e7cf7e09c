"""Loops hand their work to a device without waiting for it: what waits does so a fixed number of times.

Counted on a device that exists in name only, see `pretend_devices`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pretend_devices import FIRST, PretendDevices, Pretended, held, waits_of
from torch import Tensor

from rep_fast import ops
from rep_fast.collisions import scan
from rep_fast.editors import ValueHparams
from rep_fast.editors.keys import KeyReader, LookupRows
from rep_fast.editors.value import HIDDEN, optimise_values
from rep_fast.errors import NonFiniteError
from rep_fast.evaluation.scoring import Question, plan_scoring, run_scoring
from rep_fast.facts import Fact, MemoryText
from rep_fast.models import EditableLM, Site, transfer
from rep_fast.paths import score_nodes
from rep_fast.rep import RepHparams, training
from rep_fast.stats import SecondMoments, collecting

FACTS = [
    Fact("{} belongs to the continent of", "Slovenia", "Antarctica", "Europe"),
    Fact("{} is located in the city of", "The Eiffel Tower", "Los Angeles", "Paris"),
    Fact("{} plays the sport of", "Michael Jordan", "French", "basketball"),
]
TEMPLATES = ("{}", "Because of this, {}", "I think {}")


@pytest.fixture
def lm(build_lm: Any) -> EditableLM:
    return build_lm("llama")


@pytest.mark.parametrize("n_facts", [1, 3])
def test_steps_of_a_value(lm: EditableLM, n_facts: int) -> None:
    def run(steps: int) -> Callable[[], object]:
        hparams = ValueHparams(v_steps=steps, early_stop=None)
        groups = [(fact,) for fact in FACTS[:n_facts]]
        return lambda: optimise_values(lm, groups, layer=1, templates=TEMPLATES, hparams=hparams, sites=HIDDEN)

    short = waits_of(lm, run(2))
    assert waits_of(lm, run(7)) == short
    assert short == dict.fromkeys(short, 1)


def test_a_descent_learns_of_its_end_one_step_late(build_lm: Any) -> None:
    """And still gives what it gives on the CPU, where it learns at once; bit for bit in `test_value_descent`."""
    hparams = ValueHparams(v_steps=25, early_stop=6.57)
    options = {"layer": 1, "templates": TEMPLATES, "hparams": hparams}
    (expected,) = optimise_values(build_lm("llama", attention="eager"), [FACTS[:1]], **options)
    assert 2 < len(expected.losses) < 25
    lm, forwards = build_lm("llama", attention="eager"), []
    lm.head.register_forward_hook(lambda *_: forwards.append(1))
    found: list[Any] = []
    waits_of(lm, lambda: found.extend(optimise_values(lm, [FACTS[:1]], **options)))
    assert found[0].losses == pytest.approx(expected.losses, rel=1e-5)
    torch.testing.assert_close(held(found[0].deltas), expected.deltas, rtol=1e-4, atol=1e-4)
    assert len(forwards) == len(expected.losses) + 1


@pytest.mark.parametrize("objective", ["paper", "calibrated"])
def test_steps_of_an_adapter(objective: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    basis = torch.linalg.qr(random(16, 3)).Q
    rows = {"positives": random(9, 16), "bare": random(2, 16), "negatives": random(12, 16), "prompt_basis": basis}
    vectors = {"anchor": random(16), "response": random(16), "target": random(16)}
    weights = ops.AdapterWeights(random(2, 16), random(16, 2), random(8, 16), random(8), random(8), random(1))

    def waits(steps: int) -> dict[str, int]:
        hparams = RepHparams(objective=objective, steps=steps, batch=4, negative_batch=5, dropout=0.1)
        with PretendDevices() as devices:
            keys = training.CachedKeys(**{name: Pretended(own, FIRST) for name, own in (rows | vectors).items()})
            there = ops.AdapterWeights(*(Pretended(part, FIRST) for part in weights))
            training.fit(there, keys, hparams, seed=0)
        return devices.own_waits

    short = waits(2)
    assert waits(9) == short
    assert sum(short.values()) <= 1  # the losses


TEXT = MemoryText("facts", [f"{fact.text} {fact.target_true}. Text {n}." for n in range(8) for fact in FACTS])


def topk_on_device(
    keys: Tensor, queries: ops.ScanQueries, k: int, *, state: ops.TopK, first_id: int, **_: object
) -> ops.TopK:
    """In place of the op, whose body for a GPU reads nothing: the best of the state and the block, nothing excluded."""
    rows = queries.on(keys.device).double()
    scores = torch.cat([state.exact_scores, rows @ keys.double().T], dim=1)
    ids = torch.arange(first_id, first_id + len(keys), device=keys.device).expand(len(rows), -1)
    best = scores.topk(k, dim=1)
    found = torch.cat([state.ids, ids], dim=1).gather(1, best.indices)
    return ops.TopK(best.values, found, state.n_keys_seen + len(keys), 0, state.dropped_queries)


def test_blocks_of_a_scan(lm: EditableLM, monkeypatch: pytest.MonkeyPatch) -> None:
    moments = SecondMoments.collect(lm, TEXT, 1, tokens=200)
    monkeypatch.setattr(ops, "whitened_topk", topk_on_device)

    def run(tokens: int) -> Callable[[], object]:
        return lambda: scan(lm, FACTS, TEXT, moments, 1, top=3, tokens=tokens, block=16, rows=2)

    assert waits_of(lm, run(5 * 32)) == waits_of(lm, run(32))


class Inline:
    """A worker that works at once: dispatch modes belong to one thread."""

    def __init__(self, **_: object) -> None:
        pass

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, work: Callable[..., object], *given: object) -> Inline:
        work(*given)
        return self

    def result(self) -> None:
        pass


def test_blocks_of_second_moments(lm: EditableLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(collecting, "ThreadPoolExecutor", Inline)
    expected = SecondMoments.collect(lm, TEXT, [0, 1], tokens=300, block_tokens=40, cache_dir=tmp_path / "expected")
    found: list[SecondMoments] = []

    def run(tokens: int) -> Callable[[], object]:
        where = tmp_path / str(tokens)
        return lambda: found.append(
            SecondMoments.collect(lm, TEXT, [0, 1], tokens=tokens, block_tokens=40, cache_dir=where)
        )

    assert waits_of(lm, run(100)) == waits_of(lm, run(300))
    for layer in (0, 1):
        torch.testing.assert_close(found[-1].second_moment(layer), expected.second_moment(layer), rtol=1e-5, atol=1e-6)


def test_keys_that_are_not_finite_are_found_when_the_moments_are_read() -> None:
    keys = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
    keys[40, 4], keys[50, 0] = torch.nan, torch.inf
    kept = torch.isfinite(keys).all(dim=1)
    with PretendDevices() as devices:
        there = Pretended(keys, FIRST)
        total, refused = (ops.MomentSum.zeros(6, device=FIRST) for _ in range(2))
        for mask in (None, Pretended(torch.arange(60) > 40, FIRST)):
            ops.accumulate_moment(total, there, mask=mask, nonfinite="exclude")
            ops.accumulate_moment(refused, there, mask=mask)
        assert not devices.own_waits
        assert (total.count, total.n_nonfinite) == (58 + 18, 3)
        with pytest.raises(NonFiniteError, match="row 40; fix them"):
            refused.settle()
        assert sum(devices.own_waits.values()) == 2
        expected = ops.accumulate_moment(
            ops.accumulate_moment(ops.MomentSum.zeros(6), keys[kept]), keys[41:][kept[41:]]
        )
        torch.testing.assert_close(held(total.second_moment()), expected.second_moment(), rtol=1e-6, atol=1e-6)


def test_layers_of_a_trace(build_lm: Any) -> None:
    def waits(layers: int, score: str) -> dict[str, int]:
        lm = build_lm("llama", num_hidden_layers=layers)
        return waits_of(lm, lambda: score_nodes(lm, FACTS[0], score=score, k_node="up+gate"))

    for score in ("zabs", "l2", "gxw"):
        assert waits(5, score) == waits(2, score)


def test_layers_whose_signed_sums_vanish(build_lm: Any) -> None:
    """Behind a LayerNorm: every layer has to be looked at to tell."""

    def waits(layers: int) -> dict[str, int]:
        lm = build_lm("gpt2", n_layer=layers)
        with pytest.warns(UserWarning, match="rounding noise"):
            return waits_of(lm, lambda: score_nodes(lm, FACTS[0], score="sum"))

    assert waits(5) == waits(2)


def test_batches_of_questions(lm: EditableLM) -> None:
    questions = [Question(fact.text, fact.target_new) for fact in FACTS]

    n_batches: list[int] = []

    def run(budget: int) -> Callable[[], object]:
        def score() -> None:
            plan = plan_scoring(lm, questions, token_budget=budget)
            n_batches.append(len(plan.batches))
            run_scoring(lm, plan)

        return score

    assert waits_of(lm, run(1)) == waits_of(lm, run(1000))
    assert n_batches == [3, 1]


def test_layers_of_a_batch_of_keys(lm: EditableLM) -> None:
    rows = LookupRows.of(lm, FACTS, TEMPLATES)

    def run(layers: int) -> Callable[[], object]:
        def read() -> None:
            reader = KeyReader(lm, rows)
            for layer in range(layers):
                reader.read(layer, Site("hidden", 2))

        return read

    assert waits_of(lm, run(3)) == waits_of(lm, run(1))


def waiting() -> Iterator[tuple[str, Callable[[Tensor], object]]]:
    yield "item", lambda x: float(x.sum())
    yield "bool", lambda x: bool((x > 0).any())
    yield "tolist", lambda x: x.tolist()
    yield "cpu", lambda x: x.cpu()
    yield "nonzero", lambda x: x.nonzero()
    yield "mask", lambda x: x[x > 0]
    yield "indices of the host", lambda x: x[torch.tensor([0, 2])]
    yield "from the host", lambda x: torch.zeros(3).to(x.device)
    yield "a list", lambda x: torch.tensor([1.0], device=x.device)
    yield "repeat", lambda x: torch.repeat_interleave(x.long().abs())


@pytest.mark.parametrize(("name", "wait"), list(waiting()), ids=[name for name, _ in waiting()])
def test_a_wait_is_seen(name: str, wait: Callable[[Tensor], object]) -> None:
    with PretendDevices() as devices:
        x = Pretended(torch.tensor([1.0, -2.0, 3.0]), FIRST)
        wait(x)
    assert sum(devices.own_waits.values()) == 1


def test_what_does_not_wait_is_not_counted() -> None:
    with PretendDevices() as devices:
        x = Pretended(torch.tensor([1.0, -2.0, 3.0]), FIRST)
        y = torch.where(x > 0, x * 2, torch.zeros_like(x))[torch.arange(2, device=x.device)]
        y[0] = 5.0
        y = y + transfer.sent(torch.ones(2), x.device)
        assert held(y).tolist() == [6.0, 1.0]
    assert not devices.own_waits
