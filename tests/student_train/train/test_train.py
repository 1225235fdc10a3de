"""Training from a real store with the real engine, at toy size, against plain PyTorch loops written out here."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM

from student_train.data.order import RowOrder
from student_train.engine.checkpoint import checkpoint_path, newest_checkpoint
from student_train.engine.engine import ADAM_BETAS
from student_train.evaluate.fidelity.fidelity import measure_fidelity
from student_train.evaluate.fidelity.records import fidelity_table
from student_train.methods.model import DistillationModel
from student_train.methods.objective import make_objective
from student_train.run_files import read_records
from student_train.settings import TrainSettings
from student_train.students.student import build_student
from student_train.train.dry_run import dry_run
from student_train.train.loop import Progression, StepOutcome, Trainer
from student_train.train.metrics import MetricsLog, Progress
from student_train.train.prepare import prepare_run
from student_train.train.train import train
from teacher_cache.contract.batch import concatenate
from teacher_cache.errors import DeviceMemoryError, StoreError, TrainingError
from teacher_cache.read.pool import open_caches
from teacher_cache.read.reader import CacheReader
from tests.records import without_times

STEPS, BATCH, HELD_OUT, LR = 12, 16, 5, 2e-3


@pytest.fixture(scope="module")
def run_training(tiny_store):
    """`run_training(out, **settings)`: a training of 12 steps on 96 rows, 5 held out; returns its records."""

    def run(out, **options):
        settings = {
            "method": "mha+hs+od",
            "weights": "1,0.1,2",
            "cache": (str(tiny_store),),
            "out": str(out),
            "steps": STEPS,
            "batch_size": BATCH,
            "lr": LR,
            "warmup": 3,
            "valid_share": HELD_OUT / 101,
            "valid_every": 5,
            "save_every": 4,
            "device": "cpu",
        } | options
        result = train(TrainSettings(**settings))
        assert result.stopped_by is None
        return read_records(Path(out) / "metrics.jsonl")

    return run


@pytest.fixture(scope="module")
def finished(run_training, tmp_path_factory):
    """A finished run: its directory and records."""
    out = tmp_path_factory.mktemp("finished") / "student"
    return out, run_training(out)


def steps_of(records):
    """Training records without the times that no two runs share."""
    return without_times(record for record in records if "loss" in record)


def validations_of(records):
    return [record for record in records if "valid_loss" in record]


def make_model(store, methods=("mha", "hs", "od"), weights=(1.0, 0.1, 2.0)):
    reader = CacheReader.open(store)
    built = build_student(
        None,
        teacher_folder=reader.teacher_folder(),
        init="auto",
        with_mlm_head="od" in methods,
        seed=0,
        seq_len=reader.manifest.seq_len,
    )
    objective = make_objective(dict(zip(methods, weights, strict=True)), source=reader, student=built.model.config)
    return reader, DistillationModel(built.model, objective), objective


def read_batch(reader, request, order, number):
    """Global batch `number` of the stream, row range by row range."""
    parts = []
    for segment in order.segments(number * BATCH, (number + 1) * BATCH):
        first = int(order.bounds[segment.block])
        parts.append(
            reader.read_rows(first + segment.start, first + segment.stop, request, masked_view=segment.epoch % 2)
        )
    return {view: concatenate([part[view] for part in parts]) for view in parts[0]}


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


@pytest.mark.parametrize("micro_batch", [2, 8])
def test_accumulation_does_not_change_the_training(run_training, finished, tmp_path, micro_batch):
    """Micro-batches hold different numbers of real positions: a mean of means would differ."""
    records = run_training(tmp_path / "student", micro_batch_size=micro_batch, save_every=100)
    for ours, theirs in zip(steps_of(records), steps_of(finished[1]), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    for ours, theirs in zip(validations_of(records), validations_of(finished[1]), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_validation_is_the_mean_over_all_held_out_positions(finished, tiny_store):
    validations = validations_of(finished[1])
    assert [record["step"] for record in validations] == [0, 5, 10, 12]
    reader, model, objective = make_model(tiny_store)
    with torch.no_grad():
        sums = model(reader.read_rows(reader.rows - HELD_OUT, reader.rows, objective.request))
    expected = {f"valid_{name}": (part.total / part.count).item() for name, part in sums.items()}
    expected["valid_loss"] = expected["valid_mha"] + 0.1 * expected["valid_hs"] + 2 * expected["valid_od"]
    assert validations[0] == pytest.approx({"step": 0, **expected}, rel=1e-5)


def test_held_out_rows_without_a_place_are_no_perfect_student(run_training, make_tiny_store, tmp_path):
    """Rows of unknown words alone have nothing that could be masked, and a loss of nothing is 0."""
    (tmp_path / "a.txt").write_text("babo debo fego hugi\n" + "zz zz\n" * 30)
    store = make_tiny_store(tmp_path / "cache.zarr", corpus=tmp_path / "a.txt")
    options = {"cache": (str(store),), "valid_share": 0.1, "steps": 2, "warmup": 1, "valid_every": 1, "weights": None}
    assert len(validations_of(run_training(tmp_path / "mha", method="mha", **options))) == 3
    with pytest.raises(TrainingError, match=r"held-out rows of .*cache.zarr have no place for --method od"):
        run_training(tmp_path / "od", method="od", **options)


def test_a_short_last_validation_batch_counts_for_what_it_holds(run_training, finished, tmp_path):
    records = run_training(tmp_path / "student", micro_batch_size=2, steps=1, warmup=1)
    assert validations_of(records)[0] == pytest.approx(validations_of(finished[1])[0], rel=1e-5)


def test_tokens_are_the_real_ones_seen_so_far(finished, tiny_store):
    reader = CacheReader.open(tiny_store)
    order = RowOrder(rows=(range(reader.rows - HELD_OUT),), bounds=reader.block_bounds, seed=0)
    _, _, objective = make_model(tiny_store)
    seen = 0
    for number, record in enumerate(steps_of(finished[1])):
        seen += int(read_batch(reader, objective.request, order, number)["plain"].length_B.sum())
        assert record["tokens"] == seen


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


@pytest.mark.parametrize("mapping", ["skip", "emd", "alp"])
def test_passes_do_not_change_what_a_mapping_teaches(run_training, tmp_path, mapping):
    """Rows are counted over the batch, and a flow comes from the costs of the whole step before."""
    options = {"method": "hs", "weights": None, "mapping": mapping, "steps": 4, "valid_every": 4, "save_every": 100}
    whole, parts = (run_training(tmp_path / str(size), micro_batch_size=size, **options) for size in (16, 4))
    for ours, theirs in zip(steps_of(parts), steps_of(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert validations_of(parts)[-1] == pytest.approx(validations_of(whole)[-1], rel=1e-4)
    described = json.loads((tmp_path / "16" / "provenance.json").read_text())
    assert described["objective"]["hs"]["mapping"] == described["settings"]["mapping"] == mapping
    assert bool(described["adapted"]) == (mapping == "emd")
    assert not [name for name in AutoModel.from_pretrained(tmp_path / "16").state_dict() if "projection" in name]


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


def test_what_no_loss_reaches_stays_as_it_was(run_training, tiny_store, tmp_path):
    """Attention transfer ends at the last layer's queries, keys and values: nothing may decay what follows."""
    run_training(tmp_path / "student", method="mha", weights=None, init="random", steps=3)
    trained = AutoModel.from_pretrained(tmp_path / "student").state_dict()
    reader = CacheReader.open(tiny_store)
    before = build_student(
        None, teacher_folder=reader.teacher_folder(), init="random", with_mlm_head=False, seed=0, seq_len=24
    ).model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], trained[name])}
    assert "encoder.layer.1.attention.self.query.weight" in changed
    assert "encoder.layer.0.output.dense.weight" in changed
    assert not {name for name in changed if name.startswith(("encoder.layer.1.output", "encoder.layer.1.intermediate"))}


