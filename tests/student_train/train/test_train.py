"""Training from a real store with the real engine, at toy size, against plain PyTorch loops written out here."""

import json
import os
import subprocess

import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM

from student_train.data.order import RowOrder
from student_train.engine.engine import ADAM_BETAS
from student_train.evaluate.fidelity.fidelity import measure_fidelity
from student_train.evaluate.fidelity.records import fidelity_table
from student_train.students.student import build_student, plan_student
from student_train.train.loop import Trainer
from teacher_cache.errors import DeviceMemoryError, TrainingError
from teacher_cache.read.pool import open_caches
from teacher_cache.read.reader import CacheReader
from tests.student_train.train.trainings import (
    BATCH,
    HELD_OUT,
    LR,
    STEPS,
    make_model,
    read_batch,
    steps_of,
    validations_of,
)


def train_plain(store):
    """The same training without engine, loader or trainer: one loss per batch, textbook AdamW, clipping, schedule."""
    reader, model, objective = make_model(store)
    order = RowOrder(rows=(range(reader.rows - HELD_OUT),), bounds=reader.block_bounds, seed=0)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}], betas=ADAM_BETAS
    )
    records = []
    for step in range(STEPS):
        rate = LR * (min((step + 1) / 3, 1.0) if step < 3 else (STEPS - step) / (STEPS - 3))
        for group in optimizer.param_groups:
            group["lr"] = rate
        sums = model(read_batch(reader, objective.request, order, step))
        losses = {name: part.total / part.count for name, part in sums.items()}
        loss = losses["mha"] + 0.1 * losses["hs"] + 2 * losses["od"]
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        parts = {name: value.item() for name, value in losses.items()}
        records.append({"loss": loss.item(), **parts, "lr": rate, "grad_norm": norm.item()})
    return records, model.student


def test_the_training_is_that_of_a_plain_loop(finished, tiny_store):
    out, records = finished
    plain, student = train_plain(tiny_store)
    ours = steps_of(records)
    assert [record["step"] for record in ours] == list(range(1, STEPS + 1))
    for mine, theirs in zip(ours, plain, strict=True):
        assert {name: mine[name] for name in theirs} == pytest.approx(theirs, rel=1e-5)
    exported = AutoModelForMaskedLM.from_pretrained(out).state_dict()
    mine, theirs = (
        torch.cat([value.flatten() for _, value in sorted(state.items())]) for state in (exported, student.state_dict())
    )
    assert (mine - theirs).norm() / theirs.norm() < 1e-4
    assert ours[-1]["loss"] < ours[0]["loss"] / 1.2


