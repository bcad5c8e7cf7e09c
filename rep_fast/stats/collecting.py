"""Gathering second moments from text: block by block, resumable, the same bits however often it was interrupted.

Blocks are cut by the documents alone, never by time or interruption, and each block is either in the sums or not; so a
run that goes on from a partial result adds the same products in the same order.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from rep_fast.errors import (
    CorruptFileError,
    FingerprintError,
    HparamError,
    MissingFileError,
    NonFiniteError,
    OutputError,
    TextSourceError,
)
from rep_fast.facts import TextSource
from rep_fast.models import Batch, EditableLM
from rep_fast.models.tokens import encode_text
from rep_fast.models.transfer import sent
from rep_fast.ops.accumulate_moment import MomentSum, accumulate_moment
from rep_fast.stats.moment_file import (
    PartialMoments,
    cache_path,
    load_moments,
    load_partial,
    save_moments,
    save_partial,
)
from rep_fast.stats.second_moments import Progress, SecondMoments
from rep_fast.stats.triangle import packed

logger = logging.getLogger(__name__)

LONGEST_DOCUMENT = 4096  # contexts of 100 000 tokens and more would only cost memory here
BLOCKS_BETWEEN_LOOKS = 64  # on a GPU; a key that is not finite is found that much later


@dataclass(frozen=True)
class CollectSettings:
    """Everything a second moment depends on besides model and corpus.

    tokens: how many, None for the whole corpus.
    """

    layers: tuple[int, ...]
    tokens: int | None
    include_bos: bool
    max_length: int
    block_tokens: int

    @classmethod
    def resolved(
        cls,
        lm: EditableLM,
        layers: int | Sequence[int],
        *,
        tokens: int | str,
        include_bos: bool,
        max_length: int | None,
        block_tokens: int,
    ) -> CollectSettings:
        """Settings in numbers for this model.

        Raises:
            LayerError: no such layer. HparamError: no layers, or a number out of range.
        """
        wanted = [layers] if isinstance(layers, int) else layers
        chosen = tuple(sorted({lm.check_layer(layer) for layer in wanted}))
        if not chosen:
            raise HparamError("second moments need at least one layer, got none")
        if block_tokens < 1:
            raise HparamError(f"block_tokens={block_tokens} must be at least 1")
        context = getattr(lm.config, "max_position_embeddings", None) or LONGEST_DOCUMENT
        window = getattr(lm.config, "sliding_window", None) or LONGEST_DOCUMENT
        longest = min(context, window, LONGEST_DOCUMENT) if max_length is None else max_length
        if not 1 <= longest <= context:
            raise HparamError(f"max_length={longest} is out of range; the context of {lm.name} is {context} tokens")
        widest = max(lm.key_width(layer) for layer in chosen)
        return cls(chosen, _token_count(tokens, widest), include_bos, longest, block_tokens)


def _token_count(tokens: int | str, width: int) -> int | None:
    if tokens == "full":
        return None
    if isinstance(tokens, str) and (match := re.fullmatch(r"(\d+(?:\.\d+)?)xM", tokens)):
        tokens = round(float(match[1]) * width)
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise HparamError(f"tokens={tokens!r} is no number of tokens; use a positive integer, '10xM' or 'full'")
    return tokens


def collect_moments(
    lm: EditableLM,
    corpus: TextSource,
    settings: CollectSettings,
    *,
    cache_dir: str | Path | None,
    resume: bool,
    progress: Progress | None,
    save_every_s: float,
) -> SecondMoments:
    """Second moments from the cache where they are there, else collected; see `SecondMoments.collect`."""
    if lm.active_edits:
        raise FingerprintError(
            f"{lm.name} has {len(lm.active_edits)} active edits; undo them, second moments belong to the clean model"
        )
    store = _Cache(lm, corpus, settings, cache_dir)
    found = {layer: store.finished(layer) for layer in settings.layers} if resume else {}
    missing = tuple(layer for layer in settings.layers if found.get(layer) is None)
    if missing:
        store.check_writable()
        state = store.partial(missing) if resume else PartialMoments({})
        _run(lm, corpus, settings, missing, state, store, progress=progress, save_every_s=save_every_s)
        for layer in missing:
            found[layer] = store.finish(layer, state)
        store.partial_path(missing).unlink(missing_ok=True)
    parts = [moments for moments in found.values() if moments is not None]
    return SecondMoments(
        {moments.layers[0]: moments._triangle(moments.layers[0]) for moments in parts},
        {moments.layers[0]: moments.counts[moments.layers[0]] for moments in parts},
        corpus=corpus.name,
        fingerprint=lm.fingerprint,
        model_name=lm.name,
        settings=store.settings,
        device={layer: lm.layer_device(layer) for layer in settings.layers},
    )


class _Cache:
    """Finished layers, one file each, and the partial sums of a set of layers."""

    def __init__(
        self, lm: EditableLM, corpus: TextSource, settings: CollectSettings, cache_dir: str | Path | None
    ) -> None:
        self._lm = lm
        self._corpus = corpus
        self._cache_dir = cache_dir
        self.settings = {name: value for name, value in asdict(settings).items() if name != "layers"}
        self.settings["corpus_digest"] = corpus.digest

    def partial_path(self, layers: tuple[int, ...]) -> Path:
        return self._path(f"partial-{'-'.join(map(str, layers))}"[:60], layers)

    def check_writable(self) -> None:
        """Raise OutputError now rather than after hours of work."""
        directory = self._path("probe", ()).parent
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if not os.access(directory, os.W_OK):
                raise PermissionError("no permission to write")
        except OSError as error:
            raise OutputError(
                f"cannot keep second moments in {directory}: {error.strerror or error}; set REP_FAST_CACHE or cache_dir"
            ) from None

    def finished(self, layer: int) -> SecondMoments | None:
        path = self._path(f"layer{layer}", (layer,))
        try:
            return load_moments(path)
        except MissingFileError:
            return None
        except CorruptFileError as error:
            logger.warning("cached second moment is collected again: %s", error)
            return None

    def partial(self, layers: tuple[int, ...]) -> PartialMoments:
        try:
            state = load_partial(self.partial_path(layers))
        except MissingFileError:
            return PartialMoments({})
        except CorruptFileError as error:
            logger.warning("partial second moments are started over: %s", error)
            return PartialMoments({})
        logger.info("going on after %d documents and %d tokens", state.documents, state.tokens)
        return state

    def save_partial(self, layers: tuple[int, ...], state: PartialMoments) -> None:
        save_partial(state, self.partial_path(layers))

    def finish(self, layer: int, state: PartialMoments) -> SecondMoments:
        """Store the finished second moment of a layer, and return what a later run will read."""
        total = state.sums[layer]
        # float32 on disk, as published statistics are; float64 models keep float64
        dtype = torch.float64 if self._lm.dtype == torch.float64 else torch.float32
        triangle = (packed(total.lower) / total.count).to(dtype).cpu()
        moments = SecondMoments(
            {layer: triangle},
            {layer: total.count},
            corpus=self._corpus.name,
            fingerprint=self._lm.fingerprint,
            model_name=self._lm.name,
            settings=self.settings,
        )
        save_moments(moments, self._path(f"layer{layer}", (layer,)))
        return moments

    def _path(self, what: str, layers: tuple[int, ...]) -> Path:
        identity = {"fingerprint": self._lm.fingerprint, "layers": layers, **self.settings}
        return cache_path(self._cache_dir, model_name=self._lm.name, what=what, identity=identity)


def _run(
    lm: EditableLM,
    corpus: TextSource,
    settings: CollectSettings,
    layers: tuple[int, ...],
    state: PartialMoments,
    store: _Cache,
    *,
    progress: Progress | None,
    save_every_s: float,
) -> None:
    """Add the blocks that `state` does not hold yet; leaves a partial result behind when interrupted."""
    saved_at, saved_documents = time.monotonic(), state.documents
    consistent = True
    unread = _Unread(state)

    def add(block: _Block, keys: dict[int, Tensor]) -> None:
        nonlocal consistent
        consistent = False
        _add_block(state, block, keys)
        unread.read_at_times()
        consistent = True

    try:
        # in a thread of its own an update runs to its end even when the main thread is interrupted
        with ThreadPoolExecutor(max_workers=1) as worker:
            for block in _blocks(lm, corpus, settings, state):
                keys = lm.keys(Batch.from_rows(block.rows, pad_id=lm.pad_id, device=lm.device), list(layers))
                worker.submit(add, block, {layer: _narrowed(lm, rows) for layer, rows in keys.items()}).result()
                if progress is not None:
                    progress(state.tokens, settings.tokens)
                if time.monotonic() - saved_at >= save_every_s:
                    unread.read()
                    store.save_partial(layers, state)
                    saved_at, saved_documents = time.monotonic(), state.documents
            consistent = False
            unread.read()
            consistent = True
    except BaseException:
        if consistent and state.documents > saved_documents:
            store.save_partial(layers, state)
        raise
    _check_enough(lm, corpus, settings, layers, state)


def _narrowed(lm: EditableLM, keys: Tensor) -> Tensor:
    """On a GPU a 16-bit model's keys as it made them, for which there is a kernel."""
    return keys.to(lm.dtype) if keys.is_cuda and lm.dtype.itemsize == 2 else keys


