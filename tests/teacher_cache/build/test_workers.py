"""Several processes build one store, and it is the store that one process builds."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed import HashStore

from teacher_cache.build.build import _Job
from teacher_cache.build.inputs import Silent, read_inputs
from teacher_cache.build.settings import BuildSettings
from teacher_cache.build.workers import Workers
from teacher_cache.errors import StoreError
from teacher_cache.read.info import describe_store
from teacher_cache.storage.base import open_storage
from tests.warm.share import Warm

Settings = Callable[..., BuildSettings]

BUILDER = """
import os, signal, sys
from teacher_cache.build.build import Silent, build_cache
from teacher_cache.build.settings import BuildSettings
from teacher_cache.build.workers import Workers

class Dies(Silent):
    def committed(self, rows, total, written):
        if sys.argv[2] == "dies":
            os.kill(os.getpid(), signal.SIGKILL)

workers = Workers.from_environment()
settings = eval(sys.argv[1])
report = build_cache(settings, Dies() if workers.rank == 1 else None, workers)
if workers.first:
    print(report.computed_rows, report.written_bytes)
"""


def launch(warm: Warm, count: int, settings: BuildSettings, fate: str = "lives") -> subprocess.CompletedProcess[str]:
    """Build with so many workers under torchrun; with `dies`, the second is killed when it starts."""
    script = Path(settings.out).parent / "builder.py"
    script.write_text(BUILDER)
    command = [*warm.torchrun(count), str(script), repr(settings), fate]
    # with as many threads as here: sums in another order would differ in their last bits
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.run(command, env=environment, check=False, capture_output=True, text=True)


def shards_and_commits(store: Path) -> dict[str, bytes]:
    files = {file.relative_to(store).as_posix(): file for file in sorted(store.rglob("*")) if file.is_file()}
    return {key: file.read_bytes() for key, file in files.items() if "/c/" in key or key.startswith("commits/")}


def test_a_killed_workers_blocks_are_finished_by_another_number_of_workers_whose_teachers_lie_on_the_disk(
    small_settings: Settings, nmse_store: Path, warm: Warm, tmp_path: Path
) -> None:
    settings = small_settings(tmp_path / "cache.zarr", precision="nmse:1e-2", views=2)
    killed = launch(warm, 2, settings, "dies")
    assert killed.returncode != 0
    # the first one may have come to its second block before it was ended
    (Path(settings.out) / "commits" / "00000002.json").unlink(missing_ok=True)
    info = describe_store(settings.out)
    assert not info.sealed
    # two workers share what is left, each with a teacher of its own that is spread over memory and disk
    assert {1, 2} <= set(info.missing_blocks)
    done = launch(warm, 3, replace(settings, device="cpu", device_map="auto", max_memory="cpu:40kB"))
    assert done.returncode == 0, done.stderr
    missing_rows = sum(len(range(*info.manifest.block_range(block))) for block in info.missing_blocks)
    assert int(done.stdout.split()[0]) == missing_rows
    assert shards_and_commits(Path(settings.out)) == shards_and_commits(nmse_store)
    assert json.loads((Path(settings.out) / "seal.json").read_text())["blocks"] == 3


def test_a_worker_alone_waits_for_nobody() -> None:
    workers = Workers()
    assert workers.share("work", {"a": [1]}) == {"a": [1]}
    assert [workers.add("rows", 3), workers.add("rows", 4), workers.add("bytes", 0)] == [3, 7, 0]
    workers.wait_for_all("end")


def test_workers_with_other_texts_are_refused_before_anything_is_written(
    small_settings: Settings, tmp_path: Path
) -> None:
    """A stale copy of the corpus on one node would fill its blocks with other rows under the same ids."""
    mine, theirs = tmp_path / "mine.txt", tmp_path / "theirs.txt"
    settings = small_settings(tmp_path / "cache.zarr", targets="hidden", corpus=(str(mine),))
    lines = Path(small_settings(tmp_path).corpus[0]).read_text().splitlines()
    mine.write_text("\n".join(lines))
    theirs.write_text("\n".join(reversed(lines)))
    meeting, errors = HashStore(), {}
    inputs = [
        read_inputs(replace(settings, corpus=(str(theirs if rank == 1 else mine),)), Silent()) for rank in range(3)
    ]

    def work(rank: int) -> None:
        teacher, projections, rows, manifest = inputs[rank]
        workers = Workers(rank, 3, meeting)
        job = _Job(settings, teacher, projections, rows, open_storage(settings.out), workers, Silent())
        try:
            job.run(manifest)
        except StoreError as error:
            errors[rank] = str(error)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))
    assert "worker 1 of 3 was given other inputs than worker 0:\n  corpus" in errors[1]
    assert all("1 of 3 workers have other inputs" in errors[rank] for rank in (0, 2))
    assert not list((tmp_path / "cache.zarr").rglob("*.json"))
