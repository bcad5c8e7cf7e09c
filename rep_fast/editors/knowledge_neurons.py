"""Knowledge neurons: find the few neurons that an answer rests on, and put another answer into them (methods §5.9).

With a the activations of one layer at the prompt's last token and o a token of the old answer, the attribution of
neuron j is its integrated gradient along α·a, α from 0 to 1:

  score_j = (a_j / m) Σ_{s=1..m} ∂p(o)/∂a_j at α = (s−1)/(m−1)

averaged over the answer's tokens, the prompt being extended by what the model itself says. Neurons near the largest
score of all layers are edited: their columns of the down-projection gain emb(new answer) − emb(what the model says).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rep_fast.editors.answered import nothing_to_edit
from rep_fast.edits import Edit, ModuleEdit, Slices
from rep_fast.errors import HparamError, NothingToEditError
from rep_fast.facts import Fact
from rep_fast.models import EditableLM, Site, SuffixState
from rep_fast.models.resume import EMBEDDINGS
from rep_fast.models.transfer import sent
from rep_fast.presets import flat_mapping


@dataclass(frozen=True)
class KnowledgeNeuronsHparams:
    """Hyper-parameters of KN.

    layers: searched for neurons, none named: all. kn_site: activations that are attributed, "key" (after the product
    with the up-projection) or "pre" (before the activation function, as the published code). kn_steps: m.
    kn_threshold: share of the largest score that a neuron must pass. kn_prompts: how many context templates the prompt
    is put behind; of several, neurons count that pass in more than the share kn_share. target_tok, template_style: as
    for ROME.
    """

    layers: tuple[int, ...] = ()
    kn_site: Literal["key", "pre"] = "key"
    kn_steps: int = 20
    kn_threshold: float = 0.2
    kn_prompts: int = 1
    kn_share: float = 0.4
    target_tok: str = "in_context"
    template_style: str = "rome"

    def __post_init__(self) -> None:
        for name in ("kn_steps", "kn_prompts"):
            if getattr(self, name) < 1:
                raise HparamError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("kn_threshold", "kn_share"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise HparamError(f"{name}={getattr(self, name)} is out of range; use a share from 0 to below 1")


def knowledge_neurons(
    lm: EditableLM,
    facts: Sequence[Fact],
    *,
    hparams: KnowledgeNeuronsHparams,
    templates: Sequence[str],
    method: str = "kn",
) -> Edit:
    """Edit one fact by its knowledge neurons.

    Args:
        facts: exactly one. Neurons are sought for `target_true`, where unknown for the model's own answer.
        templates: `context_templates` of the model, the bare one first; the first `kn_prompts` are used.
    Returns:
        Edit with the chosen columns of the down-projection, per layer that has any; the module's `vectors`: scores.
    Raises:
        HparamError: not exactly one fact, or fewer templates than `kn_prompts`. LayerError: no such layer.
        NothingToEditError: the model already says the new answer, or no neuron passes.
    Cost: per template and answer token one forward of the prompt, then m single-token forwards and backwards per layer.
    """
    if len(facts) != 1:
        raise HparamError(f"{method} writes one fact at a time, got {len(facts)}; make one edit each and stack them")
    if len(templates) < hparams.kn_prompts:
        raise HparamError(f"kn_prompts={hparams.kn_prompts} needs as many templates, got {len(templates)}")
    fact, layers = facts[0], tuple(hparams.layers) or tuple(range(lm.n_layers))
    shift = _shift(lm, fact, hparams)
    scores = torch.stack(
        [
            _scores_of_text(lm, fact, template.replace("{}", fact.text), layers, hparams)
            for template in templates[: hparams.kn_prompts]
        ]
    )  # [prompts, layers, M]
    chosen = choose_neurons(scores, threshold=hparams.kn_threshold, share=hparams.kn_share)
    chosen = chosen.cpu()
    if not bool(chosen.any()):
        raise NothingToEditError(
            f"no neuron of layers {list(layers)} supports the answer to {fact.text!r} in enough prompts; search other "
            "layers, or lower kn_share"
        )
    modules = []
    for number, layer in enumerate(layers):
        index = chosen[number].nonzero()[:, 0]
        if len(index):
            columns = shift[:, None].expand(-1, len(index)).clone().to(lm.layer_device(layer))
            delta = Slices(sent(index, columns.device), columns, "inputs", lm.key_width(layer))
            own = scores[:, number, sent(index, scores.device)]
            modules.append(ModuleEdit(layer, delta, vectors={"scores": own.mean(dim=0)}))
    return Edit(
        facts=(fact,),
        method=method,
        hparams=flat_mapping(hparams),
        fingerprint=lm.fingerprint,
        modules=tuple(modules),
        notes={"templates": list(templates[: hparams.kn_prompts]), "neurons": int(chosen.sum())},
        model_name=lm.name,
    )


def choose_neurons(scores: Tensor, *, threshold: float, share: float) -> Tensor:
    """Which neurons to edit: [prompts, layers, M] scores → [layers, M] bool.

    Per prompt those above `threshold` times the largest score of all layers; of several prompts those chosen in more
    than `share` of them. A prompt without a positive score chooses none.
    """
    largest = scores.amax(dim=(1, 2), keepdim=True)
    coarse = (scores > threshold * largest) & (largest > 0)
    return coarse.sum(dim=0) > (share * len(scores) if len(scores) > 1 else 0)


def neuron_scores(
    lm: EditableLM, prompt_ids: Sequence[int], answer_ids: Sequence[int], *, layers: Sequence[int],
    site: Literal["key", "pre"] = "key", steps: int = 20,
) -> Tensor:  # fmt: skip
    """Attribution of every neuron [layers, M] at the prompt's last token to the answer, float32 or wider.

    For the second and later tokens of the answer the prompt is extended by the model's own greedy tokens.
    """
    batch = lm.encode([prompt_ids])
    total: Tensor | None = None
    for token in answer_ids:
        last = batch.row_lengths[0] - 1
        # all layers start from one forward of the prompt: before its last token nothing changes
        state = lm.suffix_state(batch, EMBEDDINGS, [last])
        found = torch.stack([_layer_scores(lm, state, layer, token, site=site, steps=steps) for layer in layers])
        total = found if total is None else total + found
        with torch.no_grad():
            batch = batch.followed_by(lm.resume(state, state.hidden, at=[[last]]).argmax(dim=-1))
    if total is None:
        raise NothingToEditError("an answer without tokens has no neurons; give one")
    return total / len(answer_ids)


def _layer_scores(
    lm: EditableLM, state: SuffixState, layer: int, token: int, *, site: Literal["key", "pre"], steps: int
) -> Tensor:
    """[M] scores of one layer for one token; one row of the batch per step of the integral."""
    rows = state.select([0] * steps)
    kind = "key" if site == "key" else ("gate" if lm.has_gate else "up")
    scaled: list[Tensor] = []

    def scale(activation: Tensor) -> Tensor:
        share = torch.linspace(0, 1, steps, dtype=activation.dtype, device=activation.device)[:, None, None]
        scaled.append(activation.detach())
        scaled.append((share * activation.detach()).requires_grad_())
        return scaled[-1]

    with torch.enable_grad(), lm.patch(Site(kind, layer), scale):
        logits = lm.resume(rows, rows.hidden, at=[[length - 1] for _, length in rows.bounds])
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        activation, leaf = scaled
        (gradient,) = torch.autograd.grad(wide.softmax(dim=-1)[:, token].sum(), [leaf])
    return activation[0, 0].to(wide) * gradient[:, 0].to(wide).sum(dim=0) / steps


def _scores_of_text(
    lm: EditableLM, fact: Fact, text: str, layers: Sequence[int], hparams: KnowledgeNeuronsHparams
) -> Tensor:
    new = lm.answer(text, fact.target_new, mode=hparams.target_tok)
    if fact.target_true is None:
        old: Sequence[int] = _greedy(lm, new.prompt_ids, len(new.target_ids))
    else:
        old = lm.answer(text, fact.target_true, mode=hparams.target_tok).target_ids
    return neuron_scores(lm, new.prompt_ids, old, layers=layers, site=hparams.kn_site, steps=hparams.kn_steps)


def _shift(lm: EditableLM, fact: Fact, hparams: KnowledgeNeuronsHparams) -> Tensor:
    """What every chosen column gains [D]: Σ emb(new answer) − Σ emb(as many tokens the model says)."""
    answer = lm.answer(fact.text, fact.target_new, mode=hparams.target_tok)
    said = _greedy(lm, answer.prompt_ids, len(answer.target_ids))
    if said == answer.target_ids:
        raise nothing_to_edit([fact])
    embeddings = lm.token_embeddings.detach()
    wide = torch.promote_types(embeddings.dtype, torch.float32)
    new, old = (
        embeddings[sent(torch.tensor(ids), embeddings.device)].to(wide).sum(dim=0) for ids in (answer.target_ids, said)
    )
    # the published code counts single tokens twice
    return (new - old) * (2 if len(answer.target_ids) == len(said) == 1 else 1)


def _greedy(lm: EditableLM, prompt_ids: Sequence[int], count: int) -> tuple[int, ...]:
    return lm.generate_ids(prompt_ids, max_new_tokens=count)[len(prompt_ids) :]
