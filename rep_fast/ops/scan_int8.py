"""The GPU scan's int8 pass: keys and queries in whole steps, rounded by a random dither and multiplied in integers.

A score is s_K·s_W·Σ q_K q_W, off by at most s_K·margin(query) + s_W·margin(key) with probability 1 − δ over the draw.
A margin is c times the row's norm, c = √(ln(4NS/δ)/2), which is Hoeffding's bound over all pairs of the scan, plus 2⁻¹⁵
times its sum of magnitudes for the fixed point. The proof and its conditions are in csrc/cpu/dither.h, whose draws and
fixed point the kernels share bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from rep_fast.ops.native import stream_number
from rep_fast.ops.scan_products import PreparedQueries

LARGEST_INT8_WIDTH = 65536  # sums of products of two bytes fit an int32
_LARGEST_SCAN = 2.0**40  # keys of a stream whose length is not known
_SAMPLE = 64  # rows whose squares tell a column's size within a factor of two
_LARGEST_EXPONENT = 40
_FEWEST_ROWS = 32  # torch._int_mm wants more than 16 of the left operand
_KEYS, _QUERIES = 0, 1  # whose dither
_TINY = 2.0**-126  # below it torch may read numbers as zero
# more than what the bounds' own arithmetic, their rounding to float32 and the float64 scores lose beside c
_UPWARDS = 1 + 2.0**-19


@dataclass(frozen=True)
class DitheredQueries(PreparedQueries):
    """Queries in whole steps, and what keys are brought to whole steps with.

    `factor` is [S', M'] int8, zeros behind S and M; `margins` are per unit of a key's step, infinite for queries that
    have no step.

    Attributes:
        steps: [S] float32. key_columns: [M'] int32, as `quantise_rows` takes them. constant: margin per norm.
    """

    steps: Tensor
    key_columns: Tensor
    constant: float

    @property
    def n_parts(self) -> int:
        """One product serves."""
        return 1


def prepare_dithered(module: ModuleType, rows: Tensor, keys: Tensor, *, delta: float, seed: int) -> DitheredQueries:
    """Quantise the queries [S, M] float32 and bound what that costs; waits for nothing.

    A sample of `keys`, on any device, balances the columns: powers of two that keys are divided by and queries
    multiplied with. It may be of the first block alone, since balancing changes the margins and not their proof.
    """
    stream, (n_queries, width) = stream_number(rows.device), rows.shape
    n_pairs = _LARGEST_SCAN * max(n_queries, 1)
    # ‖x‖₁ ≤ √M·‖x‖
    constant = (math.sqrt(math.log(4 * n_pairs / delta) / 2) + 2.0**-15 * math.sqrt(width)) * _UPWARDS
    exponents = _balancing_exponents(_sample(keys, rows.device), rows)
    padded = _padded(width, module.quantised_multiple)
    key_columns, query_columns = (
        _columns(module, own, padded, seed=seed, whose=whose)
        for own, whose in ((-exponents, _KEYS), (exponents, _QUERIES))
    )
    n_rows = _padded(max(n_queries, _FEWEST_ROWS), module.quantised_multiple)
    factor = torch.zeros(n_rows, padded, dtype=torch.int8, device=rows.device)
    steps, found = torch.empty(2, n_queries, device=rows.device)
    module.quantise_rows(
        rows=rows,
        columns=query_columns,
        constant=constant,
        first_id=0,
        values=factor[:n_queries],
        steps=steps,
        margins=found,
        counters=None,
        stream=stream,
    )
    norms = ((rows.double().abs() + _TINY) * _powers_of_two(exponents)).norm(dim=1)
    return DitheredQueries(
        rows=rows,
        scan_pass="int8",
        factor=factor,
        # infinite without a step and NaN where the query is not finite, as the kernel found
        margins=torch.where(found.isfinite(), (constant * norms).float(), found),
        slacks=torch.zeros_like(steps),
        dropped=found.isnan(),
        steps=steps,
        key_columns=key_columns,
        constant=constant,
    )


class QuantisedKeys:
    """Chunks of at most `rows` keys in whole steps, one at a time, in memory that is used again."""

    def __init__(self, module: ModuleType, queries: DitheredQueries, rows: int, counters: Tensor) -> None:
        assert queries.factor is not None
        device = queries.rows.device
        self._quantise, self._queries, self._counters = module.quantise_rows, queries, counters
        n_padded = _padded(rows, module.quantised_multiple)
        # what no key has been written to is multiplied by nobody who reads the sums
        self.values = torch.empty(n_padded, queries.factor.shape[1], dtype=torch.int8, device=device)
        self._steps, self._margins = torch.empty(2, rows, device=device)

    def take(self, chunk: Tensor, first_row: int) -> tuple[Tensor, Tensor, Tensor]:
        """Values [n, M'] int8, steps and margins [n] float32 of the keys `chunk` [n, M]; counts those not finite."""
        n = len(chunk)
        values, steps, margins = self.values[:n], self._steps[:n], self._margins[:n]
        self._quantise(
            rows=chunk,
            columns=self._queries.key_columns,
            constant=self._queries.constant,
            first_id=first_row,
            values=values,
            steps=steps,
            margins=margins,
            counters=self._counters,
            stream=stream_number(values.device),
        )
        return values, steps, margins


class Int8Chunks:
    """Scores of chunks of at most `rows` keys by an integer product."""

    def __init__(self, module: ModuleType, queries: DitheredQueries, rows: int, counters: Tensor) -> None:
        assert queries.factor is not None
        self._factor, self._query_steps, self._multiple = queries.factor, queries.steps, module.quantised_multiple
        self._keys = QuantisedKeys(module, queries, rows, counters)
        n_sums = len(self._factor) * len(self._keys.values)
        self._sums = torch.empty(n_sums, dtype=torch.int32, device=queries.rows.device)

    def scored(self, chunk: Tensor, first_row: int) -> dict[str, Tensor]:
        """What `select_hits` reads of the keys `chunk` [n, M]; counts the rows that are not finite."""
        n_padded = _padded(len(chunk), self._multiple)
        _, steps, margins = self._keys.take(chunk, first_row)
        sums = self._sums[: len(self._factor) * n_padded].view(len(self._factor), n_padded)
        # rows behind the chunk hold anything: nobody reads their sums
        torch._int_mm(self._factor, self._keys.values[:n_padded].T, out=sums)
        return {"approximate": sums, "norms": margins, "key_steps": steps, "query_steps": self._query_steps}


def _padded(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _sample(keys: Tensor, device: torch.device) -> Tensor:
    """At most `_SAMPLE` rows, spread evenly, on `device`."""
    count = min(len(keys), _SAMPLE)
    places = torch.arange(count, device=keys.device) * len(keys) // max(count, 1)
    sample = keys.index_select(0, places)
    if sample.device == device:
        return sample
    return sample.pin_memory().to(device, non_blocking=True)


def _balancing_exponents(keys: Tensor, queries: Tensor) -> Tensor:
    """[M] int32 e: keys / 2ᵉ and queries · 2ᵉ are of about the same size in each column."""
    of_keys, of_queries = _column_squares(keys), _column_squares(_sample(queries, queries.device))
    # √(rms of keys / rms of queries), a fourth root of the ratio of squares
    wanted = ((of_keys.log2() - of_queries.log2()) / 4).round().clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT)
    return torch.where((of_keys > 0) & (of_queries > 0), wanted, 0.0).int()


def _column_squares(rows: Tensor) -> Tensor:
    """[M] float64 Σ x² over the rows without a NaN or infinity."""
    squares = rows.double().square()
    return squares.masked_fill(~squares.isfinite().all(dim=1, keepdim=True), 0.0).sum(dim=0)


def _powers_of_two(exponents: Tensor) -> Tensor:
    """2ᵉ in float32 by its bits, which no library rounds."""
    return ((exponents + 127) << 23).view(torch.float32)


def _columns(module: ModuleType, exponents: Tensor, padded: int, *, seed: int, whose: int) -> Tensor:
    """[padded] int32: scale and dither of each column as `quantise_rows` takes them."""
    dither = torch.empty_like(exponents)
    module.draw_dither(seed=seed, whose=whose, dither=dither, stream=stream_number(dither.device))
    columns = torch.zeros(padded, dtype=torch.int32, device=dither.device)
    columns[: len(dither)] = _powers_of_two(exponents).view(torch.int32) | dither
    return columns
