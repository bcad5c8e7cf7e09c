"""Identity of a model: what every cache and every stored edit is keyed by.

SHA-256 over config, tokenizer and, per tensor, name, shape, dtype and up to 4096 evenly spaced elements, so that a 7B
model takes a second. Directory names, hooks, and the versions that wrote the files do not enter.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from rep_fast.errors import FingerprintError

SAMPLES_PER_TENSOR = 4096

# set while saving or loading, without meaning for what the model computes
_VOLATILE = {"architectures", "dtype", "torch_dtype", "transformers_version"}

# ids of these texts stand for the tokenizer's rules (normaliser, merges, special tokens), whatever file format it is in
_PROBES = (
    "The Republic of Slovenia belongs to the continent of Europe.",
    " Leading and  double  spaces,\ttabs\nand new lines\n\n",
    "Ünïcödé — naïve café, 東京, Москва, 👩‍🚀 'quoted' \"text\" it's 3.14159e-10",
    "antidisestablishmentarianism supercalifragilisticexpialidocious xqzj",
)


def fingerprint(model: nn.Module, config: Any, tokenizer: Any) -> str:
    """Hexadecimal SHA-256 of config, tokenizer and sampled weights.

    Raises:
        FingerprintError: a weight is not in memory (offloaded).
    """
    digest = hashlib.sha256()
    digest.update(_canonical(_config_content(config)))
    digest.update(_canonical(_tokenizer_content(tokenizer)))
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(_canonical([name, list(tensor.shape), str(tensor.dtype)]))
        digest.update(_sampled_bytes(name, tensor))
    return digest.hexdigest()


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, ensure_ascii=True, default=str).encode()


def _config_content(config: Any) -> dict[str, Any]:
    return {
        name: value
        for name, value in config.to_diff_dict().items()
        if name not in _VOLATILE and not name.startswith("_")
    }


def _tokenizer_content(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocabulary": hashlib.sha256(_canonical(sorted(tokenizer.get_vocab().items()))).hexdigest(),
        "probes": [list(tokenizer(text)["input_ids"]) for text in _PROBES],
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id],
    }


def _sampled_bytes(name: str, tensor: Tensor) -> bytes:
    if tensor.is_meta:
        raise FingerprintError(f"weight {name} is offloaded and cannot be read; load the model without offloading")
    if tensor.numel() == 0:
        return b""
    samples = min(SAMPLES_PER_TENSOR, tensor.numel())
    index = torch.arange(samples, device=tensor.device) * tensor.numel() // samples
    chosen = tensor.detach().reshape(-1)[index].cpu().contiguous()
    return chosen.view(torch.uint8).numpy().tobytes()
