"""Second moments on disk: finished ones, partial ones, and where the cache keeps them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rep_fast.cache_place import cache_root, readable_name
from rep_fast.errors import CorruptFileError, HparamError, RepFastError
from rep_fast.ops.accumulate_moment import MomentSum
from rep_fast.stats.second_moments import SecondMoments
from rep_fast.tensor_files import load_tensors, save_tensors

KIND = "second-moments"
PARTIAL_KIND = "partial-second-moments"
VERSION = 1


def save_moments(moments: SecondMoments, path: str | Path) -> None:
    """Write second moments; see `SecondMoments.save`."""
    description = {
        "corpus": moments.corpus,
        "fingerprint": moments.fingerprint,
        "model_name": moments.model_name,
        "settings": moments.settings,
        "counts": {str(layer): count for layer, count in moments.counts.items()},
    }
    tensors = {f"layer.{layer}": moments._triangle(layer) for layer in moments.layers}
    save_tensors(path, tensors, kind=KIND, version=VERSION, description=description)


def load_moments(path: str | Path) -> SecondMoments:
    """Read second moments; see `SecondMoments.load`."""
    description, tensors = load_tensors(path, kind=KIND, version=VERSION)
    try:
        return SecondMoments(
            {int(name.removeprefix("layer.")): tensor for name, tensor in tensors.items()},
            {int(layer): count for layer, count in description["counts"].items()},
            corpus=description["corpus"],
            fingerprint=description["fingerprint"],
            model_name=description["model_name"],
            settings=description["settings"],
        )
    except (KeyError, TypeError, ValueError, RepFastError) as error:
        raise CorruptFileError(f"{path} does not describe second moments ({error}); collect them again") from None


@dataclass
class PartialMoments:
    """What an interrupted collection has so far.

    sums: layer → running sum. documents, tokens: how far it went, at a block's end.
    """

    sums: dict[int, MomentSum]
    documents: int = 0
    tokens: int = 0


def save_partial(partial: PartialMoments, path: Path) -> None:
    """Write a partial collection, exactly (float64)."""
    tensors = {
        f"{layer}.{name}": tensor
        for layer, total in partial.sums.items()
        for name, tensor in total.to_tensors().items()
    }
    description = {"documents": partial.documents, "tokens": partial.tokens}
    save_tensors(path, tensors, kind=PARTIAL_KIND, version=VERSION, description=description)


def load_partial(path: Path) -> PartialMoments:
    """Read a partial collection.

    Raises:
        MissingFileError, CorruptFileError: there is none, or it is damaged.
    """
    description, tensors = load_tensors(path, kind=PARTIAL_KIND, version=VERSION)
    parts: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        layer, part = name.split(".")
        parts.setdefault(int(layer), {})[part] = tensor
    try:
        sums = {layer: MomentSum.from_tensors(found) for layer, found in parts.items()}
    except HparamError as error:
        raise CorruptFileError(f"{path} holds no partial second moments ({error})") from None
    return PartialMoments(sums, description["documents"], description["tokens"])


def cache_path(cache_dir: str | Path | None, *, model_name: str, what: str, identity: Mapping[str, Any]) -> Path:
    """File for a result in the cache: readable parts for people, a digest of `identity` for uniqueness."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode("utf-8")).hexdigest()
    return cache_root(cache_dir) / "moments" / f"{readable_name(model_name)}-{what}-{digest[:24]}.safetensors"
