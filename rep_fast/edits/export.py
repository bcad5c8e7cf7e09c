"""An edit as a LoRA adapter in peft's file format, for programs that know peft and not this package.

ΔW = B A with scale 1: A is the right factor, B the left one. Slices are written exactly, as many ranks as slices.
Writing needs no peft.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import nn

from rep_fast.edits.applying import check_fits, check_mergeable
from rep_fast.edits.delta import Delta
from rep_fast.edits.edit import Edit, ModuleEdit
from rep_fast.edits.low_rank import LowRank
from rep_fast.edits.merging import check_lasting
from rep_fast.edits.slices import Slices
from rep_fast.errors import HparamError, LayerError
from rep_fast.safe_files import replacing, write_atomically

if TYPE_CHECKING:
    from rep_fast.models import EditableLM

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def export_peft(edit: Edit, directory: str | Path, lm: EditableLM, *, without_adapters: bool = False) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`; see `Edit.export_peft`."""
    check_fits(lm, edit)
    check_mergeable(edit)
    if not without_adapters:
        check_lasting(edit, "a LoRA adapter", "export with without_adapters=True to leave them out")
    factors = {lm.linear_name(*module.place): _factors(module) for module in edit.modules if module.delta is not None}
    factors = {name: delta for name, delta in factors.items() if delta.rank}
    if not factors:
        raise HparamError("this edit changes no weight, so there is nothing to export; save it with edit.save")
    ranks = {name: delta.rank for name, delta in factors.items()}
    largest = max(ranks.values())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": lm.name,
        "target_modules": sorted(factors),
        "r": largest,
        "lora_alpha": largest,
        # alpha = rank everywhere, which makes every scale 1
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": not isinstance(lm.linear(*edit.modules[0].place), nn.Linear),
        "inference_mode": True,
    }
    tensors = {}
    for name, delta in factors.items():
        for part, factor in (("lora_A", delta.right), ("lora_B", delta.left)):
            stored = factor.detach().to(device="cpu", dtype=torch.float32)
            tensors[f"base_model.model.{name}.{part}.weight"] = stored.contiguous().clone()
    with replacing(Path(directory) / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_atomically(Path(directory) / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def _factors(module: ModuleEdit) -> LowRank:
    delta: Delta | None = module.delta
    if isinstance(delta, Slices):
        return delta.to_low_rank()
    if isinstance(delta, LowRank):
        return delta
    kind = "nothing" if delta is None else delta.kind
    raise LayerError(
        f"the {kind} delta of {module.linear!r} in layer {module.layer} has no low-rank form; write it into the model "
        "with edit.merge_into(lm) and store that with lm.save_pretrained"
    )
