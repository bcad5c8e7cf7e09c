"""Path editing: a step on slices against the passes it needs, against whole weight gradients, and the memory it takes.

    python benchmarks/bench_pac.py --rounds 20
    pytest benchmarks/bench_pac.py --benchmark-only -n0

Goals: a step within 1.5× of a forward and backward pass for activations; extra memory within 5 % of the weights. The
case is one factworld fact in a random LLaMA of 100 M parameters, 15 nodes of each list. Providers:
  activations  forward and backward for the gradients of the MLPs' outputs, nothing else: the floor
  slices       one positive step of `editors/pac.py`: NLL, gradients of the slices, Adam
  contrastive  positive and negative step together, that is two passes each way
  dense        the same positive step on whole up- and down-weights, as plain code does it: gradients, masks, Adam
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_edit import random_llama
from torch import Tensor

from rep_fast import factworld
from rep_fast.editors import PacHparams, pac
from rep_fast.editors.pac_adam import RowAdam, step_on_rows
from rep_fast.editors.pac_slices import Rows, TrainableSlices
from rep_fast.models import Answer, EditableLM, Site
from rep_fast.paths import score_nodes, select, target_nll

TOP = 15
RATE = 1e-6  # so small that the model of the last round is that of the first


@cache
def problem() -> tuple[EditableLM, Answer]:
    """The model and the first validation fact (five target tokens)."""
    tokenizer = factworld.load().tokenizer
    lm = EditableLM(random_llama(len(tokenizer)), tokenizer, name="random LLaMA, 100 M")
    fact = factworld.cases("validation")[0].fact
    return lm, lm.answer(fact.text, fact.target_new)


def activations() -> Callable[[], object]:
    """The floor."""
    lm, answer = problem()
    sites = [Site(kind, layer) for layer in range(lm.n_layers) for kind in ("up", "value")]

    def run() -> object:
        start = lm.patch(Site("mlp_in", 0), lambda tensor: tensor.detach().requires_grad_())
        with start, lm.capture(sites) as seen:
            return torch.autograd.grad(target_nll(lm, [answer]).sum(), [seen[site] for site in sites])

    return run


def chosen() -> tuple[TrainableSlices, Rows, Rows]:
    """Slices with the nodes of one trace."""
    lm, _ = problem()
    nodes = select(score_nodes(lm, factworld.cases("validation")[0].fact), top=TOP)
    slices = TrainableSlices(lm, [(layer, linear) for layer in range(lm.n_layers) for linear in ("up", "down")])

    def rows(own: Any) -> Rows:
        key = {(layer, "up"): found for layer, found in enumerate(own.key)}
        return slices.rows(key | {(layer, "down"): found for layer, found in enumerate(own.value)})

    return slices, rows(nodes.positive), rows(nodes.negative)


def steps(*, contrastive: bool) -> Callable[[], object]:
    """One positive step, or both."""
    lm, answer = problem()
    slices, *both = chosen()
    rates = dict.fromkeys(slices.values, RATE)
    parts = [(rows, RowAdam()) for rows in (both if contrastive else both[:1])]

    def run() -> None:
        with slices.in_forward():
            for rows, adam in parts:
                with slices.trainable():
                    gradients = slices.gradients(target_nll(lm, [answer]).mean())
                step_on_rows(slices, gradients, rows, adam, rates)

    return run


def dense() -> Callable[[], object]:
    """Whole gradients, masked, and an Adam over whole weights."""
    lm, answer = problem()
    slices, positive, _ = chosen()
    places = list(slices.values)
    weights = [lm.linear_weight(*place) for place in places]
    index = {module.place: module.delta.index for module in slices.modules()}
    masks = []
    for place, weight in zip(places, weights, strict=True):
        mask = torch.zeros(weight.shape[1 if place[1] == "down" else 0])
        mask[index[place][: len(positive[place])]] = 1.0
        masks.append(mask if place[1] == "down" else mask[:, None])
    optimiser = torch.optim.Adam(weights, lr=RATE)

    def run() -> None:
        for weight in weights:
            weight.requires_grad_(True)
        gradients: tuple[Tensor, ...] = torch.autograd.grad(target_nll(lm, [answer]).mean(), weights)
        for weight, gradient, mask in zip(weights, gradients, masks, strict=True):
            weight.requires_grad_(False)
            weight.grad = gradient.mul_(mask)
        optimiser.step()

    return run


PROVIDERS: dict[str, Callable[[], Callable[[], object]]] = {
    "activations": activations,
    "slices": lambda: steps(contrastive=False),
    "contrastive": lambda: steps(contrastive=True),
    "dense": dense,
}


@pytest.mark.parametrize("provider", PROVIDERS)
def test_step(benchmark: Any, provider: str) -> None:
    benchmark.group = "path edit, one step, LLaMA 100 M"
    benchmark.pedantic(PROVIDERS[provider](), rounds=7, warmup_rounds=1)


def weight_bytes() -> int:
    """What the model's weights take."""
    return sum(weight.numel() * weight.element_size() for weight in problem()[0].model.parameters())


def peak_extra_bytes(run: Callable[[], object]) -> int:
    """High-water mark of the process above where it stood before, Linux only."""
    status = Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = read_kib(status.read_text(), "VmRSS")
    run()
    return 1024 * (read_kib(status.read_text(), "VmHWM") - before)


def read_kib(status: str, name: str) -> int:
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(name))


def whole_edit() -> object:
    """Answers, trace, three contrastive steps, edit."""
    hparams = PacHparams(pac_lr=1e-3, pac_epochs=3, early_stop=None, top=TOP)
    return pac(problem()[0], [factworld.cases("validation")[0].fact], hparams=hparams)


def interleaved(rounds: int) -> None:
    """A, B, C, A, B, C …: medians, and the median and spread of the ratios to the floor."""
    made = {name: make() for name, make in PROVIDERS.items() if name != "dense"}
    floor_memory = peak_extra_bytes(made["activations"])
    memory = peak_extra_bytes(whole_edit)
    total = weight_bytes()
    print(
        f"weights {total / 2**20:.0f} MiB; extra memory of a whole edit {memory / 2**20:.1f} MiB = "
        f"{100 * memory / total:.1f} % of them, of the activations alone {floor_memory / 2**20:.1f} MiB"
    )
    # last, since its gradients and moments stay in the process
    made["dense"] = dense()
    print(f"extra memory of the first dense step {peak_extra_bytes(made['dense']) / 2**20:.0f} MiB")
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(rounds):
        for name, run in made.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    for name, own in seconds.items():
        ratios = sorted(mine / floor for mine, floor in zip(own, seconds["activations"], strict=True))
        print(
            f"{name}: {1e3 * statistics.median(own):.1f} ms, {statistics.median(ratios):.2f}× the floor "
            f"({ratios[0]:.2f}–{ratios[-1]:.2f}), {torch.get_num_threads()} thread(s)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    interleaved(arguments.rounds)


if __name__ == "__main__":
    main()
