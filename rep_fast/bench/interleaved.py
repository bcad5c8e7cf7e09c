"""Measuring providers side by side: A, B, C, A, B, C … in one process, with the machine's ceiling in between.

Clocks and neighbours change from minute to minute, so only runs next to each other are compared: a ratio is the median
of the ratios of the rounds.
"""

from __future__ import annotations

import csv
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from rep_fast.bench.ceilings import product_ceiling
from rep_fast.safe_files import write_atomically

_RESET_SLACK_KB = 4096  # the kernel counts pages per thread and adds them up late


@dataclass(frozen=True)
class Provider:
    """One way to do an op.

    run: does the work and returns the result. dtype: of its products, names the ceiling it is compared with. is_ours:
    false for peers, the best of which the ratios refer to. isa: value of `REP_FAST_ISA` it runs under, "" for any.
    """

    name: str
    dtype: str
    run: Callable[[], Any]
    is_ours: bool = False
    isa: str = ""


@dataclass(frozen=True)
class Row:
    """One provider on one case.

    median_s, and the 20 and 80 % quantiles; gops and share_of_ceiling, the product rate and its share of the rate of
    bare instructions of that dtype measured in the same rounds (None: no such instruction); ratio_to_best_peer, above 1
    where this provider is faster; peak_extra_mb, memory beyond what was there before; exact, whether the result is the
    float64 answer.
    """

    op: str
    case: str
    provider: str
    dtype: str
    threads: int
    median_s: float
    q20_s: float
    q80_s: float
    gops: float
    share_of_ceiling: float | None
    ratio_to_best_peer: float | None
    peak_extra_mb: float
    exact: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def measure(
    op: str,
    case: str,
    providers: Sequence[Provider],
    *,
    operations: int,
    is_exact: Callable[[Any], bool],
    rounds: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Run every provider once for warm-up, memory and its answer, then `rounds` times in turn.

    Args:
        operations: of one run, products and sums.
        is_exact: whether a provider's result is the float64 answer.
        progress: called with the rounds done and all of them.
    """
    exact, extra = {}, {}
    for provider in providers:
        with under_isa(provider.isa):
            extra[provider.name], result = _extra_megabytes(provider.run)
        exact[provider.name] = is_exact(result)
    threads = torch.get_num_threads()
    seconds: dict[str, list[float]] = {provider.name: [] for provider in providers}
    ceilings: dict[str, list[float]] = {provider.dtype: [] for provider in providers}
    for done in range(rounds):
        for dtype, found in ceilings.items():
            found.append(product_ceiling(dtype, threads=threads))
        for provider in providers:
            with under_isa(provider.isa):
                seconds[provider.name].append(_seconds(provider.run))
        if progress is not None:
            progress(done + 1, rounds)
    best_peer = _best_peer(providers, seconds)
    rows = []
    for provider in providers:
        own = seconds[provider.name]
        median = statistics.median(own)
        ceiling = statistics.median(ceilings[provider.dtype])
        rows.append(
            Row(
                op, case, provider.name, provider.dtype, threads, median, *_quantiles(own),
                gops=operations / median / 1e9,
                share_of_ceiling=operations / median / 1e9 / ceiling if ceiling else None,
                ratio_to_best_peer=None if best_peer is None else _median_ratio(seconds[best_peer], own),
                peak_extra_mb=extra[provider.name],
                exact=exact[provider.name],
            )
        )  # fmt: skip
    return rows


def write_csv(path: Path, rows: Sequence[Row], about: Mapping[str, str]) -> None:
    """Rows with what they were measured on (`about`: CPU, versions, commit …) repeated in each."""
    names = [field.name for field in fields(Row)]
    lines: list[str] = []

    class _Lines:
        def write(self, text: str) -> None:
            lines.append(text)

    writer = csv.writer(_Lines(), lineterminator="\n")
    writer.writerow([*names, *about])
    for row in rows:
        writer.writerow([*(_shown(getattr(row, name)) for name in names), *about.values()])
    write_atomically(path, "".join(lines).encode())


@contextmanager
def under_isa(cap: str) -> Iterator[None]:
    """`REP_FAST_ISA` set for a moment; "" leaves it as it is."""
    before = os.environ.get("REP_FAST_ISA")
    if cap:
        os.environ["REP_FAST_ISA"] = cap
    try:
        yield
    finally:
        if cap:
            os.environ.pop("REP_FAST_ISA")
            if before is not None:
                os.environ["REP_FAST_ISA"] = before


def _shown(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def _seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _median_ratio(reference: Sequence[float], own: Sequence[float]) -> float:
    return statistics.median(theirs / ours for theirs, ours in zip(reference, own, strict=True))


def _best_peer(providers: Sequence[Provider], seconds: Mapping[str, Sequence[float]]) -> str | None:
    peers = [provider.name for provider in providers if not provider.is_ours]
    return min(peers, key=lambda name: statistics.median(seconds[name]), default=None)


def _quantiles(values: Sequence[float]) -> tuple[float, float]:
    ordered = sorted(values)
    return ordered[round(0.2 * (len(ordered) - 1))], ordered[round(0.8 * (len(ordered) - 1))]


def _extra_megabytes(run: Callable[[], Any]) -> tuple[float, Any]:
    """Growth of the process's resident memory at its highest during a run, MB; NaN where the system does not tell.

    What an allocator kept of earlier runs and hands out again is resident already and not counted.
    """
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    try:
        clear.write_text("5")  # resets the high-water mark
        before, mark = _kilobytes(status, "VmRSS"), _kilobytes(status, "VmHWM")
    except OSError:
        return float("nan"), run()
    if mark - before > _RESET_SLACK_KB:  # some sandboxes take the request and leave the mark
        return float("nan"), run()
    result = run()
    return max(_kilobytes(status, "VmHWM") - before, 0) / 1e3, result


def _kilobytes(status: Path, name: str) -> int:
    (line,) = (line for line in status.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1])
