"""GRACE's codebook: outputs that stand in for a module's own near the keys they were written for (methods §5.13).

The query is what reaches the module at the prompt's last token. The nearest key within its radius puts its value in the
place of the module's output; beyond all radii the model stays as it is, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rep_fast.edits.delta import check_finite_rows
from rep_fast.edits.replacement import UNTOUCHED
from rep_fast.errors import HparamError, LayerError
from rep_fast.models import ForwardPass

Extent = Literal["replace_last", "replace_prompt", "replace_all"]
EXTENTS = ("replace_last", "replace_prompt", "replace_all")
# how far the earlier of two keys with different labels stays away from the border between them
GAP = 1e-5
# a radius grown to reach a key must reach it in another batch too, where the key has other rounding
REACH = 1.001


@dataclass(frozen=True, eq=False)
class Codebook:
    """Entries in the order they were written; the radii with which they act follow from that order.

    An entry starts with its own radius ε. If the nearest earlier key i lies within ε + ε_i: with the same label the
    entry is absorbed, ε_i grows to reach it and its value stands at key i from then on (it was trained on from the one
    there); with another one the space between them is halved. An entry at the very key of an earlier one with another
    label takes its place.

    Args:
        keys: [n, inputs], values: [n, outputs]; one floating dtype and device.
        labels: what each entry makes the model say; equal labels do not compete.
        radii: ε of each entry when it was written, positive.
        extent: where the value goes: at the prompt's last token, at all tokens of the prompt, or at all tokens.
    Raises:
        LayerError: the parts do not fit each other. HparamError: unknown extent, or a radius that is not positive.
        NonFiniteError: a key or value is NaN or infinite.
    """

    kind: ClassVar[str] = "codebook"

    keys: Tensor
    values: Tensor
    labels: tuple[str, ...]
    radii: tuple[float, ...]
    extent: Extent = "replace_last"

    def __post_init__(self) -> None:
        keys, values = self.keys, self.values
        object.__setattr__(self, "labels", tuple(self.labels))
        object.__setattr__(self, "radii", tuple(map(float, self.radii)))
        counts = {len(part) for part in (keys, values, self.labels, self.radii)}
        if keys.ndim != 2 or values.ndim != 2 or len(counts) != 1 or counts == {0}:
            raise LayerError(
                f"keys {tuple(keys.shape)}, values {tuple(values.shape)}, {len(self.labels)} labels and "
                f"{len(self.radii)} radii make no codebook; need [n, inputs], [n, outputs], n and n, n at least 1"
            )
        if keys.dtype != values.dtype or keys.device != values.device or not keys.is_floating_point():
            raise LayerError(
                f"keys {keys.dtype} on {keys.device} and values {values.dtype} on {values.device} must share one "
                "floating dtype and one device"
            )
        if self.extent not in EXTENTS:
            raise HparamError(f"a codebook has no extent {self.extent!r}; use one of {', '.join(EXTENTS)}")
        if not all(0 < radius < float("inf") for radius in self.radii):
            raise HparamError(f"radii {list(self.radii)} of a codebook must be positive and finite")
        check_finite_rows((keys, "the codebook's keys"), (values, "the codebook's values"))

    @classmethod
    def stacked(cls, made: Sequence[Codebook]) -> Codebook:
        """One codebook with the entries of several, in order."""
        extents = sorted({book.extent for book in made})
        if len(extents) != 1:
            raise HparamError(
                f"codebooks at one module replace in one way, got {' and '.join(extents)}; make the edits with the "
                "same replacement, or undo the other ones first"
            )
        return cls(
            torch.cat([book.keys for book in made]),
            torch.cat([book.values for book in made]),
            tuple(label for book in made for label in book.labels),
            tuple(radius for book in made for radius in book.radii),
            made[0].extent,
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        return self.values.shape[1], self.keys.shape[1]

    @property
    def reach(self) -> Tensor:
        """[n] float64: the radius with which each entry acts; −1 for one that was absorbed or superseded."""
        return self._written.reach

    @cached_property
    def spoken_by(self) -> Tensor:
        """[n] int64: whose value stands at each entry's key, its own or that of the last entry it absorbed."""
        return torch.tensor(self._written.spoken_by)

    @cached_property
    def _written(self) -> Acting:
        return Acting.of(self)

    def decide(self, inputs: Tensor, output: Tensor, told: ForwardPass) -> Tensor:
        """The nearest acting key of each row's query, if the query lies within its radius."""
        ends = (told.prompt_lengths - 1).to(inputs.device)
        queries = inputs[torch.arange(len(inputs), device=inputs.device), ends]
        reach = self.reach.to(inputs)
        distances = key_distances(queries.to(self.keys), self.keys).masked_fill(reach < 0, torch.inf)
        found = distances.min(dim=1)
        return torch.where(found.values <= reach[found.indices], found.indices, UNTOUCHED)

    def replaced(self, inputs: Tensor, output: Tensor, decided: Tensor, told: ForwardPass) -> Tensor:
        """The output with the decided entries' values where `extent` says."""
        where = extent_positions(self.extent, told, output.shape[1]).to(output.device) & (decided != UNTOUCHED)[:, None]
        values = self.values[self.spoken_by.to(decided.device)[decided.clamp_min(0)]].to(output)
        return torch.where(where[..., None], values[:, None], output)

    def parts(self) -> dict[str, Tensor]:
        """Tensors by name, for a file."""
        return {"keys": self.keys, "values": self.values}

    def settings(self) -> dict[str, Any]:
        """JSON values beside the tensors."""
        return {"labels": list(self.labels), "radii": list(self.radii), "extent": self.extent}

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Codebook:
        """Inverse of `parts` and `settings`."""
        labels, radii = tuple(settings["labels"]), tuple(settings["radii"])
        return cls(parts["keys"], parts["values"], labels, radii, settings["extent"])

    def to(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Codebook:
        """The same codebook on another device or in another dtype."""
        keys, values = (part.to(device=device, dtype=dtype) for part in (self.keys, self.values))
        return Codebook(keys, values, self.labels, self.radii, self.extent)


@dataclass(eq=False)
class Acting:
    """What entries make of each other, written one after another.

    labels: of the entries so far. reach, spoken_by: see `Codebook`.
    """

    labels: list[str] = field(default_factory=list)
    reach: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    spoken_by: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, book: Codebook) -> Acting:
        """The entries of a codebook."""
        found, distances = cls(), key_distances(book.keys.double(), book.keys.double()).cpu()
        for new, (label, radius) in enumerate(zip(book.labels, book.radii, strict=True)):
            found.write(distances[new, :new], label, radius)
        return found

    def write(self, distances: Tensor, label: str, radius: float) -> int | None:
        """One more entry, `distances` [n] float64 from the keys of the earlier ones.

        Returns:
            The earlier entry that absorbed it; None if it stands by itself.
        """
        new = len(self.labels)
        self.labels.append(label)
        self.spoken_by.append(new)
        self.reach = torch.cat([self.reach, self.reach.new_tensor([radius])])
        while bool((self.reach[:new] >= 0).any()):
            found = distances.masked_fill(self.reach[:new] < 0, torch.inf).min(dim=0)
            near, distance = int(found.indices), float(found.values)
            if distance > radius + float(self.reach[near]):
                break
            if self.labels[near] == label:
                self.reach[near] = max(float(self.reach[near]), distance * REACH)
                self.reach[new] = -1.0
                self.spoken_by[near] = new
                return near
            if distance / 2 > GAP:
                self.reach[near], self.reach[new] = distance / 2 - GAP, distance / 2
                break
            self.reach[near] = -1.0
        return None


def extent_positions(extent: Extent, told: ForwardPass, width: int) -> Tensor:
    """[n, width] bool: the tokens that an extent names in the rows of a pass."""
    if extent == "replace_last":
        return told.is_prompt_end(width)
    if extent == "replace_prompt":
        return told.is_prompt(width)
    return told.is_prompt(width).new_ones(len(told.prompt_lengths), width)


def key_distances(queries: Tensor, keys: Tensor) -> Tensor:
    """L2 distances [m, n] of queries [m, inputs] from keys [n, inputs]."""
    # difference by difference: by products, near keys of large norm would lose all digits
    return torch.cdist(queries, keys, compute_mode="donot_use_mm_for_euclid_dist")
