"""Names of the module of CUDA kernels; tensors are torch.Tensor on one GPU, `stream` is torch's current one there."""

from torch import Tensor

bodies: list[str]
largest_k: int

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
) -> None: ...
