"""Atomic writing: whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from rep_fast.errors import OutputError
from rep_fast.safe_files import is_left_over, replacing, write_atomically


def test_content_arrives_and_nothing_else(tmp_path: Path) -> None:
    write_atomically(tmp_path / "new" / "file", b"one")
    write_atomically(tmp_path / "new" / "file", b"two")
    assert [path.read_bytes() for path in (tmp_path / "new").iterdir()] == [b"two"]


def test_a_failure_keeps_the_old_content(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", b"old")

    def half() -> None:
        with replacing(tmp_path / "file") as temporary:
            temporary.write_bytes(b"ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_what_a_kill_leaves_behind_is_known_by_its_name(tmp_path: Path) -> None:
    for name in ("settings.json", ".hidden", "a b.{}"):
        with replacing(tmp_path / name) as temporary:
            temporary.write_bytes(b"")
            assert is_left_over(temporary)
        assert not is_left_over(tmp_path / name)
    others = (".tmp", "notes.tmp", ".notes.tmp", "notes.12.0123abcd.tmp", ".notes.12.0123ABCD.tmp", ".notes.x.tmp")
    assert not any(is_left_over(name) for name in others)


def test_a_file_in_the_place_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match=r"cannot write .*choose another place"):
        write_atomically(tmp_path / "file" / "inside", b"x")


def test_a_directory_in_the_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        write_atomically(tmp_path / "taken", b"x")
    assert list(tmp_path.iterdir()) == [tmp_path / "taken"]
