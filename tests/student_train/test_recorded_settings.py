"""The flags of kdtrain read back from records: what an older version wrote, and what nobody's kdtrain did."""

import json
from dataclasses import asdict

import pytest

from student_train.recorded_settings import as_today, check_recorded, checkpoint_identity, recorded_identity
from student_train.settings import TrainSettings
from teacher_cache.errors import SettingsError


def test_a_record_outlives_the_folders_that_it_names(tmp_path):
    made = TrainSettings(method="hs", student=str(tmp_path), out="here")
    recorded = json.loads(json.dumps(asdict(made)))
    gone = {**recorded, "student": str(tmp_path / "gone"), "init": str(tmp_path / "gone")}
    with pytest.raises(SettingsError):
        TrainSettings(**gone)
    assert recorded_identity(recorded) == made.identity()
    assert recorded_identity(gone)["--student"] == str(tmp_path / "gone")
    # a flag that an older version did not know had its default
    assert recorded_identity({"method": "hs"}) == TrainSettings(method="hs").identity()
    with pytest.raises(SettingsError, match="'nonsense'"):
        recorded_identity({"method": "nonsense"})


def test_the_settings_of_a_run_are_taken():
    made = TrainSettings(method="mha+hs", cache=("a.zarr", "b.zarr"), lr=1, epochs=2, steps=None, compile=True)
    check_recorded({"settings": json.loads(json.dumps(asdict(made)))})
    check_recorded({"settings": {"flag_of_tomorrow": [None]}})


@pytest.mark.parametrize(
    "name, value",
    [
        ("cache", 3), ("cache", ["a", 3]), ("cache", None), ("seed", True), ("seed", 1.0), ("lr", "1e-3"),
        ("lr", 10**400), ("lr", float("inf")), ("method", ["mha"]), ("compile", 0), ("topk_loss", "all"),
        ("steps", "3"), ("steps", -1), ("seed", 2**64), ("valid_share", 1e300), ("batch_size", 0), ("dropout", -0.1),
    ],
)  # fmt: skip
def test_a_flag_of_another_type_or_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=f"the field 'settings.{name}[.01]*' is"):
        check_recorded({"settings": {name: value}})
    with pytest.raises(SettingsError, match=f"the field '{name}[.01]*' is"):
        recorded_identity({"method": "hs", name: value})


def test_flags_of_another_version_have_no_identity():
    with pytest.raises(SettingsError, match="'flag_of_tomorrow' is no flag of this version"):
        recorded_identity({"method": "hs", "flag_of_tomorrow": 1})
    with pytest.raises(SettingsError, match="'method' is missing"):
        recorded_identity({"seed": 0})


def test_settings_of_the_first_versions_are_read_in_todays_types():
    first = {"method": "mha", "cache": "cache.zarr", "attention_layer": 5, "seed": 3}
    assert as_today(first) == {"method": "mha", "cache": ["cache.zarr"], "attention_layer": "5", "seed": 3}
    assert recorded_identity(first) == recorded_identity({**first, "cache": ["cache.zarr"], "attention_layer": "5"})


def test_a_checkpoint_of_the_first_versions_is_of_the_run_that_it_was():
    settings = TrainSettings(method="mha", attention_layer="5", seed=3)
    first = {name: value for name, value in settings.identity().items() if name not in ("--vocabulary", "--init")}
    assert checkpoint_identity({**first, "--attention-layer": 5, "cache contents": "x"}, "mha") == {
        **settings.identity(),
        "cache contents": "x",
    }
