"""Claims of runs: one holder at a time, however the last one ended and wherever it ran."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cli import sweep_claims
from cli.sweep_claims import FOLDER, Claim, Claims
from teacher_cache.errors import TrainingError
from teacher_cache.processes import this_process

LONG = 600.0
"""A lease that does not run out while a test runs."""
BRIEF = 0.4


def write_claim(out: Path, name: str, number: int, **changes: Any) -> Path:
    path = out / FOLDER / f"{name}.{number}"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**this_process(), "state": "held", "renewals": 3, **changes}))
    return path


def taken(claims: Claims, name: str = "a") -> Claim:
    claim = claims.take(name)
    assert claim is not None
    return claim


def test_a_run_has_one_holder_until_it_is_released_and_then_says_what_came_of_it(tmp_path: Path) -> None:
    first, second = Claims(tmp_path, LONG), Claims(tmp_path, LONG)
    assert second.look("a") is None
    claim = taken(first)
    assert second.take("a") is None and first.take("a") is None
    seen = second.look("a")
    assert seen is not None and seen.outcome is None and "process" in seen.holder
    assert taken(second, "b").name == "b"
    claim.release("failed (1)")
    claim.release("complete")
    seen = second.look("a")
    assert seen is not None and seen.outcome == "failed (1)" and seen.number == 1
    taken(second).release("complete")
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == ["a.1", "a.2", "b.1"]


def test_what_an_exception_ends_is_released(tmp_path: Path) -> None:
    claims = Claims(tmp_path, LONG)
    with pytest.raises(KeyError), taken(claims):
        raise KeyError
    seen = claims.look("a")
    assert seen is not None and seen.outcome == "stopped"


def test_one_of_many_that_reach_for_a_run_at_once_gets_it(tmp_path: Path) -> None:
    ready = threading.Barrier(16)

    def reach(_: int) -> Claim | None:
        claims = Claims(tmp_path, LONG)
        claims.look("a")
        ready.wait()
        return claims.take("a")

    with ThreadPoolExecutor(16) as pool:
        for number in range(1, 6):
            found = [claim for claim in pool.map(reach, range(16)) if claim is not None]
            assert len(found) == 1
            assert (tmp_path / FOLDER / f"a.{number}").exists()
            found[0].release("stopped")


def test_a_process_of_this_machine_that_is_gone_is_replaced_at_once(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-S", "-c", ""])
    gone.wait()
    write_claim(tmp_path, "a", 1, pid=gone.pid)
    taken(Claims(tmp_path, LONG)).release("complete")
    # the same number on another machine, or after another start of this one, may be anybody's
    write_claim(tmp_path, "b", 1, pid=gone.pid, host="elsewhere", processes="another start")
    assert Claims(tmp_path, LONG).take("b") is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"state": 3, "pid": true}', '{"pid": -1}', "\xff" * 9000])
def test_a_damaged_claim_is_somebodys_for_a_lease(tmp_path: Path, content: str) -> None:
    write_claim(tmp_path, "a", 1).write_text(content, encoding="latin-1")
    claims = Claims(tmp_path, BRIEF)
    started = time.monotonic()
    while (claim := claims.take("a")) is None:
        time.sleep(0.01)
    assert time.monotonic() - started >= BRIEF
    claim.release("complete")


def test_a_holder_elsewhere_that_changes_nothing_for_a_lease_is_replaced_and_one_that_does_is_not(
    tmp_path: Path,
) -> None:
    elsewhere = {"host": "elsewhere", "processes": "another start"}
    claims = Claims(tmp_path, BRIEF)
    write_claim(tmp_path, "a", 1, **elsewhere)
    for renewals in range(6):  # more than a lease
        write_claim(tmp_path, "a", 1, renewals=renewals, **elsewhere)
        assert claims.take("a") is None
        time.sleep(BRIEF / 4)
    while (claim := claims.take("a")) is None:
        time.sleep(0.01)
    seen = claims.look("a")
    assert seen is not None and seen.number == 2
    claim.release("complete")


def test_a_holder_that_is_replaced_finds_out_and_writes_nothing_more(tmp_path: Path) -> None:
    claim = taken(Claims(tmp_path, BRIEF))
    assert not claim.lost
    other = write_claim(tmp_path, "a", 2, host="elsewhere", processes="another start")
    content = other.read_bytes()
    while not claim.lost:
        time.sleep(0.01)
    before = (tmp_path / FOLDER / "a.1").read_bytes()
    claim.release("complete")
    assert (tmp_path / FOLDER / "a.1").read_bytes() == before and other.read_bytes() == content


def test_a_holder_that_was_late_takes_the_next_number_before_another_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a machine was asleep: whoever watches may be about to take the run over."""
    claims = Claims(tmp_path, LONG)
    claim = taken(claims)
    later = time.monotonic() + 0.7 * LONG
    monkeypatch.setattr(sweep_claims.time, "monotonic", lambda: later)
    claim._renew()
    assert not claim.lost and (tmp_path / FOLDER / "a.2").exists()
    write_claim(tmp_path, "a", 3, host="elsewhere", processes="another start")
    later += 0.7 * LONG
    claim._renew()
    assert claim.lost


def test_a_holder_that_cannot_renew_for_a_lease_holds_nothing_any_more(tmp_path: Path) -> None:
    claim = taken(Claims(tmp_path, BRIEF))
    (tmp_path / FOLDER / "a.1").unlink()
    (tmp_path / FOLDER).rmdir()
    while not claim.lost:
        time.sleep(0.01)
    claim.release("complete")
    assert not (tmp_path / FOLDER).exists()


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / FOLDER).touch()
    with pytest.raises(TrainingError, match=r"cannot write .*choose another --out"):
        Claims(tmp_path).take("a")
