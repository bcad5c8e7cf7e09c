"""Train a small LLaMA- or GPT-2-type model until it knows every fact of a world.

The recipe behind the shipped weights, and the way to a test-bed that knows the facts of your own file: a byte-level BPE
trained on the world's text, then next-token prediction on packed sentences, the tokens of the answers weighing more
because everything else (whose turn it is, which wording) is chance and cannot be learned.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rep_fast.errors import HparamError
from rep_fast.factworld.text import document
from rep_fast.factworld.world import FactSource
from rep_fast.models import EditableLM

BOS, EOS, PAD = "<s>", "</s>", "<pad>"


@dataclass(frozen=True)
class TrainingHparams:
    """Size of the model and schedule of its training.

    steps of batch × length tokens; answer_weight multiplies the loss of answer tokens; family "llama" or "gpt2".
    """

    family: str = "llama"
    vocabulary: int = 1024
    hidden_size: int = 128
    key_width: int = 512
    layers: int = 6
    heads: int = 4
    max_positions: int = 1024
    steps: int = 900
    batch: int = 16
    length: int = 128
    learning_rate: float = 4e-3
    answer_weight: float = 4.0

    def __post_init__(self) -> None:
        if self.family not in ("llama", "gpt2"):
            raise HparamError(f"factworld trains models of family llama or gpt2, not {self.family!r}")


@dataclass(frozen=True)
class TrainingStep:
    """Progress: step number (1-based), steps in all, mean loss per weighted token."""

    step: int
    steps: int
    loss: float


def train_tokenizer(world: FactSource, vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with BOS, trained on 4000 documents of the world."""
    rng = random.Random(f"{world.name}/tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[BOS, EOS, PAD], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator((document(world, rng) for _ in range(4000)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def train(
    world: FactSource,
    hparams: TrainingHparams,
    *,
    seed: int = 0,
    progress: Callable[[TrainingStep], None] | None = None,
) -> EditableLM:
    """Train a model on a world's sentences; deterministic for one seed, machine and thread count.

    Cost: 6 · parameters · steps · batch · length flops, some minutes on two cores with the default sizes.
    """
    tokenizer = train_tokenizer(world, hparams.vocabulary)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _new_model(hparams)
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=hparams.learning_rate, betas=(0.9, 0.98), weight_decay=0.05, fused=True
    )
    batches = _batches(world, tokenizer, hparams, seed)
    model.train()
    for step, (ids, weights) in enumerate(islice(batches, hparams.steps)):
        for group in optimiser.param_groups:
            group["lr"] = hparams.learning_rate * _schedule(step, hparams.steps)
        loss = _weighted_loss(model(input_ids=ids, use_cache=False).logits, ids, weights)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if progress is not None:
            progress(TrainingStep(step + 1, hparams.steps, float(loss.detach())))
    return EditableLM(model.eval().requires_grad_(False), tokenizer, name=world.name)


def recall(lm: EditableLM, facts: list[tuple[str, str]]) -> float:
    """Share of (prompt, answer) pairs whose every answer token is the arg-max, teacher-forced."""
    known = 0
    for begin in range(0, len(facts), 128):
        answers = [lm.answer(prompt, answer) for prompt, answer in facts[begin : begin + 128]]
        logits = lm.logits(lm.encode([a.input_ids for a in answers]), at=[a.positions for a in answers])
        predicted = logits.argmax(dim=-1).split([a.n_targets for a in answers])
        known += sum(tuple(p.tolist()) == a.target_ids for p, a in zip(predicted, answers, strict=True))
    return known / max(1, len(facts))


def _new_model(hparams: TrainingHparams) -> Any:
    shared: dict[str, Any] = {"vocab_size": hparams.vocabulary, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    if hparams.family == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                n_embd=hparams.hidden_size, n_inner=hparams.key_width, n_layer=hparams.layers, n_head=hparams.heads,
                n_positions=hparams.max_positions, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **shared,
            )
        )  # fmt: skip
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hparams.hidden_size, intermediate_size=hparams.key_width, num_hidden_layers=hparams.layers,
            num_attention_heads=hparams.heads, num_key_value_heads=hparams.heads,
            max_position_embeddings=hparams.max_positions, tie_word_embeddings=False, **shared,
        )
    )  # fmt: skip


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up over the first 100 steps, cosine down to zero."""
    return min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _batches(
    world: FactSource, tokenizer: PreTrainedTokenizerFast, hparams: TrainingHparams, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (ids [batch, length], loss weights [batch, length])."""
    rng = random.Random(f"{world.name}/training/{seed}")
    while True:
        rows = [_packed_row(world, tokenizer, hparams, rng) for _ in range(hparams.batch)]
        yield torch.tensor([ids for ids, _ in rows]), torch.tensor([weights for _, weights in rows])


def _packed_row(
    world: FactSource, tokenizer: PreTrainedTokenizerFast, hparams: TrainingHparams, rng: random.Random
) -> tuple[list[int], list[float]]:
    """BOS and sentences one after the other up to the length, the last one cut."""
    ids, weights = [tokenizer.bos_token_id], [1.0]
    while len(ids) < hparams.length:
        sentence = world.sentence(rng)
        prompt = tokenizer(sentence.prompt, add_special_tokens=False)["input_ids"]
        whole = tokenizer(sentence.text, add_special_tokens=False)["input_ids"]
        # the full stop after the answer is one token; filler has no answer to weigh
        n_answer = len(whole) - 1 - len(prompt) if sentence.answer else 0
        ids += whole
        weights += [1.0] * (len(whole) - 1 - n_answer) + [hparams.answer_weight] * n_answer + [1.0]
    return ids[: hparams.length], weights[: hparams.length]


def _weighted_loss(logits: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    losses = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    wanted = weights[:, 1:].flatten()
    return (losses * wanted).sum() / wanted.sum()
