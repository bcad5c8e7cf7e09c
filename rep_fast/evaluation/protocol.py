"""The choices behind a number: how targets are tokenised, which prompts are asked, how edits are applied."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from rep_fast.facts import EditCase, PerturbedCase, TextSource, perturb
from rep_fast.models import EditableLM
from rep_fast.presets import Preset, from_flat_mapping


@dataclass(frozen=True)
class Protocol:
    """Choices that change numbers, all of them part of a run's settings.

    Attributes:
        target_tok: "in_context" or "standalone" target tokenisation (methods §2.4).
        n_words: whitespace-separated words of a long context.
        long_in, long_out: long contexts on each side.
        shuffle_join: "decode" or "raw" (methods §8.2).
        mode: how edits are applied, "hook" or "merge".
        compose: how the adapters of stacked edits act together in a layer, "chain", "argmax" or "sum" (methods §6.5).
        record_order: "file", or "seed": each seed shuffles the records before they are grouped (methods §10).
        generated_tokens: length of the texts that fluency and consistency are measured on, the prompt included; 0
            generates none, the papers take 100.
        edited_neighbours: what becomes of neighbour prompts that ask, word for word, what the group edits, written yet
            or not: "drop" leaves them out of every metric of neighbours and counts them, "ask" counts a kept old answer
            as locality like everywhere else, as the published code does.
    """

    target_tok: str = "in_context"
    n_words: int = 300
    long_in: int = 5
    long_out: int = 5
    shuffle_join: Literal["decode", "raw"] = "decode"
    mode: Literal["hook", "merge"] = "hook"
    compose: Literal["chain", "argmax", "sum"] = "chain"
    record_order: Literal["file", "seed"] = "file"
    generated_tokens: int = 0
    edited_neighbours: Literal["drop", "ask"] = "drop"

    @classmethod
    def of_preset(cls, preset: Preset) -> Protocol:
        """The choices of a preset's section `evaluation`."""
        made: Protocol = from_flat_mapping(cls, preset.section("evaluation"), where=f"preset {preset.name}")
        return made


DEFAULT_PROTOCOL = Protocol()
# Choices that runs before them did not write down, with what those runs did.
NOT_WRITTEN_DOWN = {"edited_neighbours": "drop"}


def perturb_case(
    lm: EditableLM, case: EditCase, *, text: TextSource | None, seed: int, protocol: Protocol = DEFAULT_PROTOCOL
) -> PerturbedCase:
    """The perturbed prompts of a case as evaluation asks them (methods §8), the same for the same seed."""
    return perturb(
        case,
        encode=partial(lm.tokenizer.encode, add_special_tokens=False),
        decode=lm.tokenizer.decode,
        text=text,
        seed=seed,
        n_words=protocol.n_words,
        n_long_in=protocol.long_in,
        n_long_out=protocol.long_out,
        join=protocol.shuffle_join,
        token_strings=lm.tokenizer.convert_ids_to_tokens,
    )
