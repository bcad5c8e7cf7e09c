"""The few functions that join rooms for one call: open a model, find its text, edit, compare columns.

`Workbench` holds what many edits of one model share (second moments, templates, a corpus sample, negatives), each made
on first use; `edit` is the one-call form.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rep_fast import editors, factworld
from rep_fast.collisions import CorpusSample
from rep_fast.editors import EditorState
from rep_fast.edits import Edit
from rep_fast.errors import HparamError, TextSourceError
from rep_fast.facts import EditCase, Fact, TextSource, open_text
from rep_fast.models import EditableLM, context_templates
from rep_fast.presets import Preset, field_names, flat_mapping, from_flat_mapping, load_preset
from rep_fast.rep import NegativePool, RepHparams, SubjectForms, train_adapters
from rep_fast.rep.hparams import OBJECTIVES
from rep_fast.stats import SecondMoments

Progress = Callable[[str, int, "int | None"], None]
BuildEdit = Callable[[EditCase, int], Edit]
WriteStep = Callable[[Sequence[EditCase], int, Sequence[Edit]], Edit]
# moments and negatives read one stream of a world, long contexts another
CONTEXT_SEED = factworld.TEXT_SEED + 1


# in place of a device: how transformers spreads a model over all GPUs
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def load_model(name: str | Path, *, dtype: str | torch.dtype | None = None, device: str | None = None) -> EditableLM:
    """A model by name: `factworld`, a hub id, or a directory written by `save_pretrained`.

    device: a device, or one of `DEVICE_MAPS` to spread the model over several.
    """
    if device in DEVICE_MAPS:
        return EditableLM.from_pretrained(name, dtype=dtype, device_map=device)
    return EditableLM.from_pretrained(name, dtype=dtype, device=device)


def text_source(spec: str | Path | None, lm: EditableLM) -> TextSource:
    """A text by name (`facts.open_text`), "factworld", or for None the model's own source.

    Raises:
        TextSourceError: no text is given and the model has none of its own.
    """
    if spec == "factworld":
        return factworld.text()
    if spec is not None:
        return open_text(spec)
    world = factworld.world_of(lm.name)
    if world is None:
        raise TextSourceError(f"{lm.name} has no text of its own; name one with --text (a .txt or .jsonl file)")
    return factworld.WorldText(world, factworld.TEXT_SEED)


class Workbench:
    """What many edits of one model share.

    Args:
        lm: the unedited model.
        text: text source or its name, for moments, negatives and long contexts; None: the model's own.
        preset: name of a preset; None: "factworld" for the embedded model and models trained by this package, else
            "default".
        overrides: hyper-parameters by flat name that win over the preset, for the editor or for REP.
        layer: edited layer instead of the preset's, or several.
        negatives: facts whose subjects serve as negatives; None: names found in the text or, for models trained by
            this package that use their own text, the embedded world's background people. Never pass the records that
            will be evaluated, nor a text made of them.
        cache_dir: where moments and templates are kept, default `$REP_FAST_CACHE`.
        progress: called as progress(label, done, total) during the long steps.
        allow_conflicts: let one edit take facts that say two things with the same words, whatever the preset says.
    """

    def __init__(
        self,
        lm: EditableLM,
        *,
        text: TextSource | str | Path | None = None,
        preset: str | None = None,
        overrides: Mapping[str, Any] | None = None,
        layer: int | Sequence[int] | None = None,
        negatives: Sequence[Fact] | None = None,
        cache_dir: str | Path | None = None,
        progress: Progress | None = None,
        allow_conflicts: bool = False,
    ) -> None:
        self.lm = lm
        self._allow_conflicts = allow_conflicts
        self.world = factworld.world_of(lm.name)
        self._text = text
        self._has_own_text = text is None
        self.preset: Preset = load_preset(preset or ("default" if self.world is None else "factworld"))
        self._overrides = _split_overrides({**(overrides or {}), **({} if layer is None else {"layer": layer})})
        self._negatives = negatives
        self._cache_dir = cache_dir
        self._progress = progress
        self._moments: list[SecondMoments] = []
        self._given_moments: dict[str, Any] = {}
        self._templates: dict[tuple[str, int], tuple[str, ...]] = {}
        self._pools: dict[int, NegativePool] = {}

    @property
    def text(self) -> TextSource:
        """The text moments and negatives are read from."""
        if self._text is None or isinstance(self._text, (str, Path)):
            self._text = text_source(self._text, self.lm)
        return self._text

    @property
    def context_text(self) -> TextSource:
        """The text long contexts are cut from: a world's other stream, else the same source."""
        if isinstance(self.text, factworld.WorldText):
            return dataclasses.replace(self.text, seed=CONTEXT_SEED)
        return self.text

    def hparams(self, method: str) -> Any:
        """Hyper-parameters of an editor for this model."""
        editor, overrides = editors.get(method), self._overrides["editor"]
        if self._allow_conflicts and "allow_conflicts" in field_names(editor.hparams_type):
            overrides = {**overrides, "allow_conflicts": True}
        return editor.hparams(self.lm, preset=self.preset, overrides=overrides)

    def allows_conflicts(self, methods: Sequence[str]) -> bool:
        """Whether each of these methods takes contradicting facts in one edit."""
        return all(getattr(self.hparams(method), "allow_conflicts", self._allow_conflicts) for method in methods)

    def rep_hparams(self, objective: str | None = None, *, method: str | None = None) -> RepHparams:
        """REP settings for the edits of a method (None: what holds for all); objective None is the preset's default."""
        chosen = dict(self._overrides["rep"])
        said = chosen.pop("objective", None)
        name = objective or said or self.preset.section("rep")["objective"]
        if name not in OBJECTIVES:
            raise HparamError(f"REP objective {name!r} is unknown; choose from {', '.join(OBJECTIVES)}")
        values = {**self.preset.section(f"rep-{name}", family=self.lm.family, method=method), **chosen}
        return from_flat_mapping(RepHparams, {"objective": name, **values}, where=f"rep (preset {self.preset.name})")

    def layers(self, method: str) -> tuple[int, ...]:
        """The layers a method edits, ascending; () in its settings stands for all."""
        return tuple(self.hparams(method).layers) or tuple(range(self.lm.n_layers))

    def layer(self, method: str) -> int:
        """The layer a method edits, the last one where it edits several."""
        return self.layers(method)[-1]

    def moments(self, layers: int | Sequence[int]) -> SecondMoments:
        """Second moments of these layers, from the cache or collected now."""
        wanted = (layers,) if isinstance(layers, int) else tuple(sorted(set(layers)))
        for held in self._moments:
            if set(wanted) <= set(held.layers):
                return held
        found = SecondMoments.collect(
            self.lm, self.text, wanted, tokens=self.preset.section("moments")["tokens"], cache_dir=self._cache_dir,
            progress=self._labelled("second moments"),
        )  # fmt: skip
        self._moments.append(found)
        return found

    def use_moments(self, moments: SecondMoments) -> None:
        """Take these instead of collecting.

        Raises:
            FingerprintError: they belong to another model.
        """
        moments.check_model(self.lm)
        self._moments.insert(0, moments)
        self._given_moments = {str(layer): [moments.corpus, count] for layer, count in moments.counts.items()}

    def templates(self, style: str, seed: int) -> tuple[str, ...]:
        """Context templates, from the cache or drawn now, once per style and seed."""
        if (style, seed) not in self._templates:
            drawn = context_templates(self.lm, style=style, seed=seed, cache_dir=self._cache_dir)
            self._templates[style, seed] = drawn
        return self._templates[style, seed]

    def negative_pool(self, layer: int) -> NegativePool:
        """Negatives of one layer, shared by all edits there.

        A trained world's own text states the facts and other names of the subjects that are evaluated, so negatives
        come from the embedded world's background people and text about them alone.
        """
        if layer not in self._pools:
            aside = None if self.world is None or not self._has_own_text else _background(self.world)
            text = self.text if aside is None else factworld.WorldText(aside, factworld.TEXT_SEED)
            tokens = int(self.preset.section("corpus_sample")["tokens"])
            sample = CorpusSample.collect(self.lm, text, layer, tokens=tokens + tokens // 10)
            corpus, held_out = sample.split(tokens) if len(sample.keys) > tokens else (sample, None)
            facts = self._negatives
            if facts is None and aside is not None:
                facts = factworld.background_facts(aside)
            self._pools[layer] = (
                NegativePool.of_text(text, corpus, held_out)
                if facts is None
                else NegativePool.of_facts(facts, corpus, held_out)
            )
        return self._pools[layer]

    def prepare(
        self, methods: Sequence[str], *, rep: bool | str | Sequence[str | bool | None], seeds: Sequence[int] = (0,)
    ) -> None:
        """Make everything shared now, so that the time of an edit is the edit's own.

        Args:
            rep: True for the preset's objective, one objective by name, or several as `columns` takes them. Negatives
                are gathered for the calibrated one; the paper's has none.
        """
        asked = [rep] if isinstance(rep, (bool, str)) else rep
        objectives = {self.rep_hparams(None if one is True else str(one)).objective for one in asked if one}
        for method in methods:
            editor, hparams = editors.get(method), self.hparams(method)
            if "moments" in editor.takes:
                editor.prepare(self.moments(hparams.layers), hparams, self._cache_dir)
            for seed in seeds if "templates" in editor.takes else ():
                self.templates(hparams.template_style, seed)
            for layer in hparams.layers if "calibrated" in objectives else ():
                self.negative_pool(layer)
        for seed in seeds if objectives else ():
            self.templates("rome", seed)  # adapters are trained behind these, whatever style the editors take

    def edit(
        self,
        target: EditCase | Fact | Sequence[EditCase | Fact],
        *,
        method: str = "rome",
        rep: bool | str = False,
        rephrases: Sequence[str] | None = None,
        state: EditorState | None = None,
        seed: int = 0,
    ) -> Edit:
        """Edit a fact, or several by one edit of a batch method; with `rep` also train the adapters of a single one.

        Args:
            target: a fact, or a record whose in-domain rephrases REP may see; or several of them.
            rep: True for the preset's objective, or "calibrated" or "paper".
            rephrases: other names of the subject for a bare fact; without them REP takes simple surface forms.
            state: of earlier edits, for methods that keep past keys: `EditorState.of(edits)`; None: there are none.
            seed: of templates, shuffles and the adapter's start.
        Raises:
            HparamError: several facts for a method that writes one, or with REP. Others: see the editors.
        """
        targets = [target] if isinstance(target, (EditCase, Fact)) else list(target)
        if rep and len(targets) > 1:
            raise HparamError(f"REP trains the adapters of one fact, got {len(targets)}; make one edit each, or no rep")
        facts = [each if isinstance(each, Fact) else each.fact for each in targets]
        plain = self._written(facts, method, seed, state)
        if not rep:
            return plain
        return self.with_rep(plain, targets[0], objective=None if rep is True else rep, rephrases=rephrases, seed=seed)

    def _written(self, facts: Sequence[Fact], method: str, seed: int, state: EditorState | None = None) -> Edit:
        """The plain edit of these facts on the model as it stands."""
        editor = editors.get(method)
        editor.check_facts(facts)
        hparams = self.hparams(method)
        return editor(
            self.lm, facts, hparams=hparams, state=state, seed=seed, cache_dir=self._cache_dir,
            moments=self.moments(hparams.layers) if "moments" in editor.takes else None,
            templates=self.templates(hparams.template_style, seed) if "templates" in editor.takes else None,
        )  # fmt: skip

    def with_rep(
        self,
        edit: Edit,
        target: EditCase | Fact,
        *,
        objective: str | None = None,
        rephrases: Sequence[str] | None = None,
        seed: int = 0,
    ) -> Edit:
        """The edit with an adapter trained for its subject."""
        hparams = self.rep_hparams(objective, method=edit.method)
        if isinstance(target, EditCase):
            # the same shuffles as evaluation with this preset holds against the edit
            join = self.preset.section("evaluation").get("shuffle_join", "decode")
            forms = SubjectForms.of_case(self.lm, target, seed=seed, join=join)
        else:
            forms = SubjectForms.of_fact(self.lm, target, rephrases=rephrases, seed=seed)
        needed = edit.layers if hparams.objective == "calibrated" else ()
        return train_adapters(
            self.lm, edit, forms, pools={layer: self.negative_pool(layer) for layer in needed},
            templates=self.templates("rome", seed), hparams=hparams, seed=seed,
        )  # fmt: skip

    def plain_column(self, method: str) -> Remembered:
        """The column of a method without REP; columns with REP of the same method start from its edits."""
        return Remembered(lambda case, seed: self.edit(case, method=method, seed=seed))

    def rep_column(self, plain: BuildEdit, objective: str) -> BuildEdit:
        """The column that adds REP to the edits of another one."""
        return lambda case, seed: self.with_rep(plain(case, seed), case, objective=objective, seed=seed)

    def varied(self, overrides: Mapping[str, Any]) -> Workbench:
        """The same workbench under other hyper-parameters; what was gathered so far is shared by both."""
        other = copy.copy(self)
        added = _split_overrides(overrides)
        other._overrides = {who: {**held, **added[who]} for who, held in self._overrides.items()}
        return other

    def columns(self, methods: Sequence[str], objectives: Sequence[str | bool | None]) -> dict[str, BuildEdit]:
        """Columns of an evaluation: every method with every objective.

        Args:
            objectives: None for the plain edit, True for REP's default objective, or an objective by name.
        Returns:
            "rome", "rome+rep" (default objective), "rome+rep[paper]" … → function (case, seed) → Edit. Columns of one
            method share the plain edit of a case. Methods without a key to look up have no column with REP.
        Raises:
            HparamError: none of the columns can be made.
        """
        plain = {method: self.plain_column(method) for method in methods}
        return {
            label: plain[method] if objective is None else self.rep_column(plain[method], objective)
            for label, method, objective in self._labelled_columns(methods, objectives)
        }

    def steps(
        self,
        methods: Sequence[str],
        objectives: Sequence[str | bool | None],
        *,
        seeds: Sequence[int] = (0,),
    ) -> dict[str, WriteStep]:
        """Columns of an evaluation that stacks edits: the same names as `columns`, for the model as it then stands.

        What is gathered from the unedited model is made now, for these seeds: once edits are active it is too late.

        Returns:
            column → function (the step's cases, seed, active edits) → Edit. A step of one record is the edit of
            `columns`, its adapter trained on the keys that the adapters before it leave; a step of several is handed
            to the editor as a whole.
        """
        self.prepare(methods, rep=objectives, seeds=seeds)
        return {
            label: _StepColumn(self, method, objective)
            for label, method, objective in self._labelled_columns(methods, objectives)
        }

    def _labelled_columns(
        self, methods: Sequence[str], objectives: Sequence[str | bool | None]
    ) -> list[tuple[str, str, str | None]]:
        """Label, method and the objective's name of each column, None for the plain edit."""
        default = self.rep_hparams().objective
        found: list[tuple[str, str, str | None]] = []
        for method in methods:
            for objective in objectives:
                if objective is not None and not editors.get(method).has_key:
                    continue
                name = None if objective is None else default if objective is True else str(objective)
                rep = "" if name is None else "+rep" if name == default else f"+rep[{name}]"
                found.append((f"{method}{rep}", method, name))
        if not found:
            able = ", ".join(name for name in editors.names() if editors.get(name).has_key)
            raise HparamError(f"REP makes the key of an edit robust, {', '.join(methods)} has none; choose from {able}")
        return found

    def settings(self, methods: Sequence[str], objectives: Sequence[str | bool | None]) -> dict[str, Any]:
        """Every hyper-parameter behind `columns`, for the run's record."""
        found: dict[str, Any] = {method: flat_mapping(self.hparams(method)) for method in methods}
        for objective in objectives:
            if objective is not None:
                name = None if objective is True else str(objective)
                general = self.rep_hparams(name)
                found[f"rep[{general.objective}]"] = flat_mapping(general)
                for method in methods:
                    if (own := self.rep_hparams(name, method=method)) != general:
                        found[f"rep[{own.objective}] on {method}"] = flat_mapping(own)
        shared = {
            "preset": self.preset.name,
            "text": self.text.digest,
            "moments": self._given_moments or self.preset.section("moments")["tokens"],
            "corpus_sample": dict(self.preset.section("corpus_sample")),
            "negatives": None if self._negatives is None else [fact.subject for fact in self._negatives],
        }
        return {**shared, **found}

    def _labelled(self, label: str) -> Callable[[int, int | None], None] | None:
        if self._progress is None:
            return None
        report = self._progress
        return lambda done, total: report(label, done, total)


class Remembered:
    """A column that keeps its last edit: columns that build on it for the same case need not make it again."""

    def __init__(self, build: BuildEdit) -> None:
        self._build = build
        self._last: tuple[int, int, Edit] | None = None

    def __call__(self, case: EditCase, seed: int) -> Edit:
        if self._last is None or self._last[:2] != (case.case_id, seed):
            self._last = (case.case_id, seed, self._build(case, seed))
        return self._last[2]


class _StepColumn:
    def __init__(self, bench: Workbench, method: str, objective: str | None) -> None:
        self._bench, self._method, self._objective = bench, method, objective

    def __call__(self, cases: Sequence[EditCase], seed: int, active: Sequence[Edit]) -> Edit:
        state = EditorState.of(active) if "state" in editors.get(self._method).takes else None
        if len(cases) == 1:
            return self._bench.edit(cases[0], method=self._method, rep=self._objective or False, state=state, seed=seed)
        if self._objective is not None:
            raise HparamError(
                f"REP trains an adapter for one record, this step has {len(cases)}; use a sequential regime or no --rep"
            )
        return self._bench.edit(cases, method=self._method, state=state, seed=seed)


def edit(
    lm: EditableLM,
    facts: Sequence[Fact | EditCase],
    *,
    method: str = "rome",
    moments: SecondMoments | None = None,
    rep: bool | str = False,
    rephrases: Mapping[str, Sequence[str]] | Sequence[str] | None = None,
    text: TextSource | str | Path | None = None,
    preset: str | None = None,
    state: EditorState | None = None,
    seed: int = 0,
    **overrides: Any,
) -> Edit:
    """Edit facts in one call.

    Args:
        facts: one fact or record; batch methods take several.
        method: an editor's name. rep: train a key adapter too, see `Workbench.edit`.
        moments: second moments of the edited layers; None collects them from `text`.
        rephrases: other names of the subject for REP's training; a mapping is looked up by subject.
        text: text source for moments and negatives; None: the model's own.
        state: of earlier edits, for methods that keep past keys.
        overrides: hyper-parameters by flat name, `v_steps=20`.
    Raises:
        HparamError: more facts than the method writes at once, unknown method or hyper-parameter. Others: see the
            editors.
    """
    bench = Workbench(lm, text=text, preset=preset, overrides=overrides)
    if moments is not None:
        bench.use_moments(moments)
    names = rephrases
    if isinstance(rephrases, Mapping):
        found = [each.fact if isinstance(each, EditCase) else each for each in facts]
        names = rephrases.get(found[0].subject) if found else None
    return bench.edit(facts, method=method, rep=rep, rephrases=names, state=state, seed=seed)  # type: ignore[arg-type]


def _background(world: factworld.FactSource) -> factworld.World:
    return (world if isinstance(world, factworld.World) else factworld.World.generate()).background()


def _split_overrides(overrides: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Overrides by whom they concern: names REP knows go to REP, all others to the editor, which checks them."""
    concerns_rep = field_names(RepHparams)
    rep = {name: value for name, value in overrides.items() if name in concerns_rep}
    return {"rep": rep, "editor": {name: value for name, value in overrides.items() if name not in rep}}
