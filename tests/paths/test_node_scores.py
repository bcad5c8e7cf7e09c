from __future__ import annotations

import warnings

import pytest
import torch

from rep_fast.edits import Dense, Edit, ModuleEdit
from rep_fast.errors import HparamError, PromptError
from rep_fast.facts import Fact
from rep_fast.paths import score_nodes, trace_answers
from rep_fast.reference import packed_scores as reference

FACTS = [
    Fact("{} belongs to the continent of", "Slovenia", "Antarctica", "Europe"),
    Fact("The mother tongue of {} is", "Danielle Darrieux", "Korean", "French"),
    Fact("The {} is located in the city of", "Eiffel Tower", "Los Angeles", "Paris"),
]
SCORES = ("sum", "abs_sum", "l2", "gxw", "zabs")


def weight_gradients(lm, facts, target="new"):
    """Full gradients by autograd of the summed NLL: layer → {"up"|"gate": [D, M], "down": [M, D]} with the weights."""
    model = lm.model
    model.requires_grad_(True)
    try:
        loss = 0.0
        for fact in facts:
            answer = lm.answer(fact.text, fact.target_new if target == "new" else fact.target_true)
            logits = lm.logits([list(answer.input_ids)], at=[list(answer.positions)])
            loss = loss - logits.log_softmax(-1)[range(len(answer.target_ids)), list(answer.target_ids)].mean()
        model.zero_grad()
        loss.backward()
        found = []
        for layer in range(lm.n_layers):
            own = {}
            for name, path in (("up", lm.layout.up), ("gate", lm.layout.gate), ("down", lm.layout.down)):
                if path is None:
                    continue
                module = lm.blocks[layer].get_submodule(path)
                transposed = isinstance(module, torch.nn.Linear)  # Linear stores out × in, Conv1D in × out
                weight, gradient = module.weight.detach(), module.weight.grad
                own[name] = (weight.T.clone(), gradient.T.clone()) if transposed else (weight.clone(), gradient.clone())
            found.append(own)
        return found
    finally:
        model.zero_grad(set_to_none=True)
        model.requires_grad_(False)


def scores_of(weight, gradient, score):
    """(columns, rows) by definition, from the gradient itself."""
    identity = torch.eye(gradient.shape[0], dtype=gradient.dtype)
    return reference.packed_scores(identity, gradient, score=score, weight=weight)


def assert_close(ours, expected, *, scale=None):
    scale = float(expected.abs().max() if scale is None else scale)
    assert scale > 0
    assert float((ours - expected).abs().max()) <= 1e-9 * scale


@pytest.mark.parametrize("score", SCORES)
def test_scores_equal_those_of_the_full_weight_gradient(tiny_lm64, score):
    """T-pack-*: every family, plain and gated, Linear and Conv1D, with and without biases."""
    lm = tiny_lm64
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the signed sums of models with LayerNorm, tested below
        ours = score_nodes(lm, FACTS[2], score=score)
    assert ours.key.shape == ours.value.shape == (lm.n_layers, lm.key_width(0))
    for layer, own in enumerate(weight_gradients(lm, FACTS[2:])):
        assert_close(ours.key[layer], scores_of(*own["up"], score)[0])
        # relative to what is summed: behind a LayerNorm the signed sums of value-nodes cancel to zero
        scale = own["down"][1].abs().sum(1).max() if score in ("sum", "abs_sum") else None
        assert_close(ours.value[layer], scores_of(*own["down"], score)[1], scale=scale)


@pytest.mark.parametrize("score", ["sum", "abs_sum"])
def test_signed_sums_behind_a_layer_norm_are_warned_of(tiny_gpt2, tiny_llama, score):
    with pytest.warns(UserWarning, match="rounding noise"):
        score_nodes(tiny_gpt2, FACTS[0], score=score)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score_nodes(tiny_llama, FACTS[0], score=score)
        score_nodes(tiny_gpt2, FACTS[0], score="gxw")


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("k_node", ["gate", "up+gate"])
def test_gate_columns(tiny_llama64, score, k_node):
    ours = score_nodes(tiny_llama64, FACTS[0], score=score, k_node=k_node)
    for layer, own in enumerate(weight_gradients(tiny_llama64, FACTS[:1])):
        expected = scores_of(*own["gate"], score)[0]
        if k_node == "up+gate":
            expected = expected + scores_of(*own["up"], score)[0]
        assert_close(ours.key[layer], expected)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("token_budget", [1, 4096])
def test_several_facts_are_one_gradient(tiny_llama64, score, token_budget):
    """Concatenated tokens are exact because G = Σ xᵀg; passes of one fact and of all give the same."""
    ours = score_nodes(tiny_llama64, FACTS, score=score, token_budget=token_budget)
    for layer, own in enumerate(weight_gradients(tiny_llama64, FACTS)):
        assert_close(ours.key[layer], scores_of(*own["up"], score)[0])
        assert_close(ours.value[layer], scores_of(*own["down"], score)[1])
    assert len(ours.nll) == 3


def test_bias_of_a_gated_mlp_is_taken_out_of_the_products(build_lm):
    """gxw needs x·W without the bias; LLaMA models may have MLP biases."""
    lm = build_lm("llama", dtype=torch.float64, mlp_bias=True)
    ours = score_nodes(lm, FACTS[0], score="gxw", k_node="up+gate")
    for layer, own in enumerate(weight_gradients(lm, FACTS[:1])):
        assert_close(ours.key[layer], scores_of(*own["gate"], "gxw")[0] + scores_of(*own["up"], "gxw")[0])