def test_no_steps_export_the_untrained_student(run_training, tiny_store, tmp_path):
    out = tmp_path / "student"
    assert run_training(out, steps=0) == []
    json.loads((out / "provenance.json").read_text(), parse_constant=pytest.fail)  # what is not known is null
    _, model, _ = make_model(tiny_store)
    exported = AutoModelForMaskedLM.from_pretrained(out).state_dict()
    for name, value in model.student.state_dict().items():
        assert torch.equal(exported[name], value), name


def test_bfloat16_trains_alike_and_exports_float32(run_training, finished, tmp_path, monkeypatch):
    """Refused on a CPU for the users' sake (small gradients of norms); master weights and export can be seen there."""
    monkeypatch.setattr("student_train.train.prepare.choose_dtype", lambda settings, device: torch.bfloat16)
    out = tmp_path / "student"
    records = run_training(out, dtype="bfloat16")
    ours, theirs = steps_of(records), steps_of(finished[1])
    assert [record["loss"] for record in ours] == pytest.approx([record["loss"] for record in theirs], rel=0.05)
    assert {value.dtype for value in AutoModelForMaskedLM.from_pretrained(out).state_dict().values()} == {torch.float32}


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.fixture
def interrupted(finished, tmp_path):
    """The finished run as it was when step 11 was recorded, with the checkpoints of steps 8 and 12, and no student."""
    out = tmp_path / "student"
    shutil.copytree(finished[0], out)
    for name in ("config.json", "model.safetensors", "provenance.json"):
        (out / name).unlink()
    return out


