"""Two processes train the student that one process trains; where one of them stops or fails, both do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from student_train.engine.checkpoint import checkpoint_path
from student_train.engine.ranks import Ranks
from student_train.run_files import read_records
from student_train.settings import TrainSettings
from student_train.train.train import train
from teacher_cache.errors import TrainingError
from tests.records import without_times
from tests.warm.share import Warm

TRAINER = """
import errno, functools, json, os, signal, sys
os.environ["DS_ACCELERATOR"] = "cpu"
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from student_train.data import loader
from student_train.methods import od
from student_train.train import loop
from student_train.train.prepare import TrainingRun
from student_train.settings import TrainSettings
from student_train.train.train import train
from teacher_cache.errors import DistillationError, StoreError

rank = int(os.environ["RANK"])
write = loop.Trainer.write_pending
read = loader.CacheLoader.__next__
save, validation = TorchCheckpointEngine.save, TrainingRun.validation_batches
# at stage 3, where each run of the head brings its weights together: several, and not as many in both processes
od.recomputed_losses = functools.partial(od.recomputed_losses, logits_at_a_time=3 * 200)
signals = []

def stop_second(trainer):
    write(trainer)
    if rank == 1 and trainer.state.step == 6 and signals:
        signals.pop()
        os.kill(os.getpid(), signal.SIGTERM)

def fail_second(batches):
    if rank == 1:
        raise StoreError("block 3 cannot be read")
    return read(batches)

def stop_second_at_the_end(trainer):
    write(trainer)
    if rank == 1 and trainer.state.step == trainer.run.steps and signals:
        signals.pop()
        os.kill(os.getpid(), signal.SIGTERM)

def fill_the_disk(self, *arguments, **options):
    if rank == 1:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return save(self, *arguments, **options)

def fail_validation(run):
    loader.CacheLoader.__next__ = fail_second
    return validation(run)

def run(name, fault, settings):
    signals[:] = [signal.SIGTERM]  # a second one would end the process at once
    loop.Trainer.write_pending = {"stop": stop_second, "stop at the end": stop_second_at_the_end}.get(fault, write)
    loader.CacheLoader.__next__ = fail_second if fault == "fail" else read
    TorchCheckpointEngine.save = fill_the_disk if fault == "disk" else save
    TrainingRun.validation_batches = fail_validation if fault == "fail in validation" else validation
    try:
        result = train(TrainSettings(**settings))
        return {"steps": result.steps, "tokens": result.tokens, "stopped_by": result.stopped_by}
    except DistillationError as error:
        return {"error": str(error)}

results = {name: run(name, fault, settings) for name, fault, settings in json.loads(sys.argv[1])}
with open(f"{sys.argv[2]}/{rank}.json", "w") as file:
    json.dump(results, file)
