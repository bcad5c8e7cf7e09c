"""Opening a model and its tokenizer, with one clear sentence for each way this can fail.

Safetensors only: nothing that executes is loaded (no pickle; remote code only when asked for by name).
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rep_fast.errors import HparamError, MissingDependencyError, ModelLoadError, NonFiniteError
from rep_fast.models.families import Layout, layout_for
from rep_fast.quiet_hub import no_weight_bars, quiet_hub

# name of the embedded model → directory of its weights inside the package
EMBEDDED = {"factworld": "llama"}

_LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, AttributeError)


def resolve(name_or_path: str | Path) -> str:
    """A directory for the embedded models' names, anything else unchanged.

    Raises:
        ModelLoadError: the embedded weights are not built, or the path is a file.
    """
    name = str(name_or_path)
    if name in EMBEDDED:
        directory = Path(str(files("rep_fast"))) / "factworld" / "weights" / EMBEDDED[name]
        if not any(directory.glob("*.safetensors")):
            raise ModelLoadError(f"the weights of {name!r} are not in {directory}; run `rep-fast factworld train`")
        return str(directory)
    path = Path(name)
    if path.is_file():
        raise ModelLoadError(f"{name} is a file; give the directory that holds config.json and the weights")
    if not path.is_dir() and (path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2):
        raise ModelLoadError(f"there is no directory {name}; give a model directory or a hub id like 'owner/model'")
    return name


def as_dtype(dtype: str | torch.dtype | None, *, embedded: bool) -> str | torch.dtype:
    """The torch dtype of a name; None is float32 for the embedded models and the stored dtype for others."""
    if dtype is None:
        return torch.float32 if embedded else "auto"
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    resolved = getattr(torch, dtype, None)
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise HparamError(f"dtype {dtype!r} is unknown; use float64, float32, bfloat16, float16 or auto")
    return resolved


def load_pretrained(
    name_or_path: str | Path,
    *,
    dtype: str | torch.dtype | None,
    device: str | torch.device | None,
    device_map: Any,
    revision: str | None,
    trust_remote_code: bool,
    layout: Layout | None,
) -> tuple[nn.Module, Any, Layout]:
    """Model (eval mode, weights without gradient), tokenizer and layout.

    Raises:
        UnknownFamilyError: before any weight is read. ModelLoadError: anything missing, truncated or damaged.
        NonFiniteError: a weight holds NaN or infinity. MissingDependencyError: `device_map` without accelerate.
        ModelLoadError: also where `device_map` does not hold all weights on devices.
    """
    name = resolve(name_or_path)
    where = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = _load(AutoConfig, name, "config.json", "give a model directory or a hub id", **where)
    layout = layout or layout_for(getattr(config, "model_type", None))
    tokenizer = _load(AutoTokenizer, name, "tokenizer", "put tokenizer.json beside the weights", **where)
    if not set(tokenizer("The model reads text.")["input_ids"]) - set(tokenizer.all_special_ids):
        # some classes come up with an empty vocabulary when their files are missing
        raise ModelLoadError(f"the tokenizer of {name!r} has no vocabulary; put tokenizer.json beside the weights")
    model = _load_weights(
        name, dtype=as_dtype(dtype, embedded=name_or_path in EMBEDDED), device_map=device_map, **where
    )
    check_in_place(model, name)
    check_finite(model)
    model.requires_grad_(False).eval()
    if device_map is None:
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return model, tokenizer, layout


def _load(loader: Any, name: str, part: str, remedy: str, **options: Any) -> Any:
    try:
        with quiet_hub():
            return loader.from_pretrained(name, **options)
    except _LOAD_ERRORS as error:
        raise ModelLoadError(f"the {part} of {name!r} cannot be loaded ({_first_line(error)}); {remedy}") from error


def _load_weights(name: str, *, dtype: str | torch.dtype, device_map: Any, **options: Any) -> nn.Module:
    if device_map is not None:
        options["device_map"] = device_map
    try:
        with quiet_hub(), no_weight_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                name,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below by name, instead of by a table on the terminal
                **options,
            )
    except ImportError as error:
        raise MissingDependencyError(
            f"loading {name!r} needs a package that is not here: {_first_line(error)}"
        ) from error
    except _LOAD_ERRORS as error:
        if device_map is not None and "accelerate" in str(error):
            raise MissingDependencyError("device_map needs accelerate: pip install accelerate") from error
        raise ModelLoadError(
            f"the weights of {name!r} cannot be loaded ({_first_line(error)}); "
            f"they must be complete safetensors files: fetch or convert them again"
        ) from error
    model, info = loaded
    missing, mismatched = sorted(info["missing_keys"]), sorted(map(str, info["mismatched_keys"]))
    if missing or mismatched:
        raise ModelLoadError(
            f"the weights of {name!r} do not fit its config.json: {len(missing)} tensors missing, {len(mismatched)} of "
            f"another shape, first {(missing + mismatched)[0]}; fetch all files of the checkpoint again"
        )
    return model


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def check_in_place(model: nn.Module, name: str) -> None:
    """Raise ModelLoadError naming the first weight that is offloaded: it is fetched anew for every pass, unedited."""
    for weight, tensor in model.named_parameters():
        if tensor.is_meta:
            raise ModelLoadError(
                f"device_map leaves no room for {weight} of {name!r}, which is offloaded, where an edit would not "
                f"stick; give more or larger GPUs, a smaller dtype, or device='cpu'"
            )


def check_finite(model: nn.Module) -> None:
    """Raise NonFiniteError naming the first weight that holds NaN or infinity."""
    for name, tensor in model.named_parameters():
        if tensor.is_meta or not tensor.is_floating_point():
            continue
        # one sum per tensor finds both; only a suspicious one (a finite tensor may overflow) is looked through
        if torch.isfinite(tensor.detach().sum(dtype=torch.float32)):
            continue
        bad = (~torch.isfinite(tensor)).sum().item()
        if bad:
            raise NonFiniteError(f"weight {name} holds {bad} values that are NaN or infinite; fetch the model again")
