"""A whole collision scan against the bare truncated forward that feeds it: what looking for 400 subjects costs.

    python benchmarks/bench_collision_scan.py --tokens 2000000

Batch by batch, in turn: `forward`, the model up to the edited layer's keys (`EditableLM.keys`), and `scan`, the same
and `ScanState.add`, which is what `collisions.scan_blocks` does per batch. Queries are the keys of the embedded model's
first 400 test records, the corpus is the embedded model's text; both are tokenised before. At the end a sample of
batches is scored in float64 for every query and compared with what the scan kept.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from rep_fast import api, factworld, ops
from rep_fast.collisions.query import WhitenedQueries, subject_queries, whiten_queries
from rep_fast.collisions.scan import ScanState
from rep_fast.collisions.token_blocks import TokenBlocks, token_blocks
from rep_fast.models import EditableLM

TOP, WINDOW, PRECISION = 10, 10, "auto"


def step(lm: EditableLM, layer: int, blocks: TokenBlocks, queries: WhitenedQueries, state: ScanState | None) -> float:
    """Seconds of one batch; without a state the forward alone."""
    begin = time.perf_counter()
    keys = lm.keys(blocks.batch, [layer])[layer]
    if state is not None:
        state.add(queries, blocks, keys.float(), window=WINDOW, precision=PRECISION)
    return time.perf_counter() - begin


def check_exact(lm: EditableLM, layer: int, batches: list[TokenBlocks], queries: WhitenedQueries) -> None:
    """The scan of a few batches against float64 scores of all their keys."""
    state = ScanState(ops.TopK.empty(len(queries.subjects), TOP))
    for blocks in batches:
        step(lm, layer, blocks, queries, state)
    keys = torch.cat([lm.keys(blocks.batch, [layer])[layer] for blocks in batches])
    starts = torch.cat([blocks.starts + blocks.first_position for blocks in batches]) - batches[0].first_position
    exclusion = queries.exclusion(torch.cat([blocks.token_ids for blocks in batches]), starts, WINDOW)
    first_id = batches[0].first_position
    exact = ops.whitened_topk(keys, queries.whitened, TOP, exclusion=exclusion, first_id=first_id, precision="fp64")
    assert torch.equal(state.hits.ids, exact.ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--subjects", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    bench = api.Workbench(factworld.load())
    lm, layer = bench.lm, bench.hparams("rome").layer
    facts = [case.fact for case in factworld.cases("test")[: arguments.subjects]]
    queries = whiten_queries(lm, subject_queries(lm, facts, layer), bench.moments([layer]), layer)
    batches = list(token_blocks(lm, bench.text, tokens=arguments.tokens))
    check_exact(lm, layer, batches[:4], queries)

    state = ScanState(ops.TopK.empty(len(facts), TOP))
    bare: list[float] = []
    whole: list[float] = []
    for number, blocks in enumerate(batches):
        runs = [(bare, None), (whole, state)]
        for seconds, held in runs if number % 2 else reversed(runs):
            seconds.append(step(lm, layer, blocks, queries, held))
    ratios = [one / other for one, other in zip(bare, whole, strict=True)]
    print(
        f"{state.n_tokens} tokens, {len(facts)} subjects, layer {layer}, M = {queries.whitened.shape[1]}, "
        f"{arguments.threads} thread(s): forward {sum(bare):.1f} s, scan {sum(whole):.1f} s "
        f"({state.n_tokens / sum(whole):.0f} tokens/s); the scan runs at {sum(bare) / sum(whole):.2f} of the forward's "
        f"speed, median of batches {statistics.median(ratios):.2f}, first batch {ratios[0]:.2f}; "
        f"passes {state.hits.pass_counts}"
    )


if __name__ == "__main__":
    main()
