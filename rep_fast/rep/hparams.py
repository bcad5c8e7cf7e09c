"""Hyper-parameters of REP training, for both objectives."""

from __future__ import annotations

from dataclasses import dataclass

from rep_fast.errors import HparamError

OBJECTIVES = ("calibrated", "paper")
TARGETS = ("whitened", "raw")
MULTILAYER = ("in_order", "frozen_keys")


@dataclass(frozen=True)
class RepHparams:
    """Settings of one adapter's training (methods §6.1–6.3, §17).

    objective: "calibrated" (unit response, explicit negatives) or "paper". rank: r of the projection; gate_share: width
    of the gate as a share of M; tau: inference threshold, the gate opens for g > tau.
    steps, lr: of Adam; batch, negative_batch: positives and negatives per step (None: all of them every step).
    dropout: on the projection's input in training.
    consistency: α, weight of the mean squared change of the anchor key (the bare prompt's).
    multilayer: for edits of several layers, "in_order" trains each layer on keys that the trained adapters below have
    acted on, "frozen_keys" on keys with those adapters off.
    Paper objective: target "whitened" (u) or "raw" (k*); absolute: |·| around the similarity.
    Calibrated objective: protect_prompt moves no key of the bare prompt, by holding A orthogonal to them;
    bare_every_step puts the forms in the bare prompt into every batch, besides what is drawn, and so gives them more
    weight: they are what is asked, and most like what is protected;
    response_target, the wanted ρ (1 retrieves the edit as it was written); response_weight and shift_weight of
    (ρ_wanted − ρ)² and of the relative shift; negative_weight of the negatives' half of the gate loss; n_random, n_hard
    corpus keys, hard ones with ρ below max_rho; n_subjects other subjects put into the edit's prompt; n_other_tokens
    tokens of the positive texts that are not the subject's last.
    """

    objective: str = "calibrated"
    rank: int = 32
    gate_share: float = 0.1
    tau: float = 0.9
    steps: int = 10
    lr: float = 5e-4
    batch: int | None = None
    negative_batch: int | None = None
    dropout: float = 0.0
    consistency: float = 10.0
    multilayer: str = "in_order"
    target: str = "whitened"
    absolute: bool = False
    protect_prompt: bool = True
    bare_every_step: bool = True
    response_target: float = 1.0
    response_weight: float = 1.0
    shift_weight: float = 0.1
    negative_weight: float = 1.0
    n_random: int = 512
    n_hard: int = 256
    max_rho: float = 0.9
    n_subjects: int = 60
    n_other_tokens: int = 512

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise HparamError(f"REP objective {self.objective!r} is unknown; choose from {', '.join(OBJECTIVES)}")
        if self.target not in TARGETS:
            raise HparamError(f"REP target {self.target!r} is unknown; choose from {', '.join(TARGETS)}")
        if self.multilayer not in MULTILAYER:
            raise HparamError(f"REP multilayer {self.multilayer!r} is unknown; choose from {', '.join(MULTILAYER)}")
        if not 0.0 <= self.dropout < 1.0:
            raise HparamError(f"REP dropout must be in [0, 1), got {self.dropout}")
        for name in ("steps", "batch", "negative_batch", "rank"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise HparamError(f"REP needs {name} of at least 1, got {value}")
        for name in ("n_random", "n_hard", "n_subjects", "n_other_tokens"):
            if (value := getattr(self, name)) < 0:
                raise HparamError(f"REP needs {name} of at least 0, got {value}")

    def gate_hidden(self, width: int) -> int:
        """Width of the gate for keys of width M: int(gate_share·M), at least 1."""
        return max(1, int(self.gate_share * width))
