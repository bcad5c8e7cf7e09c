"""A causal LM seen through its family's layout: layers, weights as the formulas write them, places of sites."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rep_fast.errors import LayerError, TokenizationError
from rep_fast.models.families import Layout
from rep_fast.models.sites import SITE_KINDS


class LayeredModel:
    """The model half of EditableLM, no tokens involved.

    model: Hugging Face causal LM. base, blocks, final_norm, head: its parts by layout.
    """

    def __init__(self, model: Any, layout: Layout, *, name: str) -> None:
        self.model = model
        self.config = model.config
        self.layout = layout
        self.name = name
        self.base = self._module(layout.base)
        self.blocks = self._module(layout.layers)
        self.final_norm = self._module(layout.norm)
        self.head = self._module(layout.head)

    @property
    def family(self) -> str:
        return self.layout.family

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def hidden_size(self) -> int:
        """D."""
        return int(self.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        return int(self.config.vocab_size)

    @property
    def activation(self) -> str:
        """Name of the MLP's activation function, as transformers spells it."""
        return str(getattr(self.config, "hidden_act", None) or self.config.activation_function)

    @property
    def device(self) -> torch.device:
        """Where token ids go: the device of the input embeddings."""
        return self.token_embeddings.device

    def layer_device(self, layer: int) -> torch.device:
        """Where a layer computes, and with it its keys, values and whatever acts on them."""
        return next(self.down_proj(layer).parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return self.token_embeddings.dtype

    @property
    def token_embeddings(self) -> Tensor:
        """[V, D] input embeddings."""
        return self.model.get_input_embeddings().weight

    def check_length(self, n_tokens: int) -> None:
        """Raise TokenizationError when a table of positions is shorter than the text."""
        limit = getattr(self.config, "max_position_embeddings", None)
        if self.layout.fixed_positions and limit is not None and n_tokens > limit:
            raise TokenizationError(f"a text of {n_tokens} tokens exceeds the {limit} positions of {self.name}; cut it")

    def rotary(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """cos and sin of absolute positions [n, S], None for families without a rotary module."""
        if self.layout.rotary is None:
            return None
        return self._module(self.layout.rotary)(hidden, position_ids)

    def check_layer(self, layer: int) -> int:
        """The layer number as int.

        Raises:
            LayerError: outside 0 … n_layers − 1.
        """
        if not 0 <= layer < self.n_layers:
            raise LayerError(f"layer {layer} lies outside {self.name}, whose layers are 0 to {self.n_layers - 1}")
        return int(layer)

    @property
    def linears(self) -> dict[str, str]:
        """Names of a layer's linear modules → their paths inside the layer: "down", "up", "gate" where there is one,
        "attn_out", and "q", "k", "v" or the fused "qkv"."""
        gate = {} if self.layout.gate is None else {"gate": self.layout.gate}
        named = {"down": self.layout.down, "up": self.layout.up, **gate, "attn_out": self.layout.attn_out}
        return {**named, **dict(self.layout.attn_in)}

    def linear(self, layer: int, name: str) -> nn.Module:
        """A linear module of a layer by name, see `linears`.

        Raises:
            LayerError: no such layer or name, or the module is neither Linear nor Conv1D.
        """
        path = self._linear_path(name)
        module = self._layer_module(layer, path)
        # decided by type: the shape test is ambiguous when D = M (methods §1, rule a)
        if not isinstance(module, (nn.Linear, Conv1D)):
            raise LayerError(_not_linear(module, path, layer))
        return module

    def linear_name(self, layer: int, name: str) -> str:
        """Path of a linear module inside the Hugging Face model, "model.layers.5.mlp.down_proj".

        Raises:
            LayerError: no such layer or name.
        """
        return f"{self.layout.layers}.{self.check_layer(layer)}.{self._linear_path(name)}"

    def linear_shape(self, layer: int, name: str) -> tuple[int, int]:
        """(outputs, inputs) of a linear module, whatever its weight is stored as."""
        module = self.linear(layer, name)
        if isinstance(module, nn.Linear):
            return module.out_features, module.in_features
        inputs, outputs = self.linear_weight(layer, name).T.shape
        return outputs, inputs

    def linear_weight(self, layer: int, name: str) -> Tensor:
        """[outputs, inputs] view of a linear's weight; writing into it writes the model.

        Raises:
            LayerError: as `linear`, or the weight is quantised or offloaded.
        """
        module = self.linear(layer, name)
        weight: Tensor = module.weight  # type: ignore[assignment]
        if weight.is_meta:
            raise LayerError(
                f"{self._linear_path(name)} of layer {layer} is offloaded, where an edit would not stick; load the "
                "model without offloading"
            )
        if not weight.is_floating_point():
            raise LayerError(
                f"{self._linear_path(name)} of layer {layer} is stored as {weight.dtype}; apply edits by hook, not by "
                "merging"
            )
        return weight.T if isinstance(module, Conv1D) else weight

    def down_proj(self, layer: int) -> nn.Module:
        """The module that maps keys to values."""
        return self._layer_module(layer, self.layout.down)

    def key_width(self, layer: int) -> int:
        """M of a layer."""
        return self.linear_shape(layer, "down")[1]

    def down_weight(self, layer: int) -> Tensor:
        """[D, M] view of the down-projection; writing into it writes the model."""
        return self.linear_weight(layer, "down")

    def down_bias(self, layer: int) -> Tensor | None:
        """[D] bias of the down-projection, None where there is none."""
        return getattr(self.down_proj(layer), "bias", None)

    def up_weight(self, layer: int) -> Tensor:
        """[M, D] view of the up-projection."""
        return self.linear_weight(layer, "up")

    def gate_weight(self, layer: int) -> Tensor:
        """[M, D] view of the gate projection; LayerError where the MLP has none."""
        return self.linear_weight(layer, "gate")

    @property
    def has_gate(self) -> bool:
        """Whether the MLP is gated."""
        return self.layout.gate is not None

    def _linear_path(self, name: str) -> str:
        if name == "gate":
            return self._gate_path()
        if name not in self.linears:
            raise LayerError(f"family {self.family} has no linear {name!r}; choose from {', '.join(self.linears)}")
        return self.linears[name]

    def _gate_path(self) -> str:
        if self.layout.gate is None:
            raise LayerError(f"the MLP of family {self.family} has no gate; use site 'up'")
        return self.layout.gate

    def _module(self, path: str) -> Any:
        try:
            return self.model.get_submodule(path)
        except AttributeError as error:
            raise LayerError(f"the model has no module {path!r}, which layout {self.layout.family!r} names") from error

    def _layer_module(self, layer: int, path: str) -> nn.Module:
        try:
            return self.blocks[self.check_layer(layer)].get_submodule(path)
        except AttributeError as error:
            raise LayerError(f"layer {layer} has no module {path!r}, which layout {self.family!r} names") from error

    def _place(self, site: tuple[str, int]) -> tuple[nn.Module, bool]:
        """The module of a site and whether the site is its input."""
        kind, layer = site
        if kind not in SITE_KINDS:
            raise LayerError(f"site kind {kind!r} is unknown; choose from {', '.join(SITE_KINDS)}")
        if kind == "hidden":
            return self.blocks[self.check_layer(layer)], False
        # the whole MLP's input, so that a patch reaches up and gate alike
        paths = {"key": self.layout.down, "value": self.layout.down, "up": self.layout.up, "mlp_in": self.layout.mlp}
        paths["attn_out"] = self.layout.attn_out
        path = self._gate_path() if kind == "gate" else paths[kind]
        return self._layer_module(layer, path), kind in ("key", "mlp_in")

    def _last_place(self, sites: Sequence[tuple[str, int]]) -> tuple[nn.Module, bool]:
        """The place whose hook fires when all of `sites` have been passed."""
        # inside a layer the order of sites differs by family (GPT-J is parallel): the layer's end is after all of them
        deepest = max(layer for _, layer in sites)
        at_deepest = [site for site in sites if site[1] == deepest]
        return self._place(at_deepest[0] if len(at_deepest) == 1 else ("hidden", deepest))


def _not_linear(module: nn.Module, path: str, layer: int) -> str:
    return f"{path} of layer {layer} is a {type(module).__name__}, neither Linear nor Conv1D; edits need one of these"
