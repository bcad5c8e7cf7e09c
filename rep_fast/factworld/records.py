"""Evaluation records of the embedded world, in the robustness schema (methods §8.6)."""

from __future__ import annotations

import random
from collections.abc import Sequence

from rep_fast.facts import EditCase, Fact, Sided
from rep_fast.factworld import names
from rep_fast.factworld.world import Person, World

RELATIONS_PER_SUBJECT = 2
N_NEIGHBOURS = N_REPHRASES = 10


def evaluation_cases(world: World, group: str, *, seed: int = 0) -> list[EditCase]:
    """Two records for each subject of a group.

    The new target is another object of the relation. Neighbours are other people with the same object, in any wording;
    they come from the evaluation groups, so that none is ever among the background people that negatives may use.
    """
    rng = random.Random(f"{world.name}/records/{group}/{seed}")
    others = [person for person in world.people if person.group != "background"]
    cases: list[EditCase] = []
    for person in world.group(group):
        for index in rng.sample(range(len(world.relations)), RELATIONS_PER_SUBJECT):
            cases.append(_case(world, person, index, others, len(cases), rng))
    return cases


def _case(
    world: World, person: Person, index: int, others: Sequence[Person], case_id: int, rng: random.Random
) -> EditCase:
    relation, true = world.relations[index], person.objects[index]
    same = [other for other in others if other is not person and other.objects[index] == true]
    neighbours = rng.sample(same, min(N_NEIGHBOURS, len(same)))
    return EditCase(
        case_id=case_id,
        fact=Fact(
            prompt=relation.templates[0],
            subject=person.name,
            target_new=rng.choice([obj for obj in relation.objects if obj != true]),
            target_true=true,
        ),
        paraphrase_prompts=tuple(template.format(person.name) for template in relation.templates[1:]),
        neighborhood_prompts=tuple(rng.choice(relation.templates).format(other.name) for other in neighbours),
        neighborhood_target=true,
        subject_rephrases=Sided.halves([person.called(form) for form in rng.sample(names.REPHRASE_FORMS, N_REPHRASES)]),
    )
