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


@dataclass(frozen=True)
class GateCase:
    """Adapters of one layer on the keys of one forward: n_tokens keys of width M, gates of gate_hidden, none of which
    opens. n_calls: layers or steps in a row, each with adapters of its own, so that small cases are not timed alone."""

    name: str
    n_tokens: int
    key_dim: int
    gate_hidden: int
    n_adapters: int = 1
    n_calls: int = 1

    def __str__(self) -> str:
        return self.name

    @property
    def operations(self) -> int:
        """Multiplications and additions of the gates."""
        return 2 * self.n_tokens * self.key_dim * self.gate_hidden * self.n_adapters * self.n_calls


def _gate_cases() -> tuple[GateCase, ...]:
    models = {
        "factworld": (512, 51),
        "llama2-7b": (11008, 1100),
        "mistral-7b": (14336, 1433),
        "qwen2-7b": (18944, 1894),
    }
    tokens_and_calls = ((1, 12), (16, 6), (64, 3), (512, 1), (4096, 1))
    cases = [
        GateCase(f"{model}-{tokens}", tokens, *widths, n_calls=calls)
        for model, widths in models.items()
        for tokens, calls in tokens_and_calls
    ]
    cases += [GateCase(f"{model}-1-of-100", 1, *models[model], n_adapters=100) for model in ("factworld", "llama2-7b")]
    return tuple(cases)


GATE_CASES = _gate_cases()