def test_the_output_is_a_plain_student_and_what_it_comes_from(finished, tiny_store):
    out, records = finished
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "metrics.jsonl",
        "provenance.json",
        "tensorboard",
        "checkpoints",
    }
    _, loading = AutoModelForMaskedLM.from_pretrained(out, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    provenance = json.loads((out / "provenance.json").read_text())
    assert provenance["held_out_rows"] == {"first": 96, "count": 5}
    assert provenance["cache"]["identity_sha256"] == CacheReader.open(tiny_store).identity_sha256
    assert provenance["objective"]["hs"]["pairs"] == [[1, 2], [1, 3], [2, 4]]
    assert provenance["weights"] == {"mha": 1.0, "hs": 0.1, "od": 2.0}
    assert provenance["result"]["valid"]["valid_loss"] == validations_of(records)[-1]["valid_loss"]
    assert "copied from the teacher" in provenance["student"]["description"]


def test_several_stores_are_trained_on_and_measured_as_one(run_training, tiny_parts, tmp_path):
    out = tmp_path / "student"
    records = run_training(out, cache=tiny_parts, steps=2, valid_share=0.1, save_every=100)
    pool = open_caches(tiny_parts)
    provenance = json.loads((out / "provenance.json").read_text())
    assert provenance["settings"]["cache"] == list(tiny_parts)
    assert provenance["cache"]["identity_sha256"] == pool.identity_sha256
    stores = provenance["cache"]["stores"]
    assert [(store["path"], store["rows"], store["held_out"]) for store in stores] == [
        (tiny_parts[0], 101, 9),
        (tiny_parts[1], 33, 4),
    ]
    assert provenance["held_out_rows"] == {"first": 92, "count": 13}
    order = RowOrder(rows=(range(92), range(101, 130)), bounds=pool.block_bounds, seed=0)
    request = make_model(tiny_parts[0])[2].request
    for number, record in enumerate(steps_of(records)):
        seen = sum(
            int(read_batch(pool, request, order, earlier)["plain"].length_B.sum()) for earlier in range(number + 1)
        )
        assert record["tokens"] == seen
    for caches, rows in ((tiny_parts, 13), (tiny_parts[:1], 9), (tiny_parts[1:], 4)):
        report = measure_fidelity(out, caches)
        assert (report.rows, report.held_out, report.notes) == (rows, True, ())
    assert "13 held-out rows of" in str(fidelity_table({"student": measure_fidelity(out, tiny_parts)}).caption)


def test_draws_from_the_teacher_teach(run_training, make_tiny_store, tmp_path):
    store = make_tiny_store(tmp_path / "cache.zarr", max_rows=64, targets="logits", logits="sample", k=30)
    out = tmp_path / "student"
    records = run_training(
        out, cache=(str(store),), method="od", weights=None, init="embeddings", valid_share=0.1, save_every=100
    )
    first, *_, last = [record["valid_loss"] for record in validations_of(records)]
    assert last < 0.98 * first
    described = json.loads((out / "provenance.json").read_text())["objective"]["od"]
    assert (described["form"], described["loss"]) == ("sample", "counts")
    report = measure_fidelity(out, [str(store)])
    assert report.distribution.kl == pytest.approx(last, rel=0.5)
    assert "30 ids drawn from the teacher" in report.notes[-1]


def test_stored_matrices_teach_what_the_vectors_teach(run_training, make_tiny_store, tmp_path):
    losses, reports = [], []
    for name, options in (("qkv", {}), ("matrix", {"relation_heads": 2})):
        store = make_tiny_store(
            tmp_path / f"{name}.zarr", max_rows=64, targets="attention", relations=name, block_rows=8, **options
        )
        out = tmp_path / name
        records = run_training(
            out, cache=(str(store),), method="mha", weights=None, valid_share=0.1, save_every=100, relation_heads=2
        )
        losses.append([record["mha"] for record in steps_of(records)])
        (relation,) = measure_fidelity(out, [str(store)]).relations
        reports.append((relation.query, relation.key, relation.value))
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    assert losses[1][-1] < 0.9 * losses[1][0]
    assert reports[1] == pytest.approx(reports[0], rel=2e-3)


def test_no_steps_export_the_untrained_student(run_training, tiny_store, tmp_path):
    out = tmp_path / "student"
    assert run_training(out, steps=0) == []
    json.loads((out / "provenance.json").read_text(), parse_constant=pytest.fail)  # what is not known is null
    _, model, _ = make_model(tiny_store)
    exported = AutoModelForMaskedLM.from_pretrained(out).state_dict()
    for name, value in model.student.state_dict().items():
        assert torch.equal(exported[name], value), name


def test_too_little_memory_is_a_message(run_training, tmp_path, monkeypatch):
    def no_memory(trainer, share):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(Trainer, "backward", no_memory)
    with pytest.raises(
        DeviceMemoryError, match="too little memory .*20 GiB.*--micro-batch-size, --activation-checkpointing"
    ):
        run_training(tmp_path / "student")


def test_coordinates_of_a_store_decide_nothing(run_training, make_tiny_store, tmp_path, monkeypatch):
    """Of principal components another build may find others; the same student is trained from both.

    Adam would make other students of maps that are learned in these coordinates.
    """
    changes = {"targets": "hidden", "precision": "nmse:1e-2"}
    store = make_tiny_store(tmp_path / "one.zarr", **changes)
    eigh = torch.linalg.eigh
    turn = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: (eigh(matrix)[0], eigh(matrix)[1] @ turn))
    other = make_tiny_store(tmp_path / "other.zarr", **changes)
    monkeypatch.undo()
    bases = [CacheReader.open(place).rotation(2).basis_DK for place in (store, other)]
    assert not torch.allclose(*bases, atol=0.1)
    losses = [
        [
            record["loss"]
            for record in steps_of(run_training(tmp_path / name, cache=(str(place),), method="hs", weights=None))
        ]
        for name, place in (("a", store), ("b", other))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2) and losses[0][-1] < 0.9 * losses[0][0]


