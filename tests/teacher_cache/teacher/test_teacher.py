"""What cannot teach is refused by name; what can is left unchanged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, T5Config

from teacher_cache.errors import SettingsError, TeacherError
from teacher_cache.models.attention import project_hidden
from teacher_cache.teacher.teacher import Teacher


def test_unknown_names_say_what_to_do() -> None:
    with pytest.raises(TeacherError, match="(?s)'no/such-teacher' cannot be loaded.*folder of a downloaded model"):
        Teacher.load("no/such-teacher")


def test_decoders_and_encoder_decoders_are_refused_by_family(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(TeacherError, match="family 'gpt2', a decoder"):
        Teacher.load(str(tmp_path / "gpt2"))
    T5Config().save_pretrained(tmp_path / "t5")
    with pytest.raises(TeacherError, match="family 't5', an encoder-decoder"):
        Teacher.load(str(tmp_path / "t5"))


def test_an_incomplete_checkpoint_is_refused(tiny_teacher: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_teacher("bert"), tmp_path / "teacher"))
    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in weights if "layer.2.attention.self.query.weight" in name)
    del weights[lost]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TeacherError, match="lacks 1 encoder weights.*layer.2.attention.self.query.weight"):
        Teacher.load(str(folder))


def test_position_limits_follow_the_family(tiny_teacher: Callable[..., Path]) -> None:
    limits = {
        family: Teacher.load(str(tiny_teacher(family))).record.max_positions for family in ("bert", "xlm-roberta")
    }
    assert limits == {"bert": 64, "xlm-roberta": 64}


def test_devices_that_do_not_exist_are_refused(tiny_teacher: Callable[..., Path]) -> None:
    with pytest.raises(SettingsError, match="'cuda:99'"):
        Teacher.load(str(tiny_teacher("bert")), device="cuda:99")


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta", "distilbert", "electra"])
def test_projections_are_found_and_exact(tiny_teacher: Callable[..., Path], family: str) -> None:
    teacher = Teacher.load(str(tiny_teacher(family)))
    found = teacher.probe_attention(3)
    assert found is not None
    ids_BT = torch.arange(10, 40).view(3, 10)
    outputs = teacher.run(ids_BT, torch.full((3,), 10), hidden_layers=[2], attention_layers=[3])
    projected = project_hidden(outputs.hidden[2], found)
    for name in ("query_BTD", "key_BTD", "value_BTD"):
        assert torch.equal(getattr(projected, name), getattr(outputs.attention[3], name))


def test_no_projections_where_rotary_positions_stand_between(tiny_teacher: Callable[..., Path]) -> None:
    assert Teacher.load(str(tiny_teacher("modernbert"))).probe_attention(3) is None


def test_running_changes_no_weight(tiny_teacher: Callable[..., Path]) -> None:
    teacher = Teacher.load(str(tiny_teacher("bert")))
    before = {name: tensor.clone() for name, tensor in teacher.model.state_dict().items()}
    teacher.probe_attention(2)
    teacher.start()
    outputs = teacher.run(torch.arange(10, 30).view(2, 10), torch.tensor([10, 4]), hidden_layers=[4])
    assert torch.equal(outputs.hidden[4], outputs.final_BTD)
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    for name, tensor in teacher.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_teacher_without_tokenizer_files_is_refused(tiny_teacher: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_teacher("bert"), tmp_path / "teacher"))
    for file in folder.glob("tok*"):
        file.unlink()
    with pytest.raises(TeacherError, match="tokenizer"):
        Teacher.load(str(folder))


@pytest.mark.parametrize("damage", ["cut", "noise"])
def test_damaged_weights_are_a_message(tiny_teacher: Callable[..., Path], tmp_path: Path, damage: str) -> None:
    folder = Path(shutil.copytree(tiny_teacher("bert"), tmp_path / "teacher"))
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2] if damage == "cut" else bytes(range(256)) * 9)
    with pytest.raises(TeacherError, match="cannot be loaded.*not a readable model"):
        Teacher.load(str(folder))


def test_the_head_is_tried_before_anything_is_built(tiny_teacher: Callable[..., Path]) -> None:
    teacher = Teacher.load(str(tiny_teacher("bert")))
    teacher.probe_head()
    teacher.model.cls = torch.nn.Identity()
    with pytest.raises(TeacherError, match="head of family 'bert' gives"):
        teacher.probe_head()
