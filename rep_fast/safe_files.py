"""Files that are there whole or not at all: written beside their place, flushed, then renamed into it."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

from rep_fast.errors import OutputError

_LEFT_OVER = re.compile(r"\..+\.\d+\.[0-9a-f]{8}\.tmp")


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path in the directory of `path`; on success it takes its place, on any failure it is removed.

    Missing parent directories are made.

    Raises:
        OutputError: the directory or the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a directory")
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())  # the rename must not reach the disk before the content
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}; choose another place") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def is_left_over(path: str | Path) -> bool:
    """Whether a file has the name of a temporary one of `replacing`: its process was killed, or writes it just now."""
    return _LEFT_OVER.fullmatch(Path(path).name) is not None


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write `data` to `path`; a reader sees the old content or the new, never a part.

    Raises:
        OutputError: the directory or the file cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(data)
