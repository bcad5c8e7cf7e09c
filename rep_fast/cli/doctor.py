"""`rep-fast doctor`: what is installed, which body each operation runs, and why."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

from rich.table import Table

from rep_fast import __version__
from rep_fast.cache_place import cache_root
from rep_fast.cli.options import DebugOption, JsonOption
from rep_fast.cli.screen import Screen, opened

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "scipy", "typer", "rich")
# optional package → the extra that installs it, and what for
_OPTIONAL = {
    "jinja2": ("demo", "HTML report"),
    "matplotlib": ("demo", "pictures of the report"),
    "datasets": ("data", "text sources from the hub"),
}


def doctor(as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """Show what is installed, which backend every operation uses, and why."""
    with opened(as_json=as_json, debug=debug) as screen:
        found = _examine()
        _show(screen, found)
        screen.answer(found)


def _examine() -> dict[str, Any]:
    import torch

    from rep_fast import ops
    from rep_fast.models.loading import EMBEDDED
    from rep_fast.ops import native

    module = native.find()
    level = None if module.module is None else module.module.level_name(module.module.machine_level())
    weights = Path(__file__).parent.parent / "factworld" / "weights"
    cache = cache_root()
    return {
        "rep_fast": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "executable": sys.executable,
        "packages": {name: _version(name) for name in _PACKAGES},
        "optional": {name: {"version": _version(name), "extra": extra} for name, (extra, _) in _OPTIONAL.items()},
        "native_module": {"available": module.module is not None, "reason": module.reason},
        "cpu": {"level": level, "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "REP_FAST_ISA": os.environ.get("REP_FAST_ISA"),
        "cuda": _cuda(torch),
        "backend": {op: {"body": body, "reason": reason} for op, (body, reason) in ops.backend().items()},
        "cache": {"directory": str(cache), "megabytes": _megabytes(cache), "is_writable": _is_writable(cache)},
        "embedded_models": {name: any((weights / folder).glob("*.safetensors")) for name, folder in EMBEDDED.items()},
    }


def _cuda(torch: Any) -> dict[str, Any]:
    from rep_fast import ops
    from rep_fast.ops import native

    module = native.find_cuda()
    available = torch.cuda.is_available()
    devices = range(torch.cuda.device_count()) if available else ()
    return {
        "available": available,
        "torch_built_for": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(n) for n in devices],
        "nvcc": shutil.which("nvcc"),
        "kernels": {"available": module.module is not None, "reason": module.reason},
        "backend": [
            {op: {"body": body, "reason": reason} for op, (body, reason) in ops.backend(f"cuda:{n}").items()}
            for n in devices
        ],
    }


def _why_no_device(cuda: dict[str, Any]) -> str:
    if cuda["torch_built_for"] is None:
        return "this torch is built without CUDA; everything runs on the CPU"
    return f"torch (CUDA {cuda['torch_built_for']}) finds no device or no driver; everything runs on the CPU"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _megabytes(directory: Path) -> float:
    if not directory.is_dir():
        return 0.0
    return round(sum(file.stat().st_size for file in directory.rglob("*") if file.is_file()) / 1e6, 1)


def _is_writable(directory: Path) -> bool:
    existing = next(parent for parent in (directory, *directory.parents) if parent.exists())
    return existing.is_dir() and os.access(existing, os.W_OK)


def _show(screen: Screen, found: dict[str, Any]) -> None:
    facts = Table("", "", box=None, show_header=False, padding=(0, 2, 0, 0))
    facts.add_row("rep_fast", f"{found['rep_fast']} on Python {found['python']}, {found['platform']}")
    facts.add_row(
        "packages", ", ".join(f"{name} {version or 'MISSING'}" for name, version in found["packages"].items())
    )
    for name, (extra, purpose) in _OPTIONAL.items():
        version = found["optional"][name]["version"]
        missing = f'not installed; pip install "rep-fast\\[{extra}]" for the {purpose}'
        facts.add_row(name, version or f"[yellow]{missing}[/yellow]")
    native, cpu, cuda, cache = found["native_module"], found["cpu"], found["cuda"], found["cache"]
    facts.add_row("native module", native["reason"] if native["available"] else f"[yellow]{native['reason']}[/yellow]")
    capped = f", capped by REP_FAST_ISA={found['REP_FAST_ISA']}" if found["REP_FAST_ISA"] else ""
    facts.add_row(
        "CPU", f"level {cpu['level'] or 'unknown'}{capped}; {cpu['cores']} cores, torch uses {cpu['threads']}"
    )
    facts.add_row("CUDA", ", ".join(cuda["devices"]) if cuda["available"] else _why_no_device(cuda))
    kernels = cuda["kernels"]
    needed = cuda["available"] and not kernels["available"]
    facts.add_row("CUDA kernels", f"[yellow]{kernels['reason']}[/yellow]" if needed else kernels["reason"])
    facts.add_row("nvcc", cuda["nvcc"] or "not found; a build here leaves the CUDA kernels out")
    writable = "" if cache["is_writable"] else " [red]not writable; set REP_FAST_CACHE[/red]"
    facts.add_row("cache", f"{cache['directory']} ({cache['megabytes']} MB){writable}")
    for name, there in found["embedded_models"].items():
        facts.add_row(name, "weights are here" if there else "[yellow]weights are not in this installation[/yellow]")
    screen.show(facts)
    screen.show(_bodies("CPU tensors", found["backend"]))
    for number, bodies in enumerate(cuda["backend"]):
        screen.show(_bodies(f"tensors on cuda:{number}, {cuda['devices'][number]}", bodies))


def _bodies(tensors: str, bodies: dict[str, dict[str, str]]) -> Table:
    table = Table("operation", "body", "why", title=f"Operations on {tensors}", title_justify="left")
    for op, own in bodies.items():
        table.add_row(op, own["body"], own["reason"])
    return table
