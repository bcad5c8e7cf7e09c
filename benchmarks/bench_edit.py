"""One ROME edit with and without the exact savings, and REP training for one edit.

    pytest benchmarks/bench_edit.py --benchmark-only -n0

Providers `exact_savings` (`editors/value.py`) and `plain` (`editors/plain_value.py`, full forwards with a hook)
optimise the same δ; the trajectory is compared before anything is timed. `python benchmarks/bench_edit.py` interleaves
the two in one process, one validation record per round (targets of one to five tokens), and prints the median ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rep_fast import api, factworld
from rep_fast.editors import OptimisedValue, ValueHparams, optimise_value
from rep_fast.editors.plain_value import optimise_value_plainly
from rep_fast.facts import EditCase
from rep_fast.models import EditableLM

CASES = ("factworld", "llama-100M")
PROVIDERS: dict[str, Callable[..., OptimisedValue]] = {"exact_savings": optimise_value, "plain": optimise_value_plainly}
SAME_TRAJECTORY = 1e-4  # of ‖δ‖, float32 forwards over up to 12 layers


@dataclass(frozen=True)
class Problem:
    """One fact in one model."""

    lm: EditableLM
    record: EditCase
    layer: int
    templates: tuple[str, ...]
    hparams: ValueHparams

    def run(self, provider: str) -> OptimisedValue:
        return PROVIDERS[provider](
            self.lm, self.record.fact, layer=self.layer, templates=self.templates, hparams=self.hparams
        )


@cache
def model_and_settings(case: str) -> tuple[EditableLM, int, tuple[str, ...], ValueHparams]:
    """factworld as shipped; a random 100 M-parameter LLaMA runs all 25 steps, as nothing stops it early."""
    bench = api.Workbench(factworld.load())
    templates = bench.templates("rome", 0)
    hparams = bench.hparams("rome")
    if case == "factworld":
        return bench.lm, hparams.layer, templates, hparams.value
    lm = EditableLM(random_llama(len(bench.lm.tokenizer)), bench.lm.tokenizer, name="random LLaMA, 100 M")
    # layer 5, the papers' choice for a LLaMA, here of 12 layers: the later the layer the larger the saving
    return lm, 5, templates, replace(hparams.value, early_stop=None)


def problem(case: str, record: int = 0) -> Problem:
    """The fact of one validation record in the case's model."""
    lm, layer, templates, hparams = model_and_settings(case)
    return Problem(lm, factworld.cases("validation")[record], layer, templates, hparams)


def random_llama(vocabulary: int) -> Any:
    """12 layers, D = 768, M = 3072, vocabulary as given: 113 M parameters without the embeddings."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=vocabulary, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
            num_attention_heads=12, num_key_value_heads=12, bos_token_id=0, eos_token_id=1, pad_token_id=2,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval().requires_grad_(False)


def check_same_trajectory(case: str) -> float:
    """Largest relative distance between the two δ trajectories."""
    one, other = (problem(case).run(provider).deltas for provider in PROVIDERS)
    assert len(one) == len(other)
    return float(((one - other).norm(dim=1) / other.norm(dim=1).clamp_min(1e-12)).max())


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES)
def test_value(benchmark: Any, case: str, provider: str) -> None:
    assert check_same_trajectory(case) <= SAME_TRAJECTORY
    benchmark.group = f"v* {case}"
    benchmark(problem(case).run, provider)


@pytest.mark.parametrize("objective", ["calibrated", "paper"])
def test_rep(benchmark: Any, objective: str) -> None:
    bench = api.Workbench(factworld.load())
    bench.prepare(["rome"], rep=True)
    record = factworld.cases("validation")[0]
    edit = bench.edit(record)
    benchmark.group = "REP training, one edit, factworld"
    benchmark(bench.with_rep, edit, record, objective=objective)


def interleaved(case: str, rounds: int) -> None:
    """A, B, A, B …, each pair on its own record: medians and the median and spread of the pairwise ratios."""
    seconds: dict[str, list[float]] = {name: [] for name in PROVIDERS}
    drift = check_same_trajectory(case)
    for record in range(rounds):
        for name in PROVIDERS:
            begin = time.perf_counter()
            problem(case, record).run(name)
            seconds[name].append(time.perf_counter() - begin)
    ratios = sorted(plain / fast for fast, plain in zip(seconds["exact_savings"], seconds["plain"], strict=True))
    fast, plain = (statistics.median(seconds[name]) for name in PROVIDERS)
    print(
        f"{case}: exact savings {fast:.3f} s, plain {plain:.3f} s, median ratio {statistics.median(ratios):.2f} "
        f"({ratios[0]:.2f}–{ratios[-1]:.2f}), largest trajectory difference {drift:.1e}, "
        f"{torch.get_num_threads()} thread(s)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for case in arguments.case or CASES:
        interleaved(case, arguments.rounds)


if __name__ == "__main__":
    main()