def _check_enough(
    lm: EditableLM, corpus: TextSource, settings: CollectSettings, layers: Sequence[int], state: PartialMoments
) -> None:
    if not state.tokens:
        raise TextSourceError(f"text source {corpus.name!r} gave no tokens; use a longer text")
    widest = max(lm.key_width(layer) for layer in layers)
    if state.tokens < widest:
        logger.warning(
            "%s gave %d tokens, fewer than the key width M = %d: the second moment is singular; use a longer text",
            corpus.name,
            state.tokens,
            widest,
        )
    elif settings.tokens is not None and state.tokens < settings.tokens:
        logger.warning("%s gave %d tokens of the %d asked for", corpus.name, state.tokens, settings.tokens)


@dataclass
class _Block:
    """Documents of one step: token rows, which of their tokens count, and how many documents they used up."""

    rows: list[list[int]]
    first_counted: list[int]  # per row: 0, or 1 where a begin-of-text token is left out
    documents: int

    @property
    def n_tokens(self) -> int:
        return sum(len(row) - first for row, first in zip(self.rows, self.first_counted, strict=True))

    def mask(self, device: torch.device) -> Tensor | None:
        """[tokens] bool over the rows one after another, None when all count."""
        if not any(self.first_counted):
            return None
        counted = [
            place >= first
            for row, first in zip(self.rows, self.first_counted, strict=True)
            for place in range(len(row))
        ]
        return sent(torch.tensor(counted), device)


