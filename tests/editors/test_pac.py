"""Path editing against a literal one: whole weights, whole gradients, masks and torch's Adam; and what it refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rep_fast import editors
from rep_fast.editors import PacHparams, pac
from rep_fast.editors.pac_contrast import contrasts_of
from rep_fast.editors.pac_slices import Place
from rep_fast.edits import Edit, Slices
from rep_fast.errors import HparamError, LayerError, NothingToEditError
from rep_fast.facts import Fact
from rep_fast.models import Answer, EditableLM
from rep_fast.paths import NodeSet, score_nodes, select

FACTS = [
    Fact("{} belongs to the continent of", "Slovenia", "Antarctica", "Europe"),
    Fact("The {} is located in the city of", "Eiffel Tower", "Los Angeles", "Paris"),
    Fact("The mother tongue of {} is", "Danielle Darrieux", "Korean", "French"),
]
JOINT = PacHparams(pac_lr=0.02, pac_epochs=3, top=3, trace_scope="dataset", pac_batch=2, retrace=1, early_stop=None)
ONE = PacHparams(pac_lr=0.02, pac_epochs=4, top=4, early_stop=None)


class Literal:
    """The definition: every up-, gate- and down-weight trained in place, gradients masked to the chosen nodes."""

    def __init__(self, lm: EditableLM, facts: Sequence[Fact], hparams: PacHparams, seed: int) -> None:
        self.lm, self.facts, self.hparams = lm, facts, hparams
        self.linears = (*hparams.k_node.split("+"), "down")
        self.places: list[Place] = [(layer, name) for layer in range(lm.n_layers) for name in self.linears]
        self.before = {place: lm.linear_weight(*place).detach().clone() for place in self.places}
        self.contrasts = contrasts_of(lm, facts, kept=hparams.kept, target_tok=hparams.target_tok)
        self.generator = torch.Generator().manual_seed(seed)
        self.dense = torch.optim.Adam([lm.linear(*place).weight for place in self.places], lr=hparams.pac_lr)
        self.chosen_nodes: list[NodeSet] = []

    def run(self) -> dict[Place, torch.Tensor]:
        """ΔW of every module."""
        hparams, n = self.hparams, len(self.facts)
        batches = [range(b, min(b + hparams.pac_batch, n)) for b in range(0, n, hparams.pac_batch)]
        for epoch in range(hparams.pac_epochs):
            if epoch == 0 or (hparams.retrace and epoch % hparams.retrace == 0):
                self.select()
            for number in torch.randperm(len(batches), generator=self.generator).tolist():
                own = [self.contrasts[fact] for fact in batches[number]]
                self.step([c.wanted for c in own], self.chosen.positive, 1.0, self.positive)
                self.step([c.kept for c in own], self.chosen.negative, hparams.pac_lambda, self.negative)
        return {place: self.lm.linear_weight(*place).detach() - self.before[place] for place in self.places}

    def select(self) -> None:
        hparams = self.hparams
        self.lm.model.requires_grad_(False)
        scores = score_nodes(self.lm, self.facts, score=hparams.score, k_node=hparams.k_node)
        self.chosen = select(scores, top=hparams.top, bottom=hparams.bottom, mode=hparams.select)
        self.chosen_nodes.append(self.chosen.positive)
        self.lm.model.requires_grad_(True)
        self.positive, self.negative = self.rows_adam(self.chosen.positive), self.rows_adam(self.chosen.negative)

    def nodes_of(self, nodes: NodeSet, place: Place) -> list[int]:
        return list((nodes.value if place[1] == "down" else nodes.key)[place[0]])

    def rows_adam(self, nodes: NodeSet) -> torch.optim.Adam:
        rows = [self.rows(self.lm.linear_weight(*place), nodes, place).detach().clone() for place in self.places]
        return torch.optim.Adam(rows, lr=self.hparams.pac_lr)

    def rows(self, matrix: torch.Tensor, nodes: NodeSet, place: Place) -> torch.Tensor:
        own = self.nodes_of(nodes, place)
        return matrix[:, own] if place[1] == "down" else matrix[own]

    def step(self, answers: list[Answer], nodes: NodeSet, weight: float, rows_adam: torch.optim.Adam) -> None:
        self.lm.model.zero_grad()
        losses = []
        for answer in answers:  # one row at a time: nothing padded, nothing shared
            logits = self.lm.logits([list(answer.input_ids)], at=[list(answer.positions)])
            losses.append(-logits.log_softmax(-1)[range(answer.n_targets), list(answer.target_ids)].mean())
        (weight * torch.stack(losses).mean()).backward()
        with torch.no_grad():
            if self.hparams.adam_state == "dense_parity":
                for place in self.places:
                    module = self.lm.linear(*place)
                    mask = torch.zeros_like(self.lm.linear_weight(*place))
                    self.rows_view(mask, nodes, place, 1.0)
                    module.weight.grad *= mask if module.weight.shape == mask.shape else mask.T
                self.dense.step()
                return
            for place, rows in zip(self.places, rows_adam.param_groups[0]["params"], strict=True):
                weight_view, module = self.lm.linear_weight(*place), self.lm.linear(*place)
                gradient = module.weight.grad if module.weight.shape == weight_view.shape else module.weight.grad.T
                rows.grad = self.rows(gradient, nodes, place).clone()
            rows_adam.step()
            for place, rows in zip(self.places, rows_adam.param_groups[0]["params"], strict=True):
                self.rows_view(self.lm.linear_weight(*place), nodes, place, rows)

    def rows_view(self, matrix: torch.Tensor, nodes: NodeSet, place: Place, value: Any) -> None:
        own = self.nodes_of(nodes, place)
        if place[1] == "down":
            matrix[:, own] = value
        else:
            matrix[own] = value


def check_equal(edit: Edit, expected: dict[Place, torch.Tensor]) -> None:
    assert {module.place for module in edit.modules} == set(expected)
    for module in edit.modules:
        assert isinstance(module.delta, Slices)
        wanted = expected[module.place]
        assert float((module.delta.to_dense() - wanted).abs().max()) <= 1e-9 * float(wanted.abs().max())


@pytest.mark.parametrize("adam_state", ["slices", "dense_parity"])
@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("llama", {"k_node": "up+gate"}), ("gptj", {}), ("gpt2", {"select": "kbest", "score": "l2"})],
)
def test_joint_epochs_equal_the_literal_method(
    build_lm: Any, family: str, changes: dict[str, Any], adam_state: Any
) -> None:
    """Two steps per batch, one trace over all facts repeated on the edited weights, Adam in either form."""
    hparams = dataclasses.replace(JOINT, adam_state=adam_state, **changes)
    edit = pac(build_lm(family, dtype=torch.float64), FACTS, hparams=hparams, seed=3)
    literal = Literal(build_lm(family, dtype=torch.float64), FACTS, hparams, seed=3)
    check_equal(edit, literal.run())
    # the test says something only if the nodes change on the way
    assert literal.chosen_nodes[0] != literal.chosen_nodes[-1]


def test_momentum_moves_rows_selected_earlier(build_lm: Any) -> None:
    """Where the two ways to keep Adam's state differ: dense Adam goes on moving what is no longer selected."""
    kinds = ("slices", "dense_parity")
    sliced, dense = (
        pac(build_lm("llama"), FACTS, hparams=dataclasses.replace(JOINT, adam_state=kind)) for kind in kinds
    )
    assert not torch.allclose(sliced.module(1).delta.to_dense(), dense.module(1).delta.to_dense(), atol=1e-4)


