"""MEMIT, EMMET, PMET, AlphaEdit on tiny random models, against their plain definitions.

The plain definition runs every text whole through the model with the updates so far in place, averages keys in two
levels, and solves the papers' M×M system.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from rep_fast import editors
from rep_fast.editors import EditorState, batch
from rep_fast.editors.answered import unanswered
from rep_fast.editors.batch import key_groups
from rep_fast.editors.keys import KeyReader, LookupRows
from rep_fast.edits import Edit, LowRank, ModuleEdit
from rep_fast.errors import FingerprintError, HparamError, LayerError, PromptError
from rep_fast.facts import Fact
from rep_fast.models import Batch, EditableLM, Site
from rep_fast.stats import SecondMoments

METHODS = ("memit", "memit-cache", "emmet", "pmet", "alphaedit")
TEMPLATES = ("{}", "I think that. {}", "Because of this, they went. {}", "You are right. {}")
LAYERS = (0, 1, 2)
FACTS = (
    Fact("{} belongs to the continent of", "Slovenia", "Antarctica", "Europe"),
    Fact("The mother tongue of {} is", "Danielle Darrieux", "Korean"),
    Fact("{} plays the sport of", "Kobe Bryant", "Los Angeles"),
    Fact("The iPhone is produced by {}", "Apple", "Microsoft"),
)
OTHERS = (Fact("Mount Triglav stands in {}", "Africa", "Asia"), Fact("{} is developed by", "Windows", "Apple"))
SMALL: dict[str, Any] = {"layers": LAYERS, "v_steps": 4, "early_stop": None, "v_lr": 0.2}
SETTINGS: dict[str, dict[str, Any]] = {
    "memit": {"mom2_update_weight": 9.0},
    "memit-cache": {"mom2_update_weight": 9.0},
    "emmet": {"mom2_update_weight": 2.0, "emmet_lambda": 0.3},
    "pmet": {"mom2_update_weight": 9.0},
    "alphaedit": {"nullspace_threshold": None, "null_share": 0.4, "l2": 0.5},
}


def moments_of(lm: EditableLM, layers: Sequence[int] = LAYERS) -> SecondMoments:
    matrices = {}
    for layer in layers:
        generator = torch.Generator().manual_seed(layer)
        width = lm.key_width(layer)
        keys = torch.randn(6 * width, width, generator=generator, dtype=torch.float64)
        keys *= torch.linspace(0.2, 2, width, dtype=torch.float64)
        matrices[layer] = keys.T @ keys / len(keys)
    return SecondMoments.from_matrices(
        matrices, dict.fromkeys(layers, 999), corpus="random", fingerprint=lm.fingerprint, model_name=lm.name
    )


def make(
    lm: EditableLM, method: str, facts: Sequence[Fact], *, state: EditorState | None = None, **changes: Any
) -> Edit:
    editor = editors.get(method)
    hparams = editor.hparams(lm, overrides={**SMALL, **SETTINGS[method], **changes})
    moments = moments_of(lm, hparams.layers)
    return editor(lm, facts, moments=moments, hparams=hparams, templates=TEMPLATES, state=state)


def plain_keys(lm: EditableLM, facts: Sequence[Fact], layer: int) -> Tensor:
    """K [M, n]: half the bare prompt's key, half the mean of the prefixed ones, from whole texts."""
    columns = []
    for fact in facts:
        found = [lm.locate(template.replace("{}", fact.prompt), fact.subject) for template in TEMPLATES]
        keys = torch.stack([lm.keys([own.ids], [layer], positions=[own.position])[layer][0] for own in found])
        columns.append((keys[0] + keys[1:].mean(dim=0)) / 2)
    return torch.stack(columns, dim=1)


def plain_site(lm: EditableLM, facts: Sequence[Fact], site: Site) -> Tensor:
    found = [lm.locate(fact.prompt, fact.subject) for fact in facts]
    return torch.stack([lm.read([own.ids], [site])[site][0, own.position] for own in found], dim=1).detach()


