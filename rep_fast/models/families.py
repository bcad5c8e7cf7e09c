"""Where each model family keeps its keys, values, attention and head: one entry per family.

A new family is one `Layout` in `FAMILIES` and one row in tests/conftest.py. A model of an unlisted family can be used
without touching this file: `EditableLM(model, tokenizer, layout=Layout(...))`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn

from rep_fast.errors import UnknownFamilyError


@dataclass(frozen=True)
class BlockInputs:
    """What a block needs besides the hidden states when only the suffix of each row is run.

    mask: [n, 1, S, P + S], boolean (sdpa: True = visible) or additive (eager). position_ids: [n, S] absolute positions.
    rotary: (cos, sin) of those positions, or None for families without rotary module. past: object with
    `update(key, value, layer)` that puts the cached prefix in front of the suffix.
    """

    mask: Tensor
    position_ids: Tensor
    rotary: tuple[Tensor, Tensor] | None
    past: Any


BlockRunner = Callable[[nn.Module, Tensor, BlockInputs], Any]


def run_rotary_block(block: nn.Module, hidden: Tensor, inputs: BlockInputs) -> Any:
    """Run one block of the llama kind, which is handed cos and sin from outside."""
    return block(
        hidden,
        attention_mask=inputs.mask,
        position_ids=inputs.position_ids,
        past_key_values=inputs.past,
        use_cache=True,
        position_embeddings=inputs.rotary,
    )


def run_gptj_block(block: nn.Module, hidden: Tensor, inputs: BlockInputs) -> Any:
    """Run one GPT-J block, which looks its rotary table up by position and calls the cache `layer_past`."""
    return block(
        hidden,
        layer_past=inputs.past,
        attention_mask=inputs.mask,
        position_ids=inputs.position_ids,
        use_cache=True,
    )


def run_gpt2_block(block: nn.Module, hidden: Tensor, inputs: BlockInputs) -> Any:
    """Run one GPT-2 block; learned positions were added below the first block, so none are needed here."""
    return block(hidden, past_key_values=inputs.past, attention_mask=inputs.mask, use_cache=True)


@dataclass(frozen=True)
class Layout:
    """Module paths of one family, relative to the causal LM (`base`, `layers`, `norm`, `head`, `rotary`) or to a layer.

    family: name shown to users. base: the module that maps token ids to normalised hidden states. layers: the list of
    decoder layers. norm, head: final norm and output projection. mlp, down, up, gate, attn_out: inside a layer; gate is
    None for a plain MLP. attn_in: the attention's first linears by name, ("q", path) … or one fused ("qkv", path).
    rotary: module called with (hidden, position_ids) -> (cos, sin), or None. run_block: how one layer is called in a
    resumed forward. fixed_positions: positions beyond the config's maximum do not exist.
    """

    family: str
    base: str
    layers: str
    norm: str
    head: str
    mlp: str
    down: str
    up: str
    gate: str | None
    attn_out: str
    attn_in: tuple[tuple[str, str], ...]
    rotary: str | None
    run_block: BlockRunner
    fixed_positions: bool = False


def _llama_like(family: str) -> Layout:
    return Layout(
        family=family,
        base="model",
        layers="model.layers",
        norm="model.norm",
        head="lm_head",
        mlp="mlp",
        down="mlp.down_proj",
        up="mlp.up_proj",
        gate="mlp.gate_proj",
        attn_out="self_attn.o_proj",
        attn_in=tuple((name, f"self_attn.{name}_proj") for name in "qkv"),
        rotary="model.rotary_emb",
        run_block=run_rotary_block,
    )


_GPTJ = Layout(
    family="gptj",
    base="transformer",
    layers="transformer.h",
    norm="transformer.ln_f",
    head="lm_head",
    mlp="mlp",
    down="mlp.fc_out",
    up="mlp.fc_in",
    gate=None,
    attn_out="attn.out_proj",
    attn_in=tuple((name, f"attn.{name}_proj") for name in "qkv"),
    rotary=None,
    run_block=run_gptj_block,
    fixed_positions=True,
)

_GPT2 = Layout(
    family="gpt2",
    base="transformer",
    layers="transformer.h",
    norm="transformer.ln_f",
    head="lm_head",
    mlp="mlp",
    down="mlp.c_proj",
    up="mlp.c_fc",
    gate=None,
    attn_out="attn.c_proj",
    attn_in=(("qkv", "attn.c_attn"),),
    rotary=None,
    run_block=run_gpt2_block,
    fixed_positions=True,
)

# config.model_type → layout; Llama3 models carry model_type "llama"
FAMILIES: dict[str, Layout] = {
    "llama": _llama_like("llama"),
    "mistral": _llama_like("mistral"),
    "qwen2": _llama_like("qwen2"),
    "qwen3": _llama_like("qwen3"),
    "gptj": _GPTJ,
    "gpt2": _GPT2,
}


def layout_for(model_type: str | None) -> Layout:
    """The layout of a model type.

    Raises:
        UnknownFamilyError: no entry; the message lists the known families and what an entry needs.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    needs = ", ".join(field.name for field in fields(Layout))
    raise UnknownFamilyError(
        f"no layout for model type {model_type!r}: known families are {', '.join(sorted(FAMILIES))}; "
        f"pass EditableLM(..., layout=Layout({needs})) with the module paths of this model"
    )


def attention_window(config: Any, layer: int) -> int | None:
    """Sliding window of a layer in tokens, None for full attention.

    Mistral slides in every layer; Qwen2 and Qwen3 say per layer (`layer_types`).
    """
    window = getattr(config, "sliding_window", None)
    if window is None:
        return None
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and layer_types[layer] != "sliding_attention":
        return None
    return int(window)
