"""LoRA and AdaLoRA on the attention's q and v of all layers, trained by the peft package (methods §5.10).

peft's layers are put around the linear modules for the training alone. What they learned is an ordinary low-rank edit;
the model gets its own modules back, the very same objects.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rep_fast.editors.answered import answered_before
from rep_fast.editors.target_loss import TargetLoss
from rep_fast.edits import Edit, LowRank, ModuleEdit
from rep_fast.errors import HparamError, MissingDependencyError
from rep_fast.facts import Fact
from rep_fast.models import EditableLM
from rep_fast.presets import flat_mapping

_NAME = "default"  # peft's name of the one adapter
_ORTHOGONALITY = 0.5  # weight of AdaLoRA's regulariser, peft's default
_RANK_OFFSET = 1e-5  # AdaLoRA divides by the rank plus this

Place = tuple[int, str]


@dataclass(frozen=True)
class LoraHparams:
    """Hyper-parameters of LoRA.

    layers: none named: all. lora_kind: "adalora" (singular values of their own, factors held near orthogonal, budget
    left as it is) or "lora". The scale is lora_alpha / lora_rank. lora_steps: passes over all facts; lora_batch: facts
    per update. target_tok: tokenisation of targets (methods §2.4).
    """

    layers: tuple[int, ...] = ()
    lora_kind: Literal["adalora", "lora"] = "adalora"
    lora_rank: int = 8
    lora_alpha: int = 32
    lora_dropout: float = 0.1
    lora_steps: int = 70
    lora_lr: float = 5e-3
    lora_batch: int = 1
    target_tok: str = "in_context"

    def __post_init__(self) -> None:
        for name in ("lora_rank", "lora_alpha", "lora_steps", "lora_lr", "lora_batch"):
            if getattr(self, name) <= 0:
                raise HparamError(f"{name}={getattr(self, name)} must be positive")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise HparamError(f"lora_dropout={self.lora_dropout} is out of range; use a share from 0 to below 1")


def lora(lm: EditableLM, facts: Sequence[Fact], *, hparams: LoraHparams, method: str = "lora", seed: int = 0) -> Edit:
    """Train low-rank changes of q and v, or of the fused qkv, until the model gives the new targets.

    Args:
        facts: one or more; with several, one pass updates once per `lora_batch` of them, in the order given.
        seed: of the factors' start and of dropout.
    Returns:
        Edit with a low-rank delta per module. `notes`: losses, the mean of each pass before its updates, without
        AdaLoRA's regulariser, and numbers of the facts that were answered before (`answered.py`).
    Raises:
        MissingDependencyError: peft is not installed. LayerError: no such layer.
        NothingToEditError: the model already answers every fact with its new target.
        TokenizationError, PromptError: see `EditableLM.answer`.
    Cost: `lora_steps` forwards and backwards of the whole model.
    """
    before = answered_before(lm, facts, target_tok=hparams.target_tok)
    targets = [
        TargetLoss.of(lm, facts[begin : begin + hparams.lora_batch], target_tok=hparams.target_tok)
        for begin in range(0, len(facts), hparams.lora_batch)
    ]
    places = [(layer, name) for layer in hparams.layers or range(lm.n_layers) for name in _targets(lm)]
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        with _wrapped(lm, places, hparams) as wrappers:
            losses = _train(lm, targets, list(wrappers.values()), hparams)
            modules = tuple(
                ModuleEdit(layer, _delta(wrapper), linear=name) for (layer, name), wrapper in wrappers.items()
            )
    return Edit(
        facts=tuple(facts),
        method=method,
        hparams=flat_mapping(hparams),
        fingerprint=lm.fingerprint,
        modules=modules,
        notes={"losses": losses, "seed": seed, "answered_before": before},
        model_name=lm.name,
    )


def _targets(lm: EditableLM) -> tuple[str, ...]:
    return ("q", "v") if "q" in lm.linears else ("qkv",)


def _config(lm: EditableLM, places: Sequence[Place], hparams: LoraHparams) -> Any:
    try:
        from peft import AdaLoraConfig, LoraConfig
    except ImportError:
        raise MissingDependencyError('LoRA needs peft; install it with pip install "rep-fast[lora]"') from None

    shared: dict[str, Any] = {
        "lora_alpha": hparams.lora_alpha,
        "lora_dropout": hparams.lora_dropout,
        "target_modules": [lm.linear_name(*place) for place in places],
        "fan_in_fan_out": not isinstance(lm.linear(*places[0]), nn.Linear),
    }
    if hparams.lora_kind == "lora":
        return LoraConfig(r=hparams.lora_rank, **shared)
    rank = hparams.lora_rank
    return AdaLoraConfig(init_r=rank, target_r=rank, total_step=hparams.lora_steps, **shared)


@contextmanager
def _wrapped(lm: EditableLM, places: Sequence[Place], hparams: LoraHparams) -> Iterator[dict[Place, Any]]:
    """peft's layers around the modules at `places`, only their factors trainable; afterwards all is as it was."""
    config = _config(lm, places, hparams)
    from peft import inject_adapter_in_model

    originals = {lm.linear_name(*place): lm.linear(*place) for place in places}
    trained = [parameter for parameter in lm.model.parameters() if parameter.requires_grad]
    attributes = set(vars(lm.model))
    try:
        inject_adapter_in_model(config, lm.model, _NAME)
        wrappers = {place: lm.model.get_submodule(lm.linear_name(*place)) for place in places}
        for parameter in _factors(wrappers.values()):
            # float32 beside a half-precision model, whose updates would be lost in rounding
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        yield wrappers
    finally:
        for name, module in originals.items():
            parent, _, attribute = name.rpartition(".")
            setattr(lm.model.get_submodule(parent), attribute, module)
        for added in set(vars(lm.model)) - attributes:
            delattr(lm.model, added)
        for parameter in trained:
            parameter.requires_grad_(True)


