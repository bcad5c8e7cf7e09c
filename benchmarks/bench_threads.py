"""How much faster the native ops are on several threads than on one: the same call at 1 and n threads in turn.

    python benchmarks/bench_threads.py --threads 2

One row per op and case, of the body that answers fastest on one thread; beside them the machine's own ratios, of
float32 multiply-adds and of reading memory, which are what can be reached.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from rep_fast.bench import OPS, Ceilings, Provider
from rep_fast.bench.interleaved import under_isa

CASES = (
    ("whitened_topk", "m4096-400"),
    ("whitened_topk", "llama2-7b-400"),
    ("gated_adapter", "llama2-7b-1"),
    ("gated_adapter", "llama2-7b-16"),
    ("gated_adapter", "llama2-7b-512"),
    ("accumulate_moment", "m4096"),
    ("packed_scores", "llama2-7b-64"),
    ("spd_solver", "m4096-solve"),
)


def seconds(provider: Provider, threads: int) -> float:
    torch.set_num_threads(threads)
    with under_isa(provider.isa):
        begin = time.perf_counter()
        provider.run()
        return time.perf_counter() - begin


def fastest(op: str, case_name: str) -> Provider:
    """Of ours, by one run after another that is not counted."""
    (case,) = (case for case in OPS[op].CASES if case.name == case_name)
    ours = [provider for provider in OPS[op].providers(OPS[op].Inputs.draw(case, seed=0)) if provider.is_ours]
    for provider in ours:
        seconds(provider, 1)
    return min(ours, key=lambda provider: seconds(provider, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    one, several = (Ceilings.measure(threads=threads) for threads in (1, arguments.threads))
    print(f"machine: float32 {several.fp32 / one.fp32:.2f}, reading {several.read / one.read:.2f}")
    for op, case in CASES:
        provider = fastest(op, case)
        ratios = []
        for _ in range(arguments.rounds):
            alone = seconds(provider, 1)
            ratios.append(alone / seconds(provider, arguments.threads))
        low, high = min(ratios), max(ratios)
        print(f"{op} {case} ({provider.name}): {statistics.median(ratios):.2f} ({low:.2f}–{high:.2f})")


if __name__ == "__main__":
    main()
