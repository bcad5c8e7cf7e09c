"""Names of the module of CUDA kernels; tensors are torch.Tensor on one GPU, `stream` is torch's current one there."""

from torch import Tensor

bodies: list[str]
fused_tile_keys: int
largest_k: int
more_gate_tickets: int
quantised_multiple: int
solve_block: int

def count_tokens(*, keys: Tensor, mask: Tensor | None, counts: Tensor, counters: Tensor, stream: int) -> None: ...
def accumulate_moment(*, keys: Tensor, counts: Tensor | None, total: Tensor, stream: int) -> None: ...
def can_accumulate_by_wgmma(*, keys: Tensor) -> bool: ...
def accumulate_moment_by_wgmma(
    *, keys: Tensor, counts: Tensor | None, total: Tensor, tile_columns: int, stream: int
) -> None: ...
def gated_adapter_scratch(*, keys: Tensor, weights: list[Tensor], thresholds: list[float], compose: str) -> int: ...
def gated_adapter(
    *,
    keys: Tensor,
    weights: list[Tensor],
    thresholds: list[float],
    compose: str,
    decides: bool,
    adapted: Tensor,
    logits: Tensor,
    opened: Tensor,
    tickets: Tensor,
    scratch: Tensor,
    stream: int,
) -> None: ...
def gate_products(
    *, products: Tensor, weights: list[Tensor], threshold: float, logits: Tensor, opened: Tensor, stream: int
) -> None: ...
def abs_product_scratch(*, n_tokens: int, n_left: int, n_right: int) -> int: ...
def abs_product_sum(*, a: Tensor, b: Tensor, sums: Tensor, scratch: Tensor, stream: int) -> None: ...
def invert_diagonal_blocks(*, lower: Tensor, inverses: Tensor, stream: int) -> None: ...
def cholesky_solve_scratch(*, key_dim: int, n_columns: int) -> int: ...
def cholesky_solve(
    *, lower: Tensor, inverses: Tensor, scale: Tensor, b: Tensor, x: Tensor, scratch: Tensor, stream: int
) -> None: ...
def subtract_product(*, matrix: Tensor, shift: float, x: Tensor, rest: Tensor, stream: int) -> None: ...
def measure_keys(*, keys: Tensor, first_id: int, norms: Tensor, counters: Tensor, stream: int) -> None: ...
def select_hits(
    *,
    keys: Tensor,
    norms: Tensor,
    first_row: int,
    first_id: int,
    approximate: Tensor,
    queries: Tensor,
    margins: Tensor,
    slacks: Tensor,
    token_ids: Tensor | None,
    sequence_starts: Tensor | None,
    last_tokens: Tensor | None,
    lookback: Tensor | None,
    window: int,
    indptr: Tensor | None,
    subjects: Tensor | None,
    scores: Tensor,
    ids: Tensor,
    stream: int,
    key_steps: Tensor | None = None,
    query_steps: Tensor | None = None,
) -> None: ...
def draw_dither(*, seed: int, whose: int, dither: Tensor, stream: int) -> None: ...
def quantise_rows(
    *,
    rows: Tensor,
    columns: Tensor,
    constant: float,
    first_id: int,
    values: Tensor,
    steps: Tensor,
    margins: Tensor,
    counters: Tensor | None,
    stream: int,
) -> None: ...
def fused_tile_queries(n_queries: int) -> int: ...
def padded_queries(n_queries: int) -> int: ...
def can_fuse(*, keys: Tensor, factor: Tensor, n_parts: int) -> bool: ...
def scan_fused(
    *,
    keys: Tensor,
    first_row: int,
    first_id: int,
    factor: Tensor,
    n_parts: int,
    counters: Tensor,
    limits: Tensor,
    counts: Tensor,
    candidates: Tensor,
    queries: Tensor,
    margins: Tensor,
    slacks: Tensor,
    token_ids: Tensor | None,
    sequence_starts: Tensor | None,
    last_tokens: Tensor | None,
    lookback: Tensor | None,
    window: int,
    indptr: Tensor | None,
    subjects: Tensor | None,
    scores: Tensor,
    ids: Tensor,
    stream: int,
    key_values: Tensor | None = None,
    key_steps: Tensor | None = None,
    key_margins: Tensor | None = None,
    query_steps: Tensor | None = None,
) -> None: ...
