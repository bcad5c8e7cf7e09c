"""rep_fast: fact edits in language models that hold under rephrasing, on fused C++/CUDA kernels.

The public names load on first use, so that `import rep_fast` stays quick and `rep-fast --help` needs no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# name → the room that defines it
_ROOM_OF = {
    "Batch": "models",
    "Edit": "edits",
    "EditCase": "facts",
    "EditableLM": "models",
    "Fact": "facts",
    "KeyAdapter": "edits",
    "LowRank": "edits",
    "SecondMoments": "stats",
    "backend": "ops",
    "edit": "api",
}

__all__ = ["__version__", *sorted(_ROOM_OF)]


def __getattr__(name: str) -> Any:
    if name in _ROOM_OF:
        return getattr(importlib.import_module(f"rep_fast.{_ROOM_OF[name]}"), name)
    raise AttributeError(f"module 'rep_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