def _factors(wrappers: Any) -> list[nn.Parameter]:
    # by name: peft leaves AdaLoRA's count of ranks trainable where the model is not float32
    return [
        parameter
        for wrapper in wrappers
        for name, parameter in wrapper.named_parameters()
        if name.startswith(("lora_A", "lora_B", "lora_E"))
    ]


def _train(lm: EditableLM, targets: Sequence[TargetLoss], wrappers: Sequence[Any], hparams: LoraHparams) -> list[float]:
    """Mean loss of each pass."""
    factors = _factors(wrappers)
    optimiser = torch.optim.Adam(factors, lr=hparams.lora_lr)
    batches = [target.batch(lm) for target in targets]
    losses: list[Tensor] = []
    for _ in range(hparams.lora_steps):
        for target, batch in zip(targets, batches, strict=True):
            loss = target(lm.logits(batch, at=target.at))
            losses.append(loss.detach())
            if hparams.lora_kind == "adalora":
                loss = loss + _ORTHOGONALITY * _orthogonality(wrappers).to(loss.device)
            for factor, gradient in zip(factors, torch.autograd.grad(loss, factors), strict=True):
                factor.grad = gradient
            optimiser.step()
    return _pass_means(torch.stack(losses).tolist(), [target.n_facts for target in targets])


def _pass_means(losses: Sequence[float], counts: Sequence[int]) -> list[float]:
    """Mean over facts of each pass, from the losses of its batches one after another."""
    means = []
    for begin in range(0, len(losses), len(counts)):
        total = 0.0
        for loss, count in zip(losses[begin : begin + len(counts)], counts, strict=True):
            total += loss * count
        means.append(total / sum(counts))
    return means


def _orthogonality(wrappers: Sequence[Any]) -> Tensor:
    """Mean over all factors of ‖AAᵀ − I‖_F and ‖BᵀB − I‖_F, AdaLoRA's regulariser."""
    terms = []
    for wrapper in wrappers:
        for factor in (wrapper.lora_A[_NAME], wrapper.lora_B[_NAME].T):
            eye = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
            terms.append((factor @ factor.T - eye).norm())
    return torch.stack([term.to(terms[-1].device) for term in terms]).mean()


def _delta(wrapper: Any) -> LowRank:
    """What the wrapper adds to its module's output, dropout off."""
    a, b, scale = wrapper.lora_A[_NAME], wrapper.lora_B[_NAME], wrapper.scaling[_NAME]
    if isinstance(a, nn.Linear):
        return LowRank((b.weight * scale).detach(), a.weight.detach().clone())
    rank = wrapper.r[_NAME] + _RANK_OFFSET
    return LowRank((b * (scale / rank)).detach(), (a * wrapper.lora_E[_NAME]).detach())