def plain_delta(
    method: str, moments: SecondMoments, layer: int, keys: Tensor, residual: Tensor, past: Tensor | None
) -> Tensor:
    C, S = moments.second_moment(layer), torch.zeros(len(keys), len(keys), dtype=torch.float64)
    if past is not None:
        S = past @ past.T
    if method == "alphaedit":
        vectors = torch.linalg.eigh(C).eigenvectors[:, : round(0.4 * len(C))]
        P = vectors @ vectors.T
        system = P @ (keys @ keys.T + S) + 0.5 * torch.eye(len(C), dtype=torch.float64)
        return torch.linalg.solve(system, P @ keys @ residual.T).T
    weight = 0.6 if method == "emmet" else 9.0
    return torch.linalg.solve(weight * C + S + keys @ keys.T, keys @ residual.T).T


def plain_deltas(
    lm: EditableLM, method: str, facts: Sequence[Fact], targets: Tensor, state: EditorState
) -> list[Tensor]:
    """ΔW of every layer, the model rerun from its tokens for each."""
    moments, deltas = moments_of(lm), []
    site = Site("value" if method == "pmet" else "hidden", LAYERS[-1])
    modules: list[ModuleEdit] = []
    for step, layer in enumerate(LAYERS):
        with Edit((), "", {}, lm.fingerprint, tuple(modules)).applied(lm):
            keys, current = plain_keys(lm, facts, layer), plain_site(lm, facts, site)
        left = len(LAYERS) - step
        residual = (targets - current) / (left**0.5 if method == "pmet" else left)
        past = state.columns(layer, like=keys) if method in ("memit-cache", "alphaedit") else None
        delta = plain_delta(method, moments, layer, keys, residual, past)
        deltas.append(delta)
        modules.append(ModuleEdit(layer, LowRank(delta, torch.eye(delta.shape[1], dtype=torch.float64))))
    return deltas


def assert_close(found: Tensor, wanted: Tensor, tolerance: float = 1e-7) -> None:
    assert float((found - wanted).norm() / wanted.norm()) <= tolerance


def targets_of(edit: Edit, n: int) -> Tensor:
    stars = edit.tensors["v_star" if edit.method == "pmet" else "z_star"]
    return stars.reshape(n, -1).T


@pytest.mark.parametrize("n_facts", [1, 4])
@pytest.mark.parametrize("method", METHODS)
def test_every_layer_gets_the_update_of_the_plain_definition(tiny_lm64: EditableLM, method: str, n_facts: int) -> None:
    """One pass resumed after each write equals whole forwards; with past keys of an earlier edit where kept."""
    lm, facts = tiny_lm64, FACTS[:n_facts]
    earlier = make(lm, method, OTHERS)
    state = EditorState.of([earlier])
    assert bool(state.past_keys) == (method in ("memit-cache", "alphaedit"))
    edit = make(lm, method, facts, state=state)
    wanted = plain_deltas(lm, method, facts, targets_of(edit, n_facts), state)
    assert edit.layers == LAYERS
    for module, delta in zip(edit.modules, wanted, strict=True):
        assert isinstance(module.delta, LowRank)
        assert module.delta.rank == n_facts
        assert_close(module.delta.to_dense(), delta)
    assert not lm.active_edits