def _blocks(lm: EditableLM, corpus: TextSource, settings: CollectSettings, state: PartialMoments) -> Iterator[_Block]:
    """Blocks after the documents in `state`, until the tokens asked for; the last document is cut to hit them."""
    left = None if settings.tokens is None else settings.tokens - state.tokens
    block = _Block([], [], 0)
    for document in islice(iter(corpus), state.documents, None):
        if left is not None and left <= block.n_tokens:
            break
        block.documents += 1
        row = encode_text(lm.tokenizer, document)[: settings.max_length]
        first = int(not settings.include_bos and bool(row) and row[0] == lm.tokenizer.bos_token_id)
        if left is not None:
            row = row[: first + left - block.n_tokens]
        if len(row) > first:
            block.rows.append(row)
            block.first_counted.append(first)
        if sum(map(len, block.rows)) >= settings.block_tokens:
            yield block
            left = None if left is None else left - block.n_tokens
            block = _Block([], [], 0)
    if block.rows:
        yield block


def _add_block(state: PartialMoments, block: _Block, keys: dict[int, Tensor]) -> None:
    for layer, rows in keys.items():
        total = state.sums.get(layer) or MomentSum.zeros(rows.shape[1], device=rows.device)
        if total.lower.device != rows.device:
            total.lower = total.lower.to(rows.device)
        try:
            state.sums[layer] = accumulate_moment(total, rows, mask=block.mask(rows.device))
        except NonFiniteError as error:
            raise _nonfinite(layer, state.documents, state.documents + block.documents, error) from None
    state.documents += block.documents
    state.tokens += block.n_tokens


class _Unread:
    """Documents whose sums on a GPU nobody has looked at: looking waits for the device."""

    def __init__(self, state: PartialMoments) -> None:
        self._state, self._looked_at = state, state.documents
        self._blocks = 0

    def read_at_times(self) -> None:
        """A block was added; look after every `BLOCKS_BETWEEN_LOOKS`th."""
        self._blocks += 1
        if self._blocks % BLOCKS_BETWEEN_LOOKS == 0:
            self.read()

    def read(self) -> None:
        """Raise NonFiniteError where a key was not finite."""
        for layer, total in self._state.sums.items():
            try:
                total.settle()
            except NonFiniteError as error:
                raise _nonfinite(layer, self._looked_at, self._state.documents, error) from None
        self._looked_at = self._state.documents


def _nonfinite(layer: int, before: int, last: int, error: NonFiniteError) -> NonFiniteError:
    return NonFiniteError(f"layer {layer}, documents {before + 1} to {last}: {error}")
