"""Collecting: the right sum over the right tokens, and the same bits after any interruption."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rep_fast.edits import Edit, ModuleEdit
from rep_fast.errors import (
    FingerprintError,
    HparamError,
    LayerError,
    NonFiniteError,
    OutputError,
    SingularMomentError,
    TextSourceError,
)
from rep_fast.facts import MemoryText, TextSource
from rep_fast.models import EditableLM
from rep_fast.stats import SecondMoments
from rep_fast.stats.second_moments import Progress

SENTENCES = (
    "Slovenia belongs to the continent of Europe.",
    "The iPhone is produced by Apple, and Windows by Microsoft.",
    "",
    "Kobe Bryant plays basketball.",
    "Ünïcödé names like Zürich and São Paulo.",
    "Therefore, we stay here in the city of Paris, because of this.",
)
CORPUS = MemoryText("sentences", [f"{text} {number}" for number in range(12) for text in SENTENCES])


def rows_of(lm: EditableLM, corpus: TextSource, *, max_length: int = 4096) -> list[list[int]]:
    return [lm.tokenizer(document)["input_ids"][:max_length] for document in corpus]


def moment_by_hand(lm: EditableLM, layer: int, rows: list[list[int]], *, skip: int = 0) -> tuple[torch.Tensor, int]:
    """C and the token count, one document at a time."""
    total, count = torch.zeros(lm.key_width(layer), lm.key_width(layer), dtype=torch.float64), 0
    for row in rows:
        keys = lm.keys([row], layer)[layer][skip:]
        total += keys.T.double() @ keys.double()
        count += len(keys)
    return total / count, count


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_the_whole_corpus_in_every_family(tiny_lm64: EditableLM, tmp_path: Path) -> None:
    moments = SecondMoments.collect(tiny_lm64, CORPUS, [2, 0], tokens="full", cache_dir=tmp_path, block_tokens=100)
    rows = rows_of(tiny_lm64, CORPUS, max_length=64 if tiny_lm64.family == "mistral" else 256)
    for layer in (0, 2):
        expected, count = moment_by_hand(tiny_lm64, layer, rows)
        assert moments.counts[layer] == count
        close(moments.second_moment(layer), expected)
    assert moments.layers == (0, 2)
    assert (moments.fingerprint, moments.corpus) == (tiny_lm64.fingerprint, "sentences")


@pytest.mark.parametrize(("tokens", "count"), [(1, 1), (333, 333), ("5xM", 240), ("2.5xM", 120)])
def test_exactly_the_tokens_asked_for(tiny_llama64: EditableLM, tmp_path: Path, tokens: Any, count: int) -> None:
    moments = SecondMoments.collect(tiny_llama64, CORPUS, 1, tokens=tokens, cache_dir=tmp_path, block_tokens=50)
    rows, left = [], count
    for row in rows_of(tiny_llama64, CORPUS):
        if left > 0:
            rows.append(row[:left])
            left -= len(row)
    expected, found = moment_by_hand(tiny_llama64, 1, rows)
    assert moments.counts == {1: count}
    assert found == count
    close(moments.second_moment(1), expected)


def test_the_begin_of_text_token_can_be_left_out(tiny_llama64: EditableLM, tmp_path: Path) -> None:
    moments = SecondMoments.collect(
        tiny_llama64, CORPUS, 1, tokens="full", include_bos=False, cache_dir=tmp_path, block_tokens=64
    )
    rows = rows_of(tiny_llama64, CORPUS)
    assert all(row[0] == tiny_llama64.tokenizer.bos_token_id for row in rows)
    expected, count = moment_by_hand(tiny_llama64, 1, rows, skip=1)
    assert moments.counts == {1: count}
    close(moments.second_moment(1), expected)


def test_without_a_begin_of_text_token_nothing_is_left_out(tiny_gpt2_64: EditableLM, tmp_path: Path) -> None:
    counts = {
        SecondMoments.collect(tiny_gpt2_64, CORPUS, 1, tokens="full", include_bos=include, cache_dir=tmp_path).counts[1]
        for include in (True, False)
    }
    assert len(counts) == 1


def test_documents_are_cut_to_the_length_asked_for(tiny_llama64: EditableLM, tmp_path: Path) -> None:
    moments = SecondMoments.collect(tiny_llama64, CORPUS, 1, tokens="full", max_length=5, cache_dir=tmp_path)
    expected, count = moment_by_hand(tiny_llama64, 1, rows_of(tiny_llama64, CORPUS, max_length=5))
    assert moments.counts == {1: count}
    close(moments.second_moment(1), expected)


def test_documents_longer_than_the_context_are_cut_to_it(tiny_gpt2: EditableLM, tmp_path: Path) -> None:
    corpus = MemoryText("long", ["continent of Europe " * 300])
    assert SecondMoments.collect(tiny_gpt2, corpus, 0, tokens="full", cache_dir=tmp_path).counts == {0: 256}


def test_shards_merge_to_the_whole(tiny_llama64: EditableLM, tmp_path: Path) -> None:
    documents = list(CORPUS)
    parts = [MemoryText("first", documents[:20]), MemoryText("second", documents[20:]), CORPUS]
    first, second, whole = (
        SecondMoments.collect(tiny_llama64, part, [0, 1], tokens="full", cache_dir=tmp_path, block_tokens=77)
        for part in parts
    )
    merged = first.merge(second)
    assert merged.counts == whole.counts
    for layer in (0, 1):
        close(merged.second_moment(layer), whole.second_moment(layer))


class Interrupting:
    """A corpus that interrupts after some documents, as Ctrl-C would, with the content of another."""

    def __init__(self, source: MemoryText, after: int) -> None:
        self.name, self.digest = source.name, source.digest
        self._source, self._after = source, after
        self.read = 0

    def __iter__(self) -> Iterator[str]:
        for number, document in enumerate(self._source):
            if number == self._after:
                raise KeyboardInterrupt
            self.read += 1
            yield document


def interrupt(lm: EditableLM, after: int, **options: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        SecondMoments.collect(lm, Interrupting(CORPUS, after), [0, 1], **options)


@pytest.mark.parametrize("tokens", ["full", 700])
def test_an_interrupted_collection_ends_with_the_same_bits(tiny_llama: EditableLM, tmp_path: Path, tokens: Any) -> None:
    options: dict[str, Any] = {"tokens": tokens, "block_tokens": 90}
    straight = SecondMoments.collect(tiny_llama, CORPUS, [0, 1], cache_dir=tmp_path / "a", **options)
    done: list[int] = []
    for after in (1, 12, 13, 29):  # in the first block, then in later ones
        interrupt(tiny_llama, after, cache_dir=tmp_path / "b", **options)
    resumed = SecondMoments.collect(
        tiny_llama, CORPUS, [0, 1], cache_dir=tmp_path / "b", progress=lambda now, _: done.append(now), **options
    )
    assert done[0] > 200  # it went on, it did not start over
    assert resumed.counts == straight.counts
    for layer in (0, 1):
        assert torch.equal(resumed.second_moment(layer), straight.second_moment(layer))
    files = [{path.name: path.read_bytes() for path in (tmp_path / part / "moments").iterdir()} for part in "ab"]
    assert files[0] == files[1]  # the same files to the last bit, no partial result left over


def test_an_interrupt_between_saves_keeps_every_finished_block(tiny_llama: EditableLM, tmp_path: Path) -> None:
    seen: list[int] = []

    def stop(now: int, _: int | None) -> None:
        seen.append(now)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SecondMoments.collect(
            tiny_llama, CORPUS, 1, tokens="full", block_tokens=60, cache_dir=tmp_path, progress=stop, save_every_s=1e9
        )
    after: list[int] = []
    SecondMoments.collect(
        tiny_llama,
        CORPUS,
        1,
        tokens="full",
        block_tokens=60,
        cache_dir=tmp_path,
        progress=lambda now, _: after.append(now),
    )
    assert after[0] > seen[-1]
    assert after[0] - seen[-1] < 150  # one block further


def test_saving_after_every_block_changes_nothing(tiny_llama: EditableLM, tmp_path: Path) -> None:
    one, two = (
        SecondMoments.collect(
            tiny_llama, CORPUS, 1, tokens="full", block_tokens=60, cache_dir=tmp_path / str(pause), save_every_s=pause
        )
        for pause in (0.0, 1e9)
    )
    assert torch.equal(one.second_moment(1), two.second_moment(1))


def test_without_resume_it_starts_over(tiny_llama: EditableLM, tmp_path: Path) -> None:
    options: dict[str, Any] = {"tokens": "full", "block_tokens": 60, "cache_dir": tmp_path}
    interrupt(tiny_llama, 30, **options)
    seen: list[int] = []
    progress: Progress = lambda now, _: seen.append(now)  # noqa: E731
    SecondMoments.collect(tiny_llama, CORPUS, [0, 1], resume=False, progress=progress, **options)
    assert seen[0] < 120


def test_finished_layers_come_from_the_cache(tiny_llama: EditableLM, tmp_path: Path) -> None:
    options: dict[str, Any] = {"tokens": 500, "cache_dir": tmp_path}
    both = SecondMoments.collect(tiny_llama, CORPUS, [0, 1], **options)
    untouched = Interrupting(CORPUS, 0)
    again = SecondMoments.collect(tiny_llama, untouched, [1], **options)
    assert untouched.read == 0
    assert torch.equal(again.second_moment(1), both.second_moment(1))
    with pytest.raises(KeyboardInterrupt):  # layer 2 is missing, so the corpus is read
        SecondMoments.collect(tiny_llama, untouched, [1, 2], **options)


@pytest.mark.parametrize("change", [{"tokens": 499}, {"include_bos": False}, {"max_length": 9}, {"block_tokens": 7}])
def test_other_settings_are_other_results(tiny_llama: EditableLM, tmp_path: Path, change: dict[str, Any]) -> None:
    options: dict[str, Any] = {"tokens": 500, "cache_dir": tmp_path}
    SecondMoments.collect(tiny_llama, CORPUS, 1, **options)
    with pytest.raises(KeyboardInterrupt):
        SecondMoments.collect(tiny_llama, Interrupting(CORPUS, 0), 1, **(options | change))


def test_another_model_or_corpus_is_another_result(build_lm: Callable[..., EditableLM], tmp_path: Path) -> None:
    options: dict[str, Any] = {"tokens": 500, "cache_dir": tmp_path}
    SecondMoments.collect(build_lm("llama"), CORPUS, 1, **options)
    with pytest.raises(KeyboardInterrupt):
        SecondMoments.collect(build_lm("llama", seed=1), Interrupting(CORPUS, 0), 1, **options)
    with pytest.raises(KeyboardInterrupt):
        SecondMoments.collect(build_lm("llama"), Interrupting(MemoryText("sentences", ["other"]), 0), 1, **options)


@pytest.mark.parametrize("kind", ["finished", "partial"])
def test_a_damaged_cache_is_made_again_with_a_warning(
    tiny_llama: EditableLM, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"tokens": "full", "block_tokens": 60}
    clean = SecondMoments.collect(tiny_llama, CORPUS, [0, 1], cache_dir=tmp_path / "clean", **options)
    if kind == "partial":
        interrupt(tiny_llama, 30, cache_dir=tmp_path / "bad", **options)
    else:
        SecondMoments.collect(tiny_llama, CORPUS, [0, 1], cache_dir=tmp_path / "bad", **options)
    for path in (tmp_path / "bad" / "moments").iterdir():
        path.write_bytes(path.read_bytes()[:-5])
    with caplog.at_level(logging.WARNING):
        again = SecondMoments.collect(tiny_llama, CORPUS, [0, 1], cache_dir=tmp_path / "bad", **options)
    assert "is damaged" in caplog.text
    assert torch.equal(again.second_moment(1), clean.second_moment(1))


def test_the_cache_directory_comes_from_the_environment(
    tiny_llama: EditableLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REP_FAST_CACHE", str(tmp_path / "cache"))
    SecondMoments.collect(tiny_llama, CORPUS, 1, tokens=100)
    (path,) = (tmp_path / "cache" / "moments").iterdir()
    assert path.name.startswith("tiny-llama-layer1-")


def test_a_short_corpus_warns_and_has_no_solver(
    tiny_llama: EditableLM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        moments = SecondMoments.collect(tiny_llama, MemoryText("short", ["Slovenia"]), 1, cache_dir=tmp_path)
    (count,) = moments.counts.values()
    assert f"short gave {count} tokens, fewer than the key width M = 48" in caplog.text
    with pytest.raises(SingularMomentError, match=rf"width 48 from {count} tokens .*collect more tokens"):
        moments.solver(1)


def test_fewer_tokens_than_asked_for_are_reported(
    tiny_llama: EditableLM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        moments = SecondMoments.collect(tiny_llama, CORPUS, 1, tokens=10**6, cache_dir=tmp_path)
    assert f"gave {moments.counts[1]} tokens of the 1000000 asked for" in caplog.text


def test_progress_counts_up_to_the_tokens_asked_for(tiny_llama: EditableLM, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    SecondMoments.collect(
        tiny_llama, CORPUS, 1, tokens=300, block_tokens=50, cache_dir=tmp_path, progress=lambda *now: seen.append(now)
    )
    assert seen[-1] == (300, 300)
    assert seen == sorted(seen)
    assert len(seen) >= 3


def test_keys_that_are_not_finite(build_lm: Callable[..., EditableLM], tmp_path: Path) -> None:
    lm = build_lm("llama")
    with torch.no_grad():
        lm.up_weight(1)[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"layer 1, documents 1 to \d+: .*row 0"):
        SecondMoments.collect(lm, CORPUS, [0, 1], tokens=300, cache_dir=tmp_path)
    assert not list((tmp_path / "moments").iterdir())


def test_a_model_with_active_edits(build_lm: Callable[..., EditableLM], tmp_path: Path) -> None:
    lm = build_lm("llama")
    edit = Edit((), "none", {}, lm.fingerprint, (ModuleEdit(1),))
    with edit.applied(lm), pytest.raises(FingerprintError, match="1 active edits; undo them"):
        SecondMoments.collect(lm, CORPUS, 1, cache_dir=tmp_path)


@pytest.mark.parametrize("tokens", [0, -5, "0xM", "many", "xM", 3.5, True, None])
def test_token_numbers_out_of_range(tiny_llama: EditableLM, tmp_path: Path, tokens: Any) -> None:
    with pytest.raises(HparamError, match="is no number of tokens"):
        SecondMoments.collect(tiny_llama, CORPUS, 1, tokens=tokens, cache_dir=tmp_path)


@pytest.mark.parametrize("change", [{"max_length": 0}, {"max_length": 257}, {"block_tokens": 0}, {"layers": []}])
def test_settings_out_of_range(tiny_llama: EditableLM, tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(HparamError):
        SecondMoments.collect(**({"lm": tiny_llama, "corpus": CORPUS, "layers": [1], "cache_dir": tmp_path} | change))


def test_a_layer_outside_the_model(tiny_llama: EditableLM, tmp_path: Path) -> None:
    with pytest.raises(LayerError, match="layer 3"):
        SecondMoments.collect(tiny_llama, CORPUS, [1, 3], cache_dir=tmp_path)


def test_a_corpus_without_tokens(tiny_gpt2: EditableLM, tmp_path: Path) -> None:
    blank = Interrupting(CORPUS, 99)
    blank._source = [""]  # type: ignore[assignment]
    with pytest.raises(TextSourceError, match="'sentences' gave no tokens"):
        SecondMoments.collect(tiny_gpt2, blank, 1, cache_dir=tmp_path)


def test_an_unknown_corpus_by_name(tiny_llama: EditableLM, tmp_path: Path) -> None:
    with pytest.raises(TextSourceError, match="unknown text source 'wiki'"):
        SecondMoments.collect(tiny_llama, "wiki", 1, cache_dir=tmp_path)


def test_a_corpus_by_file_name(tiny_llama: EditableLM, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Slovenia belongs to Europe.\n" * 20)
    moments = SecondMoments.collect(tiny_llama, tmp_path / "text.txt", 1, tokens=100, cache_dir=tmp_path)
    assert (moments.corpus, moments.counts) == ("text.txt", {1: 100})


def test_a_cache_that_cannot_be_written_fails_before_the_work(tiny_llama: EditableLM, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    untouched = Interrupting(CORPUS, 0)
    with pytest.raises(OutputError, match=r"cannot keep second moments in .*set REP_FAST_CACHE"):
        SecondMoments.collect(tiny_llama, untouched, 1, cache_dir=tmp_path / "file")