@pytest.mark.parametrize("method", METHODS)
def test_chunks_do_not_matter(tiny_llama64: EditableLM, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Facts in small pieces, and streams that are not kept between layers, give the same update."""
    whole = make(tiny_llama64, method, FACTS)
    sizes: list[int] = []

    class Small(KeyReader):
        def __init__(self, lm: EditableLM, rows: LookupRows) -> None:
            super().__init__(lm, rows, max_tokens=30, kept_tokens=10)
            sizes.append(len(self._chunks))

    monkeypatch.setattr("rep_fast.editors.batch.KeyReader", Small)
    pieces = make(tiny_llama64, method, FACTS)
    for one, other in zip(whole.modules, pieces.modules, strict=True):
        assert_close(other.delta.to_dense(), one.delta.to_dense(), 1e-9)  # type: ignore[union-attr]
    assert sizes[0] > 4


@pytest.mark.parametrize("method", ["memit-cache", "alphaedit"])
def test_past_keys_are_those_of_the_edited_model(tiny_llama64: EditableLM, method: str) -> None:
    """§5.6: recomputed on the edited model. A layer's keys see the updates below it, which stand when they are read."""
    edit = make(tiny_llama64, method, FACTS)
    unedited = plain_keys(tiny_llama64, FACTS, LAYERS[-1]).T
    with edit.applied(tiny_llama64):
        for module in edit.modules:
            torch.testing.assert_close(
                module.vectors["past_keys"], plain_keys(tiny_llama64, FACTS, module.layer).T, rtol=1e-9, atol=1e-9
            )
    assert float((edit.modules[-1].vectors["past_keys"] - unedited).norm()) > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_response_is_the_retrieved_part_of_the_update(tiny_llama64: EditableLM, method: str) -> None:
    """methods §17: ρ(k) = ⟨ΔW k, ΔW k*⟩/‖ΔW k*‖² at every layer, for a single fact."""
    edit = make(tiny_llama64, method, FACTS[:1], state=EditorState.of([make(tiny_llama64, method, OTHERS)]))
    probes = torch.randn(5, tiny_llama64.key_width(0), generator=torch.Generator().manual_seed(3)).double()
    moments = moments_of(tiny_llama64)
    for module in edit.modules:
        vectors, delta = module.vectors, module.delta.to_dense()  # type: ignore[union-attr]
        k_star = vectors["k_star"]
        written = delta @ k_star
        wanted = probes @ delta.T @ written / (written @ written)
        torch.testing.assert_close(probes @ vectors["response"], wanted, rtol=1e-9, atol=1e-9)
        assert float(k_star @ vectors["response"]) == pytest.approx(1)
        if method != "alphaedit":
            whitened = torch.linalg.solve(moments.second_moment(module.layer), k_star)
            torch.testing.assert_close(vectors["direction"], whitened, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("method", ["memit", "emmet", "pmet"])
def test_the_factor_s_precision_changes_no_update(
    tiny_llama64: EditableLM, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    solver = SecondMoments.solver
    monkeypatch.setattr(
        SecondMoments,
        "solver",
        lambda self, layer, **options: asked.append(options["precision"]) or solver(self, layer, **options),
    )
    refined = make(tiny_llama64, method, FACTS, factor_precision="fp32")
    assert set(asked) == {"fp32"}
    asked.clear()
    exact = make(tiny_llama64, method, FACTS, factor_precision="fp64")
    assert set(asked) == {"fp64"}
    for one, other in zip(refined.modules, exact.modules, strict=True):
        assert_close(one.delta.to_dense(), other.delta.to_dense(), 1e-8)  # type: ignore[union-attr]


def test_exact_constraints_are_met_in_the_model(tiny_llama64: EditableLM) -> None:
    """EMMET at one layer with λ_e = 0: the stream at each averaged key moves by exactly what was missing."""
    edit = make(tiny_llama64, "emmet", FACTS, layers=(1,), emmet_lambda=0.0)
    keys = plain_keys(tiny_llama64, FACTS, 1)
    missing = targets_of(edit, 4) - plain_site(tiny_llama64, FACTS, Site("hidden", 1))
    assert_close(edit.modules[0].delta.to_dense() @ keys, missing)  # type: ignore[union-attr]


def test_emmet_adds_its_ridge_for_several_keys_alone(tiny_llama64: EditableLM) -> None:
    """The original's λ_e: 0 for one key, 0.1 for more."""
    for facts, wanted in ((FACTS[:1], 0.0), (FACTS, 0.1)):
        default = make(tiny_llama64, "emmet", facts, layers=(1,), emmet_lambda=None)
        said = make(tiny_llama64, "emmet", facts, layers=(1,), emmet_lambda=wanted)
        assert torch.equal(default.modules[0].delta.right, said.modules[0].delta.right)  # type: ignore[union-attr]


def test_memit_takes_the_published_weight_or_one_that_scales(tiny_llama64: EditableLM) -> None:
    """methods §4: λ = 1.4·M where no value was published; 15000 at LLaMA2's width."""
    default = make(tiny_llama64, "memit", FACTS, mom2_update_weight=None)
    said = make(tiny_llama64, "memit", FACTS, mom2_update_weight=1.4 * tiny_llama64.key_width(0))
    assert torch.equal(default.modules[0].delta.right, said.modules[0].delta.right)  # type: ignore[union-attr]


def test_facts_with_one_key_share_it(tiny_llama64: EditableLM) -> None:
    """Two relations of a subject behind the same words are one column; separately they would be two equal ones."""
    both = (FACTS[0], Fact("{} is in", "Slovenia", "Africa"), FACTS[1])
    shared = make(tiny_llama64, "emmet", both, layers=(1,), emmet_lambda=0.0)
    assert shared.notes["shared_keys"] == [[0, 1]]
    assert shared.modules[0].delta.rank == 2  # type: ignore[union-attr]
    assert len(shared.facts) == 3
    hparams = editors.get("emmet").hparams(tiny_llama64, overrides={**SMALL, "share_values": False})
    assert key_groups(tiny_llama64, both, hparams) == [[0], [1], [2]]


def test_contradictions_are_refused_by_name(tiny_llama64: EditableLM) -> None:
    both = (FACTS[1], FACTS[0], Fact(FACTS[0].prompt, FACTS[0].subject, "Asia"))
    with pytest.raises(
        PromptError, match=r"facts 1 and 2 contradict each other: 'Slovenia belongs .*' cannot be both 'Antarctica' and"
    ):
        make(tiny_llama64, "memit", both)
    make(tiny_llama64, "memit", both, allow_conflicts=True)
    make(tiny_llama64, "memit", (FACTS[0], FACTS[0], FACTS[1]))  # said twice is no contradiction


def test_an_edit_goes_on_top_of_active_ones(tiny_llama64: EditableLM, tmp_path: Any) -> None:
    """Sequential edits: the second is made on the edited model, stored and loaded with its vectors."""
    first = make(tiny_llama64, "alphaedit", OTHERS)
    with first.applied(tiny_llama64):
        second = make(tiny_llama64, "alphaedit", FACTS, state=EditorState.of([first]))
        wanted = plain_keys(tiny_llama64, FACTS, 0).T
    torch.testing.assert_close(second.modules[0].vectors["past_keys"], wanted, rtol=1e-9, atol=1e-9)
    second.save(tmp_path / "edit.safetensors")
    loaded = Edit.load(tmp_path / "edit.safetensors", tiny_llama64)
    assert torch.equal(loaded.modules[2].vectors["past_keys"], second.modules[2].vectors["past_keys"])
    assert loaded.hparams["layers"] == list(LAYERS)


@pytest.mark.parametrize("method", METHODS)
def test_refusals(tiny_llama: EditableLM, tiny_gpt2: EditableLM, method: str) -> None:
    editor = editors.get(method)
    hparams = editor.hparams(tiny_llama, overrides={**SMALL, **SETTINGS[method]})
    settings: dict[str, Any] = {"hparams": hparams, "templates": TEMPLATES}
    with pytest.raises(HparamError, match=f"{method} needs at least one fact, got none"):
        editor(tiny_llama, [], moments=moments_of(tiny_llama), **settings)
    with pytest.raises(HparamError, match="needs second moments; collect them"):
        editor(tiny_llama, FACTS, moments=None, **settings)
    with pytest.raises(HparamError, match="hold layers 0, 1, not 2; collect them for all of them"):
        editor(tiny_llama, FACTS, moments=moments_of(tiny_llama, (0, 1)), **settings)
    with pytest.raises(FingerprintError, match="collect them for this model"):
        editor(tiny_llama, FACTS, moments=moments_of(tiny_gpt2), **settings)
    with pytest.raises(LayerError, match="layer 7 lies outside"):
        editor.hparams(tiny_llama, overrides={"layers": (1, 7)})
    for layers in ((), (1, 0), (1, 1)):
        with pytest.raises(HparamError, match="must be one or more, ascending, each once"):
            editor.hparams(tiny_llama, overrides={"layers": layers})


def test_alphaedit_needs_a_ridge_and_one_choice_of_null_space(tiny_llama: EditableLM) -> None:
    editor = editors.get("alphaedit")
    with pytest.raises(HparamError, match=r"l2=0.0 must be positive"):
        editor.hparams(tiny_llama, overrides={**SMALL, "l2": 0.0})
    with pytest.raises(HparamError, match="give one of them"):
        make(tiny_llama, "alphaedit", FACTS, nullspace_threshold=0.1)


@pytest.mark.parametrize("method", ["memit", "memit-cache"])
def test_later_passes_write_what_is_missing(tiny_llama64: EditableLM, method: str) -> None:
    """A heavy corpus weight leaves facts unanswered; the second pass is an edit of these on the edited model."""
    lm, changes = tiny_llama64, {"mom2_update_weight": 60.0, "v_steps": 8}
    first = make(lm, method, FACTS, **changes)
    with first.applied(lm):
        missing = unanswered(lm, FACTS, target_tok="in_context")
        # what is written again must not be protected against itself
        held = [number for number, fact in enumerate(FACTS) if fact not in missing]
        past = {n: m.vectors["past_keys"][held] for n, m in enumerate(first.modules) if "past_keys" in m.vectors}
        second = make(lm, method, missing, state=EditorState(past, lm.fingerprint, lm.name), **changes)
    assert missing
    both = make(lm, method, FACTS, passes=2, **changes)
    assert both.notes["later_passes"] == [[fact.text for fact in missing]]
    for layer in LAYERS:
        parts = [edit.module(layer).delta for edit in (both, first, second)]
        total, one, two = (part.to_dense() for part in parts if part is not None)
        torch.testing.assert_close(total, one + two, rtol=1e-9, atol=1e-12)
    kept = [edit.module(0).vectors.get("past_keys") for edit in (both, first, second)]
    if method == "memit-cache":
        rows = [second if fact in missing else first for fact in FACTS]
        for number, (fact, source) in enumerate(zip(FACTS, rows, strict=True)):
            expected = source.module(0).vectors["past_keys"][source.facts.index(fact)]
            torch.testing.assert_close(kept[0][number], expected)  # type: ignore[index]
    else:
        assert kept == [None] * 3
    assert lm.active_edits == []


def test_passes_end_where_nothing_is_missing(tiny_llama64: EditableLM, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_llama64
    for missing, n_later in (([], 0), ([FACTS[1]], 2)):
        monkeypatch.setattr(batch, "unanswered", lambda *_, missing=missing, **__: missing)
        edit = make(lm, "memit", FACTS[:2], passes=3)
        assert edit.notes.get("later_passes", []) == [[FACTS[1].text]] * n_later
    with pytest.raises(HparamError, match="passes=0 must be at least 1"):
        make(lm, "memit", FACTS, passes=0)


def test_a_fact_written_in_several_passes_has_one_response(tiny_llama64: EditableLM) -> None:
    """ρ(k) = ⟨ΔW k, ΔW k*⟩/‖ΔW k*‖² of the whole update, 1 at its own key."""
    lm = tiny_llama64
    edit = make(lm, "memit", FACTS[:1], passes=3, mom2_update_weight=60.0)
    assert len(edit.notes["later_passes"]) == 2
    for module in edit.modules:
        assert isinstance(module.delta, LowRank)
        assert module.delta.rank == 3
        dense, key, response = module.delta.to_dense(), module.vectors["k_star"], module.vectors["response"]
        probe = torch.randn(len(key), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        written = dense @ key
        expected = (dense @ probe) @ written / (written @ written)
        torch.testing.assert_close(probe @ response, expected, rtol=1e-9, atol=1e-12)
        assert float(key @ response) == pytest.approx(1.0, rel=1e-9)


def test_a_fact_is_answered_when_every_target_token_is_said(
    tiny_llama64: EditableLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny_llama64
    answers = [lm.answer(fact.text, fact.target_new) for fact in FACTS]
    assert len(answers[1].target_ids) > 1
    said = [list(answer.target_ids) for answer in answers]
    said[1][-1] += 1  # one wrong token is enough
    said[2][0] += 1

    def logits(batch: Batch, *, at: Sequence[Sequence[int]]) -> Tensor:
        assert [tuple(row) for row in batch.rows()] == [tuple(answer.input_ids) for answer in answers]
        assert [tuple(positions) for positions in at] == [answer.positions for answer in answers]
        ids = torch.tensor([token for row in said for token in row])
        return torch.nn.functional.one_hot(ids, lm.vocab_size).double()

    monkeypatch.setattr(lm, "logits", logits)
    assert unanswered(lm, FACTS, target_tok="in_context") == [FACTS[1], FACTS[2]]