def test_a_resumed_run_is_the_uninterrupted_one(run_training, finished, interrupted):
    shutil.rmtree(checkpoint_path(interrupted, STEPS))
    records = run_training(interrupted, resume="auto")
    assert steps_of(records) == steps_of(finished[1])
    assert validations_of(records) == validations_of(finished[1])
    ours, theirs = (AutoModelForMaskedLM.from_pretrained(out).state_dict() for out in (interrupted, finished[0]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_goes_on_with_its_layer_weights(run_training, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr("student_train.train.prepare.choose_dtype", lambda settings, device: dtype)
    out, stopped = tmp_path / "whole", tmp_path / "stopped"
    options = {"method": "hs", "weights": None, "mapping": "emd", "steps": 6, "save_every": 3}
    records = run_training(out, **options)
    shutil.copytree(out, stopped)
    shutil.rmtree(checkpoint_path(stopped, 6))
    for name in ("config.json", "model.safetensors", "provenance.json"):
        (stopped / name).unlink()
    assert steps_of(run_training(stopped, resume="auto", **options)) == steps_of(records)
    ours, theirs = (json.loads((folder / "provenance.json").read_text())["adapted"]["hs"] for folder in (stopped, out))
    assert ours == theirs
    assert len(set(theirs["student_weights"])) == 2 and len(set(theirs["teacher_weights"])) == 4


def test_a_damaged_checkpoint_is_passed_over_and_a_named_one_taken(run_training, finished, interrupted):
    last = checkpoint_path(interrupted, STEPS)
    next(last.glob("*.pt")).write_bytes(b"")
    with pytest.raises(TrainingError, match="damaged"):
        run_training(interrupted, resume=str(last))
    records = run_training(interrupted, resume=str(checkpoint_path(interrupted, 8)))
    assert steps_of(records) == steps_of(finished[1])


def test_a_run_whose_last_step_is_saved_only_exports(run_training, finished, interrupted):
    assert run_training(interrupted, resume="auto") == finished[1]
    assert (interrupted / "model.safetensors").exists()


def test_a_run_that_went_back_goes_on_from_where_it_went_back_to(run_training, interrupted, finished, monkeypatch):
    """From step 8 of a run that had come to 12, stopped at 10: what is newest then is step 10."""
    half = interrupted / "checkpoints" / "step-00000006"
    half.mkdir()
    (half / "weights.pt").write_bytes(b"half")
    update = Trainer.update

    def update_and_stop(trainer, feed):
        went_on = update(trainer, feed)
        if went_on and trainer.state.step == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return went_on

    monkeypatch.setattr(Trainer, "update", update_and_stop)
    with pytest.raises(AssertionError):  # that it was not stopped
        run_training(interrupted, resume=str(checkpoint_path(interrupted, 8)))
    monkeypatch.undo()
    names = sorted(path.name for path in (interrupted / "checkpoints").iterdir())
    assert names == ["step-00000008", "step-00000010"]
    records = run_training(interrupted, resume="auto")
    assert steps_of(records) == steps_of(finished[1])
    assert validations_of(records) == validations_of(finished[1])


def test_resuming_without_a_checkpoint_starts_afresh(run_training, finished, interrupted):
    for marker in (interrupted / "checkpoints").glob("*/complete.json"):
        marker.unlink()
    records = run_training(interrupted, resume="auto", save_every=100)
    assert [path.name for path in (interrupted / "checkpoints").iterdir()] == [f"step-{STEPS:08d}"]
    assert steps_of(records) == steps_of(finished[1])
    assert len(validations_of(records)) == len(validations_of(finished[1]))


def test_damaged_checkpoints_are_no_reason_to_start_afresh_and_delete_them(run_training, interrupted, capsys):
    markers = sorted((interrupted / "checkpoints").glob("*/complete.json"))
    assert len(markers) == 2
    whole = markers[0].read_text()
    markers[1].write_text("{")
    markers[0].write_text("{")
    before = (interrupted / "metrics.jsonl").read_text()
    with pytest.raises(TrainingError, match=r"no whole one before it.*delete .*checkpoints' to start"):
        run_training(interrupted, resume="auto")
    assert (interrupted / "metrics.jsonl").read_text() == before and markers[1].exists()
    markers[0].write_text(whole)
    run_training(interrupted, resume="auto")
    assert "passed over  no complete checkpoint at" in capsys.readouterr().err


def test_a_checkpoint_of_another_run_does_not_overwrite_this_one(run_training, finished, interrupted):
    with pytest.raises(TrainingError, match="is a checkpoint of another run, and --out .* already holds"):
        run_training(interrupted, resume=str(checkpoint_path(finished[0], 8)))


def test_a_best_student_that_is_not_kept_any_more_is_not_named(run_training, finished, tmp_path):
    """Its directory stays where the run was; here the next best one is kept or exported."""
    out = tmp_path / "student"
    run_training(out, resume=str(checkpoint_path(finished[0], 8)))
    assert json.loads((out / "provenance.json").read_text())["result"]["best_step"] == STEPS


def test_a_cache_that_fails_in_a_validation_loses_nothing(run_training, finished, tmp_path, monkeypatch):
    from student_train.train import loop

    losses = loop.validation_losses

    def fail_at_step_5(run, engine, tell_skipped):
        if engine.global_steps == 5:
            raise StoreError("block 12 cannot be read")
        return losses(run, engine, tell_skipped)

    monkeypatch.setattr(loop, "validation_losses", fail_at_step_5)
    out = tmp_path / "student"
    with pytest.raises(StoreError, match=r"block 12 cannot be read\n5 steps are saved"):
        run_training(out, save_every=100)
    monkeypatch.undo()
    records = run_training(out, save_every=100, resume="auto")
    assert steps_of(records) == steps_of(finished[1])
    assert validations_of(records) == validations_of(finished[1])


def test_a_dry_run_saves_nothing_where_the_cache_fails(damaged_store, tmp_path):
    store, _ = damaged_store
    settings = {"method": "hs", "cache": (str(store),), "out": str(tmp_path / "student"), "batch_size": 96}
    with pytest.raises(StoreError, match="block 5"):
        dry_run(TrainSettings(**settings, valid_share=HELD_OUT / 101, device="cpu"))
    assert not (tmp_path / "student").exists()


def test_too_little_memory_is_a_message(run_training, tmp_path, monkeypatch):
    def no_memory(trainer, share):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(Trainer, "backward", no_memory)
    with pytest.raises(
        DeviceMemoryError, match="too little memory .*20 GiB.*--micro-batch-size, --activation-checkpointing"
    ):
        run_training(tmp_path / "student")


def test_targets_are_decoded_pass_by_pass(tiny_store):
    """Not the whole share at once, whatever a pass may hold."""
    settings = TrainSettings(method="hs", cache=(str(tiny_store),), steps=1, batch_size=16, device="cpu")
    with closing(prepare_run(settings).training_batches(0)) as batches:
        batch = next(batches)
        whole = batch.views["plain"].hidden[2]
        parts = [batch.part(start, start + 3) for start in range(0, 16, 3)]
        assert [len(part["plain"].length_B) for part in parts] == [3, 3, 3, 3, 3, 1] and batch.part(16, 19) == {}
        assert torch.equal(torch.cat([part["plain"].hidden[2] for part in parts]), whole)


def test_another_setting_is_refused_by_name(run_training, interrupted, tmp_path):
    with pytest.raises(TrainingError, match=r"--lr was 0\.002 and is 0\.001"):
        run_training(interrupted, resume="auto", lr=1e-3)
    with pytest.raises(TrainingError, match="number of steps was 12 and is 13"):
        run_training(interrupted, resume="auto", steps=13)
    with pytest.raises(TrainingError, match="number of steps was 12 and is 0"):
        run_training(interrupted, resume="auto", steps=0)
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"optimizer": {"params": {"eps": 0.5}}, "gradient_clipping": 0.01}))
    differing = (
        r"\(DeepSpeed's gradient_clipping was 1\.0 and is 0\.01; DeepSpeed's optimizer\.params\.eps was None and is"
    )
    with pytest.raises(TrainingError, match=differing):
        run_training(interrupted, resume="auto", deepspeed=str(file))
    with pytest.raises(TrainingError, match="--lr was"):
        run_training(tmp_path / "new", resume=str(checkpoint_path(interrupted, 8)), lr=1e-3)
    assert not (tmp_path / "new").exists()


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


