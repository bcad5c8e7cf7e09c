"""The embedded world: everything from one seed, disjoint groups, records in the robustness schema."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from rep_fast import factworld
from rep_fast.errors import CorruptFileError, HparamError, RecordError
from rep_fast.facts import EditCase, Fact, Sided, read_cases, write_cases
from rep_fast.factworld import RecordWorld, World, WorldText, evaluation_cases


@pytest.fixture(scope="module")
def world() -> World:
    return World.generate()


def test_groups_are_disjoint_and_names_unique(world: World) -> None:
    names = [person.name for person in world.people]
    assert len(set(names)) == len(names)
    assert [len(world.group(group)) for group in ("background", "validation", "test")] == [150, 50, 200]
    for person in world.people:
        assert len(set(person.aliases)) == 10
        assert person.name not in person.aliases


def test_every_object_is_held_by_enough_others_to_be_neighbours(world: World) -> None:
    for group, n_cases in (("validation", 100), ("test", 400)):
        cases = evaluation_cases(world, group)
        assert len(cases) == n_cases
        background = {person.name for person in world.group("background")}
        for case in cases:
            assert len(case.neighborhood_prompts) >= 8
            assert case.fact.target_new != case.fact.target_true
            assert all(case.fact.subject not in prompt for prompt in case.neighborhood_prompts)
            assert not any(name in prompt for name in background for prompt in case.neighborhood_prompts)
            assert len(case.subject_rephrases.in_domain) == len(case.subject_rephrases.out_of_domain) == 5


def test_shipped_records_are_what_the_world_makes(world: World) -> None:
    for split in factworld.SPLITS:
        assert factworld.cases(split) == evaluation_cases(world, split)
    subjects = [{case.fact.subject for case in factworld.cases(split)} for split in factworld.SPLITS]
    assert not subjects[0] & subjects[1]
    assert not {fact.subject for fact in factworld.background_facts(world)} & (subjects[0] | subjects[1])
    with pytest.raises(HparamError, match="split 'train' is unknown; choose from validation, test"):
        factworld.cases("train")


def test_the_world_does_not_depend_on_hash_randomisation(world: World) -> None:
    """T-det: another process with another hash seed draws the same world, records and text."""
    code = (
        "from rep_fast.factworld import World, WorldText, evaluation_cases; import hashlib; w = World.generate();"
        "drawn = (w.people, evaluation_cases(w, 'validation'), WorldText(w, 1)[5]);"
        "print(hashlib.sha256(repr(drawn).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed, "PATH": "/usr/bin"}, check=True, text=True,
            capture_output=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(digests) == 1


def test_text_is_the_same_at_every_reading_and_differs_between_seeds(world: World) -> None:
    text = WorldText(world, 3, n_documents=4)
    assert list(text) == list(text) == [text[i] for i in range(4)]
    assert len(text) == 4
    assert text.digest != WorldText(world, 4, n_documents=4).digest
    assert text.digest != WorldText(world, 3, n_documents=5).digest
    with pytest.raises(IndexError):
        text[4]


def test_sentences_state_true_facts(world: World) -> None:
    rng = random.Random(0)
    objects = {name: person for person in world.people for name in (person.name, *person.aliases)}
    stated = 0
    for _ in range(200):
        sentence = world.sentence(rng)
        if not sentence.answer:
            continue
        stated += 1
        assert sentence.text.endswith(f" {sentence.answer}.")
        named = [person for name, person in objects.items() if name in sentence.prompt]
        assert any(sentence.answer in person.objects for person in named)
    assert stated > 100


RECORDS = [
    EditCase(
        1, Fact("The capital of {} is", "Slovenia", "Paris", "Ljubljana"), ("Slovenia is governed from",),
        ("The largest city of Slovenia is",), "Ljubljana", Sided(("The Republic of Slovenia",), ("Slovenija",)),
    ),
    EditCase(2, Fact("{} plays", "Kobe", "chess", "basketball")),
    EditCase(3, Fact("{} plays", "Nobody", "chess")),
]  # fmt: skip


def test_a_record_world_states_only_true_answers() -> None:
    world = RecordWorld.from_cases(RECORDS)
    assert list(world.facts()) == [("The capital of Slovenia is", "Ljubljana"), ("Kobe plays", "basketball")]
    rng = random.Random(0)
    texts = {world.sentence(rng).text for _ in range(300)}
    assert texts == {
        "The capital of Slovenia is Ljubljana.",
        "Slovenia is governed from Ljubljana.",
        "The largest city of Slovenia is Ljubljana.",
        "The capital of The Republic of Slovenia is Ljubljana.",
        "The capital of Slovenija is Ljubljana.",
        "Kobe plays basketball.",
    }
    with pytest.raises(RecordError, match="no record has a true answer"):
        RecordWorld.from_cases(RECORDS[2:])


def test_a_damaged_world_file_is_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "world.json").write_text("{not json")
    with pytest.raises(CorruptFileError, match="cannot be read"):
        factworld.world_of(tmp_path)
    (tmp_path / "world.json").write_text('{"kind": "records"}')
    write_cases(tmp_path / "records.json", RECORDS[:1])
    assert factworld.world_of(tmp_path) == RecordWorld.from_cases(read_cases(tmp_path / "records.json").cases)
    assert factworld.world_of(tmp_path / "elsewhere") is None
