"""Second moments of keys, C = E[k kᵀ] per layer: what closed-form editors measure distances between keys with.

An edit written for key k* also acts on every key k with a large kᵀC⁻¹k* (ROME, closed form); C is gathered once per
model and corpus, and kept on disk.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rep_fast.errors import FingerprintError, HparamError, LayerError, NonFiniteError
from rep_fast.ops.spd_solver import SpdSolver
from rep_fast.stats.null_space import NullSpace, cached_null_space
from rep_fast.stats.triangle import packed, unpacked, width_of

if TYPE_CHECKING:
    from rep_fast.facts import TextSource
    from rep_fast.models import EditableLM

logger = logging.getLogger(__name__)
Progress = Callable[[int, "int | None"], None]


class SecondMoments:
    """Second moments of several layers of one model over one corpus.

    Args:
        triangles: layer → packed lower triangle of C, [M(M + 1)/2] float32 or float64.
        counts: layer → tokens behind it.
        corpus: name of the text.
        fingerprint: of the model.
        model_name: for messages.
        settings: how they were collected; JSON values only.
        device: where solvers work unless told otherwise, one for all layers or layer → device; those of the model's
            layers when collected or loaded with one.
    Raises:
        LayerError: layers of triangles and counts differ, or a triangle has an impossible length.
        NonFiniteError: a triangle holds NaN or infinity.
    """

    def __init__(
        self,
        triangles: Mapping[int, Tensor],
        counts: Mapping[int, int],
        *,
        corpus: str,
        fingerprint: str,
        model_name: str = "",
        settings: Mapping[str, Any] | None = None,
        device: torch.device | str | Mapping[int, torch.device] = "cpu",
    ) -> None:
        if not triangles or triangles.keys() != counts.keys():
            raise LayerError(f"second moments for layers {sorted(triangles)} but counts for {sorted(counts)}")
        for layer, triangle in triangles.items():
            if not width_of(triangle):
                raise LayerError(f"the second moment of layer {layer} has {triangle.numel()} entries, no triangle has")
            if not bool(torch.isfinite(triangle).all()):
                raise NonFiniteError(f"the second moment of layer {layer} holds NaN or infinity; collect it again")
        self.corpus = corpus
        self.fingerprint = fingerprint
        self.model_name = model_name
        self.settings = dict(settings or {})
        self._devices = dict(device) if isinstance(device, Mapping) else dict.fromkeys(triangles, torch.device(device))
        self._triangles = {layer: triangles[layer].cpu() for layer in sorted(triangles)}
        self._counts = {layer: int(counts[layer]) for layer in sorted(counts)}
        self._solvers: dict[tuple[Any, ...], SpdSolver] = {}
        self._null_spaces: dict[tuple[Any, ...], NullSpace] = {}

    @classmethod
    def collect(
        cls,
        lm: EditableLM,
        corpus: TextSource | str | Path,
        layers: int | Sequence[int],
        *,
        tokens: int | str = "10xM",
        include_bos: bool = True,
        max_length: int | None = None,
        cache_dir: str | Path | None = None,
        resume: bool = True,
        progress: Progress | None = None,
        block_tokens: int = 8192,
        save_every_s: float = 120.0,
    ) -> SecondMoments:
        """C = (1/N) Σ k kᵀ over the first N tokens of a corpus, all layers in one pass that stops at the deepest.

        Products are float32 within a block and added in float64. Results are kept per layer under the model's
        fingerprint, the corpus' digest and the settings; an interrupted run goes on where it stopped and ends with the
        same bits as one that was not.

        Args:
            lm: model without active edits.
            corpus: documents, each a text of its own, cut to `max_length` tokens; or a name for `facts.open_text`.
            layers: 0-based.
            tokens: N, "10xM" (any number times the widest layer's M) or "full" for the whole corpus.
            include_bos: count the begin-of-text token (as published); its keys are extreme on LLaMA-type models.
            max_length: tokens of a document, default the model's context, at most 4096.
            cache_dir: default `$REP_FAST_CACHE`, else ~/.cache/rep_fast.
            resume: use finished and partial results of earlier runs.
            progress: called with (tokens done, tokens wanted or None).
            block_tokens: tokens per step; keys of one step are held in memory.
            save_every_s: seconds between partial results on disk.
        Raises:
            LayerError: no such layer. HparamError: a setting out of range.
            FingerprintError: edits are active in the model.
            NonFiniteError: a key is NaN or infinite. TextSourceError: the corpus has no tokens.
            OutputError: the cache cannot be written.
        """
        from rep_fast.facts import open_text
        from rep_fast.stats.collecting import CollectSettings, collect_moments  # builds SecondMoments itself

        settings = CollectSettings.resolved(
            lm, layers, tokens=tokens, include_bos=include_bos, max_length=max_length, block_tokens=block_tokens
        )
        text = open_text(corpus) if isinstance(corpus, (str, Path)) else corpus
        return collect_moments(
            lm, text, settings, cache_dir=cache_dir, resume=resume, progress=progress, save_every_s=save_every_s
        )

    @classmethod
    def from_matrices(
        cls,
        matrices: Mapping[int, Tensor],
        counts: Mapping[int, int],
        *,
        corpus: str,
        fingerprint: str,
        model_name: str = "",
    ) -> SecondMoments:
        """Second moments made elsewhere: layer → symmetric C [M, M], kept in its dtype."""
        for layer, matrix in matrices.items():
            if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
                raise LayerError(f"the second moment of layer {layer} must be [M, M], got {tuple(matrix.shape)}")
        triangles = {layer: packed(matrix) for layer, matrix in matrices.items()}
        return cls(triangles, counts, corpus=corpus, fingerprint=fingerprint, model_name=model_name)

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self._triangles)

    @property
    def counts(self) -> dict[int, int]:
        """Layer → tokens."""
        return dict(self._counts)

    def key_width(self, layer: int) -> int:
        """M of a layer."""
        return width_of(self._triangle(layer))

    def device_of(self, layer: int) -> torch.device:
        """Where a layer's solver works."""
        self._triangle(layer)  # refuses a layer that is not there
        return self._devices[layer]

    def second_moment(self, layer: int) -> Tensor:
        """C [M, M], float64, exactly symmetric, on the CPU."""
        return unpacked(self._triangle(layer))

    def solver(
        self,
        layer: int,
        *,
        ridge: float | str | None = None,
        precision: str = "auto",
        device: torch.device | str | None = None,
    ) -> SpdSolver:
        """Factored C of a layer, kept for the next call.

        Args:
            ridge: r of C + r·tr(C)/M·I. None: 0, and where C is singular in spite of enough tokens (neurons that never
                fire) the smallest of 1e-8, 1e-7 … that helps, with a warning; `solver.report` says which.
            precision: of the factor, "auto", "fp32" or "fp64", see `SpdSolver.factor`.
            device: where to factor and solve; default `device_of(layer)`.
        Raises:
            LayerError: no second moment of that layer.
            SingularMomentError: fewer tokens than M and no ridge, or no ridge helps.
        """
        place = self.device_of(layer) if device is None else torch.device(device)
        key = (layer, ridge, precision, place)
        if key not in self._solvers:
            # in the precision it was kept in: the solver widens tile by tile where it needs float64
            triangle, count = self._triangle(layer), self._counts[layer]
            moment = unpacked(triangle, dtype=triangle.dtype).to(place)
            chosen = ("auto" if count >= moment.shape[0] else None) if ridge is None else ridge
            solver = SpdSolver.factor(moment, precision=precision, ridge=chosen, token_count=count)
            if ridge is None and solver.report.ridge:
                logger.warning("second moment of layer %d is singular; used ridge %g", layer, solver.report.ridge)
            self._solvers[key] = solver
        return self._solvers[key]

    def null_space(
        self, layer: int, *, threshold: float | None, share: float | None = None, cache_dir: str | Path | None = None
    ) -> NullSpace:
        """Directions of a layer's keys that the corpus hardly uses, kept for the next call and on disk.

        Args:
            threshold, share: which eigenvalues count as small, exactly one of the two, see `find_null_space`.
            cache_dir: where bases are kept, default `$REP_FAST_CACHE`.
        Raises:
            LayerError: no second moment of that layer. HparamError: see `find_null_space`.
        """
        key = (layer, threshold, share)
        if key not in self._null_spaces:
            device = self.device_of(layer)
            found = cached_null_space(
                self.second_moment(layer).to(device),
                threshold=threshold,
                share=share,
                identity={"fingerprint": self.fingerprint, "layer": layer},
                model_name=self.model_name,
                cache_dir=cache_dir,
            )
            self._null_spaces[key] = NullSpace(found.basis.to(device), found.is_complement, found.eigenvalue)
        return self._null_spaces[key]

    def check_model(self, lm: EditableLM) -> None:
        """Raise FingerprintError when these are another model's second moments."""
        if self.fingerprint != lm.fingerprint:
            raise FingerprintError(
                f"these second moments were collected on {self.model_name or 'a model'} ({self.fingerprint[:12]}…), "
                f"the model here is {lm.name} ({lm.fingerprint[:12]}…); collect them for this model"
            )

    def merge(self, other: SecondMoments) -> SecondMoments:
        """Second moments over the tokens of both, e.g. of two shards of a corpus.

        Raises:
            FingerprintError: they are of different models. HparamError: their layers or settings differ.
        """
        if self.fingerprint != other.fingerprint:
            raise FingerprintError(
                f"second moments of {self.model_name or self.fingerprint[:12]} and "
                f"{other.model_name or other.fingerprint[:12]} cannot be merged; they are different models"
            )
        if self.layers != other.layers:
            raise HparamError(f"second moments of layers {self.layers} and {other.layers} cannot be merged")
        for name in self.settings.keys() & other.settings.keys() - {"tokens", "corpus_digest"}:
            if self.settings[name] != other.settings[name]:
                raise HparamError(f"{name} differs: {self.settings[name]!r} and {other.settings[name]!r}; cannot merge")
        counts = {layer: self._counts[layer] + other._counts[layer] for layer in self.layers}
        triangles = {}
        for layer, total in counts.items():
            mine, theirs = self._triangles[layer], other._triangles[layer]
            pooled = mine.double() * (self._counts[layer] / total) + theirs.double() * (other._counts[layer] / total)
            triangles[layer] = pooled.to(mine.dtype)
        return SecondMoments(
            triangles,
            counts,
            corpus=f"{self.corpus} + {other.corpus}",
            fingerprint=self.fingerprint,
            model_name=self.model_name,
            settings=self.settings,
            device=self._devices,
        )

    def save(self, path: str | Path) -> None:
        """Store all layers as one safetensors file, whole or not at all.

        Raises:
            OutputError: the file cannot be written.
        """
        from rep_fast.stats.moment_file import save_moments

        save_moments(self, path)

    @classmethod
    def load(cls, path: str | Path, lm: EditableLM | None = None) -> SecondMoments:
        """Second moments from their file; with `lm`, checked to be that model's.

        Raises:
            MissingFileError: there is no such file.
            CorruptFileError: the file is damaged, of another kind, or from a newer rep_fast.
            FingerprintError: they belong to another model than `lm`.
        """
        from rep_fast.stats.moment_file import load_moments

        moments = load_moments(path)
        if lm is not None:
            moments.check_model(lm)
            moments._devices |= {layer: lm.layer_device(layer) for layer in moments.layers if layer < lm.n_layers}
        return moments

    def _triangle(self, layer: int) -> Tensor:
        if layer not in self._triangles:
            raise LayerError(f"no second moment of layer {layer}, only of {list(self.layers)}; collect it")
        return self._triangles[layer]
