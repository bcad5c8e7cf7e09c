"""What a result was measured on."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_PACKAGES = ("rep_fast", "torch", "numpy", "scipy", "faiss-cpu", "usearch")


def about_this_machine() -> dict[str, str]:
    """CPU, torch threads, package versions and the commit of the checkout ("" outside one)."""
    return {"cpu": _cpu(), "system": platform.platform(), "versions": _versions(), "commit": _commit()}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


def _versions() -> str:
    found: dict[str, str] = {"torch": str(torch.__version__)}
    for package in _PACKAGES:
        try:
            found.setdefault(package, version(package))
        except PackageNotFoundError:
            continue
    return " ".join(f"{name} {number}" for name, number in found.items())


def _commit() -> str:
    here = Path(__file__).resolve().parent
    done = subprocess.run(
        ["git", "-C", str(here), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else ""