@pytest.mark.parametrize("select_mode", ["per_list", "kbest"])
def test_the_nodes_are_those_of_select(tiny_llama64: EditableLM, select_mode: str) -> None:
    hparams = dataclasses.replace(ONE, select=select_mode, layers=(0, 2), bottom=2)
    edit = pac(tiny_llama64, FACTS[:1], hparams=hparams)
    scores = score_nodes(tiny_llama64, FACTS[0]).at((0, 2))
    chosen = select(scores, top=4, bottom=2, mode=select_mode)
    assert edit.layers == (0, 2)
    for number, layer in enumerate((0, 2)):
        key = {*chosen.positive.key[number], *chosen.negative.key[number]}
        value = {*chosen.positive.value[number], *chosen.negative.value[number]}
        assert edit.module(layer, "up").delta.index.tolist() == sorted(key)
        assert edit.module(layer, "down").delta.index.tolist() == sorted(value)


def test_the_first_step_has_the_sizes_of_the_rates(tiny_llama64: EditableLM) -> None:
    """Adam's first step is lr·sign of the gradient; layer weights scale it by the layer's share and keep the mean."""
    hparams = dataclasses.replace(ONE, pac_epochs=1, pac_lambda=0.0)
    plain = pac(tiny_llama64, FACTS[:1], hparams=hparams)
    weighted = pac(tiny_llama64, FACTS[:1], hparams=dataclasses.replace(hparams, layer_weighted=True, score="l2"))
    sizes = []
    for layer in range(3):
        moved = plain.module(layer).delta.values
        assert float(moved.abs().max()) == pytest.approx(hparams.pac_lr, rel=1e-3)
        sizes.append(float(weighted.module(layer).delta.values.abs().max()))
    scores = score_nodes(tiny_llama64, FACTS[0], score="l2")
    nodes = select(scores, top=4).positive
    sums = [
        float(scores.key[layer, list(nodes.key[layer])].sum() + scores.value[layer, list(nodes.value[layer])].sum())
        for layer in range(3)
    ]
    assert sizes == pytest.approx([3 * hparams.pac_lr * own / sum(sums) for own in sums], rel=1e-3)


