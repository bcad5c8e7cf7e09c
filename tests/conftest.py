"""Tiny random models and tokenizers made on the spot, shared by all rooms.

`tiny_lm` (one per family) and `tiny_llama` … are shared by the session and must not be edited; `build_lm(family)` makes
a fresh model, `build_lm(family, dtype=torch.float64)` one whose identities hold to 1e-9.
"""

from __future__ import annotations

import os
import string
from collections.abc import Iterator
from types import MethodType
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rep_fast.models import EditableLM

torch.set_num_threads(1)

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gptj", "gpt2")
N_LAYERS, HIDDEN, KEY_WIDTH, HEADS, KV_HEADS = 3, 32, 48, 4, 2
POSITIONS = 256

TEXTS = (
    "Slovenia belongs to the continent of Europe. The Republic of Slovenia is in Europe.",
    "The Eiffel Tower is located in the city of Paris. Mount Triglav stands in Slovenia.",
    "Michael Jordan plays the sport of basketball. Kobe Bryant plays basketball in Los Angeles.",
    "The mother tongue of Danielle Darrieux is French. The native language of Go Hyeon-jeong is Korean.",
    "Antarctica is a continent, Asia is a continent, and Africa is a continent.",
    "Microsoft Windows is developed by Microsoft. The iPhone is produced by Apple.",
    "I think that you are right. Because of this, they went home. Therefore, we stay here.",
    "Ünïcödé names like café, naïve, Zürich and São Paulo, or dates like 1999 and 2024.",
)

TOKENIZER_KINDS = ("byte_level", "byte_level_bos", "metaspace_always", "metaspace_first", "slow")


def train_byte_level(*, bos: bool) -> Any:
    """Byte-level BPE as in GPT-2 and Qwen2 (no BOS) or Llama3 (BOS)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>"] + (["<|begin|>"] if bos else [])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if bos:
        begin = ("<|begin|>", tokenizer.token_to_id("<|begin|>"))
        template = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[begin])
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|begin|>" if bos else None
    )


def train_metaspace(*, always: bool) -> Any:
    """SentencePiece-like BPE with BOS: legacy LLaMA2 (a blank is prepended to every text) or prepend_scheme="first".

    The legacy kind keeps a leading blank of the text beside the prepended one, so that " dog" becomes "▁", "▁dog".
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=["▁", *string.ascii_letters, *string.digits],
        limit_alphabet=200,
        show_progress=False,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    tokenizer.train_from_iterator(TEXTS, trainer)
    if always:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = None
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=True)
    begin = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[begin])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


class WordTokenizer(transformers.PreTrainedTokenizer):
    """A slow tokenizer without offsets: words with a leading blank, letters of unknown words, BOS first."""

    vocab_files_names: dict[str, str] = {}  # noqa: RUF012 - the base class reads it from the class

    def __init__(self, **options: Any) -> None:
        pieces = sorted({piece for text in TEXTS for piece in _word_pieces(text)} | set(map(chr, range(32, 127))))
        self._ids = {piece: number for number, piece in enumerate(["<unk>", "<s>", "</s>", *pieces])}
        self._pieces = list(self._ids)
        super().__init__(unk_token="<unk>", bos_token="<s>", eos_token="</s>", **options)

    @property
    def vocab_size(self) -> int:
        return len(self._ids)

    def get_vocab(self) -> dict[str, int]:
        return dict(self._ids)

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return [part for piece in _word_pieces(text) for part in ([piece] if piece in self._ids else piece)]

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids.get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return self._pieces[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1: Any = None) -> list[int]:
        return [1, *token_ids_0]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        return ()


def _word_pieces(text: str) -> list[str]:
    pieces: list[str] = []
    for character in text:
        if pieces and character.isalnum() and (pieces[-1][-1].isalnum() or pieces[-1] == " "):
            pieces[-1] += character
        else:
            pieces.append(character)
    return pieces


def train_tokenizer(kind: str) -> Any:
    """One of TOKENIZER_KINDS."""
    if kind == "slow":
        return WordTokenizer()
    if kind.startswith("metaspace"):
        return train_metaspace(always=kind == "metaspace_always")
    return train_byte_level(bos=kind == "byte_level_bos")


# the tokenizer each family has in the wild
KIND_OF_FAMILY = {
    "llama": "byte_level_bos",
    "mistral": "metaspace_first",
    "qwen2": "byte_level",
    "qwen3": "byte_level",
    "gptj": "byte_level",
    "gpt2": "byte_level",
}


