"""Shapes of benchmarks, from real models."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ScanCase:
    """One block of a collision scan: n_keys rows of the width M of a model's MLP, n_queries subjects, top k."""

    name: str
    n_keys: int
    n_queries: int
    key_dim: int
    k: int = 10

    def __str__(self) -> str:
        return self.name

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * self.n_keys * self.n_queries * self.key_dim


# M of the MLP: GPT-J's order of size, LLaMA2-7B 11008, Mistral-7B 14336, Qwen2-7B 18944, the embedded model 512. Keys
# exceed the caches.
SCAN_CASES = (
    ScanCase("factworld-400", 65536, 400, 512),
    ScanCase("m4096-100", 8192, 100, 4096),
    ScanCase("m4096-400", 8192, 400, 4096),
    ScanCase("m4096-2000", 4096, 2000, 4096),
    ScanCase("llama2-7b-400", 4096, 400, 11008),
    ScanCase("mistral-7b-400", 4096, 400, 14336),
    ScanCase("qwen2-7b-400", 2048, 400, 18944),
)
