"""Plain text for statistics, scans and long contexts: documents in a fixed order with a digest of what they are."""

from __future__ import annotations

import hashlib
import json
import random
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rep_fast.errors import MissingDependencyError, TextSourceError
from rep_fast.quiet_hub import quiet_hub

_DIGEST_SAMPLES = 256


@runtime_checkable
class TextSource(Protocol):
    """Documents that come out the same, in the same order, at every iteration.

    `digest` stands for content and settings: equal digests mean equal documents, so results may be cached under it.
    """

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str: ...

    def __iter__(self) -> Iterator[str]: ...


class MemoryText:
    """Documents held in memory."""

    def __init__(self, name: str, documents: Sequence[str]) -> None:
        if isinstance(documents, str) or not all(isinstance(document, str) for document in documents):
            raise TextSourceError(f"text source {name!r} needs a sequence of texts, got {type(documents).__name__}")
        if not any(document.strip() for document in documents):
            raise TextSourceError(f"text source {name!r} is empty; give at least one document with text")
        self.name = name
        self._documents = tuple(documents)
        self.digest = _digest(*self._documents)

    def __iter__(self) -> Iterator[str]:
        return iter(self._documents)

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> str:
        return self._documents[index]


class FileText:
    """Documents of a text file, read from disk as they are needed.

    `.txt`: documents are separated by blank lines, or are single lines where no blank line stands between them.
    `.jsonl`: one JSON object per line, its `text` field is the document.
    The digest is that of the content; renaming the file does not change it.

    Raises:
        TextSourceError: missing, empty, not UTF-8, another suffix, or a `.jsonl` line without text (named by number).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.name = self.path.name
        suffix = self.path.suffix.lower()
        if suffix not in (".txt", ".jsonl"):
            raise TextSourceError(f"text file {self.path} has an unknown kind {suffix!r}; use .txt or .jsonl")
        self._is_jsonl = suffix == ".jsonl"
        try:
            self._starts, self._ends, content = self._index()
        except OSError as error:
            raise TextSourceError(f"cannot read text file {self.path}: {error.strerror or error}") from None
        if not len(self._starts):
            raise TextSourceError(f"text file {self.path} is empty")
        self.digest = _digest("jsonl" if self._is_jsonl else "txt", content)

    def __iter__(self) -> Iterator[str]:
        with self.path.open("rb") as file:
            for index in range(len(self)):
                yield self._read(file, index)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)} in {self.path}")
        with self.path.open("rb") as file:
            return self._read(file, index)

    def _index(self) -> tuple[array[int], array[int], str]:
        """Byte ranges of the documents, and the digest of the file, in one pass."""
        line_starts, line_ends, paragraph_starts, paragraph_ends = (array("q") for _ in range(4))
        content, position, after_blank = hashlib.sha256(), 0, True
        with self.path.open("rb") as file:
            for line in file:
                content.update(line)
                end = position + len(line)
                blank = not line.strip()
                if not blank:
                    line_starts.append(position)
                    line_ends.append(end)
                    if after_blank:
                        paragraph_starts.append(position)
                        paragraph_ends.append(end)
                    paragraph_ends[-1] = end
                after_blank, position = blank, end
        by_line = self._is_jsonl or len(paragraph_starts) <= 1
        if by_line:
            return line_starts, line_ends, content.hexdigest()
        return paragraph_starts, paragraph_ends, content.hexdigest()

    def _read(self, file: Any, index: int) -> str:
        file.seek(self._starts[index])
        raw = file.read(self._ends[index] - self._starts[index])
        try:
            text = raw.decode("utf-8-sig" if index == 0 else "utf-8")
        except UnicodeDecodeError:
            raise TextSourceError(f"document {index + 1} of {self.path} is not UTF-8 text; convert the file") from None
        return self._json_text(text, index) if self._is_jsonl else text.strip()

    def _json_text(self, line: str, index: int) -> str:
        try:
            text = json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise TextSourceError(f"record {index + 1} of {self.path} is not a JSON object with a 'text' field")
        return text


class DatasetText:
    """Rows of a Hugging Face dataset (needs the package `datasets`).

    The digest covers the settings, the number of rows and 256 evenly spaced ones.

    Raises:
        MissingDependencyError: `datasets` is not installed.
        TextSourceError: the dataset cannot be loaded, or has no such text column.
    """

    def __init__(
        self,
        name: str,
        config: str | None = None,
        *,
        split: str = "train",
        column: str = "text",
        revision: str | None = None,
    ) -> None:
        try:
            import datasets
        except ImportError:
            raise MissingDependencyError(
                f'the text source {name!r} needs the package datasets; install it with pip install "rep-fast[data]"'
            ) from None
        try:
            with quiet_hub():
                self._rows: Any = datasets.load_dataset(name, config, split=split, revision=revision)
        except Exception as error:  # datasets raises whatever its loaders and the network raise
            raise TextSourceError(
                f"dataset {name!r} ({config or 'default'}, {split}) cannot be loaded: {error}"
            ) from error
        if column not in self._rows.column_names:
            raise TextSourceError(f"dataset {name!r} has no column {column!r}; it has {self._rows.column_names}")
        if not len(self._rows):
            raise TextSourceError(f"dataset {name!r} ({config or 'default'}, {split}) is empty")
        self.name = name if config is None else f"{name}/{config}"
        self._column = column
        step = max(1, len(self._rows) // _DIGEST_SAMPLES)
        samples = (self[index] for index in range(0, len(self._rows), step))
        settings = json.dumps([name, config, split, column, revision, len(self._rows)])
        self.digest = _digest(settings, *samples)

    def __iter__(self) -> Iterator[str]:
        for row in self._rows:
            yield row[self._column]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> str:
        return self._rows[index][self._column]


class SampledText:
    """`n` documents of another source, the first of a seeded shuffle (methods §4: seed 1, 100 000 documents)."""

    def __init__(self, source: TextSource, n: int, *, seed: int = 1) -> None:
        if n < 1:
            raise TextSourceError(f"a sample of {n} documents was asked for; it needs at least 1")
        self._rows = rows_of(source)
        order = list(range(len(self._rows)))
        random.Random(seed).shuffle(order)
        self._order = order[:n]
        self.name = f"{source.name} (sample of {len(self._order)}, seed {seed})"
        self.digest = _digest(source.digest, "sample", str(n), str(seed))

    def __iter__(self) -> Iterator[str]:
        return (self._rows[index] for index in self._order)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> str:
        return self._rows[self._order[index]]


def open_text(spec: str | Path) -> TextSource:
    """Text source by name: a `.txt` or `.jsonl` file, "wikitext-103", "wikipedia", or "dataset:NAME[:CONFIG]".

    Raises:
        TextSourceError: the name is none of these.
    """
    named = {
        "wikitext-103": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
        "wikipedia": ("wikimedia/wikipedia", "20231101.en"),
    }
    if str(spec) in named:
        return DatasetText(*named[str(spec)])
    if str(spec).startswith("dataset:"):
        return DatasetText(*str(spec).split(":")[1:3])
    if Path(spec).suffix.lower() in (".txt", ".jsonl"):
        return FileText(spec)
    raise TextSourceError(
        f"unknown text source {str(spec)!r}; use a .txt or .jsonl file, "
        f"{', '.join(sorted(named))} or dataset:NAME[:CONFIG]"
    )


def rows_of(source: TextSource) -> Sequence[str]:
    """Documents by number: the source itself where it has random access, else a list of it."""
    if hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        return source  # type: ignore[return-value]
    return list(source)


def _digest(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))  # keeps ("ab", "c") apart from ("a", "bc")
        digest.update(data)
    return digest.hexdigest()
