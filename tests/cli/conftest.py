"""A tiny model on disk with a text, and a way to run commands in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rep_fast.cli import app

SENTENCES = (
    "Slovenia belongs to the continent of Europe and Michael plays the sport of basketball.",
    "The Eiffel Tower is located in the city of Paris while Kobe Bryant stays in Los Angeles.",
    "Microsoft Windows is developed by Microsoft and the native language of Danielle is French.",
    "Because of this, they went home; Antarctica is a continent, and so is Africa.",
)


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Standard output as the one JSON object it must be."""
        return json.loads(self.out)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test sees another's cache."""
    monkeypatch.setenv("REP_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def rep_fast() -> Callable[..., Finished]:
    """Run `rep-fast` with these arguments."""

    def run(*arguments: object) -> Finished:
        found = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if found.exception is not None and not isinstance(found.exception, SystemExit):
            raise found.exception
        return Finished(found.exit_code, found.stdout, found.stderr)

    return run


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, build_lm: Any) -> Path:
    """Directory of a tiny random llama with its tokenizer."""
    directory = tmp_path_factory.mktemp("tiny") / "model"
    build_lm("llama", max_position_embeddings=1024).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text with many times M tokens."""
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    lines = [
        f"{SENTENCES[n % 4]} In {1900 + n} this was said {n} times. {SENTENCES[(3 * n + 1) % 4]}" for n in range(60)
    ]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def fact() -> list[str]:
    """Options of a fact."""
    return ["--prompt", "{} belongs to the continent of", "--subject", "Slovenia", "--target", "Antarctica"]


@pytest.fixture
def settings() -> list[str]:
    """Options that make an edit of the tiny model cheap."""
    return ["--layers", "1", "--set", "v_steps=3", "--set", "steps=4"]


@pytest.fixture
def case_file(tmp_path: Path) -> Path:
    """Three records in robustness format."""
    records = [
        {
            "case_id": number,
            "prompt": f"{subject} belongs to the continent of",
            "subject": subject,
            "target_new": "Antarctica",
            "target_true": "Europe",
            "rephrase_prompt": [f"The continent of {subject} is"],
            "locality_prompt": ["Africa belongs to the continent of"],
            "locality_ground_truth": "Africa",
            "subject_rephrase": [f"the Republic of {subject}", f"{subject} herself"],
        }
        for number, subject in enumerate(("Slovenia", "Kobe Bryant", "Danielle Darrieux"))
    ]
    path = tmp_path / "cases.json"
    path.write_text(json.dumps(records))
    return path
