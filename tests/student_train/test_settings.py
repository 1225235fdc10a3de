"""The flags of `kdtrain`: what they mean together, and what is refused before anything is opened."""

import functools
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from student_train import registry
from student_train.attention_layers import read_attention_layers
from student_train.init_plan import read_init
from student_train.layer_map import MAPPINGS, parse_mapping
from student_train.settings import TrainSettings
from student_train.student_shape import read_student
from teacher_cache.errors import SettingsError


@pytest.fixture(scope="module", autouse=True)
def installed_packages_are_read_once() -> Iterator[None]:
    """In place of once for each of a thousand names that nobody knows: nothing is installed while these tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "entry_points", functools.cache(registry.entry_points))
        yield


def test_weights_follow_the_methods():
    assert TrainSettings(method="mha+hs", weights="1,0.1").method_weights() == {"mha": 1.0, "hs": 0.1}
    assert TrainSettings(method="hs+od").method_weights() == {"hs": 1.0, "od": 1.0}


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"method": "mhx"}, "'mhx' cannot be read at 'mhx': did you mean mha.* Give each of mha, direct"),
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
        ({"method": "mha", "relation_heads": 0}, "--relation-heads 0 cannot be: give a number of at least 1"),
        # texts, each by itself; a typo is one whether or not a method reads the text
        ({"method": "hs", "mapping": "unifrom+lsat"}, r"--mapping 'unifrom\+lsat'.*at 'unifrom': did you mean uniform"),
        ({"method": "mha", "mapping": "lsat"}, "--mapping 'lsat'.*did you mean last"),
        ({"method": "hs", "mapping": "skip+last"}, r"--mapping 'skip\+last' adds skip to something else"),
        ({"method": "hs", "mapping": "1:0"}, "--mapping '1:0' names layer 0 of the teacher"),
        ({"method": "hs", "mapping": "1:4,"}, "--mapping '1:4,' cannot be read at ''"),
        ({"method": "mha", "attention_layer": "lst"}, "--attention-layer 'lst' cannot be read"),
        ({"method": "mha", "attention_layer": "2:0"}, "--attention-layer '2:0' names layer 0 of the teacher"),
        ({"method": "hs", "student": "3xx384"}, "--student '3xx384' is neither a shape nor a folder that exists"),
        ({"method": "hs", "student": "no/folder"}, "--student 'no/folder' is neither a shape nor a folder that exists"),
        ({"method": "hs", "student": "3x384:5"}, "--student '3x384:5': 5 attention heads do not divide"),
        ({"method": "hs", "init": "teacherr"}, "--init 'teacherr' cannot be read.*did you mean teacher:last"),
        ({"method": "hs", "init": "teacher:0"}, "--init 'teacher:0' names layer 0"),
        ({"method": "hs", "init": "teacher:skip"}, "--init 'teacher:skip': mapping skip does not give"),
        # texts beside each other
        ({"method": "hs", "student": "2x32", "mapping": "3:4"}, "--mapping '3:4' names layer 3 of the student"),
        ({"method": "hs", "student": "1x32", "mapping": "skip"}, "--mapping 'skip' leaves out the student's last"),
        ({"method": "direct", "student": "2x32", "attention_layer": "3:4"}, "--attention-layer '3:4' names layer 3 of"),
        ({"method": "hs", "student": "3x32", "init": "teacher:1,2"}, "names 2 teacher layers for a student of 3"),
        ({"method": "hs", "student": ".", "init": "random"}, "--init 'random' with a student from folder"),
    ],
)
def test_values_that_cannot_be_are_refused_by_flag(wrong, named):
    with pytest.raises(SettingsError, match=named):
        TrainSettings(**wrong)


@pytest.mark.parametrize(
    "right",
    [
        {"method": "mha", "student": "2x32", "mapping": "3:4"},  # common to all runs of a sweep, and not read here
        {"method": "hs", "student": "2x32", "attention_layer": "3:4"},
        {"method": "hs", "mapping": "31:4"},  # the default student's depth is the teacher's to say
        {"method": "hs", "student": "3x32", "init": "teacher:6,1,1"},
        {"method": "hs", "student": ".", "init": "auto"},
        {"method": "hs", "student": "3x32", "init": "."},
    ],
)
def test_what_only_the_cache_can_rule_out_is_accepted(right):
    TrainSettings(**right)


NUMBERS = st.integers(0, 41).map(str)
PAIRS = st.tuples(NUMBERS, NUMBERS).map(":".join)
NAMES = st.sampled_from([*MAPPINGS, "unifrom", "lsat", "", "1:", "1:2:3", "+", " last"])
MAPPING_TEXTS = st.lists(st.one_of(NAMES, PAIRS, st.lists(PAIRS, max_size=3).map(",".join)), max_size=3).map("+".join)
ATTENTION_TEXTS = st.one_of(NUMBERS, st.lists(st.one_of(PAIRS, NUMBERS), max_size=3).map(",".join))
SHAPES = st.lists(NUMBERS, min_size=1, max_size=4).map(
    lambda sizes: "x".join(sizes[:2]) + "".join(map(":{}".format, sizes[2:]))
)
INITS = st.one_of(
    st.sampled_from(["auto", "random", "embeddings", "teacher:last", "teacher:skip", "teacherr", "teacher:", ""]),
    st.lists(NUMBERS, max_size=4).map(lambda layers: "teacher:" + ",".join(layers)),
)
DEEP = 41
"""Layers of a teacher that has every layer that these texts name."""


@settings(max_examples=500)
@given(
    method=st.sampled_from(["hs", "mha", "direct+hs"]),
    mapping=MAPPING_TEXTS,
    attention_layer=st.none() | ATTENTION_TEXTS,
    student=st.none() | SHAPES,
    init=INITS,
    relation_heads=st.none() | st.integers(-1, 8),
)
def test_what_constructs_is_accepted_by_all_that_read_it_later(**values):
    """A teacher that is deep enough for every name leaves nothing to refuse."""
    try:
        made = TrainSettings(**values)
    except SettingsError:
        return
    asked = read_student(made.student)
    depth = DEEP if asked is None else asked.layers
    if asked is not None:
        shape = asked.completed(teacher_heads=12)
        assert shape.hidden_size % shape.heads == 0 and shape.layers >= 1
    init = read_init(made.init, from_folder=None)
    # the default student may have as many layers as are named
    start = (len(init.layers) or DEEP) if asked is None else depth
    assert len(init.layers_for(start, DEEP)) == start
    if "hs" in made.methods():
        assert parse_mapping(made.mapping, DEEP, depth).pairs
    if made.attention_layer is not None and made.methods() != ("hs",):
        assert read_attention_layers(made.attention_layer).for_depths(DEEP, depth)


@settings(max_examples=100)
@given(mapping=MAPPING_TEXTS, attention_layer=ATTENTION_TEXTS, init=INITS)
def test_what_no_models_could_follow_is_refused_at_once(mapping, attention_layer, init):
    """The other way round: a text that no depths would make readable does not construct."""
    depths = [*range(1, 5), DEEP]
    for flag, text, read in (
        ("mapping", mapping, lambda depth: parse_mapping(mapping, DEEP, depth)),
        (
            "attention_layer",
            attention_layer,
            lambda depth: read_attention_layers(attention_layer).for_depths(DEEP, depth),
        ),
        ("init", init, lambda depth: read_init(init, from_folder=None).layers_for(depth, DEEP)),
    ):
        possible = any(accepts(lambda depth=depth, read=read: read(depth)) for depth in depths)
        assert accepts(lambda flag=flag, text=text: TrainSettings(method="mha+hs", **{flag: text})) == possible, text


def accepts(make):
    try:
        make()
    except SettingsError:
        return False
    return True


def test_steps_follow_from_epochs_unless_given():
    assert TrainSettings(method="hs", epochs=1, batch_size=32).total_steps(100) == 4
    assert TrainSettings(method="hs", batch_size=10).total_steps(100) == 30
    assert TrainSettings(method="hs", steps=7).total_steps(100) == 7
    # as a float, 1.1 * 100 is more than 110
    assert TrainSettings(method="hs", epochs=1.1, batch_size=10).total_steps(100) == 11
    assert TrainSettings(method="hs", epochs=1.11, batch_size=10).total_steps(100) == 12


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
