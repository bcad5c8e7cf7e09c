"""Long jobs look at the place of their output before they start, not after; nothing is made until there is a result."""

from __future__ import annotations

import tempfile
from pathlib import Path

from rep_fast.errors import OutputError


def check_directory(directory: Path) -> None:
    """Refuse an output directory that is a file, or could not be made or written; missing ones are not made yet.

    Raises:
        OutputError: it is refused.
    """
    try:
        _try_to_write(directory)
    except OSError as error:
        raise _refusal(directory, error, "--out") from error


def check_file(path: Path, option: str) -> None:
    """Refuse an output file whose place is a directory, or whose directory could not be made or written.

    Raises:
        OutputError: it is refused; the message names the option.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a directory")
        _try_to_write(path.parent)
    except OSError as error:
        raise _refusal(path, error, option) from error


def _try_to_write(directory: Path) -> None:
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    with tempfile.TemporaryFile(dir=directory):
        pass


def _refusal(place: Path, error: OSError, option: str) -> OutputError:
    return OutputError(f"cannot write to {place} ({error.strerror or error}); choose another {option}")
