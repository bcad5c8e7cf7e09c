"""The directions of key space that a corpus hardly uses: eigenvectors of C with small eigenvalues (methods §5.6).

An eigendecomposition of M×M is the dearest step of AlphaEdit, so its result is kept on disk, under the model's
fingerprint, the layer, the second moment itself and the choice of directions. Of the basis U_s and its complement the
smaller is stored: P = U_s U_sᵀ = I − U_c U_cᵀ. It is stored in float64: an update solved with directions rounded to
float32 strays by 1e-8 and more, and making them orthonormal again would not turn them back.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rep_fast.cache_place import cache_root, readable_name
from rep_fast.errors import CorruptFileError, HparamError, MissingFileError, OutputError
from rep_fast.tensor_files import load_tensors, save_tensors

logger = logging.getLogger(__name__)
KIND = "null-space"
VERSION = 2
# columns of the basis that are projected on at a time
_TILE = 512


@dataclass(frozen=True, eq=False)
class NullSpace:
    """A projector onto directions of key space.

    basis: [M, s] orthonormal columns, float64. is_complement: whether they span what is projected out.
    eigenvalue: the largest one inside the null space.
    """

    basis: Tensor
    is_complement: bool
    eigenvalue: float

    @property
    def dimension(self) -> int:
        """Directions inside the null space."""
        width, stored = self.basis.shape
        return width - stored if self.is_complement else stored

    def project(self, columns: Tensor) -> Tensor:
        """P A for A [M, a] float64, on A's device, tile by tile."""
        inside = torch.zeros_like(columns)
        for tile in self.basis.split(_TILE, dim=1):
            wide = tile.to(columns)
            inside += wide @ (wide.T @ columns)
        return columns - inside if self.is_complement else inside


def find_null_space(second_moment: Tensor, *, threshold: float | None, share: float | None) -> NullSpace:
    """The null space of C [M, M].

    Args:
        threshold: τ_0, directions with an eigenvalue below it belong to it.
        share: instead, this share of all directions, those with the smallest eigenvalues; in (0, 1).
    Raises:
        HparamError: not exactly one of the two, out of range, or no direction (or every one) qualifies.
    Cost: one symmetric eigendecomposition in float64, about 9 M³ flops.
    """
    if (threshold is None) == (share is None):
        raise HparamError(
            f"a null space needs a threshold or a share, got threshold={threshold} and share={share}; give one of them"
        )
    if share is not None and not 0 < share < 1:
        raise HparamError(f"null_share={share} is out of range; use a number between 0 and 1")
    values, vectors = torch.linalg.eigh(second_moment.double())
    width = len(values)
    size = round(share * width) if share is not None else int((values < threshold).sum())
    if not 0 < size < width:
        chosen = f"nullspace_threshold={threshold}" if share is None else f"null_share={share}"
        raise HparamError(
            f"{chosen} takes {size} of {width} directions, whose eigenvalues go from {float(values[0]):.2e} to "
            f"{float(values[-1]):.2e}; choose between them, or set null_share"
        )
    is_complement = size > width - size
    basis = vectors[:, size:] if is_complement else vectors[:, :size]
    return NullSpace(basis.contiguous(), is_complement, float(values[size - 1]))


def cached_null_space(
    second_moment: Tensor,
    *,
    threshold: float | None,
    share: float | None,
    identity: Mapping[str, Any],
    model_name: str,
    cache_dir: str | Path | None,
) -> NullSpace:
    """The null space from the cache, or found now and kept; see `find_null_space`.

    Args:
        identity: what else tells this second moment from others; JSON values.
        cache_dir: default `$REP_FAST_CACHE`, else ~/.cache/rep_fast; a place that cannot be written is warned of.
    """
    digest = hashlib.sha256(second_moment.cpu().contiguous().numpy().data)
    settings = {**identity, "threshold": threshold, "share": share, "version": VERSION}
    digest.update(json.dumps(settings, sort_keys=True).encode())
    layer = identity.get("layer", "")
    name = f"{readable_name(model_name)}-layer{layer}-{digest.hexdigest()[:24]}.safetensors"
    path = cache_root(cache_dir) / "null-spaces" / name
    try:
        description, tensors = load_tensors(path, kind=KIND, version=VERSION)
        return NullSpace(tensors["basis"], description["is_complement"], description["eigenvalue"])
    except MissingFileError:
        pass
    except (CorruptFileError, KeyError) as error:
        logger.warning("a cached null space is found again: %s", error)
    found = find_null_space(second_moment, threshold=threshold, share=share)
    found = NullSpace(found.basis.cpu(), found.is_complement, found.eigenvalue)
    description = {"is_complement": found.is_complement, "eigenvalue": found.eigenvalue}
    try:
        save_tensors(path, {"basis": found.basis}, kind=KIND, version=VERSION, description=description)
    except OutputError as error:
        logger.warning("the null space is not kept (REP_FAST_CACHE or cache_dir says where): %s", error)
    return found
