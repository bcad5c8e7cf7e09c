"""Shapes of benchmarks, from real models."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ScanCase:
    """One block of a collision scan: n_keys rows of the width M of a model's MLP, n_queries subjects, top k.

    kappa: κ_h = √(mean λ · mean 1/λ) of the keys' second moment, 1 for independent coordinates.
    """

    name: str
    n_keys: int
    n_queries: int
    key_dim: int
    k: int = 10
    kappa: float = 1.0

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
    ScanCase("factworld-400-kappa3", 65536, 400, 512, kappa=3.0),
    ScanCase("factworld-400-kappa10", 65536, 400, 512, kappa=10.0),
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


@dataclass(frozen=True)
class MomentCase:
    """One block of tokens added to a second moment of the key width M."""

    name: str
    n_tokens: int
    key_dim: int

    def __str__(self) -> str:
        return self.name

    @property
    def operations(self) -> int:
        """Multiplications and additions of one triangle."""
        return self.n_tokens * self.key_dim * (self.key_dim + 1)


MOMENT_CASES = (
    MomentCase("factworld", 8192, 512),
    MomentCase("m4096", 2048, 4096),
    MomentCase("llama2-7b", 1024, 11008),
    MomentCase("mistral-7b", 512, 14336),
)


@dataclass(frozen=True)
class ScoreCase:
    """Column scores of the weight gradient [D_in, D_out] of n_tokens tokens."""

    name: str
    n_tokens: int
    d_in: int
    d_out: int

    def __str__(self) -> str:
        return self.name

    @property
    def operations(self) -> int:
        """Multiplications and additions of the product."""
        return 2 * self.n_tokens * self.d_in * self.d_out


SCORE_CASES = (
    ScoreCase("factworld-16", 16, 128, 512),
    ScoreCase("m4096-64", 64, 1024, 4096),
    ScoreCase("llama2-7b-16", 16, 4096, 11008),
    ScoreCase("llama2-7b-64", 64, 4096, 11008),
    ScoreCase("llama2-7b-256", 256, 4096, 11008),
    ScoreCase("mistral-7b-64", 64, 4096, 14336),
)


@dataclass(frozen=True)
class SolveCase:
    """C⁻¹B for n_columns right-hand sides; `is_cached`: the factor is there already."""

    name: str
    key_dim: int
    is_cached: bool
    n_columns: int = 100
    condition: float = 1e6

    def __str__(self) -> str:
        return self.name

    @property
    def operations(self) -> int:
        """Multiplications and additions of one factorisation (unless cached) and one pair of triangular solves."""
        factorisation = 0 if self.is_cached else self.key_dim**3 // 3
        return factorisation + 2 * self.key_dim**2 * self.n_columns


SOLVE_CASES = (
    SolveCase("factworld-factor+solve", 512, False),
    SolveCase("factworld-solve", 512, True),
    SolveCase("m4096-factor+solve", 4096, False),
    SolveCase("m4096-solve", 4096, True),
    SolveCase("m4096-solve-1", 4096, True, n_columns=1),
    SolveCase("llama2-7b-factor+solve", 11008, False),
    SolveCase("llama2-7b-solve", 11008, True),
)