def test_gated_upstream_gradients_follow_the_formula(tiny_llama64):
    """g_up = g_k ⊙ silu(y_gate), g_gate = g_k ⊙ y_up ⊙ silu'(y_gate)."""
    lm = tiny_llama64
    trace = trace_answers(lm, [lm.answer(FACTS[0].text, FACTS[0].target_new)], gate=True, products=True)
    for up, gate, down in zip(trace.up, trace.gate, trace.down, strict=True):
        sigmoid = gate.output.sigmoid()
        slope = sigmoid * (1 + gate.output * (1 - sigmoid))
        assert_close(up.g, down.input_gradient * gate.output * sigmoid)
        assert_close(gate.g, down.input_gradient * up.output * slope)


def test_target_true_traces_the_other_answer(tiny_llama64):
    ours = score_nodes(tiny_llama64, FACTS[0], score="sum", target="true")
    own = weight_gradients(tiny_llama64, FACTS[:1], target="true")[1]
    assert_close(ours.value[1], scores_of(*own["down"], "sum")[1])


def test_nll_is_the_mean_over_target_tokens(tiny_llama64):
    lm = tiny_llama64
    answer = lm.answer(FACTS[2].text, FACTS[2].target_new)
    with torch.no_grad():
        logits = lm.logits([list(answer.input_ids)], at=[list(answer.positions)])
    expected = -logits.log_softmax(-1)[range(len(answer.target_ids)), list(answer.target_ids)].mean()
    assert score_nodes(lm, FACTS[2]).nll == (pytest.approx(float(expected), rel=1e-12),)


@pytest.mark.parametrize("weights_require_grad", [False, True])
def test_no_weight_gradient_is_ever_allocated(family, build_lm, shapes_seen, weights_require_grad):
    lm = build_lm(family)
    lm.model.requires_grad_(weights_require_grad)
    answer = lm.answer(FACTS[0].text, FACTS[0].target_new)
    with shapes_seen() as seen:
        trace_answers(lm, [answer], gate=lm.has_gate, products=True)
    d, m = lm.hidden_size, lm.key_width(0)
    assert all(parameter.grad is None for parameter in lm.model.parameters())
    assert not {(d, m), (m, d)} & seen.shapes
    assert any(shape[-1:] == (m,) for shape in seen.shapes)


def test_dispatch_spy_sees_weight_gradients(build_lm, shapes_seen):
    """The test above can fail: an ordinary backward pass does allocate them."""
    lm = build_lm("llama")
    lm.model.requires_grad_(True)
    with shapes_seen() as seen:
        lm.logits([[1, 2, 3]]).sum().backward()
    assert {(lm.hidden_size, lm.key_width(0)), (lm.key_width(0), lm.hidden_size)} & seen.shapes


def test_model_is_left_as_it_was(build_lm):
    lm = build_lm("gpt2")
    flags = [parameter.requires_grad for parameter in lm.model.parameters()]
    score_nodes(lm, FACTS[0])
    assert [parameter.requires_grad for parameter in lm.model.parameters()] == flags
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules())


def test_tracing_works_inside_no_grad(tiny_llama64):
    with torch.no_grad():
        inside = score_nodes(tiny_llama64, FACTS[0])
    assert torch.equal(inside.key, score_nodes(tiny_llama64, FACTS[0]).key)


def test_half_precision_models_are_scored(build_lm):
    lm = build_lm("llama", dtype=torch.bfloat16)
    scores = score_nodes(lm, FACTS[0])
    assert scores.key.dtype == scores.value.dtype == torch.float64
    assert bool(torch.isfinite(scores.key).all())


def test_lists_alternate_key_and_value(tiny_llama):
    scores = score_nodes(tiny_llama, FACTS[0])
    lists = scores.lists()
    assert len(lists) == 2 * tiny_llama.n_layers
    assert torch.equal(lists[2], scores.key[1])
    assert torch.equal(lists[3], scores.value[1])


def test_options_are_checked(tiny_llama, tiny_gpt2):
    for options, match in (
        ({"score": "zscore"}, "score='zscore'"),
        ({"k_node": "down"}, "k_node='down'"),
        ({"target": "old"}, "target='old'"),
    ):
        with pytest.raises(HparamError, match=match):
            score_nodes(tiny_llama, FACTS[0], **options)
    with pytest.raises(HparamError, match="no facts"):
        score_nodes(tiny_llama, [])
    with pytest.raises(HparamError, match="needs a gated MLP"):
        score_nodes(tiny_gpt2, FACTS[0], k_node="up+gate")
    with pytest.raises(PromptError, match="no target_true"):
        score_nodes(tiny_llama, Fact("{} is in", "Slovenia", "Asia"), target="true")


def test_active_edits_are_refused(build_lm):
    lm = build_lm("llama")
    lm.active_edits.append(object())
    with pytest.raises(HparamError, match="1 edits are active"):
        score_nodes(lm, FACTS[0])


def test_a_trace_with_edits_is_that_of_the_edited_weights(build_lm):
    lm = build_lm("llama", dtype=torch.float64)
    matrix = torch.randn(
        lm.hidden_size, lm.key_width(1), dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    edit = Edit((FACTS[0],), "x", {}, lm.fingerprint, (ModuleEdit(1, Dense(0.1 * matrix)),))
    with edit.applied(lm, "hook"):
        ours = score_nodes(lm, FACTS[0], with_edits=True)
    with edit.applied(lm, "merge"):
        own = weight_gradients(lm, FACTS[:1])
    for layer in range(lm.n_layers):
        assert_close(ours.value[layer], scores_of(*own[layer]["down"], "zabs")[1])