"""


def settings_for(store: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return {
        "method": "mha+hs+od",
        "mapping": "emd",
        "cache": (str(store),),
        "out": str(out),
        "steps": 12,
        "batch_size": 16,
        # of 5 held-out rows the last pass has one: no row for the first process
        "micro_batch_size": 2,
        "lr": 2e-3,
        "warmup": 3,
        "valid_share": 5 / 101,
        "valid_every": 4,
        "save_every": 4,
        "device": "cpu",
        **changes,
    }


@pytest.fixture(scope="module")
def together(
    tiny_store: Path, warm: Warm, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of several trainings that two processes went through, one after the other, and what each returned."""
    folder = tmp_path_factory.mktemp("ranks")
    stages = {stage: folder / f"zero{stage}.json" for stage in (1, 2, 3)}
    for stage, file in stages.items():
        # at stage 3 the weights of the tiny student would be too small to be cut up
        cut_all = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
        file.write_text(json.dumps({"zero_optimization": {"stage": stage, **cut_all}}))
    started_alone = settings_for(tiny_store, folder / "widened", deepspeed=str(stages[1]))
    train(TrainSettings(**started_alone))
    damaged = shutil.copytree(tiny_store, folder / "damaged.zarr")
    damage(damaged, block=5)
    runs = [
        ("stage0", None, settings_for(tiny_store, folder / "stage0")),
        *(
            (f"stage{n}", None, settings_for(tiny_store, folder / f"stage{n}", deepspeed=str(stages[n])))
            for n in (1, 2, 3)
        ),
        ("widened", None, started_alone | {"resume": str(checkpoint_path(folder / "widened", 8))}),
        # the damaged block alone is one batch, and in another it is all of the second process's share
        ("skipped", None, settings_for(damaged, folder / "skipped", deepspeed=str(stages[3]), **SKIPPING)),
        ("stopped", "stop", settings_for(tiny_store, folder / "stopped", deepspeed=str(stages[1]))),
        ("resumed", None, settings_for(tiny_store, folder / "stopped", deepspeed=str(stages[1]), resume="auto")),
        ("failed", "fail", settings_for(tiny_store, folder / "failed")),
        ("full", "disk", settings_for(tiny_store, folder / "full", deepspeed=str(stages[1]))),
        ("unread", "fail in validation", settings_for(tiny_store, folder / "unread", deepspeed=str(stages[3]))),
        ("late", "stop at the end", settings_for(tiny_store, folder / "late", deepspeed=str(stages[1]))),
        ("uneven", None, settings_for(tiny_store, folder / "uneven", batch_size=15, micro_batch_size=None)),
    ]
    script = folder / "trainer.py"
    script.write_text(TRAINER)
    command = [*warm.torchrun(2), str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(
        [*command, json.dumps(runs), str(folder)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


SKIPPING = {"on_bad_block": "skip", "method": "hs", "mapping": "emd"}


def damage(store: Path, *, block: int) -> None:
    shard = next(path for path in (store / "hidden" / "2" / "codes" / "c" / str(block)).rglob("0") if path.is_file())
    shard.write_bytes(shard.read_bytes()[:-1])


@pytest.fixture(scope="module")
def alone(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training in one process."""
    out = tmp_path_factory.mktemp("alone") / "student"
    train(TrainSettings(**settings_for(tiny_store, out)))
    return out


def records_of(out: Path) -> list[dict[str, Any]]:
    return without_times(read_records(out / "metrics.jsonl"))


def assert_same_training(found: Path, expected: Path, tolerance: float) -> None:
    ours, theirs = records_of(found), records_of(expected)
    assert len(ours) == len(theirs) > 12
    for our, their in zip(ours, theirs, strict=True):
        assert our == pytest.approx(their, rel=tolerance)
    weights, others = (load_file(out / "model.safetensors") for out in (found, expected))
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], rtol=0, atol=20 * tolerance, msg=name)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_processes_train_what_one_trains(together: Any, alone: Path, stage: int) -> None:
    folder, results = together
    assert results[0][f"stage{stage}"] == results[1][f"stage{stage}"]
    assert_same_training(folder / f"stage{stage}", alone, tolerance=2e-4)
    provenance = [json.loads((out / "provenance.json").read_text()) for out in (folder / f"stage{stage}", alone)]
    ours, theirs = (each["adapted"]["hs"]["flow"] for each in provenance)
    assert torch.tensor(ours).sub(torch.tensor(theirs)).abs().max() < 1e-3


def test_a_signal_to_one_process_stops_both_and_they_go_on(together: Any) -> None:
    folder, results = together
    assert [result["stopped"]["stopped_by"] for result in results] == [15, 15]
    assert results[0]["stopped"]["steps"] == results[1]["stopped"]["steps"] in (6, 7)
    assert [result["resumed"]["stopped_by"] for result in results] == [None, None]
    # sums of two processes are taken in the same order every time
    assert records_of(folder / "stopped") == records_of(folder / "stage1")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_process_goes_on_from_the_checkpoint_of_two(together: Any, alone: Path, tmp_path: Path, stage: int) -> None:
    folder, _ = together
    settings = json.loads((folder / f"stage{stage}" / "provenance.json").read_text())["settings"]
    out = tmp_path / "student"
    shutil.copytree(folder / f"stage{stage}", out)
    settings |= {"cache": tuple(settings["cache"]), "out": str(out), "resume": str(checkpoint_path(out, 8))}
    train(TrainSettings(**settings))
    assert_same_training(out, alone, tolerance=2e-4)
    assert not list((out / "checkpoints").glob(".*"))


def test_two_processes_go_on_from_the_checkpoint_of_one(together: Any, alone: Path) -> None:
    folder, _ = together
    assert_same_training(folder / "widened", alone, tolerance=2e-4)


def test_rows_of_a_damaged_block_are_skipped_in_both(together: Any, tiny_store: Path, tmp_path: Path) -> None:
    """Also where nothing is left of one process's share, and the other one's pass needs it."""
    folder, _ = together
    train(TrainSettings(**settings_for(folder / "damaged.zarr", tmp_path / "alone", **SKIPPING)))
    ours, theirs = records_of(folder / "skipped"), records_of(tmp_path / "alone")
    assert [record.get("skipped_rows") for record in ours] == [record.get("skipped_rows") for record in theirs]
    assert ours[-2]["skipped_rows"] == 16
    for our, their in zip(ours, theirs, strict=True):
        assert our == pytest.approx(their, rel=2e-4)


def test_a_share_that_cannot_be_read_ends_both(together: Any) -> None:
    folder, results = together
    assert results[1]["failed"]["error"] == "block 3 cannot be read"
    assert "process 1 of 2 cannot go on" in results[0]["failed"]["error"]
    assert not (folder / "failed" / "config.json").exists()


def test_a_disk_that_is_full_for_one_ends_both(together: Any) -> None:
    """Though the other one waits in the engine's barrier: nobody's death would tell a launcher to end it."""
    folder, results = together
    assert "no space left while writing" in results[1]["full"]["error"]
    assert "process 1 of 2 cannot go on" in results[0]["full"]["error"]
    assert not list((folder / "full" / "checkpoints").glob("*/complete.json"))


def test_held_out_rows_that_one_cannot_read_end_both(together: Any) -> None:
    _, results = together
    assert "block 3 cannot be read" in results[1]["unread"]["error"]
    assert "process 1 of 2 cannot go on" in results[0]["unread"]["error"]


def test_a_signal_to_one_process_in_the_last_step_is_told_to_both(together: Any) -> None:
    folder, results = together
    assert [result["late"]["stopped_by"] for result in results] == [15, 15]
    assert (folder / "late" / "checkpoints" / "step-00000012" / "complete.json").exists()


def test_a_batch_that_cannot_be_shared_out_is_refused(together: Any) -> None:
    folder, results = together
    for result in results:
        assert "--batch-size 15 cannot be shared out among 2 processes" in result["uneven"]["error"]
    assert not (folder / "uneven").exists()


def test_alone_nothing_is_sent() -> None:
    ranks = Ranks()
    values = torch.ones(3)
    assert ranks.gather("here") == ["here"] and ranks.add_up(values) is values and ranks.first
    with pytest.raises(TrainingError, match="^mine$"), ranks.together():
        raise TrainingError("mine")