FULL_DISK = """
import resource, sys
import student_train.train.best as best
import student_train.train.train as trainer
from student_train.train.loop import Trainer
from student_train.settings import TrainSettings
from teacher_cache.errors import SpaceError

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

def full(owner, name):
    whole = getattr(owner, name)
    def on_a_full_disk(*arguments, **options):
        limit(20_000)
        try:
            return whole(*arguments, **options)
        finally:
            limit(resource.RLIM_INFINITY)
    setattr(owner, name, on_a_full_disk)
    try:
        trainer.train(eval(sys.argv[1]))
    except SpaceError as error:
        print(error)
    setattr(owner, name, whole)

full(Trainer, "save")
full(best, "export_student")
"""


def test_a_full_disk_is_a_message_and_the_run_goes_on_later(run_training, finished, tiny_store, warm, tmp_path):
    """A limit on file size gives the operating system's own error in the midst of a write, as a full disk does."""
    out = tmp_path / "student"
    settings = {"method": "mha+hs+od", "weights": "1,0.1,2", "steps": STEPS, "batch_size": BATCH, "lr": LR, "warmup": 3}
    where = {"cache": (str(tiny_store),), "out": str(out), "valid_share": HELD_OUT / 101, "device": "cpu"}
    often = {"valid_every": 5, "save_every": 4, "resume": "auto"}
    # no better student on the way: the first one written is the last
    often["valid_every"] = STEPS
    command = [*warm.python, "-c", FULL_DISK, f"TrainSettings(**{settings | where | often!r})"]
    # with as many threads as here: sums in another order would differ in their last bits
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    in_checkpoint, in_export = done.stdout.splitlines()
    assert "no space left while writing" in in_checkpoint and "step-00000004" in in_checkpoint
    assert f"no space left while writing {str(out)!r} (File too large)" in in_export
    for message in (in_checkpoint, in_export):
        assert "complete checkpoints are safe; free some space" in message and "--resume auto" in message
    assert {path.name for path in out.iterdir()} == {"checkpoints", "metrics.jsonl", "tensorboard"}
    assert not (out / "checkpoints" / "step-00000004" / "complete.json").exists()
    assert steps_of(run_training(out, resume="auto")) == steps_of(finished[1])
    assert (out / "model.safetensors").exists()


def test_what_an_interrupted_export_left_is_in_nobodys_way(run_training, tmp_path):
    """Of an untrained student there is nothing else yet."""
    out = tmp_path / "student"
    (out / ".export-unfinished").mkdir(parents=True)
    (out / ".export-unfinished" / "config.json").write_text("{")
    run_training(out, steps=0)
    assert (out / "model.safetensors").exists() and not (out / ".export-unfinished").exists()


def test_a_folder_that_cannot_be_made_is_a_message(run_training, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match=r"cannot write .*student' \(Not a directory\).*choose another --out"):
        run_training(tmp_path / "file" / "student")


def test_a_refused_run_leaves_nothing_behind(run_training, tmp_path):
    from teacher_cache.errors import DistillationError

    for wrong in ({"mapping": "1:9"}, {"relation_heads": 5}, {"cache": (str(tmp_path / "none.zarr"),)}):
        with pytest.raises(DistillationError):
            run_training(tmp_path / "student", **wrong)
        assert not (tmp_path / "student").exists()


def test_what_no_loss_reaches_stays_as_it_was(run_training, tiny_store, tmp_path):
    """Attention transfer ends at the last layer's queries, keys and values: nothing may decay what follows."""
    run_training(tmp_path / "student", method="mha", weights=None, init="random", steps=3)
    trained = AutoModel.from_pretrained(tmp_path / "student").state_dict()
    reader = CacheReader.open(tiny_store)
    before = build_student(
        plan_student(None, teacher_folder=reader.teacher_folder(), init="random", with_mlm_head=False, seq_len=24),
        seed=0,
    ).model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], trained[name])}
    assert "encoder.layer.1.attention.self.query.weight" in changed
    assert "encoder.layer.0.output.dense.weight" in changed
    assert not {name for name in changed if name.startswith(("encoder.layer.1.output", "encoder.layer.1.intermediate"))}
