"""Best paths by enumerating all of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import Tensor


def kbest_paths(lists: Sequence[Tensor], n: int) -> list[tuple[float, tuple[int, ...]]]:
    """The `n` best of all Π M_p paths; equal scores by node numbers. For small lists only."""
    values = [scores.double().tolist() for scores in lists]
    paths = itertools.product(*(range(len(column)) for column in values))
    scored = [(math.fsum(column[i] for column, i in zip(values, path, strict=True)), path) for path in paths]
    return sorted(scored, key=lambda pair: (-pair[0], pair[1]))[:n]