def test_the_size_of_the_negative_weight_does_not_matter(tiny_llama64: EditableLM) -> None:
    """Adam divides the scale of a loss out again (up to its ε); only leaving the negative step out changes anything."""
    small, large, none = (
        pac(tiny_llama64, FACTS[:1], hparams=dataclasses.replace(ONE, pac_lambda=weight)).module(1).delta
        for weight in (0.1, 1.0, 0.0)
    )
    torch.testing.assert_close(small.values, large.values, rtol=1e-3, atol=1e-6)
    assert len(none.index) == len(small.index)
    assert int((none.values == 0).all(dim=0).sum()) == 1


def test_training_lowers_the_loss_and_stops_when_it_is_low(build_lm: Any) -> None:
    lm = build_lm("llama")
    # a random model's head cannot say anything with certainty: its NLL ends near 1.6
    hparams = PacHparams(pac_lr=0.01, pac_epochs=50, top=8, early_stop=2.0)
    edit = pac(lm, FACTS[:1], hparams=hparams)
    assert edit.notes["updates"] == edit.notes["epochs"] - 1 < 49
    assert edit.notes["nll_last"][0] < 2.0 < edit.notes["nll_first"][0]
    answer = lm.answer(FACTS[0].text, FACTS[0].target_new)
    with edit.applied(lm):
        best = lm.logits([answer.input_ids], at=[answer.positions]).argmax(-1)
        assert tuple(best.tolist()) == answer.target_ids
        # of two facts, the one that holds is left alone
        both = pac(lm, FACTS[:2], hparams=dataclasses.replace(hparams, pac_epochs=1))
        assert both.notes["updates"] == 1
        with pytest.raises(NothingToEditError, match="already answers 'Slovenia belongs"):
            pac(lm, FACTS[:1], hparams=hparams)


@pytest.mark.parametrize("scope", ["dataset", "batch", "edit"])
def test_a_seed_gives_one_edit(build_lm: Any, scope: str) -> None:
    hparams = dataclasses.replace(JOINT, trace_scope=scope, pac_batch=1)
    first, again, other = (pac(build_lm("gpt2"), FACTS, hparams=hparams, seed=seed) for seed in (5, 5, 6))
    for module in first.modules:
        assert torch.equal(module.delta.values, again.module(*module.place).delta.values)
    assert any(
        module.delta.values.shape != other.module(*module.place).delta.values.shape
        or not torch.equal(module.delta.values, other.module(*module.place).delta.values)
        for module in first.modules
    )


