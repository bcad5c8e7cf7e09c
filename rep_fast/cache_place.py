"""Where results that are made once are kept between processes."""

from __future__ import annotations

import os
import re
from pathlib import Path


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """`cache_dir`, else `$REP_FAST_CACHE`, else ~/.cache/rep_fast; it need not be there yet."""
    return Path(cache_dir or os.environ.get("REP_FAST_CACHE") or Path.home() / ".cache" / "rep_fast").expanduser()


def readable_name(model_name: str) -> str:
    """The part of a cache file's name that tells people which model it belongs to."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model_name).name).strip("-.")[:40] or "model"
