"""What most commands begin with: the model, the workbench, the records."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rep_fast.cli.screen import Screen
from rep_fast.errors import RecordError

if TYPE_CHECKING:
    from rep_fast.api import Workbench
    from rep_fast.facts import EditCase, Fact
    from rep_fast.models import EditableLM


def open_model(name: str, *, device: str | None = None, dtype: str | None = None) -> EditableLM:
    """The model, opened without transformers' own remarks."""
    import transformers

    from rep_fast.api import load_model
    from rep_fast.errors import BackendError

    transformers.utils.logging.set_verbosity_error()
    try:
        return load_model(name, device=device, dtype=dtype)
    except (RuntimeError, AssertionError) as error:
        if device is None or isinstance(error, BackendError):
            raise
        reason = str(error).strip().splitlines()[0]
        raise BackendError(f"device {device!r} cannot be used ({reason}); see rep-fast doctor") from error


def open_workbench(
    screen: Screen,
    lm: EditableLM,
    *,
    text: str | None = None,
    preset: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    layer: int | tuple[int, ...] | None = None,
    moments: Path | None = None,
    allow_conflicts: bool = False,
) -> Workbench:
    """A workbench whose long steps show on the screen; `layer`: instead of the preset's, or several.

    Raises:
        FingerprintError: the file of second moments is another model's. CorruptFileError, MissingFileError: it is
            damaged or absent.
    """
    from rep_fast.api import Workbench
    from rep_fast.stats import SecondMoments

    if isinstance(layer, tuple):  # by the name that editors of one layer can refuse
        overrides, layer = {**(overrides or {}), "layers": layer}, None
    bench = Workbench(
        lm, text=text, preset=preset, overrides=overrides, layer=layer, progress=screen.progress,
        allow_conflicts=allow_conflicts,
    )  # fmt: skip
    if moments is not None:
        bench.use_moments(SecondMoments.load(moments, lm))
    return bench


def choose_cases(
    screen: Screen, lm: EditableLM, file: Path | None, *, split: str, limit: int | None, skip_bad: bool = False
) -> list[EditCase]:
    """Records of a file, or the model's own.

    Raises:
        RecordError: the file is malformed, or no file is given and the model has no records.
    """
    from rep_fast.facts import read_cases

    if file is None:
        return own_cases(lm, split)[:limit]
    read = read_cases(file, skip_bad=skip_bad)
    if read.skipped:
        screen.warn(f"{file}: skipped {len(read.skipped)} of {len(read.skipped) + len(read.cases)} records")
        for record in read.skipped:
            screen.say(f"  record {record.index}, field '{record.field}': {record.reason}")
    return read.cases[:limit]


def own_cases(lm: EditableLM, split: str) -> list[EditCase]:
    """Records that belong to the model's world.

    Raises:
        RecordError: it has none. HparamError: unknown split.
    """
    from rep_fast import factworld
    from rep_fast.factworld.embedded import SPLITS
    from rep_fast.models.loading import EMBEDDED

    world = factworld.world_of(lm.name)
    if world is None:
        raise RecordError(f"{lm.name} brings no records of its own; name a file with --cases")
    if isinstance(world, factworld.RecordWorld):
        return list(world.cases)
    if lm.name not in EMBEDDED and isinstance(world, factworld.World) and split in SPLITS:
        return factworld.evaluation_cases(world, split)
    return factworld.cases(split)


def known_case(lm: EditableLM, fact: Fact) -> EditCase | None:
    """The model's own record of this prompt and subject, where its world has one."""
    return next(
        (case for case in _known_cases(lm) if _asks_same(case, fact) and case.fact.subject == fact.subject), None
    )


def known_neighbours(lm: EditableLM, fact: Fact, count: int) -> list[str]:
    """Prompts of the same wording about other subjects of the model's world."""
    others = [
        case.fact.text for case in _known_cases(lm) if _asks_same(case, fact) and case.fact.subject != fact.subject
    ]
    return list(dict.fromkeys(others))[:count]


def _known_cases(lm: EditableLM) -> Sequence[EditCase]:
    from rep_fast import factworld

    world = factworld.world_of(lm.name)
    if isinstance(world, factworld.RecordWorld):
        return world.cases
    if not isinstance(world, factworld.World):
        return ()
    return [case for split in ("test", "validation") for case in factworld.evaluation_cases(world, split)]


def _asks_same(case: EditCase, fact: Fact) -> bool:
    return case.fact.prompt == fact.prompt


def backend_names() -> dict[str, str]:
    """Op → the body that serves it on this machine."""
    from rep_fast import ops

    return {op: name for op, (name, _) in ops.backend().items()}


class Stopwatch:
    """Seconds per part of a command."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = self._last = time.perf_counter()

    def lap(self, part: str) -> float:
        """The time since the last lap is `part`'s."""
        now = time.perf_counter()
        self.seconds[part] = now - self._last
        self._last = now
        return self.seconds[part]

    def total(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    def as_json(self) -> dict[str, float]:
        """All laps and the total, in seconds."""
        return {
            **{f"{part}_s": round(value, 4) for part, value in self.seconds.items()},
            "total_s": round(self.total(), 4),
        }
