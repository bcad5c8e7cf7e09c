"""Tensors on disk: safetensors with a kind, a format number and a digest, written atomically.

Nothing that executes is ever read. A file that was cut, altered or written for something else is refused by name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rep_fast.errors import CorruptFileError, OutputError

FORMAT = 1


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], *, kind: str, facts: Mapping[str, Any]) -> None:
    """Write tensors and JSON-able `facts` under `path`: temporary file, then rename.

    Raises:
        OutputError: the file cannot be written.
    """
    target = Path(path)
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(dict(facts), sort_keys=True)
    header = {"kind": kind, "format": str(FORMAT), "facts": text, "digest": _digest(stored, kind, text)}
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        save_file(stored, temporary, metadata=header)
        temporary.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OutputError(f"cannot write {target}: {error.strerror or error}; choose a writable place") from error


def read_tensors(path: str | Path, *, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts written by `write_tensors` with the same `kind`.

    Raises:
        CorruptFileError: missing, truncated, altered, of a newer format or of another kind.
    """
    source = Path(path)
    try:
        with safe_open(source, framework="pt") as handle:
            header = handle.metadata() or {}
            _check_header(source, header, kind)
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a mapping
    except FileNotFoundError as error:
        raise CorruptFileError(f"{source} does not exist; check the path") from error
    except (SafetensorError, OSError) as error:
        if isinstance(error, CorruptFileError):
            raise
        raise CorruptFileError(f"{source} is not a readable safetensors file ({error}); write it again") from error
    if _digest(tensors, kind, header["facts"]) != header["digest"]:
        raise CorruptFileError(f"{source} was altered or damaged: its digest does not match; write it again")
    return tensors, json.loads(header["facts"])


def _check_header(source: Path, header: Mapping[str, str], kind: str) -> None:
    if not {"kind", "format", "facts", "digest"} <= set(header):
        raise CorruptFileError(f"{source} was not written by rep_fast: its header holds {sorted(header)}")
    if header["kind"] != kind:
        raise CorruptFileError(f"{source} holds a {header['kind']}, not a {kind}; give the right file")
    if header["format"] != str(FORMAT):
        raise CorruptFileError(f"{source} has format {header['format']}, this version reads {FORMAT}; update rep_fast")


def _digest(tensors: Mapping[str, Tensor], kind: str, facts: str) -> str:
    """SHA-256 over kind, facts and, in name order, each tensor's name, dtype, shape and bytes."""
    state = hashlib.sha256(f"{kind}\n{facts}".encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        state.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            state.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()
