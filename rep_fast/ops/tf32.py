"""Whether torch may round the operands of float32 products on a GPU to TF32, ten bits.

`torch.set_float32_matmul_precision("high")` lets it, for the sake of training. Sums and decisions of this package may
not hang on that: where it is allowed, their products are made in float64.
"""

from __future__ import annotations

import torch


def is_tf32_allowed(device: torch.device) -> bool:
    """True on a GPU where torch was told so, in either of the ways it has for that."""
    if device.type != "cuda":
        return False
    # the one question that torch answers whichever way was used; "none": as all backends together
    told = torch.backends.cuda.matmul.fp32_precision
    if told == "none":
        told = torch.backends.fp32_precision  # type: ignore[attr-defined]
    return bool(told == "tf32")
