"""Tensors on disk with a description and a digest: safetensors files that are verified when read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rep_fast.errors import CorruptFileError, MissingFileError, OutputError
from rep_fast.safe_files import replacing

_HEADER = "rep_fast"


def save_tensors(
    path: str | Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    kind: str,
    version: int,
    description: Mapping[str, Any],
) -> None:
    """Write tensors and a JSON description as one safetensors file, atomically.

    Args:
        tensors: any dtypes and devices; stored contiguous.
        kind: what the file is ("edit", "moments" …); reading asks for it.
        version: format version of that kind.
        description: anything JSON can hold.
    Raises:
        OutputError: the file cannot be written, or the description is no JSON.
    """
    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    header: dict[str, Any] = {"kind": kind, "version": version, "description": description}
    try:
        canonical = json.dumps(header, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise OutputError(f"the description for {path} cannot be stored as JSON: {error}") from None
    # one entry: safetensors writes several in random order, and equal content shall give equal files
    metadata = {_HEADER: f"{_digest(canonical, stored)}\n{canonical}"}
    with replacing(path) as temporary:
        try:
            save_file(stored, temporary, metadata=metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from None


def load_tensors(path: str | Path, *, kind: str, version: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Description and tensors of a file written by `save_tensors`, on the CPU.

    Raises:
        MissingFileError: there is no such file.
        CorruptFileError: it is truncated or altered, of another kind, or of a newer version than `version`.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"there is no {kind} file {path}; check the name")
    try:
        with safe_open(path, framework="pt") as file:
            digest, _, canonical = (file.metadata() or {}).get(_HEADER, "").partition("\n")
            header = _header(path, canonical, kind=kind, version=version)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        if isinstance(error, CorruptFileError):
            raise
        raise CorruptFileError(f"{path} is damaged or no {kind} file ({error}); make it again") from None
    if _digest(canonical, tensors) != digest:
        raise CorruptFileError(f"{path} was altered: its content does not match its digest; make it again")
    return header["description"], tensors


def _header(path: Path, canonical: str, *, kind: str, version: int) -> dict[str, Any]:
    try:
        header = json.loads(canonical)
        found_kind, found_version = header["kind"], int(header["version"])
    except (KeyError, TypeError, ValueError):
        raise CorruptFileError(
            f"{path} was not written by rep_fast, or is damaged; expected a file of kind {kind!r}"
        ) from None
    if found_kind != kind:
        raise CorruptFileError(f"{path} is a file of kind {found_kind!r}, expected {kind!r}")
    if found_version > version:
        raise CorruptFileError(
            f"{path} has format version {found_version}, this rep_fast reads up to {version}; update rep_fast"
        )
    return header


def _digest(header: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(header.encode("utf-8"))
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