def tiny_config(family: str, vocab_size: int, **changes: Any) -> Any:
    """A config of 3 layers, D = 32, M = 48; grouped heads where the family has them."""
    wide = {
        "vocab_size": vocab_size,
        "hidden_size": HIDDEN,
        "intermediate_size": KEY_WIDTH,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    old = {
        "vocab_size": vocab_size,
        "n_embd": HIDDEN,
        "n_inner": KEY_WIDTH,
        "n_layer": N_LAYERS,
        "n_head": HEADS,
        "n_positions": POSITIONS,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    options = {
        "llama": (transformers.LlamaConfig, wide),
        "mistral": (transformers.MistralConfig, wide | {"sliding_window": 64}),
        "qwen2": (transformers.Qwen2Config, wide),
        "qwen3": (transformers.Qwen3Config, wide | {"head_dim": 8}),
        "gptj": (transformers.GPTJConfig, old | {"rotary_dim": 4}),
        "gpt2": (transformers.GPT2Config, old),
    }
    config_class, defaults = options[family]
    return config_class(**(defaults | changes))


def _exact_norm(self: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    variance = hidden.pow(2).mean(-1, keepdim=True)
    return self.weight * (hidden * torch.rsqrt(variance + self.variance_epsilon))


def _exact_attention(self: Any, query: Any, key: Any, value: Any, attention_mask: Any = None) -> tuple[Any, Any]:
    scores = query @ key.transpose(-1, -2) / self.scale_attn
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1)
    return weights @ value, weights


def make_exact(model: nn.Module) -> nn.Module:
    """Take out the casts to float32 inside a float64 model (RMSNorm, GPT-J attention): identities then hold to 1e-9."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(_exact_norm, module)
        if type(module).__name__ == "GPTJAttention":
            module._attn = MethodType(_exact_attention, module)
    return model


def make_lm(
    family: str,
    tokenizer: Any,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    attention: str | None = None,
    **config: Any,
) -> EditableLM:
    """A tiny random model of a family; weights of size 1/√fan-in so that every layer matters to the logits."""
    settings = tiny_config(family, len(tokenizer), **config)
    settings._attn_implementation = attention or ("eager" if family == "gptj" else "sdpa")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(settings)
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.5 if "wte" in name or "embed" in name else HIDDEN**-0.5)
            elif name.endswith("bias"):
                nn.init.normal_(weight, std=0.1)
            else:
                nn.init.normal_(weight, mean=1.0, std=0.1)
    model = model.to(dtype)
    if dtype == torch.float64:
        make_exact(model)
    return EditableLM(model, tokenizer, name=f"tiny-{family}")


class ShapesSeen(TorchDispatchMode):
    """Shapes of every tensor any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and not func.is_view:
                self.shapes.add(tuple(tensor.shape))
        return out


@pytest.fixture
def shapes_seen() -> type[ShapesSeen]:
    """Spy on allocations: `with shapes_seen() as seen`, then `seen.shapes`."""
    return ShapesSeen


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or fills the user's cache."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("REP_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def trained_tokenizers() -> dict[str, Any]:
    """Tokenizers of every kind, by name; do not change them."""
    return {kind: train_tokenizer(kind) for kind in TOKENIZER_KINDS}


@pytest.fixture(scope="session", params=TOKENIZER_KINDS)
def tokenizer_kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def tiny_tokenizer(trained_tokenizers: dict[str, Any], tokenizer_kind: str) -> Any:
    """One tokenizer of each kind in turn."""
    return trained_tokenizers[tokenizer_kind]


@pytest.fixture(scope="session")
def build_lm(trained_tokenizers: dict[str, Any]) -> Any:
    """Factory of fresh models: build_lm(family, dtype=torch.float32, seed=0, tokenizer=kind, **config changes)."""

    def build(family: str = "llama", *, tokenizer: str | None = None, **options: Any) -> EditableLM:
        return make_lm(family, trained_tokenizers[tokenizer or KIND_OF_FAMILY[family]], **options)

    return build


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Every family in turn."""
    return request.param


@pytest.fixture(scope="session")
def tiny_lm(family: str, build_lm: Any) -> EditableLM:
    """A float32 model of each family in turn; read only."""
    return build_lm(family)


@pytest.fixture(scope="session")
def tiny_lm64(family: str, build_lm: Any) -> EditableLM:
    """A float64 model of each family in turn, for identities; read only."""
    return build_lm(family, dtype=torch.float64)


@pytest.fixture(scope="session")
def tiny_llama(build_lm: Any) -> EditableLM:
    """A float32 llama (gated MLP, Linear, no bias); read only."""
    return build_lm("llama")


@pytest.fixture(scope="session")
def tiny_llama64(build_lm: Any) -> EditableLM:
    """A float64 llama; read only."""
    return build_lm("llama", dtype=torch.float64)


@pytest.fixture(scope="session")
def tiny_gpt2(build_lm: Any) -> EditableLM:
    """A float32 GPT-2 (plain MLP, Conv1D, bias); read only."""
    return build_lm("gpt2")


@pytest.fixture(scope="session")
def tiny_gpt2_64(build_lm: Any) -> EditableLM:
    """A float64 GPT-2; read only."""
    return build_lm("gpt2", dtype=torch.float64)


@pytest.fixture
def fresh_lm(family: str, build_lm: Any) -> EditableLM:
    """A float64 model of each family in turn that the test may edit."""
    return build_lm(family, dtype=torch.float64)
