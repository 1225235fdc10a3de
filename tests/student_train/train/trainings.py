"""What tests of trainings share: the sizes of the training, its records, and the same model and batches by hand."""

from student_train.methods.model import DistillationModel
from student_train.methods.objective import make_objective
from student_train.students.student import build_student, plan_student
from teacher_cache.contract.batch import concatenate
from teacher_cache.read.reader import CacheReader
from tests.records import without_times

STEPS, BATCH, HELD_OUT, LR = 12, 16, 5, 2e-3


def steps_of(records):
    """Training records without the times that no two runs share."""
    return without_times(record for record in records if "loss" in record)


def validations_of(records):
    return [record for record in records if "valid_loss" in record]


def make_model(store, methods=("mha", "hs", "od"), weights=(1.0, 0.1, 2.0)):
    reader = CacheReader.open(store)
    built = build_student(
        plan_student(
            None,
            teacher_folder=reader.teacher_folder(),
            init="auto",
            with_mlm_head="od" in methods,
            seq_len=reader.manifest.seq_len,
        ),
        seed=0,
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


def damage_block(store, block):
    """Cut off the end of a shard; returns what mends it."""
    codes = store / "hidden" / "2" / "codes" / "c" / str(block)
    shard = next(path for path in codes.rglob("0") if path.is_file())
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    return lambda: shard.write_bytes(content)
