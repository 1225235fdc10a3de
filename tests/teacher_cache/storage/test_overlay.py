"""A draft answers like the storage that it would become, and leaves the real one alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from teacher_cache.storage.local import LocalStorage
from teacher_cache.storage.overlay import Overlay


@pytest.fixture
def base(tmp_path: Path) -> LocalStorage:
    storage = LocalStorage(tmp_path / "store")
    for key in ("a/one", "a/two", "b"):
        storage.write(key, key.encode())
    return storage


def test_writes_and_deletions_are_seen_in_the_draft_alone(base: LocalStorage, tmp_path: Path) -> None:
    before = base.list()
    draft = Overlay(base)
    (tmp_path / "file").write_bytes(b"from a file")
    draft.write("a/three", b"3")
    draft.write("b", b"another")
    draft.write_file("c", tmp_path / "file")
    draft.delete("a/one")
    draft.delete("absent")
    assert draft.list() == {"a/three": 1, "a/two": 5, "b": 7, "c": 11}
    assert draft.list("a/") == {"a/three": 1, "a/two": 5}
    assert [draft.read(key) for key in draft.list()] == [b"3", b"a/two", b"another", b"from a file"]
    assert b"".join(draft.stream("b")) == b"another"
    assert draft.size("a/one") is None and draft.size("a/two") == 5 and draft.size("b") == 7
    with pytest.raises(FileNotFoundError):
        draft.read("a/one")
    assert draft.added_bytes() == 1 + (7 - 1) + 11
    draft.remove_unfinished()
    with draft.lock(), draft.scratch() as folder:
        assert folder.is_dir()
    assert base.list() == before and base.read("b") == b"b"


def test_what_is_deleted_can_be_written_again(base: LocalStorage) -> None:
    draft = Overlay(base)
    draft.delete("b")
    draft.write("b", b"new")
    assert draft.read("b") == b"new" and draft.list("b") == {"b": 3}
    draft.delete("b")
    assert draft.size("b") is None and draft.list("b") == {}


def test_a_draft_of_nothing_is_not_created(tmp_path: Path) -> None:
    draft = Overlay(LocalStorage(tmp_path / "none"))
    assert draft.list() == {}
    draft.write("a", b"1")
    assert not (tmp_path / "none").exists()
    assert draft.free_bytes() == pytest.approx(LocalStorage(tmp_path).free_bytes(), rel=0.05)


def test_what_was_not_changed_is_streamed_in_pieces(base: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher's weights of a finished store are gigabytes."""
    draft = Overlay(base)
    draft.write("b", b"new")
    with monkeypatch.context() as patched:
        patched.setattr(base, "read", None)
        assert b"".join(draft.stream("a/one")) == b"a/one" and b"".join(draft.stream("b")) == b"new"
    draft.delete("a/one")
    with pytest.raises(FileNotFoundError):
        list(draft.stream("a/one"))
