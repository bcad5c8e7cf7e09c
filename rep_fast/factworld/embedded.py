"""The model and records that come with the package, and directories of models trained on a user's own facts.

A trained model's directory holds what `save_pretrained` writes, plus `world.json`, which says what world it knows (and
holds its records), so that moments, scans and negatives find the model's own text without being told.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

from rep_fast.errors import CorruptFileError, HparamError
from rep_fast.facts import EditCase, Fact, read_cases, write_cases
from rep_fast.factworld.record_world import RecordWorld
from rep_fast.factworld.text import WorldText
from rep_fast.factworld.world import FactSource, World
from rep_fast.models import EditableLM
from rep_fast.safe_files import write_atomically

NAME = "factworld"
SPLITS = ("validation", "test")
WORLD_FILE, RECORDS_FILE = "world.json", "records.json"
# the streams that moments, scans and contexts read differ from the training stream and from each other by this seed
TEXT_SEED = 1


def load() -> EditableLM:
    """The embedded model, float32 on the CPU (or the GPU where there is one)."""
    return EditableLM.from_pretrained(NAME)


def cases(split: str) -> list[EditCase]:
    """The embedded evaluation records: 100 for validation, 400 for test, about disjoint subjects.

    Raises:
        HparamError: no such split.
    """
    if split not in SPLITS:
        raise HparamError(f"split {split!r} is unknown; choose from {', '.join(SPLITS)}")
    return list(read_cases(_data(f"{split}.json")).cases)


def text(seed: int = TEXT_SEED) -> WorldText:
    """The embedded world's text."""
    return WorldText(World.generate(), seed)


def background_facts(world: World | None = None) -> list[Fact]:
    """True facts of the background people, who appear in no evaluation record: what negatives may be drawn from."""
    world = world or World.generate()
    return [
        Fact(relation.templates[0], person.name, target_new=obj, target_true=obj)
        for person in world.group("background")
        for relation, obj in zip(world.relations, person.objects, strict=True)
    ]


def save_trained(lm: EditableLM, world: FactSource, directory: str | Path) -> None:
    """Write model, tokenizer and world of a trained model."""
    directory = Path(directory)
    lm.save_pretrained(directory)
    described = {"kind": "records" if isinstance(world, RecordWorld) else "factworld", "name": world.name}
    if isinstance(world, RecordWorld):
        write_cases(directory / RECORDS_FILE, world.cases)
    elif isinstance(world, World):
        described["seed"] = str(world.seed)
    write_atomically(directory / WORLD_FILE, json.dumps(described, indent=1).encode("utf-8"))


def world_of(directory: str | Path) -> FactSource | None:
    """The world of a trained model's directory; None where it has none.

    Raises:
        CorruptFileError: the directory's world file cannot be read.
    """
    if str(directory) == NAME:
        return World.generate()
    path = Path(directory) / WORLD_FILE
    if not path.is_file():
        return None
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        if described["kind"] == "records":
            return RecordWorld.from_cases(read_cases(path.with_name(RECORDS_FILE)).cases)
        return World.generate(int(described["seed"]))
    except (ValueError, KeyError, OSError) as error:
        raise CorruptFileError(f"{path} cannot be read ({error}); train the model again") from error


def _data(name: str) -> Path:
    return Path(str(resources.files("rep_fast.factworld"))) / "data" / name
