import subprocess
import sys

import pytest

from student_train.settings import TrainSettings
from teacher_cache.errors import SettingsError


def test_weights_follow_the_methods():
    assert TrainSettings(method="mha+hs", weights="1,0.1").method_weights() == {"mha": 1.0, "hs": 0.1}
    assert TrainSettings(method="hs+od").method_weights() == {"hs": 1.0, "od": 1.0}


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"method": "mhx"}, "'mhx'"),
        ({"method": "hs+hs"}, r"'hs\+hs'"),
        ({"method": ""}, "''"),
        ({"method": "hs", "weights": "1,2"}, "'1,2'"),
        ({"method": "mha+hs", "weights": "1,0"}, "weight 0"),
        ({"method": "hs", "weights": "nan"}, "'nan'"),
        ({"method": "mha", "relation_weights": "1,1"}, "'1,1'"),
        ({"method": "hs", "steps": 3, "epochs": 1.0}, "--steps 3 and --epochs 1.0"),
        ({"method": "hs", "steps": -1}, "--steps -1"),
        ({"method": "hs", "batch_size": 0}, "--batch-size 0"),
        ({"method": "hs", "lr": float("nan")}, "--lr nan"),
        ({"method": "hs", "valid_share": 1.0}, "--valid-share 1.0"),
        ({"method": "hs", "seed": -1}, "--seed -1"),
        ({"method": "hs", "out": "s3://bucket/student"}, "--out 's3://bucket/student' is an address"),
        ({"method": "hs", "seed": 2**63}, f"--seed {2**63}.*below 2"),
    ],
)
def test_values_that_cannot_be_are_refused_by_flag(wrong, named):
    with pytest.raises(SettingsError, match=named):
        TrainSettings(**wrong)


def test_steps_follow_from_epochs_unless_given():
    assert TrainSettings(method="hs", epochs=1, batch_size=32).total_steps(100) == 4
    assert TrainSettings(method="hs", batch_size=10).total_steps(100) == 30
    assert TrainSettings(method="hs", steps=7).total_steps(100) == 7


def test_warmup_is_a_share_or_a_number_of_steps():
    assert TrainSettings(method="hs", warmup=0.05).warmup_steps(1000) == 50
    assert TrainSettings(method="hs", warmup=20).warmup_steps(1000) == 20
    assert TrainSettings(method="hs", warmup=0).warmup_steps(1000) == 1


def test_identity_holds_what_changes_the_result_and_nothing_else():
    base = TrainSettings(method="hs").identity()
    assert TrainSettings(method="hs", out="elsewhere", micro_batch_size=4, resume="auto").identity() == base
    assert TrainSettings(method="hs", local_cache="copies", local_cache_gib=1).identity() == base
    changed = TrainSettings(method="hs", lr=2e-3).identity()
    assert [name for name in base if base[name] != changed[name]] == ["--lr"]


def test_importing_the_settings_needs_no_torch():
    code = "import sys, student_train.settings; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
