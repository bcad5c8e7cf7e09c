"""Applying and undoing: the formula, the ledger, and no trace afterwards."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from rep_fast.edits import Edit, KeyAdapter, LowRank, ModuleEdit, applying, undo_all
from rep_fast.errors import FingerprintError, HparamError, LayerError
from rep_fast.facts import Fact
from rep_fast.models import EditableLM

TEXT = "Slovenia belongs to the continent of"
FACT = Fact("{} belongs to the continent of", "Slovenia", "Antarctica", "Europe")
MODES = ("hook", "merge")


def random_module(lm: EditableLM, layer: int, seed: int, *, adapters: int = 1) -> ModuleEdit:
    """A delta of rank 2 and adapters whose gates open on about half of the keys."""
    generator = torch.Generator().manual_seed(100 * layer + seed)
    width = lm.key_width(layer)
    delta = LowRank(
        torch.randn(lm.hidden_size, 2, generator=generator, dtype=torch.float64),
        torch.randn(2, width, generator=generator, dtype=torch.float64) / width,
    )
    made = []
    for number in range(adapters):
        start = KeyAdapter.initial(width, rank=2, gate_hidden=3, seed=seed + number, dtype=torch.float64)
        b = torch.randn(width, 2, generator=generator, dtype=torch.float64)
        w2 = torch.randn(3, generator=generator, dtype=torch.float64) * 5
        weights = start.weights._replace(b=b, w2=w2, b2=torch.zeros(1, dtype=torch.float64))
        made.append(KeyAdapter(weights, tau=0.5))
    return ModuleEdit(layer, delta, tuple(made))


def random_edit(lm: EditableLM, layers: tuple[int, ...], seed: int, *, adapters: int = 1) -> Edit:
    modules = tuple(random_module(lm, layer, seed, adapters=adapters) for layer in layers)
    return Edit((FACT,), "random", {}, lm.fingerprint, modules, model_name=lm.name)


def state(lm: EditableLM) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}


def assert_clean(lm: EditableLM, before: dict[str, torch.Tensor]) -> None:
    assert lm.active_edits == []
    for name, tensor in lm.model.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)), name
    for module in lm.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def logits(lm: EditableLM) -> torch.Tensor:
    with torch.no_grad():
        return lm.logits([TEXT])


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_module_output_follows_the_formula(fresh_lm: EditableLM, mode: Any) -> None:
    lm = fresh_lm
    edit = random_edit(lm, (1,), 0, adapters=2)
    (module,) = edit.modules
    native = lm.keys([TEXT], 1)[1]
    expected = native
    for adapter in module.adapters:
        expected = adapter(expected)
    assert not torch.equal(expected, native)
    assert module.delta is not None
    bias = lm.down_bias(1)
    value = expected @ (lm.down_weight(1) + module.delta.to_dense()).T + (0 if bias is None else bias)
    with edit.applied(lm, mode), lm.capture([("value", 1)]) as seen, torch.no_grad():
        close(lm.keys([TEXT], 1)[1], expected)
        lm.logits([TEXT])
        close(seen["value", 1][0], value)


def test_hook_and_merge_agree(fresh_lm: EditableLM) -> None:
    edit = random_edit(fresh_lm, (0, 2), 0)
    clean = logits(fresh_lm)
    with edit.applied(fresh_lm, "hook"):
        hooked = logits(fresh_lm)
    with edit.applied(fresh_lm, "merge"):
        close(logits(fresh_lm), hooked)
    assert not torch.allclose(hooked, clean, atol=1e-3)


def test_an_edit_through_conv1d_is_the_edit_of_the_transposed_linear(build_lm: Callable[..., EditableLM]) -> None:
    conv, linear = (build_lm("gpt2", dtype=torch.float64) for _ in range(2))
    for layer in range(linear.n_layers):
        old = linear.down_proj(layer)
        new = nn.Linear(linear.key_width(layer), linear.hidden_size, dtype=torch.float64)
        with torch.no_grad():
            new.weight.copy_(old.weight.T)
            new.bias.copy_(old.bias)
        linear.blocks[layer].mlp.c_proj = new
    edit = random_edit(conv, (0, 1), 0)
    transposed = Edit(edit.facts, edit.method, {}, linear.fingerprint, edit.modules)
    for mode in MODES:
        with edit.applied(conv, mode), transposed.applied(linear, mode):
            close(logits(conv), logits(linear))
            close(conv.down_weight(0), linear.down_weight(0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_undo_in_any_order_leaves_no_trace(
    build_lm: Callable[..., EditableLM], dtype: torch.dtype, order: tuple[int, ...]
) -> None:
    lm = build_lm("gpt2", dtype=dtype)
    before, clean = state(lm), logits(lm)
    layers: list[tuple[int, ...]] = [(0, 1), (1,), (1, 2)]
    modes: list[Any] = ["merge", "hook", "merge"]
    handles = [random_edit(lm, layers[n], n).apply(lm, modes[n]) for n in range(3)]
    for number in order:
        handles[number].undo()
    assert_clean(lm, before)
    assert torch.equal(logits(lm), clean)


@pytest.mark.parametrize("mode", MODES)
def test_undoing_several_at_once_rebuilds_each_module_once(
    build_lm: Callable[..., EditableLM], monkeypatch: pytest.MonkeyPatch, mode: Any
) -> None:
    lm, other = build_lm("llama", dtype=torch.bfloat16), build_lm("gpt2")
    before, other_before = state(lm), state(other)
    stays = random_edit(lm, (1,), 9)
    with stays.applied(lm, mode):
        alone, alone_state = logits(lm), state(lm)
    gone = random_edit(lm, (0,), 8).apply(lm, mode)
    gone.undo()
    handles = [random_edit(lm, (0, 1), n).apply(lm, mode) for n in range(2)]
    kept = stays.apply(lm, mode)
    handles.append(random_edit(lm, (1, 2), 3).apply(lm, mode))
    elsewhere = random_edit(other, (1,), 4).apply(other, mode)
    rebuilt: list[tuple[int, str]] = []
    hold = applying.PatchedModule.hold
    monkeypatch.setattr(
        applying.PatchedModule, "hold", lambda self, **parts: (rebuilt.append(self._place), hold(self, **parts))
    )
    undo_all([gone, handles[2], handles[0], elsewhere, handles[1], handles[0]])
    assert sorted(rebuilt) == [(0, "down"), (1, "down"), (1, "down"), (2, "down")]  # one of them the other model's
    assert lm.active_edits == [kept]
    assert torch.equal(logits(lm), alone)
    assert all(torch.equal(tensor, alone_state[name]) for name, tensor in state(lm).items())
    undo_all([kept])
    assert_clean(lm, before)
    assert_clean(other, other_before)


@pytest.mark.parametrize("mode", MODES)
def test_what_stays_is_as_if_the_undone_had_never_been(build_lm: Callable[..., EditableLM], mode: Any) -> None:
    lm = build_lm("llama", dtype=torch.bfloat16)
    one, two = random_edit(lm, (0, 1), 0), random_edit(lm, (1,), 1)
    with two.applied(lm, mode):
        alone = logits(lm)
    with one.applied(lm, mode):
        handle = two.apply(lm, mode)
    assert torch.equal(logits(lm), alone)
    handle.undo()


@pytest.mark.parametrize("mode", MODES)
def test_stacked_deltas_add_up_and_adapters_run_in_edit_order(fresh_lm: EditableLM, mode: Any) -> None:
    lm = fresh_lm
    one, two = random_edit(lm, (1,), 0), random_edit(lm, (1,), 1)
    first, second = one.modules[0], two.modules[0]
    assert first.delta is not None
    assert second.delta is not None
    joined = ModuleEdit(1, first.delta + second.delta, (*first.adapters, *second.adapters))
    with Edit((), "both", {}, lm.fingerprint, (joined,)).applied(lm, mode):
        expected = logits(lm)
    with one.applied(lm, mode), two.applied(lm, mode):
        close(logits(lm), expected)


def test_the_parameter_stays_the_same_object_in_the_same_memory(build_lm: Callable[..., EditableLM]) -> None:
    lm = build_lm("gpt2")
    weight = lm.down_proj(1).weight
    address = weight.data_ptr()
    with random_edit(lm, (1,), 0).applied(lm, "merge"):
        assert lm.down_proj(1).weight is weight
    assert weight.data_ptr() == address


def test_the_same_edit_twice_counts_twice(fresh_lm: EditableLM) -> None:
    edit = random_edit(fresh_lm, (1,), 0, adapters=0)
    with edit.applied(fresh_lm, "merge"), edit.applied(fresh_lm, "merge"):
        assert edit.modules[0].delta is not None
        twice = fresh_lm.down_weight(1).clone()
    close(twice - fresh_lm.down_weight(1), 2 * edit.modules[0].delta.to_dense())


def test_undoing_twice_is_undoing_once(fresh_lm: EditableLM) -> None:
    before = state(fresh_lm)
    one, two = random_edit(fresh_lm, (1,), 0), random_edit(fresh_lm, (1,), 1)
    first, second = one.apply(fresh_lm), two.apply(fresh_lm)
    first.undo()
    assert (first.is_active, second.is_active) == (False, True)
    first.undo()
    assert fresh_lm.active_edits == [second]
    with second:
        pass
    assert_clean(fresh_lm, before)


@pytest.mark.parametrize("mode", MODES)
def test_an_exception_inside_takes_the_edit_out(fresh_lm: EditableLM, mode: Any) -> None:
    before = state(fresh_lm)

    def fail() -> None:
        with random_edit(fresh_lm, (0, 1), 0).applied(fresh_lm, mode):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert_clean(fresh_lm, before)


def test_half_applied_edits_are_taken_back(
    build_lm: Callable[..., EditableLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = build_lm("llama")
    before, whole = state(lm), lm.linear_weight

    def quantised(layer: int, name: str) -> torch.Tensor:
        if layer == 2:
            raise LayerError("stored as int8")
        return whole(layer, name)

    monkeypatch.setattr(lm, "linear_weight", quantised)
    edit = random_edit(lm, (0, 2), 0)
    with pytest.raises(LayerError, match="stored as int8"):
        edit.apply(lm, "merge")
    assert_clean(lm, before)
    with edit.applied(lm, "hook"):  # beside such a weight the hook still works
        assert len(lm.active_edits) == 1
    assert_clean(lm, before)


def test_a_shut_gate_and_no_delta_change_no_bit(build_lm: Callable[..., EditableLM]) -> None:
    lm = build_lm("llama", dtype=torch.bfloat16)
    clean = logits(lm)
    shut = KeyAdapter(random_module(lm, 1, 0).adapters[0].weights, tau=1.0)
    with Edit((FACT,), "rep", {}, lm.fingerprint, (ModuleEdit(1, None, (shut,)),)).applied(lm):
        assert torch.equal(logits(lm), clean)


def test_the_hook_term_is_added_in_float32(build_lm: Callable[..., EditableLM]) -> None:
    lm = build_lm("llama", dtype=torch.bfloat16)
    edit = random_edit(lm, (1,), 0, adapters=0)
    delta = edit.modules[0].delta
    assert delta is not None
    keys = lm.keys([TEXT], 1)[1]
    with lm.capture([("value", 1)]) as clean:
        logits(lm)
    with edit.applied(lm), lm.capture([("value", 1)]) as edited:
        logits(lm)
    wide = clean["value", 1][0].double() + keys.double() @ delta.to_dense().T
    # one rounding to bfloat16 (relative 2⁻⁸) of a sum whose float32 error is far below that
    assert bool(((edited["value", 1][0].double() - wide).abs() <= 2**-8 * wide.abs() + 1e-6).all())


def test_generation_goes_through_the_edit(build_lm: Callable[..., EditableLM]) -> None:
    lm = build_lm("llama")
    plain = lm.generate(TEXT, max_new_tokens=8)
    with random_edit(lm, (0, 1, 2), 0).applied(lm):
        hooked = lm.generate(TEXT, max_new_tokens=8)
    assert hooked != plain
    assert lm.generate(TEXT, max_new_tokens=8) == plain


def test_gradients_flow_through_hooked_edits(fresh_lm: EditableLM) -> None:
    lm = fresh_lm
    edit = random_edit(lm, (1,), 0)

    def loss(shift: torch.Tensor) -> torch.Tensor:
        with edit.applied(lm), lm.patch(("mlp_in", 1), lambda hidden: hidden + shift):
            return lm.logits([TEXT]).square().mean()

    shift = torch.zeros(lm.hidden_size, dtype=torch.float64, requires_grad=True)
    loss(shift).backward()
    assert shift.grad is not None
    step = 1e-6
    direction = torch.randn(lm.hidden_size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        slope = (loss(step * direction) - loss(-step * direction)) / (2 * step)
    assert float(shift.grad @ direction) == pytest.approx(float(slope), rel=1e-5)


def test_an_edit_of_another_model_is_refused_by_name(build_lm: Callable[..., EditableLM]) -> None:
    lm, other = build_lm("llama"), build_lm("llama", seed=1)
    edit = random_edit(lm, (1,), 0)
    with pytest.raises(
        FingerprintError, match=rf"made for {lm.name} \({lm.fingerprint[:12]}.*{other.fingerprint[:12]}"
    ):
        edit.apply(other)
    assert other.active_edits == []


def test_an_unknown_mode(build_lm: Callable[..., EditableLM]) -> None:
    lm = build_lm("llama")
    with pytest.raises(HparamError, match="mode 'glue' is unknown; use 'hook' or 'merge'"):
        random_edit(lm, (1,), 0).apply(lm, "glue")  # type: ignore[arg-type]


def test_a_layer_outside_the_model(build_lm: Callable[..., EditableLM]) -> None:
    lm = build_lm("llama")
    module = ModuleEdit(7, random_module(lm, 1, 0).delta)
    with pytest.raises(LayerError, match="layer 7"):
        Edit((FACT,), "x", {}, lm.fingerprint, (module,)).apply(lm)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            ModuleEdit(1, LowRank(torch.zeros(32, 1), torch.zeros(1, 47))),
            r"is \(32, 47\), the weight there is \(32, 48\)",
        ),
        (ModuleEdit(1, None, (KeyAdapter.initial(47),)), "takes keys of 47, not 48"),
    ],
)
def test_modules_that_do_not_fit(build_lm: Callable[..., EditableLM], module: ModuleEdit, message: str) -> None:
    lm = build_lm("llama")
    with pytest.raises(LayerError, match=message):
        Edit((FACT,), "x", {}, lm.fingerprint, (module,)).apply(lm)
