"""Long jobs look at their output directory before they start, not after."""

from __future__ import annotations

import tempfile
from pathlib import Path

from rep_fast.errors import OutputError


def check_writable(directory: Path) -> None:
    """Make the directory and try to write there.

    Raises:
        OutputError: that fails.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise OutputError(f"cannot write to {directory} ({error.strerror or error}); choose another --out") from error
