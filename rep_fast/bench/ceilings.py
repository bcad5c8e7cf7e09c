"""What this machine can do at most, measured now: multiply-adds from registers, and memory."""

from __future__ import annotations

from dataclasses import dataclass, fields
from types import ModuleType

from rep_fast.errors import BackendError
from rep_fast.ops import native

_PRODUCTS = ("fp32", "bf16", "int8")  # in the order of the native module's numbers
_TRANSFERS = ("read", "copy")
_MEMORY_BYTES = 1 << 29  # beyond the last-level cache of most machines


@dataclass(frozen=True)
class Ceilings:
    """Rates of one instruction-set level and number of threads.

    fp32, bf16, int8: Gop/s of the widest multiply-add, a product and a sum counted as two; 0 where there is none.
    read, copy: GB/s of memory (a copy counts both ways); 0 when it was not measured.
    """

    level: str
    threads: int
    fp32: float
    bf16: float
    int8: float
    read: float = 0.0
    copy: float = 0.0

    @classmethod
    def measure(
        cls, *, threads: int = 1, level: str = "", seconds: float = 0.2, memory_bytes: int = _MEMORY_BYTES
    ) -> Ceilings:
        """Measure each rate for `seconds`, the best of its stretches.

        Args:
            level: an instruction-set level; "": the machine's own, or what `REP_FAST_ISA` allows.
            memory_bytes: how much memory to read, and half of it to copy; 0 leaves memory out.
        Raises:
            BackendError: there is no native module, or no such level.
        """
        module, row = _module_and_level(level)
        rates = {
            name: module.product_rate(number, row, threads, seconds) / 1e9 for number, name in enumerate(_PRODUCTS)
        }
        if memory_bytes:
            for number, name in enumerate(_TRANSFERS):
                rates[name] = module.transfer_rate(number, memory_bytes, threads, seconds) / 1e9
        return cls(module.level_name(row), threads, **rates)

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def product_ceiling(dtype: str, *, threads: int, seconds: float = 0.02) -> float:
    """Gop/s of the multiply-add of "fp32", "bf16" or "int8" on the level in use, 0 where there is none."""
    module, row = _module_and_level("")
    return float(module.product_rate(_PRODUCTS.index(dtype), row, threads, seconds) / 1e9)


def _module_and_level(level: str) -> tuple[ModuleType, int]:
    found = native.find()
    if found.module is None:
        raise BackendError(f"ceilings are measured by the native module: {found.reason}")
    if not level:
        return found.module, native.level(found.module)
    try:
        return found.module, found.module.resolve_level(level)
    except ValueError as error:
        raise BackendError(str(error)) from None