def test_a_directory_that_holds_something_is_refused(run_training, finished, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in finished[0].rglob("*")}
    with pytest.raises(TrainingError, match=r"checkpoints.*--resume auto"):
        run_training(finished[0])
    assert {path: path.stat().st_mtime_ns for path in finished[0].rglob("*")} == before

    (tmp_path / "thesis.tex").write_text("years of work")
    for resume in ("never", "auto"):
        with pytest.raises(TrainingError, match=r"thesis\.tex.*choose another --out"):
            run_training(tmp_path, resume=resume)
    with pytest.raises(TrainingError, match="is a file"):
        run_training(tmp_path / "thesis.tex")
    with pytest.raises(TrainingError, match="no complete checkpoint"):
        run_training(tmp_path / "new", resume=str(tmp_path / "nowhere"))


# ---- engines ------------------------------------------------------------------------------------------------------


def zero_file(folder, stage, **options):
    file = folder / f"zero{stage}.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage, **options}}))
    return str(file)


def assert_near(records, others, tolerance):
    assert len(records) == len(others) > 0
    for ours, theirs in zip(records, others, strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance)


def test_stage_3_trains_resumes_and_exports_what_stage_0_does(run_training, finished, tmp_path):
    """Every weight is cut up and brought together around the pass that needs it, even the small ones."""
    out, file = tmp_path / "student", zero_file(tmp_path, 3, stage3_param_persistence_threshold=0)
    linear = torch.nn.functional.linear
    records = run_training(out, deepspeed=file)
    assert torch.nn.functional.linear is linear, "not DeepSpeed's"
    assert_near(steps_of(records), steps_of(finished[1]), 1e-4)
    assert_near(validations_of(records), validations_of(finished[1]), 1e-4)
    ours, theirs = (AutoModelForMaskedLM.from_pretrained(folder).state_dict() for folder in (out, finished[0]))
    for name, weight in theirs.items():
        # no loss depends on the keys' bias: Adam makes steps out of its gradient's rounding
        if not name.endswith("key.bias"):
            torch.testing.assert_close(ours[name], weight, rtol=1e-3, atol=2e-4, msg=name)
    shutil.copytree(out, tmp_path / "again")
    resumed = run_training(tmp_path / "again", deepspeed=file, resume=str(checkpoint_path(tmp_path / "again", 8)))
    assert steps_of(resumed) == steps_of(records)


