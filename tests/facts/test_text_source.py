"""Text sources: documents, random access, digests, errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from rep_fast.errors import MissingDependencyError, TextSourceError
from rep_fast.facts import DatasetText, FileText, MemoryText, SampledText, TextSource, open_text


def test_blank_lines_separate_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n one\ntwo \n \n\nthrée\n", encoding="utf-8")
    text = FileText(tmp_path / "a.txt")
    assert list(text) == ["one\ntwo", "thrée"]
    assert text[1] == "thrée"
    assert len(text) == 2


def test_without_blank_lines_every_line_is_a_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\r\n")
    assert list(FileText(tmp_path / "a.txt")) == ["one", "two"]


def test_jsonl_documents(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one\\n\\ntwo", "id": 1}\n\n{"text": ""}\n')
    text = FileText(tmp_path / "a.jsonl")
    assert list(text) == list(text) == ["one\n\ntwo", ""]


@pytest.mark.parametrize("line", ["{", "[1]", '{"id": 1}', '{"text": 3}', "3"])
def test_jsonl_without_text_is_named_by_record(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a"}) + "\n" + line + "\n")
    with pytest.raises(TextSourceError, match=r"record 2 of .*a\.jsonl is not a JSON object with a 'text' field"):
        list(FileText(tmp_path / "a.jsonl"))


def test_document_out_of_range(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n")
    with pytest.raises(IndexError, match="document 1 of 1"):
        FileText(tmp_path / "a.txt")[1]


@pytest.mark.parametrize("content", [b"", b" \n\n"])
def test_empty_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(TextSourceError, match="is empty"):
        FileText(tmp_path / "a.txt")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(TextSourceError, match="cannot read text file"):
        FileText(tmp_path / "absent.txt")


def test_unknown_suffix(tmp_path: Path) -> None:
    with pytest.raises(TextSourceError, match=r"unknown kind '\.csv'; use \.txt or \.jsonl"):
        FileText(tmp_path / "a.csv")


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine\n\xff\xfe\n")
    with pytest.raises(TextSourceError, match=r"document 2 of .* is not UTF-8"):
        list(FileText(tmp_path / "a.txt"))


def test_digest_follows_content_not_name(tmp_path: Path) -> None:
    for name, content in (("a", "one\n"), ("b", "one\n"), ("c", "two\n")):
        (tmp_path / f"{name}.txt").write_text(content)
    a, b, c = (FileText(tmp_path / f"{name}.txt").digest for name in "abc")
    assert a == b != c


def test_memory_digest_knows_where_documents_end() -> None:
    assert MemoryText("m", ["ab", "c"]).digest != MemoryText("m", ["a", "bc"]).digest


@pytest.mark.parametrize("documents", [[], ["", " "]])
def test_empty_memory(documents: list[str]) -> None:
    with pytest.raises(TextSourceError, match="'m' is empty"):
        MemoryText("m", documents)


def test_memory_refuses_one_text() -> None:
    with pytest.raises(TextSourceError, match="needs a sequence of texts, got str"):
        MemoryText("m", "one text")


def test_sample_is_a_seeded_subset() -> None:
    source = MemoryText("m", [str(number) for number in range(50)])
    sample, same, other = (SampledText(source, 10, seed=seed) for seed in (1, 1, 2))
    assert list(sample) == list(same) != list(other)
    assert len(set(sample)) == len(sample) == 10
    assert sample[3] == list(sample)[3]
    assert sample.digest == same.digest != other.digest
    assert sample.digest != SampledText(source, 11, seed=1).digest


def test_sample_larger_than_the_source_is_all_of_it() -> None:
    assert sorted(SampledText(MemoryText("m", ["a", "b"]), 5)) == ["a", "b"]


def test_empty_sample() -> None:
    with pytest.raises(TextSourceError, match="sample of 0"):
        SampledText(MemoryText("m", ["a"]), 0)


class Rows:
    """What `datasets.load_dataset` gives, as far as it is used."""

    def __init__(self, texts: list[str]) -> None:
        self.column_names = ["text"]
        self._rows = [{"text": text} for text in texts]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, str]:
        return self._rows[index]


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for the optional package: a dataset of these rows."""
    texts = ["one", "", "three"]
    module = ModuleType("datasets")

    def load_dataset(name: str, config: str | None, *, split: str, revision: str | None) -> Rows:
        if name == "absent":
            raise ConnectionError("no network")
        return Rows(texts)

    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return texts


def test_dataset_rows(rows: list[str]) -> None:
    text = DatasetText("wiki", "raw")
    assert list(text) == rows
    assert (len(text), text[2], text.name) == (3, "three", "wiki/raw")
    assert isinstance(text, TextSource)


def test_dataset_digest_covers_settings_and_rows(rows: list[str]) -> None:
    first = DatasetText("wiki").digest
    assert first == DatasetText("wiki").digest != DatasetText("wiki", split="test").digest
    rows[1] = "changed"
    assert first != DatasetText("wiki").digest


def test_dataset_errors(rows: list[str]) -> None:
    with pytest.raises(TextSourceError, match=r"'absent' \(default, train\) cannot be loaded: no network"):
        DatasetText("absent")
    with pytest.raises(TextSourceError, match=r"no column 'body'; it has \['text'\]"):
        DatasetText("wiki", column="body")
    rows.clear()
    with pytest.raises(TextSourceError, match="is empty"):
        DatasetText("wiki")


def test_dataset_without_the_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "rep-fast\[data\]"'):
        DatasetText("wiki")


def test_open_text_by_name(rows: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n")
    assert list(open_text(tmp_path / "a.txt")) == ["one"]
    assert open_text("wikitext-103").name == "Salesforce/wikitext/wikitext-103-raw-v1"
    assert open_text("dataset:owner/name:part").name == "owner/name/part"
    with pytest.raises(TextSourceError, match=r"unknown text source 'wikitext'; .*wikitext-103"):
        open_text("wikitext")
