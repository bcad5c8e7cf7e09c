"""Names of the native module; tensors are torch.Tensor on the CPU, levels are rows of the dispatch tables."""

from torch import Tensor

def machine_level() -> int: ...
def resolve_level(cap: str) -> int: ...
def level_name(level: int) -> str: ...

body_levels: dict[str, list[int]]
scan_passes: list[str]
pass_reasons: list[str]

class QueryPackings:
    def __init__(self, queries: Tensor) -> None: ...

def whitened_topk(
    *,
    keys: Tensor,
    queries: Tensor,
    scores: Tensor,
    ids: Tensor,
    query_dropped: Tensor,
    first_id: int,
    token_ids: Tensor | None,
    sequence_starts: Tensor | None,
    last_tokens: Tensor | None,
    lookback: Tensor | None,
    window: int,
    indptr: Tensor | None,
    subjects: Tensor | None,
    precision: str,
    delta: float,
    seed: int,
    packings: QueryPackings | None,
    level: int,
    n_threads: int,
) -> tuple[int, int, int, list[int], list[int]]: ...
def accumulate_moment(keys: Tensor, total: Tensor, precision: str, level: int, n_threads: int) -> None: ...
def prefer_huge_pages(total: Tensor) -> None: ...
def abs_product_sum(a: Tensor, b: Tensor, sums: Tensor, level: int, n_threads: int) -> None: ...

solve_block: int

def invert_diagonal_blocks(lower: Tensor, inverses: Tensor, n_threads: int) -> None: ...
def cholesky_solve(
    lower: Tensor, inverses: Tensor, scale: Tensor, b: Tensor, x: Tensor, level: int, n_threads: int
) -> None: ...
def subtract_product(matrix: Tensor, shift: float, x: Tensor, rest: Tensor, level: int, n_threads: int) -> None: ...
def dot_products(keys: Tensor, weights: Tensor, products: Tensor, level: int, n_threads: int) -> None: ...
def gate_forward(
    keys: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: float,
    logits: Tensor,
    hidden: Tensor,
    level: int,
    n_threads: int,
) -> None: ...
def calibrated_step(
    rows: Tensor,
    entering: Tensor,
    response: Tensor,
    weights: list[Tensor],
    gradients: list[Tensor],
    response_target: float,
    response_weight: float,
    shift_weight: float,
    consistency: float,
    negative_weight: float,
    level: int,
    n_threads: int,
) -> float: ...
def gate_gradient(
    keys: Tensor,
    hidden: Tensor,
    w2: Tensor,
    d_logits: Tensor,
    d_w1: Tensor,
    d_b1: Tensor,
    d_w2: Tensor,
    d_hidden: Tensor,
    level: int,
    n_threads: int,
) -> None: ...
def gate_logits(
    keys: Tensor,
    weights: list[Tensor],
    thresholds: list[float],
    logits: Tensor,
    level: int,
    n_threads: int,
    products: int = 0,
) -> tuple[bool, int]: ...
def product_rate(product: int, level: int, n_threads: int, seconds: float) -> float: ...
def transfer_rate(transfer: int, n_bytes: int, n_threads: int, seconds: float) -> float: ...