def test_activation_checkpointing_changes_nothing(run_training, finished, tmp_path):
    records = run_training(tmp_path / "student", activation_checkpointing=True)
    assert steps_of(records) == steps_of(finished[1])


def test_activations_are_computed_again(tiny_store):
    """The flag does what it says: the backward pass runs each layer once more."""
    settings = {"method": "mha", "cache": (str(tiny_store),), "steps": 1, "device": "cpu"}
    calls = []
    for checkpointing in (False, True):
        run = prepare_run(TrainSettings(**settings, activation_checkpointing=checkpointing))
        seen = []
        run.built.model.encoder.layer[0].attention.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        losses = run.model.train()(run.stand_in)
        losses["mha"].total.backward()
        calls.append(len(seen))
    assert calls == [1, 2]


def test_compiling_changes_rounding_alone(tiny_store):
    """Through the recorded attention vectors too, and with every gradient."""
    settings = {"method": "mha", "cache": (str(tiny_store),), "student": "1x32", "steps": 1, "device": "cpu"}
    found = []
    for compiled in (False, True):
        run = prepare_run(TrainSettings(**settings, compile=compiled))
        loss = run.model.train()(run.stand_in)["mha"].total
        loss.backward()
        found.append((loss.item(), {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}))
    (plain, plain_gradients), (fast, gradients) = found
    assert fast == pytest.approx(plain, rel=1e-5)
    assert gradients.keys() == plain_gradients.keys() and len(gradients) > 8
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, plain_gradients[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.fixture
def float16_on_cpu(monkeypatch):
    """DeepSpeed and we refuse float16 on a CPU, as it is of no use there; PyTorch computes it all the same."""
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
    monkeypatch.setattr("student_train.train.prepare.choose_dtype", lambda settings, device: torch.float16)


def test_float16_follows_float32_and_leaves_out_steps_that_overflow(run_training, finished, float16_on_cpu, tmp_path):
    file = tmp_path / "fp16.json"
    file.write_text(json.dumps({"fp16": {"initial_scale_power": 17, "hysteresis": 1}}))
    out = tmp_path / "student"
    records = steps_of(run_training(out, deepspeed=str(file)))
    away = [record for record in records if "scaled_away" in record]
    assert 0 < len(away) < STEPS / 2
    assert all(record["grad_norm"] is None for record in away)
    kept = [record for record in records if "scaled_away" not in record]
    assert all(math.isfinite(record["grad_norm"]) for record in kept)
    # nothing was learned in the steps left out, and the learning rate waited for them
    assert [record["lr"] for record in kept] == [record["lr"] for record in steps_of(finished[1])[: len(kept)]]
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]
    weights = AutoModelForMaskedLM.from_pretrained(out)
    assert weights.dtype == torch.float32
    vectors = weights.base_model.encoder.layer[0].output.dense.weight
    assert not torch.equal(vectors, vectors.half().float())


