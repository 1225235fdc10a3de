"""Builds of several processes that hold one teacher, one of which is killed: all end, and nothing is half-written.

Two processes without a launcher, which would end the one that is left. They are killed in front of file operations, and
when an order was told: the other waits for a collective then. KDCACHE_FAULTS sets how often.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
from dataclasses import dataclass
from pathlib import Path

import pytest

from teacher_cache.format.groups import read_groups
from teacher_cache.storage.local import LocalStorage
from teacher_cache.verify.verify import verify_store
from tests import causal_models
from tests.warm.client import Forked
from tests.warm.share import Warm

TIMES = max(1, int(os.environ.get("KDCACHE_FAULTS", "3")) // 3)
SCRIPT = """
import os, sys
import torch
from cli import kdcache

output, number, before, command, *flags = sys.argv[1:]
stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
os.dup2(stream, 1)
os.dup2(stream, 2)
seen = 0

def count():
    global seen
    seen += 1
    if seen == int(before):
        os.kill(os.getpid(), int(number))

def audit(event, arguments):
    if event in ("open", "os.rename", "os.mkdir", "os.remove") and any("cache.zarr" in str(a) for a in arguments):
        count()

tell = torch.distributed.broadcast_object_list

def tell_and_count(*given, **options):
    tell(*given, **options)
    count()

sys.addaudithook(audit)
torch.distributed.broadcast_object_list = tell_and_count
code = kdcache.main([command, "--tensor-parallel", *flags])
print(seen)
sys.exit(code)
"""


@dataclass
class Ended:
    """How both processes ended, what they printed, and how much they did of what is counted."""

    codes: list[int]
    texts: list[str]

    @property
    def done(self) -> list[int]:
        return [int(text.split()[-1]) for text in self.texts]


class Pair:
    """Starts two processes that build together."""

    def __init__(self, warm: Warm, folder: Path, flags: list[str]) -> None:
        self.warm, self.folder, self.flags = warm, folder, flags
        self.script = folder / "build.py"
        self.script.write_text(SCRIPT)

    def run(
        self,
        out: Path,
        command: str = "build",
        *,
        kill: int | None = None,
        before: int = 0,
        number: signal.Signals = signal.SIGKILL,
    ) -> Ended:
        """Do it to the end, or until process `kill` gets a signal in front of its action number `before`."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        forked: list[Forked] = []
        for rank in range(2):
            environment = {
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            output, moment = str(self.folder / f"{rank}.txt"), str(before if rank == kill else 0)
            arguments = [output, str(int(number)), moment, command, *self.flags, "--out", str(out)]
            forked.append(self.warm.start([str(self.script), *arguments], environment))
        codes = [each.wait() for each in forked]
        return Ended(codes, [(self.folder / f"{rank}.txt").read_text() for rank in range(2)])


@pytest.fixture(scope="module")
def pair(warm: Warm, causal_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    teacher = causal_models.save_teacher(folder / "teacher", vocab_size=causal_models.COMMON["vocab_size"] + 1)
    flags = ["--teacher", str(teacher), "--corpus", str(causal_corpus), "--seq-len", "24", "--max-rows", "20",
             "--block-rows", "4", "--batch-size", "4", "--targets", "logits,hidden", "--device", "cpu"]  # fmt: skip
    return Pair(warm, folder, flags)


@pytest.fixture(scope="module")
def whole(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], list[int]]:
    """What a build that nothing happens to writes, and how much each process does for it."""
    out = tmp_path_factory.mktemp("whole") / "cache.zarr"
    ended = pair.run(out)
    assert ended.codes == [0, 0], ended.texts
    assert "complete. Computed 20 rows" in ended.texts[0] and ended.texts[1].strip().isdecimal()
    return contents(out), ended.done


def contents(store: Path) -> dict[str, bytes]:
    """All but what has the time of its making."""
    files = {path.relative_to(store).as_posix(): path for path in store.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name not in ("zarr.json", "seal.json")}


@pytest.mark.parametrize("killed", [0, 1], ids=["first", "other"])
def test_faults_of_one_process_end_both_and_the_store_is_finished_by_the_next(
    pair: Pair, whole: tuple[dict[str, bytes], list[int]], killed: int, tmp_path: Path
) -> None:
    want, done = whole
    out = tmp_path / "cache.zarr"
    for number in range(TIMES):
        before = 1 + (2 * number + 1) * done[killed] // (2 * TIMES)
        ended = pair.run(out, kill=killed, before=before)
        assert ended.codes[killed] == -signal.SIGKILL, ended.texts
        assert ended.codes[1 - killed] == 1, ended.texts
        left = ended.texts[1 - killed]
        assert f"kdcache: process {1 - killed} of 2 has lost another that holds a part of the teacher" in left
        assert "Traceback" not in left and "Exception ignored" not in left
        if (out / "zarr.json").exists():
            groups = read_groups(LocalStorage(out))
            assert all(group.seal is None for group in groups)
            assert not verify_store(LocalStorage(out)).findings
        again = pair.run(out)
        assert again.codes == [0, 0], again.texts
        assert contents(out) == want
        assert verify_store(LocalStorage(out)).whole and not list(out.rglob("*.partial"))
        shutil.rmtree(out)


def test_a_first_process_that_is_told_to_stop_finishes_its_blocks_and_ends_the_other(
    pair: Pair, whole: tuple[dict[str, bytes], list[int]], tmp_path: Path
) -> None:
    out = tmp_path / "cache.zarr"
    ended = pair.run(out, kill=0, before=whole[1][0] * 3 // 4, number=signal.SIGTERM)
    assert ended.codes == [143, 1], ended.texts
    assert "kdcache build: stopped; committed blocks are safe" in ended.texts[0]
    assert not any("Traceback" in text for text in ended.texts)
    assert not verify_store(LocalStorage(out)).findings


def test_a_plan_is_printed_by_the_first_process_alone(pair: Pair, tmp_path: Path) -> None:
    planned = pair.run(tmp_path / "cache.zarr", "plan")
    assert planned.codes == [0, 0], planned.texts
    assert "a new store" in planned.texts[0] and "20 x 24 tokens, 5 blocks" in planned.texts[0]
    assert planned.texts[1].strip().isdecimal()
    assert not list(tmp_path.iterdir())


def test_faults_of_the_first_process_are_told_to_the_other(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "cache.zarr"
    out.mkdir()
    (out / "notes.txt").write_text("something else")
    ended = pair.run(out)
    assert ended.codes == [1, 1], ended.texts
    assert "it holds something else" in ended.texts[0]
    assert "process 1 of 2 ends because the first one has failed" in ended.texts[1]
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