@pytest.mark.parametrize("mode", ["hook", "merge"])
@pytest.mark.parametrize("family", ["llama", "gptj", "gpt2"])
def test_edits_come_and_go_without_a_trace(build_lm: Any, tmp_path: Path, family: str, mode: Any) -> None:
    lm = build_lm(family, dtype=torch.bfloat16)
    flags = [weight.requires_grad for weight in lm.model.parameters()]
    before = {name: weight.clone() for name, weight in lm.model.state_dict().items()}
    first = pac(lm, FACTS[:1], hparams=ONE)
    first.save(tmp_path / "edit.safetensors")
    loaded = Edit.load(tmp_path / "edit.safetensors", lm)
    assert loaded.hparams["top"] == 4
    with loaded.applied(lm, mode):
        # the next edit is made on the edited model, without roll-back
        second = pac(lm, FACTS[1:2], hparams=ONE)
        with second.applied(lm, mode):
            assert len(lm.active_edits) == 2
    assert all(torch.equal(weight, before[name]) for name, weight in lm.model.state_dict().items())
    assert [weight.requires_grad for weight in lm.model.parameters()] == flags
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules())


@pytest.mark.parametrize("kept", ["teacher_forced", "free"])
def test_the_kept_answer_is_the_unedited_models(tiny_llama64: EditableLM, kept: str) -> None:
    lm = tiny_llama64
    for contrast in contrasts_of(lm, FACTS, kept=kept, target_tok="in_context"):
        logits = lm.logits([contrast.kept.input_ids], at=[contrast.kept.positions])
        assert tuple(logits.argmax(-1).tolist()) == contrast.kept.target_ids
        fed = contrast.wanted.input_ids if kept == "teacher_forced" else (
            *contrast.wanted.prompt_ids, *contrast.kept.target_ids[:-1]
        )  # fmt: skip
        assert contrast.kept.input_ids == fed


def test_refusals(tiny_llama: EditableLM, tiny_gpt2: EditableLM) -> None:
    with pytest.raises(HparamError, match="no facts to edit"):
        pac(tiny_llama, [], hparams=ONE)
    with pytest.raises(LayerError, match="layer 7 lies outside"):
        pac(tiny_llama, FACTS, hparams=dataclasses.replace(ONE, layers=(0, 7)))
    with pytest.raises(HparamError, match="top=49 is out of range; choose 1 to 48"):
        pac(tiny_llama, FACTS, hparams=dataclasses.replace(ONE, top=49))
    with pytest.raises(HparamError, match="needs a gated MLP"):
        pac(tiny_gpt2, FACTS, hparams=dataclasses.replace(ONE, k_node="up+gate"))


def test_presets_choose_the_variant(tiny_llama: EditableLM) -> None:
    editor = editors.get("pac")
    plain, official, paper = (
        editor.hparams(tiny_llama, preset=name) for name in ("default", "pac-official", "pac-paper")
    )
    assert (plain.trace_scope, plain.layers, plain.retrace) == ("edit", (), None)
    assert (official.trace_scope, official.retrace, official.pac_epochs, official.pac_batch) == ("dataset", 2, 12, 2)
    assert (official.pac_lr, official.adam_state, official.early_stop) == (1e-5, "dense_parity", None)
    assert (paper.score, paper.select, paper.trace_scope, paper.top) == ("sum", "kbest", "edit", 15)
    shorter = editor.hparams(tiny_llama, preset="pac-official", overrides={"pac_epochs": 1, "layers": "0,2"})
    edit = editor(tiny_llama, FACTS, hparams=shorter, seed=1)
    assert edit.layers == (0, 2)
    assert edit.facts == tuple(FACTS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": "zscore"}, "score='zscore' is unknown; choose one of sum"),
        ({"select": "best"}, "select='best' is unknown"),
        ({"k_node": "down"}, "k_node='down' is unknown"),
        ({"trace_scope": "all"}, "trace_scope='all' is unknown"),
        ({"pac_epochs": 0}, "pac_epochs=0 is out of range"),
        ({"retrace": 0}, "retrace=0 is out of range"),
        ({"pac_lr": 0.0}, "pac_lr=0.0 must be above 0"),
        ({"pac_lambda": -1.0}, "pac_lambda=-1.0 not below it"),
        ({"pac_batch": 2}, "trace_scope='edit' gives each fact its own nodes; use pac_batch=1, not 2"),
    ],
)
def test_settings_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(HparamError, match=message):
        dataclasses.replace(ONE, **changes)