def test_a_student_that_gets_worse_leaves_the_best_one_behind(run_training, tmp_path):
    out = tmp_path / "student"
    rising = {"deepspeed": str(tmp_path / "rising.json"), "valid_every": 1}
    rates = {"warmup_min_lr": 1e-3, "warmup_max_lr": 1.0, "warmup_num_steps": STEPS, "warmup_type": "linear"}
    (tmp_path / "rising.json").write_text(json.dumps({"scheduler": {"type": "WarmupLR", "params": rates}}))
    records = run_training(out, **rising)
    valid = {record["step"]: record["valid_loss"] for record in validations_of(records)}
    best = min(valid, key=valid.__getitem__)
    assert 0 < best < STEPS
    result = json.loads((out / "best" / "provenance.json").read_text())["result"]
    assert (result["step"], result["valid"]["valid_loss"]) == (best, valid[best])
    assert json.loads((out / "provenance.json").read_text())["result"]["best_step"] == best
    last, kept = (AutoModelForMaskedLM.from_pretrained(folder).state_dict() for folder in (out, out / "best"))
    assert any(not torch.equal(weight, kept[name]) for name, weight in last.items())


def test_what_was_best_is_known_after_a_resume(run_training, finished, tmp_path):
    """The last student, which OUT is, and the untrained one, which is nowhere: both are no loss to be made good."""
    out = Path(shutil.copytree(finished[0], tmp_path / "student"))
    before = json.loads((out / "provenance.json").read_text())["result"]
    assert before["best_step"] == STEPS
    run_training(out, resume="auto")
    assert json.loads((out / "provenance.json").read_text())["result"] == before
    (tmp_path / "worse.json").write_text(
        json.dumps({"scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 1.0, "warmup_max_lr": 1.0}}})
    )
    worse = {"deepspeed": str(tmp_path / "worse.json")}
    run_training(tmp_path / "whole", **worse)
    run_training(tmp_path / "resumed", **worse, resume=str(checkpoint_path(tmp_path / "whole", 8)))
    for name in ("whole", "resumed"):
        result = json.loads((tmp_path / name / "provenance.json").read_text())["result"]
        assert result["best_step"] == 0 and result["best_valid_loss"] < result["valid"]["valid_loss"]
        assert not (tmp_path / name / "best").exists()


def test_a_student_that_gets_better_to_the_end_leaves_itself_alone(finished):
    out, records = finished
    valid = validations_of(records)
    assert min(valid, key=lambda record: record["valid_loss"]) == valid[-1]
    assert not (out / "best").exists()


# ---- what goes wrong on the way -------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_the_run_and_names_step_and_rows(run_training, tiny_store, tmp_path):
    with pytest.raises(TrainingError, match="(loss|gradient) of step") as caught:
        run_training(tmp_path / "student", lr=1e30, clip=0.0, save_every=1)
    records = steps_of(read_records(tmp_path / "student" / "metrics.jsonl"))
    failed = len(records) + 1
    assert f"step {failed} " in str(caught.value)
    assert all(math.isfinite(record["loss"]) for record in records)
    assert not (tmp_path / "student" / "model.safetensors").exists()
    newest = newest_checkpoint(tmp_path / "student")
    assert newest is None or newest == checkpoint_path(tmp_path / "student", failed - 1)
    reader, _, objective = make_model(tiny_store)
    order = RowOrder(rows=(range(reader.rows - HELD_OUT),), bounds=reader.block_bounds, seed=0)
    rows = read_batch(reader, objective.request, order, failed - 1)["plain"].row_id_B.tolist()
    assert str(rows) in str(caught.value)


def test_a_last_step_that_diverges_is_no_success(run_training, tmp_path):
    out = tmp_path / "student"
    with pytest.raises(TrainingError, match="validation loss after step 1 is not a finite number.*neither saved"):
        run_training(out, steps=1, lr=1e30, warmup=1, save_every=1)
    assert newest_checkpoint(out) is None
    assert not (out / "model.safetensors").exists()
    assert [record["step"] for record in validations_of(read_records(out / "metrics.jsonl"))] == [0]


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_a_gradient_that_is_no_number_stops_the_run(tiny_store, tmp_path, norm):
    run = prepare_run(TrainSettings(method="hs", cache=(str(tiny_store),), out=str(tmp_path), steps=2, device="cpu"))
    trainer = Trainer(run, None, Progression(), MetricsLog(tmp_path, last_step=None), Progress())
    trainer._pending = StepOutcome(
        step=1,
        losses={"hs": torch.tensor(0.5)},
        gradient_norm=torch.tensor(norm),
        scaled_away=False,
        record={"wait": 0.0},
        tokens=1,
        row_ids=(7,),
        blocks=(3,),
    )
    with pytest.raises(
        TrainingError, match=rf"gradient of step 1 .*hs 0\.5, gradient norm {norm}.* ids \[7\] of block 3 "
    ):
        trainer.save()
    assert list(tmp_path.glob("checkpoints/*")) == [] == read_records(tmp_path / "metrics.jsonl")


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


def test_a_full_disk_is_a_message_and_the_run_goes_on_later(run_training, finished, tiny_store, tmp_path):
    """A limit on file size gives the operating system's own error in the midst of a write, as a full disk does."""
    out = tmp_path / "student"
    settings = {"method": "mha+hs+od", "weights": "1,0.1,2", "steps": STEPS, "batch_size": BATCH, "lr": LR, "warmup": 3}
    where = {"cache": (str(tiny_store),), "out": str(out), "valid_share": HELD_OUT / 101, "device": "cpu"}
    often = {"valid_every": 5, "save_every": 4, "resume": "auto"}
    # no better student on the way: the first one written is the last
    often["valid_every"] = STEPS
    command = [sys.executable, "-c", FULL_DISK, f"TrainSettings(**{settings | where | often!r})"]
    # with as many threads as here: sums in another order would differ in their last bits
    done = subprocess.run(command, check=False, capture_output=True, text=True)
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


@pytest.fixture
def damaged_store(tiny_store, tmp_path):
    """A copy of the store with one block damaged, and how to mend it."""
    store = shutil.copytree(tiny_store, tmp_path / "cache.zarr")
    return store, damage_block(store, 5)


def damage_block(store, block):
    """Cut off the end of a shard; returns what mends it."""
    codes = store / "hidden" / "2" / "codes" / "c" / str(block)
    shard = next(path for path in codes.rglob("0") if path.is_file())
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    return lambda: shard.write_bytes(content)


def test_a_damaged_block_stops_the_run_with_a_checkpoint_and_a_mended_one_goes_on(
    run_training, finished, damaged_store, tmp_path
):
    (store, mend), out = damaged_store, tmp_path / "student"
    with pytest.raises(StoreError, match=r"block 5 of .*damaged[^$]*\d+ steps are saved in .*--resume auto"):
        run_training(out, cache=(str(store),), save_every=100)
    done = steps_of(read_records(out / "metrics.jsonl"))
    assert newest_checkpoint(out) == checkpoint_path(out, len(done))
    assert not (out / "model.safetensors").exists()
    mend()
    records = run_training(out, cache=(str(store),), save_every=100, resume="auto")
    assert len(done) > 0 and steps_of(records) == steps_of(finished[1])


def test_rows_of_a_damaged_block_can_be_skipped(run_training, finished, damaged_store, tmp_path, capsys):
    """All other rows stay in the batches they are in, the missing ones are counted and every step has its mean."""
    (store, _), out = damaged_store, tmp_path / "student"
    records = steps_of(run_training(out, cache=(str(store),), on_bad_block="skip"))
    whole = steps_of(finished[1])
    first = next(step for step, record in enumerate(records) if "skipped_rows" in record)
    assert records[:first] == whole[:first]
    assert records[first]["loss"] != whole[first]["loss"]
    # two epochs of 96 rows: block 5 is met twice
    assert records[-1]["skipped_rows"] == 16 and records[-1]["rows"] == STEPS * BATCH - 16
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped")]
    assert len(told) == 1 and "block 5 of" in told[0]
    result = json.loads((out / "provenance.json").read_text())["result"]
    assert result["skipped_rows"] == 16 and result["step"] == STEPS


def test_batches_of_damaged_rows_alone_are_passed_over(run_training, damaged_store, tmp_path):
    """Of 12 batches of 8 rows, one is the damaged block: no step is made on nothing."""
    store, _ = damaged_store
    out = tmp_path / "student"
    records = steps_of(run_training(out, cache=(str(store),), on_bad_block="skip", batch_size=8, valid_every=STEPS))
    assert [record["rows"] for record in records] == [8 * step for step in range(1, STEPS + 1)]
    assert records[-1]["skipped_rows"] == 8
    assert all(record["loss"] > 0 for record in records)


def test_held_out_rows_of_a_damaged_block_are_skipped_and_counted(run_training, tiny_store, tmp_path, capsys):
    """The losses are those of the rows that are left."""
    store = shutil.copytree(tiny_store, tmp_path / "cache.zarr")
    damage_block(store, 12)
    settings = {"cache": (str(store),), "valid_share": 15 / 101, "steps": 1, "valid_every": 1}
    records = validations_of(run_training(tmp_path / "student", **settings, on_bad_block="skip"))
    assert [record["valid_skipped_rows"] for record in records] == [5, 5]
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped")]
    assert len(told) == 1 and "block 12 of" in told[0]
    run = prepare_run(TrainSettings(**settings, method="hs", out=str(tmp_path), device="cpu", on_bad_block="skip"))
    batch = run.reader.read_rows(86, 96, run.objective.request)
    with torch.no_grad():
        (loss,) = run.model.eval()(batch).values()
    settings |= {"method": "hs", "weights": None}
    records = validations_of(run_training(tmp_path / "hs", **settings, on_bad_block="skip"))
    assert records[0]["valid_hs"] == pytest.approx((loss.total / loss.count).item(), rel=1e-5)


def test_no_held_out_row_at_all_ends_the_run(run_training, tiny_store, tmp_path):
    """Else every student would have the loss 0, and the untrained one would be the best."""
    store = shutil.copytree(tiny_store, tmp_path / "cache.zarr")
    damage_block(store, 12)
    with pytest.raises(StoreError, match=r"none of the 5 held-out rows of .*cache\.zarr can be read"):
        run_training(tmp_path / "student", cache=(str(store),), on_bad_block="skip")


def test_a_store_of_which_nothing_can_be_read_stops_the_run(run_training, tiny_store, tmp_path, monkeypatch):
    """What disappears on the way is damage in every block; the run does not go round for ever."""
    store = shutil.copytree(tiny_store, tmp_path / "cache.zarr")
    update = Trainer.update

    def update_and_lose(trainer, feed):
        went_on = update(trainer, feed)
        shutil.rmtree(store, ignore_errors=True)
        return went_on

    monkeypatch.setattr(Trainer, "update", update_and_lose)
    with pytest.raises(StoreError, match=r"no row of .* can be read[^$]*steps are saved in"):
        run_training(tmp_path / "student", cache=(str(store),), on_bad_block="skip")
    assert newest_checkpoint(tmp_path / "student") is not None


def test_a_refused_run_leaves_nothing_behind(run_training, tmp_path):
    from teacher_cache.errors import DistillationError

    for wrong in ({"mapping": "1:9"}, {"relation_heads": 5}, {"cache": (str(tmp_path / "none.zarr"),)}):
        with pytest.raises(DistillationError):
            run_training(tmp_path / "student", **wrong)
        assert not (tmp_path / "student").exists()
