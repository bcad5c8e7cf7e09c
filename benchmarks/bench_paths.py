"""Tracing a fact's parameter path: node scores against the passes they need and against forming weight gradients.

Run: pytest benchmarks/bench_paths.py --benchmark-enable -n 0. Goals: tracing within 1.3× of the forward and backward
pass for activations; extra memory within 10 % of what weight gradients take. Providers, side by side in one group:
  activations       forward and backward for the gradients of the MLPs' outputs, nothing else: the floor
  rep_fast-<score>  `paths.score_nodes` on the same tokens
  autograd-zabs     weight gradients of up- and down-projections by autograd, then reduced in torch
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from rep_fast.facts import Fact
from rep_fast.models import EditableLM, Site
from rep_fast.paths import score_nodes
from rep_fast.reference import packed_scores as reference

# (D, M, layers): widths of TinyLlama and of a third of LLaMA2-7B; the cost per layer is what matters
WIDTHS = [(1024, 2816, 4), (2048, 5632, 3)]
TOKENS = [16, 64]
PROVIDERS = ["activations", "rep_fast-sum", "rep_fast-l2", "rep_fast-zabs", "autograd-zabs"]
VOCABULARY = 512


@pytest.fixture(scope="module", params=WIDTHS, ids=lambda width: f"D{width[0]}-M{width[1]}-L{width[2]}")
def lm(request: pytest.FixtureRequest) -> EditableLM:
    hidden, key_width, layers = request.param
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=key_width,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
    return EditableLM(model, tokenizer, name="random")


def make_fact(n_tokens: int) -> Fact:
    """A fact whose prompt has `n_tokens` tokens."""
    return Fact("{} " + " ".join(f"w{n + 2}" for n in range(n_tokens - 1)), "w1", "w5 w6")


def run_activations(lm: EditableLM, fact: Fact) -> tuple[torch.Tensor, ...]:
    """The floor: gradients of activations at MLP linears only."""
    lm.model.requires_grad_(False)
    answer = lm.answer(fact.text, fact.target_new)
    sites = [Site(kind, layer) for layer in range(lm.n_layers) for kind in ("up", "value")]
    start = lm.patch(Site("mlp_in", 0), lambda tensor: tensor.detach().requires_grad_())
    with start, lm.capture(sites) as seen:
        loss = target_nll(lm, answer)
        return torch.autograd.grad(loss, [seen[site] for site in sites])


def run_autograd(lm: EditableLM, fact: Fact) -> list[torch.Tensor]:
    """The plain way: form every weight gradient, then reduce it."""
    lm.model.requires_grad_(False)
    modules = [lm.blocks[n].get_submodule(path) for n in range(lm.n_layers) for path in (lm.layout.up, lm.layout.down)]
    weights = [module.weight.requires_grad_() for module in modules]
    gradients = torch.autograd.grad(target_nll(lm, lm.answer(fact.text, fact.target_new)), weights)
    for weight in weights:
        weight.requires_grad_(False)
    scores = []
    for number, gradient in enumerate(gradients):
        matrix = gradient.T
        dim = 1 - number % 2
        centred = matrix - matrix.mean(dim, keepdim=True)
        deviation = matrix.std(dim, keepdim=True)
        scores.append((centred / deviation).abs_().nan_to_num_().mean(1 - dim))
    return scores


def target_nll(lm: EditableLM, answer: Any) -> torch.Tensor:
    logits = lm.logits([list(answer.input_ids)], at=[list(answer.positions)])
    return -logits.log_softmax(-1)[range(len(answer.target_ids)), list(answer.target_ids)].mean()


def run(lm: EditableLM, provider: str, fact: Fact) -> object:
    if provider == "activations":
        return run_activations(lm, fact)
    if provider == "autograd-zabs":
        return run_autograd(lm, fact)
    lm.model.requires_grad_(False)
    return score_nodes(lm, fact, score=provider.removeprefix("rep_fast-"))


def peak_extra_bytes(lm: EditableLM, provider: str, fact: Fact) -> int:
    """High-water mark of the process above where it stood before, Linux only."""
    status = Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = read_kib(status.read_text(), "VmRSS")
    run(lm, provider, fact)
    return 1024 * (read_kib(status.read_text(), "VmHWM") - before)


def read_kib(status: str, name: str) -> int:
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(name))


@pytest.mark.parametrize("n_tokens", TOKENS)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_trace(benchmark: Any, lm: EditableLM, provider: str, n_tokens: int) -> None:
    fact = make_fact(n_tokens)
    benchmark.group = f"trace D{lm.hidden_size} M{lm.key_width(0)} L{lm.n_layers} T{n_tokens}"
    weight_bytes = 2 * 4 * lm.n_layers * lm.hidden_size * lm.key_width(0)
    benchmark.extra_info |= {"weight_gradient_bytes": weight_bytes}
    if provider == "rep_fast-zabs":
        check(lm, fact)
    if Path("/proc/self/clear_refs").exists():
        benchmark.extra_info["peak_extra_bytes"] = peak_extra_bytes(lm, provider, fact)
    benchmark.pedantic(run, args=(lm, provider, fact), rounds=7, warmup_rounds=1)


def check(lm: EditableLM, fact: Fact) -> None:
    """Results are right before they are timed: value-nodes of layer 1 against the definition in float64."""
    ours = score_nodes(lm, fact).value[1]
    weight = lm.down_proj(1).weight.requires_grad_()
    gradient = torch.autograd.grad(target_nll(lm, lm.answer(fact.text, fact.target_new)), weight)[0].T
    weight.requires_grad_(False)
    expected = reference.packed_scores(torch.eye(len(gradient)), gradient, score="zabs")[1]
    assert torch.allclose(ours, expected, rtol=1e-3, atol=1e-6)
