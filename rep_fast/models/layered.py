"""A causal LM seen through its family's layout: layers, weights as the formulas write them, places of sites."""

from __future__ import annotations

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
    def device(self) -> torch.device:
        """Where token ids go: the device of the input embeddings."""
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype

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

    def down_proj(self, layer: int) -> nn.Module:
        """The module that maps keys to values."""
        return self._layer_module(layer, self.layout.down)

    def key_width(self, layer: int) -> int:
        """M of a layer."""
        module = self.down_proj(layer)
        if isinstance(module, Conv1D):
            return module.weight.shape[0]
        if isinstance(module, nn.Linear):
            return module.in_features
        raise LayerError(_not_linear(module, self.layout.down, layer))

    def down_weight(self, layer: int) -> Tensor:
        """[D, M] view of the down-projection; writing into it writes the model."""
        return self._weight(layer, self.layout.down)

    def down_bias(self, layer: int) -> Tensor | None:
        """[D] bias of the down-projection, None where there is none."""
        return getattr(self.down_proj(layer), "bias", None)

    def up_weight(self, layer: int) -> Tensor:
        """[M, D] view of the up-projection."""
        return self._weight(layer, self.layout.up)

    def gate_weight(self, layer: int) -> Tensor:
        """[M, D] view of the gate projection; LayerError where the MLP has none."""
        return self._weight(layer, self._gate_path())

    @property
    def has_gate(self) -> bool:
        """Whether the MLP is gated."""
        return self.layout.gate is not None

    def _weight(self, layer: int, path: str) -> Tensor:
        module = self._layer_module(layer, path)
        # decided by type: the shape test is ambiguous when D = M (methods §1, rule a)
        if not isinstance(module, (nn.Linear, Conv1D)):
            raise LayerError(_not_linear(module, path, layer))
        weight = module.weight
        if not weight.is_floating_point():
            raise LayerError(
                f"{path} of layer {layer} is stored as {weight.dtype}; apply edits by hook, not by merging"
            )
        return weight.T if isinstance(module, Conv1D) else weight

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


def _not_linear(module: nn.Module, path: str, layer: int) -> str:
    return f"{path} of layer {layer} is a {type(module).__name__}, neither Linear nor Conv1D; edits need one of these"
