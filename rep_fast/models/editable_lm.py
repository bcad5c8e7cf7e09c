"""EditableLM: a Hugging Face causal LM, its tokenizer and its family's layout under one roof.

The only place of the package that touches Hugging Face modules. Everything above speaks of layers, keys and values.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from rep_fast.errors import FingerprintError, LayerError, OutputError, PromptError, TokenizationError
from rep_fast.models import fingerprint as fingerprints
from rep_fast.models import generation, loading, resume, tokens
from rep_fast.models.batch import Batch
from rep_fast.models.families import Layout, layout_for
from rep_fast.models.forward_pass import ForwardPass
from rep_fast.models.hooks import Captured, captured_at, run_until, watch
from rep_fast.models.layered import LayeredModel
from rep_fast.models.resume import SuffixState
from rep_fast.models.sites import Site
from rep_fast.models.tokens import Answer, Located
from rep_fast.models.transfer import sent
from rep_fast.quiet_hub import no_weight_bars

logger = logging.getLogger(__name__)

# padded tokens of one forward pass; longer inputs of `logits` and `keys` are run in pieces
MAX_TOKENS = 16384


class EditableLM(LayeredModel):
    """A causal LM that can be read, patched and edited by layer.

    model: Hugging Face causal LM; put in eval mode, its `requires_grad` flags are left alone. tokenizer: its tokenizer.
    name: shown in reports, default the config's name. layout: only for families that models/families.py does not list.
    active_edits: ledger kept by the edits room, empty while the model is clean.

    Raises:
        UnknownFamilyError: no layout for the model type. LayerError: the layout names a module the model lacks.
        TokenizationError: the tokenizer ends texts with an end-of-text token.
    """

    def __init__(self, model: Any, tokenizer: Any, *, name: str | None = None, layout: Layout | None = None) -> None:
        layout = layout or layout_for(getattr(model.config, "model_type", None))
        super().__init__(model.eval(), layout, name=name or getattr(model.config, "_name_or_path", "") or layout.family)
        self.tokenizer = tokenizer
        self.active_edits: list[Any] = []
        self._fingerprint: str | None = None
        self._whole_batch_hooks = 0
        self._forward_pass: ForwardPass | None = None
        self._check_tokenizer()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        device_map: Any = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        layout: Layout | None = None,
    ) -> EditableLM:
        """Load a model directory, a hub id, or the embedded model "factworld".

        dtype: a name or torch dtype; None keeps the stored one (float32 for the embedded models). device: None takes
        CUDA where there is one. device_map: handed to transformers instead of `device`.

        Raises:
            ModelLoadError, UnknownFamilyError, NonFiniteError, MissingDependencyError: see `loading.load_pretrained`.
        """
        model, tokenizer, layout = loading.load_pretrained(
            name_or_path,
            dtype=dtype,
            device=device,
            device_map=device_map,
            revision=revision,
            trust_remote_code=trust_remote_code,
            layout=layout,
        )
        return cls(model, tokenizer, name=str(name_or_path), layout=layout)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config, safetensors weights and tokenizer; `from_pretrained` reads them back to the same fingerprint.

        Merged edits are part of the weights.

        Raises:
            OutputError: edits are active by hook, which no weight file holds, or the directory cannot be written.
        """
        hooked = sum(handle.mode == "hook" for handle in self.active_edits)
        if hooked:
            raise OutputError(
                f"{hooked} active edits run beside the weights of {self.name} and would be missing in {directory}; "
                "write them in for good with edit.merge_into(lm), or undo them first"
            )
        try:
            with no_weight_bars():
                self.model.save_pretrained(directory)
            self.tokenizer.save_pretrained(directory)
        except OSError as error:
            raise OutputError(
                f"the model cannot be written to {directory}: {error}; choose another directory"
            ) from error

    # --- what the model is ---------------------------------------------------------------------------------------

    @property
    def pad_id(self) -> int:
        """Filler of right padding: pad, else eos, else 0. Never used to find lengths."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None and token < self.vocab_size:
                return int(token)
        return 0

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a generation."""
        found: set[int] = set()
        for token in (self.tokenizer.eos_token_id, getattr(self.config, "eos_token_id", None)):
            found.update(token if isinstance(token, (list, tuple)) else [] if token is None else [token])
        return frozenset(found)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of config, tokenizer and clean weights; taken on first use, which must precede the first edit.

        Raises:
            FingerprintError: first asked for while edits are active.
        """
        if self._fingerprint is None:
            if self.active_edits:
                raise FingerprintError(
                    f"the fingerprint of {self.name} was not taken before {len(self.active_edits)} edits were applied; "
                    f"undo them first"
                )
            self._fingerprint = fingerprints.fingerprint(self.model, self.config, self.tokenizer)
        return self._fingerprint

    def forget_fingerprint(self) -> None:
        """The weights were changed for good: the fingerprint is taken anew when next asked for."""
        self._fingerprint = None

    # --- text and tokens -----------------------------------------------------------------------------------------

    def encode(
        self, texts: str | Sequence[str | Sequence[int]], *, prompt_lengths: Sequence[int] | None = None
    ) -> Batch:
        """Right-padded batch on the model's device.

        Strings get the tokenizer's special tokens, rows of ids are taken as they are. prompt_lengths: tokens of each
        row before its target, where it has one.

        Raises:
            TokenizationError: an empty text, an id outside the vocabulary, or a text longer than the model's positions.
            PromptError: prompt lengths that do not fit the rows.
        """
        texts = [texts] if isinstance(texts, str) else texts
        ids = [tokens.encode_text(self.tokenizer, text) if isinstance(text, str) else list(text) for text in texts]
        vocabulary = self.vocab_size  # one look-up in the configuration, which costs as much as a row
        for number, row in enumerate(ids):
            if row and not 0 <= min(row) <= max(row) < vocabulary:
                outside = next(token for token in row if not 0 <= token < vocabulary)
                raise TokenizationError(
                    f"token id {outside} in text {number} lies outside the model's vocabulary of {vocabulary}; "
                    f"use the model's own tokenizer"
                )
        self.check_length(max(map(len, ids), default=0))
        return Batch.from_rows(ids, prompt_lengths=prompt_lengths, pad_id=self.pad_id, device=self.device)

    def locate(self, prompt: str, subject: str, *, strategy: str = "subject_last") -> Located:
        """Ids of `prompt` with `subject` in place of `{}`, and the position of the subject's token (methods §2.3).

        strategy: "subject_last", "subject_first", "subject_first_after_last" or "last".

        Raises:
            PromptError: `{}` not exactly once, or a blank subject.
        """
        return tokens.locate(self.tokenizer, prompt, subject, strategy=strategy)

    def locate_all(self, pairs: Sequence[tuple[str, str]]) -> list[Located]:
        """`locate` at the subject's last token for many (prompt with `{}`, subject), in one call of the tokenizer."""
        return tokens.locate_all(self.tokenizer, pairs)

    def answer(self, prompt: str, target: str, *, mode: str = "in_context") -> Answer:
        """Ids and positions for the target after a prompt (methods §2.4 item 4); see `tokens.answer`."""
        return tokens.answer(self.tokenizer, prompt, target, mode=mode)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def _check_tokenizer(self) -> None:
        ids = tokens.encode_text(self.tokenizer, "a")
        if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:
            raise TokenizationError(
                f"the tokenizer of {self.name} ends every text with {self.tokenizer.eos_token!r}; "
                f"load it with add_eos_token=False"
            )

    # --- reading and patching ------------------------------------------------------------------------------------

    @contextmanager
    def capture(self, sites: Sequence[tuple[str, int]]) -> Iterator[Captured]:
        """Record sites during the forward passes inside; `captured[site]` is [n, T, *] of the last pass.

        Tensors keep their autograd graph when grad is enabled. With all weights frozen a graph begins where something
        requires grad: patch a low site with `lambda x: x.detach().requires_grad_()` to start one there.
        """
        places = {Site(*site): self._place(site) for site in sites}
        with self._whole_batch(), captured_at(places) as captured:
            yield captured

    @contextmanager
    def patch(
        self, site: tuple[str, int], fn: Callable[[Tensor], Tensor], *, per_token: bool = False
    ) -> Iterator[None]:
        """Replace a site by `fn(tensor)` during the forward passes inside.

        fn: [n, T, *] → same shape; must not write in place. per_token: fn treats every token alike, so that `logits`
        and `keys` may still split large inputs. Hooks act in the order they were made.
        """
        module, at_input = self._place(site)
        with watch(module, fn, at_input=at_input):
            if per_token:
                yield
            else:
                with self._whole_batch():
                    yield

    @contextmanager
    def _whole_batch(self) -> Iterator[None]:
        self._whole_batch_hooks += 1
        try:
            yield
        finally:
            self._whole_batch_hooks -= 1

    # --- forward passes ------------------------------------------------------------------------------------------

    @property
    def forward_pass(self) -> ForwardPass:
        """For hooks: what is known of the rows that pass now.

        Raises:
            LayerError: none was announced, as in a resumed forward.
        """
        if self._forward_pass is None:
            raise LayerError(
                f"an active edit of {self.name} replaces a module's output by what the whole prompt holds, which a "
                f"resumed forward or a bare call of the model does not show; undo that edit first"
            )
        return self._forward_pass

    @contextmanager
    def telling(self, forward_pass: ForwardPass) -> Iterator[None]:
        """Announce the rows of the forward pass inside to hooks."""
        before, self._forward_pass = self._forward_pass, forward_pass
        try:
            yield
        finally:
            self._forward_pass = before

    def run_base(self, batch: Batch, *, cache: DynamicCache | None = None) -> Tensor:
        """Normalised hidden states [n, T, D] before the head."""
        self.check_length(batch.input_ids.shape[1])
        batch = batch.to(self.device)
        with self.telling(ForwardPass.of(batch)):
            return self.base(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                past_key_values=cache,
                use_cache=cache is not None,
            )[0]

    def logits(
        self,
        batch: Batch | Sequence[str | Sequence[int]],
        *,
        at: Sequence[Sequence[int]] | None = None,
        max_tokens: int = MAX_TOKENS,
    ) -> Tensor:
        """Logits [n, T, V], or only at `at[j]` of each row: [Σ len(at[j]), V], row after row.

        The head runs on the wanted positions only. Inputs above `max_tokens` padded tokens run in pieces of similar
        length, unless a capture or a patch is active that must see the whole batch.

        Raises:
            PromptError: `at` has another number of rows, or a position outside its row.
        """
        batch = self._as_batch(batch)
        if at is None:
            return self._all_logits(batch, max_tokens)
        self._check_positions(batch, at)
        pieces: list[Tensor | None] = [None] * batch.n_rows
        for rows in self._chunks(batch, max_tokens):
            hidden = self.run_base(batch.select(rows))
            counts = [len(at[row]) for row in rows]
            index = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(counts))
            columns = torch.tensor([position for row in rows for position in at[row]], dtype=torch.int64)
            logits = self.head(hidden[sent(index, hidden.device), sent(columns, hidden.device)])
            for row, piece in zip(rows, logits.split(counts), strict=True):
                pieces[row] = piece
        return torch.cat([piece for piece in pieces if piece is not None])

    def _all_logits(self, batch: Batch, max_tokens: int) -> Tensor:
        chunks = list(self._chunks(batch, max_tokens))
        if len(chunks) == 1:
            return self.head(self.run_base(batch))
        pieces: list[Tensor] = [torch.empty(0)] * batch.n_rows
        for rows in chunks:
            logits = self.head(self.run_base(batch.select(rows)))
            padding = batch.input_ids.shape[1] - logits.shape[1]
            for row, piece in zip(rows, nn.functional.pad(logits, (0, 0, 0, padding)), strict=True):
                pieces[row] = piece
        return torch.stack(pieces)

    @torch.no_grad()
    def keys(
        self,
        batch: Batch | Sequence[str | Sequence[int]],
        layers: int | Sequence[int],
        *,
        positions: Sequence[int] | Tensor | None = None,
        max_tokens: int = MAX_TOKENS,
    ) -> dict[int, Tensor]:
        """Keys of layers, without gradient: layer → [n, M] at `positions` [n], else [n_tokens, M] of all real tokens.

        float32, or float64 from a float64 model; all tokens come row after row, pads dropped. The forward stops at the
        deepest layer's key. An active edit's adapters act on keys before they are read here.
        """
        batch = self._as_batch(batch)
        wanted = [Site("key", self.check_layer(layer)) for layer in ([layers] if isinstance(layers, int) else layers)]
        if not wanted:
            raise LayerError("keys need at least one layer, got none")
        if positions is not None:
            positions = torch.as_tensor(positions).tolist()
            self._check_positions(batch, [[position] for position in positions])
        pieces: dict[Site, list[Tensor]] = {site: [torch.empty(0)] * batch.n_rows for site in wanted}
        for rows in self._chunks(batch, max_tokens):
            part = batch.select(rows)
            with self.capture(wanted) as seen:
                self._run_truncated(part, wanted)
            spans = [(0, length) for length in part.row_lengths]
            if positions is not None:
                spans = [(positions[row], positions[row] + 1) for row in rows]
            for site in wanted:
                found = seen[site]
                for number, (row, (begin, end)) in enumerate(zip(rows, spans, strict=True)):
                    pieces[site][row] = found[number, begin:end]
        return {site.layer: _widened(torch.cat(found)) for site, found in pieces.items()}

    def hidden(self, batch: Batch | Sequence[str | Sequence[int]], layer: int) -> Tensor:
        """Residual stream [n, T, D] leaving `layer`; nothing above it is computed."""
        site = Site("hidden", self.check_layer(layer))
        with self.capture([site]) as seen:
            self._run_truncated(self._as_batch(batch), [site])
        return seen[site]

    def read(
        self, batch: Batch | Sequence[str | Sequence[int]], sites: Sequence[tuple[str, int]]
    ) -> Mapping[Site, Tensor]:
        """Any sites of one truncated forward: site → [n, T, *]."""
        wanted = [Site(*site) for site in sites]
        with self.capture(wanted) as seen:
            self._run_truncated(self._as_batch(batch), wanted)
        return {site: seen[site] for site in wanted}

    def _run_truncated(self, batch: Batch, sites: Sequence[Site]) -> None:
        """Run up to the deepest of `sites`; the caller's hooks on it have fired by then."""
        module, at_input = self._last_place(sites)
        run_until(module, lambda: self.run_base(batch), at_input=at_input)

    def suffix_state(self, batch: Batch, layer: int, starts: Sequence[int] | Tensor) -> SuffixState:
        """Everything that stays constant while values at `layer`, tokens `starts` [n], are optimised.

        One forward without gradient; see `resume.SuffixState` for what it keeps.

        Raises:
            PromptError: a start outside its row. LayerError: no such layer, or an attention without explicit masks.
        """
        return resume.suffix_state(self, batch, layer, starts)

    def resume(
        self,
        state: SuffixState,
        hidden: Tensor,
        *,
        at: Sequence[Sequence[int]],
        read_layers: Sequence[int] | None = None,
    ) -> Tensor:
        """Logits [Σ, V] at absolute positions `at[j]`, from the residual stream `hidden` [n, S, D] leaving the layer.

        Equals the full forward in which `state.layer` hands on `hidden`; differentiable in `hidden` only: the model's
        weights gather no gradient. Runs the layers above, the suffix tokens, and the head at `at`. read_layers: per row
        the layer whose residual stream goes through final norm and head, default the last.

        Raises:
            PromptError: a position before its row's start or beyond its end. LayerError: a layer below the state's.
        """
        return resume.resume(self, state, hidden, at=at, read_layers=read_layers)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 20,
        top_k: int | None = None,
        seed: int | None = None,
    ) -> str:
        """The prompt's text with its continuation, special tokens left out.

        Greedy; with `top_k` sampled from the best k tokens, repeatably when `seed` is given. Passes through every
        active hook and ends at the end-of-text token.
        """
        ids = self.generate_ids(prompt, max_new_tokens=max_new_tokens, top_k=top_k, seed=seed)
        return self.decode(ids)

    def generate_ids(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 20,
        top_k: int | None = None,
        seed: int | None = None,
    ) -> tuple[int, ...]:
        """Ids of the prompt followed by the new ones; see `generate`."""
        prompt_ids = self.encode([prompt]).rows()[0]
        return tuple(generation.generate_ids(self, prompt_ids, max_new_tokens=max_new_tokens, top_k=top_k, seed=seed))

    # --- shared by the passes ------------------------------------------------------------------------------------

    def _as_batch(self, batch: Batch | Sequence[str | Sequence[int]]) -> Batch:
        return batch.to(self.device) if isinstance(batch, Batch) else self.encode(batch)

    def _chunks(self, batch: Batch, max_tokens: int) -> Iterator[list[int]]:
        if self._whole_batch_hooks or batch.input_ids.numel() <= max_tokens:
            return iter([list(range(batch.n_rows))])
        return batch.chunks(max_tokens)

    def _check_positions(self, batch: Batch, at: Sequence[Sequence[int]]) -> None:
        if len(at) != batch.n_rows:
            raise PromptError(f"positions were given for {len(at)} rows, the batch has {batch.n_rows}")
        for row, (positions, length) in enumerate(zip(at, batch.row_lengths, strict=True)):
            for position in positions:
                if not 0 <= position < length:
                    raise PromptError(f"position {position} of row {row} lies outside its {length} tokens")


def _widened(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
