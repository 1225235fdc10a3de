"""What a training is, in lines for whoever starts it and as the record that its student carries."""

import json
from dataclasses import replace

import pytest

from student_train.settings import TrainSettings
from student_train.train.describe import _values_in_words, describe_run, provenance_of
from student_train.train.prepare import prepare_run


def prepare(cache, **options):
    settings = {"method": "mha+hs", "weights": "1,0.1", "steps": 12, "batch_size": 16, "device": "cpu"} | options
    return prepare_run(TrainSettings(cache=cache, **settings))


@pytest.fixture(scope="module")
def run(tiny_store):
    return prepare((str(tiny_store),), lr=2e-3, valid_share=5 / 101)


def test_lines(run, tiny_store):
    lines = describe_run(run)
    assert lines[0] == (f"cache    {tiny_store}: 101 rows of 24 tokens from {run.reader.manifest.teacher.name} (4x32)")
    assert lines[1] == "rows     96 to train on, the last 5 held out"
    assert lines[2].startswith("student  bert 2x32:4:64: ") and "copied from the teacher" in lines[2]
    assert lines[3].startswith("mha      weight 1: ") and "pairs 2<-3" in lines[3]
    assert lines[4].startswith("hs       weight 0.1: ") and "pairs 1<-2 1<-3 2<-4" in lines[4]
    assert lines[5] == "training 12 steps of 16 rows (16 at a time) on cpu in float32, learning rate up to 0.002"
    assert not any(line.startswith(("maps", "frozen")) for line in lines)


def test_what_is_said_only_where_it_is_so(tiny_parts, tmp_path):
    file = tmp_path / "ds.json"
    scheduler = {"type": "WarmupLR", "params": {"warmup_num_steps": 2}}
    file.write_text(json.dumps({"scheduler": scheduler}))
    lines = describe_run(prepare(tiny_parts, method="hs", weights=None, init="random", deepspeed=str(file)))
    assert "rows     " in lines[1] and lines[1].endswith(" held out, of each store its share")
    assert "maps     start at the linear regression of the teacher's vectors on the student's" in lines
    assert lines[-1].endswith(f"learning rate by the scheduler in {str(file)!r}")


def test_parameters_that_no_loss_reaches_are_named(tiny_store):
    run = prepare((str(tiny_store),), method="mha", weights=None)
    count, first = len(run.frozen), run.frozen[0]
    assert count > 5
    assert describe_run(run)[-1] == f"frozen   {count} parameters that no loss reaches, such as {first}"


def test_half_precision_and_processes_are_said(run):
    """Neither is to be had here: a GPU computes in it, a launcher starts them."""
    config = run.config | {"bf16": {"enabled": True}}
    lines = describe_run(replace(run, config=config, micro_batch=2, ranks=replace(run.ranks, count=4)))
    assert lines[5].startswith("training 12 steps of 16 rows (2 at a time in each of 4 processes) on cpu in bfloat16")


def test_the_record_is_json_and_says_what_made_the_student(run, tiny_store):
    record = json.loads(json.dumps(provenance_of(run), allow_nan=False))
    assert record["settings"]["method"] == "mha+hs" and record["settings"]["cache"] == [str(tiny_store)]
    assert record["weights"] == {"mha": 1.0, "hs": 0.1} and record["steps"] == 12
    assert record["cache"]["rows"] == 101 and "stores" not in record["cache"]
    assert record["cache"]["identity_sha256"] == run.reader.identity_sha256
    assert record["held_out_rows"] == {"first": 96, "count": 5}
    assert record["objective"].keys() == {"mha", "hs"} and record["adapted"] == {}
    assert record["student"]["copied"][0] == "embeddings"
    assert record["deepspeed"]["train_batch_size"] == 16
    assert {"software", "git_revision", "command", "created"} <= record.keys()


def test_of_several_stores_each_is_named(tiny_parts):
    record = provenance_of(prepare(tiny_parts, valid_share=0.1))
    stores = record["cache"]["stores"]
    assert [(store["path"], store["rows"], store["held_out"]) for store in stores] == [
        (tiny_parts[0], 101, 9),
        (tiny_parts[1], 33, 4),
    ]


def test_values():
    assert _values_in_words([[1, 2], [3, 6]]) == "1<-2 3<-6"
    assert _values_in_words([1, 2, 3]) == "1,2,3" and _values_in_words([]) == ""
    assert _values_in_words("emd") == "emd" and _values_in_words(8) == "8"
